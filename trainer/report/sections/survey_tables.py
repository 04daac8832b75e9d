"""Tables 1 and 2 of the survey, with its numbers beside ours where the data are its own."""

from collections.abc import Mapping, Sequence

from trainer.report import survey
from trainer.report.document import Block, Cell, Heading, Table, Text
from trainer.report.hypotheses import LEVEL
from trainer.report.labels import Row, label_of, model_name, percent
from trainer.report.results import Place, Results


def table_1(results: Results) -> list[Block]:
    data = results.data
    roles = {"all": "all", data["source_domain"]: "source", data["target_domain"]: "target"}
    keys = ("users", "items", "items_with_knowledge", "interactions", "average_length")
    rows = []
    for domain in data["domains"]:
        role = roles.get(domain["domain"])
        theirs = survey.TABLE_1[role] if results.is_surveys_data and role else None
        shown = [f"{domain[key]:,.1f}" if key == "average_length" else f"{domain[key]:,}" for key in keys]
        beside = [f"{value:,}" for value in theirs] if theirs else [""] * len(keys)
        rows.append([domain["domain"], *[Cell(*pair) for pair in zip(shown, beside, strict=True)]])
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    head = ["domain", "users", "items", "with metadata", "interactions", "average length"]
    return [
        Heading("Table 1: the data"),
        *([Text("The survey's numbers are smaller beside ours.")] if results.is_surveys_data else []),
        Table(head, rows),
        Text(f"Lake {data['lake']}, release {data['release']}. Snapshots: {versions}.", "faint"),
    ]


def table_2(results: Results) -> list[Block]:
    """The survey's Table 2: each model's rows under the way of scoring that the survey's numbers of it fit."""
    if not results.models:
        return []
    rows: list[Sequence[Cell | str] | str] = []
    metrics = [name for name in survey.METRICS if name in results.metrics] or results.metrics
    for model in results.models:
        place = Place(survey.PROTOCOL, survey.CONVENTIONS.get(model, results.head.convention))
        place = place if place in results.places else results.head
        rows.append(f"{model_name(model)} ({place})")
        own = [row for row in results.rows if row["kind"] == "model" and row["model"] == model]
        for row in sorted(own, key=lambda row: row["status"] != "done"):
            rows.append([label_of(row), *_cells_of_table_2(results, row, place, metrics)])
    beside = (
        "Ours in percent, the survey's smaller beside it. Compare within a block only: the survey's BERT4Rec rows "
        "count three items in one list, its Caser rows one at a time, and these lie so near chance that other "
        "candidates must have been scored. What can be compared with the survey is the direction of a gain."
        if results.is_surveys_data
        else "These data are not the survey's, so its numbers are not shown."
    )
    marks = f" Coloured: {results.metric} better or worse than from scratch, p ≤ {LEVEL} after Holm's correction."
    return [Heading("Table 2"), Text(beside + marks), Table(["%", *metrics], rows)]


def _cells_of_table_2(results: Results, row: Row, place: Place, metrics: Sequence[str]) -> list[Cell]:
    theirs: Mapping[str, float] = {}
    if results.is_surveys_data and row["id"] in survey.TABLE_2:
        theirs = dict(zip(survey.METRICS, survey.TABLE_2[row["id"]], strict=True))
    tone = results.tone(place, row)
    return [
        Cell(
            "missing" if row["status"] != "done" else percent(results.mean(row, place, metric)),
            f"{theirs[metric]:.2f}" if metric in theirs else "",
            "faint" if row["status"] != "done" else tone if metric == results.metric else "",
        )
        for metric in metrics
    ]
