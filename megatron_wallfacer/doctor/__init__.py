"""``wallfacer doctor``: what is on this machine, what training would stumble over, and what to do about it."""
