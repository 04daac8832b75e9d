"""Other processes that hold a lake's lease."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HOLD = """
import os, sys, time
from etl.lake import lease
from shows import SHOWS
lease.RENEW_SECONDS = 0.3
lake, children = sys.argv[1], int(sys.argv[2])
with lease.writing(lake, SHOWS):
    if children and os.fork() == 0:
        time.sleep(60)
    print("holding", os.getpid(), flush=True)
    sys.stdin.readline()  # whoever started it says when to commit
    from etl.lake.commit import Commit, commit_files
    try:
        commit_files(lake, SHOWS, [], Commit(mode="append", app="late", app_version=0, metadata={}))
    except lease.LeaseLost as error:
        print("refused", error.exit_code, error, flush=True)
    else:
        print("committed", flush=True)
"""


@contextmanager
def holder(lake: str, *, children: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease of `lake` until it is killed, or gets a line: then it commits, and says so."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, lake, str(children)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("holding")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too
        process.wait()
        process.stdout.close()
