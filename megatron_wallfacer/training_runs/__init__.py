"""Training runs on this node: start a Megatron script, read its log, find the rank that failed, compare losses."""
