"""graftrec's model side: Delta snapshots in, tracked and gated model versions out. See trainer/README.md for the
map."""

import os

# Threads of OpenMP that have nothing to do sleep, and don't spin. It is read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
