"""Faults, and what the plugin does about each: the rows of docs/reliability.md, and the tests that check them."""
