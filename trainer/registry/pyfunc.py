"""The code that MLflow runs when it loads a registered model ("models from code"): nothing is unpickled."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etl.settings import GraftrecError
from trainer import tracking
from trainer.data.catalogue import read_catalogue
from trainer.data.release import pin
from trainer.inference.delta_folder import is_patch, load_patch, parent_of
from trainer.inference.later_items import with_release
from trainer.inference.model_folder import ModelFolderError, TrainedModel, load_model
from trainer.inference.recommender import Recommender, RequestError, parse, parse_params
from trainer.registry import TAG_PARENT, Registry, Version
from trainer.social.friends_folder import is_friends, load_friends
from trainer.social.friends_recommender import FriendsRecommender
from trainer.tracking.queue import warn

RELEASE_OF_FEATURES = "GRAFTREC_FEATURES"  # environment variable: <lake>@<release>, whose later items are ranked


def load(folder: Path, label: str) -> Recommender | FriendsRecommender:
    """What the store holds of a version, ready to answer. The backbone is read once, and patches for other domains
    stand on it; champions of other domains are read at first use. Raises GraftrecError."""
    if is_friends(folder):
        return FriendsRecommender(load_friends(folder), label)
    name, _, number = label.rpartition("/")
    if not name and is_patch(folder):
        raise ModelFolderError(
            "a patch is loaded by its registered name, models:/<name>@<alias>, for it needs its parent"
        )
    registry = Registry(name) if name else None
    version = registry.version(number) if registry is not None else None
    parent = None
    if registry is not None and version is not None and is_patch(folder):
        known = registry.of_hash(version.tags.get(TAG_PARENT, ""))
        if known is None:
            raise ModelFolderError(f"{label} is a patch, and its parent is no version of {name} any more")
        parent = _registered(load_model(registry.stored(known)), known)
    own = load_patch(folder, parent) if parent is not None else load_model(folder)
    own = own if version is None else _registered(own, version)
    own, backbone = _with_later_items(own), parent or own

    def beside(domain: str) -> Recommender | None:
        if registry is None:
            return None
        other = registry.for_domain(registry.version(number), domain)
        if other.label == label:
            return None
        stored = registry.stored(other)
        if not is_patch(stored):
            trained_model = backbone if other.hash == backbone.hash else _registered(load_model(stored), other)
        elif parent_of(stored) == backbone.hash:
            trained_model = _registered(load_patch(stored, backbone), other)
        else:
            trained_model = _registered(load_model(registry.folder(other)), other)
        return Recommender(
            trained_model,
            other.label,
            companion=lambda: _companion(registry, other),
            friends=lambda: _friends(registry, other),
        )

    def companion() -> Recommender | None:
        return None if registry is None else _companion(registry, registry.version(number))

    def friends() -> FriendsRecommender | None:
        return None if registry is None else _friends(registry, registry.version(number))

    return Recommender(own, label, beside, companion, friends)


def _registered(trained_model: TrainedModel, version: Version) -> TrainedModel:
    """The model, if it is the one that was registered. Raises ModelFolderError for another in its place."""
    if version.hash and version.hash != trained_model.hash:
        raise ModelFolderError(
            f"{version.label}: expected the model {version.hash[:12]} that was registered, found "
            f"{trained_model.hash[:12]} in its place; register it again"
        )
    return trained_model


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


def _companion(registry: Registry, version: Version) -> Recommender | None:
    """The companion of a version, ready to answer. None if there is none, and, with a warning, if it can't be read."""
    with _spared(f"no companion of {version.label}, so users new in its domain get popular items"):
        found = registry.companion(version)
        if found is not None:
            return Recommender(_registered(load_model(registry.folder(found)), found), found.label)
    return None


def _friends(registry: Registry, version: Version) -> FriendsRecommender | None:
    """The attention over friends beside a version, as `_companion`."""
    with _spared(f"no friends beside {version.label}, so users without a history get popular items"):
        found = registry.friends(version)
        return None if found is None else FriendsRecommender(load_friends(registry.folder(found)), found.label)
    return None


@contextmanager
def _spared(without: str) -> Iterator[None]:
    """Warns of what can't be read, and goes on without it."""
    try:
        yield
    except GraftrecError as error:
        warn(f"{without}: {error}")


def answer(
    recommender: Recommender | FriendsRecommender, records: list[dict[str, Any]], params: dict[str, Any]
) -> list[dict[str, Any]]:
    """Answers as plain records. Raises RequestError."""
    domain, k = parse_params(params)
    answers = recommender.of_domain(domain).answer(parse(records), k)
    return [dataclasses.asdict(one) for one in answers]


tracking.offer(load, answer, RequestError)
