"""Load, check and run presets: YAML files with a Megatron command line, which runs under torchrun."""
