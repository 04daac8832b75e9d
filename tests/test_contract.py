"""What holds the project together: who may import whom, that every YAML builds, and that the files beside agree."""

import ast
import importlib.util
import itertools
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import pydantic
import pytest
import yaml

import etl.config
import trainer.config
from etl.settings import ConfigError, Section, load, replaced
from tests.fixtures.places import ROOT
from trainer.experiment.arms_plan import ArmsConfig
from trainer.experiment.plan import ExperimentConfig
from trainer.experiment.protocols_plan import ProtocolsConfig
from trainer.recipes.pipeline_plan import PipelineConfig

# In the order of imports: a room imports itself and rooms above it only.
ROOMS = (
    "etl.stopping",
    "etl.plain_path",
    "etl.durable",
    "etl.text_table",
    "etl.program",
    "etl.tables",
    "etl.source_hash",
    "etl.redaction",
    "etl.json_log",
    "etl.section",
    "etl.setting_errors",
    "etl.settings",
    "etl.archive",
    "etl.identifiers",
    "etl.file_config",
    "etl.config",
    "etl.command",
    "etl.lineage_events",
    "etl.session",
    "etl.lake",
    "etl.histories",
    "etl.sources",
    "etl.generator",
    "etl.guess",
    "etl.jobs",
    "etl.pipeline",
    "etl.maintenance",
    "etl.__main__",
    "trainer.old_versions",
    "trainer.arrays",
    "trainer.ridge",
    "trainer.code_hash",
    "trainer.trust",
    "trainer.config",
    "trainer.parallel",
    "trainer.encoders",
    "trainer.data",
    "trainer.figures",
    "trainer.tracking",
    "trainer.page",
    "trainer.models",
    "trainer.tasks",
    "trainer.inference",
    "trainer.training",
    "trainer.knowledge_graph",
    "trainer.evaluation",
    "trainer.social",
    "trainer.registry",
    "trainer.serving",
    "trainer.report",
    "trainer.recipes",
    "trainer.experiment",
    "trainer.__main__",
    "graftrec.machine",
    "graftrec.doctor",
    "graftrec.project",
    "graftrec.commands",
    "graftrec.completion",
    "graftrec.__main__",
)
PACKAGES = ("etl", "trainer", "graftrec")
# What any room of trainer may import of etl, and what single rooms may besides.
OF_ETL = {
    "etl.tables",
    "etl.settings",
    "etl.archive",
    "etl.identifiers",
    "etl.config",
    "etl.command",
    "etl.plain_path",
    "etl.redaction",
    "etl.source_hash",
    "etl.durable",
    "etl.stopping",
    "etl.text_table",
    "etl.program",
}
MORE_OF_ETL = {
    "trainer.data": {"etl.lake"},
    "trainer.serving.served_log": {"etl.lake"},
    "trainer.recipes.recommend": {"etl.lake", "etl.session"},
    "trainer.recipes.features": {"etl.lake", "etl.session", "etl.jobs"},
    "trainer.recipes.recommendation_rows": {"etl.lake", "etl.session"},
    "trainer.recipes.served": {"etl.lake"},
    "trainer.recipes.changed_users": {"etl.lake"},
    "trainer.recipes.alone": {"etl.lake"},  # who holds a lock
    "trainer.recipes.run_etl": {"etl.jobs", "etl.pipeline"},
    "trainer.recipes.maintain": {"etl.lake", "etl.maintenance"},
    "trainer.recipes.forget": {"etl.lake", "etl.maintenance"},
    "trainer.recipes.backup": {"etl.maintenance"},
    "trainer.recipes.explain": {"etl.maintenance"},
}


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere in it; ``from a import b`` gives both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of(names: Iterator[str], package: str) -> set[str]:
    return {name for name in names if name.split(".")[0] == package}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


# --- import edges -----------------------------------------------------------------------------------------------------


def room_of(module: str) -> str:
    found = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    assert found, f"{module}: no room of ROOMS"
    return found[0]


