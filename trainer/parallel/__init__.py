"""Cores of a process, and processes of a training run."""
