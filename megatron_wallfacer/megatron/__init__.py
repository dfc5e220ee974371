"""Connect the plugin to Megatron-LM: hooks, flags, the core attention module, the launcher and the CPU runtime."""