def our_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports; not a package where only modules of it are meant."""
    found = {name for package in PACKAGES for name in of(imports(path), package) if is_module(name)}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ALL = [path for package in PACKAGES for path in modules(package) if name_of(path) not in PACKAGES]


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    above = ROOMS[: ROOMS.index(room_of(name_of(path))) + 1]
    assert {room_of(name) for name in our_imports(path)} <= set(above)


@pytest.mark.parametrize("path", modules("trainer"), ids=name_of)
def test_trainer_imports_only_the_contract_of_etl(path: Path) -> None:
    allowed = OF_ETL.union(*(more for name, more in MORE_OF_ETL.items() if name_of(path).startswith(name)))
    assert {room_of(name) for name in our_imports(path) if name.startswith("etl.")} <= allowed
    if name_of(path) not in ("trainer.recipes.recommendation_rows", "trainer.recipes.features"):
        assert not of(imports(path), "pyspark")


@pytest.mark.parametrize("path", modules("etl"), ids=name_of)
def test_etl_imports_nothing_of_trainer_nor_torch(path: Path) -> None:
    for package in ("trainer", "torch", "mlflow"):
        assert not of(imports(path), package)


def test_no_test_file_imports_another() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            assert not any(part.startswith("test_") for part in parts), f"{path}: {name} belongs in tests/fixtures"
            shared = parts[0] != "tests" or parts[1:2] in ([], ["fixtures"], ["benchmarks"], ["chaos"])
            assert shared, f"{path}: {name} belongs in tests/fixtures"


def test_only_tracking_imports_mlflow() -> None:
    users = {room_of(name_of(path)) for path in ALL if of(imports(path), "mlflow")}
    assert users == {"trainer.tracking"}


@pytest.mark.parametrize("path", modules("trainer"), ids=name_of)
def test_no_file_asks_which_task_it_is(path: Path) -> None:
    """A task's `needs` say what it reads; its evaluators, how it is scored and compared."""
    if name_of(path).startswith(("trainer.tasks", "trainer.config.task")):
        return
    text = path.read_text(encoding="utf-8")
    kinds = [kind.removesuffix("Config") for kind in dir(trainer.config) if issubclass_of_task(kind)]
    named = "|".join(kinds)
    assert len(kinds) == 9
    assert re.findall(rf"isinstance\([^()]*\b(?:{named})(?:Config)?\b|case (?:{named})(?:Config)?\(", text) == []
    assert re.findall(r"task\.kind (?:==|!=|in|not in) *[\"'({[]|match [\w.]*task\b", text) == []
    for form in ASKED_OTHERWISE:
        assert re.findall(form, text) == []


_TABLE = r"(?:(?:tables\.)?(?:BASKETS|SEQUENCES)(?:\.name)?|[\"'](?:baskets|sequences)[\"'])"
ASKED_OTHERWISE = (  # by its table, by its evaluators, or by a flag that only tasks of one kind set
    rf"(?:==|!=|\bis|\bin|\bmatch|\bcase)\s+\(?{_TABLE}|{_TABLE}\s*(?:==|!=)",
    r"\bevaluators(?:\[0\])?\s*(?:==|!=)\s*[\"'(]|[\"']\s+(?:not\s+)?in\s+[\w.]*evaluators\b",
    r"\breads_baskets\b|\b(?:if|elif|and|or|not)\s+\w[\w.]*\.baskets\b(?!\s+is)",
)


@pytest.mark.parametrize(
    "branch",
    [
        "if config.task.needs.table == tables.BASKETS.name:",
        'read = one if task.needs.table == "baskets" else other',
        "match task.needs.table:\n    case tables.BASKETS.name:",
        "if source.baskets:",
        "names if task.reads_baskets else others",
        'if "items" in task.evaluators:',
        'if task.evaluators[0] == "clicks":',
    ],
)
def test_a_branch_on_a_tasks_kind_is_seen_in_any_form(branch: str) -> None:
    assert any(re.search(form, branch) for form in ASKED_OTHERWISE)


def issubclass_of_task(name: str) -> bool:
    kind = getattr(trainer.config, name)
    return isinstance(kind, type) and issubclass(kind, trainer.config.TaskSettings)


