"""Ranks compare what they must have in common, through the store of the job: no collective, so that none can hang."""
