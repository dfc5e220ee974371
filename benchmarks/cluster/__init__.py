"""An emulated cluster: network namespaces, rate-limited links, and torch.distributed ranks inside them."""
