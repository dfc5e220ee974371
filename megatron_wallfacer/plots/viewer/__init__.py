"""One HTML file that shows a grid at work, step by step. It knows nothing but what the schedules say."""
