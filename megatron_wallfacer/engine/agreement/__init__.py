"""Comparisons of settings between ranks through the store of the job: no collectives, which could hang."""
