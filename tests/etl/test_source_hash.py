"""Results are made again when the code that made them changes, however far from it."""

import shutil
from pathlib import Path

import pytest

from etl import source_hash as sources
from etl.jobs.job import job_code_version
from etl.pipeline.run import JOBS
from etl.source_hash import imported_sources, source_hash
from tests.fixtures.places import ROOT
from trainer.code_hash import WITHOUT_EFFECT, code_hash


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our packages elsewhere, to edit: what is hashed is there."""
    for package in ("etl", "trainer"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    return tmp_path


def edit(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "\n_EDITED = True\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("recipe", "edited"),
    [
        ("trainer.recipes.pretrain", "evaluation/baselines/sequences"),  # two imports away, behind what validates
        ("trainer.recipes.pretrain", "models/cpu/chunks"),
        ("trainer.recipes.finetune", "models/adapters"),
        ("trainer.recipes.evaluate", "evaluation/ranking_metrics"),
        ("trainer.recipes.recommend", "data/events"),
        ("trainer.recipes.recommend", "data/baskets"),
        ("trainer.evaluation.scorers", "evaluation/baselines/sequences"),
        ("trainer.evaluation.scorers", "tasks/user_vector"),
    ],
)
def test_code_hash_changes_with_a_module_imports_away(copied: Path, recipe: str, edited: str) -> None:
    before = code_hash(recipe)
    edit(copied / "trainer" / f"{edited}.py")
    assert code_hash(recipe) != before


def test_code_hash_stays_where_a_module_without_part_changes(copied: Path) -> None:
    before = code_hash("trainer.recipes.pretrain")
    for module in ("tracking/runs", "tracking/queue", "recipes/recommend", "report/report"):
        edit(copied / "trainer" / f"{module}.py")
    assert code_hash("trainer.recipes.pretrain") == before


def test_job_code_version_follows_imports_and_sources(copied: Path) -> None:
    before = {job.name: job_code_version(job) for job in JOBS}
    edit(copied / "etl" / "sources" / "entity_keys.py")
    read_raw = {job.name for job in JOBS if job.needs_source}
    assert {job.name for job in JOBS if job_code_version(job) != before[job.name]} >= read_raw
    edit(copied / "etl" / "tables.py")
    assert all(job_code_version(job) != before[job.name] for job in JOBS)


def test_every_module_without_effect_is_there() -> None:
    entries = ("trainer.recipes.pretrain", "trainer.recipes.evaluate", "trainer.recipes.recommend", "trainer.__main__")
    names = {name for module in entries for name in imported_sources(module)}
    assert names >= WITHOUT_EFFECT


def test_imported_sources_sees_imports_in_functions_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_ROOT", tmp_path)
    files = {
        "etl/__init__.py": "",
        "etl/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import etl.types_only\n"
        "def f():\n    from etl.part import two\n",
        "etl/part/__init__.py": "import os\n",
        "etl/part/two.py": "import etl.part.three as three\n",
        "etl/part/three.py": "import etl.one\n",
        "etl/types_only.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(imported_sources("etl.one")) == {"etl", "etl.one", "etl.part", "etl.part.two", "etl.part.three"}
    assert "etl.one" not in imported_sources("etl.part.two", without={"etl.one"})


def test_source_hash_refuses_an_unknown_module() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"found etl\.nowhere"):
        source_hash("etl.nowhere")
