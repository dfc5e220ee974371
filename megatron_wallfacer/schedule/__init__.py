"""The pure floor: grid, layout, tiles, schedule, volume. Imports nothing but the standard library."""
