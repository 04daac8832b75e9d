"""Where a run comes from: settings as flat texts, code version."""

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"section.key": text}; lists as JSON."""
    flat: dict[str, str] = {}
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            flat |= flatten(entry, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = entry if isinstance(entry, str) else json.dumps(entry)
    return flat


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@functools.cache
def code_version() -> dict[str, str]:
    """Hash of the two packages' sources, and the git commit they stand at (with "+" where they differ from it)."""
    root = Path(__file__).parent.parent.parent
    digest = hashlib.sha256()
    for file in sorted([*root.glob("etl/**/*.py"), *root.glob("trainer/**/*.py")]):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    version = {"sources": digest.hexdigest()[:16]}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "trainer/tracking/provenance.py") and (commit := git("rev-parse", "HEAD")):
        version["commit"] = commit + ("+" if git("status", "--porcelain", "--", "etl", "trainer") else "")
    return version
