"""Archives that somebody else may have written: nothing leaves the folder, and nothing grows."""

import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.archive import ArchiveError, pack, unpack
from tests.fixtures.hostile import EXAMPLES, SEEDED, spoilt_bytes
from trainer.inference.model_archive import archived


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for name in ("a.json", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 40)
    pack({name: tmp_path / name for name in ("a.json", "b.bin")}, tmp_path / "model.zip")
    return tmp_path / "model.zip"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "a\\b", "a/", ""])
def test_an_entry_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "out.zip", tmp_path / "inside")
    assert {path.name for path in tmp_path.iterdir()} <= {"out.zip", "inside"}


def test_a_link_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.json").write_text("{}")
    (tmp_path / "model" / "stray").symlink_to(tmp_path / "secret")
    (found,) = archived(tmp_path / "model", tmp_path)
    assert zipfile.ZipFile(found).namelist() == ["own.json"]


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_archive_is_unpacked_or_refused(packed: Path, data: st.DataObject) -> None:
    whole = packed.read_bytes()
    number = len(list(packed.parent.glob("any-*")))
    folder = packed.parent / f"any-{number}"
    (folder / "in").mkdir(parents=True)
    (folder / "model.zip").write_bytes(data.draw(spoilt_bytes(whole)))
    said = ""
    try:
        unpack(folder / "model.zip", folder / "in")
    except ArchiveError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert {path.name for path in folder.iterdir()} == {"model.zip", "in"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 4 * len(whole) + 10_000
