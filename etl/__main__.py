"""``python -m etl all|<job>|report --config NAME [--section.key value …]``, ``python -m etl guess FOLDER``.

Exit codes: 0 done, or unchanged; 2 a mistake to mend (one line says which); 5 another process wrote the same table:
run again; 143 stopped by a signal: the same command continues.
"""

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

import sys
from collections.abc import Sequence
from pathlib import Path

from etl import tables
from etl.command import CommandParser, configurations, run_command
from etl.config import EtlConfig
from etl.settings import ConfigError, load, texts, without_credentials

JOBS = (
    tables.INTERACTIONS,
    tables.DELIVERIES,
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


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m etl") -> int:
    """Run the command; returns its exit code. Without a command before the settings it is `all`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].partition("=")[0] == "--config":
        given = ["all", *given]
    jobs = ", ".join(table.name for table in JOBS)
    parser = CommandParser(
        program,
        description=(
            "Raw logs to Delta tables. Commands:\n"
            "  all     every table that is out of date, then a release of them; the default\n"
            "  report  what the newest release holds; --lake FOLDER is enough\n"
            "  guess   print a configuration for the log in a folder: guess FOLDER > my.yaml\n"
            "  migrate  an older lake to this version's tables, in place; --lake FOLDER is enough\n"
            f"  a job   one table: {jobs}\n\n{configurations('etl')}"
        ),
        settings=EtlConfig,
    )
    parser.add_argument("command", help="all, report, migrate, guess, or a job's name")
    parser.add_argument("folder", nargs="?", help="of guess: where the log is")
    parser.add_argument("--config", help="a name under conf/, e.g. etl/demo, or a YAML file")
    parser.add_argument("--page", help="of report: write it into this HTML file too")
    known, overrides = parser.parse_known_args(given)

    def work() -> int:
        if known.command == "guess":
            if known.folder is None or known.config is not None or overrides:
                parser.error("guess: expected one folder and nothing else; leave settings out")
            _guess(known.folder)
        elif known.folder is not None:
            parser.error(f"expected --section.key value, found {known.folder!r}; give every setting its name")
        elif known.command in ("report", "migrate") and known.config is None:
            _with_lake(known.command, _lake(known.command, overrides), known.page)
        elif known.config is None:
            parser.error("expected --config, which says where the log is and what its tables hold, found none")
        else:
            _run(known.command, load(EtlConfig, known.config, overrides), known.page)
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


def _report(lake: str, page: str | None = None) -> None:
    from etl.pipeline.report import make_report
    from etl.pipeline.report_text import lines

    report = make_report(lake)
    print("\n".join(lines(report)), flush=True)
    if page is None:
        return
    from etl.pipeline.page import to_html

    Path(page).write_text(to_html(report), encoding="utf-8")
    print(f"page: {page}", flush=True)


def _migrate(lake: str) -> None:
    from etl.pipeline.migrate import migrate

    migrate(lake)


def _with_lake(command: str, lake: str, page: str | None) -> None:
    """The commands that need nothing but a lake."""
    if command == "migrate":
        _migrate(lake)
    else:
        _report(lake, page)


def _guess(folder: str) -> None:
    from etl.guess.configuration import configuration
    from etl.guess.survey import survey

    print(configuration(survey(folder), folder), end="", flush=True)


def _run(command: str, config: EtlConfig, page: str | None) -> None:
    if command in ("report", "migrate"):
        _with_lake(command, config.lake, page)
        return
    from etl.jobs.job import RunContext
    from etl.pipeline.run import run_all, run_one

    engine = RunContext(config)
    if command != "all":
        run_one(engine, command)
        return
    run_all(engine)
    _report(config.lake, page)


if __name__ == "__main__":
    stopping.leave(main())
