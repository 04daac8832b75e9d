"""The registry: versions, aliases, what may be deleted, and one promoter at a time."""

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException

from etl.settings import GraftrecError
from tests.fixtures.folders import write_model
from tests.fixtures.places import ROOT
from tests.fixtures.stores import enter_store, packed_as
from trainer import tracking
from trainer.config import PretrainConfig, TrackingConfig
from trainer.inference.model_folder import load_model, model_hash
from trainer.registry import CANDIDATE, CHAMPION, PREVIOUS, TAG_KIND, TAG_PARENT, Registry, audit_trail
from trainer.registry.promotion_lock import ServerLock
from trainer.tracking import TrackingError


@pytest.fixture
def store(tmp_path, monkeypatch):
    enter_store(tmp_path / "store", monkeypatch)
    return tmp_path / "store"


@pytest.fixture(scope="module")
def models(tiny_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"m{seed}", tiny_lake, seed=seed) for seed in range(3)]


def test_versions_are_numbered_and_a_model_is_registered_once(store, models):
    registry = Registry("shop")
    first = registry.register(models[0], tags={"graftrec.transfer": "none"})
    second = registry.register(models[1])
    again = registry.register(models[0], tags={"note": "seen before"}, alias=None)
    assert (first.label, second.label, again.label) == ("shop/1", "shop/2", "shop/1")
    assert first.hash == model_hash(models[0])
    assert first.tags["graftrec.transfer"] == "none"
    assert again.tags["note"] == "seen before"
    assert registry.find(CANDIDATE) == second
    assert [version.number for version in registry.versions()] == [2, 1]
    assert registry.find(CHAMPION) is None
    assert registry.version("@candidate") == registry.version("2") == second


def test_the_model_folder_comes_back_whole(store, models):
    registry = Registry()
    version = registry.register(models[0])
    folder = registry.folder(version)
    assert load_model(folder).hash == version.hash == model_hash(models[0])


