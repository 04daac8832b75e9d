"""Recipe: list, and with `--apply true` remove, what nothing needs: old releases, files of writes that died, abandoned
runs, records that no server took.

    python -m trainer maintain --lake LAKE --runs RUNS [--apply true]
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from etl.lake.small_files import read_file
from etl.maintenance import forget, removal
from etl.plain_path import absolute
from etl.program import spelled
from etl.text_table import aligned
from trainer import tracking
from trainer.config import MaintainConfig
from trainer.inference.model_folder import lake_of, release_of
from trainer.recipes.run_folder import DONE
from trainer.registry import Registry

_DAY = 86_400.0


@dataclass
class Maintained:
    """What was found, and, where it was applied, removed. `abandoned`: folders with checkpoints; `ended`: names of
    MLflow runs that say they are at work and aren't; `unsent`: runs with records that no server has taken."""

    lake: removal.Removal
    abandoned: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)
    unsent: int = 0
    unsent_left: int = 0
    applied: bool = False


def run(config: MaintainConfig) -> Maintained:
    """The recipe `maintain`. Raises GraftrecError."""
    has_store = config.tracking.enabled and tracking.is_there()
    keep = _registered(config) if config.keep_registered and has_store else set()
    lake = removal.remove(
        config.lake,
        keep_releases=config.keep_releases,
        older_than_seconds=3_600 * config.older_than_hours,
        keep=keep,
        apply=config.apply,
        wait_seconds=config.wait_seconds,
    )
    result = Maintained(lake, applied=config.apply)
    for folder in _abandoned(Path(config.runs), config.abandoned_days * _DAY):
        result.abandoned[str(folder)] = _bytes(folder / "checkpoints")
        if config.apply:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if has_store:
        unsent = Path(config.tracking.unsent).absolute()
        result.unsent = result.unsent_left = len(tracking.kept(unsent))
        result.ended = tracking.abandoned_runs(config.tracking)
        if config.apply:
            tracking.settle(config.tracking)
            result.unsent_left = len(tracking.kept(unsent))
    print("\n".join(_lines(config, result)), flush=True)
    return result


def _registered(config: MaintainConfig) -> set[int]:
    """Releases of this lake that versions with an alias were trained on."""
    found: set[int] = set()
    for name in tracking.registered_models():
        registry = Registry(name)
        for version in registry.versions():
            if version.aliases:
                found |= _release_of(registry.folder(version), config.lake)
    return found


def _release_of(folder: Path, lake: str) -> set[int]:
    return {release_of(folder)} if absolute(lake_of(folder)) == absolute(lake) else set()


def _abandoned(runs: Path, older_than_seconds: float) -> Iterator[Path]:
    """Folders of trainings that have not ended, that nobody trains in, and nobody has touched lately."""
    now = time.time()
    for checkpoints in sorted(runs.rglob("checkpoints")) if runs.is_dir() else ():
        folder = checkpoints.parent
        if not checkpoints.is_dir() or (folder / DONE).exists() or not (folder / "identity").is_file():
            continue
        newest = max((path.stat().st_mtime for path in checkpoints.rglob("*")), default=checkpoints.stat().st_mtime)
        if now - newest < older_than_seconds:
            continue
        with tracking.file_lock(folder / "lock", wait=False) as free:
            if free:
                yield folder


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _lines(config: MaintainConfig, result: Maintained) -> list[str]:
    lake = result.lake
    verb = "removed" if result.applied else "to remove"
    read = "".join(f"; {number} is read by {', '.join(who)}" for number, who in sorted(lake.read.items()))
    lines = [
        f"releases kept     {', '.join(map(str, lake.kept)) or 'none'}{read}",
        f"releases {verb:<10}{', '.join(map(str, lake.removed)) or 'none'}",
        f"files {verb:<13}{sum(lake.files.values()):,}, {_megabytes(lake.bytes_freed)}",
    ]
    rows = [["table", "before", "files"]]
    rows += [[name, _megabytes(size), str(lake.files.get(name, 0))] for name, size in sorted(lake.tables.items())]
    lines += [f"  {line}" for line in aligned(rows)]
    lines += [f"lake              {_megabytes(lake.bytes_before)} → {_megabytes(lake.bytes_before - lake.bytes_freed)}"]
    lines += [f"abandoned runs    {len(result.abandoned):,}, {_megabytes(sum(result.abandoned.values()))}"]
    lines += [f"  {folder}: {_megabytes(size)} of checkpoints" for folder, size in result.abandoned.items()]
    lines += [f"MLflow runs       {len(result.ended):,} say they are at work and aren't"]
    sent = result.unsent - result.unsent_left
    lines += [f"unsent            {result.unsent:,} runs" + (f", {sent:,} sent now" if result.applied else "")]
    if read_file(config.lake, forget.JOURNAL) is not None:
        lines.append(f"a forgetting has not ended: run `{spelled('trainer', 'forget')}` with its users again")
    if not result.applied:
        lines.append("nothing was removed; add --apply true")
    return lines


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
