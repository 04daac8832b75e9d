"""What the commands of experiments share: their arguments, the log that they are on, and the tables they read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from etl.command import CommandParser, configurations, run_command
from etl.config import EtlConfig, MovielensSource
from etl.settings import GraftrecError, load, replaced
from trainer.experiment.arms_plan import ArmsConfig
from trainer.experiment.plan import ExperimentConfig
from trainer.experiment.protocols_plan import ProtocolsConfig

ConfigT = TypeVar("ConfigT", ExperimentConfig, ArmsConfig, ProtocolsConfig)


def parser_of(kind: type[ConfigT], folder: str, *, program: str, description: str) -> CommandParser:
    """Of --experiment, a name under conf/<folder>, and --data."""
    parser = CommandParser(program, description=f"{description}\n\n{configurations(folder)}", settings=kind)
    parser.add_argument("--experiment", required=True, help=f"a name under conf/{folder}/, or a YAML file")
    parser.add_argument("--data", type=Path, help="MovieLens-1M: the folder of ratings.dat, movies.dat, users.dat")
    return parser


def run_named(
    kind: type[ConfigT],
    folder: str,
    run: Callable[[ConfigT], int],
    *,
    program: str,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run the experiment that the arguments name, by `run`. Gives the exit code."""
    parser = parser_of(kind, folder, program=program, description=description)
    known, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        name = known.experiment if known.experiment.endswith(".yaml") else f"{folder}/{known.experiment}"
        config = load(kind, name, overrides)
        return run(movielens_in(config, known.data) if known.data else config)

    return run_command(program.split()[-1], work)


def movielens_in(config: ConfigT, data: Path) -> ConfigT:
    """Take MovieLens-1M from the folder `data`; without its knowledge files the runs with metadata are missing. Raises
    GraftrecError for an experiment on another log."""
    from trainer.recipes.pipeline import movielens_etl

    etl: EtlConfig | None = config.etl
    if etl is None or not isinstance(etl.source, MovielensSource):
        raise GraftrecError("--data is for MovieLens-1M, found an experiment on something else; leave it out")
    return replaced(config, etl=movielens_etl(etl, data))


def build_tables(config: ExperimentConfig | ProtocolsConfig) -> tuple[str, int | None]:
    """Lake and release to read."""
    if config.etl is None:
        assert config.lake is not None
        return config.lake, config.release
    from trainer.recipes import run_etl

    return config.etl.lake, run_etl.run(config.etl, config.tracking)
