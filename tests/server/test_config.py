"""The configuration, the command line and what the gateway may import."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server import __main__ as cli
from server import serving as program
from server.config import ConfigError, load_settings, schema_json
from tests.server.conftest import FAKE, ROOT, alive, serving, settings, until


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_shipped_configurations_are_valid() -> None:
    shipped = load_settings(ROOT / "config.yaml")
    assert [(model.name, model.path, model.aliases) for model in shipped.models] == [("demo-7m", "demo-7m", ("demo",))]
    three = load_settings(ROOT / "examples" / "three-models.yaml")
    assert [model.load for model in three.models] == ["startup", "startup", "on_demand"]
    assert three.models[0].limits.max_kv_bytes == 64 * 2**20
    assert three.models[0].load_message().limits.max_kv_bytes == 64 * 2**20
    assert three.models[0].limits.max_queue == 32


def test_the_settings_of_the_example_are_in_the_shipped_profile() -> None:
    from spectral.profile import SpectralProfile

    ladder = SpectralProfile.load(ROOT / "profiles" / "demo-7m.safetensors").ladder
    three = load_settings(ROOT / "examples" / "three-models.yaml")
    assert {model.setting for model in three.models} - {"auto", "exact"} <= {row.name for row in ladder}


def test_the_cold_level_reaches_the_worker(tmp_path: Path) -> None:
    named = "{name: a}, {name: b, cold_level: small}, {name: c, cold_level: fast}"
    text = f"defaults: {{cold_level: auto}}\nmodels: [{named}]"
    models = load_settings(write(tmp_path, text)).models
    assert [model.load_message().cold_level for model in models] == ["auto", "small", "fast"]
    assert load_settings(write(tmp_path, "models: [{name: a}]")).models[0].load_message().cold_level == "fast"


def test_schema_file_is_current() -> None:
    current = (ROOT / cli.SCHEMA_FILE).read_text(encoding="utf-8")
    assert current == schema_json(), "run: python -m server schema > config.schema.json"


@pytest.mark.parametrize(
    ("text", "field", "remedy"),
    [
        ("models: [{name: a, treads: 2}]", "models.0.treads", "check its spelling"),
        ("models: [{path: a}]", "models.0.name", "required"),
        ("models: [{name: a, cold_level: tiny}]", "models.0.cold_level", "'auto', 'fast' or 'small'"),
        ("models: []", "models", "at least 1"),
        ("models: [{name: a}, {name: b, aliases: [a]}]", "configuration", "'a' is used by model 'a' and again by 'b'"),
        ("models: [{name: a, aliases: [a]}]", "configuration", "must be unique"),
        ("models: [{name: a, limits: {max_kv_bytes: 5 apples}}]", "models.0.limits.max_kv_bytes", "512MiB"),
        ("models: [{name: a, quantization: int3}]", "models.0.quantization", "'none', 'nf4' or 'int8'"),
        ("server: {host: 0.0.0.0}\nmodels: [{name: a}]", "server.host", "auth.allow_without_keys: true"),
        ("server: {host: '::', allow_public: true}\nmodels: [{name: a}]", "server.host", "auth.keys_file"),
        ("auth: {keys_file: gone.json}\nmodels: [{name: a}]", "keys_file: gone.json", "spectral keys create"),
        ("auth: {keys: [{name: a, hash: x}]}\nmodels: [{name: a}]", "auth.keys.0.hash", "sha256"),
        ("server: {port: 70000}\nmodels: [{name: a}]", "server.port", "65535"),
        ("server:\n  port: 1\nmodels:\n  - name: a\n    treads: 2", "line 5: models.0.treads", "check its spelling"),
        ("server:\n  prot: 1\nmodels: [{name: a}]", "line 2: server.prot", "check its spelling"),
        ("modles: [{name: a}]", "line 1: modles", "check its spelling"),
        ("models:\n- name: a\n- {}", "line 3: models.1.name", "required"),
        ("models: a", "line 1: models", "must be a list"),
        ("models: [a]", "line 1: models.0", "must be a mapping"),
        ("models: [{name: a}]\nmodels: [{name: b}]", "line 2: models", "line 1 has it already"),
        ("models: [{name: a, profile: gone.safetensors}]", "line 1: models.0", "gone.safetensors does not exist"),
        ("defaults: {device: tpu}\nmodels: [{name: a}]", "line 1: defaults.device", "cuda"),
        ("defaults: {limits: {max_queu: 1}}\nmodels: [{name: a}]", "line 1: defaults.limits.max_queu", "spelling"),
        ("- a", "config.yaml", "models"),
        ("models: [", "config.yaml", "not valid YAML"),
    ],
)
def test_an_error_names_the_field_and_the_remedy(tmp_path: Path, text: str, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    assert field in str(caught.value)
    assert remedy in str(caught.value)


def test_each_error_is_said_once(tmp_path: Path) -> None:
    text = "defaults: {device: tpu}\nmodels: [{name: a}, {name: b, treads: 1}]"
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, text))
    assert str(caught.value).count("\n") == 1
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, "models: [{name: a, treads: 1}, {name: b, treads: 1}]"))
    assert str(caught.value).count("\n") == 2


def test_defaults_fill_in_what_a_model_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = "defaults: {threads: 2, load: on_demand, limits: {max_queue: 3, max_kv_bytes: 1KiB}}"
    models = "models: [{name: a}, {name: b, threads: 4, load: startup, limits: {max_queue: 5}}]"
    path = write(tmp_path, f"{defaults}\n{models}")
    first, second = load_settings(path).models
    assert (first.threads, first.load, first.limits.max_queue, first.limits.max_kv_bytes) == (2, "on_demand", 3, 1024)
    assert (second.threads, second.load, second.limits.max_queue) == (4, "startup", 5)
    assert (second.limits.max_kv_bytes, second.limits.max_concurrency, second.device) == (1024, 8, "auto")
    monkeypatch.setenv("SPECTRAL_DEFAULTS__THREADS", "7")
    assert [model.threads for model in load_settings(path).models] == [7, 4]


def test_a_wrong_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "server: {port: 1}\nmodels: [{name: a}]")
    monkeypatch.setenv("SPECTRAL_SERVER__PORT", "many")
    with pytest.raises(ConfigError, match=r"SPECTRAL_SERVER__PORT: server\.port"):
        load_settings(path)
    monkeypatch.setenv("SPECTRAL_SERVER__PORT", "2")
    monkeypatch.setenv("SPECTRAL_SEVER__HOST", "x")
    with pytest.raises(ConfigError, match="SPECTRAL_SEVER__HOST names no section"):
        load_settings(path)
    monkeypatch.delenv("SPECTRAL_SEVER__HOST")
    monkeypatch.setenv("SPECTRAL_MODELS", "[")
    with pytest.raises(ConfigError, match="models"):
        load_settings(path)


def test_environment_and_command_line_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "server: {port: 1, drain_seconds: 3}\nmodels: [{name: a}]")
    monkeypatch.setenv("SPECTRAL_SERVER__PORT", "9000")
    assert (load_settings(path).server.port, load_settings(path).server.drain_seconds) == (9000, 3)
    assert load_settings(path, port=9001).server.port == 9001
    monkeypatch.setenv("SPECTRAL_MODELS", '[{"name": "b"}]')
    assert load_settings(path).models[0].name == "b"
    with pytest.raises(ConfigError, match="allow_public"):
        load_settings(path, host="0.0.0.0")


def test_a_missing_file_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--config"):
        load_settings(tmp_path / "none.yaml")
    write(tmp_path, "models: [{name: here}]")
    monkeypatch.chdir(tmp_path)
    assert load_settings().models[0].name == "here"


def test_a_port_in_use_is_a_message_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["--config", str(ROOT / "config.yaml"), "--port", port]) == 1
    assert "choose another port with --port" in capsys.readouterr().err


def test_the_gateway_does_not_import_torch() -> None:
    code = "import sys, server.serving, server.__main__; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 0


@pytest.mark.parametrize("command", ["check", "schema", "metrics"])
def test_questions_are_answered_without_the_application(command: str) -> None:
    code = (
        f"import sys; from server.__main__ import main; status = main(['{command}', '--config', 'config.yaml'])\n"
        "sys.exit(status or bool({'fastapi', 'uvicorn', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False, capture_output=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_banner_says_what_is_loaded_and_how_to_try_it() -> None:
    config = settings({"name": "demo"}, {"name": "later", "load": "on_demand"})
    with serving(config) as server:
        server.until_state("demo", "hot")
        text = program.banner(server.app.state.scheduler, config, server.url)
        assert text.startswith(f"Spectral is listening on {server.url}\n")
        assert "setting 8x (cache 8.0x smaller than bf16 at 2048 tokens, KL 0.0120)" in text
        assert "later: cold, loaded on first use" in text
        assert f"spectral chat --url {server.url}" in text
        assert "spectral chat\n" in program.banner(server.app.state.scheduler, config, program.DEFAULT_URL)
        line = next(line for line in text.splitlines() if "curl" in line)
        if shutil.which("curl") is None:
            pytest.skip("no curl here to paste the line for")
        pasted = subprocess.run(["sh", "-c", line + " -s"], capture_output=True, text=True, timeout=20, check=False)
        assert pasted.returncode == 0 and "[DONE]" in pasted.stdout


@contextlib.contextmanager
def started(tmp_path: Path, models: str, drain_seconds: float = 1) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command line's server with fake workers, as a process of its own, once it is ready; and its address."""
    code = f"import server.app as a, server.serving as s, server.__main__ as m, functools\nFAKE = {FAKE!r}\n"
    code += "s.create_app = functools.partial(a.create_app, command=FAKE)\nraise SystemExit(m.main())"
    config = write(tmp_path, f"server: {{port: 0, drain_seconds: {drain_seconds}}}\nmodels: {models}")
    command = [sys.executable, "-c", code, "--config", str(config)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                assert process.stdout is not None
                first = process.stdout.readline()
                assert first.startswith("Spectral is listening on http://127.0.0.1:")
                yield process, first.split()[-1]
            finally:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_its_workers_with_status_0(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, "[{name: demo}]") as (process, url):
        worker = httpx.get(f"{url}/ready", trust_env=False).json()["models"]["demo"]["pid"]
        process.send_signal(number)
        assert process.wait(15) == 0
        assert not alive(worker)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_second_signal_ends_the_wait_for_running_requests(tmp_path: Path) -> None:
    models = "[{name: demo, path: stubborn}]"
    with started(tmp_path, models, drain_seconds=300) as (process, url), ThreadPoolExecutor(1) as pool:
        worker = httpx.get(f"{url}/ready", trust_env=False).json()["models"]["demo"]["pid"]
        body = {"model": "demo", "prompt": "never accepted"}
        pending = pool.submit(httpx.post, f"{url}/generate", json=body, trust_env=False, timeout=30)
        until(lambda: "ignored Submit" in (tmp_path / "log").read_text())
        process.send_signal(signal.SIGINT)
        until(lambda: "hot -> stopping" in (tmp_path / "log").read_text())
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert not alive(worker)
        assert pending.result(15).json()["error"]["code"] == "shutting_down"


def test_no_worker_outlives_a_gateway_that_was_killed(tmp_path: Path) -> None:
    with started(tmp_path, "[{name: demo}, {name: other}]") as (process, url):
        models = httpx.get(f"{url}/ready", trust_env=False).json()["models"]
        workers = [model["pid"] for model in models.values()]
        assert all(alive(pid) for pid in workers)
        process.kill()
        process.wait(15)
        until(lambda: not any(alive(pid) for pid in workers))
