"""Pictures of runs and data: learning curves, transfer gains, sequence lengths, popularity. Each returns a Figure.

Those of a report (`…_panels`) are narrow, so that a phone shows their letters large enough.

Figures are made without pyplot, so nothing global changes and no window or display is needed: ``figure.savefig(path)``.
Lines are labelled where they end rather than in a legend. Colours: Okabe and Ito 2008, for the colour-blind too.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from etl.text_table import with_sign

FloatArray = npt.NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT, GRID = "#333333", "#999999", "#E5E5E5"
MUTED = "#767676"  # simple baselines: readable on white and on black
NAME_CHARACTERS = 26  # of a name in a narrow picture, before it goes on below
LEGEND_CHARACTERS = 66  # of names beside each other
NARROW, SMALL = 5.4, 9  # inches and points of the pictures of a report
OVERVIEW_CHARACTERS = 36  # of a line of a name in the overview
LABEL_GAP = 0.062  # least distance of two labels, in heights of the axes


_Drawn = TypeVar("_Drawn")
_Given = ParamSpec("_Given")


def _without_mathematics(draw: Callable[_Given, _Drawn]) -> Callable[_Given, _Drawn]:
    """Names are text as they are: between two "$" matplotlib else reads formulas, and fails where they are none."""

    @functools.wraps(draw)
    def drawn(*args: _Given.args, **given: _Given.kwargs) -> _Drawn:
        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*args, **given)

    return drawn


@dataclass(frozen=True)
class Curve:
    """One run, epoch by epoch. Runs of one name (several seeds) share a colour and a label."""

    name: str
    loss: Sequence[float]  # training loss of epochs 1, 2…
    ndcg: Sequence[float]  # validation score of the same epochs; NaN where there was no validation


@dataclass(frozen=True)
class Tried:
    """One trial of a search. `score`: its best validation NDCG@10; None: it was given up, or failed."""

    name: str  # of the arm; trials of one name share a colour and a label
    score: float | None
    scores: Sequence[float]  # of epochs 1, 2…, as far as it came


@dataclass(frozen=True)
class Gain:
    """One row of a transfer picture: the gain of `name` over what the picture compares with."""

    name: str
    gain: float
    low: float
    high: float
    note: str = ""  # printed at the row's end, e.g. "+33 %, p = 0.001"
    marked: bool = False  # the candidate
    is_baseline: bool = False  # of a simple baseline: grey, thin, a diamond


@dataclass(frozen=True)
class Score:
    """One row of an overview: the mean over seeds, and each seed."""

    name: str
    mean: float
    seeds: Sequence[float] = ()
    is_baseline: bool = False


@_without_mathematics
def learning_curves(curves: Sequence[Curve], *, title: str = "", score: str = "NDCG@10") -> Figure:
    """Training loss and validation score by epoch, all runs overlaid, each run's best epoch marked."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = _colours([curve.name for curve in curves])
    panels = [
        (left, "training loss", [c.loss for c in curves]),
        (right, f"validation {score}", [c.ndcg for c in curves]),
    ]
    for axes, label, series in panels:
        ends: dict[str, tuple[float, float]] = {}
        for curve, values in zip(curves, series, strict=True):
            epochs, known = _known(values)
            if not len(known):
                continue
            axes.plot(epochs, known, color=colours[curve.name], linewidth=1.8, alpha=0.9)
            if axes is right:
                best = int(known.argmax())
                axes.plot(
                    epochs[best], known[best], "o", color=colours[curve.name], markersize=6, markeredgecolor="white"
                )
            if curve.name not in ends or epochs[-1] > ends[curve.name][0]:
                ends[curve.name] = (float(epochs[-1]), float(known[-1]))
        _plain(axes, label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(0, 1.03 * max([1, *(len(curve.loss) for curve in curves)]))
        _label_ends(axes, ends, colours)
    if any(len(_known(curve.ndcg)[1]) for curve in curves):
        right.annotate("dots: best epoch", (0, -0.19), xycoords="axes fraction", color=FAINT, fontsize=10)
    _title(figure, title)
    return figure


@_without_mathematics
def search_progress(tried: Sequence[Tried], *, title: str = "") -> Figure:
    """Each arm's best validation NDCG@10 after so many trials, and every trial by epoch, those given up faint."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = _colours([trial.name for trial in tried])
    ends: dict[str, tuple[float, float]] = {}
    for name, colour in colours.items():
        trials = [trial for trial in tried if trial.name == name]
        scores = np.array([np.nan if trial.score is None else trial.score for trial in trials], dtype=np.float64)
        numbers = np.arange(1, len(trials) + 1)
        best = np.fmax.accumulate(scores)
        left.plot(numbers, scores, "o", color=colour, markersize=5, alpha=0.5)
        left.step(numbers, best, where="post", color=colour, linewidth=1.8)
        if np.isfinite(best[-1]):
            ends[name] = (float(numbers[-1]), float(best[-1]))
        for trial in trials:
            epochs, known = _known(trial.scores)
            ended = trial.score is not None
            right.plot(epochs, known, color=colour, linewidth=1.2, alpha=0.8 if ended else 0.25)
    for axes, label, below in (
        (left, "best validation NDCG@10 so far", "trial"),
        (right, "validation NDCG@10", "epoch"),
    ):
        _plain(axes, label)
        axes.set_xlabel(below)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(left, ends, colours)
    right.annotate("faint: given up or failed", (0, -0.19), xycoords="axes fraction", color=FAINT, fontsize=10)
    _title(figure, title)
    return figure


@_without_mathematics
def transfer_gains(
    gains: Sequence[Gain], *, metric: str = "NDCG@10", over: str = "from scratch", title: str = ""
) -> Figure:
    """Gains with their intervals, one row each; hollow where the interval holds zero. Rows keep their order, simple
    baselines below the models."""
    rows = sorted(gains, key=lambda gain: gain.is_baseline)
    figure = Figure(figsize=(9.5, 1.4 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, gain in enumerate(rows):
        _interval(axes, gain, row, colour=_gain_colour(gain), size=9)
        text = with_sign(gain.gain, 3) + (f"  ({gain.note})" if gain.note else "")
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=11, color=INK)
    axes.axvline(0, color=INK, linewidth=1)
    _plain(axes, "", grid="x")
    _name_rows(axes, rows, [f"{gain.name} (candidate)" if gain.marked else gain.name for gain in rows], size=11)
    for gain, label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if gain.marked else "normal")
    _signed(axes.xaxis, ticks=5)
    axes.set_xlabel(f"gain in {metric} over {over}, with its interval (hollow: it holds zero)")
    _title(figure, title)
    return figure


@_without_mathematics
def metric_by_date(
    series: Mapping[str, Sequence[float]], dates: Sequence[str], *, metric: str, title: str = ""
) -> Figure:
    """A metric at several dates, a line for each name; the first one is the model's."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(dates))
    model, *baselines = series
    colours = _colours([model]) | dict.fromkeys(baselines, MUTED)
    styles = dict(zip(series, ("-", "--", ":", "-."), strict=False))
    for name, values in series.items():
        axes.plot(places, values, styles.get(name, "-"), marker="o", markersize=5, color=colours[name], linewidth=1.8)
    _plain(axes, metric)
    axes.set_xticks(places, dates, rotation=30 if len(dates) > 6 else 0)
    axes.set_ylim(bottom=0)
    _label_ends(axes, {name: (float(places[-1]), float(values[-1])) for name, values in series.items()}, colours)
    _title(figure, textwrap.fill(title, 90))
    return figure


@_without_mathematics
def confusions(shares: Mapping[str, npt.NDArray[Any]], classes: Sequence[str], *, title: str = "") -> Figure:
    """A square a label: of the users of each class (row), the share predicted to be of each (column), in percent where
    there is room."""
    size = 1.6 + 0.34 * min(len(classes), 24)
    figure = Figure(figsize=(max(size * len(shares), 5.0), size + 0.7), layout="constrained")
    panels = figure.subplots(1, max(len(shares), 1), squeeze=False, sharey=True)[0]
    for axes, (name, share) in zip(panels, shares.items(), strict=False):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(name, fontsize=11, color=INK, loc="left")
        axes.set_xticks(range(len(classes)), classes, rotation=90 if len(classes) > 4 else 0, fontsize=9)
        axes.set_yticks(range(len(classes)), classes, fontsize=9)
        axes.set_xlabel("predicted")
        if len(classes) <= 12:
            for (row, column), value in np.ndenumerate(share):
                colour = "white" if value > 0.6 else INK
                axes.annotate(f"{100 * value:.0f}", (column, row), ha="center", va="center", color=colour, fontsize=9)
    panels[0].set_ylabel("is")
    _title(figure, title)
    return figure


@_without_mathematics
def reliability_curves(curves: Mapping[str, npt.NDArray[Any]], *, title: str = "") -> Figure:
    """Of what is given a probability (across), the share that is so (up), by bins [bins, 2 or more]; the diagonal is
    as predicted."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    colours = _colours(list(curves))
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
    ends: dict[str, tuple[float, float]] = {}
    for name, curve in curves.items():
        axes.plot(curve[:, 0], curve[:, 1], "o-", color=colours[name], linewidth=1.6, markersize=4)
        ends[name] = (float(curve[-1, 0]), float(curve[-1, 1]))
    _plain(axes, "share that was taken")
    axes.set_xlabel("predicted probability (bins of equally many pairs)")
    _label_ends(axes, ends, colours)
    _title(figure, title)
    return figure


@_without_mathematics
def sequence_lengths(lengths: Mapping[str, npt.NDArray[Any]], *, title: str = "") -> Figure:
    """Histogram of users by sequence length, a row a domain, one logarithmic axis, medians marked. Empty sequences are
    left out."""
    figure = Figure(figsize=(8.5, 1.0 + 1.7 * max(len(lengths), 1)), layout="constrained")
    rows = figure.subplots(max(len(lengths), 1), 1, sharex=True, squeeze=False)[:, 0]
    longest = max((int(np.max(values, initial=1)) for values in lengths.values()), default=1)
    bins = _length_bins(longest)
    for axes, (name, values), colour in zip(rows, lengths.items(), _cycle(len(lengths)), strict=False):
        used = np.asarray(values)[np.asarray(values) > 0]
        counts, _ = np.histogram(used, bins)
        axes.bar(bins[:-1], counts, np.diff(bins), align="edge", color=colour, edgecolor="white", linewidth=1.5)
        axes.set_xscale("log", base=2)
        _plain(
            axes,
            f"{name}: {len(used):,} users" + (f", median {np.median(used):,.0f} items" if len(used) else ""),
            colour=colour,
        )
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(_thousands))
        if len(used):
            axes.axvline(float(np.median(used)), color=INK, linewidth=1.2)
    rows[-1].set_xticks(bins)
    rows[-1].xaxis.set_major_formatter(FuncFormatter(_thousands))
    rows[-1].set_xlabel("items in a user's sequence")
    _title(figure, title)
    return figure


@_without_mathematics
def popularity_long_tail(counts: Mapping[str, npt.NDArray[Any]], *, title: str = "") -> Figure:
    """Interactions of each item against its rank by popularity, both logarithmic, a line a domain. Items without
    interactions are left out."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(counts, _cycle(len(counts)), strict=True))
    ends: dict[str, tuple[float, float]] = {}
    texts: dict[str, str] = {}
    for name, values in counts.items():
        falling = np.sort(np.asarray(values)[np.asarray(values) > 0])[::-1]
        if not len(falling):
            continue
        ranks = np.unique(np.geomspace(1, len(falling), 2_000).astype(np.int64))  # what the eye sees, of any catalogue
        axes.plot(ranks, falling[ranks - 1], color=colours[name], linewidth=2)
        top = -(-len(falling) // 10)
        share = falling[:top].sum() / falling.sum()
        ends[name] = (float(ranks[-1]), float(falling[-1]))
        texts[name] = f"{name}\n{len(falling):,} items; top 10 %\nhave {100 * share:.0f} % of interactions"
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes, "interactions of an item", grid="both")
    axes.set_xlabel("rank of the item by popularity")
    for axis in (axes.xaxis, axes.yaxis):
        _powers(axis)
    _label_ends(axes, ends, colours, texts=texts, lines=3)
    _title(figure, title)
    return figure


@_without_mathematics
def score_overview(scores: Sequence[Score], *, metric: str = "NDCG@10") -> Figure:
    """Means in percent, a row each in the order given, simple baselines below; small dots are single seeds."""
    rows = sorted(scores, key=lambda score: score.is_baseline)
    names = [textwrap.fill(score.name, OVERVIEW_CHARACTERS) for score in rows]
    height = 0.3 if any("\n" in name for name in names) else 0.23
    figure = Figure(figsize=(NARROW, 0.75 + height * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots()
    for place, score in enumerate(rows):
        colour, marker = (MUTED, "D") if score.is_baseline else (COLOURS[0], "o")
        if len(score.seeds) > 1:
            axes.plot(score.seeds, [place] * len(score.seeds), "o", markersize=3, color=colour, alpha=0.45)
        axes.plot([score.mean], [place], marker, markersize=5 if score.is_baseline else 6.5, color=colour)
        axes.annotate(
            f"{score.mean:.2f}",
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=SMALL,
            color=INK,
        )
    _plain(axes, "", grid="both")
    _name_rows(axes, rows, names, size=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"{metric}, %" + (" (diamonds: untrained baselines)" if any(s.is_baseline for s in rows) else ""))
    _narrow(axes)
    return figure


@_without_mathematics
def gain_panels(
    panels: Mapping[str, Sequence[Gain]], *, metric: str = "NDCG@10", unit: str = "", over: str = "from scratch"
) -> Figure:
    """Gains with their intervals, a panel a group, all on one axis; hollow where the interval holds
    zero. The note of a gain, if any, is in place of its number."""
    labels = [[textwrap.fill(gain.name, NAME_CHARACTERS) for gain in gains] for gains in panels.values()]
    sizes = [max(len(gains), 1) for gains in panels.values()]
    height = 0.34 if any("\n" in label for own in labels for label in own) else 0.27
    figure = Figure(figsize=(NARROW, 0.9 + sum(0.5 + height * size for size in sizes)), layout="constrained")
    rows = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False, height_ratios=[*sizes] or [1])[:, 0]
    for axes, (name, gains), own in zip(rows, panels.items(), labels, strict=False):
        for place, gain in enumerate(gains):
            _interval(axes, gain, place, colour=_gain_colour(gain), size=6)
            text = gain.note or with_sign(gain.gain, 2)
            axes.annotate(
                text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INK
            )
        axes.axvline(0, color=INK, linewidth=1)
        _plain(axes, name, grid="x")
        _name_rows(axes, gains, own, size=SMALL)
        _signed(axes.xaxis, ticks=6)
        _narrow(axes)
    heading = f"gain in {metric} over {over}" + (f", {unit}" if unit else "")
    figure.supxlabel(f"{heading} (hollow: interval holds zero)", fontsize=SMALL, color=INK)
    return figure


@_without_mathematics
def curve_panels(panels: Mapping[str, Sequence[Curve]], *, names: Sequence[str], metric: str = "NDCG@10") -> Figure:
    """Validation score (above) and training loss (below) by epoch, a column a panel. names: all that curves may have,
    so that pictures share their colours; the first, which the others are compared with, is grey. Dots: best epochs."""
    met = {curve.name for curves in panels.values() for curve in curves}
    colours = {name: colour for name, colour in zip(names, [FAINT, *_cycle(len(names))], strict=False) if name in met}
    figure = Figure(figsize=(NARROW, 4.8 + _legend_height(colours)), layout="constrained")
    columns = figure.subplots(2, max(len(panels), 1), sharey="row", squeeze=False)
    for column, (name, curves) in enumerate(panels.items()):
        above, below = columns[0, column], columns[1, column]
        for curve in curves:
            for axes, values in ((above, curve.ndcg), (below, curve.loss)):
                epochs, known = _known(values)
                axes.plot(epochs, known, color=colours[curve.name], linewidth=1.3, alpha=0.85)
                if axes is above and len(known):
                    best = int(known.argmax())
                    axes.plot(epochs[best], known[best], "o", color=colours[curve.name], markersize=4)
        for axes, label in ((above, f"validation {metric}"), (below, "training loss")):
            _plain(axes, f"{name}\n{label}" if axes is above else label)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            _narrow(axes)
        below.set_xlabel("epoch", fontsize=SMALL)
    _legend(figure, colours)
    return figure


@_without_mathematics
def slice_panels(
    panels: Mapping[str, Mapping[str, Sequence[Gain]]], *, names: Sequence[str], metric: str = "NDCG@10"
) -> Figure:
    """Gains with their intervals by slice: panel -> series -> a Gain for each slice (its name), in the order first met.
    names: all series there may be; within a slice they stand beside each other, in the colours of `curve_panels`."""
    colours = dict(zip(names, _cycle(len(names)), strict=True))
    height = 0.5 + 2.3 * max(len(panels), 1) + _legend_height(colours)
    figure = Figure(figsize=(NARROW, height), layout="constrained")
    rows = figure.subplots(max(len(panels), 1), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    slices = list(dict.fromkeys(g.name for series in panels.values() for gains in series.values() for g in gains))
    step = 0.8 / max(len(colours), 1)
    for axes, (name, series) in zip(rows, panels.items(), strict=False):
        for place, (label, colour) in enumerate(colours.items()):
            for gain in series.get(label, ()):
                x = slices.index(gain.name) + step * (place - (len(colours) - 1) / 2)
                _interval(axes, gain, x, colour=colour, size=4.5, upright=True)
        axes.axhline(0, color=INK, linewidth=1)
        _plain(axes, name)
        axes.set_xticks(range(len(slices)), slices)
        axes.set_xlim(-0.6, len(slices) - 0.4)
        _signed(axes.yaxis, ticks=5)
        _narrow(axes)
    rows[-1].set_xlabel(f"items in the user's history; height: gain in {metric}", fontsize=SMALL)
    _legend(figure, colours)
    return figure


# --- style ---------------------------------------------------------------------------------------------------------


class _AsciiMinus(ScalarFormatter):
    """Numbers with the minus sign that tables and messages have."""

    @staticmethod
    def fix_minus(s: str) -> str:
        return s


def _signed(axis: Axis, *, ticks: int) -> None:
    """At most so many labelled intervals, so that long numbers do not run together."""
    axis.set_major_locator(MaxNLocator(ticks))
    axis.set_major_formatter(_AsciiMinus())


def _powers(axis: Axis) -> None:
    """A logarithmic axis labelled at powers of ten; also at 2, 3 and 5 of each where it spans less than two."""
    low, high = sorted(axis.get_view_interval())
    if high < 100 * max(low, 1e-9):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_thousands))
    axis.set_minor_formatter(NullFormatter())


def _gain_colour(gain: Gain) -> str:
    if gain.is_baseline:
        return MUTED
    return COLOURS[0] if gain.gain >= 0 else COLOURS[1]


def _name_rows(axes: Axes, rows: Sequence[Gain | Score], names: Sequence[str], *, size: float) -> None:
    """Rows from the top down, named at the left; simple baselines in grey italics, under a line."""
    axes.set_yticks(range(len(rows)), names, fontsize=size)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    baselines = [row.is_baseline for row in rows]
    for label, is_baseline in zip(axes.get_yticklabels(), baselines, strict=True):
        if is_baseline:
            label.set(color=MUTED, fontstyle="italic")
    if True in baselines[1:] and not baselines[0]:
        axes.axhline(baselines.index(True) - 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)))


