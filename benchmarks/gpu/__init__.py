"""Measurements on one GPU: what `scripts/gpu_acceptance.sh` runs. On a CPU they run too, small."""