def test_few_files_lie_outside_rooms() -> None:
    assert len(list((ROOT / "trainer").glob("*.py"))) <= 8


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("etl.tables", ("pyspark", "torch", "deltalake")),
        ("etl.settings", ("pyspark", "torch")),
        ("etl.config", ("pyspark", "torch")),
        ("etl.command", ("pyspark", "torch")),
        ("trainer.config", ("pyspark", "torch", "mlflow")),
        ("trainer.data.release", ("pyspark", "mlflow")),
    ],
)
def test_importing_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_ours_and_all_listed() -> None:
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).is_relative_to(ROOT)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for package in PACKAGES for path in modules(package)}
    data = ["graftrec.conf", "graftrec.mlflow_projects"]
    assert sorted(listed) == sorted([*data, *(name_of(folder) for folder in folders)])


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[str]:
    """Names of a function's parameters, self and cls aside."""
    given = function.args
    variadic = [each for each in (given.vararg, given.kwarg) if each is not None]
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *variadic)]
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(self, a, /, b, *c, d, **e): pass", ["a", "b", "d", "c", "e"]),
        ("async def f(cls, a=1): pass", ["a"]),
        ("lambda a, b: a", ["a", "b"]),
    ],
)
def test_parameters_of_every_kind_are_counted(source: str, expected: list[str]) -> None:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS)]
    assert [parameters(function) for function in functions] == [expected]


def test_no_function_has_more_than_seven_parameters() -> None:
    """More become an object: a frozen dataclass with a name and a docstring."""
    paths = [path for package in PACKAGES for path in modules(package)]
    counts = {
        f"{name_of(path)}:{node.lineno}": len(parameters(node))
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, FUNCTIONS)
    }
    assert len(counts) > 1_000
    assert {place: count for place, count in counts.items() if count > 7} == {}


def test_no_file_is_a_drawer_of_odds_and_ends() -> None:
    names = {path.name for package in PACKAGES for path in modules(package)}
    assert not names & {"utils.py", "helpers.py", "common.py"}


# --- configuration ----------------------------------------------------------------------------------------------------


class Preset(Section):
    """What goes together, whatever it is trained on."""

    model: trainer.config.ModelConfig
    task: trainer.config.TaskConfig | None = None
    train: trainer.config.TrainConfig


def kinds() -> dict[str, type[Section]]:
    """Folder of conf/ -> what its files build."""
    found: dict[str, type[Section]] = {
        "pipeline": PipelineConfig,
        "experiment": ExperimentConfig,
        "arms": ArmsConfig,
        "protocols": ProtocolsConfig,
        "preset": Preset,
    }
    for module in (etl.config, trainer.config):
        for name in dir(module):
            kind = getattr(module, name)
            if isinstance(kind, type) and issubclass(kind, Section) and name.endswith("Config"):
                found[name.removesuffix("Config").lower()] = kind
    return found


YAMLS = sorted((ROOT / "conf").rglob("*.yaml"))


class Holder(Section):
    """A section of each kind that is a union, and so has no class of its own."""

    source: etl.config.SourceConfig | None = None


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT / "conf").with_suffix("").as_posix())
def test_every_yaml_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    section = path.parent.name
    if section in Holder.model_fields:
        (tmp_path / "holder.yaml").write_text(f"{section}: {path.stem}")
        assert getattr(load(Holder, tmp_path / "holder.yaml"), section) is not None
    else:
        load(kinds()[section], f"{section}/{path.stem}")


SOURCES = {path for path in YAMLS if path.parent.name in ("source", "knowledge")}  # of public data


def settings_in(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of each setting but names."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            if f"{name}.{key}" not in (".name", ".preset"):
                yield from settings_in(below, f"{name}.{key}")
    else:
        yield name, value


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in set(YAMLS) - SOURCES}))
def test_no_two_configurations_are_nearly_the_same(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = [path.stem for path in YAMLS if path.parent.name == folder]
    built = {name: load(kinds()[folder], f"{folder}/{name}").model_dump(mode="json") for name in names}
    found = {name: dict(settings_in(dumped)) for name, dumped in built.items()}
    for one, other in itertools.combinations(names, 2):
        keys = found[one].keys() | found[other].keys()
        differ = [key for key in keys if found[one].get(key) != found[other].get(key)]
        assert len(differ) >= 3, f"{folder}: {one} and {other} differ in {differ}: override them, or merge the files"


def sections(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for below in kind.__subclasses__():
        if below.__module__.startswith(("etl.", "trainer.")):
            yield below
            yield from sections(below)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", math.inf, math.nan])
def test_every_number_is_finite(value: object) -> None:
    kinds()  # imports them all
    tried = 0
    for kind in sections():
        for name, field in kind.model_fields.items():
            if float not in (field.annotation, *get_args(field.annotation)):
                continue
            tried += 1
            with pytest.raises(pydantic.ValidationError) as raised:
                kind.model_validate({name: value})
            assert name in {error["loc"][0] for error in raised.value.errors()}, f"{kind.__name__}.{name}"
    assert tried > 40


@pytest.mark.parametrize("values", ["[.nan, 0.1]", "[1e-3, inf]", "{low: 0.1, high: .inf}"])
def test_a_search_space_is_finite(values: str) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        load(trainer.config.SearchConfig, "search/demo", ["--space", "{train.learning_rate: " + values + "}"])


def test_a_changed_configuration_is_validated_again() -> None:
    """By `replaced`; pydantic's `model_copy(update=…)` and `model_construct` validate nothing."""
    paths = [path for package in PACKAGES for path in modules(package)]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("model_copy", "model_construct")), path
    config = trainer.config.FinetuneConfig(shared_items=True)
    assert replaced(config, name="other").name == "other"
    assert type(replaced(config, name="other").data) is type(config.data)
    for changes, told in (
        ({"transfer": "none"}, "shared_items: transfer none takes nothing from a parent"),
        ({"train": {"clip_norm": math.inf}}, "train.clip_norm: expected a finite number"),
        ({"nmae": "x"}, "unknown setting nmae; did you mean name"),
    ):
        with pytest.raises(ConfigError, match=told):
            replaced(config, **changes)


# --- files that must agree --------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return dict(re.split("==", line.lower()) for line in lines if line)


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=!~ ;]", requirement)[0].lower() for requirement in wanted}
    assert names <= pins().keys()
    assert all(re.fullmatch(r"[0-9a-z.]+", version) for version in pins().values())  # no local versions, no paths


