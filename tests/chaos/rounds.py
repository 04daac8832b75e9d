"""One round: a fault befalls a command in a copied folder, the command is run again, and invariants are checked."""

import dataclasses
import random
import shutil
import sqlite3
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltalake.exceptions import DeltaError

from tests.chaos import invariants
from tests.chaos.after import Library, Undisturbed, named
from tests.chaos.commands import CLOSE_SECONDS, REQUEST_SECONDS, Command, Ended, Running, add_files
from tests.chaos.contents import Contents, read_contents, tracked_runs

GRACE_SECONDS = 30.0  # beside three times the undisturbed time: other rounds run on the same cores
TIMEOUT_SECONDS = CLOSE_SECONDS + 4 * REQUEST_SECONDS


@dataclass(frozen=True)
class Plan:
    """What a round does. `before`: the commands that made the folder it begins with."""

    seed: int
    number: int
    before: tuple[str, ...]
    command: str
    fault: str

    def __str__(self) -> str:
        return f"{self.command} after {'+'.join(self.before) or 'nothing'}, {self.fault}"


@dataclass
class Round:
    """A round under way. `notes`: what was done in it; `violations`: what was found."""

    plan: Plan
    library: Library
    place: Path
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    interrupted: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{self.plan.seed}/{self.plan.number}/{self.plan.fault}")
        self.folder, self.logs = self.place / "work", self.place / "logs"
        self.command = named(self.plan.command)
        self.environment: dict[str, str] = {}  # of the undisturbed run
        self.experiment: str | None = None  # on that server
        self.server_store: Path | None = None  # of MLflow's server, where there is one beside the folder's own
        self.registered = ""  # beginning of the registered models' names

    # --- what faults use ----------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """The folder as it is before the command."""
        self.library.copy(self.plan.before, self.folder)
        add_files(self.command, self.folder)

    def seconds(self, *commands: str) -> float:
        return self.library.after((*self.plan.before, *(commands or (self.plan.command,)))).seconds

    def start(
        self, command: Command | None = None, *, more: Mapping[str, str] | None = None, limit: int = 0
    ) -> Running:
        return Running(command or self.command, self.folder, self.logs, more=more, limit=limit)

    def end(self, running: Running, *, allowed: Iterable[int] = invariants.ALLOWED, more_seconds: float = 0.0) -> Ended:
        limit = 3 * self.seconds(running.command.name) + TIMEOUT_SECONDS + GRACE_SECONDS + more_seconds
        ended = running.end(limit)
        self.interrupted += ended.killed or ended.code not in (0, 3)
        self.notes.append(f"exit {ended.code}" + (" (killed)" if ended.killed else ""))
        noisy = "spark" in " ".join(running.command.arguments)
        if running.command.name == "ranks" and ended.code != 0:  # torchrun ends with 1 and a traceback of its own
            said = "\n".join(path.read_text(errors="replace") for path in (self.logs / "ranks").rglob("std*.log"))
            ended, allowed, noisy = dataclasses.replace(ended, output="", errors=said), {*allowed, 1}, True
        self.violations += invariants.ended_well(ended, limit, allowed=allowed, noisy=noisy)
        return ended

    def contents(self) -> Contents:
        return read_contents(self.folder, self.server_store, self.registered)

    def after(self, *commands: str) -> Contents:
        return self.library.after((*self.plan.before, *commands)).contents

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_on_the_way(self, known: Sequence[Contents]) -> None:
        """Tables and weights; not MLflow's database, which the next command has to mend by itself."""
        self.violations += invariants.only_known_rows(read_contents(self.folder, Path("none")), known)
        self.violations += invariants.neighbours_untouched(self.folder)

    def run_undisturbed(self, command: Command | None = None) -> Ended:
        """It must end as the command ends that nothing has befallen."""
        command = command or self.command
        expected = self.library.after((*self.plan.before, command.name)).code
        return self.end(self.start(command, more=self.environment), allowed={expected})

    def check(self, expected: Sequence[Contents], *, tracked: bool = True) -> None:
        """All invariants that hold at the end."""
        found = self.contents()
        self.violations += invariants.as_expected(found, expected)
        self.violations += invariants.releases_fit(self.folder / "lake")
        self.violations += invariants.one_version_a_hash(found)
        self.violations += invariants.store_opens(self.folder)
        self.violations += invariants.left_behind(self.folder, interrupted=self.interrupted)
        if tracked:
            runs = tracked_runs(self.folder / "mlflow.db")
            if self.server_store:
                runs += tracked_runs(self.server_store, self.experiment)
            self.violations += invariants.runs_finished(self.folder, runs)


def run_round(plan: Plan, library: Library, root: Path) -> Round:
    """Run it; its folder is removed where nothing was found."""
    from tests.chaos.faults import FAULTS, unmount

    place = root / f"{plan.seed}-{plan.number}"
    unmount(place / "work")
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    done = Round(plan, library, place)
    begun = time.monotonic()
    try:
        library.after((*plan.before, plan.command))  # first, so that it is not measured beside the round
        FAULTS[plan.fault](done)
    except Undisturbed as error:
        done.violations.append(f"undisturbed: {error}")
    except (DeltaError, sqlite3.Error, OSError) as error:  # a table or store that can't be read at the end
        done.violations.append(f"1: can't be read: {error} ({traceback.extract_tb(error.__traceback__)[-1].name})")
    done.notes.append(f"{time.monotonic() - begun:.0f} s")
    unmount(place / "work", keep=bool(done.violations))
    if done.violations:
        (place / "found.txt").write_text("\n".join([str(plan), *done.notes, *done.violations]) + "\n")
    else:
        shutil.rmtree(place, ignore_errors=True)
    return done
