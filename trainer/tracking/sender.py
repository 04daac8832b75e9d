"""Sends queued entries to MLflow."""

import contextlib
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import psutil

from etl.redaction import one_line
from trainer.config import TrackingConfig
from trainer.tracking.connection import DESCRIPTION, ERROR, FINAL, TAG_CHARACTERS, connect, experiment_id, translated
from trainer.tracking.datasets import dataset_input
from trainer.tracking.locks import file_lock
from trainer.tracking.models import MODEL_HASH, log_model_metrics, model_name, models_of, resolved
from trainer.tracking.provenance import cut
from trainer.tracking.queue import Entry, Refused
from trainer.tracking.spool import fingerprint, kept

PARAMS_PER_BATCH = 100


def process(process: psutil.Process) -> str:
    return f"{process.pid}@{process.create_time():.0f}"


class Sender:
    """Sends entries of one run; makes or joins the run first."""

    def __init__(self, uri: str, config: TrackingConfig, header: Entry, run_id: str = "") -> None:
        self._uri, self._config, self._header = uri, config, header
        self._client: Any = None
        self.run_id = run_id
        self.made = threading.Event()
        self._known_params: set[str] = set()
        self._models: list[str] = []  # ids of logged models that this run made

    def send(self, entry: Entry) -> None:
        """Send one entry. Raises Refused where the server says that it never will be taken."""
        from mlflow.exceptions import MlflowException

        try:
            if not self.made.is_set():
                self._open()
            self._send(entry)
        except MlflowException as error:
            if error.error_code in FINAL:
                raise Refused(one_line(error)) from None
            raise
        except (TypeError, AttributeError, LookupError) as error:  # a mistake of ours, which waiting does not mend
            raise Refused(repr(error)) from None

    def _open(self) -> None:
        if self._client is None:
            self._client = connect(self._uri)
        header = self._header
        self._send_kept(own=True)
        old = header["joined"] or self._still_there(header.get("resumed", ""))
        if not old:
            experiment = experiment_id(self._client, self._config)
            # One that was made although the answer got lost, or by a process that was killed, is found by its uid.
            made = self._client.search_runs([experiment], f"tags.`graftrec.uid` = '{header['uid']}'", max_results=1)
            old = made[0].info.run_id if made else ""
        if old:
            joined = self._client.get_run(old)
            self.run_id, self._known_params = joined.info.run_id, set(joined.data.params)
            experiment = joined.info.experiment_id
            own = {k: v for k, v in header["tags"].items() if not k.startswith("mlflow.") or k == "mlflow.parentRunId"}
            self._send({"kind": "tags", "values": own})
            if ERROR in joined.data.tags:  # of an earlier process
                self._client.delete_tag(self.run_id, ERROR)
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            run = self._client.create_run(
                experiment, start_time=header["start"], tags=header["tags"], run_name=header["name"]
            )
            self.run_id = run.info.run_id
        self.made.set()
        self._send_kept(own=False)
        end_abandoned(self._client, experiment)

    def settle(self) -> None:
        """Do what the next run would do for earlier ones."""
        self._client = self._client or connect(self._uri)
        self._send_kept(own=False)
        end_abandoned(self._client, experiment_id(self._client, self._config))

    def _still_there(self, run_id: str) -> str:
        """The id of an earlier run; "" where there was none, or the store has lost it."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return ""
        try:
            return run_id if self._client.get_run(run_id).info.lifecycle_stage == "active" else ""
        except MlflowException as error:
            if error.error_code in FINAL:
                return ""
            raise

    def _send(self, entry: Entry) -> None:
        from mlflow.entities import Metric, Param, RunTag

        values: Any = entry.get("values")
        if entry["kind"] == "artifact" and not Path(entry["path"]).exists():
            raise Refused(f"{entry['path']} is not there")
        match entry["kind"]:
            case "metrics":
                self._client.log_batch(self.run_id, metrics=[Metric(*value) for value in values])
            case "missing":
                known = {name: self._client.get_metric_history(self.run_id, name) for name in {v[0] for v in values}}
                steps = {(name, metric.step) for name, metrics in known.items() for metric in metrics}
                if new := [Metric(*value) for value in values if (value[0], value[3]) not in steps]:
                    self._client.log_batch(self.run_id, metrics=new)
            case "params":
                # `mlflow run` has logged its own parameters to a joined run, and a parameter can't change.
                params = [Param(key, value) for key, value in values.items() if key not in self._known_params]
                self._client.log_batch(self.run_id, params=params)
            case "tags" if values:
                self._client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])
            case "artifact" if Path(entry["path"]).is_dir():
                self._client.log_artifacts(self.run_id, entry["path"], entry["folder"] or None)
            case "artifact":
                self._client.log_artifact(self.run_id, entry["path"], entry["folder"] or None)
            case "datasets":
                self._client.log_inputs(self.run_id, datasets=[dataset_input(v, entry["context"]) for v in values])
            case "description":
                text = cut(resolved(self._client, entry["text"], self.run_id), TAG_CHARACTERS)
                self._client.set_tag(self.run_id, DESCRIPTION, text)
                for model in self._models:
                    self._client.set_logged_model_tags(model, {DESCRIPTION: text})
            case "model":
                self._models.append(self._log_model(entry))
            case "model_metrics":
                log_model_metrics(self._client, entry["hash"], values, entry["dataset"])
            case "end":
                self._client.set_terminated(self.run_id, entry["status"], entry["time"])

    def _log_model(self, entry: Entry) -> str:
        """Make the logged model of this run, or find it where the answer got lost; gives its id."""
        from mlflow.entities import LoggedModelOutput

        made = next((m for m in models_of(self._client, entry["hash"]) if m.source_run_id == self.run_id), None)
        if made is None:
            made = self._client.create_logged_model(
                self._client.get_run(self.run_id).info.experiment_id,
                name=model_name(entry["name"]),
                source_run_id=self.run_id,
                tags={MODEL_HASH: entry["hash"]},
                params=entry["params"],
                model_type=entry["type"] or None,
            )
        self._client.log_outputs(self.run_id, [LoggedModelOutput(made.model_id, 0)])
        self._client.finalize_logged_model(made.model_id, "READY")
        return str(made.model_id)

    def _send_kept(self, *, own: bool) -> None:
        """Send what earlier processes could not: of this very run (`own`), before it is gone on with, or of others.
        Nothing here may stop this run's own entries."""
        for folder, header, entries in kept(Path(self._config.unsent).absolute()):
            if header.pop("uri") != fingerprint(self._uri) or own != (header["uid"] == self._header["uid"]):
                continue
            with contextlib.ExitStack() as held:
                try:
                    mine = held.enter_context(file_lock(folder / "lock", wait=False))
                except FileNotFoundError:  # sent since: by another process, or by the sender of a run before it
                    continue
                if not mine or not (folder / "unsent.json").exists():
                    continue
                sender = Sender(self._uri, self._config, header, header.pop("run_id"))
                if sender.run_id:
                    sender._client = self._client
                    sender.made.set()
                for entry in entries:
                    with contextlib.suppress(Refused):
                        sender.send(entry)
                shutil.rmtree(folder, ignore_errors=True)


