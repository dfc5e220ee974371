"""Memory of a training step on Megatron's model, counted on tensors without memory."""
