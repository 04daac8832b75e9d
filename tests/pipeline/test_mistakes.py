"""Mistakes at the command line: each ends with 2 and one line, and leaves nothing behind."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from etl.__main__ import main as etl
from tests.fixtures.places import ROOT
from trainer.__main__ import main as trainer
from trainer.experiment.run import main as experiment
from trainer.recipes.pipeline import main as pipeline
from trainer.report.report import main as report

FILES = {
    "torn.yaml": b"a: [",
    "bytes.yaml": b"\xff\xfe\x00",
    "list.yaml": b"- 1",
    "number.yaml": b"3",
    "itself.yaml": b"base: itself",
    "orphan.yaml": b"base: nobody",
    "numbers.yaml": b"1: 2",
    "nameless.yaml": b"model: nowhere",
    "file": b"x",
    "other/thesis.tex": b"x",
    "torn/releases/_delta_log/00000000000000000000.json": b'{"pro',
    "model/manifest.json": b"{",
}
QUIET = ["--tracking.enabled", "false"]
PRETRAIN = ["trainer", "pretrain", "--config", "pretrain/demo", *QUIET]
FINETUNE = ["trainer", "finetune", "--config", "finetune/demo", *QUIET]
ETL = ["etl", "all", "--config", "etl/demo", "--lake", "{}/lake"]
MISTAKES = [
    # the command itself
    (["trainer"], "required: recipe"),
    (["trainer", "pretrian"], "invalid choice: 'pretrian'"),
    (["trainer", "--config", "pretrain/demo"], "required: recipe"),
    (["trainer", "pretrain"], "required: --config"),
    (["etl"], "required: command"),
    (["etl", "all"], "expected --config, .*found none"),
    (["etl", "itemz", "--config", "etl/demo"], "expected all, report or a job .*found 'itemz'"),
    (["etl", "report"], "expected --lake FOLDER, or --config, found neither"),
    (["report", "results.json"], "required: --folder"),
    (["experiment"], "required: --experiment"),
    (["pipeline"], "required: --config"),
    (["pipeline", "--config", "pipeline/demo", "--trian.epochs", "3"], "unknown setting trian"),
    # no configuration, or one that can't be read
    (
        ["trainer", "pretrain", "--config", "nope"],
        "no configuration nope: .*the folders are arms, backtest, backup, etl, ",
    ),
    (["trainer", "pretrain", "--config", "demo"], "did you mean .*pretrain/demo"),
    (["trainer", "pretrain", "--config", "pretrain/nope"], "one of conf/pretrain/: .*demo"),
    (["trainer", "pretrain", "--config", "{}"], "expected a YAML file, found a folder"),
    (["trainer", "pretrain", "--config", "x" * 4_000], "no configuration x"),
    (["trainer", "pretrain", "--config", "{}/torn.yaml"], "not readable as YAML"),
    (["trainer", "pretrain", "--config", "{}/bytes.yaml"], "not readable as YAML"),
    (["trainer", "pretrain", "--config", "{}/list.yaml"], "expected a mapping of settings, found list"),
    (["trainer", "pretrain", "--config", "{}/number.yaml"], "expected a mapping of settings, found int"),
    (["trainer", "pretrain", "--config", "{}/itself.yaml"], "expected another file as base"),
    (["trainer", "pretrain", "--config", "{}/orphan.yaml"], "no configuration .*nobody"),
    (["trainer", "pretrain", "--config", "{}/numbers.yaml"], "found 1"),
    (
        ["trainer", "pretrain", "--config", "{}/nameless.yaml"],
        "no configuration model/nowhere: expected a YAML file, or a name under",
    ),
    (["trainer", "pretrain", "--config", "etl/demo"], "unknown setting source"),
    (["experiment", "--experiment", "table2", "--preset", "nope"], "no configuration experiment/table2_nope"),
    # settings
    ([*PRETRAIN, "--name"], "expected --section.key value, found '--name'"),
    ([*PRETRAIN, "word"], "expected --section.key value, found 'word'"),
    ([*PRETRAIN, "--train.epochs", "--train.seed", "3"], "expected a value for --train.epochs, found .*--train.seed"),
    ([*PRETRAIN, "--.epochs", "3"], "mend the name"),
    ([*PRETRAIN, "--train.epoch", "3"], "unknown setting train.epoch; did you mean train.epochs?"),
    ([*PRETRAIN, "--model.widht", "3"], "unknown setting model.widht; did you mean model.width?"),
    ([*PRETRAIN, "--section.x", "3"], "unknown setting section;"),
    ([*PRETRAIN, "--train.epochs.x", "3"], "expected a section train.epochs, found [0-9]+"),
    ([*PRETRAIN, "--train.epochs", "many"], "train.epochs: expected a whole number, found 'many'"),
    ([*PRETRAIN, "--train.epochs", "1.5"], "train.epochs: expected a whole number, found 1.5"),
    ([*PRETRAIN, "--train.epochs", "0"], "train.epochs: expected greater than or equal to 1, found 0"),
    ([*PRETRAIN, "--train.learning_rate", "fast"], "train.learning_rate: expected a number, found 'fast'"),
    ([*PRETRAIN, "--tracking.enabled", "maybe"], "tracking.enabled: expected true or false, found 'maybe'"),
    ([*PRETRAIN, "--name", "3/../4"], "name: expected a name that stays in its folder, found .3/../4."),
    ([*PRETRAIN, "--data.event_types", "view"], "data.event_types: expected a list, found 'view'"),
    ([*PRETRAIN, "--runtime.precision", "fp8"], "runtime.precision: expected 'auto', .*found 'fp8'"),
    ([*PRETRAIN, "--train", "[1]"], "train: expected a section: .*found \\[1\\]"),
    ([*PRETRAIN, "--train", "fast"], "no configuration train/fast: expected a YAML file, or a name under"),
    ([*PRETRAIN, "--model.kind", "gpt"], "model.kind: expected one of 'bert4rec', .*found 'gpt'"),
    ([*PRETRAIN, "--model", "3"], "model.kind: expected one of"),
    ([*ETL, "--source", "{{kind: log}}"], "source.events: expected a value, found none; set it in the file"),
    (["trainer", "search", "--config", "search/demo", "--space.train.x", "[1, 2]"], "space.train.low: expected"),
    (
        ["trainer", "promote", "--config", "promote/default", "--gate.metric", "NDGC@10"],
        "gate.metric: expected a metric .*found 'NDGC@10'; did you mean NDCG@10\\?",
    ),
    (
        ["trainer", "evaluate", "--config", "evaluate/default", "--metrics", "[MRR, single/NDGC@10]"],
        "metrics: expected a metric .*did you mean single/NDCG@10\\?",
    ),
    # folders and lakes
    (["pipeline", "--config", "pipeline/ml1m", "--data", "{}/nowhere"], "--data \\(make: DATA\\): expected a folder"),
    (
        ["pipeline", "--config", "pipeline/ml1m", "--etl.source.root", "{}/nowhere", "--runs", "{}/runs"],
        "etl.source.root: expected the folder of the log, found none at",
    ),
    (
        ["etl", "all", "--config", "etl/ml100k", "--source.root", "{}/nowhere", "--lake", "{}/new"],
        "source.root: expected",
    ),
    ([*PRETRAIN, "--data.lake", "{}/nowhere"], "no table releases in the lake .*--lake .*nowhere`"),
    ([*PRETRAIN, "--data.lake", "{}/empty"], "no table releases in the lake"),
    ([*PRETRAIN, "--data.lake", "{}/other"], "expected a lake .*found thesis.tex"),
    ([*PRETRAIN, "--data.lake", "{}/file"], "expected a lake .*found a file"),
    ([*PRETRAIN, "--data.lake", "{}/torn"], "torn/releases: expected the entry of version 0 in JSON, found it torn"),
    ([*PRETRAIN, "--output", "{}/file"], "expected a path that can be read or written, found .*Not a directory"),
    ([*PRETRAIN, "--runtime.device", "cuda:99"], "runtime.device: expected auto, cpu or cuda, found 'cuda:99'"),
    ([*PRETRAIN, "--runtime.device", "abacus"], "runtime.device: expected auto, cpu or cuda, found 'abacus'"),
    ([*FINETUNE, "--transfer", "deep", "--parent", "null"], "set parent to its `model` folder"),
    ([*FINETUNE, "--parent", "{}/nowhere"], "no model in .*nowhere: expected manifest.json"),
    ([*FINETUNE, "--parent", "{}/model"], "model"),
    (["trainer", "evaluate", "--config", "evaluate/default"], "expected a model to evaluate, found none; give --model"),
    (["trainer", "evaluate", "--config", "evaluate/default", "--model", "{}/empty"], "no model in"),
    (["trainer", "recommend", "--config", "recommend/default", "--model", "{}/empty"], "no model in"),
    (["etl", "report", "--lake", "{}/empty"], "holds no release; run `python -m etl all --config "),
    (["etl", "report", "--lake", "{}/other"], "expected a lake .*found thesis.tex"),
    (["etl", "report", "--lake", "{}/file"], "expected a lake .*found a file"),
    (["etl", "report", "--lake", "{}/empty", "--kcore", "3"], "expected --lake FOLDER, or --config, found lake, kcore"),
    (["report", "{}/nowhere.json", "--folder", "{}/page"], "expected an experiment's results in"),
]


COMMANDS = {"trainer": trainer, "etl": etl, "report": report, "experiment": experiment, "pipeline": pipeline}


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line_and_code_2(
    words: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, cwd = tmp_path / "given", tmp_path / "cwd"
    (given / "empty").mkdir(parents=True)
    cwd.mkdir()
    for name, content in FILES.items():
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        (given / name).write_bytes(content)
    before = sorted(given.rglob("*"))
    (cwd / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(cwd)
    command, *rest = [word.format(given) for word in words]
    try:
        code = COMMANDS[command](rest)
    except SystemExit as ended:
        code = int(str(ended.code))
    printed = capsys.readouterr()
    assert code == 2
    assert re.fullmatch(rf"[^\n]*{message}[^\n]*\n", printed.err), printed.err
    assert "Traceback" not in printed.out
    assert sorted(given.rglob("*")) == before
    assert not [path for path in cwd.rglob("*.safetensors")]


def test_an_interrupted_command_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trainer.recipes.dispatch as module

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_recipe", lambda _: interrupt)
    assert trainer(["evaluate", "--config", "evaluate/default"]) == 143
    assert capsys.readouterr().err == "evaluate: stopped; run the same command to continue\n"


def test_what_another_process_holds_ends_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer import tracking

    folder = tmp_path / "demo-pretrain"
    folder.mkdir()
    with tracking.file_lock(folder / "lock"):
        assert trainer([*PRETRAIN[1:], "--output", str(tmp_path)]) == 5
    assert re.fullmatch(r"pretrain: another process is training in .*\n", capsys.readouterr().err)
