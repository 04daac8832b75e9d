"""What was run and what came of it, at the top of the page: a lead, the best rows as a picture, the findings."""

from typing import Any

import numpy as np

from trainer.figures import Score, score_overview
from trainer.report.document import Block, Columns, Heading, Picture, Points, Text
from trainer.report.labels import (
    Row,
    count,
    dataset_name,
    interval,
    left_out,
    name_of,
    p_equals,
    percent,
    percentage_points,
)
from trainer.report.results import Results

OVERVIEW_ROWS = 11  # of the first picture, beside two baselines
# In words: which items a protocol ranks, and how a convention treats several held-out items.
AMONG_TEXT = {
    "full": "all items that the user has not taken",
    "uniform-100": "100 items sampled uniformly",
    "popular-100": "100 items sampled by popularity",
    "top-100": "the 100 most popular items",
}
CONVENTION_TEXT = {
    "list": "all of a user's held-out items in one list",
    "single": "each held-out item by itself",
    "basket": "the items of a user's next basket in one list",
    "": "each user by itself",
}


def summary(results: Results) -> list[Block]:
    figure = score_overview(overview(results), metric=results.metric)
    alt_text = f"{results.metric} of the best rows and of simple baselines, {results.head}"
    return [
        Text(_about(results), "lead"),
        Columns([Picture("overview", figure, alt_text)], _in_short(results)),
        *(Text(f"Under {line}.", "faint") for line in results.cards),
        Text(_what_ran(results), "faint"),
    ]


def overview(results: Results) -> list[Score]:
    """All rows, or of many the best by model, task and transfer; the best baselines, two of them."""
    ranked = sorted(
        (row for row in results.done if np.isfinite(results.mean(row, results.head, results.metric))),
        key=lambda row: -results.mean(row, results.head, results.metric),
    )
    models = [row for row in ranked if row["kind"] != "baseline"]
    if len(models) > OVERVIEW_ROWS:
        best: dict[tuple[Any, ...], Row] = {}
        for row in models:
            best.setdefault(tuple(row[key] for key in ("kind", "model", "task", "transfer")), row)
        models = list(best.values())[:OVERVIEW_ROWS]
    baselines = [row for row in ranked if row["kind"] == "baseline"][:2]
    found = []
    for row in [*models, *baselines]:
        scores = results.scores(row, results.head, results.metric)
        assert scores is not None
        seeds = [100 * seed for seed in scores["seeds"] if seed is not None]
        found.append(Score(name_of(row), 100 * scores["mean"], seeds, is_baseline=row["kind"] == "baseline"))
    return found


def _in_short(results: Results) -> list[Block]:
    points = []
    for name in dict.fromkeys(one["name"] for one in results.hypotheses):
        own = [one for one in results.hypotheses if one["name"] == name]
        finding = next((one for one in own if results.head.holds(one)), own[0])
        agree = sum(one["verdict"] == finding["verdict"] for one in own)
        text = f"{finding['claim']}: {finding['verdict']}"
        if finding["gain"] is not None:
            text += f", {percentage_points(finding['gain'])} {interval(finding)}, p {p_equals(finding['p_holm'])}"
            text += f"; the same under {agree} of {len(own)} ways of scoring"
        points.append(text + ".")
    blocks: list[Block] = [Heading("In short"), Points([*points, *_beside_simple(results)])]
    convention = CONVENTION_TEXT.get(results.head.convention, results.head.convention)
    notes = (
        f"{results.metric} under {results.head} ({convention}), in percentage points, with 95 % "
        "intervals; p after Holm's correction."
    )
    if all(len(row["seeds"]) < 2 for row in results.rows):
        notes += " With one seed they and the verdicts are about users only: another initialisation may give others."
    return [*blocks, Text(notes, "faint")]


def _beside_simple(results: Results) -> list[str]:
    """The best transfer compared with from-scratch, the joint model and the simple baselines."""
    kinds = {
        "transfer": [row for row in results.done if row["kind"] == "model" and row["transfer"] != "none"],
        "from-scratch": [r for r in results.done if r["kind"] in ("model", "extra") and r["transfer"] == "none"],
        "joint": [row for row in results.done if row["kind"] == "joint"],
        "other configuration": [row for row in results.done if row["kind"] == "custom"],
        "simple baseline": [row for row in results.done if row["kind"] == "baseline"],
    }
    best = {
        kind: max(
            ((results.mean(row, results.head, results.metric), name_of(row)) for row in rows), key=lambda one: one[0]
        )
        for kind, rows in kinds.items()
        if rows
    }
    ours = "transfer" if "transfer" in best else "other configuration"
    if ours not in best or len(best) == 1:
        return []
    top, label = best.pop(ours)
    others = [
        f"{'above' if top > mean else 'not above'} the best {kind} ({other}, {percent(mean)})"
        for kind, (mean, other) in best.items()
    ]
    word = "transfer" if ours == "transfer" else "row"
    return [f"The best {word}, {label}, has {percent(top)}: {'; '.join(others)}."]


def _about(results: Results) -> str:
    """Dataset, transfer, the protocol in words, and how many of the runs are done."""
    data = results.data
    transfers = any(row["transfer"] not in (None, "none") for row in results.rows)
    where = f"From domain {data['source_domain']} to" if transfers else "On domain"
    held_out = count(data["held_out"], "held-out item") if data.get("held_out") else "held-out items"
    candidates = AMONG_TEXT.get(results.head.protocol, results.head)
    what = data.get("evaluated") or f"the {held_out} of {data['evaluated_users']:,} users"
    return (
        f"{dataset_name(data)}. {where} {data['target_domain']}: {what} (split {data['split']}, {data['part']} part)"
        f"{'' if data.get('evaluated') else f' ranked among {candidates}'}. {_runs_done(results)}"
    )


def _runs_done(results: Results) -> str:
    """E.g. "30 of 90 runs done (seed 0 of 0, 1, 2)"; rows that were left out on purpose are not counted."""
    rows = [row for row in results.rows if row["kind"] != "baseline" and not left_out(row)]
    seeds, met = results.seeds, {run["seed"] for row in rows for run in row["seeds"]}
    done, planned = sum(len(row["seeds"]) for row in rows), len(rows) * len(seeds)
    if done == planned:
        return f"All {count(done, 'run')} done: {count(len(rows), 'row')}, {count(len(seeds), 'seed')}."
    never = [str(seed) for seed in seeds if seed not in met]
    what = f", none of {'seed' if len(never) == 1 else 'seeds'} {', '.join(never)}" if never and met else ""
    return f"{done} of {planned} runs done{what}; the end of this page lists what is missing."


def _what_ran(results: Results) -> str:
    code = results.code
    commit = code["commit"][:12] + (" with changes not committed" if code["dirty"] else "")
    return f"Run from {results.started} to {results.finished} on {results.machine}; commit {commit}."
