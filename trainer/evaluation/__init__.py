"""What a task's models are measured by, compared by, and gated by."""