def test_a_version_is_code_and_json_with_a_signature_over_raw_ids(store, models):
    registry = Registry()
    packed = packed_as(registry.register(models[0]))
    files = {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}
    environments = {"conda.yaml", "python_env.yaml", "requirements.txt"}
    archives = {"artifacts/model.zip", "artifacts/users.zip", "code/sources.zip"}
    assert files == {"MLmodel", "model_script.py"} | environments | archives
    assert len(files) <= 8
    inside = {archive: set(zipfile.ZipFile(packed / archive).namelist()) for archive in archives}
    assert inside["artifacts/users.zip"] == {"users.safetensors", "users.parquet"}  # personal data, apart
    assert {"weights.safetensors", "manifest.json"} <= inside["artifacts/model.zip"]
    assert {"trainer/inference/recommender.py", "etl/tables.py"} <= inside["code/sources.zip"]
    plain = {".py", ".json", ".parquet", ".safetensors", ".properties", ".html", ".j2"}
    assert {Path(name).suffix for names in inside.values() for name in names} <= plain
    described = yaml.safe_load((packed / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "mlflow.pyfunc.loaders.code_model"
    assert '"name": "items"' in described["signature"]["inputs"]
    assert '"string"' in described["signature"]["inputs"]


def test_a_version_of_before_archives_is_found_in_its_folder(store, models):
    version = Registry().register(models[0])
    artifacts = packed_as(version) / "artifacts"
    for name in ("model.zip", "users.zip"):
        zipfile.ZipFile(artifacts / name).extractall(artifacts / "model")
        (artifacts / name).unlink()
    folder = Registry().folder(version)
    assert folder == artifacts / "model"
    assert load_model(folder).hash == version.hash


def test_a_version_goes_on_without_its_users(store, models):
    version = Registry().register(models[0])
    (packed_as(version) / "artifacts" / "users.zip").unlink()
    trained_model = load_model(Registry().folder(version))
    assert (trained_model.hash, trained_model.users) == (version.hash, None)


@pytest.mark.parametrize("name", ["artifacts/model.zip", "artifacts/users.zip", "code/sources.zip"])
def test_a_damaged_archive_is_refused_by_name(name, store, models):
    version = Registry().register(models[0])
    path = packed_as(version) / name
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # of the first file in it
    path.write_bytes(bytes(content))
    if name != "code/sources.zip":
        with pytest.raises(GraftrecError, match="damaged"):
            load_model(Registry().folder(version))
        return
    with pytest.raises(MlflowException, match=r"sources\.zip is damaged: expected SHA-256 \w{64}, found \w{64}"):
        mlflow.pyfunc.load_model(str(packed_as(version)), suppress_warnings=True)


def test_a_version_is_of_the_logged_model_of_its_run_and_says_what_it_is(store, models):
    quiet = TrackingConfig(system_metrics=False, close_seconds=60)
    with tracking.start_run(quiet, name="trains", resolved=PretrainConfig()) as run:
        run.log_model("trains", model_hash(models[0]))
        trained = run.id
    shop, other = Registry("shop"), Registry("other")
    version, again = shop.register(models[0]), other.register(models[0])
    client = tracking.connect()
    first, second = (
        client.get_model_version(one.name, "1").source.removeprefix("models:/") for one in (version, again)
    )
    assert (version.run_id, again.run_id) == (trained, trained)
    assert client.get_logged_model(first).name == "trains"
    assert first != second  # files of a version stay as they are
    assert json.loads(client.get_logged_model(first).tags[tracking.VERSIONS]) == [{"name": "shop", "version": "1"}]
    assert version.description.startswith("bert4rec, transfer none, predicts target, NDCG@10 0.1000.\n")
    assert f"/models/{first})" in version.description
    assert "domain target" in client.get_registered_model("shop").description
    described = yaml.safe_load((packed_as(version) / "MLmodel").read_text())
    assert len(json.loads(described["metadata"]["graftrec.example"])["items"]) == 3
    assert not [tag for tag in version.tags if "metric" in tag]


def test_a_part_of_a_description_is_replaced_and_the_rest_stays(store, models):
    registry = Registry()
    number = registry.register(models[0]).number
    before = registry.version("1").description
    for text in ("Refused.", "Passed."):
        registry.describe(number, "### Gate", text)
    assert registry.version("1").description == f"{before}\n\n### Gate\n\nPassed."


def test_the_audit_trail_keeps_all_entries_whatever_a_tag_holds(store, models, monkeypatch):
    monkeypatch.setattr("trainer.registry.version.AUDIT_CHARACTERS", 100)
    registry = Registry()
    number = registry.register(models[0]).number
    entries = [{"action": "refused", "n": n, "text": "é" * n} for n in range(0, 120, 10)]
    for entry in entries:
        registry.audit(number, entry)
    version = registry.version("1")
    assert audit_trail(version) == entries
    assert len([tag for tag in version.tags if tag.startswith("graftrec.audit")]) > 2


def test_crowning_moves_the_old_champion_to_previous(store, models):
    registry = Registry()
    one, two = registry.register(models[0]), registry.register(models[1])
    with registry.promoting() as promotion:
        assert promotion.crown(one.number) is None
        assert promotion.crown(one.number) is None  # it is champion already
        assert promotion.crown(two.number) == one.number
    assert registry.version(CHAMPION).number == two.number
    assert registry.version(PREVIOUS).number == one.number
    with registry.promoting() as promotion:
        promotion.move(PREVIOUS, None)
    assert registry.find(PREVIOUS) is None


def test_a_version_with_an_alias_and_a_parent_of_patches_are_not_deleted(store, models):
    registry = Registry()
    parent = registry.register(models[0], alias=CHAMPION)
    with pytest.raises(TrackingError, match=r"graftrec/1 is @champion: move the alias"):
        registry.delete(parent.number)
    patch = registry.register(models[1], tags={TAG_KIND: "patch", TAG_PARENT: parent.hash}, alias=None)
    registry.drop_alias(CHAMPION)
    with pytest.raises(TrackingError, match=r"graftrec/1 is the parent of graftrec/2: delete those first"):
        registry.delete(parent.number)
    registry.delete(patch.number)
    registry.delete(parent.number)
    assert registry.versions() == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "a@b"])
