"""Grid, layout, tiles, schedule and volume. The package imports the standard library and the error class only."""
