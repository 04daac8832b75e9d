"""How YAML files are composed: named sections, `base`, and overrides."""

from pathlib import Path
from typing import Any

import pytest

from etl.settings import ConfigError, Section, conf_roots, load
from tests.fixtures.places import ROOT


class Network(Section):
    width: int = 1
    depth: int = 1


class Recipe(Section):
    name: str = ""
    model: Network = Network()
    steps: int = 1


class Search(Section):
    recipe: Recipe = Recipe()
    arms: dict[str, Recipe] = {}  # noqa: RUF012


FILES = {
    "preset/narrow.yaml": "{model: {width: 2, depth: 2}, steps: 20}",
    "preset/wide.yaml": "{model: {width: 8}, steps: 80}",
    "recipe/narrow.yaml": "{base: preset/narrow, name: mine, model: {depth: 3}}",
    "recipe/beside.yaml": "{base: narrow, steps: 5}",
    "recipe/loop.yaml": "{base: recipe/loop}",
    "recipe/number.yaml": "{base: 3}",
    "recipe/orphan.yaml": "{base: preset/nobody}",
    "search/named.yaml": "{recipe: narrow}",
    "search/inside.yaml": "{recipe: {base: narrow, steps: 7}}",
    "search/preset.yaml": "{recipe: {base: preset/wide, model: {depth: 9}}, arms: {a: {model: {base: ../preset/net}}}}",
    "preset/net.yaml": "{width: 5}",
    "model/net.yaml": "{width: 6}",
    "search/arms.yaml": "{arms: {a: {model: {base: net, depth: 4}}, b: {model: net}}}",
}
NARROW = {"name": "mine", "model": {"width": 2, "depth": 3}, "steps": 20}


@pytest.fixture(autouse=True)
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("GRAFTREC_CONF", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "overrides", "wanted"),
    [
        ("recipe/narrow", "", NARROW),
        ("recipe/beside", "", {**NARROW, "steps": 5}),
        ("recipe/narrow", "--base preset/wide", {"name": "mine", "model": {"width": 8, "depth": 3}, "steps": 80}),
        ("recipe/narrow", "--steps 1 --base=preset/wide", {**NARROW, "model": {"width": 8, "depth": 3}, "steps": 1}),
        ("search/named", "", {"recipe": NARROW, "arms": {}}),
        ("search/inside", "", {"recipe": {**NARROW, "steps": 7}, "arms": {}}),
        (
            "search/inside",
            "--recipe.model.width 4",
            {"recipe": {**NARROW, "model": {"width": 4, "depth": 3}, "steps": 7}},
        ),
        ("search/named", "--recipe.steps 2 --recipe.base preset/wide", {"recipe": {"name": "mine", "steps": 2}}),
        ("search/inside", "--recipe.base preset/wide", {"recipe": {"name": "", "model": {"width": 8}, "steps": 7}}),
        ("search/arms", "--recipe.base narrow", {"recipe": NARROW, "arms": {"b": {"model": {"width": 6, "depth": 1}}}}),
        ("search/arms", "", {"arms": {"a": {"model": {"width": 6, "depth": 4}}}}),
        ("search/preset", "", {"recipe": {"model": {"width": 8, "depth": 9}}, "arms": {"a": {"model": {"width": 5}}}}),
    ],
)
def test_base_is_read_beneath(name: str, overrides: str, wanted: dict[str, Any]) -> None:
    found = load(Recipe if name.startswith("recipe") else Search, name, overrides.split()).model_dump()
    assert _part(found, wanted) == wanted


def _part(found: Any, wanted: Any) -> Any:
    return {key: _part(found[key], one) for key, one in wanted.items()} if isinstance(wanted, dict) else found


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("recipe/loop", "", "expected another file as base, found one that inherits this one"),
        ("recipe/number", "", "base: expected the name of a file, found 3"),
        ("recipe/orphan", "", "no configuration preset/nobody: expected .* one of .*preset/: .*narrow"),
        ("recipe/narrow", "--base preset/nobody", "no configuration preset/nobody"),
        ("search/named", "--recipe.base nobody", "no configuration .*recipe/nobody"),
        ("search/named", "--recipe.model.base [1]", "base: expected the name of a file"),
    ],
)
def test_wrong_bases_are_refused_by_name(name: str, overrides: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(Recipe if name.startswith("recipe") else Search, name, overrides.split())


# --- the user's own folder before graftrec's --------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A conf folder of the working directory, with one configuration named as one of ours."""
    (tmp_path / "conf" / "etl").mkdir(parents=True)
    (tmp_path / "conf" / "etl" / "demo.yaml").write_text("{base: demo, lake: mine}")
    (tmp_path / "conf" / "etl" / "shop.yaml").write_text("{base: etl/ml100k, source: generator, lake: shop}")
    monkeypatch.delenv("GRAFTREC_CONF")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


def test_an_own_folder_needs_only_what_differs(own: Path) -> None:
    from etl.config import EtlConfig, GeneratorSource

    assert conf_roots() == (Path("conf"), ROOT / "conf")
    mine, shop = load(EtlConfig, "etl/demo"), load(EtlConfig, "etl/shop")
    assert (mine.lake, mine.source.kind, len(mine.splits)) == ("mine", "generator", 3), "base: demo is graftrec's demo"
    assert (shop.lake, isinstance(shop.source, GeneratorSource)) == ("shop", True)
    assert load(EtlConfig, "etl/ml1m").source.kind == "movielens"
    with pytest.raises(ConfigError, match=r"one of conf/etl/, .*/conf/etl/: calendar_demo, demo, .*shop"):
        load(EtlConfig, "etl/nope")


def test_a_variable_names_another_own_folder(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from etl.config import EtlConfig

    monkeypatch.chdir(own / "etl")
    assert load(EtlConfig, "etl/demo").lake == "lake"
    monkeypatch.setenv("GRAFTREC_CONF", str(own))
    assert load(EtlConfig, "etl/demo").lake == "mine"
    monkeypatch.setenv("GRAFTREC_CONF", str(own / "nowhere"))
    with pytest.raises(ConfigError, match=r"GRAFTREC_CONF: expected a folder of YAML files, found none at .*nowhere"):
        load(EtlConfig, "etl/demo")


def test_in_a_checkout_a_folder_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTREC_CONF")
    monkeypatch.chdir(ROOT)
    assert conf_roots() == (Path("conf"),)
