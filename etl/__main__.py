"""``python -m etl all|<job>|report --config NAME [--section.key value …]``.

Exit codes: 0 done, or unchanged; 2 a mistake to mend (one line says which); 5 another process wrote the same table:
run again; 143 stopped by a signal: the same command continues.
"""

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

from collections.abc import Sequence

from etl import tables
from etl.command import CommandParser, configurations, run_command
from etl.config import EtlConfig
from etl.settings import ConfigError, load, texts, without_credentials

JOBS = (
    tables.INTERACTIONS,
    tables.ITEMS,
    tables.USERS,
    tables.DOMAINS,
    tables.ENTITIES,
    tables.KNOWLEDGE,
    tables.SOCIAL,
    tables.SEQUENCES,
    tables.BASKETS,
    tables.NEGATIVES,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    jobs = ", ".join(table.name for table in JOBS)
    parser = CommandParser(
        "python -m etl",
        description=(
            "Raw logs to Delta tables. Commands:\n"
            "  all     every table that is out of date, then a release of them\n"
            "  report  what the newest release holds; --lake FOLDER is enough\n"
            "  migrate  an older lake to this version's tables, in place; --lake FOLDER is enough\n"
            f"  a job   one table: {jobs}\n\n{configurations('etl')}"
        ),
        settings=EtlConfig,
    )
    parser.add_argument("command", help="all, report, migrate, or a job's name")
    parser.add_argument("--config", help="a name under conf/, e.g. etl/demo, or a YAML file")
    known, overrides = parser.parse_known_args(arguments)

    def work() -> int:
        if known.command in _OF_LAKES and known.config is None:
            _OF_LAKES[known.command](_lake(known.command, overrides))
        elif known.config is None:
            parser.error("expected --config, which says where the log is and what its tables hold, found none")
        else:
            _run(known.command, load(EtlConfig, known.config, overrides))
        return 0

    return run_command("etl", work)


def _lake(command: str, overrides: Sequence[str]) -> str:
    """The lake of a command without a configuration. Raises ConfigError unless it is the only setting given."""
    given = texts(overrides)
    if list(given) != ["lake"]:
        raise ConfigError(f"{command}: expected --lake FOLDER, or --config, found {', '.join(given) or 'neither'}")
    try:
        return without_credentials(given["lake"])
    except ValueError as error:
        raise ConfigError(f"lake: {error}") from None


def _report(lake: str) -> None:
    from etl.pipeline.report import print_report

    print_report(lake)


def _migrate(lake: str) -> None:
    from etl.pipeline.migrate import migrate

    migrate(lake)


_OF_LAKES = {"report": _report, "migrate": _migrate}


def _run(command: str, config: EtlConfig) -> None:
    if command in _OF_LAKES:
        _OF_LAKES[command](config.lake)
        return
    from etl.jobs.job import RunContext
    from etl.pipeline.run import run_all, run_one

    engine = RunContext(config)
    if command != "all":
        run_one(engine, command)
        return
    run_all(engine)
    _report(config.lake)


if __name__ == "__main__":
    stopping.leave(main())
