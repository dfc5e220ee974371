"""Published evaluations, simulated: ``python -m benchmarks.paper``. docs/paper.md has the results."""
