"""What holds the project together: who may import whom, that every YAML builds, and that the files beside agree."""

import ast
import importlib.util
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pydantic
import pytest
import yaml

import etl.config
import trainer.config
from etl.settings import Section, load, replaced

ROOT = Path(__file__).parent.parent
TRAINER_MAY_IMPORT = {
    "etl",
    "etl.tables",
    "etl.config",
    "etl.command",
    "etl.plain_path",
    "etl.redaction",
    "etl.source_hash",
    "etl.stopping",
}
MAY_IMPORT_MORE = {
    "trainer/recipes/recommend.py": {"etl.lake.spark_io", "etl.lake.file_reader", "etl.lake.snapshots", "etl.session"},
    "trainer/data/release.py": {
        "etl.lake.datafile",
        "etl.lake.delta_log",
        "etl.lake.file_reader",
        "etl.lake.snapshots",
    },
}
MLFLOW_USERS = {
    "trainer/tracking/",
    "trainer/inference/recommender.py",
}  # serving: MLflow loads it as the code of a model


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


@pytest.mark.parametrize("path", modules("trainer"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_trainer_imports_only_the_contract_of_etl(path: Path) -> None:
    allowed = TRAINER_MAY_IMPORT | MAY_IMPORT_MORE.get(path.relative_to(ROOT).as_posix(), set())
    found = {name for name in of(imports(path), "etl") if is_module(name)}
    assert found <= allowed
    if path.name != "recommend.py":
        assert not of(imports(path), "pyspark")


@pytest.mark.parametrize("path", modules("etl"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_etl_imports_nothing_of_ours_nor_torch(path: Path) -> None:
    for package in ("trainer", "torch", "mlflow"):
        assert not of(imports(path), package)


def test_mlflow_is_imported_in_one_place() -> None:
    users = {path.relative_to(ROOT).as_posix() for path in modules("trainer") if of(imports(path), "mlflow")}
    assert users <= MLFLOW_USERS


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("etl.tables", ("pyspark", "torch", "deltalake")),
        ("etl.config", ("pyspark", "torch")),
        ("etl.command", ("pyspark", "torch")),
        ("trainer.config", ("pyspark", "torch", "mlflow")),
        ("trainer.data.dataset", ("pyspark", "mlflow")),
    ],
)
def test_importing_stays_light(module: str, unwanted: tuple[str, ...]) -> None:
    script = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_packages_are_ours_and_all_listed() -> None:
    for name in ("etl", "trainer"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).is_relative_to(ROOT)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for package in ("etl", "trainer") for path in modules(package)}
    assert sorted(listed) == sorted(folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders)


def test_no_file_is_a_drawer_of_odds_and_ends() -> None:
    names = {path.name for package in ("etl", "trainer") for path in modules(package)}
    assert not names & {"utils.py", "helpers.py", "common.py"}


# --- configuration ----------------------------------------------------------------------------------------------------


def script(name: str) -> ModuleType:
    """A file of mlflow_projects/, which is no package, as a module."""
    if str(ROOT / "mlflow_projects") not in sys.path:  # its files import each other by name
        sys.path.insert(0, str(ROOT / "mlflow_projects"))
    spec = importlib.util.spec_from_file_location(f"mlflow_projects_{name}", ROOT / "mlflow_projects" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kinds() -> dict[str, type[Section]]:
    """Folder of conf/ -> what its files build."""
    found: dict[str, type[Section]] = {
        "pipeline": script("pipeline").PipelineConfig,
        "experiment": script("experiment").ExperimentConfig,
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
    model: trainer.config.ModelConfig | None = None
    task: trainer.config.TaskConfig | None = None


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT / "conf").with_suffix("").as_posix())
def test_every_yaml_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    section = path.parent.name
    if section in Holder.model_fields:
        (tmp_path / "holder.yaml").write_text(f"{section}: {path.stem}")
        assert getattr(load(Holder, tmp_path / "holder.yaml"), section) is not None
    else:
        load(kinds()[section], f"{section}/{path.stem}")


def sections(kind: type[Section] = Section) -> Iterator[type[Section]]:
    for below in kind.__subclasses__():
        if below.__module__.startswith(("etl.", "trainer.", "mlflow_projects_")):
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
    with pytest.raises(etl.config.ConfigError, match="finite number"):
        load(trainer.config.SearchConfig, "search/demo", ["--space", "{train.learning_rate: " + values + "}"])


def test_a_changed_configuration_is_validated_again() -> None:
    """By `replaced`; pydantic's `model_copy(update=…)` and `model_construct` validate nothing."""
    paths = [*modules("etl"), *modules("trainer"), *sorted((ROOT / "mlflow_projects").glob("*.py"))]
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
        with pytest.raises(etl.config.ConfigError, match=told):
            replaced(config, **changes)


# --- files that must agree --------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.split("==", line.lower()) for line in lines if line and not line.startswith("#"))


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
    recipes = {"etl", "pretrain", "finetune", "search", "evaluate", "promote", "recommend"}
    assert entries.keys() == recipes | {"main", "experiment"}
    for entry in entries.values():
        named = {name: parameter["default"] for name, parameter in entry["parameters"].items()}
        default = named["config"] if "config" in named else f"experiment/{named['experiment']}"
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


# --- README -----------------------------------------------------------------------------------------------------------


def readme_commands() -> list[str]:
    """Lines of README's ``sh`` blocks, comments cut off, continued lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_readme_begins_with_the_two_commands() -> None:
    assert readme_commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [command for command in readme_commands() if command.startswith("make ")])
def test_readme_make_targets_exist(command: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_readme_configurations_exist() -> None:
    named = set(re.findall(r"--config (\w+/\w+)", "\n".join(readme_commands())))
    assert {name for name in named if not (ROOT / "conf" / f"{name}.yaml").is_file()} == set()


def test_readme_links_and_paths_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {target.split("#")[0] for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    named = set(re.findall(r"`((?:etl|trainer|tests|conf|mlflow_projects)/[\w./-]+)`", text))
    missing = {name for name in linked | named if name and not (ROOT / name).exists()}
    assert missing == set()
