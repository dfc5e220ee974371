"""Measurements on the ranks of a torchrun job: attention of plans, kernels, links and host memory.

Every function that measures is collective over the default process group.
"""
