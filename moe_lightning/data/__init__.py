"""Input files as rows, rows as planned batches, and training text as packed sequences."""