def abandoned_runs(config: TrackingConfig) -> list[str]:
    """Names of the runs of this machine that say RUNNING though their process is gone. Raises TrackingError."""
    client = connect()
    with translated("can't list runs"):
        return [str(run.info.run_name) for run in _abandoned(client, experiment_id(client, config))]


def registered_models() -> list[str]:
    """Names of all registered models. Raises TrackingError."""
    client = connect()
    names: list[str] = []
    with translated("can't list registered models"):
        token = None
        while True:
            page = client.search_registered_models(page_token=token)
            names += [model.name for model in page]
            token = page.token
            if not token:
                return names


def end_abandoned(client: Any, experiment: str) -> int:
    """End, as KILLED, runs of this machine that say RUNNING though their process is gone. Returns how many."""
    stale = _abandoned(client, experiment)
    for run in stale:
        client.set_tag(run.info.run_id, ERROR, "the process ended without a word (killed?)")
        client.set_terminated(run.info.run_id, "KILLED")
    return len(stale)


def _abandoned(client: Any, experiment: str) -> list[Any]:
    host = socket.gethostname().replace("'", "")
    stale = client.search_runs(
        [experiment], f"attributes.status = 'RUNNING' AND tags.`graftrec.host` = '{host}'", max_results=100
    )
    found = []
    for run in stale:
        number, _, _started = run.data.tags.get("graftrec.process", "").partition("@")
        try:
            alive = process(psutil.Process(int(number))) == run.data.tags["graftrec.process"]
        except (psutil.Error, ValueError):
            alive = False
        if not alive:
            found.append(run)
    return found
