"""Presets: YAML files that hold a Megatron command line. They are loaded, checked and run with torchrun."""
