"""A synthetic log of any size."""
