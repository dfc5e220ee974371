"""Measure attention of plans, kernels, links and host memory on the ranks of a torchrun job.

All ranks of the default process group must call every function that measures.
"""
