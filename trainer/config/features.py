"""Settings of the recipe `features`: vectors of items, users and entities by an encoder."""

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from etl.config import SparkConfig
from etl.settings import MAX_SECONDS, Place, Section
from trainer.config.data import each_once
from trainer.config.graph import GraphConfig
from trainer.config.social import SocialConfig
from trainer.config.training import TrackingConfig

_NAME = re.compile(r"[\w.+-]+")


class TextConfig(Section):
    """Vectors of what things are called and described by."""

    kind: Literal["item", "user", "entity"] = "item"  # of things
    encoder: str = "wordllama"  # or minilm: a sentence Transformer, better, and some 50 times as slow
    # What a text is made of, in this order: columns of the table `items`, `users` or `entities`; attributes.<name> is
    # one of an item's or user's attributes.
    columns: tuple[str, ...] = Field(("title", "categories"), min_length=1)
    # What stands for no text, besides "", "[]", "unknown" and the like; in any case of letters.
    placeholders: tuple[str, ...] = ()
    texts_at_once: int = Field(10_000, ge=1, le=100_000_000)  # of a task, whose memory and order of work depend on it

    @field_validator("columns")
    @classmethod
    def _columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(columns, "column")

    @property
    def template(self) -> str:
        """The text as the table's commit records it, e.g. "{title}. {categories}"."""
        return ". ".join(f"{{{column}}}" for column in self.columns)


class AttributesConfig(Section):
    """Vectors of columns of items or users: flags and standardised numbers. Name none that the log's end decides, such
    as counts of votes or mean ratings: they tell what is held out."""

    LATER: ClassVar = ("join_domains",)

    kind: Literal["item", "user"] = "item"
    categorical: tuple[str, ...] = ()  # columns, or attributes.<name>; each value gets a flag
    # Of the table `knowledge`, of items: each thing that several items stand in this relation to gets a flag.
    relations: tuple[str, ...] = ()
    # false: what items of several domains stand in a relation to gets a flag in each of them, so that `relations` join
    # no domains: the control of whether joining them adds to transfer.
    join_domains: bool = True
    numeric: tuple[str, ...] = ()
    # Directions of most variance that all are reduced to, in their own scale: of flags that few things have,
    # only what they share with others is left. None: not reduced.
    components: int | None = Field(None, ge=1, le=65_536)
    min_things: int = Field(2, ge=1)  # a value that fewer have gets no flag

    @model_validator(mode="after")
    def _columns_are_some(self) -> "AttributesConfig":
        if not self.columns and not self.relations:
            raise ValueError("expected columns in categorical or numeric, or relations, found none; name some")
        each_once(self.columns, "column")
        each_once(self.relations, "relation")
        if self.relations and self.kind != "item":
            raise ValueError(f"relations: expected kind item, found {self.kind}; leave them out")
        if not self.join_domains and not self.relations:
            raise ValueError("join_domains: expected relations that could join them, found none; leave it out")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the things' table."""
        return self.categorical + self.numeric


class FeaturesConfig(Section):
    """Vectors of things to the table `features`, and a release with them."""

    name: str | None = None  # of the vectors, the table's column `encoder`; None: the encoder's
    lake: Place = "lake"
    release: int | None = None  # that is read; None: the newest
    text: TextConfig = TextConfig()
    attributes: AttributesConfig | None = None  # instead of `text`
    graph: GraphConfig | None = None  # instead of both: an embedding is trained on the lake `graph.data.lake`
    social: SocialConfig | None = None  # likewise: vectors from friendships, on the lake `social.data.lake`
    max_shared: float = Field(0.01, gt=0, le=1)  # of things: how many may have the same text, or the same vector
    wait_seconds: float = Field(
        120, ge=0, le=MAX_SECONDS
    )  # for another process that writes to the lake; then exit code 5
    spark: SparkConfig = SparkConfig()
    tracking: TrackingConfig = TrackingConfig()  # of texts and attributes; graph and social have their own

    @model_validator(mode="after")
    def _one_kind_is_made(self) -> "FeaturesConfig":
        given = [name for name in ("attributes", "graph", "social") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"expected one of attributes, graph and social, found {', '.join(given)}; run each by itself"
            )
        run = next((name for name in given if name != "attributes"), None)
        elsewhere = {"name": "name", "lake": "data.lake", "release": "data.release"}
        for name, other in elsewhere.items() if run is not None else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: expected {run}.{other} in its place, which that run reads; set that")
        return self

    @field_validator("name")
    @classmethod
    def _name_is_one_word(cls, name: str | None) -> str | None:
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError(f"expected letters, digits, '.', '_', '+' and '-', found {name!r}; name it otherwise")
        return name
