"""A tracking server that answers anything: what asks it ends in one line, or goes on, and never hangs."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.settings import GraftrecError
from tests.fixtures.hostile import EXAMPLES, SEEDED, json_values, spoilt
from trainer import tracking
from trainer.registry import Registry, Version, audit_trail
from trainer.registry.promotion_lock import all_pages
from trainer.registry.version import audit_tags
from trainer.tracking import TrackingError, spool

TAGS = [
    {"key": "graftrec.hash", "value": "ab" * 16},
    {"key": "graftrec.kind", "value": "patch"},
    {"key": "graftrec.parent", "value": "cd" * 16},
    {"key": "graftrec.domain", "value": "target"},
    {"key": "graftrec.audit", "value": '[{"action": "promoted"}]'},
]
VERSION = {
    "name": "graftrec",
    "version": "3",
    "creation_timestamp": 1,
    "last_updated_timestamp": 2,
    "current_stage": "None",
    "source": "file:///nowhere",
    "run_id": "r",
    "status": "READY",
    "tags": TAGS,
    "aliases": ["champion"],
}
ANSWERS = {
    "model-versions/search": {"model_versions": [VERSION]},
    "model-versions/get-download-uri": {"artifact_uri": "file:///nowhere"},
    "model-versions/get": {"model_version": VERSION},
    "registered-models/get": {
        "registered_model": {"name": "graftrec", "aliases": [{"alias": "champion", "version": "3"}], "tags": []}
    },
    "registered-models/search": {
        "registered_models": [
            {"name": "graftrec.promotion-lock.1", "tags": [{"key": "graftrec.until", "value": "99999999999"}]}
        ]
    },
    "experiments/search": {"experiments": [{"experiment_id": "1", "name": "graftrec", "lifecycle_stage": "active"}]},
    "experiments/get-by-name": {
        "experiment": {"experiment_id": "1", "name": "graftrec", "lifecycle_stage": "active", "tags": []}
    },
    "runs/search": {"runs": []},
    "runs/create": {"run": {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}},
    "runs/get": {"run": {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}},
    "logged-models/search": {"models": []},
}


class Answers(BaseHTTPRequestHandler):
    """Of each request the answer that `given` has for its path, else {}."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = next((name for name in self.server.given if self.path.partition("?")[0].endswith(name)), None)
        status, body = self.server.given[name] if name else (200, b"{}")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PATCH = do_DELETE = do_GET

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        found = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        found.given = {}
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{found.server_port}")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        yield found
        found.shutdown()
        found.server_close()


def answering(server, answers=None, status=200):
    """Let the server answer these, by the end of a request's path."""
    server.given = {name: (status, json.dumps(one).encode()) for name, one in (answers or ANSWERS).items()}


def uses(registry):
    """What asks for versions in one way each."""
    return (
        registry.versions,
        lambda: registry.version("champion"),
        lambda: registry.find("champion"),
        lambda: registry.of_hash("ab" * 16),
        lambda: registry.for_domain(registry.version("3"), "books"),
        lambda: registry.companion(registry.version("3")),
        lambda: audit_trail(registry.version("3")),
        lambda: registry.stored(registry.version("3")),
        lambda: registry.folder(registry.version("3")),
    )


def ended_in_a_line(use):
    begun, said = time.monotonic(), "fine"
    try:
        use()
    except GraftrecError as error:
        said = str(error)
    assert said
    assert len(said.splitlines()) == 1
    assert time.monotonic() - begun < 20
    return said


def test_the_server_of_these_tests_is_understood(server):
    answering(server)
    (version,) = Registry("graftrec").versions()
    assert (version.label, version.aliases, version.hash) == ("graftrec/3", ("champion",), "ab" * 16)
    assert audit_trail(version) == [{"action": "promoted"}]


@pytest.mark.parametrize("name", ["model-versions/search", "registered-models/get", "model-versions/get-download-uri"])
@pytest.mark.parametrize(
    "body", [b"", b"x", b"[]", b"null", b"3", b"{", b"\xff", b"[" * 5_000, b'{"a": ' + b"9" * 9_000]
)
def test_an_answer_that_is_none_ends_in_a_line(server, name, body):
    answering(server)
    server.given[name] = (200, body)
    for use in uses(Registry("graftrec")):
        ended_in_a_line(use)


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "9" * 5_000, None, [], "٣", "1\n2"])
def test_a_version_with_another_number_ends_in_a_line(server, number):
    answering(server, ANSWERS | {"model-versions/search": {"model_versions": [VERSION | {"version": number}]}})
    for use in uses(Registry("graftrec")):
        ended_in_a_line(use)


