"""Train on this node: run a Megatron script, read its log, find the rank that failed, and compare losses."""
