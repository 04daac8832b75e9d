"""An experiment's results as a page for people (survey 4.5): Tables 1 and 2 beside the survey's numbers, gains with
intervals, the survey's observations with a verdict, learning curves, gains by history length, cost, and what ran.

``python -m trainer.report RESULTS.json --folder FOLDER`` draws the page again from kept results. It shows
what is in the results: nothing is scored or tested here. Metrics are in percent, gains in percentage points.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from etl.command import CommandParser, run_command
from etl.settings import GraftrecError
from trainer.evaluation.significance import p_text
from trainer.figures import Curve, Gain, Score, curve_panels, gain_panels, score_overview, slice_panels
from trainer.report import survey
from trainer.report.document import Block, Cell, Columns, Fold, Heading, Picture, Points, Table, Text, Tone
from trainer.report.document import write as write_document
from trainer.report.hypotheses import LEVEL

Row = Mapping[str, Any]
KEYS = (
    "experiment",
    "preset",
    "code",
    "machine",
    "started",
    "finished",
    "data",
    "protocols",
    "conventions",
    "metrics",
    "seeds",
    "rows",
    "comparisons",
    "hypotheses",
    "slices",
)
TONES: Mapping[str, Tone] = {"supported": "up", "reversed": "down"}
FROM_SCRATCH = "from scratch"
OWN = "Other configurations"
MANY_ROWS = 7  # of other configurations, that a picture can distinguish
OVERVIEW_ROWS = 11  # of the first picture, beside two baselines
# How the reason of a row begins that was left out on purpose; the second in results of older versions.
NOT_REQUESTED = ("not requested", "not asked for")
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
FEW_USERS = 30  # of a slice: their intervals would hide all others
NAN = float("nan")


class ReportError(GraftrecError):
    """Results that can't be shown as a report."""


