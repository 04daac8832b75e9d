"""Processes of one run, started as torchrun starts them but without it: each one's exit code and words are seen."""

import os
import socket
import subprocess
import sys


def start_ranks(folder, *command, count=2, nodes=False):
    """`nodes`: as if each process ran on a machine of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **place, **_of_rank(rank, count, nodes=nodes)},
        )
        for rank in range(count)
    ]


def _of_rank(rank, count, *, nodes):
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": str(count)}
    return {"RANK": str(rank)} | (local if nodes else {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)})
