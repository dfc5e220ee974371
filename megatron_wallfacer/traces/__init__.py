"""Timelines of a training run: read from files, put on one clock, and summed up per rank."""
