"""``graftrec project [FOLDER]``: writes the files of the MLflow Project, which `mlflow run FOLDER` starts.

Its commands run in the folder above, which holds tables, runs and the user's own conf/.
"""

from collections.abc import Sequence
from pathlib import Path

from etl.command import CommandParser, run_command
from etl.settings import GraftrecError

_BESIDE = Path(__file__).parent / "mlflow_projects"  # in the wheel
SHIPPED = _BESIDE if _BESIDE.is_dir() else Path(__file__).parent.parent / "mlflow_projects"
FILES = ("MLproject", "python_env.yaml")


def main(arguments: Sequence[str] | None = None, *, program: str = "graftrec project") -> int:
    parser = CommandParser(program, description="write the files of the MLflow Project into a folder, new or empty")
    parser.add_argument("folder", nargs="?", default="mlflow_projects", type=Path)
    return run_command("project", lambda: _write(parser.parse_args(arguments).folder))


def _write(folder: Path) -> int:
    """Raises GraftrecError where a file of that name holds something else."""
    texts = {folder / name: (SHIPPED / name).read_text(encoding="utf-8") for name in FILES}
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise GraftrecError(f"{path}: expected nothing or the same file, found another; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(map(str, texts))}; mlflow run {folder} --env-manager local", flush=True)
    return 0
