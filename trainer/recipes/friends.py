"""Recommend to users without a history by what their friends have, and measure it on users held out whole.

For each split: an attention over friends is trained on the users whose history is in the training part, and ranks what
the held-out users have, beside popularity and plain counts of what friends have; and, as a control, the same with
friends swapped at random. Writes to <output>/<name>: report.md, users.parquet (metrics of each user), influence.parquet
(split, user, friend, share: each friend's share of influence, 1 together for a user), and model, which answers users
without a history in `recommend` and served (see `trainer/social/friends_folder.py`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from etl import tables, text_table
from etl.redaction import redact
from etl.settings import ConfigError, replaced
from trainer.arrays import IntArray
from trainer.config.social import FriendsConfig
from trainer.data.catalogue import Catalogue, read_catalogue
from trainer.data.events import Events
from trainer.data.held_out import HeldOut
from trainer.data.release import Release, pin
from trainer.data.sequences import SequenceDataset
from trainer.data.social import Network, read_network, read_training, rewired, widened
from trainer.evaluation.baselines.friends import counted_friends
from trainer.evaluation.baselines.names import FRIENDS, POPULARITY
from trainer.evaluation.ranking_metrics import means
from trainer.evaluation.scorers import raw_users
from trainer.evaluation.significance import Comparison, holm, p_text, paired_t
from trainer.inference.scorer import Scores
from trainer.parallel.distributed import join
from trainer.recipes.recorded_once import note_done, recorded_once
from trainer.recipes.run_folder import alone
from trainer.recipes.run_result import identity_of, reused
from trainer.social.attention import TrainedFriends, train_friends
from trainer.social.friends_folder import FriendsModel, save_friends
from trainer.social.ranking import Metrics, examples, ranked
from trainer.tracking import Run

ATTENTION, CONTROL = "attention over friends", "attention over friends, swapped at random"
COUNTED_CONTROL = "friends' items, friends swapped at random"
_KEYS = {  # in names of metrics
    POPULARITY: "popularity",
    FRIENDS: "counted",
    ATTENTION: "attention",
    COUNTED_CONTROL: "counted_swapped",
    CONTROL: "attention_swapped",
}
REPORT, USERS, INFLUENCE, MODEL = "report.md", "users.parquet", "influence.parquet", "model"
_READ = (tables.SOCIAL, tables.ITEMS, tables.USERS, tables.DOMAINS, tables.SEQUENCES)
_SHOWN = ("NDCG@10", "Recall@10", "MRR")


@dataclass(frozen=True)
class Result:
    """`metrics` of all splits together, "attention/NDCG@10" and so on; the gain over plain counts, paired by user."""

    folder: Path
    metrics: dict[str, float]
    gain: Comparison


@dataclass(frozen=True)
class _Fold:
    """What a split gave: its users' metrics by each scorer, and influence."""

    split: str
    users: list[str]  # raw ids
    found: dict[str, Metrics]
    influence: pa.Table
    model: FriendsModel


@dataclass(frozen=True)
class _Given:
    """What all folds read."""

    release: Release
    catalogue: Catalogue
    network: Network


def run(config: FriendsConfig) -> Result:
    """Raises GraftrecError."""
    world = join(replaced(config.runtime, device="cpu", precision="fp32"))
    if world.size > 1:
        raise ConfigError(f"friends: expected one process, found {world.size}; start it without torchrun")
    with alone(Path(config.output) / config.name, world) as folder:
        release = pin(config.lake, config.release)
        of_run = identity_of(config, release, "trainer.recipes.friends", _READ, "")
        identity = ":".join(of_run.values())
        if (finished := reused(config, folder, identity, world)) is not None:
            print(f"{config.name}: unchanged, the model in {folder / MODEL} stands")
            return Result(folder, finished.metrics, _gain(pq.read_table(folder / USERS)))
        given = _Given(release, read_catalogue(release, config.domain), read_network(release, directed=config.directed))
        if config.keep is not None:
            SequenceDataset(release, config.keep, config.domain)  # refuses a split that is not there
        held_out = {split: _held_out(config, given, split) for split in config.splits}
        with recorded_once(config, folder, identity, world, release=release, read=_READ) as tracked:
            tracked.set_tags({"graftrec.recipe": "friends"})
            folds = [_fold(config, given, split, held) for split, held in held_out.items()]
            result = _finish(config, folder, given, folds, identity, tracked)
    return result


