"""An experiment's results, as the sections of its report look them up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from etl.settings import GraftrecError
from trainer.evaluation.card import check_cards, lines, stored
from trainer.evaluation.scorers import EvaluateError
from trainer.report import survey
from trainer.report.document import Tone
from trainer.report.hypotheses import LEVEL
from trainer.report.labels import CUSTOM, FROM_SCRATCH, Row, factors, model_name, name_of, panel_of

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
MANY_ROWS = 7  # of other configurations, that a picture can distinguish
GROUPS = {
    "joint": "Trained on both domains at once",
    "extra": "From scratch under another task",
    "custom": CUSTOM,
    "baseline": "Simple baselines",
}
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


def check_rows(given: Mapping[str, Any]) -> None:
    """Raises ReportError for rows under different protocol cards, but for what the experiment set `across`."""
    cards = stored(given)
    for candidates in dict.fromkeys(card.candidates for card in cards):
        own = [(f"row {card.hash}", card) for card in cards if card.candidates == candidates]
        try:
            check_cards(own, allowed=given.get("across", ()))
        except EvaluateError as error:
            raise ReportError(str(error)) from None


class Results:
    """`given`: the content of results.json. Raises ReportError if a part is missing.

    `head` is the first place: the one that findings are about; `metric` the one that was tested,
    `monitor` that of the validation part.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        missing = [key for key in KEYS if key not in given]
        missing += [key for key in ("protocols", "conventions") if key in given and not given[key]]
        if missing:
            raise ReportError(
                f"expected an experiment's results, found none of {', '.join(missing)}; give its results.json"
            )
        check_rows(given)
        self.cards = lines(given.get("cards", ()))
        self.title = f"Experiment {given['experiment']}, preset {given['preset']}"
        self.code, self.machine = given["code"], given["machine"]
        self.started, self.finished = given["started"], given["finished"]
        self.data, self.seeds, self.metrics = given["data"], given["seeds"], given["metrics"]
        self.hypotheses, self.slices = given["hypotheses"], given["slices"]
        self.patches = given.get("patches", [])
        # Earlier releases wrote own for custom.
        self.rows: Sequence[Row] = [{**row, "kind": row["kind"].replace("own", "custom")} for row in given["rows"]]
        self.done = [row for row in self.rows if row["status"] == "done"]
        self.places = [Place(*pair) for pair in product(given["protocols"], given["conventions"])]
        self.head = self.places[0]
        tested = [*given["hypotheses"], *given["comparisons"]]
        self.metric: str = given.get("metric") or (tested[0]["metric"] if tested else "NDCG@10")
        self.monitor: str = given.get("monitor", self.metric)  # of the validation part; older results have none
        self.is_surveys_data = survey.is_of(self.data["domains"])
        self.gains = {(Place(gain["protocol"], gain["convention"]), gain["row"]): gain for gain in given["comparisons"]}
        transfers = [factors(row) for row in self.rows if row["kind"] == "model" and row["transfer"] != "none"]
        custom = [row["label"] for row in self.rows if row["kind"] == "custom"]
        self.series = [FROM_SCRATCH, *dict.fromkeys(transfers), *custom]  # one colour each in all pictures
        self.models = list(dict.fromkeys(row["model"] for row in self.rows if row["kind"] == "model"))
        self.panels = list(dict.fromkeys(panel_of(row) for row in self.done if row["kind"] != "baseline"))

    def scores(self, row: Row, place: Place, metric: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = row["metrics"].get(place.protocol, {}).get(place.convention, {}).get(metric)
        return found

    def mean(self, row: Row, place: Place, metric: str) -> float:
        scores = self.scores(row, place, metric)
        return NAN if scores is None or scores["mean"] is None else float(scores["mean"])

    def tone(self, place: Place, row: Row) -> Tone:
        """Whether a row is significantly above or below the one that it is compared with."""
        gain = self.gains.get((place, row["id"]))
        if gain is None or gain["p_holm"] is None or gain["p_holm"] > LEVEL:
            return ""
        return "up" if gain["gain"] > 0 else "down"

    def name(self, row_id: str) -> str:
        return next((name_of(row) for row in self.rows if row["id"] == row_id), row_id)

    def groups(self) -> list[tuple[str, list[Row]]]:
        """Titles and finished rows of a table's blocks."""
        groups = [
            (model_name(model), [row for row in self.done if row["kind"] == "model" and row["model"] == model])
            for model in self.models
        ]
        groups += [(title, [row for row in self.done if row["kind"] == kind]) for kind, title in GROUPS.items()]
        return [(title, rows) for title, rows in groups if rows]

    def family(self, row: Row) -> str:
        """Other configurations that share a picture: all, or, if they are many, those that are compared with one
        row."""
        custom = {one["id"]: one for one in self.rows if one["kind"] == "custom"}
        if len(custom) <= MANY_ROWS:
            return CUSTOM
        met = {row["id"]}
        while (other := custom.get(row.get("against") or "")) is not None and other["id"] not in met:
            row = other
            met.add(row["id"])
        return str(row["label"])
