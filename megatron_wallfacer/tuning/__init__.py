"""What ``wallfacer tune`` measures on a job's own ranks. Everything here is collective over the world."""
