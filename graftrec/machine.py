"""What this machine is: cores, memory, instruction sets, GPUs. Needs the standard library only; torch where it is."""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# As /proc/cpuinfo (x86, Arm) and macOS's sysctl spell it -> as their makers do, of those that torch and Arrow use.
_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "Arm BF16",
    "arm.feat_bf16": "Arm BF16",
    "neon": "NEON",
}
_MEMORY = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes: of the machine, usable by this process (a container may have less), free now."""

    total: int
    usable: int
    available: int


def cores() -> tuple[int, int]:
    """Cores that this process may use, and those of the machine."""
    total = os.cpu_count() or 1
    try:
        from trainer.parallel.cores import usable_cores  # counts a container's quota; imports torch
    except ImportError:
        return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total), total
    return usable_cores(), total


def memory() -> Memory:
    """Raises ImportError without psutil."""
    import psutil

    found = psutil.virtual_memory()
    limit, used = cgroup_memory(*_MEMORY)
    if limit is None or limit >= found.total:
        return Memory(found.total, found.total, found.available)
    return Memory(found.total, limit, max(0, min(found.available, limit - used)))


def cgroup_memory(cgroups: Path, mount: Path) -> tuple[int | None, int]:
    """The smallest memory limit of the control groups that hold this process, and what its group uses, in bytes; None:
    no limit. `cgroups` is /proc/self/cgroup, `mount` where the control groups are mounted (versions 1 and 2)."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return None, 0
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = Path(path.lstrip("/"))
        for folder in (root / above for above in (group, *group.parents)):
            if (most := _number(folder / limit)) is not None:
                found.append((most, _number(folder / usage) or 0))
    return min(found, default=(None, 0))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def processor() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and the instruction sets that it has of those that matter here."""
    if sys.platform == "darwin":
        name, *flags = _sysctl("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        has = [key for key in ("hw.optional.arm.FEAT_BF16", "hw.optional.neon") if _sysctl(key) == ["1"]]
        flags += [key.removeprefix("hw.optional.") for key in has]
        return name or platform.machine(), _named(" ".join(flags))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine(), ()
    return parse_cpuinfo(text)


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """The same, of what /proc/cpuinfo holds."""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (name[1].strip() if name else platform.machine()), _named(flags[1] if flags else "")


def _named(flags: str) -> tuple[str, ...]:
    words = set(flags.lower().split())
    return tuple(dict.fromkeys(name for flag, name in _SETS.items() if flag in words))


def _sysctl(*names: str) -> list[str]:
    done = subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, check=False)
    return [*done.stdout.splitlines(), *[""] * len(names)][: len(names)]


def gpus() -> tuple[list[str], str]:
    """A line for each GPU that torch computes on; why there is none, "" where there is one or no trace of one."""
    try:
        import torch
    except (ImportError, OSError):
        return [], ""
    if torch.cuda.is_available():
        lines = []
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            lines.append(f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute {found.major}.{found.minor}")
        return lines, ""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    build = (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else (f"torch {torch.__version__} is a build without CUDA")
    )
    return [], f"nvidia-smi is here, but torch sees no GPU: {build}; install another build, or mend the driver"