def _finish(
    config: FriendsConfig, folder: Path, read: _Given, folds: list[_Fold], identity: str, tracked: Run
) -> Result:
    result, text = _summary(config, folder, read.release, folds)
    kept = {fold.split: fold.model for fold in folds}.get(config.keep or config.splits[0])
    digest = save_friends(folder / MODEL, kept or _learned(config, read, str(config.keep)))
    pq.write_table(pa.concat_tables([_table_of(fold) for fold in folds]), folder / USERS)
    pq.write_table(pa.concat_tables([fold.influence for fold in folds]), folder / INFLUENCE)
    (folder / REPORT).write_text(text, encoding="utf-8")
    for name in (REPORT, USERS, INFLUENCE):
        tracked.log_artifact(folder / name)
    tracked.log_metrics(result.metrics)
    tracked.describe(text)
    note_done(folder, identity, digest, result.metrics, tracked)
    print(text, end="")
    return result


def _fold(config: FriendsConfig, read: _Given, split: str, held_out: HeldOut) -> _Fold:
    begun = time.monotonic()
    release, catalogue, network = read.release, read.catalogue, read.network
    users, taken = read_training(release, split, config.domain, catalogue)
    everyone = np.union1d(np.union1d(users, network.users), held_out.users)
    of_all = widened(taken, users, everyone)
    networks = {"": network.of(everyone)}
    if config.control:
        networks["control"] = rewired(networks[""], seed=config.model.seed)
    trained = {name: train_friends(one.edges, of_all, config.model) for name, one in networks.items()}
    counted = {name: counted_friends(one, users, taken) for name, one in networks.items()}
    popular = torch.from_numpy(counted[""].popular_V)
    every = slice(0, len(catalogue))
    scores: dict[str, Callable[[IntArray], torch.Tensor]] = {
        POPULARITY: lambda given: popular.expand(len(given), -1),
        FRIENDS: lambda given: counted[""].score(given, every),
        ATTENTION: lambda given: torch.from_numpy(trained[""].scores(np.searchsorted(everyone, given))),
    }
    if config.control:
        scores[COUNTED_CONTROL] = lambda given: counted["control"].score(given, every)
        scores[CONTROL] = lambda given: torch.from_numpy(trained["control"].scores(np.searchsorted(everyone, given)))
    found = {label: _ranked(score, held_out) for label, score in scores.items()}
    shown = ", ".join(f"{label} {means(metrics)['NDCG@10']:.4f}" for label, metrics in found.items())
    print(f"{split}: {len(held_out):,} users, NDCG@10 {shown}; {time.monotonic() - begun:.0f} s", flush=True)
    influence = _influence(release, split, trained[""], everyone, held_out.users)
    model = _model(config, read, split, everyone, trained[""])
    return _Fold(split, raw_users(release, held_out.users), found, influence, model)


def _learned(config: FriendsConfig, read: _Given, split: str) -> FriendsModel:
    """A model that learns from the training part of a split in which it isn't measured."""
    users, taken = read_training(read.release, split, config.domain, read.catalogue)
    everyone = np.union1d(users, read.network.users)
    trained = train_friends(read.network.of(everyone).edges, widened(taken, users, everyone), config.model)
    return _model(config, read, split, everyone, trained)


def _model(
    config: FriendsConfig, read: _Given, split: str, everyone: IntArray, trained: TrainedFriends
) -> FriendsModel:
    raw = pa.array(raw_users(read.release, everyone), pa.string())
    return FriendsModel(config, split, read.release, read.catalogue, everyone, raw, trained)


