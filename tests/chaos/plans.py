"""What a round does, drawn from its seed and number alone."""

import random
import shutil

from tests.chaos.rounds import Plan

_TRAINED = ("etl", "none-0", "none-1")
_CHAMPION = (*_TRAINED, "promote-0")
# (what was run before, command) -> weight. Commands on tables are the quickest, those that load torch and MLflow not.
SITUATIONS: dict[tuple[tuple[str, ...], str], float] = {
    ((), "etl"): 3,
    ((), "etl-interactions"): 0.5,
    (("etl",), "etl-day"): 4,
    (("etl",), "etl-kcore"): 2,
    (("etl",), "pretrain"): 3,
    (("etl",), "none-0"): 1,
    (("etl",), "ranks"): 1,
    (("etl",), "search"): 0.5,
    (("etl", "pretrain"), "deep"): 2,
    (("etl", "pretrain"), "pretrain"): 1,
    (_TRAINED, "evaluate"): 1,
    (_TRAINED, "promote-0"): 2,
    (_CHAMPION, "promote-1"): 1,
    (_CHAMPION, "recommend"): 2,
    ((*_CHAMPION, "recommend"), "recommend-5"): 1,
    ((), "pipeline"): 0.3,
}
# By draws of their own, so that the kept rounds mean what they did.
NEWER_SITUATIONS: dict[tuple[tuple[str, ...], str], float] = {
    (("etl",), "etl-mended"): 2,
    (("etl", "etl-day"), "etl-mended"): 1,
    (("etl",), "etl-by-time"): 1,
    (("etl", "etl-by-time"), "etl-day"): 1,
}
_ON_SPARK = ("etl", "etl-day", "etl-kcore", "recommend")
_TRAININGS = ("pretrain", "deep", "none-0", "search")
_ON_SERVER = ("pretrain", "deep", "none-0", "evaluate", "promote-0")  # not what reads the registry of the folder
EVERY_TENTH, EVERY_OTHER_TENTH = 9, 3


def draw_plan(seed: int, number: int) -> Plan:
    draw = random.Random(f"{seed}/{number}")
    spark = number % 10 == EVERY_TENTH and shutil.which("java") is not None
    known = NEWER_SITUATIONS if number % 10 == EVERY_OTHER_TENTH else SITUATIONS
    situations = {key: weight for key, weight in known.items() if not spark or key[1] in _ON_SPARK}
    ((before, command),) = draw.choices(list(situations), list(situations.values()))
    faults = _faults(before, command, spark)
    (fault,) = draw.choices(list(faults), list(faults.values()))
    engine = ("@cluster" if fault == "kill_executor" else "@spark") if spark else ""
    if fault == "kill_executor":  # one table: two more JVMs take their time to start
        before, command = (), "etl-interactions"
    return Plan(seed, number, before, command + engine, fault)


def _faults(before: tuple[str, ...], command: str, spark: bool) -> dict[str, float]:
    """The faults that can befall a command, and their weights."""
    from tests.chaos.faults import RIVALS

    found: dict[str, float] = {"kill": 4, "terminate": 0.5, "full_disk": 1.5, "flip_unchecked": 0.5}
    if spark:
        return {"kill": 1, "flip": 1, "kill_executor": 3} if before else {"kill": 1, "kill_executor": 3}
    if before:
        found |= {"flip": 3, "cut_log": 1.5}
    found["secrets"] = 1
    if command in _ON_SERVER:
        found["mlflow"] = 3
    if command in RIVALS:
        found["twice"] = 3
    if command in _TRAININGS:
        found["flip_checkpoint"] = 1
    if command == "ranks":
        found["kill_rank"] = 6
    return found
