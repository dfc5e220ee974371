"""Hypothesis draws the same examples on every run, so that the proof neither flickers nor slows down by chance."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "schedule", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("schedule")
