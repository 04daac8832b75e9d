"""What every benchmark shares: cases in processes of their own, alternating rounds, bars, and what is printed.

A *case* is a function of JSON-able keyword arguments that gives JSON-able numbers. It runs in a fresh process, where a
warm-up, caches and peak memory are its own; rounds alternate between the cases, so that a machine that slows down
slows all of them; what counts is the median over rounds, and the ratio of medians.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from etl import text_table

CLASSES = {"AMX": "amx_bf16", "AVX512-bf16": "avx512_bf16", "AVX512": "avx512f", "AVX2": "avx2"}  # flag of each
_EMULATED = {"AMX": "AVX512_CORE_AMX", "AVX512-bf16": "AVX512_CORE_BF16", "AVX512": "AVX512", "AVX2": "AVX2"}
SEEN_ON = "AVX512-bf16"  # where a bar was seen to hold, if it doesn't say otherwise: AMD EPYC (Zen 4), two cores
ROOT = Path(__file__).resolve().parents[2]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """``module:function`` called with `arguments` by `python` (None: this one) in a process of its own."""

    name: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Bar:
    """One bar: `found` against `wanted`; `at_least` says on which side. `seen`: its machine class is one on which the
    bar is known to hold."""

    what: str
    found: float
    wanted: float
    at_least: bool = True
    seen: bool = True

    @property
    def holds(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted


@dataclass
class Report:
    """Tables and bars of one `make bench…`, printed as they come and kept as Markdown."""

    name: str
    lines: list[str] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    machine_class: "MachineClass" = field(default_factory=lambda: machine_class())

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.say(f"\n{title}\n")
        for line in text_table.markdown(columns, [[_text(cell) for cell in row] for row in rows]):
            self.say(line)
        self.say()

    def bar(
        self,
        what: str,
        found: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        seen_on: Sequence[str] = (SEEN_ON,),
    ) -> None:
        """Exactly one of `at_least` and `at_most`. `seen_on`: machine classes on which the bar is known to hold."""
        wanted = at_least if at_least is not None else at_most
        assert wanted is not None
        assert (at_least is None) != (at_most is None)
        bar = Bar(what, found, wanted, at_least is not None, str(self.machine_class) in seen_on)
        self.bars.append(bar)
        sign = "≥" if bar.at_least else "≤"
        said = f"seen on {', '.join(seen_on)}" if bar.seen else f"not seen on this class, on {', '.join(seen_on)}"
        verdict = "holds" if bar.holds else "FAILS" if bar.seen else "does not hold"
        self.say(f"- {verdict}: {what}: {_text(found)} ({sign} {_text(wanted)}; {said})")

    def skip(self, what: str, why: str) -> None:
        """A bar that can't be measured here. It isn't counted as holding, and is named at the end."""
        self.skipped.append(f"{what}: {why}")
        self.say(f"- not measured: {what}: {why}")

    def end(self, folder: Path) -> int:
        """Write <folder>/<name>.md and print the last lines. The exit code: 0 where all bars hold, but those which were
        never seen to hold on machines of this class."""
        hold = sum(bar.holds for bar in self.bars)
        unseen = [bar.what for bar in self.bars if not bar.seen and not bar.holds]
        if unseen:
            self.say(f"not seen on {self.machine_class}, and not held: {'; '.join(unseen)}")
        if self.skipped:
            self.say(f"not measured here: {'; '.join(self.skipped)}")
        self.say(f"bars: {hold} of {len(self.bars) + len(self.skipped)} hold")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        return 0 if hold + len(unseen) == len(self.bars) + len(self.skipped) else 1


@dataclass(frozen=True)
class MachineClass:
    """The processor's widest instructions, and the lower class that the environment makes libraries keep to."""

    processor: str
    emulated: str | None = None

    def __str__(self) -> str:
        return self.processor if self.emulated is None else f"{self.emulated}, emulated on {self.processor}"


