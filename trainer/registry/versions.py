"""Registered model versions: register, aliases, the model folder of a version, and the lock that promoters take.

A version holds an MLflow model made of code and JSON (`pyfunc.py`) around a model folder (`model_folder.py`). Aliases,
not stages: `candidate` (registered last), `champion` (served), `previous` (champion before), `companion` (reads all
domains, and answers where the champion knows nothing of a user). A few tags hold what code looks up; what people read
is the version's description, and the metrics of its logged model.
"""

import atexit
import contextlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow.parquet as pq

from etl.redaction import redact
from etl.tables import FIRST_INDEX
from trainer import tracking
from trainer.config import PretrainConfig, TrackingConfig, patch_of
from trainer.data.release import Release
from trainer.inference.delta_folder import PATCH, assemble, write_patch
from trainer.inference.model_folder import CATALOGUE, MANIFEST, config_of, load_model, model_hash
from trainer.registry import descriptions
from trainer.registry.promotion_lock import ServerLock, all_pages, wait
from trainer.tracking import TrackingError, translated

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
COMPANION = "companion"  # for users of whom the champion, which reads its own domain, knows no item
TAG_HASH = tracking.MODEL_HASH  # of the model folder
TAG_PARENT = "graftrec.parent"  # hash of the model it was grafted on
TAG_KIND = "graftrec.kind"  # full | patch: what it has beside its parent, a version too
TAG_DOMAIN = "graftrec.domain"  # whose items it predicts
TAG_FAMILY = "graftrec.family"  # its registered model is one of <family>-<domain>, one for each domain
MODEL_FOLDER = "model"  # of the model folder among the artifacts of the MLflow model
AUDIT_CHARACTERS = 4_500  # of one tag; what is longer goes on in the next


@dataclass(frozen=True)
class Version:
    """One version of a registered model. `label` is what answers and tables say: "graftrec/3"."""

    name: str
    number: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str  # of the run that trained it; "" where that is unknown
    description: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.number}"

    @property
    def hash(self) -> str:
        return self.tags.get(TAG_HASH, "")


