"""How rows and numbers are written, in every section alike: metrics in percent, gains in percentage points."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from etl.text_table import with_sign
from trainer.evaluation.significance import p_text
from trainer.report import survey

Row = Mapping[str, Any]
FROM_SCRATCH = "from scratch"
CUSTOM = "Other configurations"
# How the reason of a row begins that was left out on purpose; the second in results of older versions.
NOT_REQUESTED = ("not requested", "not asked for")


def model_name(name: str) -> str:
    return survey.NAMES.get(name, name)


def metadata(row: Row) -> str:
    return "with metadata" if row["knowledge"] else "without metadata"


def factors(row: Row) -> str:
    """Transfer and pre-training, e.g. "deep, masked item"."""
    if row["transfer"] == "none":
        return FROM_SCRATCH
    return f"{row['transfer']}, {(row['pretrain_task'] or '-').replace('_', ' ')}"


def panel_of(row: Row) -> str:
    """Which rows share a picture."""
    return CUSTOM if row["kind"] == "custom" else model_name(row["model"])


def series_of(row: Row) -> str:
    """The name of a row's line in a panel that gives the rest."""
    return str(row["label"]) if row["kind"] == "custom" else factors(row)


def label_of(row: Row) -> str:
    """A row within its model's block."""
    if row["kind"] != "model":
        return str(row["label"])
    return factors(row) + (" + metadata" if row["knowledge"] else "")


def name_of(row: Row) -> str:
    return f"{model_name(row['model'])}, {label_of(row)}" if row["kind"] == "model" else label_of(row)


def dataset_name(data: Mapping[str, Any]) -> str:
    """Name of the log; older results have none and give their lake."""
    if data.get("dataset"):
        return str(data["dataset"])
    return "MovieLens-1M" if survey.is_of(data["domains"]) else f"The lake {data['lake']}"


def left_out(row: Row) -> bool:
    return str(row.get("reason") or "").startswith(NOT_REQUESTED)


def count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def percent(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:.2f}"


def percentage_points(value: float) -> str:
    """A difference in percentage points."""
    return with_sign(100 * value, 2)


def interval(entry: Row) -> str:
    return f"[{percentage_points(entry['low'])}, {percentage_points(entry['high'])}]"


def spread(scores: Mapping[str, Any] | None) -> str:
    seeds = [] if scores is None else scores["seeds"]
    return f"±{100 * np.std(seeds, ddof=1):.2f}" if len(seeds) > 1 else ""


def p_equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"


def duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
