"""Gains over from scratch: pictures with intervals, and every row under every protocol and convention."""

from collections.abc import Sequence

from etl.text_table import with_sign
from trainer.evaluation.significance import p_text
from trainer.figures import Gain, gain_panels
from trainer.report.document import Block, Cell, Fold, Heading, Picture, Table, Text, fold
from trainer.report.labels import Row, interval, label_of, panel_of, percent, percentage_points, spread
from trainer.report.results import Place, Results


def gain_pictures(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for place in results.places:
        panels = {}
        for panel in results.panels:
            own = [row for row in results.done if panel_of(row) == panel and (place, row["id"]) in results.gains]
            gains = [(row, results.gains[place, row["id"]]) for row in own]
            if gains:
                panels[panel] = [
                    Gain(label_of(row), 100 * gain["gain"], 100 * gain["low"], 100 * gain["high"])
                    for row, gain in gains
                ]
        if panels:
            figure = gain_panels(panels, metric=results.metric, unit="percentage points")
            shows = f"Gains in {results.metric} over from scratch with intervals, {place}"
            blocks += [Heading(str(place), 3), Picture(f"gains-{place.protocol}-{place.convention}", figure, shows)]
    if not blocks:
        return []
    return [Heading("Gains over from scratch"), *blocks[:2], *fold("under the other ways of scoring", blocks[2:])]


def all_rows(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for place in results.places:
        head = ["%", *results.metrics, f"gain in {results.metric}", "relative", "p (Holm)", "bootstrap, users"]
        rows: list[Sequence[Cell | str] | str] = []
        for title, own in results.groups():
            rows.append(title)
            for row in own:
                cells = [
                    Cell(percent(results.mean(row, place, metric)), spread(results.scores(row, place, metric)))
                    for metric in results.metrics
                ]
                rows.append([label_of(row), *cells, *_gain_cells(results, place, row)])
        blocks.append(Fold(str(place), [Table(head, rows, stacked=True)]))
    text = (
        "Every row, baselines too, under every way of scoring; ± is the standard deviation over seeds. A number is "
        "comparable within its table only. No claim is made for baselines, so they have no p-value."
    )
    return [Heading("All rows under every way of scoring"), Text(text), *blocks]


def _gain_cells(results: Results, place: Place, row: Row) -> list[Cell]:
    gain = results.gains.get((place, row["id"]))
    if gain is None:
        return [Cell("")] * 4
    relative = "" if gain["relative_gain"] is None else f"{with_sign(100 * gain['relative_gain'], 1)} %"
    bootstrap = {"low": gain["bootstrap"][0], "high": gain["bootstrap"][1]}
    return [
        Cell(percentage_points(gain["gain"]), interval(gain), results.tone(place, row)),
        Cell(relative),
        Cell(p_text(gain["p_holm"])),
        Cell(interval(bootstrap)),
    ]
