"""Models in MLflow: found, packed, described, downloaded."""

import hashlib
import json
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import yaml

from etl import archive
from etl.redaction import one_line
from etl.settings import GraftrecError

if TYPE_CHECKING:  # both are slow to import
    pass
from trainer.tracking.connection import FINAL, translated
from trainer.tracking.datasets import dataset_of
from trainer.tracking.queue import warn

SOURCES, SOURCES_DIGEST = "sources.zip", "graftrec.sources"  # file below code/; its SHA-256 in the model's metadata
_SOURCES = (".py", ".j2", ".html", ".properties")
MODEL_HASH = "graftrec.hash"  # tag of a logged model: the hash of its model folder


VERSIONS = "mlflow.modelVersions"  # tag of a logged model: the registered versions made of it, as JSON


def models_of(client: Any, digest: str) -> list[Any]:
    """Logged models of a model folder by its hash, newest first."""
    experiments = [found.experiment_id for found in client.search_experiments(max_results=1_000)]
    found = client.search_logged_models(experiments, filter_string=f"tags.`{MODEL_HASH}` = '{digest}'", max_results=50)
    return sorted(found, key=lambda model: -model.creation_timestamp)


def log_model_metrics(client: Any, digest: str, values: Sequence[Sequence[Any]], dataset: Mapping[str, Any]) -> None:
    """Metrics [name, value, time, step] of the newest logged model of a hash, on a snapshot {table, version, lake}; of
    the run that trained it too. What it has already is not logged again. Nothing where there is no such model, or its
    run is unknown."""
    from mlflow.entities import Metric

    model = next((model for model in models_of(client, digest) if model.source_run_id), None)
    if model is None:
        return
    on = dataset_of(dataset)
    known = {(metric.key, metric.dataset_digest, metric.value) for metric in model.metrics or ()}
    metrics = [
        Metric(*value, model_id=model.model_id, dataset_name=on.name, dataset_digest=on.digest)
        for value in values
        if (value[0], on.digest, value[1]) not in known
    ]
    if metrics:
        client.log_batch(model.source_run_id, metrics=metrics)


def resolved(client: Any, markdown: str, run_id: str = "") -> str:
    """Markdown with addresses that a browser knows: `model:<hash>` of a logged model (plain text where there is none),
    `artifact:<path>` of the run."""
    from mlflow.exceptions import MlflowException

    def link(match: re.Match[str]) -> str:
        name, digest = match.groups()
        found = []
        try:
            found = models_of(client, digest)
        except MlflowException as error:
            if error.error_code not in FINAL:  # else a server that knows no logged models
                raise
        return f"[{name}](#/experiments/{found[0].experiment_id}/models/{found[0].model_id})" if found else name

    text = re.sub(r"\[([^\]]*)\]\(model:(\w+)\)", link, markdown)
    return re.sub(r"\]\(artifact:([^)]+)\)", lambda m: f"](get-artifact?path={quote(m[1])}&run_uuid={run_id})", text)


def model_name(text: str) -> str:
    """A name that a logged model may have."""
    return re.sub(r"[/:.%\"']", "_", text) or "model"


_REQUIREMENTS = (  # of scoring: what trainer.inference.recommender imports
    "mlflow",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "deltalake",
    "scipy",
    "safetensors",
    "pydantic",
    "pyyaml",
    "psutil",
)


