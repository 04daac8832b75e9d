"""Registered model versions: register, aliases, the model folder of a version, and the lock that promoters take.

A version holds an MLflow model made of code and JSON (`model_script.py`) around the archives of a model folder
(`model_archive.py`). Aliases,
not stages: `candidate` (registered last), `champion` (served), `previous` (champion before), `companion` (reads all
domains, and answers where the champion knows nothing of a user), `friends` (ranks what friends have, and answers where
neither does). A few tags hold what code looks up; what people read
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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from etl.redaction import redact
from etl.tables import FIRST_INDEX
from trainer import tracking
from trainer.config import patch_of
from trainer.data.release import Release
from trainer.inference.delta_folder import PATCH, assemble, write_patch
from trainer.inference.model_archive import MODEL, unarchived
from trainer.inference.model_folder import CATALOGUE, MAX_INDEX, config_of, load_model, model_hash, verified_model
from trainer.registry import descriptions
from trainer.registry.promotion import Promotion
from trainer.registry.promotion_lock import ServerLock, all_pages, wait
from trainer.registry.registration import create_registered_model, create_version, logged_model
from trainer.registry.version import (
    CANDIDATE,
    CHAMPION,
    COMPANION,
    FRIENDS,
    TAG_DOMAIN,
    TAG_FAMILY,
    TAG_HASH,
    TAG_KIND,
    TAG_PARENT,
    Version,
    audit_tags,
)
from trainer.social.friends_folder import friends_config, is_friends
from trainer.tracking import TrackingError, translated
from trainer.trust.verified_files import MANIFEST

_EXAMPLE_OF_FRIENDS = {"items": [], "friends": ["1", "2"]}  # a request that names nobody: users are personal data


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
        self._unpacked: dict[str, Path] = {}  # hash -> what the store holds of a version
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
        if is_friends(folder):
            return None
        config, parent = config_of(folder)
        if patch_of(config) is None:
            return None
        assert parent is not None
        return self._parent_folder(folder, parent, str(getattr(config, "parent", "")))

    def _add(
        self, folder: Path, digest: str, run_id: str, tags: dict[str, str], parent_folder: Path | None = None
    ) -> Version:
        of_friends = is_friends(folder)
        domain, parent = (friends_config(folder)[0].domain, None) if of_friends else _answered(folder)
        kind = "friends" if of_friends else "full" if parent_folder is None else "patch"
        own = {TAG_HASH: digest, TAG_KIND: kind, TAG_DOMAIN: domain}
        if self.family:
            own[TAG_FAMILY] = self.family
        if parent_folder is not None:
            own[TAG_PARENT] = str(parent)
        every = own | {key: redact(value) for key, value in tags.items()}
        with self._asking(f"can't register {folder} as {self.name}"), tempfile.TemporaryDirectory() as scratch:
            example = _EXAMPLE_OF_FRIENDS if of_friends else _example(folder)
            if of_friends:
                description = descriptions.friends_version(*friends_config(folder))
            else:
                description = descriptions.version(load_model(folder, users=False))
            create_registered_model(self._client, self.name, domain)
            logged = logged_model(self._client, self.name, digest, run_id)
            if parent_folder is not None:
                write_patch(folder, parent_folder, Path(scratch) / "patch")
                folder = Path(scratch) / "patch"
            made = create_version(
                self._client, self.name, logged, folder, example=example, tags=every, description=description
            )
            # A server has no lock: of two processes the one whose version came first keeps it.
            first = self._own(digest)
            if first is not None and first.number < int(made.version):
                self._client.delete_model_version(self.name, made.version)
                return first
            registered = json.dumps([{"name": self.name, "version": str(made.version)}])
            self._client.set_logged_model_tags(logged.model_id, {tracking.VERSIONS: registered})
        return self._version(made)

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
        if not digest:
            return None
        return self._own(digest) or next(iter(self._tagged(TAG_HASH, digest)), None)

    def of_any_hash(self, digest: str) -> list[Version]:
        """Versions of all registered models that hold the model of that hash."""
        return self._tagged(TAG_HASH, digest)

    def _tagged(self, tag: str, value: str) -> list[Version]:
        """Versions of any registered model with that tag, newest first."""
        with self._asking("can't search versions"):
            found = all_pages(self._client.search_model_versions, _is(f"tags.`{tag}`", value))
            every = [self._version(entry) for entry in found]
        exact = [version for version in every if version.tags.get(tag) == value]
        return sorted(exact, key=lambda version: (version.name, -version.number))

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
            parent = self.of_hash(version.tags.get(TAG_PARENT, "")) or version
        if parent.tags.get(TAG_DOMAIN) == domain:
            return parent
        return self.patches(parent).get(domain, version)

    def companion(self, version: Version) -> Version | None:
        """The version beside `version` for users of whom that one knows no item: at the alias `companion`, where it
        predicts the same domain. None where there is none."""
        return self._beside(version, COMPANION)

    def friends(self, version: Version) -> Version | None:
        """The attention over friends beside `version`, at the alias `friends`, where it ranks the same domain."""
        return self._beside(version, FRIENDS)

    def _beside(self, version: Version, alias: str) -> Version | None:
        found = self.holder(version).find(alias)
        if found is None or found.number == version.number:
            return None
        return found if found.tags.get(TAG_DOMAIN) == version.tags.get(TAG_DOMAIN) else None

    def versions(self) -> list[Version]:
        """All, newest first; none where nothing is registered."""
        with self._asking("can't list versions"):
            found = all_pages(self._client.search_model_versions, _is("name", self.name))
            aliases = self._aliases()
            own = [self._version(entry, aliases) for entry in found if entry.name == self.name]
        return sorted(own, key=lambda version: -version.number)

    def find(self, alias: str) -> Version | None:
        """The version an alias stands at, if any. It costs one question, however many versions there are."""
        with self._asking(f"can't ask for the alias {alias} of {self.name}"):
            found = tracking.version_at(self._client, self.name, alias)
            return None if found is None else self._version(found, self._aliases())

    def version(self, reference: str) -> Version:
        """The version of a number ("3") or alias ("champion", "@champion")."""
        wanted = reference.removeprefix("@")
        versions = self.versions()
        for version in versions:
            if wanted == str(version.number) or wanted in version.aliases:
                return version
        there = ", ".join(f"{v.number}{''.join(f' @{a}' for a in v.aliases)}" for v in versions[:10]) or "nothing"
        mend = "promote one, or name a number" if versions else "register one first"
        raise TrackingError(
            f"no version or alias {wanted!r} of the registered model {self.name}, it has {there}; {mend}"
        )

    def folder(self, version: Version) -> Path:
        """The model folder of a version, a copy that ends with this process; of a patch, one put together with its
        parent's."""
        if version.name != self.name:
            return self.holder(version).folder(version)
        found = self.stored(version)
        if not (found / PATCH).is_file():
            return found
        if version.hash not in self._assembled:
            parent = self.of_hash(version.tags.get(TAG_PARENT, ""))
            if parent is None:
                raise TrackingError(f"{version.label} is a patch, and its parent is no version of {self.name} any more")
            whole = scratch_folder() / "model"
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
                named = f"models:/{self.name}/{version.number}"
                folder = Path(tracking.download(named, str(scratch_folder()), self.uri))
        artifacts = folder / "artifacts"
        if (artifacts / MODEL).is_file():
            if version.hash not in self._unpacked:
                self._unpacked[version.hash] = unarchived(artifacts, scratch_folder())
            return self._unpacked[version.hash]
        # Before archives, and as MLflow keeps the name that the folder had:
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
        """Add an entry to a version's audit trail. Under the promotion lock only."""
        self.set_tags(number, audit_tags(self.version(str(number)), entry))

    # --- one promoter at a time ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def promoting(self, *, wait_seconds: float = 900.0) -> Iterator[Promotion]:
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


