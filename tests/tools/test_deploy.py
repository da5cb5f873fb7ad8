"""The files for containers and services: linted, checked against their schemas, and their steps gone through by hand.

There is no Docker engine here, so the image's build is rehearsed: exactly the files that the Dockerfile copies are
built and installed, and the image's command, health check and stop signal are tried on the result.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE, COMPOSE = ROOT / "Dockerfile", ROOT / "docker-compose.yml"
UNIT, MANIFEST = ROOT / "deploy/systemd/spectral.service", ROOT / "deploy/kubernetes/spectral.yaml"


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def program(name: str) -> str:
    """A tool of the development extra, from the environment that runs the tests."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed (the extra dev has the linters, Debian's systemd has systemd-analyze)")
    return found


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages by name: their instructions, with those of the stages they are built on before them."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(base, []))
        elif word:
            current.append((word, rest))
    return found


def values(stage: str, word: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == word]


def test_linters_have_nothing_to_say() -> None:
    done = run(program("hadolint"), "--no-color", str(DOCKERFILE))
    assert done.returncode == 0, done.stdout
    done = run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout
    done = run(program("kubernetes-validate"), "--strict", str(MANIFEST))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit_is_sound(tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    # The programs need not be on this machine; everything else must be right.
    text = re.sub(r"/opt/spectral/bin/\w+", sys.executable, UNIT.read_text())
    (tmp_path / UNIT.name).write_text(text)
    done = run(analyze, "verify", str(tmp_path / UNIT.name))
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stderr
    found = run(analyze, "security", "--offline=yes", "--threshold=40", str(tmp_path / UNIT.name))
    assert found.returncode == 0, found.stdout[-500:]


def test_every_command_and_variable_named_is_one_that_exists(tmp_path: Path) -> None:
    from server.config import Settings, load_settings

    texts = [path.read_text() for path in (DOCKERFILE, COMPOSE, UNIT, MANIFEST)]
    named = {name for text in texts for name in re.findall(r"\bSPECTRAL_(\w+__\w+)", text)}
    assert named
    for name in named:
        section, _, field = name.lower().partition("__")
        sections = {key: value.annotation for key, value in Settings.model_fields.items()}
        assert field in sections[section].model_fields, name  # type: ignore[union-attr]
    (config,) = [part for part in yaml.safe_load_all(MANIFEST.read_text()) if part["kind"] == "ConfigMap"]
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    assert load_settings(tmp_path / "config.yaml").server.state_dir == "/data/state"
    help_text = run(sys.executable, "-m", "spectral.cli", "serve", "--help", cwd=ROOT).stdout
    assert "--config" in help_text and "--host" in help_text


@pytest.mark.parametrize(("target", "build"), [("cpu", "build-cpu"), ("cuda", "build-cuda")])
def test_an_image_is_slim_unprivileged_and_watched(target: str, build: str) -> None:
    assert values(target, "USER") == ["10001"] and values(target, "WORKDIR")[-1] == "/data"
    assert len(values(target, "HEALTHCHECK")) == 1 and values(target, "EXPOSE") == ["8000"]
    assert values(target, "COPY") == [f"--from={build} /opt/spectral /opt/spectral"]
    (torch,) = re.findall(r'^  "(torch>=[^"]+)",$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert any(f'"{torch}"' in step for step in values(build, "RUN")), "the image's torch is not the project's"
    extras = {"cpu": '" .', "cuda": '".[gpu]"'}[target]
    assert target == "cpu" or any(extras in step for step in values(build, "RUN"))


def test_compose_serves_on_this_machine_only_and_mounts_what_exists() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {"spectral", "spectral-gpu", "prometheus", "grafana"} == services.keys()
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), source
        if "build" in service:
            assert service["build"]["target"] in stages()


@pytest.mark.e2e
def test_the_steps_of_the_image_work(tmp_path: Path) -> None:
    source, site, data = (tmp_path / name for name in ("source", "site", "data"))
    source.mkdir(), data.mkdir()
    for step in values("build-cpu", "COPY"):
        *names, target = step.split()
        for name in names:
            place = source / (target if target != "./" else name)
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source))
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    pip = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    assert pip.returncode == 0, pip.stderr
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])

    def here(words: str) -> list[str]:
        """An instruction's words, at an address of this test."""
        found = json.loads(words)
        return [word.replace("8000", port).replace("0.0.0.0", "127.0.0.1") for word in found]

    command = here(values("cpu", "ENTRYPOINT")[-1]) + here(values("cpu", "CMD")[-1])
    health = here(values("cpu", "HEALTHCHECK")[-1].partition("CMD ")[2])
    health[0] = sys.executable
    image = dict(item.split("=", 1) for step in values("cpu", "ENV") for item in shlex.split(step))
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SPECTRAL_", "PYTHON"))}
    path = f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**keep, **image, "PATH": path, "PYTHONPATH": str(site), "SPECTRAL_AUTH__ALLOW_WITHOUT_KEYS": "true"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=data, env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while run(*health).returncode != 0:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        finally:
            process.send_signal(getattr(signal, values("cpu", "STOPSIGNAL")[-1]))
            status = process.wait(40)
    assert status == 0, (tmp_path / "log").read_text()[-2000:]
    assert (data / ".spectral" / "state.db").is_file()
