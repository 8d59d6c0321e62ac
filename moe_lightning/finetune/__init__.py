"""What training needs besides a model and data."""
