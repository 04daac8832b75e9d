"""Vectors of users from whom they know and what they took, and what friends have as scores (survey 2.3)."""
