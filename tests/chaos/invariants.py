"""What must hold after every command of a round, and when it is over. Each check gives the violations it found."""

import json
import math
import re
import sqlite3
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from tests.chaos.commands import NEIGHBOURS, Ended
from tests.chaos.contents import EMPTY, Contents, TrackedRun, commits, has_version, releases

ALLOWED = {0, 2, 3, 4, 5, 143}
NOT_DONE = {2, 5}  # one line says why
CRASHES = re.compile(r"Traceback \(most recent call last\)|panicked at|core dumped|Segmentation fault", re.IGNORECASE)
HALF_MADE = re.compile(r"\.(new|tmp|old|partial)$|^_staging-|\.tmp\.")
_TRIAL = re.compile(r"runs/[^/]+/trials/[^/]+/model/")
_REMARKS = ("tracking: ", "checkpoint ")  # lines on stderr that say what goes on, not why a command ended


def ended_well(
    ended: Ended, limit_seconds: float, *, allowed: Iterable[int] = ALLOWED, noisy: bool = False
) -> Iterator[str]:
    """(5) An exit code that means something, one line for a mistake, no traceback, in time. `noisy`: Spark logs too."""
    name = ended.command.name
    if ended.hung:
        yield f"5: {name} was still running after {limit_seconds:.0f} s"
        return
    if found := CRASHES.search(ended.output + ended.errors):
        yield f"5: {name} printed {found[0]!r}: {_last_line(ended.errors + ended.output)}"
    if ended.killed and ended.code < 0:
        return
    if ended.code not in set(allowed):
        yield f"5: {name} ended with {ended.code}: {_last_line(ended.errors)}"
    lines = [line for line in ended.errors.splitlines() if line.strip() and not line.startswith(_REMARKS)]
    if ended.code in NOT_DONE and not noisy and len(lines) != 1:
        yield f"5: {name} ended with {ended.code} and {len(lines)} lines on stderr: {' | '.join(lines)[:300]}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing said"


# --- tables, weights, registry ----------------------------------------------------------------------------------------


def only_known_rows(found: Contents, known: Sequence[Contents]) -> Iterator[str]:
    """(1, 2) On the way: each table is as one of `known` has it, and the newest release wholly as one of them."""
    for name, digest in found.tables.items():
        if digest != EMPTY and digest not in {one.tables.get(name) for one in known}:
            yield f"1: the newest rows of {name} are those of no undisturbed run"
    if found.released not in [one.released for one in known]:
        first = known[0].released
        names = [name for name in found.released if found.released[name] != first.get(name)]
        yield f"2: the newest release is that of no undisturbed run, by {', '.join(names) or 'what it lacks'}"
    for name, digest in found.weights.items():
        if _TRIAL.match(name) and not any(name in one.weights for one in known):
            continue  # not the best one: a search removes it a moment later, and in the end its score is compared
        if digest not in {one.weights.get(name) for one in known}:
            yield f"3: {name} has the bytes of no undisturbed run"


def as_expected(found: Contents, expected: Sequence[Contents]) -> Iterator[str]:
    """(1, 3) In the end: all is as one of `expected` has it."""
    if found in expected:
        return
    nearest = min((found.differences(one) for one in expected), key=len)
    number = {"tables": 1, "released": 2}.get(nearest[0].partition(":")[0], 3)
    yield f"{number}: not as undisturbed: {', '.join(nearest)}"


def releases_fit(lake: Path) -> Iterator[str]:
    """(2) The inputs that each table of a release recorded are the release's own versions."""
    for number, versions in enumerate(releases(lake), 1):
        for name, version in versions.items():
            try:
                made = next((one for one in commits(lake / name) if one["version"] <= version), {})
            except (DeltaError, OSError) as error:
                yield f"2: {name} can't be opened: {error}"
                continue
            for source, read in json.loads(made.get("inputs") or "{}").items():
                if source in versions and versions[source] != read:
                    yield f"2: release {number} has {source} {versions[source]}, but {name} was made of {read}"


