"""Modelled clusters, simulations of schedules on them, and searches for the fastest configuration."""
