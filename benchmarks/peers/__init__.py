"""Other people's context parallelism, unmodified, on the same kernels and the same cluster.

Not needed by anything else here. Installed apart from the project's environment, by

    python -m pip install --no-deps --target benchmarks/.peers -r benchmarks/peers/requirements.txt
"""
