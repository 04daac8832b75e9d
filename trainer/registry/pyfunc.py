"""What a registered version answers behind MLflow; `model_script.py` is what MLflow runs."""

import dataclasses
from pathlib import Path
from typing import Any

from trainer.inference.model_archive import MODEL, unarchived
from trainer.inference.recommender import parse, parse_params
from trainer.registry import loading
from trainer.registry.loading import Served
from trainer.registry.versions import scratch_folder


def load(folder: Path, label: str) -> Served:
    """What the store holds of a version, in archives or as a folder, ready to answer. Raises GraftrecError."""
    if (folder / MODEL).is_file():
        folder = unarchived(folder, scratch_folder())
    return loading.load(folder, label)


def answer(served: Served, records: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as plain records. Raises RequestError."""
    domain, k = parse_params(params)
    return [dataclasses.asdict(one) for one in served.of_domain(domain).answer(parse(records), k)]
