"""Settings of vectors from the social network, which the recipe `features` trains (survey 2.3)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from etl.settings import FileName, Place, Section, Seed
from trainer.config.data import each_once
from trainer.config.training import RuntimeConfig, TrackingConfig


class Node2VecConfig(Section):
    """Vectors of users from random walks over friendships. Reads no interaction."""

    kind: Literal["node2vec"] = "node2vec"
    width: int = Field(64, ge=1, le=65_536)
    p: float = Field(1.0, gt=0)  # large: a walk hardly ever goes back at once
    q: float = Field(1.0, gt=0)  # large: a walk stays near; small: it goes far
    walks: int = Field(10, ge=1, le=100_000)  # from each user, in an epoch
    length: int = Field(40, ge=2, le=1_000_000)  # users of a walk
    window: int = Field(5, ge=1, le=10_000)  # steps between two users that count as near each other
    negatives: int = Field(64, ge=1, le=10_000_000)  # that a batch shares
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(8_192, ge=1, le=100_000_000)  # pairs
    learning_rate: float = Field(0.1, gt=0)  # of row-wise Adagrad; falls to none
    seed: Seed = 0


class LightGcnConfig(Section):
    """Vectors of users and items from a graph of what users took, and optionally of whom they know."""

    kind: Literal["lightgcn"] = "lightgcn"
    width: int = Field(64, ge=1, le=65_536)
    layers: int = Field(3, ge=0, le=1_000)  # steps of propagation; 0: matrix factorisation
    # Weight of a friendship beside that of an interaction, 1. 0: no friends.
    friends: float = Field(0.0, ge=0)
    loss: Literal["bpr", "softmax"] = "softmax"
    negatives: int = Field(
        512, ge=1, le=10_000_000
    )  # that a batch shares, in `softmax`; in `bpr`: one of each interaction's own
    penalty: float = Field(0.01, ge=0)  # on mean squared lengths of the batch's vectors before propagation
    batch_size: int = Field(4_096, ge=1, le=100_000_000)  # interactions
    epochs: int = Field(100, ge=1)
    # The validation part decides on the epoch; else it is only watched, and what is held out decides nothing. For a
    # model that ranks the test part, not for features of a split.
    best_epoch: bool = False
    patience: int = Field(6, ge=1)  # validations without a better NDCG@10, with `best_epoch`
    validate_every: int = Field(5, ge=1)  # epochs
    learning_rate: float = Field(0.005, gt=0)  # of Adam
    seed: Seed = 0


class SocialDataConfig(Section):
    """Which release, and whose interactions."""

    lake: Place = "lake"
    release: int | None = None  # None: the newest complete one, pinned when the run starts
    split: str | None = None  # whose training part lightgcn reads, and whose held-out items it ranks
    domain: str = "all"
    rewired: Seed | None = None  # seed: friends are swapped at random, the control that shows what real ones are worth
    directed: bool = False  # an edge counts for its first user alone, as where trust isn't mutual


class SocialConfig(Section):
    """One run: vectors from the social network of a release, on the CPU and in one process."""

    name: FileName = "social"
    output: str = "runs"  # the run's folder is <output>/<name>
    data: SocialDataConfig = SocialDataConfig()
    model: Annotated[Node2VecConfig | LightGcnConfig, Field(discriminator="kind")] = Node2VecConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _split_is_given_where_it_is_read(self) -> "SocialConfig":
        if (self.data.split is not None) != (self.model.kind == "lightgcn"):
            found = "none" if self.data.split is None else f"{self.data.split!r}, which node2vec doesn't read"
            raise ValueError(f"data.split: expected a split for lightgcn, and none for node2vec, found {found}")
        return self


class FriendModelConfig(Section):
    """Attention over friends (`trainer/social/attention.py`)."""

    candidates: int = Field(200, ge=1, le=10_000_000)  # items of a user that are told apart by it
    hidden: int = Field(32, ge=2, le=65_536)  # units of a layer
    max_users: int = Field(20_000, ge=1)  # who are learnt from, at most
    batch_size: int = Field(64, ge=1, le=100_000_000)  # users
    epochs: int = Field(20, ge=1)
    learning_rate: float = Field(0.01, gt=0)  # of Adam; falls to none
    seed: Seed = 0


class FriendsConfig(Section):
    """Recommend to users without a history by what their friends have, and measure it beside plain counts."""

    LATER: ClassVar = ("keep",)

    name: FileName = "friends"
    output: str = "runs"  # the run's folder is <output>/<name>
    lake: Place = "lake"
    release: int | None = None  # None: the newest complete one
    # That hold out users' whole histories, e.g. all folds of `user_folds`; results are of all together.
    splits: tuple[str, ...] = Field(("users-0",), min_length=1)
    # The split whose training part the kept model learns from and reads, for users without a history in `recommend` and
    # served. One that holds out little gives it most. None: the first of `splits`.
    keep: str | None = None
    domain: str = "all"
    directed: bool = False  # an edge counts for its first user alone, as where trust isn't mutual
    control: bool = True  # the same with friends swapped at random (see `rewired`)
    model: FriendModelConfig = FriendModelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("splits")
    @classmethod
    def _splits_differ(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(splits, "split")
