"""The machine class that benchmarks name: of the processor's flags, and what the environment makes of it."""

import pytest

from tests.benchmarks.harness import Report, machine_class

ZEN4 = "flags : fpu avx avx2 avx512f avx512vl avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "variables", "name"),
    [
        (ZEN4, {}, "AVX512-bf16"),
        (ZEN4 + " amx_bf16 amx_tile", {}, "AMX"),
        ("flags : fpu avx avx2", {}, "AVX2"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, "AVX2, emulated on AVX512-bf16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX512, emulated on AVX512-bf16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "AVX512-bf16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "AVX512-bf16"),  # a limit above what is there is none
        (ZEN4, {"ATEN_CPU_CAPABILITY": "default"}, "below AVX2, emulated on AVX512-bf16"),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "ALL"}, "AVX512-bf16"),
    ],
)
def test_class_is_that_of_flags_and_environment(flags, variables, name, tmp_path, monkeypatch):
    for variable in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert str(machine_class(tmp_path / "cpuinfo")) == name
    assert str(machine_class(tmp_path / "none"))  # a machine without /proc


def test_a_bar_that_was_never_seen_on_a_class_says_so_and_does_not_fail(tmp_path, capsys):
    report = Report("toy")
    report.bar("known", 1.0, at_least=0.5, seen_on=(str(report.machine_class),))
    report.bar("unknown", 1.0, at_least=2.0, seen_on=("a class",))
    assert report.end(tmp_path) == 0
    said = capsys.readouterr().out
    assert "holds: known: 1 (≥ 0.5; seen on" in said
    assert "does not hold: unknown: 1 (≥ 2; not seen on this class, on a class)" in said
    assert "and not held: unknown\nbars: 1 of 2 hold" in said
    report.bar("known", 1.0, at_most=0.5, seen_on=(str(report.machine_class),))
    assert report.end(tmp_path) == 1
