"""Commands that are given secrets through every door: none is in what they print, or in any file that they leave."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import pytest
import yaml

from tests.fixtures.places import ROOT

QUIET = ["--tracking.system_metrics", "false", "--tracking.close_seconds", "6"]


class Secrets:
    """Makes secrets, and finds them, or parts of them, in texts."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, door: str, characters: int, *, plain: bool = False) -> str:
        """`plain`: of characters that a URI takes as they are."""
        text = "".join(hashlib.sha256(f"{door}{n}".encode()).hexdigest() for n in range(5))
        secret = (text if plain else "z/" + base64.b64encode(text.encode()).decode() + "+=")[:characters]
        self.made.append(secret)
        return secret

    def shown_in(self, content: bytes) -> set[str]:
        pieces = {secret[start : start + 12] for secret in self.made for start in range(0, len(secret) - 11, 24)}
        return {piece for piece in pieces if piece.encode() in content}


def environment(secret: Secrets, characters: int) -> dict[str, str]:
    return {
        "AWS_SECRET_ACCESS_KEY": secret("aws", characters),
        "SERVICE_JWT": secret("jwt", characters, plain=True),
        "DB_PWD": secret("pwd", characters),
        "PROXY_AUTHORIZATION": f"Bearer {secret('auth', characters)}",
        "SENTRY_DSN": f"https://{secret('dsn', characters, plain=True)}@errors.example/1",
        "AZURE_STORAGE_SAS": f"sv=1&sig={secret('sas', characters, plain=True)}&se=2",
        "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=me;AccountKey={secret('connection', characters)}",
        "DATABASE_URL": f"postgresql://me:{secret('url', characters, plain=True)}@db/x",
    }


def settings(secret: Secrets, characters: int) -> dict[str, str]:
    return {
        "spark.hadoop.fs.azure.account.key.me.dfs.core.windows.net": secret("azure", characters),
        "spark.hadoop.fs.s3a.secret.key": secret("s3a", characters),
        "spark.hadoop.javax.jdo.option.ConnectionURL": f"jdbc:x://h?user=me&password={secret('jdbc', characters)}",
        "spark.hadoop.fs.azure.sas.box.me": secret("setting", characters),
    }


@pytest.fixture(params=[12, 300], ids=["short", "long"])
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Secrets, dict[str, str], Path]:
    """Secrets, an environment that holds some, and a folder with a configuration that holds others."""
    secret = Secrets()
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    given |= {"PYTHONPATH": str(ROOT), **environment(secret, request.param)}
    config = {
        "lake": "lake",
        "source": {"kind": "generator", "users": 60, "items": 40, "mean_events": 20},
        "domains": [{"name": "source", "any_of": ["source"]}, {"name": "target", "any_of": ["target"]}],
        "kcore": {"min_user": 2, "min_item": 2},
        "spark": {"engine": "sail", "settings": settings(secret, request.param)},
    }
    (tmp_path / "etl.yaml").write_text(yaml.safe_dump(config))
    given["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    given["MLFLOW_TRACKING_URI"] = f"http://me:{secret('mlflow', request.param, plain=True)}@127.0.0.1:9"
    return secret, given, tmp_path


def said(given: Mapping[str, str], folder: Path) -> Callable[..., bytes]:
    def run(*command: str, code: int, **other: str | None) -> bytes:
        changed = {name: value for name, value in {**given, **other}.items() if value is not None}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=changed, capture_output=True, timeout=300)
        assert done.returncode == code, done.stderr.decode()[-2000:]
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_no_secret_is_left_anywhere(planted: tuple[Secrets, dict[str, str], Path]) -> None:
    secret, given, folder = planted
    run = said(given, folder)
    characters = len(given["DB_PWD"])
    bad, sig = secret("lake", characters, plain=True), secret("sig", characters, plain=True)
    run_etl = ["-m", "graftrec", "run-etl", "all", "--config", "etl.yaml"]
    train = ["-m", "trainer", "pretrain", "--config", "pretrain/demo", "--data.lake", "lake", "--train.epochs", "1"]
    train += ["--evaluation.protocols", "[full]", "--name", "told", *QUIET]
    out = run(*run_etl, code=0, MLFLOW_TRACKING_URI=None)  # with a store of its own
    out += run(*run_etl, "--lake", f"s3://me:{bad}@box/lake", code=2, MLFLOW_TRACKING_URI=None)
    out += run("-m", "etl", "report", "--lake", f"az://box/lake?sig={sig}", code=2)
    dead = run(*train, code=0)
    assert b"MLflow does not answer" in dead
    promote = ["-m", "trainer", "promote", "--config", "promote/default", "--candidate", "runs/told/model"]
    refused = run(*promote, code=2)
    assert refused.count(b"\n") == 1
    out += dead + refused
    assert secret.shown_in(out) == set()
    assert (folder / "mlflow.db").is_file()
    assert list(folder.glob("mlflow-unsent/*/unsent.json"))
    (row,) = pl.read_delta(str(folder / "lake" / "releases")).to_dicts()
    assert json.loads(row["config"])["spark"]["settings"]["spark.hadoop.fs.s3a.secret.key"] == "***"
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "etl.yaml":
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content += str(pl.read_parquet(path, hive_partitioning=False).to_dicts()).encode()
            assert secret.shown_in(content) == set(), path


@pytest.mark.parametrize("characters", [256, 70_000])
def test_a_long_secret_in_the_environment_does_not_stop_a_tracked_command(tmp_path: Path, characters: int) -> None:
    token = "e" * characters
    script = (
        "from trainer.config import PretrainConfig, TrackingConfig; from trainer.tracking import start_run\n"
        "config = TrackingConfig(system_metrics=False, close_seconds=0)\n"
        "with start_run(config, name='x', resolved=PretrainConfig()) as run: run.set_tags({'a': 1})"
    )
    given = os.environ | {"PYTHONPATH": str(ROOT), "SERVICE_JWT": token, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    assert token not in said(given, tmp_path)("-c", script, code=0).decode()