def machine_class(cpuinfo: Path = Path("/proc/cpuinfo")) -> MachineClass:
    """A class of CLASSES, or the architecture's name (arm64). ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY keep libraries
    to a lower one: the lower of the two is emulated."""
    flags: set[str] = set()
    if cpuinfo.exists():
        flags = set(next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split())
    processor = next((name for name, flag in CLASSES.items() if flag in flags), platform.machine() or "unknown")
    onednn, aten = (os.environ.get(name, "").upper() for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    kept = ["below AVX2"] if aten == "DEFAULT" or onednn in ("SSE41", "AVX") else []
    for isa in (onednn, aten):
        kept += next(([name] for name, start in _EMULATED.items() if isa.startswith(start)), [])
    order = [*CLASSES, "below AVX2"]
    lowest = max(kept, key=order.index, default=processor)
    if processor not in order or order.index(lowest) <= order.index(processor):
        return MachineClass(processor)
    return MachineClass(processor, lowest)


def machine(packages: Sequence[str]) -> str:
    """One line: class, processor, cores, memory, and versions."""
    from trainer.parallel.cores import usable_cores  # with torch, which a case's process may not want

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    facts = [
        f"class {machine_class()}: {model}, {os.cpu_count()} cores ({usable_cores()} usable), "
        f"{psutil.virtual_memory().total / 2**30:.0f} GB"
    ]
    facts.append(f"Python {platform.python_version()}")
    for package in packages:
        try:
            facts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            facts.append(f"{package} (none)")
    return "; ".join(facts)


def run(case: Case, *, timeout: float = 3_600) -> Numbers:
    """Run a case. Its numbers, with `wall_seconds`, `peak_bytes` (of its process and all below it, summed), and
    `written_bytes` (to disk, by all of them, scratch files too).

    Raises RuntimeError with the end of its output where it fails.
    """
    command = [case.python or sys.executable, "-m", "tests.benchmarks.harness", case.function]
    if case.python is not None:  # a peer's environment: the module's file alone is run, and knows nothing of ours
        command = [case.python, str(ROOT / case.function)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **case.environment}
    begun = time.monotonic()
    process = subprocess.Popen(
        [*command, json.dumps(dict(case.arguments))],
        cwd=ROOT,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    peak = _Peak(process.pid)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise RuntimeError(f"{case.name}: took more than {timeout:.0f} s") from None
    finally:
        peak.stop()
    seconds = time.monotonic() - begun
    last = output.strip().splitlines()[-1] if output.strip() else ""
    if process.returncode or not last.startswith("{"):
        raise RuntimeError(f"{case.name}: exit {process.returncode}: {(errors or output)[-2_000:]}")
    numbers: Numbers = json.loads(last)
    return {"wall_seconds": seconds, "peak_bytes": peak.bytes, "written_bytes": sum(peak.written.values()), **numbers}


def alternate(cases: Sequence[Case], *, rounds: int = 3, timeout: float = 3_600) -> dict[str, list[Numbers]]:
    """Each case once a round, in turn; every other round backwards. Case name -> its numbers of each round."""
    found: dict[str, list[Numbers]] = {case.name: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            found[case.name].append(run(case, timeout=timeout))
    return found


def median(rounds: Sequence[Numbers], key: str) -> float:
    return statistics.median(float(numbers[key]) for numbers in rounds)


def quick(function: Callable[[], Any], *, seconds: float = 1.0, least: int = 3) -> float:
    """Median seconds of a call, over at least `least` calls and about `seconds`, after one that is not counted."""
    function()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class _Peak:
    """Peak of the summed resident memory of a process tree, and what each of its processes has written.

    Pages that processes share count for each. (Proportional memory would be exact, but reading it stops a JVM for
    seconds.)
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self.written: dict[int, int] = {}
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            total = 0
            try:
                root = psutil.Process(self._pid)
                for process in [root, *root.children(recursive=True)]:
                    total += process.memory_info().rss
                    self.written[process.pid] = _written(process)
            except psutil.Error:
                continue
            self.bytes = max(self.bytes, total)


def _written(process: psutil.Process) -> int:
    try:
        return int(process.io_counters().write_bytes)
    except (psutil.Error, AttributeError):
        return 0


def _text(training: object) -> str:
    if isinstance(training, float):
        return (
            f"{training:,.0f}"
            if abs(training) >= 1_000
            else f"{training:.3g}"
            if abs(training) < 100
            else f"{training:.0f}"
        )
    return f"{training:,}" if isinstance(training, int) and not isinstance(training, bool) else str(training)


def main() -> None:
    """In a case's process: call it and print its numbers, the last line of the output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("arguments")
    given = parser.parse_args()
    module, _, name = given.function.partition(":")
    numbers = getattr(importlib.import_module(module), name)(**json.loads(given.arguments))
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
