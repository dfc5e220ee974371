"""Load, check and run presets: YAML files that define a Megatron training job under torchrun."""
