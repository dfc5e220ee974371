"""Move activations to host memory: order of copies in a step, slots of host memory, and the copies themselves."""
