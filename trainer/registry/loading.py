"""A registered version, ready to answer, with what stands beside it: a patch's parent, companion, friends, domains."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from etl.settings import GraftrecError
from trainer.data.catalogue import read_catalogue
from trainer.data.release import pin
from trainer.inference.delta_folder import is_patch, load_patch, parent_of
from trainer.inference.later_items import with_release
from trainer.inference.model_folder import ModelFolderError, TrainedModel, load_model
from trainer.inference.recommender import Recommender
from trainer.registry.version import TAG_PARENT, Version
from trainer.registry.versions import Registry
from trainer.social.friends_folder import is_friends, load_friends
from trainer.social.friends_recommender import FriendsRecommender
from trainer.tracking.queue import warn

RELEASE_OF_FEATURES = "GRAFTREC_FEATURES"  # environment variable: <lake>@<release>, whose later items are ranked
Served = Recommender | FriendsRecommender


class Beside:
    """What was looked up in the registry beside a version, and what was found: a server asks again whether it moved."""

    def __init__(self) -> None:
        self._looked: dict[tuple[str, ...], tuple[Callable[[], Version | None], str | None]] = {}

    def look(self, ask: Callable[[], Version | None], *what: str) -> Version | None:
        """The version that `ask` finds, remembered as `what`."""
        found = ask()
        self._looked[what] = ask, None if found is None else found.label
        return found

    def moved(self) -> bool:
        """Whether anything would be found otherwise now. Raises TrackingError."""
        for ask, label in list(self._looked.values()):
            found = ask()
            if (None if found is None else found.label) != label:
                return True
        return False


def load(folder: Path, label: str, beside: Beside | None = None) -> Served:
    """What the store holds of a version in `folder`, ready to answer. `label`: "graftrec/3"; without a slash it is no
    registered version, and nothing stands beside it. Raises GraftrecError.

    The backbone is read once, and patches for other domains stand on it. Champions of other domains, companion and
    friends are read at first use; `beside` remembers them.
    """
    if is_friends(folder):
        return FriendsRecommender(load_friends(folder), label)
    name, _, number = label.rpartition("/")
    if not name:
        if is_patch(folder):
            raise ModelFolderError(
                "a patch is loaded by its registered name, models:/<name>@<alias>, for it needs its parent"
            )
        return Recommender(_with_later_items(load_model(folder)), label)
    registry, looked = Registry(name), beside or Beside()
    version = registry.version(number)
    parent = None
    if is_patch(folder):
        known = registry.of_hash(version.tags.get(TAG_PARENT, ""))
        if known is None:
            raise ModelFolderError(f"{label} is a patch, and its parent is no version of {name} any more")
        parent = _registered(load_model(registry.stored(known)), known)
    own = _registered(load_patch(folder, parent) if parent is not None else load_model(folder), version)
    own, backbone = _with_later_items(own), parent or own

    def of_domain(domain: str) -> Recommender | None:
        other = registry.for_domain(version, domain)
        if other.label == label:
            return None
        looked.look(lambda: registry.for_domain(version, domain), "domain", domain)
        stored = registry.stored(other)
        if not is_patch(stored):
            trained_model = backbone if other.hash == backbone.hash else _registered(load_model(stored), other)
        elif parent_of(stored) == backbone.hash:
            trained_model = _registered(load_patch(stored, backbone), other)
        else:
            trained_model = _registered(load_model(registry.folder(other)), other)
        return _recommender(registry, other, trained_model, looked)

    return _recommender(registry, version, own, looked, of_domain)


def _recommender(
    registry: Registry,
    version: Version,
    trained_model: TrainedModel,
    looked: Beside,
    of_domain: Callable[[str], Recommender | None] = lambda domain: None,
) -> Recommender:
    def companion() -> Recommender | None:
        with _spared(f"no companion of {version.label}, so users new in its domain get popular items"):
            found = looked.look(lambda: registry.companion(version), "companion", version.label)
            if found is not None:
                return Recommender(_registered(load_model(registry.folder(found)), found), found.label)
        return None

    def friends() -> FriendsRecommender | None:
        with _spared(f"no friends beside {version.label}, so users without a history get popular items"):
            found = looked.look(lambda: registry.friends(version), "friends", version.label)
            return None if found is None else FriendsRecommender(load_friends(registry.folder(found)), found.label)
        return None

    return Recommender(trained_model, version.label, of_domain, companion, friends)


def _registered(trained_model: TrainedModel, version: Version) -> TrainedModel:
    """The model, if it is the one that was registered. Raises ModelFolderError for another in its place."""
    if version.hash and version.hash != trained_model.hash:
        raise ModelFolderError(
            f"{version.label}: expected the model {version.hash[:12]} that was registered, found "
            f"{trained_model.hash[:12]} in its place; register it again"
        )
    return trained_model


@contextmanager
def _spared(without: str) -> Iterator[None]:
    """Warns of what can't be read, and goes on without it."""
    try:
        yield
    except GraftrecError as error:
        warn(f"{without}: {error}")


def _with_later_items(own: TrainedModel) -> TrainedModel:
    """With the items of the release that $GRAFTREC_FEATURES names, where the model reads features. Raises
    GraftrecError."""
    named = os.environ.get(RELEASE_OF_FEATURES, "")
    if not named or not own.config.model.features.encoders:
        return own
    lake, _, number = named.rpartition("@")
    if not lake or not number.isdecimal():
        raise ModelFolderError(f"${RELEASE_OF_FEATURES}: expected <lake>@<release>, found {named!r}; mend it")
    release = pin(lake, int(number))
    return with_release(own, release, read_catalogue(release, own.config.data.domain))
