"""Configurations that nobody writes on purpose: each is read, or refused in a line, in seconds and little memory."""

import itertools
import resource
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import etl.config
import trainer.config
from etl.config import EtlConfig, GeneratorSource, SparkConfig
from etl.settings import ConfigError, load, replaced
from tests.fixtures.hostile import EXAMPLES, SEEDED, spoilt, spoilt_bytes
from tests.fixtures.places import ROOT
from trainer.config import PretrainConfig
from trainer.recipes.pipeline_plan import PipelineConfig

KINDS = {
    "etl": EtlConfig,
    "pretrain": PretrainConfig,
    "finetune": trainer.config.FinetuneConfig,
    "evaluate": trainer.config.EvaluateConfig,
    "promote": trainer.config.PromoteConfig,
    "recommend": trainer.config.RecommendConfig,
    "search": trainer.config.SearchConfig,
    "features": trainer.config.FeaturesConfig,
    "friends": trainer.config.FriendsConfig,
    "backtest": trainer.config.BacktestConfig,
    "pipeline": PipelineConfig,
}
SHIPPED = [(name, path) for name in KINDS for path in sorted((ROOT / "conf" / name).glob("*.yaml"))]


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n  y{n}: 1" for n in range(1, levels)]
    return "\n".join(lines)


def doubled(levels: int, form: str) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} {form.format(*[f'*a{n - 1}'] * 2)}" for n in range(1, levels)]
    return "\n".join(lines)


TEXTS = {
    "lists in lists": "a: " + "[" * 5_000 + "]" * 5_000,
    "mappings in mappings": "a: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "a block in a block": "\n".join(" " * n + "a:" for n in range(900)),
    "lists that double": doubled(40, "[{}, {}]"),
    "mappings that double": doubled(40, "{{x: {}, y: {}}}"),
    "merges that double": merges(40),
    "one that holds itself": "train: &a\n  seed: *a",
    "a file that holds itself": "&a\nmodel: *a",
    "an alias of nothing": "train: *nobody",
    "thousands of digits": "train: {seed: " + "9" * 6_000 + "}",
    "thousands of digits in base 16": "train: {seed: 0x" + "f" * 100_000 + "}",
    "thousands of digits in base 60": "train: {seed: " + "1:" * 3_000 + "1}",
    "hundreds of digits": "train: {learning_rate: 1" + "0" * 400 + "}",
    "no number": "train: {learning_rate: .inf}",
    "nothing": "train: {epochs: .nan}",
    "a date that is none": "name: !!timestamp 2020-13-45",
    "a number that is none": "name: !!int x",
    "a float that is none": "name: !!float x",
    "a NUL": 'name: "a\\0b"',
    "half a character": 'name: "\\ud800"',
    "half a character elsewhere": 'output: "\\udfff"',
    "Python": 'name: !!python/object/apply:os.system ["echo hi"]',
    "bytes": "output: !!binary gIGC",
    "a list as a key": "? [a, b]\n: 1",
    "null as a key": "~: 1",
    "a number as a key": "train: {1: 2}",
    "two documents": "name: a\n---\nname: b",
    "a long name": "name: " + "x" * 300_000,
    "a large file": "# " + "x" * 2_000_000,
    "many values": "space: [" + "1, " * 200_000 + "1]",
    "a name outside": "name: ../../x",
    "a name at the root": "name: /x",
}


