"""Recipe: where one recommendation came from: its row, the model version, the run that trained it, the releases that it
was trained on and that were read, the deliveries, and the user's events with file and line.

    python -m trainer explain --user U --item I --lake LAKE
"""

import datetime as dt
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from etl.maintenance.lineage import Event, deliveries, events_of, recommendations_of, release_of
from etl.program import spelled
from etl.settings import GraftrecError
from trainer import tracking
from trainer.config import ExplainConfig, required
from trainer.inference.model_folder import config_of
from trainer.inference.model_folder import release_of as release_of_model
from trainer.registry import Registry, Version
from trainer.social.friends_folder import friends_config, is_friends

_ORDINAL_BELOW = 10**12  # microseconds: a time before 1970-01-12 is mere order


@dataclass
class Explanation:
    """What is known of one row of `recommendations`; parts that are gone are empty."""

    row: dict[str, Any]
    of: int  # rows of the user's list
    model: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)  # release
    read: dict[str, Any] = field(default_factory=dict)  # release
    deliveries: list[dict[str, Any]] = field(default_factory=list)  # with `events` of the user
    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(config: ExplainConfig) -> Explanation:
    """The recipe `explain`. Raises GraftrecError where there is no such row."""
    required(config, "user", "item")
    row, of = _row(config)
    found = Explanation(row, of)
    if config.tracking.enabled and tracking.is_there():
        _model(config, found)
    else:
        found.notes.append("no MLflow store here: set MLFLOW_TRACKING_URI to the one that has the model")
    read = release_of(config.lake, row["release"])
    if read is None:
        found.notes.append(f"release {row['release']} is not in the table of releases")
    else:
        found.read = _release_facts(read)
    events, version, is_released = events_of(config.lake, config.user, read)
    if not is_released:
        found.notes.append(
            f"files of release {row['release']} are gone: events are those of interactions version {version}"
        )
    found.events = events
    brought = Counter((event.path, event.interactions) for event in events)
    found.deliveries = [
        one | {"events": brought[one["path"], one["interactions"]]}
        for one in deliveries(config.lake)
        if brought[one["path"], one["interactions"]]
    ]
    if config.output == "json":
        print(json.dumps(asdict(found), ensure_ascii=False, default=str), flush=True)
    else:
        print("\n".join(_lines(config, found)), flush=True)
    return found


def _row(config: ExplainConfig) -> tuple[dict[str, Any], int]:
    rows = recommendations_of(config.lake, config.user)
    if config.domain is not None:
        rows = [row for row in rows if row["domain"] == config.domain]
    if not rows:
        raise GraftrecError(
            f"user: expected one with recommendations in {config.lake}, found none for {config.user!r}; mend the id, "
            f"or run `{spelled('trainer', 'recommend')}`"
        )
    chosen = next((row for row in rows if row["item"] == config.item), None)
    if chosen is None:
        there = ", ".join(row["item"] for row in rows[:20])
        raise GraftrecError(
            f"item: expected one that is recommended to {config.user!r} ({there}), found {config.item!r}"
        )
    return chosen, sum(row["domain"] == chosen["domain"] for row in rows)


def _model(config: ExplainConfig, found: Explanation) -> None:
    name, _, number = str(found.row["model_version"]).rpartition("/")
    if name == "unregistered":
        found.model = {"version": found.row["model_version"]}
        found.notes.append("the model is a folder that is no registered version, so its run is not known")
        return
    versions = Registry(name).versions()
    version = next((one for one in versions if str(one.number) == number), None)
    if version is None:
        found.model = {"version": found.row["model_version"]}
        found.notes.append(f"the store has no version {found.row['model_version']} any more")
        return
    found.model = {"version": version.label, "aliases": list(version.aliases), "hash": version.hash}
    _trained(config, Registry(name), version, found)
    run_id = version.run_id or tracking.run_of_model(version.hash)
    facts = tracking.run_facts(run_id) if run_id else None
    if facts is None:
        found.notes.append(f"the run that trained {version.label} is not known to the store")
    else:
        found.run = {"id": facts.id, "name": facts.name, "started": facts.started, "status": facts.status}
        found.run |= {name: value for name, value in facts.tags.items() if name in ("code.commit", "lake", "release")}


def _trained(config: ExplainConfig, registry: Registry, version: Version, found: Explanation) -> None:
    folder = registry.folder(version)
    if is_friends(folder):
        number, parent = int(friends_config(folder)[1]["release"]), None
    else:
        number, parent = release_of_model(folder), config_of(folder)[1]
    if parent is not None:
        of_parent = registry.of_hash(parent)
        found.model["parent"] = of_parent.label if of_parent is not None else parent
    row = release_of(config.lake, number)
    found.trained_on = {"release": number} if row is None else _release_facts(row)


def _release_facts(row: dict[str, Any]) -> dict[str, Any]:
    created = dt.datetime.fromtimestamp(row["created"] / 10**6, dt.UTC).isoformat(timespec="seconds")
    facts = {"release": row["release"], "created": created, "versions": row["versions"]}
    facts |= {"config_hash": row["config_hash"], "code_version": row["code_version"]}
    return facts | ({"removed": row["removed"]} if row.get("removed") else {})


# --- as text ----------------------------------------------------------------------------------------------------------


def _lines(config: ExplainConfig, found: Explanation) -> list[str]:
    row = found.row
    lines = [
        f"recommended   {row['item']} to {row['user']} in {row['domain']}: rank {row['rank']} of {found.of}, score "
        f"{row['score']:.4f} (recommendations version {row['version']})"
    ]
    aliases = "".join(f" @{alias}" for alias in found.model.get("aliases", ()))
    parent = f", grafted on {found.model['parent']}" if "parent" in found.model else ""
    lines.append(f"model         {row['model_version']}{aliases}{parent}")
    if found.run:
        commit = f", code {found.run['code.commit'][:12]}" if "code.commit" in found.run else ""
        lines.append(f"run           {found.run['name']} ({found.run['id']}), {found.run['started']}{commit}")
    for heading, release in (("trained on", found.trained_on), ("read", found.read)):
        if release:
            lines.append(f"{heading:<14}release {release['release']}{_created(release)}")
    for one in found.deliveries:
        of_table = f" version {one['table_version']}" if one["table_version"] is not None else ""
        delivered = dt.datetime.fromtimestamp(one["delivered"] / 10**6, dt.UTC).isoformat(timespec="seconds")
        lines.append(
            f"delivery      {one['path']}{of_table}, {delivered}: {one['rows']:,} rows, {one['rejects']:,} rejected, "
            f"{one['events']:,} of this user; interactions version {one['interactions']}"
        )
    shown = found.events[-config.events :] if config.events else []
    if len(shown) < len(found.events):
        lines.append(f"events        {len(found.events):,}, the last {len(shown):,}:")
    lines += [
        f"event         {_time(one.time)} {one.event_type or ''} {one.item}".rstrip()
        + (f"  {one.path} line {one.line:,}" if one.path else "")
        for one in shown
    ]
    return lines + [f"note          {note}" for note in found.notes]


def _created(release: dict[str, Any]) -> str:
    gone = f", removed {release['removed']}" if "removed" in release else ""
    return f", created {release['created']}{gone}" if "created" in release else ""


def _time(time: int) -> str:
    if abs(time) < _ORDINAL_BELOW:
        return str(time)
    return dt.datetime.fromtimestamp(time / 10**6, dt.UTC).isoformat(sep=" ", timespec="seconds")
