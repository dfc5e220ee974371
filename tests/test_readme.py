"""The README is true: its example runs, and its flags are the plugin's flags."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_wallfacer.megatron.arguments import add_arguments

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plain_pytorch_example_is_exact(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"rank \d: largest difference from dense attention (\d\.\de[+-]\d\d)", done.stdout)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-12


def test_the_flag_table_is_complete() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    ours = {option for action in parser._actions for option in action.option_strings if "wallfacer" in option}
    assert set(re.findall(r"^\| `(--wallfacer-[a-z-]+)", README, flags=re.MULTILINE)) == ours


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (Path(__file__).parents[1] / target).exists(), target
