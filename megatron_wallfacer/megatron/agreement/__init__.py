"""What the ranks of a Megatron job must have in common: at start, and once the model is built."""