@dataclass(frozen=True)
class Place:
    """Where a number was scored. Only numbers of the same place are compared."""

    protocol: str
    convention: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.protocol, self.convention)))

    def holds(self, entry: Row) -> bool:
        return bool(entry["protocol"] == self.protocol and entry["convention"] == self.convention)


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes report.html, report.md and the latter's pictures into the folder; the path of report.html.

    results: as the experiment writes results.json. Raises ReportError if a part is missing.
    """
    missing = [key for key in KEYS if key not in results]
    missing += [key for key in ("protocols", "conventions") if key in results and not results[key]]
    if missing:
        raise ReportError(
            f"expected an experiment's results, found none of {', '.join(missing)}; give its results.json"
        )
    report = _Report(results)
    return write_document(report.title, report.blocks(), folder, "report")


class _Report:
    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.title = f"Experiment {results['experiment']}, preset {results['preset']}"
        # Earlier releases wrote own for custom.
        self.rows: Sequence[Row] = [{**row, "kind": row["kind"].replace("own", "custom")} for row in results["rows"]]
        self.done = [row for row in self.rows if row["status"] == "done"]
        self.places = [Place(*pair) for pair in product(results["protocols"], results["conventions"])]
        self.head = self.places[0]
        tested = [*results["hypotheses"], *results["comparisons"]]
        self.metric: str = results.get("metric") or (tested[0]["metric"] if tested else "NDCG@10")
        self.monitor = results.get("monitor", self.metric)  # of the validation part; older results have none
        self.is_surveys_data = survey.is_of(results["data"]["domains"])
        self.gains = {
            (Place(gain["protocol"], gain["convention"]), gain["row"]): gain for gain in results["comparisons"]
        }
        transfers = [_factors(row) for row in self.rows if row["kind"] == "model" and row["transfer"] != "none"]
        own = [row["label"] for row in self.rows if row["kind"] == "custom"]
        self.series = [FROM_SCRATCH, *dict.fromkeys(transfers), *own]  # one colour each in all pictures
        self.models = list(dict.fromkeys(row["model"] for row in self.rows if row["kind"] == "model"))
        self.panels = list(dict.fromkeys(_panel(row) for row in self.done if row["kind"] != "baseline"))

    def blocks(self) -> list[Block]:
        return [
            Text(self.about(), "lead"),
            *self.at_a_glance(),
            Text(self.what_ran(), "faint"),
            *self.hypotheses(),
            *self.gains_pictured(),
            *self.table_2(),
            *self.every_protocol(),
            *self.by_length(),
            *self.curves(),
            *self.cost(),
            *self.patches(),
            *self.table_1(),
            *self.cells(),
            *self.missing(),
        ]

    # --- what it was ---

    def about(self) -> str:
        """Dataset, transfer, the protocol in words, and how many of the runs are done."""
        data = self.results["data"]
        transfers = any(row["transfer"] not in (None, "none") for row in self.rows)
        where = f"From domain {data['source_domain']} to" if transfers else "On domain"
        held_out = _count(data["held_out"], "held-out item") if data.get("held_out") else "held-out items"
        candidates = AMONG_TEXT.get(self.head.protocol, self.head)
        what = data.get("evaluated") or f"the {held_out} of {data['evaluated_users']:,} users"
        return (
            f"{_dataset(data)}. {where} {data['target_domain']}: {what} (split {data['split']}, {data['part']} part)"
            f"{'' if data.get('evaluated') else f' ranked among {candidates}'}. {self.runs_done()}"
        )

    def runs_done(self) -> str:
        """E.g. "30 of 90 runs done (seed 0 of 0, 1, 2)"; rows that were left out on purpose are not counted."""
        rows = [row for row in self.rows if row["kind"] != "baseline" and not _left_out(row)]
        seeds, met = self.results["seeds"], {run["seed"] for row in rows for run in row["seeds"]}
        done, planned = sum(len(row["seeds"]) for row in rows), len(rows) * len(seeds)
        if done == planned:
            return f"All {_count(done, 'run')} done: {_count(len(rows), 'row')}, {_count(len(seeds), 'seed')}."
        never = [str(seed) for seed in seeds if seed not in met]
        what = f", none of {'seed' if len(never) == 1 else 'seeds'} {', '.join(never)}" if never and met else ""
        return f"{done} of {planned} runs done{what}; the end of this page lists what is missing."

    def what_ran(self) -> str:
        code = self.results["code"]
        commit = code["commit"][:12] + (" with changes not committed" if code["dirty"] else "")
        return (
            f"Run from {self.results['started']} to {self.results['finished']} on {self.results['machine']}; "
            f"commit {commit}."
        )

    def missing(self) -> list[Block]:
        """Runs without a result, rows that lack one for the same reason together."""
        rows_of: dict[str, list[str]] = {}
        for row in self.rows:
            lost = [seed for seed in self.results["seeds"] if seed not in [run["seed"] for run in row["seeds"]]]
            if row["status"] != "done":
                reason = row.get("reason") or "no reason given"
            elif row["kind"] != "baseline" and lost:
                reason = row.get("reason") or f"no seed {', '.join(map(str, lost))}"
            else:
                continue
            rows_of.setdefault(reason, []).append(_name_of(row))
        if not rows_of:
            return []
        finding = [
            f"{why[0].upper()}{why[1:]} ({_count(len(rows), 'row')}): {'; '.join(rows)}"
            for why, rows in rows_of.items()
        ]
        return [Heading("Missing runs"), Text("No number in this report stands for them."), Points(finding)]

    def at_a_glance(self) -> list[Block]:
        """The best rows as a picture, beside the findings."""
        figure = score_overview(self._overview(), metric=self.metric)
        shows = f"{self.metric} of the best rows and of simple baselines, {self.head}"
        return [Columns([Picture("overview", figure, shows)], self.in_short())]

    def _overview(self) -> list[Score]:
        """All rows, or of many the best by model, task and transfer; the best baselines, two of them."""
        ranked = sorted(
            (row for row in self.done if np.isfinite(self._mean(row, self.head, self.metric))),
            key=lambda row: -self._mean(row, self.head, self.metric),
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
            scores = self._scores(row, self.head, self.metric)
            assert scores is not None
            seeds = [100 * seed for seed in scores["seeds"] if seed is not None]
            found.append(Score(_name_of(row), 100 * scores["mean"], seeds, is_baseline=row["kind"] == "baseline"))
        return found

    def in_short(self) -> list[Block]:
        points = []
        for name in dict.fromkeys(one["name"] for one in self.results["hypotheses"]):
            own = [one for one in self.results["hypotheses"] if one["name"] == name]
            finding = next((one for one in own if self.head.holds(one)), own[0])
            agree = sum(one["verdict"] == finding["verdict"] for one in own)
            text = f"{finding['claim']}: {finding['verdict']}"
            if finding["gain"] is not None:
                text += f", {_points(finding['gain'])} {_interval(finding)}, p {_equals(finding['p_holm'])}"
                text += f"; the same under {agree} of {len(own)} ways of scoring"
            points.append(text + ".")
        blocks: list[Block] = [Heading("In short"), Points([*points, *self._beside_simple()])]
        convention = CONVENTION_TEXT.get(self.head.convention, self.head.convention)
        notes = (
            f"{self.metric} under {self.head} ({convention}), in percentage points, with 95 % "
            "intervals; p after Holm's correction."
        )
        if all(len(row["seeds"]) < 2 for row in self.rows):
            notes += (
                " With one seed they and the verdicts are about users only: another initialisation may give others."
            )
        return [*blocks, Text(notes, "faint")]

    def _beside_simple(self) -> list[str]:
        """The best transfer compared with from-scratch, the joint model and the simple baselines."""
        kinds = {
            "transfer": [row for row in self.done if row["kind"] == "model" and row["transfer"] != "none"],
            "from-scratch": [r for r in self.done if r["kind"] in ("model", "extra") and r["transfer"] == "none"],
            "joint": [row for row in self.done if row["kind"] == "joint"],
            "other configuration": [row for row in self.done if row["kind"] == "custom"],
            "simple baseline": [row for row in self.done if row["kind"] == "baseline"],
        }
        best = {
            kind: max(
                ((self._mean(row, self.head, self.metric), _name_of(row)) for row in rows), key=lambda one: one[0]
            )
            for kind, rows in kinds.items()
            if rows
        }
        ours = "transfer" if "transfer" in best else "other configuration"
        if ours not in best or len(best) == 1:
            return []
        top, label = best.pop(ours)
        others = [
            f"{'above' if top > mean else 'not above'} the best {kind} ({other}, {_percent(mean)})"
            for kind, (mean, other) in best.items()
        ]
        word = "transfer" if ours == "transfer" else "row"
        return [f"The best {word}, {label}, has {_percent(top)}: {'; '.join(others)}."]

    # --- hypotheses ---

    def hypotheses(self) -> list[Block]:
        tested = self.results["hypotheses"]
        if not tested:
            return []
        names = list(dict.fromkeys(one["name"] for one in tested))
        by_place = {(one["name"], place): one for one in tested for place in self.places if place.holds(one)}
        rows = []
        for name in names:
            first = by_place[name, self.head]
            finding = first["survey"]
            theirs = [Cell(_points(finding["gain"]), finding["verdict"])] if finding else [Cell("–")]
            cells = [_verdict(by_place[name, place]) for place in self.places]
            rows.append([first["claim"], *cells, *theirs])
        return [
            Heading("The survey's observations, tested"),
            Text(
                f"Each is the mean of paired differences in {self.metric} over all other factors. It is supported or "
                f"reversed where p ≤ {LEVEL} after Holm's correction within a column; users and seeds both vary in "
                "the test. The survey printed no intervals: beside its mean is the number of its rows in which the "
                "claim holds."
            ),
            Table(["claim", *map(str, self.places), "survey"], rows, stacked=True),
            *[self._single_rows(name, by_place[name, self.head]) for name in names],
        ]

    def _single_rows(self, name: str, finding: Row) -> Block:
        pairs = f"{finding['num_pairs']} of {len(finding['rows'])} pairs"
        rows: list[Sequence[Cell | str] | str] = []
        for one in finding["rows"]:
            pair = [self._name(one["row"]), self._name(one["against"])]
            if one["gain"] is None:
                rows.append([pair[0], Cell(pair[1], one["reason"]), Cell("missing", tone="faint"), "", ""])
            else:
                rows.append([*pair, _points(one["gain"]), _interval(one), p_text(one["p_value"])])
        table = Table(["row", "against", "gain", "95 % interval", "p, unadjusted"], rows, texts=2)
        return Fold(f"{finding['claim']}: {finding['verdict']}, {pairs} ({self.head})", [table])

    def gains_pictured(self) -> list[Block]:
        blocks: list[Block] = []
        for place in self.places:
            panels = {}
            for panel in self.panels:
                own = [row for row in self.done if _panel(row) == panel and (place, row["id"]) in self.gains]
                gains = [(row, self.gains[place, row["id"]]) for row in own]
                if gains:
                    panels[panel] = [
                        Gain(_label(row), 100 * gain["gain"], 100 * gain["low"], 100 * gain["high"])
                        for row, gain in gains
                    ]
            if panels:
                figure = gain_panels(panels, metric=self.metric, unit="percentage points")
                shows = f"Gains in {self.metric} over from scratch with intervals, {place}"
                blocks += [Heading(str(place), 3), Picture(f"gains-{place.protocol}-{place.convention}", figure, shows)]
        if not blocks:
            return []
        return [Heading("Gains over from scratch"), *blocks[:2], *_fold("under the other ways of scoring", blocks[2:])]

    # --- tables ---

    def table_2(self) -> list[Block]:
        """The survey's Table 2: each model's rows under the way of scoring that the survey's numbers of it fit."""
        if not self.models:
            return []
        rows: list[Sequence[Cell | str] | str] = []
        metrics = [name for name in survey.METRICS if name in self.results["metrics"]] or self.results["metrics"]
        for model in self.models:
            place = Place(survey.PROTOCOL, survey.CONVENTIONS.get(model, self.head.convention))
            place = place if place in self.places else self.head
            rows.append(f"{_model(model)} ({place})")
            own = [row for row in self.rows if row["kind"] == "model" and row["model"] == model]
            for row in sorted(own, key=lambda row: row["status"] != "done"):
                rows.append([_label(row), *self._cells_of_table_2(row, place, metrics)])
        beside = (
            "Ours in percent, the survey's smaller beside it. Compare within a block only: the survey's BERT4Rec rows "
            "count three items in one list, its Caser rows one at a time, and these lie so near chance that other "
            "candidates must have been scored. What can be compared with the survey is the direction of a gain."
            if self.is_surveys_data
            else "These data are not the survey's, so its numbers are not shown."
        )
        marks = f" Coloured: {self.metric} better or worse than from scratch, p ≤ {LEVEL} after Holm's correction."
        return [Heading("Table 2"), Text(beside + marks), Table(["%", *metrics], rows)]

    def _cells_of_table_2(self, row: Row, place: Place, metrics: Sequence[str]) -> list[Cell]:
        theirs: Mapping[str, float] = {}
        if self.is_surveys_data and row["id"] in survey.TABLE_2:
            theirs = dict(zip(survey.METRICS, survey.TABLE_2[row["id"]], strict=True))
        tone = self._tone(place, row)
        return [
            Cell(
                "missing" if row["status"] != "done" else _percent(self._mean(row, place, metric)),
                f"{theirs[metric]:.2f}" if metric in theirs else "",
                "faint" if row["status"] != "done" else tone if metric == self.metric else "",
            )
            for metric in metrics
        ]

    def every_protocol(self) -> list[Block]:
        blocks: list[Block] = []
        for place in self.places:
            head = ["%", *self.results["metrics"], f"gain in {self.metric}", "relative", "p (Holm)", "bootstrap, users"]
            rows: list[Sequence[Cell | str] | str] = []
            for title, own in self._groups():
                rows.append(title)
                for row in own:
                    cells = [
                        Cell(_percent(self._mean(row, place, metric)), _spread(self._scores(row, place, metric)))
                        for metric in self.results["metrics"]
                    ]
                    rows.append([_label(row), *cells, *self._gain_cells(place, row)])
            blocks.append(Fold(str(place), [Table(head, rows, stacked=True)]))
        text = (
            "Every row, baselines too, under every way of scoring; ± is the standard deviation over seeds. A number is "
            "comparable within its table only. No claim is made for baselines, so they have no p-value."
        )
        return [Heading("All rows under every way of scoring"), Text(text), *blocks]

    def _groups(self) -> list[tuple[str, list[Row]]]:
        kinds = [
            ("joint", "Trained on both domains at once"),
            ("extra", "From scratch under another task"),
            ("custom", OWN),
            ("baseline", "Simple baselines"),
        ]
        groups = [
            (_model(model), [row for row in self.done if row["kind"] == "model" and row["model"] == model])
            for model in self.models
        ]
        groups += [(title, [row for row in self.done if row["kind"] == kind]) for kind, title in kinds]
        return [(title, own) for title, own in groups if own]

    def _gain_cells(self, place: Place, row: Row) -> list[Cell]:
        gain = self.gains.get((place, row["id"]))
        if gain is None:
            return [Cell("")] * 4
        relative = "" if gain["relative_gain"] is None else f"{100 * gain['relative_gain']:+.1f} %"
        bootstrap = {"low": gain["bootstrap"][0], "high": gain["bootstrap"][1]}
        return [
            Cell(_points(gain["gain"]), _interval(gain), self._tone(place, row)),
            Cell(relative),
            Cell(p_text(gain["p_holm"])),
            Cell(_interval(bootstrap)),
        ]

    def by_length(self) -> list[Block]:
        """Gains of metadata by length of the history."""
        own = [one for one in self.results["slices"] if self.head.holds(one)]
        if not own:
            return []
        found = {(one["row"], one["slice"]): one for one in own}
        slices = {one["slice"]: one["users"] for one in own}
        drawn = [name for name, users in slices.items() if users >= FEW_USERS]
        pictures: dict[str, dict[str, dict[str, list[Gain]]]] = {}  # picture -> panel -> series
        for row in [row for row in self.done if row["kind"] in ("model", "custom")]:
            picture, panel = "", f"{_model(row['model'])}, {_metadata(row)}"
            if row["kind"] == "custom":
                picture = panel = self._family(row)
                picture = "" if picture == OWN else picture
            gains = [one for name in drawn if (one := found.get((row["id"], name))) and one["gain"] is not None]
            if gains:
                pictures.setdefault(picture, {}).setdefault(panel, {})[_series(row)] = [
                    Gain(one["slice"], 100 * one["gain"], 100 * one["low"], 100 * one["high"]) for one in gains
                ]
        rows: list[Sequence[Cell | str] | str] = []
        for title, members in self._groups():
            rows.append(title)
            rows += [[_label(row), *[_slice_cell(found.get((row["id"], name))) for name in slices]] for row in members]
        head = [f"{self.metric}, %", *(f"{name} items: {users:,} users" for name, users in slices.items())]
        target = self.results["data"]["target_domain"]
        text = f"Users by the items of {target} in their input, the coldest first ({self.head})."
        finding, metric = f"Gains in {self.metric} by length of the user's history", f"{self.metric}, %"
        shown = []
        for number, (family, panels) in enumerate(pictures.items()):
            names = [
                name for name in self.series[1:] if not family or any(name in series for series in panels.values())
            ]
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

    def _family(self, row: Row) -> str:
        """Other configurations that share a picture: all, or, if they are many, those that are compared with one
        row."""
        own = {one["id"]: one for one in self.rows if one["kind"] == "custom"}
        if len(own) <= MANY_ROWS:
            return OWN
        met = {row["id"]}
        while (other := own.get(row.get("against") or "")) is not None and other["id"] not in met:
            row = other
            met.add(row["id"])
        return str(row["label"])

    # --- training ---

    def curves(self) -> list[Block]:
        blocks: list[Block] = []
        for number, name in enumerate(self.panels):
            members = [row for row in self.done if row["kind"] in ("model", "custom") and _panel(row) == name]
            families: dict[str, list[Row]] = {}
            for row in members:
                families.setdefault(self._family(row) if row["kind"] == "custom" else name, []).append(row)
            for part, (family, rows) in enumerate(families.items()):
                panels: dict[str, list[Curve]] = {}
                for row in rows:
                    for run in row["seeds"]:
                        if run["curve"]:
                            panels.setdefault(_metadata(row), []).append(_curve(_series(row), run["curve"]))
                if not panels:
                    continue
                names = self.series if len(families) == 1 else [_series(row) for row in rows]
                file = f"curves-{number}" if len(families) == 1 else f"curves-{number}-{part}"
                shows = f"Validation {self.monitor} and training loss by epoch, every seed a line: {family}"
                blocks += [Heading(family, 3), Picture(file, curve_panels(panels, names=names), shows)]
        text = "The training that ended in the scored model, every seed a line; dots are the epochs that were kept."
        return [Heading("Learning curves"), Text(text), *blocks] if blocks else []

    def cost(self) -> list[Block]:
        head = [
            "mean over seeds",
            "parameters",
            "trained",
            "epochs",
            "best epoch",
            "training",
            "pre-training",
            "items/s",
            "peak memory",
        ]
        keys = (
            "parameters",
            "trained",
            "epochs",
            "best_epoch",
            "seconds",
            "pretrain_seconds",
            "items_per_second",
            "peak_gb",
        )
        runs = [run for row in self.done for run in row["seeds"]]
        shown = [place for place, key in enumerate(keys) if any(run.get(key) is not None for run in runs)]
        rows: list[Sequence[Cell | str] | str] = []
        for title, own in self._groups():
            trained = [row for row in own if row["kind"] != "baseline" and row["seeds"]]
            if not trained:
                continue
            rows.append(title)
            for row in trained:
                means = {key: _mean_of(row["seeds"], key) for key in keys}
                cells = [f"{means[key]:,.0f}" if key in means and np.isfinite(means[key]) else "–" for key in keys]
                cells[4], cells[5] = (_duration(means[key]) for key in ("seconds", "pretrain_seconds"))
                cells[7] = f"{means['peak_gb']:.2f} GB" if np.isfinite(means["peak_gb"]) else "–"
                rows.append([_label(row), *(cells[place] for place in shown), self._reached(row)])
        head = [head[0], *(head[place + 1] for place in shown), "as good after"]
        text = (
            "A pre-trained model that several rows share was trained once; each of them shows its whole time. As good "
            "after: epochs until the validation score is that which the row it is compared with had at its best, seed "
            "by seed; pre-training is not in them."
        )
        return [Heading("Cost"), Text(text), Table(head, rows)] if rows else []

    def _reached(self, row: Row) -> str:
        """Mean epochs until a row's validation score reaches the best one of the row that it is compared with, and in
        how many of the seeds, if not in all."""
        gain = self.gains.get((self.head, row["id"]))
        other = next((one for one in self.done if gain and one["id"] == gain["against"]), None)
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

    def patches(self) -> list[Block]:
        """Many targets on one backbone: what it costs to store, load and query them (survey 3.3)."""
        measured = self.results.get("patches", [])
        rows: list[Sequence[Cell | str] | str] = []
        for one in measured:
            labels = [self._name(row) for row in one["rows"]]
            small = [f"{one[key]:,.2f} MB" for key in ("patches_mb", "items_mb")]
            ways = {"whole copies": (one["whole"], ["", ""]), "a backbone and patches": (one["patched"], small)}
            rows.append(f"{', '.join(labels)}, seed {one['seed']}")
            rows += [
                [name, f"{cost['mb']:,.2f} MB", *own, f"{cost['seconds']:.2f} s", f"{cost['ms']:.1f} ms"]
                for name, (cost, own) in ways.items()
            ]
        if not rows:
            return []
        text = (
            "The patched models of one pre-trained model, kept as whole copies, and as patches that stand on it: bytes "
            "on disk, of them the patches and, of these, rows of items, which any fine-tuned model of a target has; "
            "seconds until all can answer; the median time to answer one request of 50 items, the models in turns."
        )
        head = ["patched on one model", "on disk", "patches", "rows of items", "to load all", "a request"]
        return [Heading("Patches beside whole copies"), Text(text), Table(head, rows)]

    def table_1(self) -> list[Block]:
        data = self.results["data"]
        roles = {"all": "all", data["source_domain"]: "source", data["target_domain"]: "target"}
        keys = ("users", "items", "items_with_knowledge", "interactions", "average_length")
        rows = []
        for domain in data["domains"]:
            role = roles.get(domain["domain"])
            theirs = survey.TABLE_1[role] if self.is_surveys_data and role else None
            shown = [f"{domain[key]:,.1f}" if key == "average_length" else f"{domain[key]:,}" for key in keys]
            beside = [f"{value:,}" for value in theirs] if theirs else [""] * len(keys)
            rows.append([domain["domain"], *[Cell(*pair) for pair in zip(shown, beside, strict=True)]])
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        head = ["domain", "users", "items", "with metadata", "interactions", "average length"]
        return [
            Heading("Table 1: the data"),
            *([Text("The survey's numbers are smaller beside ours.")] if self.is_surveys_data else []),
            Table(head, rows),
            Text(f"Lake {data['lake']}, release {data['release']}. Snapshots: {versions}.", "faint"),
        ]

    def cells(self) -> list[Block]:
        """What each number came from."""
        head = ["row", "run", "folder", "seed", "epochs", f"validation {self.monitor}", "model", "pre-trained model"]
        rows = [
            [
                _name_of(row),
                str(run["run"] or ""),
                str(run["folder"] or ""),
                str(run["seed"]),
                str(run["epochs"]),
                _percent(run["validation"]),
                _short(run["model_hash"]),
                _short(run["parent_hash"]),
            ]
            for row in self.done
            for run in row["seeds"]
            if row["kind"] != "baseline"
        ]
        code = Text(f"Code: commit {self.results['code']['commit']}.", "faint")
        read = [f"{row['label']} reads {row['reads']}" for row in self.rows if row.get("reads")]
        blocks: list[Block] = [Table(head, rows, texts=3)] if rows else []
        return [
            Heading("Each run"),
            code,
            *_fold("Runs, seeds and hashes of models", blocks),
            *_fold("What each row reads", [Points(read)] if read else []),
        ]

    # --- numbers ---

    def _scores(self, row: Row, place: Place, metric: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = row["metrics"].get(place.protocol, {}).get(place.convention, {}).get(metric)
        return found

    def _mean(self, row: Row, place: Place, metric: str) -> float:
        scores = self._scores(row, place, metric)
        return NAN if scores is None or scores["mean"] is None else float(scores["mean"])

    def _tone(self, place: Place, row: Row) -> Tone:
        gain = self.gains.get((place, row["id"]))
        if gain is None or gain["p_holm"] is None or gain["p_holm"] > LEVEL:
            return ""
        return "up" if gain["gain"] > 0 else "down"

    def _name(self, row_id: str) -> str:
        return next((_name_of(row) for row in self.rows if row["id"] == row_id), row_id)


# --- words and numbers -----------------------------------------------------------------------------------------------


def _model(name: str) -> str:
    return survey.NAMES.get(name, name)


def _metadata(row: Row) -> str:
    return "with metadata" if row["knowledge"] else "without metadata"


def _factors(row: Row) -> str:
    """Transfer and pre-training, e.g. "deep, masked item"."""
    if row["transfer"] == "none":
        return FROM_SCRATCH
    return f"{row['transfer']}, {(row['pretrain_task'] or '-').replace('_', ' ')}"


def _panel(row: Row) -> str:
    """Which rows share a picture."""
    return OWN if row["kind"] == "custom" else _model(row["model"])


def _series(row: Row) -> str:
    """The name of a row's line in a panel that gives the rest."""
    return str(row["label"]) if row["kind"] == "custom" else _factors(row)


def _label(row: Row) -> str:
    """A row within its model's block."""
    if row["kind"] != "model":
        return str(row["label"])
    return _factors(row) + (" + metadata" if row["knowledge"] else "")


def _name_of(row: Row) -> str:
    return f"{_model(row['model'])}, {_label(row)}" if row["kind"] == "model" else _label(row)


def _dataset(data: Mapping[str, Any]) -> str:
    """Name of the log; older results have none and give their lake."""
    if data.get("dataset"):
        return str(data["dataset"])
    return "MovieLens-1M" if survey.is_of(data["domains"]) else f"The lake {data['lake']}"


def _left_out(row: Row) -> bool:
    return str(row.get("reason") or "").startswith(NOT_REQUESTED)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _percent(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:.2f}"


def _points(value: float) -> str:
    """A difference in percentage points."""
    text = f"{100 * value:+.2f}"
    return text[1:] if text in ("+0.00", "-0.00") else text


def _interval(entry: Row) -> str:
    return f"[{_points(entry['low'])}, {_points(entry['high'])}]"


def _spread(scores: Mapping[str, Any] | None) -> str:
    seeds = [] if scores is None else scores["seeds"]
    return f"±{100 * np.std(seeds, ddof=1):.2f}" if len(seeds) > 1 else ""


def _verdict(finding: Row) -> Cell:
    if finding["gain"] is None:
        return Cell("unknown", "no pair of rows", "faint")
    beside = f"{_points(finding['gain'])} {_interval(finding)}\np {_equals(finding['p_holm'])}"
    if finding["num_pairs"] < len(finding["rows"]):
        beside += f"\n{finding['num_pairs']} of {len(finding['rows'])} pairs"
    if finding["num_seeds"] < 2:
        beside += ", one seed"
    return Cell(finding["verdict"], beside, TONES.get(finding["verdict"], "faint"))


def _equals(p_value: float) -> str:
    text = p_text(p_value)
    return text if text.startswith("<") else f"= {text}"


def _slice_cell(entry: Row | None) -> Cell:
    if entry is None:
        return Cell("–", tone="faint")
    if entry["gain"] is None:
        return Cell(_percent(entry["mean"]))
    tone: Tone = "up" if entry["low"] > 0 else "down" if entry["high"] < 0 else ""
    return Cell(_percent(entry["mean"]), f"{_points(entry['gain'])} {_interval(entry)}", tone)


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


def _duration(seconds: float) -> str:
    if not np.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _short(digest: str | None) -> str:
    return (digest or "")[:12]


def _fold(summary: str, blocks: Sequence[Block]) -> list[Block]:
    return [Fold(summary, blocks)] if blocks else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("python -m trainer.report", description="Draws an experiment's report again.")
    parser.add_argument("results", type=Path, help="results.json of an experiment")
    parser.add_argument("--folder", type=Path, required=True, help="where report.html and report.md are written")
    given = parser.parse_args(arguments)

    def work() -> int:
        print(write(_read(given.results), given.folder))
        return 0

    return run_command("report", work)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"expected an experiment's results in {path}, found none ({error})") from None
    if not isinstance(found, dict):
        raise ReportError(f"expected results of an experiment in {path}, found a {type(found).__name__}")
    return found
