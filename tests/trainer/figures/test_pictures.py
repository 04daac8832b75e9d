"""What the pictures show, read back from the figures' artists, and that they render."""

import io
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from trainer.figures import (
    COLOURS,
    FAINT,
    MUTED,
    Curve,
    Gain,
    Score,
    Tried,
    curve_panels,
    gain_panels,
    learning_curves,
    popularity_long_tail,
    score_overview,
    search_progress,
    sequence_lengths,
    slice_panels,
    transfer_gains,
)

NAN = float("nan")


def render(figure):
    assert isinstance(figure, Figure)
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return figure.canvas.get_renderer()


def texts(axes):
    return [text.get_text() for text in axes.texts]


def curve(name, length, best):
    return Curve(
        name, np.linspace(6, 4, length).tolist(), [0.2 - abs(epoch - best) / 100 for epoch in range(1, length + 1)]
    )


def test_learning_curves_overlay_runs_and_label_each_name_once():
    figure = learning_curves([curve("none", 12, 9), curve("deep", 8, 5), curve("deep", 9, 6)], title="a title")
    render(figure)
    loss, ndcg = figure.axes
    assert sorted(texts(loss)) == ["deep", "none"]
    drawn = [line for line in loss.lines if len(line.get_xdata()) > 2]
    assert [line.get_xdata().tolist()[-1] for line in drawn] == [12, 8, 9]
    assert [line.get_color() for line in drawn] == [COLOURS[0], COLOURS[1], COLOURS[1]], "seeds share a colour"
    marked = [float(line.get_xdata()[0]) for line in ndcg.lines if line.get_marker() == "o"]
    assert marked == [9, 5, 6], "the best epoch of each run"


def test_search_progress_shows_the_best_so_far_of_each_arm_and_every_trial():
    none = [Tried("none", 0.1, [0.05, 0.1]), Tried("none", None, [0.01]), Tried("none", 0.3, [0.3, 0.2])]
    deep = [Tried("deep", None, []), Tried("deep", 0.2, [0.2, 0.1])]
    figure = search_progress([*none, *deep], title="a title")
    render(figure)
    best, by_epoch = figure.axes
    steps = {line.get_color(): line.get_ydata().tolist() for line in best.lines if line.get_drawstyle() == "steps-post"}
    assert steps == {COLOURS[0]: [0.1, 0.1, 0.3], COLOURS[1]: [pytest.approx(NAN, nan_ok=True), 0.2]}
    assert sorted(texts(best)) == ["deep", "none"]
    assert [line.get_ydata().tolist() for line in by_epoch.lines] == [trial.scores for trial in [*none, *deep]]
    faint = [line.get_alpha() < 0.5 for line in by_epoch.lines]
    assert faint == [False, True, False, True, False], "given up or failed"
    render(search_progress([Tried("none", None, [])]))


def test_learning_curves_leave_out_epochs_without_a_value():
    figure = learning_curves([Curve("run", [3.0, NAN, 1.0, 0.5], [NAN, 0.1, NAN, 0.3])])
    render(figure)
    loss, ndcg = figure.axes
    assert loss.lines[0].get_xdata().tolist() == [1, 3, 4]
    assert ndcg.lines[0].get_xdata().tolist() == [2, 4]


@pytest.mark.parametrize("curves", [[], [Curve("run", [], [])], [Curve("run", [2.0], [NAN])]])
def test_learning_curves_of_runs_that_have_hardly_begun(curves):
    render(learning_curves(curves))


def test_labels_stand_at_the_height_where_their_line_ends():
    figure = learning_curves([Curve("high", [3.0, 2.9], [0.1, 0.4]), Curve("low", [1.0, 0.5], [0.1, 0.1])])
    renderer = render(figure)
    for axes in figure.axes:
        for text, line in zip(
            axes.texts[:2][::-1], [one for one in axes.lines if one.get_marker() == "None"], strict=False
        ):
            box = text.get_window_extent(renderer)
            end = axes.transData.transform(line.get_xydata()[-1])[1]
            assert box.y0 < end < box.y1


