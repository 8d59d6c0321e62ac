"""The only place that touches transformers' moving parts: seam, checkpoints, loading, cache."""
