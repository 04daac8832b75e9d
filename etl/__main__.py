"""``python -m etl all|<job>|report --config etl/demo [--section.key value …]``."""

import argparse
import sys
from collections.abc import Sequence

from etl.config import EtlConfig, GraftrecError, load

DEFAULT_CONFIG = "etl/demo"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit code: 0, or 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser("python -m etl", description="Raw logs to Delta tables.")
    parser.add_argument("command", help="all, report, or a job's name, which is its table's")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="a name under conf/ or a YAML file")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load(EtlConfig, known.config, overrides)
        _run(known.command, config)
    except GraftrecError as error:
        print(f"etl: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(command: str, config: EtlConfig) -> None:
    from etl.jobs.report import print_report

    if command == "report":
        print_report(config.lake)
        return
    from etl.jobs.job import Engine
    from etl.jobs.pipeline import run_all, run_one

    engine = Engine(config)
    if command != "all":
        run_one(engine, command)
        return
    run_all(engine)
    print_report(config.lake)


if __name__ == "__main__":
    sys.exit(main())
