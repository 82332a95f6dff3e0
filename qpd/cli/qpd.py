"""``qpd``: the daemon itself, its configuration, and its removal."""

# ruff: noqa: PLC0415 - `qpd check` must not load what only the daemon needs.

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from qpd import __version__
from qpd.cli.errors import ExitStatus
from qpd.cli.errors import run as run_app

if TYPE_CHECKING:
    from qpd.settings import Settings

app = typer.Typer(
    name="qpd",
    help="Gives each RDMA queue pair one path of the fabric. Exit status: 0 done, 1 failed, 2 wrong usage or "
    "configuration.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="Configuration; without: /etc/qpd/qpd.yaml where it exists, else defaults.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qpd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def run(config: ConfigOption = None) -> None:
    """Run the daemon in the foreground; it needs no configuration on an FRR leaf."""
    settings = _settings(config)
    # structlog would load rich for coloured tracebacks: 5 MB that a daemon carries for nothing.
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type] # None: importing it fails (sys.modules' documentation)
    # And aiohttp, for its client, all certificates of the machine: 2 MB that a daemon without TLS never reads.
    os.environ["SSL_CERT_FILE"] = os.devnull
    from qpd import daemon

    raise typer.Exit(daemon.run(settings))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration to examine.")],
) -> None:
    """Print the configuration that FILE (and QPD_* variables) would give, or everything that is wrong with it."""
    from qpd.settings import as_mapping

    print(yaml.safe_dump(as_mapping(_settings(file)), sort_keys=False, allow_unicode=True), end="")


@app.command()
def detach(config: ConfigOption = None) -> None:
    """Remove every trace: programs, maps with all QP homes and counters, the routing rule and routes."""
    settings = _settings(config)
    from qpd import daemon

    raise typer.Exit(daemon.detach(settings))


def _settings(path: Path | None) -> Settings:
    """The configuration, or one line for each error and the end."""
    from qpd.settings import DEFAULT_CONFIG, SettingsError, load_settings

    try:
        return load_settings(path or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None))
    except SettingsError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(int(ExitStatus.USAGE)) from None


def main() -> None:
    """Run ``qpd``."""
    run_app(app, "qpd")


if __name__ == "__main__":
    main()