def test_pages_without_end_are_left(server):
    pages = {"model_versions": [VERSION], "next_page_token": "again"}
    answering(server, ANSWERS | {"model-versions/search": pages})
    assert "has no end" in ended_in_a_line(Registry("graftrec").versions)


def test_pages_are_all_read():
    class Page(list):
        token = None

    def search(wanted, page_token):
        page = Page([int(page_token or 0)])
        page.token = str(page[0] + 1) if page[0] < 4 else None
        return page

    assert all_pages(search, "all") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["", "x", "{}", "[1]", "null", "[", "[" * 50_000, '[{"a": 1, "a": 2}]'])
def test_a_damaged_trail_is_named_and_not_written_over(text):
    version = Version("graftrec", 3, (), {"graftrec.audit": text}, "")
    for use in (audit_trail, lambda one: audit_tags(one, {"action": "promoted"})):
        with pytest.raises(TrackingError, match=r"graftrec/3: expected a list of JSON objects in the tag"):
            use(version)


@pytest.mark.parametrize("until", ["", "x", "nan", "inf", "-1", "1e3", "9" * 400])
def test_a_lock_without_an_end_is_named(server, until):
    lock = {"name": "graftrec.promotion-lock.1", "tags": [{"key": "graftrec.until", "value": until}]}
    found = {
        "registered-models/search": {"registered_models": [lock]},
        "registered-models/get": {"registered_model": lock},
    }
    answering(server, ANSWERS | found)

    def promote():
        with Registry("graftrec").promoting(wait_seconds=1):
            pass

    assert "graftrec.until" in ended_in_a_line(promote)


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES)
def test_any_answer_ends_in_a_line(server, data):
    name = data.draw(st.sampled_from(sorted(ANSWERS)[:6]))
    answers = ANSWERS | {name: data.draw(spoilt(ANSWERS[name]) | json_values)}
    answering(server, answers, data.draw(st.sampled_from([200, 200, 200, 400, 404])))
    for use in uses(Registry("graftrec")):
        ended_in_a_line(use)


@given(st.data())
@settings(SEEDED, max_examples=EXAMPLES // 6)
def test_a_run_goes_on_whatever_the_server_answers(server, tmp_path_factory, data):
    from trainer.config import TrackingConfig

    name = data.draw(st.sampled_from(["experiments/get-by-name", "runs/search", "runs/create", "runs/get"]))
    answering(server, ANSWERS | {name: data.draw(spoilt(ANSWERS[name]) | json_values)})
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = TrackingConfig(close_seconds=0.2, system_metrics=False)
        with tracking.start_run(config, name="any", resolved=config) as run:
            run.log_metrics({"loss": 1.0})


# --- the spool ------------------------------------------------------------------------------------------------------


HEADER = {"uid": "u", "uri": "x", "name": "n", "run_id": "", "tags": {}, "start": 1, "joined": None}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "3", "{}", '{"header": {}, "entries": []}', '{"header": [], "entries": {}}', "[" * 50_000]
    + [json.dumps({"header": HEADER, "entries": other}) for other in (3, {}, [1], [[]], [{}])],
)
def test_a_spool_that_is_none_is_passed_over_with_a_warning(content, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unsent.json").write_text(content)
    assert spool.kept(tmp_path) == []
    assert "can't read" in capsys.readouterr().err


def test_a_spool_sends_no_file_but_its_own(tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "own.txt").write_text("own")
    (tmp_path / "run" / "link.txt").symlink_to(tmp_path / "secret.txt")
    paths = [tmp_path / "secret.txt", tmp_path / "run" / ".." / "secret.txt", tmp_path / "run" / "link.txt"]
    entries = [{"kind": "artifact", "path": str(path), "folder": ""} for path in [*paths, tmp_path / "run" / "own.txt"]]
    (tmp_path / "run" / "unsent.json").write_text(json.dumps({"header": HEADER, "entries": entries}))
    ((_, _, kept),) = spool.kept(tmp_path)
    assert [entry["path"] for entry in kept] == [str(tmp_path / "run" / "own.txt")]
    assert "which is not sent" in capsys.readouterr().err
