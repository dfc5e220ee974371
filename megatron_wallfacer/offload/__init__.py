"""Activations in host memory: which copies a step makes, the memory that they need, and what runs them."""
