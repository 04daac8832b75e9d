"""Protocol cards: the rules under which a figure was measured, named, hashed and printed with every table.

Published figures of one log differ by more than models do: in what is held out, in which order events of one second
stand, in how much of a history is trained on, in which items are ranked, and in whether a model reads when the answer
was given. Two figures may be compared if their cards are the same. One card belongs to one ranking protocol (`full`,
`uniform-100`, …) of one evaluation; `trained_on` and `request_time` are the models'.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from etl.config import KCoreConfig, SplitConfig
from etl.settings import Section, replaced
from etl.tables import DOMAIN_ALL
from trainer.config import PretrainConfig
from trainer.config.evaluation import ModelField
from trainer.data.baskets import DATASETS
from trainer.data.held_out import FULL, Part
from trainer.data.release import Release
from trainer.evaluation.scorers import EvaluateError
from trainer.tracking import Run

CARD_TAG = "graftrec.card"  # of runs and versions: hashes of the protocol cards that their figures were measured under
NOT_RANKED: Literal["not ranked"] = "not ranked"


class ProtocolCard(Section):
    """The rules of an evaluation; figures may be compared where these are equal."""

    part: Literal["validation", "test"]
    domain: str  # whose items are predicted
    domain_rule: dict[str, Any]  # what puts an item there; {}: all items
    split: dict[str, Any]  # the rule of what is held out, without its name
    ties: str  # the order of a user's events at one time: file | item | scrambled, seed n | ordinal
    kcore: dict[str, Any]  # {}: the release doesn't say
    candidates: str  # what is ranked: full | cold | warm | uniform-100 | popular-100 | top-100; or what is predicted
    seen_items: Literal["left out", "candidates", "not ranked"]  # that are in the input
    repeats: Literal["left out", "ranked", "not ranked"]  # held-out items that are in the input
    users: str  # who is evaluated: all that hold something out, or about so many
    trained_on: str
    request_time: Literal["known", "unknown"]  # whether models read when the answer was given

    @property
    def hash(self) -> str:
        given = self.model_dump(mode="json", exclude_defaults=True)  # a field that is added later changes no older hash
        text = json.dumps(given, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def text(self) -> str:
        """One line, in plain English."""
        return f"card {self.hash} ({self.candidates}): {'; '.join(self.parts())}"

    def parts(self) -> list[str]:
        """The card in words, from what is held out on."""
        users = "" if self.users == "all" else f" of {self.users} users"
        candidates = f"{_CANDIDATES.get(self.candidates, self.candidates)} of domain {self.domain}"
        if self.seen_items == "left out" and self.candidates in (FULL, "cold", "warm"):
            candidates += ", less those in the input"
        if self.seen_items == "candidates":
            candidates += ", those in the input too"
        return [
            f"{self.part}: {_held_out(self.split, self.part)}{users}",
            f"trained on {self.trained_on}",
            f"ties in time: {_TIES.get(self.ties, self.ties)}",
            *([candidates] if self.seen_items != NOT_RANKED else []),
            _kcore(self.kcore),
            f"the request's time is {self.request_time}",
        ]

    def entry(self, labels: Sequence[str] = ()) -> dict[str, Any]:
        """As it is stored. `labels`: the rows that it belongs to."""
        return {"hash": self.hash, "text": self.text(), "labels": list(labels), "card": self.model_dump(mode="json")}


_TIES = {
    "file": "as in the log's files",
    "item": "by item id",
    "ordinal": "none, the log gives an order and no times",
}
_CANDIDATES = {
    FULL: "all items",
    "cold": "cold items among cold items",
    "warm": "warm items among warm items",
    "uniform-100": "100 items drawn uniformly",
    "popular-100": "100 items drawn by popularity",
    "top-100": "the 100 most popular items",
}


def card_of(
    release: Release, *, split: str, domain: str, part: Part, table: str, max_users: int | None, repeats: bool | None
) -> ProtocolCard:
    """The card of an evaluation under the protocol `full`, with models that are trained on the split and know no time
    of a request. `repeats`: see EvaluationConfig; None where nothing is ranked."""
    rule = release.split(split)
    return ProtocolCard(
        part=part,
        domain=domain,
        domain_rule=_domain_rule(release, domain),
        split=_rule(rule, split, table),
        ties=_ties(release, rule),
        kcore={key: value for key, value in release.etl.get("kcore", {}).items() if key in KCoreConfig.model_fields},
        candidates=FULL,
        seen_items=NOT_RANKED if repeats is None else "candidates" if repeats else "left out",
        repeats=NOT_RANKED if repeats is None else "ranked" if repeats else "left out",
        users="all" if max_users is None else f"about {max_users:,}",
        trained_on=trained_on(rule, table),
        request_time="unknown",
    )


def card_of_model(card: ProtocolCard, config: PretrainConfig, own: Release) -> ProtocolCard:
    """An evaluation's card for one model. `own`: the release that it was trained on."""
    return replaced(
        card,
        trained_on=trained_on(own.split(config.data.split), config.task.needs.table),
        request_time="known" if config.reads_request_time else "unknown",
    )


