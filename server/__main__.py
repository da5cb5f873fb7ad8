"""`python -m server [serve | schema | metrics | check]`: run, print the configuration's schema or the table of the
metrics, check a configuration."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from server import logs
from server.config import ConfigError, default_path, load_settings, schema_json

SCHEMA_FILE = "config.schema.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 after a clean end, 1 where it could not start."""
    options = _parser().parse_args(argv)
    if options.command == "schema":
        sys.stdout.write(schema_json())
        return 0
    if options.command == "metrics":
        from server.metrics import table

        sys.stdout.write(table())
        return 0
    given = {"host": options.host, "port": options.port}
    try:
        settings = load_settings(options.config, **given)
    except ConfigError as error:
        if options.command == "check" and options.json:
            print(json.dumps({"valid": False, "error": str(error)}, indent=2))
        else:
            print(error, file=sys.stderr)
        return 1
    if options.command == "check":
        names = [model.name for model in settings.models]
        text = f"The configuration is valid; models: {', '.join(names)}."
        print(json.dumps({"valid": True, "models": names}, indent=2) if options.json else text)
        return 0
    logs.configure(settings.logging, options.log_level)
    try:
        listener = _listen(settings.server.host, settings.server.port)
    except OSError as error:
        print(
            f"Spectral cannot listen on {settings.server.host}:{settings.server.port}: {error.strerror or error}. "
            "Stop what listens there, or choose another port with --port or server.port.",
            file=sys.stderr,
        )
        return 1
    with listener:
        file = Path(options.config) if options.config else default_path()
        from server.serving import run  # what only answers questions does without the application's 0.3 s of imports

        return run(settings, listener, file, given, options.cluster)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server", description="Spectral, an inference server.")
    parser.add_argument("command", nargs="?", default="serve", choices=("serve", "schema", "metrics", "check"))
    parser.add_argument("--config", help="configuration file; else ./config.yaml, else the one in the package")
    parser.add_argument("--host", help="instead of server.host")
    parser.add_argument("--port", type=int, help="instead of server.port")
    parser.add_argument("--cluster", choices=("ray",), help="be a gateway of a cluster of machines (docs/cluster.md)")
    parser.add_argument("--json", action="store_true", help="check: print JSON")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="instead of logging.level")
    return parser


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    sys.exit(main())
