"""Expert workers: processes that hold experts, and the master's view of them."""
