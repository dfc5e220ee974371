"""Grid, layout, tiles, schedule and volume. The package imports only the standard library and the error classes."""