def test_labels_do_not_overlap():
    figure = learning_curves([curve(f"run {i}", 10, 5 + i % 2) for i in range(8)])
    renderer = render(figure)
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text().startswith("run")]
        assert len(boxes) == 8
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_transfer_gains_shows_intervals_and_what_holds_zero():
    rows = [
        Gain("deep", 0.045, 0.038, 0.052, "+34 %"),
        Gain("shallow", 0.002, -0.003, 0.007),
        Gain("popularity", -0.05, -0.06, -0.04),
    ]
    figure = transfer_gains(rows)
    render(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["deep", "shallow", "popularity"]
    assert axes.yaxis_inverted(), "the first row is on top"
    assert texts(axes) == ["+0.045  (+34 %)", "+0.002", "-0.050"]
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 2]
    assert [list(ends) for ends in intervals] == [[0.038, 0.052], [-0.003, 0.007], [-0.06, -0.04]]
    faces = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert [face == "white" for face in faces] == [False, True, False]


def test_baselines_look_unlike_models_and_stand_below_them():
    rows = [Gain("popularity", 0.1, 0.05, 0.15, is_baseline=True), Gain("deep", -0.02, -0.03, -0.01)]
    figure = transfer_gains(rows)
    render(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["deep", "popularity"]
    assert texts(axes) == ["-0.020", "+0.100"]
    points = [line for line in axes.lines if line.get_marker() in "oD"]
    assert [(point.get_marker(), point.get_color()) for point in points] == [("o", COLOURS[1]), ("D", MUTED)]
    assert [label.get_fontstyle() for label in axes.get_yticklabels()] == ["normal", "italic"]


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.05, 0.2])
@pytest.mark.parametrize("name", ["deep", "item-to-item over the last items of all domains, decayed"])
def test_tick_labels_of_gains_do_not_run_together(scale, name):
    rows = [Gain(name, scale, 0.3 * scale, 1.7 * scale, "+18 %, p 0.032"), Gain("none", -scale, -2 * scale, 0)]
    check_ticks(transfer_gains(rows))


@pytest.mark.parametrize(("low", "high"), [(1, 2), (20, 60), (1, 90), (1, 3_000), (3, 4_000_000), (7, 8)])
@pytest.mark.parametrize("items", [1, 2, 30, 4_000])
def test_tick_labels_of_popularity_do_not_run_together(low, high, items):
    rng = np.random.default_rng(0)
    check_ticks(popularity_long_tail({"all": rng.integers(low, high, items), "target": np.full(items, high)}))


def check_ticks(figure):
    """Labels of an axis are apart, without an exponent, and with the minus sign of the tables."""
    renderer = render(figure)
    for axes in figure.axes:
        for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [*zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)]
            ticks += zip(axis.get_minorticklocs(), axis.get_minorticklabels(), strict=True)
            shown = [label for place, label in ticks if min(ends) <= place <= max(ends) and label.get_text()]
            assert not [label.get_text() for label in shown if set("−$×") & set(label.get_text())]
            boxes = [label.get_window_extent(renderer).padded(2) for label in shown]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_score_overview_shows_means_seeds_and_baselines():
    rows = [Score("popularity", 7.7, is_baseline=True), Score("deep", 20.5, (20.0, 21.0)), Score("one seed", 19, (19,))]
    figure = score_overview(rows)
    render(figure)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["deep", "one seed", "popularity"]
    assert texts(axes) == ["20.50", "19.00", "7.70"]
    seeds = [list(line.get_xdata()) for line in axes.lines if line.get_markersize() == 3]
    assert seeds == [[20.0, 21.0]]
    assert [line.get_color() for line in axes.lines if line.get_marker() == "D"] == [MUTED]


def test_sequence_lengths_counts_every_user_once():
    rng = np.random.default_rng(0)
    lengths = {"source": rng.geometric(0.02, 500), "target": np.array([0, 1, 1, 7, 8, 1_000_000])}
    figure = sequence_lengths(lengths)
    render(figure)
    source, target = figure.axes
    assert sum(bar.get_height() for bar in source.patches) == 500
    bars = {int(bar.get_x()): bar.get_height() for bar in target.patches if bar.get_height()}
    assert bars == {1: 2, 4: 1, 8: 1, 2**19: 1}, "empty sequences left out; 7 below the edge at 8"
    assert target.get_title(loc="left") == "target: 5 users, median 7 items"


def test_sequence_lengths_of_an_empty_domain():
    figure = sequence_lengths({"target": np.array([], dtype=np.int64)})
    render(figure)
    assert figure.axes[0].get_title(loc="left") == "target: 0 users"


