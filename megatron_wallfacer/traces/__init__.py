"""Read the timelines of a training run from files, align their clocks, and sum them per rank."""
