"""One recipe under several protocol cards: epochs handed on, headings, published figures, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from etl.settings import ConfigError, load, replaced
from tests.fixtures.orders import LOO, LOO_ALL, SCRAMBLED, add_splits
from trainer.experiment import protocols
from trainer.experiment import run as experiment
from trainer.experiment.plan import ExperimentConfig
from trainer.experiment.protocols_plan import ProtocolsConfig
from trainer.report import report
from trainer.report.results import ReportError

MODEL = {"width": 8, "blocks": 1, "max_length": 24, "user_width": 0, "knowledge": {}}
TRAIN = {"epochs": 3, "min_epochs": 0, "patience": 1, "batch_size": 16, "warmup_steps": 0}
RECIPE = {"model": MODEL, "train": TRAIN, "task": {"kind": "next_item"}, "data": {"domain": "target"}}
PUBLISHED = [{"model": "theirs", "ndcg": 0.1772, "source": "their page"}]
CARDS = {
    "file": {"heading": "In the order of the files", "split": "loo", "published": PUBLISHED},
    "scrambled": {"heading": "Scrambled", "split": "scrambled"},
    "all": {"heading": "All but the last", "split": "loo-all", "epochs_of": "file"},
    "time": {"heading": "Told the time", "split": "loo", "request_time": "known", "published": PUBLISHED},
}


@pytest.fixture(scope="module")
def lake(tiny_lake: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return add_splits(tiny_lake, tmp_path_factory.mktemp("orders") / "lake", (LOO, LOO_ALL, SCRAMBLED))


def config(lake: str, folder: Path, **more: Any) -> ProtocolsConfig:
    given = {"name": "tiny", "runs": str(folder), "lake": lake, "recipe": RECIPE, "cards": CARDS, "seeds": [3]}
    return ProtocolsConfig.model_validate(given | {"jobs": 2, "tracking": {"enabled": False}} | more)


def test_each_card_has_a_heading_and_its_own_figures(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(lake, tmp_path)
    assert protocols.run(given) == 0
    printed = capsys.readouterr().out
    found = json.loads((given.folder / "results.json").read_text())["headings"]
    assert list(found) == list(CARDS)
    hashes = {name: one["cards"][0]["hash"] for name, one in found.items() if one["cards"]}
    assert len(set(hashes.values())) == len(hashes) == 3
    for name, one in found.items():
        place = printed.index(f"\n{CARDS[name]['heading']}\n")
        if name in hashes:
            assert printed.index(f"card {hashes[name]} (full)", place) == place + len(str(CARDS[name]["heading"])) + 2
        kinds = [row["kind"] for row in one["rows"]]
        assert kinds == [
            *(["ours", "baseline"] if name in hashes else []),
            *(["published"] if "published" in CARDS[name] else []),
        ]
    assert found["file"]["rows"][2] == {
        "label": "theirs",
        "kind": "published",
        "NDCG@10": 0.1772,
        "Recall@10": None,
        "source": "their page",
    }
    assert found["time"]["reason"].startswith("not available: no recipe here reads the request's time")
    best = json.loads((given.folder / "file-3" / "done.json").read_text())["metrics"]["best_epoch"]
    epochs = json.loads((given.folder / "all-3" / "done.json").read_text())["metrics"]["epochs"]
    assert epochs == best
    assert protocols.run(given) == 0
    assert "[2/2] scrambled-3: unchanged" in capsys.readouterr().out


def test_a_recipe_that_is_told_the_time_has_a_card_of_its_own(lake: str, tmp_path: Path) -> None:
    told = RECIPE | {"model": MODEL | {"time": {"bias": True}}}
    given = config(lake, tmp_path, timed=told, only=("file", "time"))
    assert protocols.run(given) == 0
    found = json.loads((given.folder / "results.json").read_text())["headings"]
    cards = {name: one["cards"][0] for name, one in found.items()}
    assert [cards[name]["card"]["request_time"] for name in ("file", "time")] == ["unknown", "known"]
    assert cards["file"]["hash"] != cards["time"]["hash"]
    assert [row["kind"] for row in found["time"]["rows"]] == ["ours", "baseline", "published"]
    untold = protocols._not_available(config(lake, tmp_path, timed=RECIPE), given.cards["time"])
    assert untold == "not available: the recipe does not read the request's time, which is known under this card"


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({"a": {"heading": "A", "split": "elsewhere"}}, "cards.a.split: expected one of etl.splits"),
        (
            {"a": {"heading": "A", "split": "loo", "epochs_of": "b"}},
            "expected a card whose split has a validation part",
        ),
        (
            {"a": {"heading": "A", "split": "loo"}, "b": {"heading": "B", "split": "loo", "epochs_of": "a"}},
            "expected none, since split loo has a validation part",
        ),
    ],
)
def test_cards_that_cannot_be_run_are_refused(lake: str, tmp_path: Path, cards: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        protocols.run(config(lake, tmp_path, cards=cards))


def test_two_headings_of_one_card_are_refused(lake: str, tmp_path: Path) -> None:
    cards = {name: {"heading": name, "split": "loo"} for name in ("a", "b")}
    with pytest.raises(ConfigError, match="a protocol card of its own for each, found card"):
        protocols.run(config(lake, tmp_path, cards=cards))


@pytest.mark.parametrize("name", ["demo", "ml1m"])
def test_shipped_cards_can_be_run(name: str) -> None:
    """Each published figure has a source, and the cards that need a model that is told the time say so."""
    given = load(ProtocolsConfig, f"protocols/{name}")
    assert all(figure.source for card in given.cards.values() for figure in card.published)
    known = [card for card in given.cards.values() if card.request_time == "known"]
    assert known
    lacking = [card for card in known if protocols._not_available(given, card)]
    assert lacking == (known if given.timed is None else [])
    only = replaced(given, only=(next(iter(given.cards)),))
    assert len(only.shown) == 1


def experiment_config(lake: str, folder: Path, **more: Any) -> ExperimentConfig:
    rows = {
        name: {"label": name, "pretrain": {**RECIPE, "data": {"domain": "target", "split": split}}}
        for name, split in (("n2", "loo"), ("n1", "loo-all"))
    }
    given = {"name": "two-cards", "runs": str(folder), "lake": lake, "split": "loo", "custom": rows, "seeds": [3]}
    given |= {"joint": False, "jobs": 2, "evaluation": {"protocols": ["full"]}, "tracking": {"enabled": False}}
    return ExperimentConfig.model_validate(given | more)


def test_an_experiment_keeps_its_card_and_rows_of_another_are_missing(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = experiment_config(lake, tmp_path)
    assert experiment.run(given) == experiment.RUNS_MISSING
    printed = capsys.readouterr()
    assert "missing  n1, seed 3: expected figures under one protocol card, found card" in printed.err
    found = json.loads((given.folder / "results.json").read_text())
    (entry,) = found["cards"]
    assert "n2" in entry["labels"]
    assert "n1" not in entry["labels"]
    assert entry["text"] in printed.out
    assert f"Under {entry['text']}." in (given.folder / "report" / "report.md").read_text()
    assert experiment.run(replaced(given, across=("trained_on",))) == 0
    found = json.loads((given.folder / "results.json").read_text())
    assert [entry["labels"][0] for entry in found["cards"]] == ["n2", "n1"]
    report.write(found, tmp_path / "page")
    with pytest.raises(ReportError, match="expected figures under one protocol card"):
        report.write(found | {"across": []}, tmp_path / "page")
