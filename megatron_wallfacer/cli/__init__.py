"""The commands of ``wallfacer``. A command's file parses its arguments, calls a library, and prints the result."""
