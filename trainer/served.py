"""The code that MLflow runs when it loads a registered model ("models from code"): nothing is unpickled."""

import dataclasses
from typing import Any

from trainer import tracking
from trainer.serving import DEFAULT_K, Recommender, parse


def answer(recommender: Recommender, records: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as plain records."""
    answers = recommender.answer(parse(records), int(params.get("k", DEFAULT_K)))
    return [dataclasses.asdict(one) for one in answers]


tracking.offer(Recommender.load, answer)
