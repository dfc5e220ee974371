"""Explanations of waits: labels set before each wait, a thread that reads them, the chain of ranks behind a wait."""
