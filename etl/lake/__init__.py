"""Delta tables: written, committed, read by snapshot, kept."""
