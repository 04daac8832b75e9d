"""The console command: ``graftrec COMMAND …``, also ``python -m graftrec COMMAND …``."""

import sys
from typing import NoReturn

from etl import stopping


def run() -> NoReturn:
    """Run the command of this process's arguments, and end the process with its exit code."""
    stopping.begin()
    try:
        from graftrec.commands import main
    except ModuleNotFoundError as error:  # an installation without its packages: each command needs these few
        name = (error.name or "").partition(".")[0]
        print(f"graftrec: expected the Python package {name}, found none; install graftrec anew", file=sys.stderr)
        stopping.leave(2)
    stopping.leave(main())


if __name__ == "__main__":
    run()
