"""graftrec's model side: Delta snapshots in, tracked and gated model versions out. See trainer/README.md for the
map."""

import os

import etl  # noqa: F401 - of the same place, whatever a registered version puts into sys.path
from trainer import old_versions

# Idle OpenMP threads sleep instead of spinning. OpenMP reads it once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

old_versions.install()
