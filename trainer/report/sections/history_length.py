"""Means and gains by the length of the user's history in the target domain."""

from collections.abc import Sequence

from trainer.figures import Gain, slice_panels
from trainer.report.document import Block, Cell, Fold, Heading, Picture, Table, Text, Tone
from trainer.report.labels import (
    CUSTOM,
    Row,
    interval,
    label_of,
    metadata,
    model_name,
    percent,
    percentage_points,
    series_of,
)
from trainer.report.results import Results

FEW_USERS = 30  # of a slice: their intervals would hide all others


def history_length(results: Results) -> list[Block]:
    own = [one for one in results.slices if results.head.holds(one)]
    if not own:
        return []
    found = {(one["row"], one["slice"]): one for one in own}
    slices = {one["slice"]: one["users"] for one in own}
    drawn = [name for name, users in slices.items() if users >= FEW_USERS]
    pictures: dict[str, dict[str, dict[str, list[Gain]]]] = {}  # picture -> panel -> series
    for row in [row for row in results.done if row["kind"] in ("model", "custom")]:
        picture, panel = "", f"{model_name(row['model'])}, {metadata(row)}"
        if row["kind"] == "custom":
            picture = panel = results.family(row)
            picture = "" if picture == CUSTOM else picture
        gains = [one for name in drawn if (one := found.get((row["id"], name))) and one["gain"] is not None]
        if gains:
            pictures.setdefault(picture, {}).setdefault(panel, {})[series_of(row)] = [
                Gain(one["slice"], 100 * one["gain"], 100 * one["low"], 100 * one["high"]) for one in gains
            ]
    rows: list[Sequence[Cell | str] | str] = []
    for title, members in results.groups():
        rows.append(title)
        rows += [[label_of(row), *[_slice_cell(found.get((row["id"], name))) for name in slices]] for row in members]
    head = [f"{results.metric}, %", *(f"{name} items: {users:,} users" for name, users in slices.items())]
    target = results.data["target_domain"]
    text = f"Users by the items of {target} in their input, the coldest first ({results.head})."
    finding, metric = f"Gains in {results.metric} by length of the user's history", f"{results.metric}, %"
    shown = []
    for number, (family, panels) in enumerate(pictures.items()):
        names = [name for name in results.series[1:] if not family or any(name in series for series in panels.values())]
        file = f"lengths-{number}" if family else "lengths"
        shown.append(Picture(file, slice_panels(panels, metric=metric, names=names), finding))
    return [
        Heading("Gain by length of the user's target history"),
        Text(text),
        *shown,
        Fold(
            "Means and gains over from scratch (intervals not corrected for multiple comparisons)",
            [Table(head, rows, stacked=True)],
        ),
    ]


def _slice_cell(entry: Row | None) -> Cell:
    if entry is None:
        return Cell("–", tone="faint")
    if entry["gain"] is None:
        return Cell(percent(entry["mean"]))
    tone: Tone = "up" if entry["low"] > 0 else "down" if entry["high"] < 0 else ""
    return Cell(percent(entry["mean"]), f"{percentage_points(entry['gain'])} {interval(entry)}", tone)
