"""Keeps secrets out of all that is written: `redact` for messages, `without_secrets` for settings.

A secret is what a name says is one: of an environment variable, of a setting, of a parameter in a URI or a connection
string; and whatever stands as user and password in a URI. Values of secret settings are remembered when a configuration
is loaded, so that they are found in any text, also in what a library says of them. Imports the standard library only.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TextIO
from urllib.parse import quote, unquote

HIDDEN = "***"
MIN_CHARACTERS = 6  # of a value that is looked for in texts; a shorter one would be found in any word

_SECRET_NAME = re.compile(
    r"passw|passcode|passphrase|pwd|secret|token(?!i[sz])|credential|auth(?!or(?!i))|dsn|jaas|jwt|bearer|cookie|webhook"
    r"|signature|sasl|sas(?:ur[il]|(?![a-z]))|conn(?:ection)?[^a-z]?str"
    r"|(?:access|account|api|client|encryption|license|master|private|shared|signing|ssh|storage)[^a-z]?key"
    r"|(?<!by)(?<!com)pass(?![a-z])|(?<![a-z])(?:creds?|keys?|pw|sig)(?![a-z])",
    re.IGNORECASE,
)
_NOT_SECRET = {"PWD", "OLDPWD"}
_PATH_NAME = re.compile(r"(?:dir|file|folder|home|path|sock)$", re.IGNORECASE)  # of a value that looks like a path
# A scheme, and what stands before a host. Databases' passwords may hold slashes; a port is no password.
_USER_INFO = re.compile(
    r"(?<![\w+.-])([a-z][\w+.-]*)://([^/\s@:]*:(?!\d+/)[^\s@]*(?:@[^/\s@]+)*|[^/\s]+)@", re.IGNORECASE
)
_WITH_CONTAINER = ("abfs", "abfss", "wasb", "wasbs")  # Azure's schemes: container@account
# Not of a path, where a part `key=value` is a partition.
_PAIR = re.compile(r"(?<![\w.%/-])([\w.%-]+)=(\"[^\"]*\"|'[^']*'|[^\s&;'\"]+)")
_SCHEME = re.compile(r"^\s*(?:basic|bearer)\s+(\S+)", re.IGNORECASE)

# Values of settings with such names that are no secrets: spark.hadoop.hadoop.security.authentication and the like.
_PLAIN = {"anonymous", "custom", "default", "disabled", "enabled", "kerberos", "oauth2", "required", "simple"}

_remembered: set[str] = set()  # forms of the values of secret settings


def is_secret(name: str) -> bool:
    """Whether a name says that its value is secret."""
    return name not in _NOT_SECRET and _SECRET_NAME.search(name) is not None


def redact(text: str) -> str:
    """`text` without the secrets of the environment and of loaded settings, and without credentials in URIs and
    connection strings."""
    found = set(_remembered)
    for name, value in list(os.environ.items()):
        found.update(_secrets_of(name, value))
    for secret in sorted(found, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _PAIR.sub(_without_value, _USER_INFO.sub(_without_user, text))


def without_secrets(value: Any, name: str = "") -> Any:
    """Settings as they may be shown. `name`: dotted, of the value."""
    if isinstance(value, Mapping):
        return {key: without_secrets(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(entry, name) for entry in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(name):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def remember(value: Any, name: str = "") -> None:
    """Look for the secrets among these settings in all that is written from now on."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            remember(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for entry in value:
            remember(entry, name)
    elif value is not None and not isinstance(value, bool):
        _remembered.update(_secrets_of(name, str(value)))


def has_credentials(uri: str) -> bool:
    """Whether a URI holds a user, a password, a key or a signature."""
    return "://" in uri and (
        any(_is_user(found) for found in _USER_INFO.finditer(uri))
        or any(_is_secret_pair(pair) for pair in _PAIR.finditer(uri))
    )


@contextmanager
def redacted_output() -> Iterator[None]:
    """Redact what Python writes to stdout and stderr meanwhile."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Redacted(before[0]), _Redacted(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def unread_is_fine(stream: IO[str]) -> Iterator[None]:
    """Let what is written go nowhere, from now on, where the stream is a pipe whose reader has gone."""
    try:
        yield
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write(text: str, stream: TextIO) -> None:
    """Write a text; what the stream's encoding lacks, as of a locale such as C, is written as an escape."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _Redacted:
    """A text stream that redacts what is written to it. The work goes on where its reader has gone (``| head``)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with unread_is_fine(self._stream):
            write(redact(text), self._stream)
        return len(text)

    def flush(self) -> None:
        with unread_is_fine(self._stream):
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_user(found: re.Match[str]) -> bool:
    return found[1].lower() not in _WITH_CONTAINER or ":" in found[2]


def _without_user(found: re.Match[str]) -> str:
    return f"{found[1]}://{HIDDEN}@" if _is_user(found) else found[0]


def _is_secret_pair(pair: re.Match[str]) -> bool:
    """Whether a `name=value` holds a secret. Outside of a URI's query, `key=value` names a form."""
    of_uri = pair.string[max(pair.start() - 1, 0)] in "?&;"
    return is_secret(pair[1]) and (of_uri or pair[1].lower() not in ("key", "keys"))


def _without_value(pair: re.Match[str]) -> str:
    return f"{pair[1]}={HIDDEN}" if _is_secret_pair(pair) else pair[0]


@functools.lru_cache(maxsize=10_000)
def _secrets_of(name: str, value: str) -> tuple[str, ...]:
    """The secrets in the value of a name, in each form that a text may show them in."""
    secrets = [pair[2].strip("'\"") for pair in _PAIR.finditer(value) if _is_secret_pair(pair)]
    secrets += [found[2].partition(":")[2] or found[2] for found in _USER_INFO.finditer(value) if _is_user(found)]
    if is_secret(name) and not (_PATH_NAME.search(name) and value.startswith(("/", "~", "."))):
        secrets += [value, value.strip()]
        secrets += [found[1] for found in [_SCHEME.match(value)] if found]
    forms = (form for secret in secrets if secret.lower() not in _PLAIN for form in _forms(secret))
    return tuple(dict.fromkeys(form for form in forms if len(form) >= MIN_CHARACTERS))


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield unquote(secret)
    yield quote(secret)
    yield quote(secret, safe="")
    yield repr(secret)[1:-1]
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield " ".join(secret.split())


_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(?P<error>\S.*)")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error as one short line without secrets, which are taken out before it is cut.

    Of a traceback in its text, as in that of a Python worker of Spark, the last error is left.
    """
    text = redact(str(error))
    *_, last = [None, *_TRACEBACK.finditer(text)]
    text = " ".join((text if last is None else last["error"]).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