def _interval(axes: Axes, gain: Gain, place: float, *, colour: str, size: float, upright: bool = False) -> None:
    """A gain as a dot on its interval (a simple baseline's: a diamond, thin); hollow where that holds zero."""
    ends, places = [gain.low, gain.high], [place, place]
    width, marker = (1.2, "D") if gain.is_baseline else (2.5, "o")
    axes.plot(*((places, ends) if upright else (ends, places)), color=colour, linewidth=width, solid_capstyle="butt")
    face = colour if gain.low > 0 or gain.high < 0 else "white"
    point = ([place], [gain.gain]) if upright else ([gain.gain], [place])
    size = 0.75 * size if gain.is_baseline else size
    axes.plot(*point, marker, markersize=size, color=colour, markerfacecolor=face, markeredgewidth=1.5)


def _narrow(axes: Axes) -> None:
    axes.tick_params(labelsize=SMALL)
    axes.xaxis.label.set_fontsize(SMALL)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=10, color=INK)


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """Names of the colours beneath the panels."""
    lines = [Line2D([], [], color=colour, linewidth=2.5) for colour in colours.values()]
    if lines:
        figure.legend(
            lines,
            list(colours),
            loc="outside lower center",
            ncols=_beside(colours),
            frameon=False,
            fontsize=SMALL,
            labelcolor=INK,
        )


