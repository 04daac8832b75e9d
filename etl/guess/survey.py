"""The files of a folder as sets that are read alike, and which of them is the log, its items, its users."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from etl.guess import names
from etl.guess.roles import Roles, roles_of
from etl.guess.sample import Column, Sample, sample_file, sample_table, with_folder_keys
from etl.settings import GraftrecError
from etl.sources import files
from etl.sources.files import RawFile

MOST_FILES = 200  # that are looked at
_LOGS = re.compile(r"(?i)rating|review|event|interact|click|log|behavio|play|transact|view|\.inter|train")
_ITEMS = re.compile(r"(?i)item|movie|news|artist|book|product|meta|game|business|song|track|catalog|anime|joke")
_USERS = re.compile(r"(?i)user|customer|member|profile|people")
_EDGES = re.compile(r"(?i)friend|social|trust|edge|follow|\.net$")
_OTHER = re.compile(r"(?i)^(readme|licen[cs]e)|\.(md|pdf|ya?ml|png|html)$")


@dataclass(frozen=True)
class FileSet:
    """Files that are read by the same settings; `path` names them all."""

    path: str
    sample: Sample
    files: tuple[RawFile, ...]
    member: str | None = None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def base(self) -> str:
        return PurePosixPath(self.path).name


@dataclass
class Survey:
    """The sets of a folder; `unread`: name -> why nothing could be read from it."""

    root: str
    log: FileSet
    roles: Roles
    others: list[FileSet]
    unread: dict[str, str] = field(default_factory=dict)


def survey(folder: str) -> Survey:
    """Raises GraftrecError where no file looks like a log."""
    root, found, tables = _listed(folder)
    sets, unread = _sampled(root, found, tables)
    ranked = sorted(((_likeness(one), one) for one in sets), key=lambda pair: (-pair[0], pair[1].path))
    if not ranked or ranked[0][0] <= 0:
        seen = [f"{one.path} with columns {', '.join(map(str, one.sample.columns))}" for one in sets]
        seen += [why if why.startswith(name) else f"{name}: {why}" for name, why in unread.items()]
        shown = "; ".join(seen[:5])[:600] or "no file"
        raise GraftrecError(
            f"{folder}: expected a log, a file with users and items, found {shown}; describe it by hand, as in "
            "conf/source"
        )
    log = ranked[0][1]
    return Survey(root, log, roles_of(log.sample), [one for one in sets if one is not log], unread)


def _listed(folder: str) -> tuple[str, list[RawFile], list[str]]:
    """The root, its files, and its Delta tables' folders."""
    if "://" not in folder and os.path.isfile(folder):
        root, name = os.path.split(os.path.abspath(folder))
        return root, [file for file in files.all_files(root) if file.name == name], []
    root = folder if "://" in folder else os.path.abspath(folder)
    found = files.all_files(root, hidden=True)
    logs = {file.name.partition("_delta_log/")[0] for file in found if "_delta_log/" in f"{file.name}"}
    plain = [file for file in found if not files.is_hidden(file.name) and not file.name.startswith(tuple(logs))]
    return root, plain, sorted(log.rstrip("/") or "." for log in logs)


def _sampled(root: str, found: Sequence[RawFile], tables: Sequence[str]) -> tuple[list[FileSet], dict[str, str]]:
    sets: dict[tuple[Any, ...], list[tuple[RawFile, Sample]]] = {}
    unread: dict[str, str] = {}
    alone: list[FileSet] = []
    packed = {_unpacked(file.name) for file in found if file.compression is None}
    for path in tables:
        try:
            sample = sample_table(root, path)
            alone.append(FileSet(path, sample, (sample.file,)))
        except GraftrecError as error:
            unread[path] = str(error)
    for file in found[:MOST_FILES]:
        if file.compression is not None and _unpacked(file.name) in packed:
            unread[file.name] = "it is packed, and stands unpacked beside it"
            continue
        if _OTHER.search(PurePosixPath(file.name).name):
            continue
        try:
            for one in files.members(file):
                sample = with_folder_keys(sample_file(one))
                sets.setdefault(_kind(one, sample), []).append((one, sample))
        except GraftrecError as error:
            unread[file.name] = str(error)
    unread |= dict.fromkeys([file.name for file in found[MOST_FILES:]], "not looked at")
    return alone + [one for group in sets.values() for one in _as_sets(group, found)], unread


def _kind(file: RawFile, sample: Sample) -> tuple[Any, ...]:
    """Equal for files that one set may hold."""
    stem = re.sub(r"\d+", "#", _unpacked(PurePosixPath(file.name).name))
    headless = sample.settings.get("header") is False
    columns = tuple(sample.columns) if sample.settings.get("format", "delimited") == "delimited" else stem
    return (str(sorted(sample.settings.items())), columns, stem if headless else None, file.member and file.name)


