"""What may be logged to an MLflow run, and links to runs and models in descriptions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # both are slow to import
    from matplotlib.figure import Figure

    from trainer.data.release import Release

THUMBNAIL_PIXELS = 640  # width of a picture in a description, beside which a run's facts have room


class Run:
    """One MLflow run. This base class tracks nothing: it is what other ranks, and runs with tracking off, get.

    No method raises, and only `id` may wait, for the run to be made.
    """

    id: str = ""  # "" where there is none

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; a value is kept as text, cut at 500 characters."""

    def log_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Numbers by name, e.g. {"validation/full/NDCG@10": 0.18}. MLflow forbids "@": it becomes "_".

        Without a step a number stands for the whole run. Its name must not be that of a curve, which would begin with
        it, since MLflow puts it at step 0: such a number is dropped with a warning.
        """

    def log_history(self, lines: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(step, metrics) of a run that is gone on with: what a killed process did not get sent is logged."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Short texts by name."""

    def log_figure(self, figure: "Figure", path: str) -> None:
        """A picture as PNG at `path` ("curves/learning.png") among the run's artifacts."""

    def log_thumbnail(self, picture: Path, path: str) -> None:
        """A PNG file, scaled down to THUMBNAIL_PIXELS, at `path`. For descriptions, where pictures keep their size."""

    def log_text(self, text: str, path: str) -> None:
        """A text file at `path` among the run's artifacts."""

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """A file or folder, put in `folder` among the run's artifacts. It must stay unchanged until the run ends."""

    def log_release(self, release: "Release", *, context: str = "training", tables: Sequence[str] = ()) -> None:
        """Snapshots of a release as parameters, and as dataset inputs those of `tables` (of all, where none is named).

        The dataset of a table is called <table>@<version>.
        """

    def describe(self, markdown: str) -> None:
        """The run's description, instead of an earlier one. Two kinds of addresses are resolved when it is sent:
        `model:<hash of a model folder>` (`model_link`) and `artifact:<path>`, a picture among the run's artifacts."""

    def note_reused(self, name: str, run_id: str) -> None:
        """List an earlier run in the description: this run uses its result instead of doing the work again."""

    def log_model(self, name: str, digest: str, *, kind: str = "", params: Mapping[str, Any] | None = None) -> None:
        """A logged model that this run trained, found by the hash of its model folder; its description is the run's.

        It holds no files until it is registered.
        """

    def log_model_metrics(self, digest: str, metrics: Mapping[str, float], release: "Release", table: str) -> None:
        """Metrics of a logged model on a snapshot, shown on its page and on the page of the run that trained it.

        Nothing happens where the store has no logged model of that hash.
        """


def run_link(name: str, run_id: str) -> str:
    """A Markdown link to a run, for descriptions."""
    return f"[{name}](#/runs/{run_id})"


def model_link(name: str, digest: str) -> str:
    """A Markdown link to the logged model of a model folder, for descriptions; plain text where there is none."""
    return f"[{name}](model:{digest})"
