"""Implement the commands of ``wallfacer``: one file per command, with its parser, its call and its output."""
