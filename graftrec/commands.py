"""The table of commands. Each is a `main(arguments, program=…)` that gives an exit code, imported when it runs."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from etl.command import CommandParser
from trainer.__main__ import RECIPES


@dataclass(frozen=True)
class Command:
    """One command: what it does, and the module of its `main`. `first`: the command's name, where that `main` has
    several commands."""

    about: str
    module: str
    first: tuple[str, ...] = ()


# A new command is a line here; a recipe of `trainer.__main__` needs none.
COMMANDS: dict[str, Command] = {
    "etl": Command("raw logs to Delta tables; also report, guess, migrate", "etl.__main__"),
    **{recipe: Command(about, "trainer.__main__", (recipe,)) for recipe, (_, about) in RECIPES.items()},
    "pipeline": Command("all of it: raw log, tables, trainings, gate, recommendations", "trainer.recipes.pipeline"),
    "run-etl": Command("etl as an MLflow run, with pictures", "trainer.recipes.run_etl"),
    "experiment": Command("models by transfers over seeds, with a report", "trainer.experiment.run"),
    "arms": Command("whether features help, in three arms", "trainer.experiment.arms"),
    "protocols": Command("one recipe under each protocol card", "trainer.experiment.protocols"),
    "report": Command("draw an experiment's report again", "trainer.report.report"),
    "page": Command("serve the MLflow page of the store in use", "trainer.page"),
    "project": Command("write the files of the MLflow Project, for `mlflow run`", "graftrec.project"),
    "completion": Command("print what makes bash or zsh complete commands and settings", "graftrec.completion"),
    "doctor": Command("what this machine has, what it lacks, and which settings follow", "graftrec.doctor"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (ARCHITECTURE.md)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        named = "\n".join(f"  {name:<11} {command.about}" for name, command in COMMANDS.items())
        parser = CommandParser(
            "graftrec", description=f"commands:\n{named}\n\n`graftrec COMMAND --help` lists a command's settings."
        )
        parser.add_argument("command", choices=COMMANDS, metavar="command")
        parser.parse_known_args(given)
        parser.error("expected a command before its settings")
    name, *rest = given
    command = COMMANDS[name]
    program = "graftrec" if command.first else f"graftrec {name}"
    code: int = importlib.import_module(command.module).main([*command.first, *rest], program=program)
    return code
