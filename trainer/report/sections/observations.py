"""The survey's observations with a verdict each, and the pairs of rows behind it."""

from collections.abc import Mapping, Sequence

from trainer.evaluation.significance import p_text
from trainer.report.document import Block, Cell, Fold, Heading, Table, Text, Tone
from trainer.report.hypotheses import LEVEL
from trainer.report.labels import Row, interval, p_equals, percentage_points
from trainer.report.results import Results

TONES: Mapping[str, Tone] = {"supported": "up", "reversed": "down"}


def observations(results: Results) -> list[Block]:
    tested = results.hypotheses
    if not tested:
        return []
    names = list(dict.fromkeys(one["name"] for one in tested))
    by_place = {(one["name"], place): one for one in tested for place in results.places if place.holds(one)}
    rows = []
    for name in names:
        first = by_place[name, results.head]
        finding = first["survey"]
        theirs = [Cell(percentage_points(finding["gain"]), finding["verdict"])] if finding else [Cell("–")]
        cells = [_verdict(by_place[name, place]) for place in results.places]
        rows.append([first["claim"], *cells, *theirs])
    return [
        Heading("The survey's observations, tested"),
        Text(
            f"Each is the mean of paired differences in {results.metric} over all other factors. It is supported or "
            f"reversed where p ≤ {LEVEL} after Holm's correction within a column; users and seeds both vary in "
            "the test. The survey printed no intervals: beside its mean is the number of its rows in which the "
            "claim holds."
        ),
        Table(["claim", *map(str, results.places), "survey"], rows, stacked=True),
        *[_single_rows(results, name, by_place[name, results.head]) for name in names],
    ]


def _single_rows(results: Results, name: str, finding: Row) -> Block:
    pairs = f"{finding['num_pairs']} of {len(finding['rows'])} pairs"
    rows: list[Sequence[Cell | str] | str] = []
    for one in finding["rows"]:
        pair = [results.name(one["row"]), results.name(one["against"])]
        if one["gain"] is None:
            rows.append([pair[0], Cell(pair[1], one["reason"]), Cell("missing", tone="faint"), "", ""])
        else:
            rows.append([*pair, percentage_points(one["gain"]), interval(one), p_text(one["p_value"])])
    table = Table(["row", "against", "gain", "95 % interval", "p, unadjusted"], rows, texts=2)
    return Fold(f"{finding['claim']}: {finding['verdict']}, {pairs} ({results.head})", [table])


def _verdict(finding: Row) -> Cell:
    if finding["gain"] is None:
        return Cell("unknown", "no pair of rows", "faint")
    beside = f"{percentage_points(finding['gain'])} {interval(finding)}\np {p_equals(finding['p_holm'])}"
    if finding["num_pairs"] < len(finding["rows"]):
        beside += f"\n{finding['num_pairs']} of {len(finding['rows'])} pairs"
    if finding["num_seeds"] < 2:
        beside += ", one seed"
    return Cell(finding["verdict"], beside, TONES.get(finding["verdict"], "faint"))
