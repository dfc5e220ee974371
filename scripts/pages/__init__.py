"""Parts of the documentation that are generated: ``python -m scripts.pages`` writes them, a test compares them."""
