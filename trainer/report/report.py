"""An experiment's results as a page for people (survey 4.5): Tables 1 and 2 beside the survey's numbers, gains with
intervals, the survey's observations with a verdict, learning curves, gains by history length, cost, and what ran.

``python -m trainer.report RESULTS.json --folder FOLDER`` draws the page again from kept results. It shows
what is in the results: nothing is scored or tested here. Metrics are in percent, gains in percentage points.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etl.command import CommandParser, run_command
from trainer.report.document import Block, write_document
from trainer.report.results import ReportError, Results
from trainer.report.sections.gains import all_rows, gain_pictures
from trainer.report.sections.history_length import history_length
from trainer.report.sections.observations import observations
from trainer.report.sections.patches import patches
from trainer.report.sections.runs import all_runs, missing_runs
from trainer.report.sections.summary import summary
from trainer.report.sections.survey_tables import table_1, table_2
from trainer.report.sections.training import cost, curves

SECTIONS: Sequence[Callable[[Results], list[Block]]] = (
    summary,
    observations,
    gain_pictures,
    table_2,
    all_rows,
    history_length,
    curves,
    cost,
    patches,
    table_1,
    all_runs,
    missing_runs,
)


def write(given: Mapping[str, Any], folder: Path) -> Path:
    """Writes report.html, report.md and the latter's pictures into the folder; the path of report.html.

    given: as the experiment writes results.json. Raises ReportError if a part is missing.
    """
    results = Results(given)
    blocks = [block for section in SECTIONS for block in section(results)]
    return write_document(results.title, blocks, folder, "report")


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m trainer.report") -> int:
    parser = CommandParser(program, description="Draws an experiment's report again.")
    parser.add_argument("results", type=Path, help="results.json of an experiment")
    parser.add_argument("--folder", type=Path, required=True, help="where report.html and report.md are written")
    given = parser.parse_args(arguments)

    def work() -> int:
        print(write(_read(given.results), given.folder))
        return 0

    return run_command("report", work)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"expected an experiment's results in {path}, found none ({error})") from None
    if not isinstance(found, dict):
        raise ReportError(f"expected results of an experiment in {path}, found a {type(found).__name__}")
    return found
