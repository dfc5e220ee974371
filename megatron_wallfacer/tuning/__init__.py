"""Measure kernels, links, host memory and whole attention calls on the ranks of a torchrun job.

All ranks of the default process group must call every function that measures.
"""