def said_of(path: Path, kind: type = PretrainConfig, more: tuple[str, ...] = ()) -> str:
    """The line that a file is refused with."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        load(kind, path, more)
    assert time.monotonic() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 5_000
    return said


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_file_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(TEXTS[name])
    said = said_of(path)
    assert str(path) in said


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    assert "expected at most 1,048,576 bytes" in said_of(path)


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    (tmp_path / "fine.yaml").write_text("train: &t {seed: 3}\nevaluation: {}\nmodel: {<<: {width: 8, heads: 1}}\n")
    assert load(PretrainConfig, tmp_path / "fine.yaml").train.seed == 3


@pytest.mark.parametrize("chain", [["self"], ["b", "self"], ["a"]])
def test_a_base_that_comes_back_is_refused(chain: list[str], tmp_path: Path) -> None:
    names = ["self", *chain]
    for name, base in itertools.pairwise(names):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}")
    if chain == ["a"]:
        (tmp_path / "a.yaml").write_text("base: [a]")
    said = said_of(tmp_path / "self.yaml")
    assert "base" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--train.seed", "-1"],
        ["--train.seed", "9" * 5_000],
        ["--train.epochs", ".inf"],
        ["--train.epochs", "1e999"],
        ["--model.width", "1000000000"],
        ["--model.blocks", "10000000"],
        ["--train.batch_size", "100000000000"],
        ["--name", "../../x"],
        ["--name", "a/../../b"],
        ["--name", "x" * 5_000],
        ["--output", "\0"],
        ["--model", "[" * 3_000],
        ["--model", "x" * 50_000],
        [f"--{'.'.join('a' * 3_000)}", "1"],
        ["--runtime.collective_seconds", "1e300"],
        ["--runtime.threads", "100000000"],
        ["--data.event_types", "[" + "a, " * 1_000 + "a]"],
        ["--base", "x" * 5_000],
        ["--model.base", "../../../etc/passwd"],
    ],
)
def test_a_hostile_word_is_refused_in_a_line(words: list[str]) -> None:
    said = said_of(Path("pretrain/demo"), more=tuple(words))
    assert len(said) < 2_000


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["users", "items", "people", "topics", "tastes"])
@pytest.mark.parametrize("size", [10**20, 10**10, 10**400, -1, 1e20, float("inf")])
def test_sizes_of_a_generated_log_are_bounded(name: str, size: float) -> None:
    with pytest.raises(ConfigError):
        replaced(GeneratorSource(), **{name: size})


def test_a_catalogue_that_fits_no_worker_is_refused() -> None:
    with pytest.raises(ConfigError, match="which each worker keeps"):
        replaced(GeneratorSource(), items=10_000_000, tastes=1_000)
    assert replaced(GeneratorSource(), items=1_000_000, users=50_000_000).items == 1_000_000


@pytest.mark.parametrize("master", ["local[0]", "local[-1]", "local[]", "local[x]", "local[99999]", "", "loc", "[2]"])
def test_a_master_without_cores_is_refused(master: str) -> None:
    with pytest.raises(ConfigError, match="master"):
        replaced(SparkConfig(), master=master)


@pytest.mark.parametrize(
    "master", ["local", "local[1]", "local[*]", "local[4, 2]", "yarn", "spark://h:7077", "sc://h:1"]
)
def test_a_master_that_spark_knows_is_taken(master: str) -> None:
    assert replaced(SparkConfig(), master=master).master == master


def every_section(kind: type) -> list[type]:
    return [one for below in kind.__subclasses__() for one in [below, *every_section(below)]]


@pytest.mark.parametrize("kind", sorted(set(every_section(etl.config.Section)), key=lambda kind: kind.__name__))
def test_every_number_of_every_section_has_bounds(kind: type) -> None:
    if not kind.__module__.startswith(("etl.", "trainer.")):
        return
    for name, field in kind.model_fields.items():
        if str(field.annotation) not in ("<class 'int'>", "int | None", "<class 'float'>", "float | None"):
            continue
        for number in (10**30, -(10**30), float("inf"), float("nan")):
            with pytest.raises(ValueError, match=name):
                kind.model_validate({name: number})


# --- anything -------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(SEEDED, max_examples=3 * EXAMPLES)
def test_any_settings_are_read_or_refused_in_a_line(tmp_path, data):
    name, path = data.draw(st.sampled_from(SHIPPED))
    value = data.draw(spoilt(yaml.safe_load(path.read_text())))
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(value, allow_unicode=False))
    begun, said = time.monotonic(), ""
    try:
        load(KINDS[name], tmp_path / "any.yaml")
    except ConfigError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert time.monotonic() - begun < 20


@given(st.data())
@settings(SEEDED, max_examples=3 * EXAMPLES)
def test_any_bytes_are_read_or_refused_in_a_line(tmp_path, data):
    name, path = data.draw(st.sampled_from(SHIPPED))
    (tmp_path / "any.yaml").write_bytes(data.draw(spoilt_bytes(path.read_bytes())))
    said = ""
    try:
        load(KINDS[name], tmp_path / "any.yaml")
    except ConfigError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