def rename_hash(before: str, after: str) -> None:
    """Let versions name the hash that their folder has now. Raises TrackingError."""
    for version in Registry().of_any_hash(before):
        Registry(version.name).set_tags(version.number, {TAG_HASH: after})


def _answered(folder: Path) -> tuple[str, str | None]:
    """The domain whose items a model predicts, and its parent's hash."""
    config, parent = config_of(folder)
    return config.data.answered, parent


def _example(folder: Path) -> dict[str, Any]:
    """A request that the model knows: its three most popular items, as a history."""
    config, _ = config_of(folder)
    found = verified_model(folder)
    rows = found.table(CATALOGUE, ["item", "popularity"], max_rows=MAX_INDEX).slice(FIRST_INDEX)
    popular = rows.sort_by([("popularity", "descending")])["item"].slice(0, 3).to_pylist()
    forms = {"items": popular, "baskets": [popular[:2], popular[2:]]}
    times = {"times": [1e9 + 60 * place for place in range(len(popular))]} if config.reads_times else {}
    asked = {"time": 1e9 + 3_600} if config.reads_request_time else {}
    return {config.task.needs.request: forms[config.task.needs.request]} | times | asked


def scratch_folder() -> Path:
    """A folder that ends with this process."""
    scratch = tempfile.mkdtemp(prefix="graftrec-model-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)


def _is(what: str, value: str) -> str:
    """A filter of MLflow for a value; where that has characters which the filter can't hold, it finds more than that
    value. LIKE takes "_" for any character, and there is no way to escape it."""
    if re.fullmatch(r"[\w .-]*", value):
        return f"{what} = '{value}'"
    return f"{what} LIKE '{re.sub(r'[^a-zA-Z0-9 .-]', '_', value)}'"
