"""A model folder, and what scores and recommends with it."""