class Registry:
    """The versions of one registered model in the store of $MLFLOW_TRACKING_URI. Methods raise TrackingError.

    `family`: registered models of the same log, `<family>-<domain>`, are found from each other: patches for several
    domains share one version of their parent, and whoever serves one domain can ask for another's champion.
    """

    def __init__(self, name: str = "graftrec", *, family: str = "") -> None:
        if not name or any(character in name for character in "/:@"):
            raise TrackingError(f"a registered model's name has none of / : @ and is not empty, found {name!r}")
        self.name, self.family, self.uri = name, family, tracking.tracking_uri()
        self._assembled: dict[str, Path] = {}  # of patches: hash -> whole folder
        with self._asking("can't reach the registry"):
            self._client = tracking.connect(self.uri)

    # --- versions -----------------------------------------------------------------------------------------------------

    def register(
        self,
        folder: str | Path,
        *,
        run_id: str = "",
        tags: Mapping[str, str] | None = None,
        alias: str | None = CANDIDATE,
    ) -> Version:
        """A version of a model folder; the one there is, where this very model is registered already, or another
        process registers it meanwhile.

        Of one that was fine-tuned by patches, a small version: what it has beside its parent, which is registered
        before it where it isn't yet.
        """
        digest = model_hash(folder)
        known = self._own(digest)
        if known is None:
            parent = self._parent_of(Path(folder))
            with self._alone("register"):
                known = self._own(digest) or self._add(Path(folder), digest, run_id, dict(tags or {}), parent)
        if tags:
            self.set_tags(known.number, tags)
        if alias is not None:
            self.set_alias(alias, known.number)
        return self.version(str(known.number))

    def _own(self, digest: str) -> Version | None:
        """The first version that holds the model of that hash."""
        return next((version for version in reversed(self.versions()) if version.hash == digest), None)

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Hold a lock of this model where the store is local."""
        path = self._lock_file(what)
        with contextlib.nullcontext() if path is None else tracking.file_lock(path):
            yield

    def _lock_file(self, what: str) -> Path | None:
        """Of this model; None where the store is a server."""
        folder = tracking.local_folder(self.uri)
        number = uuid.uuid5(uuid.NAMESPACE_URL, self.name).hex[:12]
        return None if folder is None else folder / f"mlflow.db.{what}-{number}.lock"

    def _parent_of(self, folder: Path) -> Path | None:
        """The model folder of a patch's parent; None for what is no patch."""
        config, parent = config_of(folder)
        if patch_of(config) is None:
            return None
        assert parent is not None
        return self._parent_folder(folder, parent, str(getattr(config, "parent", "")))

    def _add(
        self, folder: Path, digest: str, run_id: str, tags: dict[str, str], parent_folder: Path | None = None
    ) -> Version:
        config, parent = config_of(folder)
        kind = "full" if parent_folder is None else "patch"
        own = {TAG_HASH: digest, TAG_KIND: kind, TAG_DOMAIN: config.data.answered}
        if self.family:
            own[TAG_FAMILY] = self.family
        if parent_folder is not None:
            own[TAG_PARENT] = str(parent)
        every = own | {key: redact(value) for key, value in tags.items()}
        with self._asking(f"can't register {folder} as {self.name}"), tempfile.TemporaryDirectory() as scratch:
            example = _example(folder, config)
            description = descriptions.version(load_model(folder, users=False))
            self._create_registered_model(config)
            logged = self._logged_model(digest, run_id)
            run_id = logged.source_run_id or ""
            packed = Path(scratch) / "packed"
            if parent_folder is not None:
                write_patch(folder, parent_folder, Path(scratch) / "patch")
                folder = Path(scratch) / "patch"
            tracking.pack(
                folder, packed, artifact=MODEL_FOLDER, model_id=logged.model_id, run_id=run_id or None, example=example
            )
            self._client.log_model_artifacts(logged.model_id, str(packed))
            self._client.finalize_logged_model(logged.model_id, "READY")
            made = self._client.create_model_version(
                self.name,
                f"models:/{logged.model_id}",
                run_id=run_id or None,
                tags=every,
                model_id=logged.model_id,
                description=tracking.resolved(self._client, redact(description)),
            )
            # A server has no lock: of two processes the one whose version came first keeps it.
            first = self._own(digest)
            if first is not None and first.number < int(made.version):
                self._client.delete_model_version(self.name, made.version)
                return first
            registered = json.dumps([{"name": self.name, "version": str(made.version)}])
            self._client.set_logged_model_tags(logged.model_id, {tracking.VERSIONS: registered})
        return self._version(made)

    def _create_registered_model(self, config: PretrainConfig) -> None:
        description = descriptions.registered_model(self.name, config.data.answered)
        with contextlib.suppress(Exception):  # there is one already, or another process has just made it
            self._client.create_registered_model(self.name, description=description)

    def _logged_model(self, digest: str, run_id: str) -> Any:
        """The logged model of the run that trained it; a new one if there is none, or if it holds a registered version,
        whose files must not change."""
        found = tracking.models_of(self._client, digest)
        for model in found:
            if tracking.VERSIONS not in model.tags and (not run_id or model.source_run_id == run_id):
                return model
        run_id = run_id or next((model.source_run_id for model in found if model.source_run_id), "")
        return self._client.create_logged_model(
            self._experiment(run_id),
            name=tracking.model_name(self.name),
            source_run_id=run_id or None,
            tags={TAG_HASH: digest},
        )

    def _parent_folder(self, folder: Path, parent: str, trained_on: str) -> Path:
        """That of a patch's parent, registered now if it wasn't."""
        known = self.of_hash(parent)
        if known is None:
            place = Path(trained_on)
            if not (place / MANIFEST).is_file() or model_hash(place) != parent:
                raise TrackingError(
                    f"{folder} is a patch for the model {parent[:12]}, which is no version of {self.name} and isn't in "
                    f"{place} any more; register that model first"
                )
            holder = self
            if self.family:
                holder = Registry(f"{self.family}-{config_of(place)[0].data.answered}", family=self.family)
            known = holder.register(place, alias=None)
        return self.folder(known)

    def of_hash(self, digest: str) -> Version | None:
        """The version that holds the model of that hash, if any: of this registered model, else of another."""
        return self._own(digest) or next(iter(self._tagged(TAG_HASH, digest)), None)

    def _tagged(self, tag: str, value: str) -> list[Version]:
        """Versions of any registered model with that tag, newest first."""
        with self._asking("can't search versions"):
            found = all_pages(self._client.search_model_versions, _is(f"tags.`{tag}`", value))
        exact = [entry for entry in found if entry.tags.get(tag) == value]
        return sorted((self._version(entry) for entry in exact), key=lambda version: (version.name, -version.number))

    def holder(self, version: Version) -> "Registry":
        """The registry of the registered model that a version belongs to."""
        if version.name == self.name:
            return self
        return Registry(version.name, family=version.tags.get(TAG_FAMILY, ""))

    def patches(self, parent: Version) -> dict[str, Version]:
        """Of each domain, the newest patch that stands on that version."""
        found: dict[str, Version] = {}
        for version in self.versions():
            if version.tags.get(TAG_KIND) == "patch" and version.tags.get(TAG_PARENT) == parent.hash:
                found.setdefault(version.tags.get(TAG_DOMAIN, ""), version)
        return found

    def for_domain(self, version: Version, domain: str) -> Version:
        """The version that predicts a domain: `version` itself if it does; in a family, that domain's champion; else a
        patch of the same parent. `version` if there is none."""
        if version.tags.get(TAG_DOMAIN, domain) == domain:
            return version
        if family := version.tags.get(TAG_FAMILY, ""):
            champion = Registry(f"{family}-{domain}", family=family).find(CHAMPION)
            return champion or version
        parent = version
        if version.tags.get(TAG_KIND) == "patch":
            parent = self.of_hash(version.tags[TAG_PARENT]) or version
        if parent.tags.get(TAG_DOMAIN) == domain:
            return parent
        return self.patches(parent).get(domain, version)

    def companion(self, version: Version) -> Version | None:
        """The version beside `version` for users of whom that one knows no item: at the alias `companion`, where it
        predicts the same domain. None where there is none."""
        found = self.holder(version).find(COMPANION)
        if found is None or found.number == version.number:
            return None
        return found if found.tags.get(TAG_DOMAIN) == version.tags.get(TAG_DOMAIN) else None

    def _experiment(self, run_id: str) -> str:
        if run_id:
            return str(self._client.get_run(run_id).info.experiment_id)
        return tracking.experiment_id(self._client, TrackingConfig())

    def versions(self) -> list[Version]:
        """All, newest first; none where nothing is registered."""
        with self._asking("can't list versions"):
            found = all_pages(self._client.search_model_versions, _is("name", self.name))
            aliases = self._aliases()
        own = [entry for entry in found if entry.name == self.name]
        return sorted((self._version(entry, aliases) for entry in own), key=lambda version: -version.number)

    def find(self, alias: str) -> Version | None:
        """The version an alias stands at, if any."""
        return next((version for version in self.versions() if alias in version.aliases), None)

    def version(self, reference: str) -> Version:
        """The version of a number ("3") or alias ("champion", "@champion")."""
        wanted = reference.removeprefix("@")
        versions = self.versions()
        for version in versions:
            if wanted == str(version.number) or wanted in version.aliases:
                return version
        there = ", ".join(f"{v.number}{''.join(f' @{a}' for a in v.aliases)}" for v in versions[:10]) or "nothing"
        raise TrackingError(
            f"no version or alias {wanted!r} of the registered model {self.name}, it has {there}; register one first"
        )

    def folder(self, version: Version) -> Path:
        """The model folder of a version: in place where the store is local, else a copy that ends with this process; of
        a patch, one put together with its parent's."""
        if version.name != self.name:
            return self.holder(version).folder(version)
        found = self.stored(version)
        if not (found / PATCH).is_file():
            return found
        if version.hash not in self._assembled:
            parent = self.of_hash(version.tags[TAG_PARENT])
            if parent is None:
                raise TrackingError(f"{version.label} is a patch, and its parent is no version of {self.name} any more")
            whole = Path(_scratch()) / "model"
            assemble(found, self.folder(parent), whole)
            self._assembled[version.hash] = whole
        return self._assembled[version.hash]

    def stored(self, version: Version) -> Path:
        """What the store holds of a version: a model folder, or a patch (`trainer/inference/delta_folder.py`)."""
        if version.name != self.name:
            return self.holder(version).stored(version)
        with self._asking(f"can't fetch {version.label}"):
            uri = self._client.get_model_version_download_uri(self.name, str(version.number))
            place = urlparse(uri)
            if place.scheme in ("", "file"):
                folder = Path(unquote(place.path))
            else:
                folder = Path(tracking.download(f"models:/{self.name}/{version.number}", _scratch(), self.uri))
        artifacts = folder / "artifacts"  # MLflow keeps the name that the folder had
        inside = [*sorted(artifacts.glob(f"*/{MANIFEST}")), *sorted(artifacts.glob(f"*/{PATCH}"))]
        if len(inside) != 1:
            raise TrackingError(
                f"{version.label} holds no model folder: expected one in {folder}/artifacts; register it again"
            )
        return inside[0].parent

    def delete(self, number: int) -> None:
        """Delete a version for ever. Refused while an alias stands at it, or while it is the parent of patches."""
        version = self.version(str(number))
        if version.aliases:
            raise TrackingError(f"{version.label} is @{', @'.join(version.aliases)}: move the alias before deleting it")
        patches = []
        if version.hash:
            of_parent = self._tagged(TAG_PARENT, version.hash)
            patches = [other for other in of_parent if other.tags.get(TAG_KIND) == "patch"]
        if patches:
            raise TrackingError(
                f"{version.label} is the parent of {', '.join(v.label for v in patches)}: delete those first"
            )
        with self._asking(f"can't delete {version.label}"):
            self._client.delete_model_version(self.name, str(number))

    # --- aliases and tags ---------------------------------------------------------------------------------------------

    def set_alias(self, alias: str, number: int) -> None:
        with self._asking(f"can't set the alias {alias} of {self.name}"):
            self._client.set_registered_model_alias(self.name, alias, str(number))

    def drop_alias(self, alias: str) -> None:
        """Remove an alias; nothing happens where it stands at no version."""
        with self._asking(f"can't remove the alias {alias} of {self.name}"):
            self._client.delete_registered_model_alias(self.name, alias)

    def set_tags(self, number: int, tags: Mapping[str, str]) -> None:
        with self._asking(f"can't tag {self.name}/{number}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, str(number), key, redact(value))

    def describe(self, number: int, heading: str, text: str) -> None:
        """Set the last section of a version's description, under a heading; replaces an earlier one."""
        with self._asking(f"can't describe {self.name}/{number}"):
            before = (self._client.get_model_version(self.name, str(number)).description or "").partition(heading)[0]
            text = tracking.resolved(self._client, redact(text))
            self._client.update_model_version(
                self.name, str(number), descriptions.paragraphs(before.rstrip(), heading, text)
            )

    def log_metrics(self, version: Version, metrics: Mapping[str, float], release: Release, table: str) -> None:
        """Metrics of a version's model on a snapshot, shown on the pages of its logged model and of its run."""
        now = int(time.time() * 1000)
        values = [[tracking.metric_name(name), value, now, 0] for name, value in metrics.items()]
        with self._asking(f"can't log metrics of {version.label}"):
            tracking.log_model_metrics(self._client, version.hash, values, tracking.snapshot(release, table))

    def audit(self, number: int, entry: Mapping[str, Any]) -> None:
        """Add an entry to a version's audit trail: JSON lists in the tags graftrec.audit, graftrec.audit.2… Under the
        promotion lock only."""
        trail = {key: value for key, value in self.version(str(number)).tags.items() if _AUDIT.fullmatch(key)}
        part = max(len(trail), 1)
        entries = [*json.loads(trail.get(_audit_tag(part), "[]")), dict(entry)]
        if len(json.dumps(entries, ensure_ascii=False)) > AUDIT_CHARACTERS and len(entries) > 1:
            part, entries = part + 1, entries[-1:]
        self.set_tags(number, {_audit_tag(part): json.dumps(entries, ensure_ascii=False)})

    # --- one promoter at a time ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def promoting(self, *, wait_seconds: float = 900.0) -> Iterator["Promotion"]:
        """Hold this model's promotion lock; waits for another promoter. Raises TrackingError after `wait_seconds`.

        A local store has a lock file, which the kernel frees when a promoter dies. A server has none, and no
        compare-and-set: there the lock is a chain of registered models, since making one of a name that exists fails.
        """
        path = self._lock_file("promote")
        if path is None:
            lock = ServerLock(self._client, self.name)
            wait(lock.acquire, self.name, wait_seconds)
            try:
                yield Promotion(self, lock)
            finally:
                with contextlib.suppress(Exception):  # a lock that stays runs out
                    lock.release()
            return
        with contextlib.ExitStack() as stack:

            def acquire() -> bool:
                with contextlib.ExitStack() as attempt:
                    if attempt.enter_context(tracking.file_lock(path, wait=False)):
                        stack.push(attempt.pop_all())
                        return True
                return False

            wait(acquire, self.name, wait_seconds)
            yield Promotion(self, None)

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        tracking.quieten()
        with translated(what):
            yield

    def _aliases(self) -> dict[str, str]:
        with contextlib.suppress(Exception):  # no such model yet
            return dict(self._client.get_registered_model(self.name).aliases)
        return {}

    def _version(self, entry: Any, aliases: Mapping[str, str] | None = None) -> Version:
        at = tuple(sorted(alias for alias, number in (aliases or {}).items() if str(number) == str(entry.version)))
        return Version(
            str(entry.name), int(entry.version), at, dict(entry.tags), entry.run_id or "", entry.description or ""
        )


def audit_trail(version: Version) -> list[dict[str, Any]]:
    """What happened to a version (promoted, refused, replaced, rolled back, restored), oldest first."""
    parts = sum(_AUDIT.fullmatch(key) is not None for key in version.tags)
    return [entry for part in range(1, parts + 1) for entry in json.loads(version.tags[_audit_tag(part)])]


_AUDIT = re.compile(r"graftrec\.audit(\.\d+)?")


def _audit_tag(part: int) -> str:
    return "graftrec.audit" if part == 1 else f"graftrec.audit.{part}"


def _example(folder: Path, config: PretrainConfig) -> dict[str, Any]:
    """A request that the model knows: its three most popular items, as a history."""
    rows = pq.read_table(folder / CATALOGUE, columns=["item", "popularity"]).slice(FIRST_INDEX)
    popular = rows.sort_by([("popularity", "descending")])["item"].slice(0, 3).to_pylist()
    forms = {"items": popular, "baskets": [popular[:2], popular[2:]]}
    return {config.task.needs.request: forms[config.task.needs.request]}


def _scratch() -> str:
    """A folder that ends with this process."""
    scratch = tempfile.mkdtemp(prefix="graftrec-model-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def _is(what: str, value: str) -> str:
    """A filter of MLflow for a value; where that has characters which the filter can't hold, it finds more than that
    value. LIKE takes "_" for any character, and there is no way to escape it."""
    if re.fullmatch(r"[\w .-]*", value):
        return f"{what} = '{value}'"
    return f"{what} LIKE '{re.sub(r'[^a-zA-Z0-9 .-]', '_', value)}'"


class Promotion:
    """What the holder of the promotion lock may do. It makes sure that the lock is still held before every write."""

    def __init__(self, registry: Registry, lock: "ServerLock | None") -> None:
        self._registry, self._lock = registry, lock

    def move(self, alias: str, number: int | None) -> None:
        """Set an alias to a version, or remove it."""
        if self._lock is not None:
            self._lock.check()
        if number is None:
            self._registry.drop_alias(alias)
        else:
            self._registry.set_alias(alias, number)

    def crown(self, number: int) -> int | None:
        """Make a version the champion and the old one `previous`; returns the old one's number.

        `previous` moves first: a promoter that dies in between leaves the old champion serving.
        """
        old = self._registry.find(CHAMPION)
        if old is not None and old.number == number:
            return None
        if old is not None:
            self.move(PREVIOUS, old.number)
        self.move(CHAMPION, number)
        return None if old is None else old.number
