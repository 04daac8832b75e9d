"""graftrec's model side: Delta snapshots in, tracked and gated model versions out. See trainer/README.md for the
map."""

import os

# Idle OpenMP threads sleep instead of spinning. OpenMP reads it once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
