"""What the environment is made of: `python tools/supply_chain.py audit` looks its packages up among known weaknesses,
`python tools/supply_chain.py sbom --output FILE` writes a software bill of materials (CycloneDX, JSON).

audit: exit status 0 where nothing is known, or where it had to be skipped (no network, no pip-audit), with the reason;
1 where a package has a known weakness that is not in ACCEPTED. sbom: 0, or 2 without cyclonedx-bom.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ACCEPTED: dict[str, str] = {}
"""Weaknesses that do not concern us, by their id, with the reason."""
TIMEOUT_S = 300
NO_NETWORK = (
    "ConnectionError",
    "Max retries",
    "NameResolution",
    "Timeout",
    "timed out",
    "ProxyError",
    "SSLError",
    "HTTPError",
)
OWN = "spectral-serve"


def audit(timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """{"status": "clean" | "vulnerable" | "skipped", "reason", "packages", "vulnerabilities"}."""
    nothing: dict[str, Any] = {"packages": 0, "vulnerabilities": []}
    if importlib.util.find_spec("pip_audit") is None:
        return {"status": "skipped", "reason": "pip-audit is not installed (extra dev)", **nothing}
    command = [sys.executable, "-m", "pip_audit", "--local", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run([*command, "--timeout", "15"], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "reason": f"no answer within {timeout_s:g} s", **nothing}
    try:
        found = json.loads(done.stdout)
    except ValueError:
        reason = _reason(done.stderr)
        if any(word in done.stderr for word in NO_NETWORK):
            return {"status": "skipped", "reason": f"the database of weaknesses cannot be reached: {reason}", **nothing}
        return {"status": "skipped", "reason": f"pip-audit failed: {reason}", **nothing}
    return judge(found)


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """pip-audit's report, less what was accepted."""
    packages = found.get("dependencies", [])
    open_ = [
        {
            "package": package["name"],
            "version": package["version"],
            "id": weakness["id"],
            "fixed": weakness["fix_versions"],
        }
        for package in packages
        for weakness in package.get("vulns", [])
        if not {weakness["id"], *weakness.get("aliases", [])} & set(ACCEPTED)
    ]
    status = "vulnerable" if open_ else "clean"
    return {"status": status, "reason": "", "packages": len(packages), "vulnerabilities": open_}


def sbom() -> dict[str, Any]:
    """The bill of materials of this environment. Raises ModuleNotFoundError, subprocess.CalledProcessError."""
    if importlib.util.find_spec("cyclonedx_py") is None:
        raise ModuleNotFoundError("cyclonedx-bom is not installed (extra dev)")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--output-format", "JSON"]
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    done = subprocess.run(
        [*command, "--pyproject", str(pyproject), sys.executable],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _reason(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="supply_chain.py", description="Known weaknesses, and a bill of materials.")
    parser.add_argument("command", choices=("audit", "sbom"))
    parser.add_argument("--json", action="store_true", help="audit: print the report as JSON")
    parser.add_argument("--output", help="sbom: write to this file instead of standard output")
    options = parser.parse_args(argv)
    if options.command == "sbom":
        return _write_sbom(options.output)
    report = audit()
    if options.json:
        print(json.dumps(report, indent=2))
    elif report["status"] == "skipped":
        print(f"dependency audit skipped: {report['reason']}")
    else:
        print(f"dependency audit: {report['packages']} packages, {len(report['vulnerabilities'])} known weaknesses")
        for one in report["vulnerabilities"]:
            fixed = ", ".join(one["fixed"]) or "no version"
            print(f"  {one['package']} {one['version']}: {one['id']}, fixed in {fixed}")
    return 1 if report["status"] == "vulnerable" else 0


def _write_sbom(output: str | None) -> int:
    try:
        document = sbom()
    except ModuleNotFoundError as error:
        print(f"error: {error}: pip install '{OWN}[dev]'", file=sys.stderr)
        return 2
    text = json.dumps(document, indent=1) + "\n"
    if output is None:
        sys.stdout.write(text)
    else:
        Path(output).write_text(text, encoding="utf-8")
        print(f"{output}: {len(document.get('components', []))} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
