"""The files that encoders' weights come in: found in the package that carries them, known by their SHA-256."""

import hashlib
import importlib.util
from pathlib import Path

from trainer.encoders import EncoderError


def package_folder(package: str, *, install: str) -> Path:
    """Where an installed package lies, which isn't imported. Raises EncoderError; `install`: how to get it."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # sys.modules has None in its place
        spec = None
    if spec is None or spec.origin is None:
        raise EncoderError(
            f"this encoder needs the package {package}, which carries its weights, and which isn't there; `{install}`, "
            "or name another encoder"
        )
    return Path(spec.origin).parent


def checked_sha256(path: Path, expected: str) -> str:
    """The SHA-256 of a file. Raises EncoderError where it isn't the expected one, or there is no file."""
    if not path.is_file():
        raise EncoderError(f"expected an encoder's weights at {path}, found none; install its package again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise EncoderError(
            f"{path}: expected an encoder's weights of SHA-256 {expected[:12]}…, found {found[:12]}…; install the "
            "version of its package that constraints.txt names"
        )
    return found