def trained_on(rule: SplitConfig | None, table: str) -> str:
    """What of a history a model is trained on, in words."""
    if not DATASETS[table].by_number:
        return "all baskets but the last two (n−2)"
    if rule is None or rule.is_by_time or rule.is_by_chance or rule.cold_items or rule.cold_users:
        return "the training part"
    held = rule.validation + rule.test
    return f"all but the last {held} (n−{held})" if held else "everything"


def differences(one: ProtocolCard, other: ProtocolCard, *, allowed: Sequence[str] = ()) -> list[str]:
    """Fields in which two cards differ, with both values."""
    ours, theirs = one.model_dump(mode="json"), other.model_dump(mode="json")
    return [
        f"{name} {_shown(ours[name])} and {_shown(theirs[name])}"
        for name in ours
        if ours[name] != theirs[name] and name not in allowed
    ]


def check_cards(cards: Iterable[tuple[str, ProtocolCard]], *, allowed: Sequence[str] = ()) -> None:
    """Raises EvaluateError where (label, card) pairs have different cards. `allowed`: fields that may differ."""
    first: tuple[str, ProtocolCard] | None = None
    for label, card in cards:
        first = first or (label, card)
        if found := differences(first[1], card, allowed=allowed):
            raise EvaluateError(
                f"expected figures under one protocol card, found card {first[1].hash} of {first[0]} and card "
                f"{card.hash} of {label}, which differ in {'; '.join(found)}; compare each with figures of its own card"
                + _advice(found)
            )


def _advice(found: Sequence[str]) -> str:
    names = [text.partition(" ")[0] for text in found]
    if not set(names) <= set(get_args(ModelField)):
        return ""
    return f", or, where the difference is what is measured, set across to [{', '.join(names)}]"


def stored(summary: Mapping[str, Any]) -> list[ProtocolCard]:
    """The cards of a stored evaluation; none of one that was made before there were any."""
    return [ProtocolCard.model_validate(entry["card"]) for entry in summary.get("cards", ())]


def check_stored(summaries: Mapping[str, Mapping[str, Any]], *, allowed: Sequence[str] = ()) -> None:
    """Raises EvaluateError where stored evaluations (by name) that are put together were made under different cards, or
    one of several under none that is known."""
    by_name = {name: stored(summary) for name, summary in summaries.items()}
    if lacking := [name for name, cards in by_name.items() if not cards]:
        if len(by_name) > 1:
            raise EvaluateError(
                f"expected evaluations with a protocol card, found none in {lacking[0]}, which was made before there "
                "were any; evaluate it again"
            )
        return
    first = next(iter(by_name), "")
    for name, cards in by_name.items():
        for candidates in {card.candidates for card in cards} & {card.candidates for card in by_name[first]}:
            both = [(first, by_name[first]), (name, cards)]
            check_cards(
                [(label, card) for label, own in both for card in own if card.candidates == candidates],
                allowed=allowed,
            )


def lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Stored cards as lines below a table: the first in full, of the others what differs."""
    found: list[str] = []
    for entry in entries:
        card = ProtocolCard.model_validate(entry["card"])
        if not found:
            first, shown = card, card.text()
        else:
            own = [part for part in card.parts() if part not in first.parts()]
            shown = f"card {card.hash} ({card.candidates}): as {first.hash}, but {'; '.join(own) or 'its candidates'}"
        several = len({each["hash"] for each in entries if each["card"]["candidates"] == card.candidates}) > 1
        found.append(f"{shown}; of {', '.join(entry['labels'])}" if several and entry["labels"] else shown)
    return found


def hashes(entries: Iterable[Mapping[str, Any]]) -> str:
    """As a tag has them."""
    return ", ".join(dict.fromkeys(entry["hash"] for entry in entries))


def record(run: Run, entries: Sequence[Mapping[str, Any]]) -> None:
    """Stored cards as tag and parameters of an MLflow run."""
    if entries:
        run.set_tags({CARD_TAG: hashes(entries)})
        run.log_params({f"card.{number}": entry["text"] for number, entry in enumerate(entries)})


# --- words ---------------------------------------------


def _rule(rule: SplitConfig | None, name: str, table: str) -> dict[str, Any]:
    """What a split holds out, without what is as everywhere."""
    if not DATASETS[table].by_number and (rule is None or not rule.is_by_time):
        return {"baskets": 1}
    if rule is None:
        return {"name": name}
    found = rule.model_dump(mode="json", exclude={"name", "ties", "ties_seed"}, exclude_defaults=True)
    if rule.cold_items is not None:
        found["cold_items"] = rule.cold_items.model_dump(mode="json")
    counts = {} if rule.is_by_time or rule.is_by_chance else {"validation": rule.validation, "test": rule.test}
    return counts | found


def _domain_rule(release: Release, domain: str) -> dict[str, Any]:
    if domain == DOMAIN_ALL:
        return {}
    found: dict[str, Any] = next((one for one in release.etl.get("domains", ()) if one.get("name") == domain), {})
    return {key: value for key, value in found.items() if key != "name" and value}


def _ties(release: Release, rule: SplitConfig | None) -> str:
    if release.has_mere_order:
        return "ordinal"
    if rule is None or rule.ties == "file":
        return "file"
    return f"scrambled, seed {rule.ties_seed}" if rule.ties == "scrambled" else rule.ties


def _held_out(split: Mapping[str, Any], part: str) -> str:
    if "baskets" in split:
        return "each user's last basket" if part == "test" else "each user's last basket but one"
    if "name" in split:
        return f"what split {split['name']} holds out"
    if "train_until" in split:
        dates = ", ".join(
            f"{name} {split[name]}" for name in ("train_until", "validate_until", "test_until") if name in split
        )
        words = f"by time ({dates})"
    elif "random" in split:
        words = f"a share of each user's items by chance ({split['random'][0]:g}, {split['random'][1]:g})"
    elif "user_folds" in split:
        words = f"all items of fold {split.get('fold', 0)} of {split['user_folds']} of the users"
    elif "cold_users" in split:
        words = f"all items of {100 * split['cold_users']:g} % of the users of {split['joint_target']}"
    else:
        validation, test = split["validation"], split["test"]
        words = f"each user's last {test}" if part == "test" else f"the {validation} before each user's last {test}"
        if "cold_items" in split:
            words = f"all events of {100 * split['cold_items']['share']:g} % of the items, and of the others {words}"
    if "joint_target" in split and "cold_users" not in split:
        words += f" of domain {split['joint_target']}"
    if "causal_target" in split:
        words += f", nothing later than the first held-out item of {split['causal_target']} read"
    return words


def _kcore(kcore: Mapping[str, Any]) -> str:
    if not kcore:
        return "k-core not recorded"
    passes = "" if kcore.get("iterate", True) else ", one pass"
    return f"users of {kcore['min_user']} events and items of {kcore['min_item']} at least{passes}"


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
