"""Comparisons of settings between ranks through the job's store, without collectives, which could hang."""