def _held_out(config: FriendsConfig, read: _Given, split: str) -> HeldOut:
    """The users of a split's test part. Raises ConfigError where one has a history: that would be another question."""
    held_out = examples(read.release, split, config.domain, read.catalogue, "test")
    if known := int((held_out.histories.lengths > 0).sum()):
        raise ConfigError(
            f"splits: expected {split} to hold out users' whole histories, found {known:,} of {len(held_out):,} users "
            "with a history; name splits with user_folds (etl.splits)"
        )
    return held_out


def _ranked(score: Callable[[IntArray], torch.Tensor], held_out: HeldOut) -> Metrics:
    def of(given: Events) -> Scores:
        return Scores.of(score(given.users))

    return ranked(of, held_out)


def _influence(
    release: Release, split: str, trained: TrainedFriends, everyone: IntArray, held_users: IntArray
) -> pa.Table:
    """Shares of the held-out users' friends."""
    places, size = np.searchsorted(everyone, held_users), trained.evidence.batch_users()
    parts = [trained.influence(places[start : start + size]) for start in range(0, len(places), size)]
    user, friend, share = (np.concatenate([part[column] for part in parts]) for column in range(3))
    met = np.unique(np.concatenate([user, friend]))
    raw = np.array(raw_users(release, everyone[met]), dtype=object)
    names = [pa.array(raw[np.searchsorted(met, places)], pa.string()) for places in (user, friend)]
    columns = {"split": pa.array([split] * len(user), pa.string()), "user": names[0], "friend": names[1]}
    return pa.table(columns | {"share": pa.array(share, pa.float32())})


def _gain(users: pa.Table) -> Comparison:
    """As a finished run left its users' metrics."""
    ours, counted = (users[f"{label}/NDCG@10"].to_numpy() for label in (ATTENTION, FRIENDS))
    return paired_t(ours, counted)


def _table_of(fold: _Fold) -> pa.Table:
    named = {f"{label}/{name}": found[name] for label, found in fold.found.items() for name in _SHOWN}
    return pa.table({"split": [fold.split] * len(fold.users), "user": fold.users, **named})


def _summary(config: FriendsConfig, folder: Path, release: Release, folds: list[_Fold]) -> tuple[Result, str]:
    together = {
        label: {name: np.concatenate([fold.found[label][name] for fold in folds]) for name in _SHOWN}
        for label in folds[0].found
    }
    ours = together[ATTENTION]["NDCG@10"]
    gains = {label: paired_t(ours, found["NDCG@10"]) for label, found in together.items() if label != ATTENTION}
    adjusted = dict(zip(gains, holm([gain.p_value for gain in gains.values()]), strict=True))
    rows = []
    for label, found in together.items():
        gain = f"{gains[label].gain:+.4f}, p {p_text(adjusted[label])}" if label in gains else ""
        rows.append([label, *(f"{means(found)[name]:.4f}" for name in _SHOWN), gain])
    by_split = [
        [fold.split, f"{len(fold.users):,}", *(f"{means(found)['NDCG@10']:.4f}" for found in fold.found.values())]
        for fold in folds
    ]
    verdict = ""
    if config.control:
        helps = all(gains[label].gain > 0 and adjusted[label] < 0.01 for label in (POPULARITY, CONTROL))
        verdict = f"Friends {'help' if helps else 'are not shown to help'}: real against none and against swapped ones."
    lines = [
        f"# {config.name}",
        f"{len(ours):,} users without a history, release {release.number} of `{redact(release.lake)}`, ranked among "
        "all items. The gain is the attention's over each other row, NDCG@10, paired by user; p by Holm's method.",
        "\n".join(text_table.markdown(["", *_SHOWN, "gain"], rows)),
        verdict,
        "\n".join(text_table.markdown(["NDCG@10 by split", "users", *folds[0].found], by_split)),
        f"{INFLUENCE}: each friend's share of influence on each of these users.",
    ]
    metrics = {f"{_KEYS[label]}/{name}": means(found)[name] for label, found in together.items() for name in _SHOWN}
    return Result(folder, metrics, gains[FRIENDS]), "\n\n".join(line for line in lines if line) + "\n"
