"""Secrets are found by their names, wherever a text shows them."""

import json
import re
import sys

import pytest

from etl.command import run_command
from etl.config import EtlConfig, SparkConfig
from etl.redaction import has_credentials, is_secret, redact, without_secrets
from etl.settings import ConfigError, GraftrecError, Section, load

SHORT, LONG = "tell-nobody1", "a+/Z" * 75


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "DB_PWD",
        "MYSQL_PASS",
        "PROXY_AUTHORIZATION",
        "SENTRY_DSN",
        "AZURE_STORAGE_SAS",
        "AZURE_STORAGE_CONNECTION_STRING",
        "OPENAI_API_KEY",
        "GPG_KEY",
        "KEY_PASSPHRASE",
        "JWT",
        "sig",
        "spark.hadoop.fs.azure.account.key.me.dfs.core.windows.net",
        "fs.azure.sas.container.me",
        "AccountKey",
        "spark.hadoop.fs.s3a.secret.key",
        "kafka.sasl.jaas.config",
        "X-Amz-Signature",
        "auth",
        "DBPASS",
        "BLOB_SASURL",
        "BLOBSAS",
        "MYDSN",
        "SSHKEY",
        "DB_CONN_STR",
        "SLACK_WEBHOOK",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "GIT_AUTHOR_NAME",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "passes",
        "bypass",
        "MLFLOW_TRACKING_URI",
    ],
)
def test_names_that_only_look_like_it(name: str) -> None:
    assert not is_secret(name)


def test_no_setting_of_ours_has_the_name_of_a_secret() -> None:
    import trainer.config  # noqa: F401

    def sections(kind: type[Section]) -> list[type[Section]]:
        return [one for below in kind.__subclasses__() for one in (below, *sections(below))]

    assert {name for kind in sections(Section) for name in kind.model_fields if is_secret(name)} == set()


@pytest.mark.parametrize("secret", [SHORT, LONG, "two\nlines-of'it\"", "x" * 70_000])
@pytest.mark.parametrize("name", ["SERVICE_JWT", "DB_PWD", "SOME_AUTH"])
def test_no_secret_of_the_environment_is_shown_in_any_form(
    name: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, secret)
    for form in (secret, repr(secret), json.dumps(secret), f"Bearer {secret}, cut"):
        assert secret[4:10] not in redact(f"400 from the server: {form}")


def test_paths_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/somewhere/else")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/somewhere/else")
    assert redact("in /somewhere/else/lake") == "in /somewhere/else/lake"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:word@host/x", "http://***@host/x"),
        ("http://me:w@rd@host/x", "http://***@host/x"),
        ("postgresql://me:wo/rd@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://word@host", "https://***@host"),
        ("abfss://box@me.dfs.core.windows.net/lake", "abfss://box@me.dfs.core.windows.net/lake"),
        ("abfss://box:word@me.dfs/lake", "abfss://***@me.dfs/lake"),
        ("az://box/lake?sv=1&sig=wo%2Frd&se=2", "az://box/lake?sv=1&sig=***&se=2"),
        ("jdbc:x://host;user=me;password=word;a=b", "jdbc:x://host;user=me;password=***;a=b"),
        ("https://maps.example/x?key=word&a=b", "https://maps.example/x?key=***&a=b"),
        ("expected folders key=value", "expected folders key=value"),
        ("sc://host:443/;token=word;user_id=me", "sc://host:443/;token=***;user_id=me"),
        ("python --spark.x.secret.key=word --a b", "python --spark.x.secret.key=*** --a b"),
        ("http://host:80/a@b, s3://box/some_key=5/x@y", "http://host:80/a@b, s3://box/some_key=5/x@y"),
    ],
)
def test_credentials_in_addresses(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert has_credentials(text) is (shown != text and "://" in text)


def test_settings_are_shown_without_secrets() -> None:
    config = SparkConfig(master=f"sc://h/;token={SHORT}", settings={"a.password": LONG, "url": f"http://me:{SHORT}@h"})
    shown = without_secrets(config.model_dump(mode="json"))
    assert shown["settings"] == {"a.password": "***", "url": "http://***@h"}
    assert shown["master"] == "sc://h/;token=***"
    assert shown["driver_memory"] == config.driver_memory
    assert redact(f"rejected: {LONG} and {SHORT}") == "rejected: *** and ***", "found in any text from then on"


ETL = "source: {kind: generator}\nspark:\n  settings:\n"


@pytest.mark.parametrize("secret", [SHORT, LONG])
@pytest.mark.parametrize(
    ("yaml", "overrides"),
    [
        (ETL + "    a.b.secret.key: [SECRET]", ()),
        (ETL + "    a.b.secret.key: 'SECRET'\n    torn: {", ()),
        (ETL + "    a.b.secret.key: 'SECRET", ()),
        (ETL + "    plain: text", ("--spark.setings.password", "SECRET")),
        (ETL + "    plain: text", ("--lake", "s3://me:SECRET@box/lake")),
        (ETL + "    plain: text", ("--lake", "az://box/lake?sig=SECRET")),
        (ETL + "    plain: text", ("--source.seed.password", "SECRET")),
    ],
)
def test_mistakes_in_settings_do_not_show_them(tmp_path, capsys, yaml: str, overrides, secret: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "etl.yaml").write_text(yaml.replace("SECRET", secret))
    given = [word.replace("SECRET", secret) for word in overrides]

    def work() -> int:
        load(EtlConfig, tmp_path / "etl.yaml", given)
        return 0

    assert run_command("etl", work) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert secret[:10] not in error
    with pytest.raises(ConfigError) as raised:
        work()
    assert secret[:10] not in redact(str(raised.value))


def test_a_traceback_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_JWT", LONG)

    def work() -> int:
        print(f"asks with {LONG}")
        sys.stdout.writelines([f"and {LONG}\n"])
        raise RuntimeError(f"401: {LONG}")

    assert run_command("etl", work) == 1
    out, error = capsys.readouterr()
    assert out == "asks with ***\nand ***\n"
    assert re.search(r"^Traceback[\s\S]*RuntimeError: 401: \*\*\*$", error)

    def mistaken() -> int:
        raise GraftrecError(f"no {LONG}")

    assert run_command("etl", mistaken) == 2
    assert capsys.readouterr().err == "etl: no ***\n"
