"""``python -m tests.chaos [--seed N] [--minutes M] [--kept] [--round R …]``: faults that befall commands.

A round is drawn from its seed and number: tests/chaos/plans.py says which commands, faults.py what befalls them,
invariants.py what must hold. A failure prints the command that repeats it, its folder is kept, and the exit code is 1.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import yaml

from tests.chaos.after import Library
from tests.chaos.plans import draw_plan
from tests.chaos.rounds import Plan, Round, run_round

KEPT = Path(__file__).with_name("kept.yaml")


def kept_plans() -> list[Plan]:
    """The rounds that once failed."""
    return [draw_plan(one["seed"], one["round"]) for one in yaml.safe_load(KEPT.read_text()) or []]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of all draws; drawn where not given")
    parser.add_argument("--minutes", type=float, default=2.0, help="no round begins later (default 2)")
    parser.add_argument("--round", type=int, nargs="*", help="only these rounds of the seed")
    parser.add_argument("--kept", action="store_true", help="first the rounds of tests/chaos/kept.yaml, all of them")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="rounds at once")
    parser.add_argument("--work", type=Path, default=Path(".chaos"), help="scratch space; what failed stays there")
    given = parser.parse_args()
    if given.round and given.seed is None:
        parser.error("--round: expected --seed too, which the round was drawn from")
    seed = random.SystemRandom().randrange(10_000) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    work = given.work.absolute()
    library = Library(work / "after")
    plans = _plans(seed, given.round, given.minutes * 60, kept=given.kept)
    try:
        return _run(plans, library, work / "rounds", given.workers)
    finally:
        library.close()


def _plans(seed: int, rounds: list[int] | None, seconds: float, *, kept: bool) -> Iterator[Plan]:
    deadline = time.monotonic() + seconds
    if rounds:
        yield from (draw_plan(seed, number) for number in rounds)
        return
    if kept:
        yield from kept_plans()
    number = 0
    while time.monotonic() < deadline:
        yield draw_plan(seed, number)
        number += 1


def _run(plans: Iterator[Plan], library: Library, place: Path, workers: int) -> int:
    begun, done, failed = time.monotonic(), Counter[str](), 0
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[Round]] = set()
        while True:
            while len(running) < workers and (plan := next(plans, None)) is not None:
                running.add(pool.submit(run_round, plan, library, place))
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                done[result.plan.fault] += 1
                failed += bool(result.violations)
                _say(result)
    minutes = (time.monotonic() - begun) / 60
    faults = ", ".join(f"{count} {name}" for name, count in sorted(done.items()))
    print(f"{done.total()} rounds in {minutes:.1f} minutes ({faults}): {failed} failed", flush=True)
    return 1 if failed else 0


def _say(done: Round) -> None:
    plan = done.plan
    fate = "FAILED" if done.violations else "ok"
    print(f"round {plan.number:>4}  {fate}  {plan}: {'; '.join(done.notes)}", flush=True)
    for violation in done.violations:
        print(f"            {violation}", flush=True)
    if done.violations:
        print(f"            repeat: python -m tests.chaos --seed {plan.seed} --round {plan.number}", flush=True)
        print(f"            folder: {done.place}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