def pack(
    archives: Sequence[Path], target: Path, *, model_id: str, run_id: str | None, example: Mapping[str, Any]
) -> None:
    """Write an MLflow model of at most 8 files around a model's archives, with our sources, and no pickle. `example`:
    one request, by column, kept in the model's metadata.

    The sources travel with it, as one archive, so that a served version runs the code that it was made by, on a machine
    that has only the packages of its requirements.txt.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, ParamSchema, ParamSpec, Property, Schema

    package = Path(__file__).parent.parent
    texts, numbers = Array(DataType.string), Array(DataType.double)
    # A later item's, by an encoder.
    vector = Object(
        [Property("item", DataType.string), Property("encoder", DataType.string), Property("vector", numbers)]
    )
    signature = ModelSignature(
        Schema(
            [
                ColSpec(DataType.string, "user", required=False),
                ColSpec(texts, "items", required=False),
                ColSpec(texts, "event_types", required=False),
                ColSpec(Array(texts), "baskets", required=False),
                ColSpec(Array(vector), "features", required=False),
                ColSpec(texts, "friends", required=False),
                ColSpec(texts, "exclude", required=False),
                ColSpec(AnyType(), "times", required=False),  # numbers: of a list of doubles 978300760 would be none
                ColSpec(AnyType(), "time", required=False),
            ]
        ),
        Schema(
            [
                ColSpec(texts, "items"),
                ColSpec(numbers, "scores"),
                ColSpec(DataType.string, "basis"),
                ColSpec(texts, "unknown"),
                ColSpec(DataType.string, "version"),
            ]
        ),
        ParamSchema([ParamSpec("k", DataType.long, 10), ParamSpec("domain", DataType.string, "")]),
    )
    requirements = [f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS]
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch) / SOURCES
        digest = pack_sources(sources)
        save_model(
            str(target),
            python_model=str(package / "registry" / "model_script.py"),
            artifacts={one.stem: str(one) for one in archives},
            signature=signature,
            code_paths=[str(sources)],
            pip_requirements=requirements,
            mlflow_model=Model(model_id=model_id, run_id=run_id),
            metadata={SOURCES_DIGEST: digest, "graftrec.example": json.dumps(dict(example))},
        )


def pack_sources(target: Path) -> str:
    """Write our two packages, with the files that they read, as one archive; returns its SHA-256."""
    root = Path(__file__).parent.parent.parent
    files = {
        path.relative_to(root).as_posix(): path
        for package in ("etl", "trainer")
        for path in (root / package).rglob("*")
        if path.is_file() and path.suffix in _SOURCES
    }
    archive.pack(files, target, compressed=True)
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def offer(
    load: Callable[[Path, str], Any],
    answer: Callable[[Any, list[dict[str, Any]], dict[str, Any]], Any],
    mistake: type[Exception] = GraftrecError,
) -> None:
    """Tell MLflow what the model being loaded is: `load(folder, version label)`, then `answer` for each request.

    A `mistake` of the caller's becomes a 400 with its text. Of any other error the server's log has the text, and the
    answer is a 500 of one line: whoever asks is told no path, store or line of code.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import set_model
    from mlflow.pyfunc import PythonModel

    class Served(PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            _answer_in_one_line()
            place = Path(next(iter(context.artifacts.values())))  # an archive beside others; before these, a folder
            self._state = load(place if place.is_dir() else place.parent, _label(place))

        def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> Any:
            try:
                return answer(self._state, cast(list[dict[str, Any]], model_input.to_dict("records")), params or {})
            except mistake as error:
                raise MlflowException.invalid_parameter_value(one_line(error, 1_000)) from None
            except Exception:
                warn(f"a request failed: {traceback.format_exc()}")
                raise MlflowException("the server failed to answer; its log says why") from None

    set_model(Served())


def _answer_in_one_line() -> None:
    """Let errors of MLflow's scoring server, of requests that reach no model, be one line too: it appends the request
    and the traceback to what it answers."""
    from mlflow.exceptions import MlflowException

    if hasattr(MlflowException, _PLAIN):
        return
    serialized = MlflowException.serialize_as_json

    def in_one_line(self: Any) -> Any:
        if trace := self.json_kwargs.pop("stack_trace", ""):
            warn(f"a request failed: {trace}")
        text = str(self.message).rpartition("\nError: ")[2]
        self.message = " ".join(text.split())[:1_000]
        return serialized(self)

    setattr(MlflowException, _PLAIN, True)
    MlflowException.serialize_as_json = in_one_line


_PLAIN = "_graftrec_one_line"


def _label(folder: Path) -> str:
    """Registered name and version, which MLflow writes beside a model that it fetches by models:/<name>."""
    for parent in folder.parents:
        file = parent / "registered_model_meta"
        if file.is_file():
            with translated(f"{file}: can't read which version this is"):
                meta = yaml.safe_load(file.read_text(encoding="utf-8")[:10_000])
                name, number = meta["model_name"], int(meta["model_version"])
                if not isinstance(name, str) or not name or set(name) & set("/:@"):
                    raise ValueError("expected the name of a registered model, found another")
                return f"{name}/{number}"
        if (parent / "MLmodel").is_file():
            break
    return "unregistered"


def version_at(client: Any, name: str, alias: str) -> Any | None:
    """The version of a registered model at an alias; None where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def download(uri: str, target: str, store: str) -> str:
    """Fetch an artifact folder into `target`; returns where it is."""
    from mlflow.artifacts import download_artifacts

    return str(download_artifacts(artifact_uri=uri, dst_path=target, tracking_uri=store, registry_uri=store))
