"""Embeddings of knowledge graphs (survey 2.2): models, training, filtered ranking, and vectors for other models."""