def one_version_a_hash(found: Contents) -> Iterator[str]:
    """(3) No hash twice in a registered model, and a champion that is one of its versions."""
    for name, model in found.registry.items():
        twice = {digest for digest in model["versions"] if model["versions"].count(digest) > 1}
        if twice:
            yield f"3: {name} has {', '.join(sorted(twice))} registered more than once"
        if model["champion"] is not None and model["champion"] not in model["versions"]:
            yield f"3: the champion of {name} is no version of it"


# --- MLflow -----------------------------------------------------------------------------------------------------------


def runs_finished(folder: Path, runs: Sequence[TrackedRun]) -> Iterator[str]:
    """(4) Every finished training is FINISHED in MLflow with its result, and none is RUNNING: nothing runs any more."""
    for run in runs:
        if run.status == "RUNNING":
            yield f"4: MLflow's run {run.name} ({run.id[:8]}) is RUNNING, no process is"
    for path in sorted(folder.glob("runs/*/done.json")):
        done = json.loads(path.read_text())
        of_model = [run for run in runs if run.model_hash == done["hash"] and run.status == "FINISHED"]
        if not any(_has_result(run, done["metrics"]) for run in of_model):
            yield f"4: {path.parent.name} is done, but MLflow has no FINISHED run with its last metric"


def _has_result(run: TrackedRun, metrics: dict[str, float]) -> bool:
    wanted = metrics.get("validation/NDCG@10")
    return wanted is None or math.isclose(run.metrics.get("best/NDCG_10", math.nan), wanted, rel_tol=1e-9)


def store_opens(folder: Path) -> Iterator[str]:
    """(3) SQLite finds MLflow's database whole."""
    if (folder / "mlflow.db").exists():
        try:
            connection = sqlite3.connect(folder / "mlflow.db", timeout=20)
            (found,) = connection.execute("PRAGMA integrity_check").fetchone()
            connection.close()
        except sqlite3.Error as error:
            found = str(error)
        if found != "ok":
            yield f"3: mlflow.db: {found}"


# --- what must not be there -------------------------------------------------------------------------------------------


def no_secrets(folders: Sequence[Path], secrets: Sequence[str]) -> Iterator[str]:
    """(6) No file, table, tag or output holds a planted secret, plain or percent-encoded."""
    spellings = {spelling.encode() for one in secrets for spelling in (one, urllib.parse.quote(one, safe=""))}
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes() + path.name.encode()
        if any(spelling in data for spelling in spellings):
            yield f"6: {path.relative_to(folders[0].parent)} holds a secret"
    if has_version(table := folders[0] / "lake" / "releases"):
        text = str(DeltaTable(table).to_pyarrow_table().to_pylist()).encode()
        if any(spelling in text for spelling in spellings):
            yield "6: the table releases holds a secret"


def left_behind(folder: Path, *, interrupted: int) -> Iterator[str]:
    """(7) Data files that no version names are of at most one write for each interrupted command; nothing half made
    stands after an undisturbed run; files of others are as they were."""
    writes = [path.parent.name for path in sorted(folder.glob("lake/*/_delta_log")) if orphans(path.parent)]
    tables = (path for path in folder.glob("lake/*/") if not path.name.startswith("."))  # others: marks of readers
    writes += sorted(path.name for path in tables if not (path / "_delta_log").exists())
    if len(writes) > interrupted:
        yield f"7: files that no version names in {', '.join(writes)}, after {interrupted} interrupted commands"
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    if half := [str(name) for name in names if HALF_MADE.search(name.name) and name.parts[0] != "lake"]:
        yield f"7: half-made: {', '.join(half[:5])}"
    yield from neighbours_untouched(folder)


def neighbours_untouched(folder: Path) -> Iterator[str]:
    for name, text in NEIGHBOURS.items():
        if not (folder / name).is_file() or (folder / name).read_text() != text:
            yield f"7: somebody else's {name} is touched"


def orphans(table: Path) -> list[Path]:
    """Data files that no version names."""
    named = set()
    for log in (table / "_delta_log").glob("*.json"):
        for line in log.read_text(errors="replace").splitlines():
            if match := re.search(r'"path":"([^"]*)"', line):
                named.add(urllib.parse.unquote(match[1]))
    data = (path.relative_to(table) for path in table.rglob("*.parquet"))
    return [path for path in data if path.parts[0] != "_delta_log" and str(path) not in named]
