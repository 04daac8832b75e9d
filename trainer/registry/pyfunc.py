"""The code that MLflow runs when it loads a registered model ("models from code"): nothing is unpickled."""

import dataclasses
from typing import Any

from trainer import tracking
from trainer.inference.recommender import parse, parse_params
from trainer.registry.loading import RELEASE_OF_FEATURES, Served, load

__all__ = ["RELEASE_OF_FEATURES", "answer", "load"]


def answer(served: Served, records: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as plain records. Raises RequestError."""
    k, domain = parse_params(params)
    return [dataclasses.asdict(one) for one in served.of_domain(domain).answer(parse(records), k)]


tracking.offer(load, answer)
