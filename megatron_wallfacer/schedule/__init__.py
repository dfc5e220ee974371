"""The pure floor: grid, layout, tiles, schedule, volume. Imports the standard library and the error class."""
