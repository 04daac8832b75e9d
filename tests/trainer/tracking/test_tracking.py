"""Runs in MLflow: what they hold, how they end, and that no server can stop training."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.fixtures.places import ROOT
from tests.fixtures.ports import free_port
from tests.fixtures.stores import enter_store, runs_of
from trainer import tracking
from trainer.config import PretrainConfig, TrackingConfig
from trainer.data.release import Release
from trainer.tracking import child_environment, queue, sender, spool, start_run
from trainer.tracking.queue import Refused, SendQueue

QUIET = TrackingConfig(system_metrics=False, close_seconds=60)


@pytest.fixture
def store(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    return tmp_path


def client_of(folder):
    return tracking.connect(f"sqlite:///{folder}/mlflow.db")


def in_process(script: str, folder: Path, **environment: str) -> subprocess.Popen:
    """A process of its own that has `config` and `start_run`."""
    head = (
        "import os, sys, time\nfrom trainer.config import PretrainConfig, TrackingConfig\n"
        "from trainer.tracking import start_run\nconfig = TrackingConfig(system_metrics=False, close_seconds=90)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- what a run holds ---------------------------------------------


def test_work_that_is_resumed_goes_on_in_its_run_where_the_store_still_has_it(store):
    with start_run(QUIET, name="work", resolved=PretrainConfig()) as first:
        first.log_metrics({"done": 1.0}, step=1)
        begun = first.id
    with start_run(QUIET, name="work", resolved=PretrainConfig(name="other"), resumed=begun) as second:
        second.log_metrics({"done": 2.0}, step=2)
        assert second.id == begun
    client = client_of(store)
    assert [metric.value for metric in client.get_metric_history(begun, "done")] == [1.0, 2.0]
    assert client.get_run(begun).info.status == "FINISHED"
    client.delete_run(begun)
    for gone in (begun, "0" * 32):
        with start_run(QUIET, name="anew", resolved=PretrainConfig(), resumed=gone) as third:
            assert third.id not in ("", begun, gone)


def test_run_holds_settings_snapshots_curves_and_pictures(store):
    resolved = PretrainConfig(name="held")
    release = Release("some/lake", 7, {"sequences": 0, "items": 3})
    config = TrackingConfig(system_metrics_seconds=0.05)
    with start_run(config, name="held", resolved=resolved, tags={"kind": "test"}) as run:
        run.log_release(release)
        for epoch in range(1, 4):
            run.log_metrics({"loss": 1 / epoch, "validation/NDCG@10": epoch / 10}, step=epoch)
        run.log_figure(Figure(), "pictures/empty.png")
        Figure(figsize=(20, 2)).savefig(store / "wide.png", dpi=100)
        run.log_thumbnail(store / "wide.png", "pictures/small.png")
        run.log_text("hello", "note.txt")
        (store / "folder").mkdir()
        (store / "folder" / "weights.bin").write_bytes(b"1")
        run.log_artifact(store / "folder", "kept")
        time.sleep(0.3)
        run_id = run.id
    client, found = client_of(store), runs_of(store)["held"]
    assert found.info.run_id == run_id
    assert found.info.status == "FINISHED"
    params, tags = found.data.params, found.data.tags
    assert params["train.learning_rate"] == "0.001"
    assert params["task.loss.kind"] == "full"
    assert params["model.knowledge.actor"] == "3"
    assert (params["pinned.release"], params["pinned.sequences"]) == ("7", "0")
    assert (tags["graftrec.release"], params["pinned.items"], tags["kind"]) == ("7", "3", "test")
    assert len(tags["graftrec.code.sources"]) == 16
    losses = client.get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in sorted(losses, key=lambda m: m.step)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found.data.metrics["validation/NDCG_10"] == 0.3
    assert "system/cpu_utilization_percentage" in found.data.metrics
    sources = {i.dataset.name: i.dataset.source for i in found.inputs.dataset_inputs}
    assert '"delta_table_version": 0' in sources["sequences@0"]  # MLflow's own source drops version 0
    assert '"some/lake/items"' in sources["items@3"]
    names = {f.path for f in client.list_artifacts(run_id)}
    assert names == {"config.yaml", "pictures", "note.txt", "kept"}
    written = Path(found.info.artifact_uri.removeprefix("file://"))
    assert (written / "kept" / "weights.bin").read_bytes() == b"1"
    with Image.open(written / "pictures" / "small.png") as small:
        assert small.size == (tracking.THUMBNAIL_PIXELS, tracking.THUMBNAIL_PIXELS // 10)
    assert (written / "pictures" / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_a_value_without_a_step_never_joins_a_curve(store, capfd):
    with start_run(QUIET, name="curve", resolved=PretrainConfig()) as run:
        for epoch in (1, 2):
            run.log_metrics({"validation/NDCG@10": epoch / 10}, step=epoch)
        run.log_metrics({"validation/NDCG@10": 0.2, "best/NDCG@10": 0.2})
        run_id = run.id
    client = client_of(store)
    assert sorted(m.step for m in client.get_metric_history(run_id, "validation/NDCG_10")) == [1, 2]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "best/NDCG_10")] == [(0, 0.2)]
    assert "dropped validation/NDCG_10: a value without a step" in capfd.readouterr().err


def test_experiments_are_of_model_training_also_where_others_made_them(store):
    client = client_of(store)
    client.create_experiment("graftrec", artifact_location=(store / "mlartifacts").as_uri())
    for name in ("graftrec", "made"):
        config = TrackingConfig(experiment=name, system_metrics=False)
        with start_run(config, name="one", resolved=PretrainConfig()):
            pass
        found = client.get_experiment_by_name(name)
        assert found.tags["mlflow.experimentKind"] == "custom_model_development"
        assert (tracking.DESCRIPTION in found.tags) == (name == "made")  # what others wrote stays


def test_a_description_links_models_pictures_and_the_runs_that_were_reused(store):
    with start_run(QUIET, name="parent", resolved=PretrainConfig()) as parent:
        parent.describe("Pre-trains.")
        parent.log_model("some/name.1", "a" * 32, kind="bert4rec", params={"seed": 3})
    with start_run(QUIET, name="child", resolved=PretrainConfig()) as run:
        tracking.note_reused("pretrain-0", parent.id)
        links = f"{tracking.model_link('parent', 'a' * 32)}, {tracking.model_link('nobody', 'b' * 32)}"
        run.describe(f"Of {links}.\n\n![gains](artifact:pictures/my gains.png)")
        run_id = run.id
    found = runs_of(store)
    (model,) = tracking.models_of(client_of(store), "a" * 32)
    assert (model.name, model.source_run_id, model.status.name) == ("some_name_1", parent.id, "READY")
    assert (model.params, model.model_type) == ({"seed": "3"}, "bert4rec")
    assert model.tags[tracking.DESCRIPTION] == found["parent"].data.tags[tracking.DESCRIPTION] == "Pre-trains."
    assert [output.model_id for output in found["parent"].outputs.model_outputs] == [model.model_id]
    assert found["child"].data.tags[tracking.DESCRIPTION] == (
        f"Of [parent](#/experiments/{model.experiment_id}/models/{model.model_id}), nobody.\n\n"
        f"Reused, since nothing they depend on has changed: [pretrain-0](#/runs/{parent.id}).\n\n"
        f"![gains](get-artifact?path=pictures/my%20gains.png&run_uuid={run_id})"
    )
    assert found["child"].data.tags["graftrec.reused"] == f'{{"pretrain-0": "{parent.id}"}}'


def test_metrics_of_a_model_are_of_a_snapshot_and_logged_once(store):
    release = Release("lake", 4, {"sequences": 0, "items": 2})
    with start_run(QUIET, name="trained", resolved=PretrainConfig()) as run:
        run.log_release(release, tables=["sequences"])
        run.log_model("trained", "c" * 32)
        run.log_model_metrics("c" * 32, {"best/NDCG@10": 0.25, "best/loss": float("nan")}, release, "sequences")
        trained = run.id
    for _ in range(2):
        with start_run(QUIET, name="evaluated", resolved=PretrainConfig()) as run:
            run.log_model_metrics("c" * 32, {"test/full/NDCG@10": 0.5}, release, "sequences")
            run.log_model_metrics("d" * 32, {"test/full/NDCG@10": 0.5}, release, "sequences")
    (model,) = tracking.models_of(client_of(store), "c" * 32)
    dataset = runs_of(store)["trained"].inputs.dataset_inputs[0].dataset
    assert [i.dataset.name for i in runs_of(store)["trained"].inputs.dataset_inputs] == ["sequences@0"]
    assert '"name": "user"' in dataset.schema
    assert sorted((m.key, m.value, m.dataset_name, m.dataset_digest, m.run_id) for m in model.metrics) == [
        ("best/NDCG_10", 0.25, "sequences@0", dataset.digest, trained),
        ("test/full/NDCG_10", 0.5, "sequences@0", dataset.digest, trained),
    ]
    metrics = runs_of(store)["trained"].data.metrics  # so that runs can be sorted by them
    assert (metrics["best/NDCG_10"], metrics["test/full/NDCG_10"]) == (0.25, 0.5)


def test_logged_configuration_composes_again(store):
    from etl.settings import load

    resolved = PretrainConfig(name="again", model={"width": 8, "knowledge": {}}, task={"kind": "next_item"})
    with start_run(QUIET, name="again", resolved=resolved):
        pass
    file = runs_of(store)["again"].info.artifact_uri.removeprefix("file://") + "/config.yaml"
    assert load(PretrainConfig, file) == resolved


def test_a_long_value_is_cut_among_parameters_and_whole_in_the_file(store):
    path = "x" * 2_000
    with start_run(QUIET, name="long", resolved=PretrainConfig(output=path)):
        pass
    found = runs_of(store)["long"]
    assert len(found.data.params["output"]) == 500
    assert path in Path(found.info.artifact_uri.removeprefix("file://"), "config.yaml").read_text()


def test_secrets_stay_out(store, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tell-nobody-0123")
    resolved = PretrainConfig(output="s3://me:hidden-word@bucket/runs", name="secretive")
    monkeypatch.setattr(sys, "argv", ["trainer", "--token=tell-nobody-0123"])
    release = Release("s3://me:hidden-word@bucket/lake", 1, {"items": 1})

    def fail():
        with start_run(QUIET, name="secretive", resolved=resolved) as run:
            run.log_release(release)
            run.set_tags({"where": "http://me:hidden-word@host/"})
            run.log_params({"key": "tell-nobody-0123"})
            run.log_text("tell-nobody-0123", "log.txt")
            raise ValueError("401 from http://me:hidden-word@host/?key=tell-nobody-0123")

    with pytest.raises(ValueError, match="401"):
        fail()
    found = runs_of(store)["secretive"]
    assert found.data.tags["where"] == "http://***@host/"
    assert found.data.tags["graftrec.error"] == "401 from http://***@host/?key=***"
    kept = [path.read_bytes() for path in store.rglob("*") if path.is_file()]
    assert not any(b"hidden-word" in content or b"tell-nobody" in content for content in kept)


# --- how a run ends ---------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no such item"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(3), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
    ids=repr,
)
def test_an_exception_ends_the_run(store, error, status):
    with pytest.raises(type(error)), start_run(QUIET, name="ends", resolved=PretrainConfig()):
        raise error
    found = runs_of(store)["ends"]
    assert found.info.status == status
    if status == "FAILED":
        assert found.data.tags["graftrec.error"] == str(error)


def test_sigterm_ends_the_run_as_killed_and_says_nothing(store):
    script = (
        "with start_run(config, name='terminated', resolved=PretrainConfig()) as run:\n"
        "    run.log_metrics({'loss': 1.0})\n    run.id\n    open('started', 'w')\n    time.sleep(60)\n"
    )
    process = in_process(script, store)
    wait_for((store / "started").exists)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert (said, errors) == ("", "")
    found = runs_of(store)["terminated"]
    assert (found.info.status, found.data.metrics["loss"]) == ("KILLED", 1.0)


def test_a_run_whose_process_was_killed_is_ended_by_the_next(store):
    script = (
        "with start_run(config, name='gone', resolved=PretrainConfig()) as run:\n"
        "    run.id\n    open('started', 'w')\n    time.sleep(60)\n"
    )
    process = in_process(script, store)
    wait_for((store / "started").exists)
    process.kill()
    process.communicate()
    assert runs_of(store)["gone"].info.status == "RUNNING"
    with start_run(QUIET, name="next", resolved=PretrainConfig()):
        pass
    assert {name: run.info.status for name, run in runs_of(store).items()} == {"gone": "KILLED", "next": "FINISHED"}


def test_what_finds_its_work_done_imports_mlflow_only_to_end_a_run_that_was_killed(store):
    with start_run(QUIET, name="before", resolved=PretrainConfig()):
        pass
    settles = "from trainer import tracking\ntracking.settle(config)\nprint('mlflow' in sys.modules)\n"
    assert in_process(settles, store).communicate(timeout=60) == ("False\n", "")
    running = "with start_run(config, name='gone', resolved=PretrainConfig()) as run:\n    run.id\n    os._exit(1)\n"
    in_process(running, store).communicate(timeout=60)
    assert runs_of(store)["gone"].info.status == "RUNNING"
    assert in_process(settles, store).communicate(timeout=60) == ("True\n", "")
    assert runs_of(store)["gone"].info.status == "KILLED"


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- parents, joined runs, ranks ---------------------------------------------


def test_a_run_inside_a_run_is_its_child(store):
    with start_run(QUIET, name="parent", resolved=PretrainConfig()) as parent:
        with start_run(QUIET, name="child", resolved=PretrainConfig()):
            pass
        environment = child_environment(parent)
    found = runs_of(store)
    assert found["child"].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
    assert environment[tracking.PARENT_VARIABLE] == found["parent"].info.run_id


def test_a_process_with_the_childs_environment_makes_a_child(store, monkeypatch):
    with start_run(QUIET, name="parent", resolved=PretrainConfig()) as parent:
        environment = child_environment(parent)
    monkeypatch.setenv(tracking.PARENT_VARIABLE, environment[tracking.PARENT_VARIABLE])
    with start_run(QUIET, name="child", resolved=PretrainConfig()):
        pass
    found = runs_of(store)
    assert found["child"].data.tags["mlflow.parentRunId"] == found["parent"].info.run_id


def test_the_run_of_an_mlflow_project_is_joined_once(store, monkeypatch):
    client = client_of(store)
    experiment = client.create_experiment("projects", artifact_location=(store / "mlartifacts").as_uri())
    made = client.create_run(experiment, run_name="project")
    client.log_param(made.info.run_id, "train.seed", "seven")  # as `mlflow run -P train.seed=seven` does
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with start_run(QUIET, name="ours", resolved=PretrainConfig()) as run:
        assert run.id == made.info.run_id
        with start_run(QUIET, name="inner", resolved=PretrainConfig()) as inner:
            assert inner.id != made.info.run_id
    joined = client.get_run(made.info.run_id)
    assert joined.info.status == "FINISHED"
    assert joined.info.run_name == "project"
    assert joined.data.params["train.seed"] == "seven"
    assert joined.data.params["train.batch_size"] == "128"
    assert set(runs_of(store, "projects")) == {"project", "inner"}


@pytest.mark.parametrize("case", ["rank", "disabled"])
def test_other_ranks_and_disabled_tracking_touch_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    if case == "rank":
        monkeypatch.setenv("RANK", "1")
    with start_run(TrackingConfig(enabled=case == "rank"), name="none", resolved=PretrainConfig()) as run:
        run.log_params({"a": 1})
        run.log_metrics({"a": 1.0}, step=1)
        run.set_tags({"a": "b"})
        run.log_figure(Figure(), "a.png")
        run.log_text("a", "a.txt")
        run.log_artifact("missing")
        run.log_release(Release("lake", 1, {}))
        run.describe("a")
        run.note_reused("a", "b")
        run.log_model("a", "b")
        run.log_model_metrics("b", {"a": 1.0}, Release("lake", 1, {}), "items")
        assert run.id == ""
    assert list(tmp_path.iterdir()) == []


# --- the outbox ---------------------------------------------


def test_outbox_keeps_order_and_batches_metrics():
    sent = []
    box = SendQueue(sent.append, interval_seconds=0.2)
    box.add({"kind": "tags", "values": {"a": "b"}})
    for step in range(2_500):
        box.add({"kind": "metrics", "values": [["loss", 1.0, 0, step]]})
    box.add({"kind": "end"})
    assert box.close(5) == []
    assert [entry["kind"] for entry in sent][:: len(sent) - 1] == ["tags", "end"]
    batches = [entry["values"] for entry in sent if entry["kind"] == "metrics"]
    assert max(map(len, batches)) <= queue.METRICS_PER_BATCH
    assert len(batches) <= 5
    assert [value[3] for batch in batches for value in batch] == list(range(2_500))


def test_outbox_tries_again_until_the_server_answers_and_says_so_once(capfd):
    sent, failures = [], iter([True, True, True, False])

    def send(entry):
        if next(failures, False):
            raise ConnectionError("connection\nrefused")
        sent.append(entry["n"])

    box = SendQueue(send, interval_seconds=0.01)
    for n in range(5):
        box.add({"kind": "tags", "n": n})
    assert box.close(20) == []
    assert sent == [0, 1, 2, 3, 4]
    said = capfd.readouterr().err
    assert said.count("does not answer") == 1
    assert "connection refused" in said


def test_outbox_drops_what_is_refused(capfd):
    sent = []

    def send(entry):
        if entry["n"] == 1:
            raise Refused("changed a parameter")
        sent.append(entry["n"])

    box = SendQueue(send, interval_seconds=0.01)
    for n in range(3):
        box.add({"kind": "params", "n": n})
    assert box.close(5) == []
    assert sent == [0, 2]
    assert "refused to take params: changed a parameter" in capfd.readouterr().err


def test_outbox_gives_up_on_a_dead_server_and_returns_what_is_left():
    def send(entry):
        raise ConnectionError

    box = SendQueue(send, interval_seconds=0.01)
    box.add({"kind": "tags", "n": 0})
    begun = time.monotonic()
    assert [entry["n"] for entry in box.close(0.5)] == [0]
    assert time.monotonic() - begun < 5


# --- a store that does not answer ---------------------------------------------


def test_training_goes_on_without_a_server_and_the_next_run_sends_the_rest(store, monkeypatch, capfd):
    broken = store / "elsewhere"
    broken.write_text("a file where the store's folder should be")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{broken}/mlflow.db")
    impatient = TrackingConfig(system_metrics=False, close_seconds=1)
    begun = time.monotonic()
    with start_run(impatient, name="lonely", resolved=PretrainConfig()) as run:
        run.log_release(Release("lake", 1, {"items": 0}))
        for step in range(100):
            run.log_metrics({"loss": 1 / (1 + step)}, step=step)
        run.log_text("kept", "note.txt")
    assert time.monotonic() - begun < 20
    said = capfd.readouterr().err
    assert said.count("does not answer") == 1
    assert str(store / "mlflow-unsent") in said

    broken.unlink()
    broken.mkdir()
    (store / "mlflow.db").rename(broken / "mlflow.db")
    with start_run(QUIET, name="next", resolved=PretrainConfig()):
        pass
    found = runs_of(broken)
    assert {name: run.info.status for name, run in found.items()} == {"lonely": "FINISHED", "next": "FINISHED"}
    history = client_of(broken).get_metric_history(found["lonely"].info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, 1 / (1 + step)) for step in range(100)]
    assert found["lonely"].data.params["pinned.items"] == "0"
    written = Path(found["lonely"].info.artifact_uri.removeprefix("file://")) / "note.txt"
    assert written.read_text() == "kept"
    assert found["lonely"].info.start_time < found["next"].info.start_time
    assert not list((store / "mlflow-unsent").iterdir())


def test_runs_that_a_server_did_not_take_are_sent_together(store, monkeypatch, capfd):
    broken = store / "elsewhere"
    broken.write_text("a file where the store's folder should be")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{broken}/mlflow.db")
    impatient = TrackingConfig(system_metrics=False, close_seconds=1)
    for name in ("first", "second", "third"):
        with start_run(impatient, name=name, resolved=PretrainConfig()):
            pass
    assert len(list((store / "mlflow-unsent").iterdir())) == 3
    broken.unlink()
    broken.mkdir()
    (store / "mlflow.db").rename(broken / "mlflow.db")
    capfd.readouterr()
    with start_run(QUIET, name="next", resolved=PretrainConfig()):
        pass
    assert {run.info.status for run in runs_of(broken).values()} == {"FINISHED"}
    assert runs_of(broken).keys() == {"first", "second", "third", "next"}
    assert not list((store / "mlflow-unsent").iterdir())
    assert "tracking:" not in capfd.readouterr().err


@pytest.mark.parametrize("server", ["dead", "silent"])
def test_system_metrics_outlive_a_server_that_does_not_answer_and_delay_no_end(store, monkeypatch, server):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "silent":
            listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        impatient = TrackingConfig(system_metrics_seconds=0.05, close_seconds=0.5)
        with start_run(impatient, name="lonely", resolved=PretrainConfig()) as run:
            wait_for(lambda: "system/disk_usage_percentage" in str(run._queue._entries))
            begun = time.monotonic()
        assert time.monotonic() - begun < 10
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (kept,) = (store / "mlflow-unsent").glob("*/unsent.json")
    here = spool.fingerprint(tracking.tracking_uri())  # as if the server had answered from here
    kept.write_text(kept.read_text().replace(spool.fingerprint(address), here))
    with start_run(QUIET, name="next", resolved=PretrainConfig()):
        pass
    found = runs_of(store)["lonely"]
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= found.data.metrics.keys()
    history = client_of(store).get_metric_history(found.info.run_id, "system/disk_usage_percentage")
    assert sorted(metric.step for metric in history) == list(range(len(history)))


def test_gpus_are_among_the_system_metrics(store):
    """By MLflow's monitor of NVIDIA's GPUs, here of one that is made up."""
    (store / "pynvml.py").write_text(
        "from types import SimpleNamespace as Of\n"
        "class NVMLError(Exception): pass\n"
        "def nvmlInit(): pass\n"
        "def nvmlDeviceGetCount(): return 1\n"
        "def nvmlDeviceGetHandleByIndex(number): return number\n"
        "def nvmlDeviceGetMemoryInfo(gpu): return Of(used=3e9, total=4e9)\n"
        "def nvmlDeviceGetUtilizationRates(gpu): return Of(gpu=42)\n"
        "def nvmlDeviceGetPowerUsage(gpu): return 100_000\n"
        "def nvmlDeviceGetEnforcedPowerLimit(gpu): return 200_000\n"
    )
    script = (
        "config = TrackingConfig(system_metrics_seconds=0.05, close_seconds=90)\n"
        "with start_run(config, name='trains', resolved=PretrainConfig()) as run:\n"
        "    log, seen = run.log_metrics, set()\n"
        "    run.log_metrics = lambda values, step: (seen.update(values), log(values, step=step))\n"
        "    while 'system/gpu_0_utilization_percentage' not in seen: time.sleep(0.05)\n"
    )
    path = os.pathsep.join([str(store), str(ROOT)])
    assert in_process(script, store, PYTHONPATH=path).wait(120) == 0
    metrics = runs_of(store)["trains"].data.metrics
    assert metrics["system/gpu_0_utilization_percentage"] == 42
    assert metrics["system/gpu_0_memory_usage_percentage"] == 75


def test_answers_that_get_lost_duplicate_nothing(store, monkeypatch):
    original, lost = sender.Sender._send, set()

    def send(sender, entry):
        original(sender, entry)
        if entry["kind"] not in lost:
            lost.add(entry["kind"])
            raise ConnectionError("the answer got lost")

    monkeypatch.setattr(sender.Sender, "_send", send)
    with start_run(QUIET, name="lossy", resolved=PretrainConfig()) as run:
        run.log_release(Release("lake", 1, {"items": 2}))
        for step in range(20):
            run.log_metrics({"loss": float(step)}, step=step)
        run.set_tags({"a": "b"})
        run.log_text("once", "note.txt")
        run.describe("Once.")
        run.log_model("once", "e" * 32)
        run.log_model_metrics("e" * 32, {"best/NDCG@10": 0.5}, Release("lake", 1, {"items": 2}), "items")
    assert lost >= {"metrics", "params", "tags", "artifact", "datasets", "description", "model", "model_metrics", "end"}
    (model,) = tracking.models_of(client_of(store), "e" * 32)
    assert len(model.metrics) == len(found_outputs(store)) == 1
    found = runs_of(store)
    assert list(found) == ["lossy"]
    assert found["lossy"].info.status == "FINISHED"
    assert len(client_of(store).get_metric_history(found["lossy"].info.run_id, "loss")) == 20
    assert len(found["lossy"].inputs.dataset_inputs) == 1


def found_outputs(folder):
    return runs_of(folder)["lossy"].outputs.model_outputs


def test_a_full_disk_stops_no_training(store, monkeypatch, capfd):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sender.Sender, "_send", full)
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(spool.shutil, "copytree", full)
    monkeypatch.setattr(spool.Path, "replace", full)
    impatient = TrackingConfig(system_metrics=False, close_seconds=0.3)
    with start_run(impatient, name="full", resolved=PretrainConfig()) as run:
        run.log_metrics({"loss": 1.0})
        run.log_figure(Figure(), "a.png")
    said = capfd.readouterr().err
    assert "can't log a.png: [Errno 28] No space left on device" in said
    assert "can't keep what MLflow did not take" in said


def test_a_file_that_is_gone_holds_nothing_up(store, capfd):
    begun = time.monotonic()
    with start_run(TrackingConfig(system_metrics=False), name="gone", resolved=PretrainConfig()) as run:
        run.log_artifact("never-there")
        run.log_metrics({"loss": 1.0})
    assert time.monotonic() - begun < 20
    assert "never-there is not there" in capfd.readouterr().err
    assert runs_of(store)["gone"].data.metrics == {"loss": 1.0}


@pytest.mark.slow
def test_processes_that_make_a_store_at_once_all_get_in(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    (tmp_path / "mlflow.db").unlink()
    script = (
        "with start_run(config, name=sys.argv[0] + os.environ['ME'], resolved=PretrainConfig()) as run:\n    run.id\n"
    )
    processes = [in_process(script, tmp_path, ME=str(n)) for n in range(4)]
    ended = [(process.communicate(timeout=200), process.returncode) for process in processes]
    assert ended == [(("", ""), 0)] * 4
    assert [run.info.status for run in runs_of(tmp_path).values()] == ["FINISHED"] * 4


@pytest.mark.slow
def test_a_server_killed_and_started_again_gets_everything_once(tmp_path, monkeypatch):
    enter_store(tmp_path, monkeypatch)
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")

    def serve():
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # mlflow looks for uvicorn there
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": path},
        )
        wait_for(lambda: _answers(port), 120)
        return process

    server = serve()
    try:
        with start_run(QUIET, name="through", resolved=PretrainConfig()) as run:
            assert run.id
            for step in range(300):
                run.log_metrics({"loss": float(step)}, step=step)
                if step == 100:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()
                if step == 200:
                    server = serve()
                time.sleep(0.01)
            run_id = run.id
        history = tracking.connect().get_metric_history(run_id, "loss")
        assert sorted(m.step for m in history) == list(range(300))
        assert tracking.connect().get_run(run_id).info.status == "FINISHED"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port):
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False
