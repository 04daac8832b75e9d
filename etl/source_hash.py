"""A hash of the sources that a result depends on: it changes if the code that made the result could give another.

The sources are a module and whatever it imports from our packages, directly or not, found by parsing: also imports in
functions, but not those for type checkers alone. What every run shares without changing its result is left out by name.
"""

import ast
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("etl", "trainer")


def source_hash(*modules: str, without: Collection[str] = ()) -> str:
    """16 hex digits; `modules` by dotted names. Modules and whole packages in `without` are left out, and what they
    import is not followed."""
    digest = hashlib.sha256()
    for name, path in sorted(imported_sources(*modules, without=without).items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def imported_sources(*modules: str, without: Collection[str] = ()) -> dict[str, Path]:
    """The files of these modules and of all that they import from our packages, by dotted names. Raises
    ModuleNotFoundError for a module that isn't there."""
    if missing := [name for name in modules if _file(name) is None]:
        raise ModuleNotFoundError(f"expected modules of {' or '.join(_PACKAGES)}, found {', '.join(missing)}")
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if name in found or path is None or any(name == left or name.startswith(f"{left}.") for left in without):
            continue
        found[name] = path
        status = path.stat()
        waiting += _imports(path, status.st_mtime_ns, status.st_size)
        if "." in name:
            waiting.append(name.rpartition(".")[0])  # a package's own code runs first
    return found


def _file(name: str) -> Path | None:
    first, *others = name.split(".")
    if first not in _PACKAGES:
        return None
    path = _ROOT.joinpath(first, *others)
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _imports(path: Path, modified: int, size: int) -> tuple[str, ...]:
    """Dotted names, some of them not of modules; of `from package import name` both the package and the name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(name for name in _names(tree) if name.split(".")[0] in _PACKAGES)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    else:
        children: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = node.orelse
        for child in children:
            yield from _names(child)
