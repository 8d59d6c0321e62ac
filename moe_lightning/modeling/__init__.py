"""The only place that touches transformers' moving parts: checkpoints, the experts seam, loading, the KV cache."""
