"""Commands' help: what it lists, and that it is there for every command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from etl.__main__ import JOBS
from etl.__main__ import main as etl
from etl.command import settings_help, type_text, value_text, version
from etl.config import EtlConfig, SparkConfig
from etl.settings import Section, load, replaced
from tests.fixtures.places import ROOT
from trainer.__main__ import RECIPES
from trainer.__main__ import main as trainer

_TALKATIVE = """
import sys
from etl import stopping
from etl.command import run_command

def work():
    for number in range(100_000):
        print(number)
    return 0

stopping.begin()
stopping.leave(run_command("talk", work))
"""


@pytest.mark.parametrize("arguments", [("-m", "etl", "--help"), ("-c", _TALKATIVE)])
def test_a_reader_that_goes_away_is_no_error(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = subprocess.run(
            [sys.executable, *arguments], stdout=gone, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


class Inner(Section):
    """What is inside (Author et al. 2020): one thing. And more."""

    rate: float = Field(0.5, gt=0, le=1)  # a share


class Round(Section):
    """A round one."""

    kind: Literal["round"] = "round"
    radius: int = 3


class Square(Section):
    """A square one."""

    kind: Literal["square"] = "square"
    side: int


class Base(Section):
    name: str  # what it is called


class Outer(Base):
    # How many; None: all
    # that there are.
    number: int | None = Field(None, ge=1)
    words: tuple[str, ...] = ("a", "b c")  # in order
    inner: Inner = Inner(rate=0.25)
    again: Inner = Inner(rate=0.25)
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round(radius=4)
    many: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)


def test_every_setting_has_type_bounds_default_and_comment() -> None:
    listed = re.sub(r" +", " ", re.sub(r"\n {20,}", " ", settings_help(Outer)))
    for line in (
        "--name text, required # what it is called",
        "--number integer|null >= 1, default null # How many; null: all that there are.",
        '--words [text, ...], default [a, "b c"] # in order',
        "inner: What is inside (Author et al. 2020): one thing\n --inner.rate number > 0, <= 1, default 0.25 # a share",
        "again: the settings of inner",
        "--shape.kind round|square, default round",
        "shape of kind round: A round one\n --shape.radius integer, default 4",
        "shape of kind square: A square one\n --shape.side integer, required",
        "--many [section, ...], default []",
        "many[]: What is inside",
        "--many[].rate number > 0, <= 1, default 0.5",
        "named.<name>: the settings of many[]",
    ):
        assert line in listed, line


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | None, "integer|null"),
        (Literal["a", 1], "a|1"),
        (tuple[int, str], "[integer, text]"),
        (dict[str, tuple[bool, ...]], "{name: [true|false, ...]}"),
        (Annotated[float, "x"], "number"),
    ],
)
def test_types_are_named_as_users_write_them(annotation: object, text: str) -> None:
    assert type_text(annotation) == text


def test_values_are_written_as_users_write_them() -> None:
    assert value_text((None, True, 1.5, "", "a,b", "last-5")) == '[null, true, 1.5, "", "a,b", last-5]'


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_every_recipe_lists_all_its_settings(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        trainer([recipe, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    for name, field in RECIPES[recipe][0].model_fields.items():
        assert re.search(rf"^ +--{name}[ .\n]|^{name}(:|, required|\[\]| of kind|\.<name>)", output, re.MULTILINE), name
        assert field.annotation is not None
    assert f"configurations under conf/: {recipe}/" in output
    assert max(map(len, output[output.index("\nsettings, ") :].splitlines())) <= 100


def test_help_of_pretrain_has_comments_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trainer(["pretrain", "--help"])
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--train.patience integer >= 1, default 8 # epochs without a better validation NDCG@10" in output
    assert "--model.kind bert4rec|caser|peterrec|dupn|mlp, default bert4rec" in output


def test_help_of_etl_names_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    from etl.pipeline.run import JOBS as RUN

    assert [table.name for table in JOBS] == [job.name for job in RUN]
    with pytest.raises(SystemExit) as ended:
        etl(["--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert (
        "interactions, deliveries, items, users, domains, entities, knowledge, social, sequences, baskets, negatives"
        in output
    )
    assert "etl/demo" in output
    assert "--kcore.min_user" in output


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    expected = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version() == expected
    for command, given in ((trainer, ["--version"]), (trainer, ["pretrain", "--version"]), (etl, ["--version"])):
        with pytest.raises(SystemExit) as ended:
            command(given)
        assert ended.value.code == 0
        assert capsys.readouterr().out == f"graftrec {expected}\n"


def test_help_needs_neither_spark_nor_torch() -> None:
    script = (
        "import sys, etl.__main__, trainer.__main__\n"
        "for main in (etl.__main__.main, trainer.__main__.main):\n"
        "    try: main(['--help'])\n"
        "    except SystemExit: pass\n"
        "print('found', [name for name in ('pyspark', 'torch', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "found []"


def test_a_hint_names_the_configuration_in_use(tmp_path: Path) -> None:
    from etl.config import etl_command

    load(EtlConfig, "etl/ml100k")
    assert etl_command("lake-x") == "`python -m etl all --config etl/ml100k --lake lake-x`"
    assert etl_command("lake-x", "items").startswith("`python -m etl items --config etl/ml100k ")
    given = [
        "--source.root",
        "my logs/a",
        "--lake",
        "other",
        "--kcore.min_user=3",
        "--spark.settings",
        "{spark.a: b c}",
    ]
    wanted = load(EtlConfig, "etl/ml100k", given)
    (tmp_path / "spark.yaml").write_text("engine: sail")
    load(SparkConfig, tmp_path / "spark.yaml", ["--engine", "spark"])  # another kind changes nothing
    python, _, module, job, *words = shlex.split(etl_command("my lake").strip("`"))
    assert (python, module, job, words[:2]) == ("python", "etl", "all", ["--config", "etl/ml100k"])
    assert load(EtlConfig, words[1], words[2:]) == replaced(wanted, lake="my lake")
