"""Everything that knows Megatron-LM: hooks, arguments, the core attention module, the launcher, the runtimes."""
