"""Create .venv and install Spectral into it. Needs nothing but Python's standard library.

    python3 tools/bootstrap.py [--extra dev] [--extra gpu] [--venv .venv]

A stamp in the environment records what was done; a second call with nothing to do takes well under a second. torch is
always installed first, with the build that fits the machine (see torch_choice.py), so that nothing later pulls another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from torch_choice import MINIMUM_PYTHON, TORCH, Machine, ask_pip, choose, is_satisfied, needs_work

ROOT = Path(__file__).resolve().parent.parent


class BootstrapError(Exception):
    """Something the user has to put right; the message says how."""


def say(text: str) -> None:
    """One line of progress, on stderr so that a target's own output stays clean."""
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def venv_python(venv: Path) -> Path:
    """The interpreter inside an environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def has_nvidia() -> bool:
    """Whether an NVIDIA driver answers on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    found = shutil.which("nvidia-smi")
    if found is None:
        return False
    try:
        return subprocess.run([found, "-L"], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def wanted_state(nvidia: bool) -> dict[str, object]:
    """What the stamp must say for the environment to be up to date."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return {"format": 1, "pyproject": digest, "root": str(ROOT), "python": list(sys.version_info[:2]), "nvidia": nvidia}


def read_stamp(path: Path) -> dict[str, object] | None:
    """The stamp, or None if there is none that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def create_venv(venv: Path) -> None:
    """Create the environment, saying what to install where Python was packaged without venv or ensurepip."""
    try:
        import ensurepip  # noqa: F401
        import venv as _venv  # noqa: F401
    except ImportError as error:
        raise BootstrapError(
            f"this Python has no {error.name} module, so it cannot create an environment. On Debian and Ubuntu: "
            f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv; then run make again."
        ) from error
    say(f"creating {venv.name} with Python {sys.version.split()[0]}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)]).returncode != 0:
        raise BootstrapError(f"creating {venv} failed; the lines above say why.")


def run(command: list[str]) -> bool:
    """Run a command with its output shown; True if it succeeded."""
    return subprocess.run(command, cwd=ROOT).returncode == 0


def pip(python: Path, *arguments: str) -> list[str]:
    """A pip command line."""
    return [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]


def pip_pick(python: Path) -> str | None:
    """The version of torch that pip would install, found without downloading it; None if pip cannot tell."""
    command = pip(python, "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", "-", TORCH)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        report = json.loads(result.stdout)
        return str(report["install"][0]["metadata"]["version"])
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError):
        return None


def installed_torch(python: Path) -> str | None:
    """The version of torch in the environment, without importing it."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() or None if result.returncode == 0 else None


def install(python: Path, *arguments: str) -> list[str]:
    """The command line that installs. Of 21,000 files few are ever imported: Python compiles those when they are."""
    return pip(python, "install", "--quiet", "--no-compile", *arguments)


def newest_pip(python: Path) -> None:
    """pip of its newest release, which chooses versions in half of the time of those that come with Python."""
    if not run(pip(python, "install", "--quiet", "--upgrade", "pip")):
        say("pip could not be upgraded; going on with the one that came with Python, which takes longer")


def install_torch(python: Path, nvidia: bool) -> None:
    """Install torch by the first way that works."""
    if is_satisfied(installed_torch(python), nvidia):
        return
    pick = pip_pick(python) if ask_pip(sys.platform, nvidia) else None
    for step in choose(Machine(sys.platform, nvidia, pick)):
        if step.warning:
            say(f"warning: {step.warning}")
        command = install(python, *step.arguments())
        if step.tool == "uv":
            if not run(install(python, "uv")):
                continue
            command = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python), *step.arguments()]
        say(f"installing {TORCH} with {step.tool}" + (f" (backend {step.backend})" if step.backend else ""))
        if run(command):
            return
    raise BootstrapError("torch could not be installed; the lines above say why. Check the network and pip's index.")


def bootstrap(venv: Path, extras: set[str]) -> None:
    """Bring the environment up to date."""
    nvidia = has_nvidia()
    stamp_path = venv / "spectral-stamp.json"
    stamp = read_stamp(stamp_path)
    wanted = wanted_state(nvidia)
    python = venv_python(venv)
    if python.exists() and not needs_work(stamp, wanted, extras):
        return
    started = time.monotonic()
    fresh = stamp is None or stamp.get("python") != wanted["python"] or stamp.get("root") != wanted["root"]
    if not python.exists() or fresh:
        create_venv(venv)
        newest_pip(python)
        stamp = None
    known = stamp.get("extras") if stamp else None
    keep = {str(extra) for extra in known} if isinstance(known, list) else set()
    names = sorted(extras | keep | ({"gpu"} if nvidia and sys.platform == "linux" else set()))
    install_torch(python, nvidia)
    target = f".[{','.join(names)}]" if names else "."
    say(f"installing {target}")
    if not run(install(python, "--editable", target)):
        raise BootstrapError("installing the project failed; the lines above say why.")
    stamp_path.write_text(json.dumps({**wanted, "extras": names}, indent=1), encoding="utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s (torch {installed_torch(python)})")


def main() -> int:
    """The command line."""
    if sys.version_info < MINIMUM_PYTHON:
        found = ".".join(str(part) for part in sys.version_info[:2])
        print(f"bootstrap: Spectral needs Python 3.10 or newer; this is {found}. "
              "Name another: make serve PYTHON=python3.12", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description="Create the environment and install Spectral into it.")
    extras = ["dev", "gpu", "plots", "ray"]
    parser.add_argument("--extra", action="append", default=[], choices=extras, help="install an extra")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment is")
    options = parser.parse_args()
    try:
        bootstrap(options.venv.resolve(), set(options.extra))
    except BootstrapError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bootstrap: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
