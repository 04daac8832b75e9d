"""Recipe: forget users, everywhere that this project writes: the lake, run folders, MLflow's artifacts, what is unsent.

    python -m trainer forget --user ID --lake LAKE --runs RUNS

The lake's tables come first (`etl.maintenance.forget`). Then models lose their ids, rows and vectors, and files with a
row a user lose these rows. No MLflow run is made: its command line would hold the id. A receipt says what was removed
where, and what can't be.
"""

import contextlib
import datetime as dt
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from etl.lake.small_files import delete_file, read_file, write_file
from etl.maintenance.forget import Forgotten, Reading, forget
from etl.plain_path import absolute
from etl.redaction import redact
from trainer import tracking
from trainer.config import ForgetConfig, required
from trainer.inference.delta_folder import PATCH, parent_of
from trainer.inference.model_archive import MODEL, USERS, archive_again, unarchived
from trainer.inference.model_folder import MANIFEST, ModelFolderError, digest_of, model_hash
from trainer.inference.without_users import follow_parent, is_model, is_of_lake, renew_digests, without_users
from trainer.registry import rename_hash
from trainer.social.friends_folder import is_friends, without_people

PARTIAL = ".forgetting-receipt"  # in the lake, until all is done
_COLUMNS = ("user", "friend")  # of files with rows of users


@dataclass
class Receipt:
    """What was removed where. Holds keyed hashes, no raw id.

    `lake`: see Forgotten. `models`: folder -> users removed. `files`: file -> rows removed. `shared`: models whose
    weights can't unlearn the users. `by_hand`: what this command can't change.
    """

    users: list[str]
    finished: str = ""
    lake: dict[str, Any] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    by_hand: list[str] = field(default_factory=list)


def run(config: ForgetConfig) -> Receipt:
    """The recipe `forget`. Raises GraftrecError; ends with 5 where a live process still reads an older release."""
    required(config, "user")
    waiting: Reading | None = None
    try:
        done = forget(config.lake, config.user, wait_seconds=config.wait_seconds)
    except Reading as error:  # models and files needn't wait
        waiting, done = error, error.done
    receipt = _begun(config.lake, done)
    _note(config, receipt)
    _in_folders(config, receipt)
    if config.tracking.enabled and tracking.is_there():
        _in_store(config, receipt)
    if waiting is not None:
        raise waiting
    receipt.by_hand = [
        "raw files are the log's owner's: the lake's list of keyed hashes leaves the users out of every later run",
        "backups, copies of lake and models elsewhere, and processes with a model in memory: restart servers",
    ]
    receipt.finished = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    path = Path(config.runs) / "forgotten" / f"{done.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(receipt), indent=1), encoding="utf-8")
    delete_file(config.lake, PARTIAL)
    print("\n".join([*_lines(receipt), f"receipt: {path}"]), flush=True)
    return receipt


def _begun(lake: str, done: Forgotten) -> Receipt:
    """With what a killed run of the same users had removed."""
    content = read_file(lake, PARTIAL)
    before = Receipt(**json.loads(content)) if content else Receipt(done.users)
    if sorted(before.users) != sorted(done.users):
        before = Receipt(done.users)
    if before.lake.get("id") == done.id or not before.lake:  # the lake's own journal has gone on
        before.lake = asdict(done)
        return before
    now = asdict(done)
    for name in ("texts", "entries", "files"):
        now[name] += before.lake[name]
    for name in ("indices", "places", "releases"):
        now[name] = sorted({*now[name], *before.lake[name]})
    now["rows"] = {name: num + before.lake["rows"].get(name, 0) for name, num in now["rows"].items()}
    before.lake = now
    return before


def _note(config: ForgetConfig, receipt: Receipt) -> None:
    write_file(config.lake, PARTIAL, json.dumps(asdict(receipt)).encode())


# --- folders ----------------------------------------------------------------------------------------------------------


def _in_folders(config: ForgetConfig, receipt: Receipt) -> None:
    """Run folders, and what MLflow has not taken yet."""
    for root in (Path(config.runs), Path(config.tracking.unsent)):
        if root.is_dir():
            _clean(config, root, receipt, name=str(root), lake="")
            _note(config, receipt)


def _in_store(config: ForgetConfig, receipt: Receipt) -> None:
    roots = tracking.artifact_roots()
    parents: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="graftrec-forget-") as scratch:
        for again in (False, True):  # patches name files of their parents: these come first
            for number, root in enumerate(roots):
                with tracking.editable(root, (".parquet", "manifest.json", "whole.json", MODEL, USERS)) as folder:
                    if not folder.is_dir():
                        continue
                    with _opened(folder, Path(scratch) / str(number)) as opened:
                        for place, lasts in ((folder, root.folder is not None), (opened, True)):
                            if again:
                                _follow(place, parents)
                                continue
                            _clean(config, place, receipt, name=root.what, lake=root.lake)
                            if lasts:
                                _know(place, parents)
            _note(config, receipt)


@contextlib.contextmanager
def _opened(root: Path, scratch: Path) -> Iterator[Path]:
    """The archives of models below a folder as folders in `scratch`, in the same places; those that were changed are
    archived again."""
    places = [path.parent.relative_to(root) for path in sorted(root.rglob(MODEL))]
    if not scratch.is_dir():
        scratch.mkdir()
        for place in places:
            unarchived(root / place, scratch / place)
    before = {place: _state(scratch / place) for place in places}
    yield scratch
    for place in places:
        if _state(scratch / place) != before[place]:
            archive_again(scratch / place, root / place)


