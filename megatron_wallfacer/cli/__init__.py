"""The commands of ``wallfacer``. Each file parses the arguments of one command, calls a library, and prints results."""
