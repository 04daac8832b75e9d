"""How messages spell a command: `graftrec etl` where the console command runs, else `python -m etl`."""

import sys
from pathlib import Path
from typing import Literal


def words(package: Literal["etl", "trainer"], *rest: str) -> list[str]:
    """The words of a command of a package, e.g. of ("etl", "all") or ("trainer", "evaluate")."""
    if Path(sys.argv[0]).stem != "graftrec":
        return ["python", "-m", package, *rest]
    return ["graftrec", *(["etl"] if package == "etl" else []), *rest]


def spelled(package: Literal["etl", "trainer"], *rest: str) -> str:
    """The words of `words`, which need no quotes, as one text."""
    return " ".join(words(package, *rest))