def _beside(colours: Mapping[str, str]) -> int:
    """Columns of a legend: names stand beside each other where they are short."""
    longest = max(map(len, colours), default=0)
    return max(1, min(next((n for n in (3, 2) if n * longest <= LEGEND_CHARACTERS), 1), len(colours)))


def _legend_height(colours: Mapping[str, str]) -> float:
    """Inches."""
    return 0.19 * -(-len(colours) // _beside(colours))


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _colours(names: Sequence[str]) -> dict[str, str]:
    distinct = list(dict.fromkeys(names))
    return dict(zip(distinct, _cycle(len(distinct)), strict=True))


def _known(values: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """Epochs and values where there is a finite value."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)
    return (np.flatnonzero(finite) + 1).astype(np.float64), array[finite]


def _length_bins(longest: int) -> npt.NDArray[np.int64]:
    """Edges 1, 2, 4, 8… past the longest: equally wide on a logarithmic axis, so no bar is an artefact of rounding."""
    return 2 ** np.arange(int(longest).bit_length() + 1)


def _thousands(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"


def _plain(axes: Axes, title: str, *, grid: str = "y", colour: str = INK) -> None:
    """No frame, a faint grid, the quantity as a title above the axis instead of a turned label."""
    axes.set_title(title, loc="left", fontsize=12, color=colour)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=10)
    axes.xaxis.label.set(color=INK, fontsize=11)
    axes.set_axisbelow(True)
    if grid in ("x", "both"):
        axes.xaxis.grid(True, color=GRID, linewidth=0.8)
    if grid in ("y", "both"):
        axes.yaxis.grid(True, color=GRID, linewidth=0.8)


def _label_ends(
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    *,
    texts: Mapping[str, str] | None = None,
    lines: int = 1,
) -> None:
    """A label right of the axes for each line, led to from its end, moved apart where labels would overlap."""
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which the transform below does not
    to_axes = axes.transData + axes.transAxes.inverted()
    tips = {name: to_axes.transform(end) for name, end in ends.items()}
    gap = LABEL_GAP * lines
    lowest = -1.0
    placed: dict[str, float] = {}
    for name in sorted(tips, key=lambda name: (tips[name][1], -tips[name][0])):
        lowest = placed[name] = max(tips[name][1], lowest + gap, gap / 2)
    surplus = max(lowest - 1.0, 0.0)
    for name, height in placed.items():
        x, y = tips[name]
        lead = Line2D(
            [x, 1.015],
            [y, height - surplus],
            transform=axes.transAxes,
            color=colours[name],
            linewidth=0.8,
            alpha=0.5,
            linestyle=":",
            clip_on=False,
        )
        axes.add_artist(lead)
        text, place = texts[name] if texts else name, (1.025, height - surplus)
        axes.annotate(text, place, xycoords="axes fraction", va="center", fontsize=11, color=colours[name])


def _title(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14, color=INK)
