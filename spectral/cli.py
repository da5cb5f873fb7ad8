"""The `spectral` command. Heavy libraries are imported inside the commands that use them, so that help is instant."""

from __future__ import annotations

import sys

import typer

from spectral.commands import (
    bench,
    chat,
    evaluate,
    keys,
    link,
    operate,
    plan,
    profile,
    serve,
    status,
    top,
    tune,
    version,
)
from spectral.commands.plain import App

EXIT_STATUS = (
    "Exit status: 0 done; 1 the server could not start, or the configuration is not valid; 2 a wrong command line, or "
    "an error that the last line on standard error names; 130 stopped with Ctrl-C."
)
app = App(
    name="spectral",
    help="Serve language models with a KV cache that stays compressed in a spectral basis.",
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    show_version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=version.print_and_exit, is_eager=True
    ),
) -> None:
    """Serve language models with a KV cache that stays compressed in a spectral basis."""


app.command("serve")(serve.serve)
app.command("check")(serve.check)
app.command("chat")(chat.chat)
app.command("ps")(status.ps)
app.command("top")(top.top)
app.command("plan")(plan.plan)
app.command("models")(status.models)
operate.register(app)
app.command("eval")(evaluate.evaluate_command)
app.command("tune")(tune.tune)
app.command("backup")(serve.backup)
app.command("restore")(serve.restore)
app.command("version")(version.version)
profile.app.command("link")(link.link)
app.add_typer(profile.app, name="profile")
app.add_typer(keys.app, name="keys")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: errors that Spectral raises on purpose become one line and exit status 2."""
    from spectral.errors import SpectralError

    try:
        app(prog_name="spectral")
    except SpectralError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
