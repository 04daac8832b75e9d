"""Names that matplotlib would read as formulas are drawn as they are."""

import io

import numpy as np
import pytest

from trainer import figures
from trainer.figures import Curve, Gain, Score, Tried

NAMES = [r"$\bad{$ a$b", "{}%&#_^~ \x01\x7f é\u200dひ\U0001f600\n", "$$" + "x" * 300]


def pictures(name):
    curve = Curve(name, [3.0, 2.0], [0.1, 0.2])
    gain = Gain(name, 0.1, 0.0, 0.2, note=name, marked=True)
    counts = {name: np.array([5, 3, 1])}
    square = {name: np.eye(2)}
    return {
        "learning_curves": lambda: figures.learning_curves([curve], title=name, score=name),
        "search_progress": lambda: figures.search_progress([Tried(name, 0.1, [0.1])], title=name),
        "transfer_gains": lambda: figures.transfer_gains([gain], metric=name, over=name, title=name),
        "metric_by_date": lambda: figures.metric_by_date({name: [0.1, 0.2]}, ["a", name], metric=name, title=name),
        "confusions": lambda: figures.confusions(square, [name, "b"], title=name),
        "sequence_lengths": lambda: figures.sequence_lengths(counts, title=name),
        "popularity_long_tail": lambda: figures.popularity_long_tail(counts, title=name),
        "score_overview": lambda: figures.score_overview([Score(name, 0.1, [0.1, 0.2])], metric=name),
        "gain_panels": lambda: figures.gain_panels({name: [gain]}, metric=name, over=name),
        "curve_panels": lambda: figures.curve_panels({name: [curve]}, names=[name], metric=name),
        "slice_panels": lambda: figures.slice_panels({name: {name: [gain]}}, names=[name], metric=name),
    }


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("picture", sorted(pictures("x")))
def test_any_name_is_drawn(picture, name):
    figure, file = pictures(name)[picture](), io.BytesIO()
    figure.savefig(file, format="png", dpi=30)
    assert file.getvalue().startswith(b"\x89PNG")