def test_project_environment_has_the_same_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = yaml.safe_load((ROOT / "mlflow_projects" / "python_env.yaml").read_text())["dependencies"]
    versions = {re.sub(r"\[.*\]", "", name): version for name, version in (line.split("==") for line in listed)}
    assert {name: pins()[name.lower()] for name in versions} == versions
    wanted = {re.split(r"[\[<>=!~ ;]", requirement)[0] for requirement in project["dependencies"]}
    assert wanted == versions.keys()


def test_project_names_configurations_that_exist() -> None:
    entries = yaml.safe_load((ROOT / "mlflow_projects" / "MLproject").read_text())["entry_points"]
    recipes = {"etl", "pretrain", "finetune", "features", "search", "evaluate", "backtest", "promote", "recommend"}
    assert entries.keys() == recipes | {"main", "experiment", "arms", "protocols"}
    for entry_point, entry in entries.items():
        named = {name: parameter["default"] for name, parameter in entry["parameters"].items()}
        default = named["config"] if "config" in named else f"{entry_point}/{named['experiment']}"
        assert (ROOT / "conf" / f"{default}.yaml").is_file(), default


def tracked_text() -> Iterator[tuple[str, str]]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def test_no_file_names_somebodys_machine() -> None:
    paths = re.compile(r"/(?:home|Users|root|work)/\w+|/tmp/\w+/")
    assert {name: found for name, text in tracked_text() if (found := paths.findall(text))} == {}


def test_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert {room for room in ROOMS if "__" not in room and f"`{room.split('.')[-1]}`" not in text} == set()


def test_modules_that_texts_name_exist() -> None:
    texts = {name: text for name, text in tracked_text() if name.endswith((".py", ".md", ".yaml"))}
    ours = {Path(name).name for name in [*texts, __file__]}
    named = {(name, module) for name, text in texts.items() for module in re.findall(r"`(?:[\w.]+/)*(\w+\.py)`", text)}
    assert {(name, module) for name, module in named if module not in ours} == set()


def test_imports_in_texts_name_what_exists() -> None:
    """Also those of scripts that tests hold as text, which no linter reads."""
    found = re.compile(r"""(?:^|[\n;"' ])from ((?:etl|trainer|graftrec|tests)(?:\.\w+)*) import (\w+(?:, \w+)*)""")
    files = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (path.name, module, name)
        for path in files
        if path.name not in ("test_source_hash.py", "test_old_versions.py")  # with modules of their own
        for module, names in found.findall(path.read_text(encoding="utf-8"))
        for name in names.split(", ")
    }
    assert {one for one in named if not _is_there(*one[1:])} == set()


def _is_there(module: str, name: str) -> bool:
    place = ROOT.joinpath(*module.split("."))
    if (place / name).is_dir() or (place / f"{name}.py").exists():
        return True
    file = place.with_suffix(".py") if place.with_suffix(".py").exists() else place / "__init__.py"
    return file.exists() and re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) is not None
