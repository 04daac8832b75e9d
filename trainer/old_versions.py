"""What lets versions of 0.1, registered before modules were moved into rooms, load beside today's code. Goes with 0.2.

A registered version carries the code that it was made by, and runs it in a process of its own. Where `trainer` is
imported already, as in a notebook that trains and serves, Python finds this package instead, and the version's code
imports names that are no more. They lead to today's modules, which read the same model folders and give the same
answers. With this file go its uses in `trainer/__init__.py`, `trainer/serving/__init__.py`,
`trainer/inference/model_folder.py` and `etl/config.py`.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What the code of a version imports: module -> (today's module, {name: today's name}).
_MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "trainer.artifact": (
        "trainer.inference.model_folder",
        {"ArtifactError": "ModelFolderError", "load_artifact": "load_model"},
    ),
    "trainer.outbox": ("trainer.tracking.queue", {}),
    "trainer.patches": ("trainer.inference.delta_folder", {}),
    "trainer.serving": ("trainer.inference.recommender", {}),
}


class _OldNames(MetaPathFinder, Loader):
    """Finds the modules in _MOVED. Python asks it last, so it hides no module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        today, renamed = _MOVED[module.__name__]
        found = vars(import_module(today))
        public = {name: value for name, value in found.items() if not name.startswith("_")}
        vars(module).update(public | {old: found[new] for old, new in renamed.items()})


def install() -> None:
    """Let old names be imported in this process."""
    sys.meta_path.append(_OldNames())


def moved(module: str, name: str) -> Any:
    """What an old module of a name that is in use again had. Raises AttributeError."""
    today, renamed = _MOVED[module]
    try:
        return getattr(import_module(today), renamed.get(name, name))
    except AttributeError:
        raise AttributeError(f"module {module!r} has no attribute {name!r}") from None


def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a model folder, as today's code means them.

    `evaluation.repeats` was true by default and of baskets alone; today true is of items, too, and null the default. A
    folder from before has no `runtime.collective_seconds`.
    """
    evaluation, runtime = config.get("evaluation"), config.get("runtime")
    if not isinstance(evaluation, dict) or not isinstance(runtime, dict):
        return config  # which validation refuses
    if evaluation.get("repeats") is not True or "collective_seconds" in runtime:
        return config
    return {**config, "evaluation": {**evaluation, "repeats": None}}
