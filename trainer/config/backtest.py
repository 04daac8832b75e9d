"""Settings of a rolling backtest."""

import datetime as dt

from pydantic import Field, field_validator

from etl.config import EtlConfig, SplitConfig
from etl.settings import FileName, Section
from trainer.config.evaluation import EvaluateConfig
from trainer.config.training import PretrainConfig, TrackingConfig


class BacktestConfig(Section):
    """The same model at several dates: trained on all that was before one, tested on the days after it.

    What flows from one step to the next (lake, release, split, names) is set here, whatever the sections say.
    """

    name: FileName = "backtest"
    runs: str = "runs/backtest"  # folder of models, evaluations, table and picture
    etl: EtlConfig  # its splits are kept, and one is added for each date
    pretrain: PretrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()  # the first protocol and metric are those of the table
    first: str  # date, ISO 8601 in UTC: the first one that a model is tested from
    num_dates: int = Field(4, ge=1, le=1_000)
    every_days: float = Field(7, gt=0, le=36_500)  # from one date to the next
    test_days: float = Field(7, gt=0, le=36_500)  # after a date
    validation_days: float = Field(7, gt=0, le=36_500)  # before a date: they choose the epoch, and are not trained on
    jobs: int | None = Field(None, ge=1, le=4_096)  # trainings side by side; None: one a core, on a GPU one
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("first")
    @classmethod
    def _is_a_date(cls, written: str) -> str:
        try:
            dt.datetime.fromisoformat(written)
        except ValueError:
            raise ValueError(f"expected a date such as 2021-06-01, found {written!r}") from None
        return written

    def splits(self) -> dict[str, SplitConfig]:
        """Date -> the split that holds out the days after it."""
        first, day = dt.datetime.fromisoformat(self.first), dt.timedelta(days=1)
        found = {}
        for number in range(self.num_dates):
            date = first + number * self.every_days * day
            name = _written(date)
            found[name] = SplitConfig(
                name=f"until-{name.replace(':', '')}",
                train_until=(date - self.validation_days * day).isoformat(),
                validate_until=date.isoformat(),
                test_until=(date + self.test_days * day).isoformat(),
            )
        return found


def _written(date: dt.datetime) -> str:
    """Without the time where that is midnight UTC."""
    return date.date().isoformat() if date == dt.datetime(date.year, date.month, date.day) else date.isoformat()
