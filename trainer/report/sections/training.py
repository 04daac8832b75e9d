"""Learning curves, and what training cost."""

from collections.abc import Sequence

import numpy as np

from trainer.figures import Curve, curve_panels
from trainer.report.document import Block, Cell, Heading, Picture, Table, Text
from trainer.report.labels import Row, duration, label_of, metadata, panel_of, series_of
from trainer.report.results import NAN, Results

# Of a run in results.json -> the title of its column.
COSTS = {
    "parameters": "parameters",
    "trained": "trained",
    "epochs": "epochs",
    "best_epoch": "best epoch",
    "seconds": "training",
    "pretrain_seconds": "pre-training",
    "items_per_second": "items/s",
    "peak_gb": "peak memory",
}


def curves(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for number, name in enumerate(results.panels):
        members = [row for row in results.done if row["kind"] in ("model", "custom") and panel_of(row) == name]
        families: dict[str, list[Row]] = {}
        for row in members:
            families.setdefault(results.family(row) if row["kind"] == "custom" else name, []).append(row)
        for part, (family, rows) in enumerate(families.items()):
            panels: dict[str, list[Curve]] = {}
            for row in rows:
                for run in row["seeds"]:
                    if run["curve"]:
                        panels.setdefault(metadata(row), []).append(_curve(series_of(row), run["curve"]))
            if not panels:
                continue
            names = results.series if len(families) == 1 else [series_of(row) for row in rows]
            file = f"curves-{number}" if len(families) == 1 else f"curves-{number}-{part}"
            shows = f"Validation {results.monitor} and training loss by epoch, every seed a line: {family}"
            blocks += [Heading(family, 3), Picture(file, curve_panels(panels, names=names), shows)]
    text = "The training that ended in the scored model, every seed a line; dots are the epochs that were kept."
    return [Heading("Learning curves"), Text(text), *blocks] if blocks else []


def cost(results: Results) -> list[Block]:
    runs = [run for row in results.done for run in row["seeds"]]
    shown = [key for key in COSTS if any(run.get(key) is not None for run in runs)]
    rows: list[Sequence[Cell | str] | str] = []
    for title, own in results.groups():
        trained = [row for row in own if row["kind"] != "baseline" and row["seeds"]]
        if not trained:
            continue
        rows.append(title)
        for row in trained:
            cells = [_cost(key, _mean_of(row["seeds"], key)) for key in shown]
            rows.append([label_of(row), *cells, _reached(results, row)])
    head = ["mean over seeds", *(COSTS[key] for key in shown), "as good after"]
    text = (
        "A pre-trained model that several rows share was trained once; each of them shows its whole time. As good "
        "after: epochs until the validation score is that which the row it is compared with had at its best, seed "
        "by seed; pre-training is not in them."
    )
    return [Heading("Cost"), Text(text), Table(head, rows)] if rows else []


def _cost(key: str, value: float) -> str:
    if not np.isfinite(value):
        return "–"
    if key.endswith("seconds"):
        return duration(value)
    return f"{value:.2f} GB" if key == "peak_gb" else f"{value:,.0f}"


def _reached(results: Results, row: Row) -> str:
    """Mean epochs until a row's validation score reaches the best one of the row that it is compared with, and in
    how many of the seeds, if not in all."""
    gain = results.gains.get((results.head, row["id"]))
    other = next((one for one in results.done if gain and one["id"] == gain["against"]), None)
    if other is None:
        return ""
    bars = {run["seed"]: _best_of(run) for run in other["seeds"]}
    pairs = [(run["curve"], bars[run["seed"]]) for run in row["seeds"] if run["seed"] in bars]
    epochs = [
        next((point["epoch"] for point in curve if bar is not None and (point["validation"] or 0) >= bar), None)
        for curve, bar in pairs
    ]
    known = [epoch for epoch in epochs if epoch is not None]
    if not known:
        return "never"
    text = f"{np.mean(known):,.1f} epochs".replace(".0 ", " ")
    return text if len(known) == len(epochs) else f"{text} in {len(known)} of {len(epochs)}"


def _curve(name: str, epochs: Sequence[Row]) -> Curve:
    last = max(one["epoch"] for one in epochs)
    loss, validation = [NAN] * last, [NAN] * last
    for one in epochs:
        for values, key in ((loss, "loss"), (validation, "validation")):
            values[one["epoch"] - 1] = NAN if one[key] is None else one[key]
    return Curve(name, loss, validation)


def _best_of(run: Row) -> float | None:
    """The best validation score of a run's epochs."""
    return max((point["validation"] for point in run["curve"] if point["validation"] is not None), default=None)


def _mean_of(runs: Sequence[Row], key: str) -> float:
    known = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(known)) if known else NAN
