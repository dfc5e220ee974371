"""The planning floor: a cluster on paper, schedules played on it, and the grid that is fastest there."""
