"""`python -m megatron_wallfacer SCRIPT [ARGUMENTS]`: see `megatron.launcher`."""

import sys

from megatron_wallfacer.megatron.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
