"""What an experiment on features found, for people and programs: tables, Markdown, a picture, plain data."""

from typing import Any

from matplotlib.figure import Figure

from etl.text_table import aligned, markdown, with_sign
from trainer.evaluation.significance import Comparison, p_text
from trainer.experiment.arms_plan import NONE, ArmsConfig, title_of
from trainer.experiment.arms_results import Found, Pair
from trainer.figures import Gain, gain_panels

HEAD = ("slice", "transfer", "features", "none", "real", "shuffled", "over none", "p", "over shuffled", "p", "verdict")


def _cells(found: Found, level: float) -> list[list[str]]:
    return [
        [
            one.slice,
            title_of(one.transfer),
            one.features,
            *(f"{one.means[arm]:.4f}" for arm in (NONE, "real", "shuffled")),
            *_gain(one.claim.over_none),
            *_gain(one.claim.over_shuffled),
            one.claim.verdict(level),
        ]
        for one in found.entries
    ]


def _gain(gain: Comparison) -> list[str]:
    interval = f"[{with_sign(gain.low, 3)}, {with_sign(gain.high, 3)}]"
    return [f"{with_sign(gain.gain, 4)} {interval}", p_text(gain.p_value)]


def _pair_text(pair: Pair, level: float) -> str:
    better = pair.p_value <= level and pair.gain.gain > 0
    worse = pair.p_value <= level and pair.gain.gain < 0
    word = "is better than" if better else "is worse than" if worse else "isn't shown to differ from"
    gain = _gain(pair.gain)[0]
    return (
        f"{pair.slice}, {title_of(pair.transfer)}: {pair.ours} {word} {pair.theirs}, {gain}, p {p_text(pair.p_value)}"
    )


def _notes(found: Found, config: ArmsConfig) -> list[str]:
    tests = f"tests at {config.level:g}"
    notes = [
        f"{config.metric}, mean over users and seeds; intervals of {1 - config.level:.0%}; p over users, seeds and the "
        "luck of one assignment of features, not adjusted",
        f"helps: above none and above shuffled, {tests}, Holm over {len(found.entries)} claims; hurts: below none",
    ]
    notes += [
        f"{name}: {users:,} users, {items:,} held-out items, split {', '.join(config.slices[name].splits)}"
        for name, (users, items) in found.sizes.items()
    ]
    return notes + [_pair_text(pair, config.level) for pair in found.pairs]


def _baseline_cells(found: Found) -> tuple[list[str], list[list[str]]]:
    labels = list(dict.fromkeys(label for own in found.baselines.values() for label in own))
    rows = [
        [label, *(f"{own[label]:.4f}" if label in own else "–" for own in found.baselines.values())] for label in labels
    ]
    return ["beside", *found.baselines], rows


def text(found: Found, config: ArmsConfig) -> str:
    """The tables for a terminal."""
    head, rows = _baseline_cells(found)
    parts = ["\n".join(aligned([list(HEAD), *_cells(found, config.level)], words=3, rule=True))]
    if rows:
        parts.append("\n".join(aligned([head, *rows], rule=True)))
    return "\n\n".join([*parts, "\n".join(_notes(found, config))])


def as_markdown(found: Found, config: ArmsConfig) -> str:
    """The same for MLflow."""
    lines = markdown(list(HEAD), _cells(found, config.level), words=3)
    head, rows = _baseline_cells(found)
    if rows:
        lines += ["", *markdown(head, rows)]
    return "\n".join([*lines, "", *(f"* {note}" for note in _notes(found, config))]) + "\n"


def figure(found: Found, config: ArmsConfig) -> Figure:
    """Gains over none and over shuffled with their intervals, a panel a slice and transfer."""
    panels: dict[str, list[Gain]] = {}
    for one in found.entries:
        rows = panels.setdefault(f"{one.slice}, {title_of(one.transfer)}", [])
        for other, gain in ((NONE, one.claim.over_none), ("shuffled", one.claim.over_shuffled)):
            rows.append(Gain(f"{one.features} over {other}", gain.gain, gain.low, gain.high, with_sign(gain.gain, 3)))
    return gain_panels(panels, metric=config.metric, over="the other arm")


def as_json(found: Found, level: float) -> dict[str, Any]:
    """Plain data of all tables."""
    return {
        "slices": {name: {"users": users, "held_out": items} for name, (users, items) in found.sizes.items()},
        "claims": [
            {
                "slice": one.slice,
                "transfer": one.transfer,
                "features": one.features,
                "means": dict(one.means),
                "over_none": vars(one.claim.over_none),
                "over_shuffled": vars(one.claim.over_shuffled),
                "p_helps": one.claim.p_helps,
                "p_hurts": one.claim.p_hurts,
                "verdict": one.claim.verdict(level),
            }
            for one in found.entries
        ],
        "pairs": [
            {"slice": one.slice, "transfer": one.transfer, "features": one.ours, "against": one.theirs}
            | {"gain": vars(one.gain), "p_value": one.p_value}
            for one in found.pairs
        ],
        "baselines": found.baselines,
        "missing": found.missing,
    }


def flat_metrics(found: Found) -> dict[str, float]:
    """Means of all arms, for MLflow."""
    return {
        "/".join((one.slice, one.transfer, one.features, arm)).replace(",", ""): mean
        for one in found.entries
        for arm, mean in one.means.items()
    }
