"""Read the timelines of a training run from files, align their clocks, and add up the times of each rank."""