def _state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _follow(root: Path, parents: Mapping[str, Path]) -> None:
    """Patches below a folder name their parents' files as they are now."""
    for patch in [path.parent for path in root.rglob(PATCH)]:
        if (parent := parents.get(parent_of(patch))) is not None:
            follow_parent(patch, parent)


def _know(root: Path, parents: dict[str, Path]) -> None:
    """Note the models below a folder by their hashes."""
    for manifest in root.rglob(MANIFEST):
        if not is_friends(manifest.parent):
            with contextlib.suppress(ModelFolderError, OSError, ValueError, AttributeError):
                parents[model_hash(manifest.parent)] = manifest.parent


def _clean(config: ForgetConfig, root: Path, receipt: Receipt, *, name: str, lake: str) -> None:
    """Models and files with rows of users below a folder. `lake`: of the run that it belongs to; "": to be found."""
    users = set(config.user)
    models = [folder for folder in _folders(root) if is_model(folder)]
    for folder in models:
        where = f"{name}: {folder.relative_to(root)}" if folder != root else name
        if not (config.any_lake or is_of_lake(folder, lambda one: _same(one, config.lake))):
            continue
        if is_friends(folder):
            before = model_hash(folder)
            num, after = without_people(folder, users)
            if num and config.tracking.enabled and tracking.is_there():
                rename_hash(before, after)
        else:
            num = without_users(folder, users)
        if num or where in receipt.models:
            receipt.models[where] = max(num, receipt.models.get(where, 0))
        if where not in receipt.shared:
            receipt.shared.append(where)
    of_models = set(models)
    for path in sorted(root.rglob("*.parquet")):
        own = lake or _lake_beside(path, root)
        if not config.any_lake and own and not _same(own, config.lake):
            continue
        inside = path.parent in of_models
        if inside and path.name in ("users.parquet", "people.parquet", "catalogue.parquet"):
            continue
        if num := _without_rows(path, users):
            receipt.files[f"{name}: {path.relative_to(root)}"] = num
            if inside:
                _renew_digest(path)


def _folders(root: Path) -> Iterator[Path]:
    yield root
    yield from (path for path in sorted(root.rglob("*")) if path.is_dir())


def _lake_beside(path: Path, root: Path) -> str:
    """The lake that an evaluation's summary beside a file names; "" where none does."""
    for folder in (path.parent, *path.parent.parents):
        summary = folder / "summary.json"
        if summary.is_file():
            try:
                found = json.loads(summary.read_text()).get("lake", "")
            except (ValueError, AttributeError):
                return ""
            return found if isinstance(found, str) else ""
        if folder == root:
            break
    return ""


def _same(one: str, other: str) -> bool:
    """Whether two places are of one lake, as runs and settings name it."""
    return redact(absolute(one)) == redact(absolute(other))


def _without_rows(path: Path, users: Collection[str]) -> int:
    """Take rows of users out of a Parquet file; how many these were."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return 0
    columns = [one for one in _COLUMNS if one in schema.names and _is_text(schema.field(one).type)]
    of_things = "kind" in schema.names and "id" in schema.names and _is_text(schema.field("id").type)
    if not columns and not of_things:
        return 0
    table, ids = pq.read_table(path), pa.array(sorted(users), pa.string())
    named = [pc.is_in(table[one].cast(pa.string()), value_set=ids) for one in columns]
    if of_things:
        user = pc.equal(table["kind"].cast(pa.string()), "user")
        named.append(pc.and_(user, pc.is_in(table["id"].cast(pa.string()), value_set=ids)))
    gone = named[0]
    for one in named[1:]:
        gone = pc.or_(gone, one)
    left = table.filter(pc.invert(gone))
    num = len(table) - len(left)
    if num:
        new = path.with_name(path.name + ".new")
        pq.write_table(left, new)
        new.replace(path)
    return num


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _renew_digest(path: Path) -> None:
    manifest = path.parent / MANIFEST
    if manifest.is_file() and path.name in json.loads(manifest.read_text()):
        renew_digests(manifest, {path.name: digest_of(path)})


# --- what is said -----------------------------------------------------------------------------------------------------


def _lines(receipt: Receipt) -> list[str]:
    lake = receipt.lake
    tables = ", ".join(f"{name} {num:,}" for name, num in lake["rows"].items() if num)
    found = bool(tables or receipt.models or receipt.files)
    lines = [f"forgotten: {len(receipt.users):,} user(s)" + ("" if found else "; nothing names them: is the id right?")]
    lines += [f"lake: rows of {tables or 'no table'}; {lake['texts']:,} rejected rows emptied"]
    lines += [
        f"lake: release {lake['release']} is the only one left; {lake['files']:,} old files and {lake['entries']:,} "
        "log entries deleted"
    ]
    lines += [f"models: users' rows out of {len(receipt.models):,}"]
    lines += [f"files with a row a user: {sum(receipt.files.values()):,} rows out of {len(receipt.files):,}"]
    if receipt.shared:
        lines.append(
            f"not removed: {len(receipt.shared):,} models were trained on this lake, and the weights that all users "
            "share can't unlearn anybody; train them again without the users where that is owed"
        )
    return lines + [f"by hand: {line}" for line in receipt.by_hand]
