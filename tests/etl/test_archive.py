"""Archives: the same bytes for the same files, and nothing outside the folder that they are unpacked to."""

import stat
import warnings
import zipfile

import pytest

from etl.archive import ArchiveError, pack, unpack


def test_files_come_back_and_the_same_files_are_the_same_bytes(tmp_path):
    files = {"b.txt": tmp_path / "one", "folder/a.bin": tmp_path / "two"}
    files["b.txt"].write_text("text")
    files["folder/a.bin"].write_bytes(bytes(range(256)))
    pack(files, tmp_path / "1.zip")
    files["b.txt"].touch()
    pack(dict(reversed(files.items())), tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    unpack(tmp_path / "1.zip", tmp_path / "out")
    out = tmp_path / "out"
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == {name: path.read_bytes() for name, path in files.items()}


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp", "a\\..\\..\\out.txt", "folder/", ""])
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"")
    with pytest.raises(ArchiveError, match="expected names of files below a folder"):
        unpack(tmp_path / "bad.zip", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zip"]


def test_what_is_compressed_could_be_any_size_and_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1_000_000))
    with pytest.raises(ArchiveError, match="not compressed"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out")


def test_a_link_is_written_as_a_file(tmp_path):
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    unpack(tmp_path / "link.zip", tmp_path / "out")
    assert not (tmp_path / "out" / "link").is_symlink()
    assert (tmp_path / "out" / "link").read_text() == "/etc/passwd"


def test_damage_and_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    (tmp_path / "file").write_bytes(b"x" * 1_000)
    pack({"file": tmp_path / "file"}, tmp_path / "short.zip")
    content = (tmp_path / "short.zip").read_bytes()
    (tmp_path / "short.zip").write_bytes(content[:200] + b"y" + content[201:])
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("same", b"1")
        archive.writestr("same", b"2")
    for name in ("no.zip", "short.zip", "twice.zip"):
        with pytest.raises(ArchiveError, match=f"{name} is damaged"):
            unpack(tmp_path / name, tmp_path / f"out-{name}")
