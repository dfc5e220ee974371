"""Explanations of long waits. A thread reads labels that a pass sets before each wait, and finds the blocking rank."""
