"""Presets: YAML files that hold a Megatron command line, and what becomes of them."""
