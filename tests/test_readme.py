"""The README files: links exist, tables agree with the code, and commands work."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest

from etl.config import EtlConfig
from etl.settings import load
from tests.fixtures.places import ROOT
from trainer.config import FinetuneConfig
from trainer.recipes.pipeline_plan import PipelineConfig

FOLDERS = ("etl", "graftrec", "infra", "mlflow_projects", "tests", "trainer")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])

# Commands that take longer than ten minutes -> the settings that their page gives for a short run.
SHORT = {
    "python -m trainer pretrain --config pretrain/peterrec_ml1m": "--data.lake lake --train.epochs 1",
    "python -m trainer finetune --config finetune/peterrec_ml1m": "--data.lake lake --train.epochs 1",
    "python -m trainer finetune --config finetune/profile_ml1m": (
        "--data.lake lake --train.epochs 1 --task.attribute community --task.validation 0.3"
    ),
}
NEEDS_DATA = "needs MovieLens-1M"
NOT_RUN = {
    "make test": "runs this test",
    "make table2 ": NEEDS_DATA,
    "make both ": NEEDS_DATA,
    "make both-w128 ": NEEDS_DATA,
    "make leave-one-out ": NEEDS_DATA,
    "make models ": NEEDS_DATA,
    "mlflow run mlflow_projects --env-manager local -P config=pipeline/ml1m": NEEDS_DATA,
    "mlflow run mlflow_projects --env-manager local -e experiment -P experiment=table2": NEEDS_DATA,
    "python -m etl all --config etl/ml1m": NEEDS_DATA,
    "python -m trainer friends --config friends/lastfm": "needs Last.fm",
    "make protocols": "trains for minutes; tests/pipeline/test_protocols.py runs the command",
    "graftrec protocols": NEEDS_DATA,
    "make features": "trains for minutes; tests/pipeline/test_arms.py runs the command",
    "graftrec arms": "the same",
    "graftrec pipeline --config pipeline/demo": "is make demo",
    "make bench": "measures for minutes to hours; one benchmark of the page is run",
}


def commands(page: Path) -> list[str]:
    """Lines of the page's ``sh`` blocks, comments cut off, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.split(r"\s+# ", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_readme_begins_with_the_two_commands() -> None:
    assert commands(ROOT / "README.md")[:2] == ["make demo", "make test"]


def test_pages_are_short() -> None:
    lines = {
        page: len((ROOT / page).read_text(encoding="utf-8").splitlines()) for page in ("README.md", "trainer/README.md")
    }
    assert lines["README.md"] <= 150
    assert lines["trainer/README.md"] <= 100


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_and_configurations_exist(page: Path) -> None:
    for command in commands(page):
        if command.startswith("make "):
            arguments = ["make", "--dry-run", *command.split()[1:]]
            done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        for name in re.findall(r"(?:--config |config=)(\w+/\w+)", command):
            assert (ROOT / "conf" / f"{name}.yaml").is_file(), command


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:etl|trainer|graftrec|tests|conf|mlflow_projects)/[\w./-]+)`", text))
    assert {
        name for name in named if not (ROOT / name).exists() and not (ROOT / "conf" / f"{name}.yaml").exists()
    } == set()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize("folder", ["models", "tasks"])
def test_each_model_and_task_names_its_paper(folder: str) -> None:
    papers = (ROOT / "trainer" / "PAPERS.md").read_text(encoding="utf-8")
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer" / folder).glob("[!_]*.py")}
    files.discard(f"trainer/{folder}/base.py")
    assert {file for file in files if f"`{file}`" not in papers} == set()


def rows_of_models() -> Iterator[tuple[str, str, str]]:
    """Model, task and cell of the table in "What it trains"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\| (.*) \|$", text[text.index("| task \\ model") :].split("\n\n")[0], re.MULTILINE)
    models = re.findall(r"`(\w+)`", head)
    for row in rows:
        tasks, *cells = row.split("|")
        for task in re.findall(r"`(\w+)`", tasks):
            for model, cell in zip(models, cells, strict=True):
                yield model, task, cell.strip()


@pytest.mark.parametrize(("model", "task", "cell"), rows_of_models())
def test_table_of_models_and_tasks_is_what_settings_accept(model: str, task: str, cell: str) -> None:
    more = {"profile": {"attribute": "age"}, "multi": {}, "click": {}}.get(task, {"loss": {"kind": "sampled"}})
    data = {"domain": "all", "predicted": "target"} if task == "target_item" else {}
    given = {"model": {"kind": model}, "task": {"kind": task, **more}, "data": data}
    for transfer in ("none", "shallow", "deep", "patch"):
        if cell == "✓ patch" or (cell == "✓" and transfer != "patch"):
            FinetuneConfig.model_validate({**given, "transfer": transfer})
        else:
            with pytest.raises(pydantic.ValidationError):
                FinetuneConfig.model_validate({**given, "transfer": transfer})


def test_your_own_log_has_settings_that_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block, name in re.findall(r"```yaml\n(# (conf/[\w/]+\.yaml).*?)```", text, re.DOTALL):
        Path(name).write_text(block)
    assert load(EtlConfig, "etl/shop").lake == "lake-shop"
    assert load(PipelineConfig, "pipeline/shop").targets == ("music",)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_no_command_is_both_run_and_left_out() -> None:
    found = {command for page in PAGES for command in commands(page)}
    assert {given for given in [*SHORT, *NOT_RUN] if not any(command.startswith(given) for command in found)} == set()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, with its environment, the demo's tables and its pre-trained model."""
    folder = tmp_path_factory.mktemp("readme") / "checkout"
    for name in (*FOLDERS, "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    (folder / ".venv").symlink_to(sys.prefix)
    for command in ("python -m etl all --config etl/demo", "python -m trainer pretrain --config pretrain/demo"):
        wait_for(start(command, folder))
    return folder


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "MAKEFLAGS": "--old-file=.venv/bin/.installed --old-file=.venv/bin/.dev",  # installs nothing
    }
    arguments = ["bash", "-c", command]
    return subprocess.Popen(
        arguments, cwd=folder, env=environment, text=True, stdout=-1, stderr=-2, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1_800)
    assert process.returncode == 0, f"{process.args}\n{output}"
    return output


@pytest.mark.slow
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_work(page: Path, checkout: Path) -> None:
    text, servers = page.read_text(encoding="utf-8"), []
    try:
        for command in commands(page):
            if left_out := next((why for given, why in NOT_RUN.items() if command.startswith(given)), ""):
                print(f"not run: {command} ({left_out})")
                continue
            if short := next((more for given, more in SHORT.items() if command.startswith(given)), ""):
                assert short in text, f"{name_of(page)} does not say how {command} is run short"
                print(f"run short: {command} {short}")
            process = start(f"{command} {short}", checkout)
            if port := re.search(r"--port (\d+)", command):
                servers.append(process)
                wait_until_open(int(port[1]), process)
                continue
            output = wait_for(process)
            if command.startswith("curl "):
                shown = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
                assert json.loads(output)["predictions"][0].keys() == shown["predictions"][0].keys()
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.communicate(timeout=60)


def wait_until_open(port: int, server: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"nothing listens at port {port}: {server.poll()}")
