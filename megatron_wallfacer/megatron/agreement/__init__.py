"""Compare the ranks of a Megatron job at start and after the model is built."""