def test_a_name_that_a_uri_could_not_hold_is_refused(store, name):
    with pytest.raises(TrackingError, match="a registered model's name"):
        Registry(name)


def test_an_unknown_version_is_named_with_those_there_are(store, models):
    registry = Registry()
    with pytest.raises(
        TrackingError, match="no version or alias 'champion' of the registered model graftrec, it has nothing"
    ):
        registry.version("champion")
    registry.register(models[0])
    with pytest.raises(TrackingError, match=r"'7' .* it has 1 @candidate"):
        registry.version("7")


def test_secrets_stay_out_of_a_versions_tags(store, models):
    version = Registry().register(models[0], tags={"lake": "s3://me:hidden-word@bucket/lake"})
    assert version.tags["lake"] == "s3://***@bucket/lake"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1", "sqlite:////dev/null/mlflow.db", "nonsense://host"])
def test_a_store_that_does_not_answer_is_one_line(tmp_path, monkeypatch, uri):
    enter_store(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as raised:
        Registry().versions()
    assert "\n" not in str(raised.value)
    assert uri in str(raised.value)


# --- one promoter at a time ---------------------------------------------


def test_a_second_promoter_waits_for_the_first(store, models, capfd):
    registry, order = Registry(), []

    def promote(name, begun):
        with Registry().promoting():
            begun.set()
            order.append(f"{name} in")
            time.sleep(0.5)
            order.append(f"{name} out")

    first_in = threading.Event()
    first = threading.Thread(target=promote, args=("first", first_in))
    first.start()
    first_in.wait()
    with (
        pytest.raises(TrackingError, match="another promoter of graftrec is still at work"),
        registry.promoting(wait_seconds=0),
    ):
        pass
    promote("second", threading.Event())
    first.join()
    assert order == ["first in", "first out", "second in", "second out"]
    assert "another promoter of graftrec is at work; waiting" in capfd.readouterr().err
    with Registry("other").promoting(wait_seconds=0):  # another model's promoters are not in the way
        pass


def test_a_killed_promoter_holds_no_lock(store):
    script = (
        "import time\nfrom trainer.registry import Registry\n"
        "with Registry().promoting():\n    open('held', 'w')\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", script], cwd=store, env=environment)
    deadline = time.monotonic() + 300
    while not (store / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(TrackingError), Registry().promoting(wait_seconds=0):
        pass
    holder.kill()
    holder.wait()
    with Registry().promoting(wait_seconds=5):
        pass


@pytest.fixture
def locks(store):
    client = Registry()._client
    return lambda: ServerLock(client, "graftrec")


def test_a_servers_lock_has_one_holder_until_it_is_released(locks):
    one, two = locks(), locks()
    assert one.acquire()
    assert not two.acquire()
    one.check()
    one.release()
    assert two.acquire()
    assert not one.acquire()
    with pytest.raises(TrackingError, match="another promoter took over"):
        one.check()


def test_a_servers_lock_runs_out(locks, monkeypatch):
    one, two = locks(), locks()
    assert one.acquire()
    monkeypatch.setattr("trainer.registry.promotion_lock.LEASE_SECONDS", -1.0)
    one.check()  # renewed, for less than no time
    monkeypatch.setattr("trainer.registry.promotion_lock.LEASE_SECONDS", 900.0)
    assert two.acquire()
    with pytest.raises(TrackingError, match="another promoter took over"):
        one.check()
    two.check()


def test_of_racing_promoters_a_servers_lock_lets_in_one_at_a_time(store, locks):
    inside, most, entries, guard = 0, 0, 0, threading.Lock()

    def promote():
        nonlocal inside, most, entries
        lock = ServerLock(Registry()._client, "graftrec")
        for _ in range(3):
            while not lock.acquire():
                time.sleep(0.01)
            with guard:
                inside += 1
                entries += 1
                most = max(most, inside)
            lock.check()
            time.sleep(0.01)
            with guard:
                inside -= 1
            lock.release()

    racers = [threading.Thread(target=promote) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(120)
    assert (most, entries) == (1, 9)
    left = Registry()._client.search_registered_models("name LIKE 'graftrec.promotion-lock.%'")
    assert len(left) <= 3


def test_a_promotion_checks_its_lock_before_it_writes(store, models, monkeypatch):
    registry = Registry()
    one, two = registry.register(models[0]), registry.register(models[1])
    registry.set_alias(CHAMPION, one.number)
    monkeypatch.setattr("trainer.registry.versions.tracking.local_folder", lambda uri: None)  # as if it were a server
    with registry.promoting() as slow:
        thief = ServerLock(registry._client, "graftrec")
        monkeypatch.setattr(ServerLock, "_is_free", lambda lock, number: True)  # the lease ran out
        assert thief.acquire()
        with pytest.raises(TrackingError, match="another promoter took over"):
            slow.crown(two.number)
    assert registry.version(CHAMPION).number == one.number


# --- two at once, and names that look alike ---------------------------------------------


def registering(folder, model, gate):
    """A process that registers a model as soon as the file `gate` is there."""
    script = (
        "import pathlib, sys, time; from trainer import tracking; from trainer.registry import Registry\n"
        "registry = Registry(); import mlflow.pyfunc; print('ready', flush=True)\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.001)\n"
        "print(registry.register(sys.argv[1]).label)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, model, str(gate)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_folder_that_two_processes_register_at_once_is_one_version(store, models):
    gate = store / "gate"
    both = [registering(store, models[0], gate) for _ in range(2)]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    gate.touch()
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["graftrec/1"] * 2
    assert [version.number for version in Registry().versions()] == [1]


def test_of_two_versions_that_a_server_took_at_once_the_first_stays(store, models, monkeypatch):
    monkeypatch.setattr("trainer.registry.versions.tracking.local_folder", lambda uri: None)  # as if it were a server
    registry, digest = Registry(), model_hash(models[0])
    first = registry.register(models[0])
    own, examples = registry._own, []

    def late(wanted):  # the first question is answered as it was before the other process had registered it
        examples.append(wanted)
        return None if len(examples) <= 2 else own(wanted)

    monkeypatch.setattr(registry, "_own", late)
    assert registry.register(models[0], tags={"note": "late"}).number == first.number
    assert len(examples) == 3
    (left,) = registry.versions()
    assert (left.number, left.hash, left.tags["note"]) == (first.number, digest, "late")
    assert model_hash(registry.folder(left)) == digest


@pytest.mark.parametrize(
    ("name", "other"), [("movie_rec", "movie-rec"), ("movie%", "movies"), ("a'b", "ab"), ("a'b", "a-b")]
)
def test_names_that_look_alike_are_not_confused(store, models, name, other):
    Registry(other).register(models[0])
    own = Registry(name)
    assert own.versions() == []
    assert own.register(models[1]).label == f"{name}/1"
    assert [version.hash for version in own.versions()] == [model_hash(models[1])]
    assert own.of_hash(model_hash(models[1])).name == name
    client = own._client
    foreign, lock = ServerLock(client, other), ServerLock(client, name)
    assert foreign.acquire()
    foreign.release()
    assert lock.acquire()
    assert ServerLock(client, other).acquire()
    lock.check()
    assert not ServerLock(client, name).acquire()


def test_a_lock_looks_at_all_pages(store, monkeypatch):
    client = Registry()._client
    for number in (1, 2, 3):
        client.create_registered_model(f"graftrec.promotion-lock.{number}")
    client.create_registered_model("graftrec.promotion-lock.notes")
    search = client.search_registered_models
    monkeypatch.setattr(
        client, "search_registered_models", lambda wanted, page_token: search(wanted, 1, page_token=page_token)
    )
    assert sorted(ServerLock(client, "graftrec")._numbers()) == [1, 2, 3]
