"""Settings of the commands that keep a lake and a store in order."""

from typing import Any, Literal

from pydantic import Field, field_validator

from etl.settings import ConfigError, Place, Section
from trainer.config.training import TrackingConfig


def required(config: Section, *names: str) -> None:
    """Raise ConfigError where one of these settings has no value: files under conf/ can't know it."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{name}: expected a value, found none; give --{name}")


class MaintainConfig(Section):
    """Remove what nothing needs any more. Without `apply` it is only listed."""

    lake: Place = "lake"
    runs: str = "runs"  # folder of training runs
    apply: bool = False  # whether anything is removed or sent
    keep_releases: int = Field(3, ge=1)  # the newest so many stay, beside those that live processes read
    keep_registered: bool = True  # and those that a version with an alias (champion…) was trained on
    older_than_hours: float = Field(24, ge=0)  # files that were written or replaced since then stay
    abandoned_days: float = Field(14, ge=0)  # checkpoints of a run that nobody has touched for so long are abandoned
    wait_seconds: float = Field(120, ge=0)  # for another process that writes to the lake; then exit code 5
    tracking: TrackingConfig = TrackingConfig()


class ForgetConfig(Section):
    """Forget users: out of the lake, models, per-user files and MLflow's artifacts."""

    user: tuple[str, ...] = ()  # raw ids; one may stand alone
    lake: Place = "lake"
    runs: str = "runs"  # folder of training runs; the receipt goes to <runs>/forgotten
    any_lake: bool = False  # also out of models and files of other lakes, where the same ids may be other people's
    wait_seconds: float = Field(120, ge=0)  # for another process that writes to the lake; then exit code 5
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("user", mode="before")
    @classmethod
    def _one_user_is_a_list(cls, given: Any) -> Any:
        return (str(given),) if isinstance(given, str | int) else given

    @field_validator("user")
    @classmethod
    def _users_are_named(cls, users: tuple[str, ...]) -> tuple[str, ...]:
        if not all(user.strip() for user in users):
            raise ValueError("expected raw ids of users, found an empty one; name them")
        return tuple(dict.fromkeys(user.strip() for user in users))


class ExplainConfig(Section):
    """Say where one recommendation came from."""

    user: str = ""  # raw id
    item: str = ""  # raw id
    lake: Place = "lake"
    domain: str | None = None  # None: the first in which the item is recommended
    events: int = Field(20, ge=0)  # of the user, the newest so many are printed
    output: Literal["text", "json"] = "text"
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("user", "item", mode="before")
    @classmethod
    def _ids_are_texts(cls, given: Any) -> Any:
        return str(given) if isinstance(given, int) else given


class BackupConfig(Section):
    """Copy a lake at one release, and an embedded MLflow store, to a folder."""

    to: str = ""  # a new or empty folder
    lake: Place = "lake"
    release: int | None = None  # None: the newest
    wait_seconds: float = Field(120, ge=0)  # for another process that writes to the lake; then exit code 5
    tracking: TrackingConfig = TrackingConfig()


class RestoreConfig(Section):
    """Put a backup's lake and store where there is none."""

    source: str = ""  # folder of a backup
    lake: str = "lake"  # a new or empty folder
    store: str = "."  # folder for mlflow.db and mlartifacts, which has neither
    tracking: TrackingConfig = TrackingConfig()
