"""What ``wallfacer trace`` is made of: time lines are read, put on one clock, summed up and written together."""
