"""The MLflow page of the store in use: ``python -m trainer.page [--port 5000]``, for `make page`."""

from etl import stopping

if __name__ == "__main__":
    stopping.begin()

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from etl.command import CommandParser, run_command
from trainer import tracking


def main(arguments: Sequence[str] | None = None, *, program: str = "python -m trainer.page") -> int:
    parser = CommandParser(program, description="serve the MLflow page on 127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    return run_command("page", lambda: _serve(parser.parse_args(arguments).port))


def _serve(port: int) -> int:
    """Serve in this process's place. Raises GraftrecError where the store can't be opened."""
    tracking.quieten()
    uri = tracking.tracking_uri()
    with tracking.translated("can't open the store"):
        tracking.connect(uri)
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    binaries = Path(sys.executable).parent  # mlflow looks for uvicorn on the path
    environment["PATH"] = f"{binaries}{os.pathsep}{environment.get('PATH', '')}"
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *command, "--backend-store-uri", uri], environment)


if __name__ == "__main__":
    stopping.leave(main())
