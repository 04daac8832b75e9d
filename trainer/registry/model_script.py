"""What MLflow runs when it loads a registered version ("models from code"): nothing is unpickled.

It stands beside the sources that the version was made by, `code/sources.zip`, verifies these, and imports from them.
Until then it uses nothing of ours. Without that archive it is the checkout's own, whose sources are here.
"""

import hashlib
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE / "code" / "sources.zip"

if _SOURCES.is_file():
    import yaml

    with _SOURCES.open("rb") as _file:
        _found = hashlib.file_digest(_file, "sha256").hexdigest()
    _expected = yaml.safe_load((_HERE / "MLmodel").read_text(encoding="utf-8"))["metadata"]["graftrec.sources"]
    if _found != _expected:
        raise ImportError(
            f"{_SOURCES.name} is damaged: expected SHA-256 {_expected}, found {_found}; fetch the version, or register "
            "the model, again"
        )
    sys.path.insert(0, str(_SOURCES))

from trainer import tracking  # noqa: E402
from trainer.inference.recommender import RequestError  # noqa: E402
from trainer.registry import pyfunc  # noqa: E402

tracking.offer(pyfunc.load, pyfunc.answer, RequestError)
