"""From a pinned Delta snapshot to batches: `order` says which rows when, `dataset` reads, `loader` cuts and resumes."""
