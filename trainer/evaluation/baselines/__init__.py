"""Simple scorers that stand beside every model."""