def test_popularity_long_tail_falls_and_names_the_share_of_the_top():
    counts = {"target": np.array([1, 90, 0, 2, 1, 1, 1, 1, 1, 1, 1])}
    figure = popularity_long_tail(counts)
    render(figure)
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == list(range(1, 11))
    assert axes.lines[0].get_ydata().tolist() == [90, 2] + [1] * 8
    assert texts(axes) == ["target\n10 items; top 10 %\nhave 90 % of interactions"]


def test_popularity_long_tail_draws_few_points_of_a_large_catalogue():
    figure = popularity_long_tail({"all": np.random.default_rng(0).zipf(1.5, 300_000), "none": np.zeros(3)})
    assert len(figure.axes[0].lines[0].get_xdata()) <= 2_000
    assert figure.axes[0].lines[0].get_xdata()[-1] == 300_000


def test_popularity_long_tail_leads_from_each_lines_end_to_its_label():
    figure = popularity_long_tail({"source": np.arange(50, 1_000), "target": np.arange(5, 100)})
    render(figure)
    (axes,) = figure.axes
    drawn = [line for line in axes.lines if len(line.get_xdata()) > 2]
    leads = [line for line in axes.lines if line.get_linestyle() == ":"]
    ends = {line.get_color(): axes.transData.transform(line.get_xydata()[-1]) for line in drawn}
    starts = {line.get_color(): axes.transAxes.transform(line.get_xydata()[0]) for line in leads}
    assert ends.keys() == starts.keys() == {COLOURS[0], COLOURS[1]}
    for colour, end in ends.items():
        np.testing.assert_allclose(starts[colour], end, atol=0.5)


def dots(axes):
    return [line for line in axes.lines if line.get_marker() == "o"]


def test_gain_panels_share_an_axis_and_keep_a_groups_rows_together():
    panels = {
        "one": [Gain("deep", 1.5, 0.5, 2.5), Gain("shallow", -1, -3, 1)],
        "two": [Gain("deep", 4, 3, 5, "its note")],
    }
    figure = gain_panels(panels)
    renderer = render(figure)
    one, two = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    assert one.get_xlim() == two.get_xlim()
    assert texts(one) == ["+1.50", "-1.00"]
    assert texts(two) == ["its note"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots(one)] == [False, True]
    heights = [one.transData.transform((0, place))[1] for place in range(2)] + [two.transData.transform((0, 0))[1]]
    assert heights == sorted(heights, reverse=True)
    width = figure.get_window_extent(renderer).x1
    assert all(text.get_window_extent(renderer).x1 <= width for axes in figure.axes for text in axes.texts)
    assert figure._supxlabel.get_window_extent(renderer).x1 <= width


def test_curve_panels_keep_the_colours_of_names_that_are_not_drawn():
    names = ["none", "shallow", "deep"]
    figure = curve_panels({"plain": [curve("none", 9, 4), curve("deep", 9, 4), curve("deep", 7, 3)]}, names=names)
    render(figure)
    above, below = figure.axes
    assert [line.get_color() for line in below.lines] == [FAINT, COLOURS[1], COLOURS[1]]
    assert [float(dot.get_xdata()[0]) for dot in dots(above)] == [4, 4, 3]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["none", "deep"]


def test_slice_panels_put_the_series_of_a_slice_beside_each_other():
    series = {
        "shallow": [Gain("1-5", 1, 0.5, 1.5), Gain("6-10", 2, -1, 5)],
        "deep": [Gain("6-10", 3, 2, 4)],
    }
    figure = slice_panels({"with": series, "without": {"deep": [Gain("1-5", 0, -1, 1)]}}, names=["shallow", "deep"])
    render(figure)
    first, second = figure.axes
    assert [label.get_text() for label in second.get_xticklabels()] == ["1-5", "6-10"]
    places = [(round(float(dot.get_xdata()[0])), float(dot.get_ydata()[0])) for dot in dots(first)]
    assert places == [(0, 1), (1, 2), (1, 3)]
    shallow, deep = dots(first)[1:]
    assert shallow.get_xdata()[0] < 1 < deep.get_xdata()[0]
    assert [dot.get_color() for dot in dots(first)] == [COLOURS[0], COLOURS[0], COLOURS[1]]
    assert dots(second)[0].get_color() == COLOURS[1]


@pytest.mark.parametrize(
    "figure",
    [
        score_overview([]),
        gain_panels({}),
        gain_panels({"a": []}),
        curve_panels({}, names=[]),
        slice_panels({}, names=[]),
    ],
)
def test_panels_of_nothing(figure):
    render(figure)
