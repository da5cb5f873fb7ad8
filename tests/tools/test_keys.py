"""`spectral keys`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectral.cli import app, main
from spectral.keyfile import hash_secret, load_keys

runner = CliRunner()


def run(*words: str) -> str:
    result = runner.invoke(app, ["keys", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_is_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    path = str(tmp_path / "keys.json")
    secret = run("create", "ann", "--file", path, "--model", "demo*", "--requests-per-minute", "60").strip()
    made = json.loads(run("create", "boss", "--file", path, "--admin", "--days", "30", "--json"))
    assert load_keys(path)[0].hash == hash_secret(secret) and made["role"] == "admin" and made["expires"]
    assert secret not in Path(path).read_text()
    listed = json.loads(run("list", "--file", path, "--json"))["keys"]
    assert [(key["name"], key["state"], key["models"]) for key in listed] == [
        ("ann", "valid", ["demo*"]),
        ("boss", "valid", None),
    ]
    assert "revoked since" in run("revoke", "ann", "--file", path)
    first = load_keys(path)[0].revoked
    assert json.loads(run("revoke", "ann", "--file", path, "--json"))["revoked"] == first
    table = run("list", "--file", path)
    assert "ann" in table and "revoked" in table and "boss" in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create", "ann"], "has a key 'ann' already"),
        (["create", "no name"], "name: 'no name' must be"),
        (["revoke", "bob"], "no key 'bob'; there are: ann"),
        (["list", "--file", "gone.json"], "spectral keys create"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    path = tmp_path / "keys.json"
    run("create", "ann", "--file", str(path))
    monkeypatch.setenv("SPECTRAL_AUTH__KEYS_FILE", str(path))
    monkeypatch.setattr("sys.argv", ["spectral", "keys", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
