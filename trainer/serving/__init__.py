"""An HTTP server around the recommender: it follows the champion, batches requests and can be monitored."""

from typing import Any

from trainer import old_versions


def __getattr__(name: str) -> Any:
    """What versions of 0.1 look for here; see `trainer/old_versions.py`."""
    return old_versions.moved(__name__, name)
