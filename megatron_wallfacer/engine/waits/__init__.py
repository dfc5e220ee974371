"""Explanations of long waits. A pass records what it waits for, and a thread finds the rank that blocks the others."""
