"""graftrec's model side: Delta snapshots in, tracked and gated model versions out. See trainer/README.md for the
map."""
