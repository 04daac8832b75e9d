"""Where a run comes from, fit to be shown to others: settings without secrets, code version."""

import functools
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECRET_NAME = re.compile(r"passw|secret|token|credential|access.?key|api.?key|private.?key", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def redact(text: str) -> str:
    """`text` without user info in URIs and values of environment variables that are secret by their name."""
    text = _USER_INFO.sub("***", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6 and not Path(value).exists():
            text = text.replace(value, "***")
    return text


def without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: without_secrets(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_secrets(entry, name) for entry in value]
    if isinstance(value, str):
        return "***" if value and _SECRET_NAME.search(name) else redact(value)
    return value


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
    root = Path(__file__).parent.parent
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

    if git("ls-files", "--error-unmatch", "trainer/tracking.py") and (commit := git("rev-parse", "HEAD")):
        version["commit"] = commit + ("+" if git("status", "--porcelain", "--", "etl", "trainer") else "")
    return version
