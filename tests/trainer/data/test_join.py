"""What a process computes with, where the settings leave it open: precision and threads."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from trainer.config import RuntimeConfig
from trainer.parallel import cores
from trainer.parallel.distributed import join


@pytest.mark.parametrize(("precision", "autocast"), [("auto", False), ("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("has_tiles", [False, True])
def test_bf16_on_a_cpu_is_a_choice(precision, autocast, has_tiles, monkeypatch):
    """With AMX tiles too: products are faster by them, the steps of a small model are not."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles, raising=False)
    world = join(RuntimeConfig(device="cpu", precision=precision, threads=1))
    assert (world.autocast, world.dtype) == (autocast, torch.float32)


# --- threads ---------------------------------------------


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 0.5),  # the least of all above
        ("0::/host/only\n", {"cpu.max": "200000 100000\n"}, 2.0),  # the container sees its own group as the root
        (
            "3:memory:/\n2:cpu,cpuacct:/box\n",
            {"cpu,cpuacct/box/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("2:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_quota_is_that_of_the_control_groups(groups, files, quota, tmp_path):
    mount = written(tmp_path / "cgroup", files)
    (tmp_path / "self").write_text(groups)
    assert cores.cgroup_quota(tmp_path / "self", mount) == quota
    assert cores.cgroup_quota(tmp_path / "none", mount) is None


@pytest.mark.parametrize(("quota", "most"), [("50000", 1), ("100000", 1), ("110000", 2), ("max", 1 << 20)])
def test_usable_cores_are_no_more_than_the_quota_rounded_up(quota, most, tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "_MOUNT", written(tmp_path / "cgroup", {"cpu.max": f"{quota} 100000\n"}))
    monkeypatch.setattr(cores, "_CGROUPS", written(tmp_path, {"self": "0::/\n"}) / "self")
    assert cores.usable_cores() == min(most, len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "3"}, 2),
        ({"LOCAL_WORLD_SIZE": "20"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # torchrun's own
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "64"}, 8),
    ],
)
def test_default_threads_are_the_usable_cores_shared(variables, threads, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cores.default_threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes can't be tied to cores here")
def test_a_process_tied_to_one_core_has_one_thread_and_torch_always():
    script = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from trainer.config import RuntimeConfig; from trainer.parallel.distributed import join;"
        "join(RuntimeConfig());"
        "import torch; from trainer.parallel import cores; print(cores._number, torch.get_num_threads());"
        "join(RuntimeConfig(threads=3)); print(cores._number, torch.get_num_threads(), os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY",)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert ran.stdout.split() == ["1", "1", "3", "1", "PASSIVE"]


@pytest.fixture
def three_threads():
    cores.use_threads(3)
    yield
    cores.use_threads(1)


@pytest.mark.usefixtures("three_threads")
def test_pieces_come_in_order_and_each_is_done_once():
    done, lock = [], threading.Lock()

    def piece(number):
        time.sleep(0.002 * (number % 3))
        with lock:
            done.append((number, threading.current_thread().name, torch.is_grad_enabled()))
        return number * number

    with torch.no_grad():
        assert list(cores.on_threads(piece, 20)) == [number * number for number in range(20)]
    assert sorted(number for number, *_ in done) == list(range(20))
    assert len({name for _, name, _ in done}) == 3
    assert not any(grad for *_, grad in done)  # this thread's setting, on all


@pytest.mark.usefixtures("three_threads")
def test_helpers_that_are_busy_elsewhere_are_not_waited_for():
    """As where other work has the cores: the calling thread does it all."""
    leave = threading.Event()
    busy = [cores._pool.submit(leave.wait, 60) for _ in range(2)]
    try:
        names = list(cores.on_threads(lambda number: threading.current_thread().name, 5))
    finally:
        leave.set()
    assert names == [threading.current_thread().name] * 5
    assert all(future.result() for future in busy)


@pytest.mark.usefixtures("three_threads")
def test_an_error_is_raised_in_its_place_and_what_is_behind_it_is_left():
    begun = []

    def piece(number):
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        time.sleep(0.005)
        return number

    results = cores.on_threads(piece, 1_000)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 20
    assert list(cores.on_threads(lambda number: number, 4)) == [0, 1, 2, 3]  # the pool is as it was