def _as_sets(group: Sequence[tuple[RawFile, Sample]], found: Sequence[RawFile]) -> list[FileSet]:
    read, samples = [file for file, _ in group], [sample for _, sample in group]
    first = max(samples, key=lambda sample: sample.num_rows)
    whole = replace(first, is_whole=first.is_whole and len(group) == 1)
    if read[0].member is not None:
        return [FileSet(file.name, sample, (file,), file.member) for file, sample in group]
    if len(read) == 1:
        return [FileSet(read[0].name, whole, tuple(read))]
    if (path := _glob_of([file.name for file in read], [file.name for file in found])) is not None:
        return [FileSet(path, whole, tuple(read))]
    return [FileSet(file.name, sample, (file,)) for file, sample in group]


def _glob_of(wanted: Sequence[str], there: Sequence[str]) -> str | None:
    """A path that names exactly these files."""
    bases = [PurePosixPath(name).name for name in wanted]
    folders = {str(PurePosixPath(name).parent) for name in wanted}
    before = next(iter(folders)) + "/" if len(folders) == 1 else "**/"
    before = "" if before == "./" else before
    prefix, suffix = _beginning(bases), _beginning([base[::-1] for base in bases])[::-1]
    suffixes = {PurePosixPath(base).suffix for base in bases}
    tries = [f"{before}{prefix}*{suffix}" if len(set(bases)) > 1 else f"{before}{bases[0]}"]
    tries += [f"{before}*{one}" for one in suffixes]
    for path in tries:
        named = {name for name in there if re.fullmatch(files.glob_pattern(path), name)}
        if named == set(wanted):
            return path
    return None


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    least, most = min(texts), max(texts)
    return least[: next((place for place, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))]


def _unpacked(name: str) -> str:
    return re.sub(r"(?i)\.(gz|bz2|zstd?|zip)$", "", name)


def _likeness(one: FileSet) -> float:
    """How much a set looks like an interaction log; 0: not at all."""
    roles, sample = roles_of(one.sample), one.sample
    if sample.shape == "a user a line":
        return 3.0
    if sample.shape == "matrix":
        return 2.5
    if not roles.is_log:
        return 0.0
    named = sum(names.rank(column, role) is not None for role, column in {**roles.columns, **roles.lists}.items())
    users = sample.columns[roles.columns["user"]] if "user" in roles.columns else []
    repeats = len(set(map(str, users))) < len(users) or "item" in roles.lists or not users
    is_edges = _EDGES.search(one.base) or any(names.rank(column, "friend") is not None for column in sample.columns)
    score = 1 + named + 2 * ("time" in {*roles.columns, *roles.lists}) + (_LOGS.search(one.path) is not None)
    return score - 2 * (not repeats) - 4 * bool(is_edges) + min(one.size, 1 << 40) / (1 << 41)


def items_of(found: Survey) -> tuple[FileSet, Column] | None:
    """The set that describes items, and its column of ids."""
    return _described(found, "item", _ITEMS)


def users_of(found: Survey) -> tuple[FileSet, Column] | None:
    return _described(found, "user", _USERS)


def _described(found: Survey, role: str, called: re.Pattern[str]) -> tuple[FileSet, Column] | None:
    known = _ids(found, role)
    best: tuple[float, FileSet, Column] | None = None
    other = "user" if role == "item" else "item"
    for one in found.others:
        sample = one.sample
        if sample.shape != "rows" or any(names.rank(column, other) == 0 for column in sample.columns):
            continue
        for column, cells in sample.columns.items():
            ids = [str(cell) for cell in cells if cell is not None and not isinstance(cell, list)]
            if not ids or len(set(ids)) < 0.9 * len(ids):
                continue
            shared = len(known & set(ids)) / max(1, min(len(known), len(set(ids))))
            name = names.rank(column, role) is not None or names.plain(column) == "id"
            file = called.search(one.base) is not None
            score = shared + name + file
            if (shared > 0.2 and (name or file)) or (name and file and not found.log.sample.is_whole):
                best = max(best or (0.0, one, column), (score, one, column), key=lambda pair: pair[0])
            if isinstance(column, int):
                break  # without a header ids come first
    return None if best is None else (best[1], best[2])


def _ids(found: Survey, role: str) -> set[str]:
    cells = found.log.sample.columns.get(found.roles.columns.get(role, ""), [])
    return {str(cell) for cell in cells if cell is not None}


def edges_of(found: Survey) -> tuple[FileSet, Column, Column] | None:
    """The set of edges between users, and its two columns."""
    known = _ids(found, "user")
    for one in found.others:
        columns = list(one.sample.columns)
        friend = next((column for column in columns if names.rank(column, "friend") is not None), None)
        if friend is None and len(columns) in (2, 3) and _EDGES.search(one.base):
            friend = columns[1]
        if friend is None or len(columns) < 2:
            continue
        user = next(column for column in columns if column != friend)
        named = next((column for column in columns if names.rank(column, "user") is not None), user)
        if known & {str(cell) for cell in one.sample.columns[named] if cell is not None}:
            return one, named, friend
    return None
