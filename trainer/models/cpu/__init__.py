"""Tricks for CPUs."""
