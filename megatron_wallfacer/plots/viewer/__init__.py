"""HTML page that steps through the schedules of a grid: transfers between ranks, and computed chunk pairs."""
