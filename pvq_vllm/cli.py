# SPDX-License-Identifier: Apache-2.0
"""The console script ``pvq``: one group, its commands found by name and imported only when they run.

A command is an entry point of the group ``pvq.commands``::

    [project.entry-points."pvq.commands"]
    serve = "server.cli:serve"

that names a function with typer annotations (or a ``typer.Typer``). A function may carry the attribute
``context_settings``, a dict for typer. ``pvq --help`` takes the first line of the function's docstring from
the source file with ``ast`` and imports neither the module nor torch nor vLLM, so it answers at once. Nothing
here imports ``server`` or ``offline_quant``.

Bad input is a ``PVQError``: the sentence goes to stderr without a traceback and the exit status is 2.

The version patch runs at import, not in ``main``: vLLM starts its workers with the start method spawn, and
each of them imports the console script, hence this module, again before it imports vLLM.
"""

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pvq_vllm.codec.errors import PVQError
from pvq_vllm.vllm_compat import patch_distribution_version

patch_distribution_version()

COMMAND_GROUP = "pvq.commands"


def commands() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the entry points of all installed commands by name, in alphabetical order."""
    entries = importlib.metadata.entry_points(group=COMMAND_GROUP)
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def summary(entry: importlib.metadata.EntryPoint) -> str:
    """Return the first line of the docstring of the function that ``entry`` names, without importing its
    module.

    A command whose source cannot be found or parsed is still listed, with an empty line.
    """
    package, *rest = entry.module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin) if not rest else Path(spec.origin).parent.joinpath(*rest).with_suffix(".py")
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def load_command(entry: importlib.metadata.EntryPoint) -> Any:
    """Import the command that ``entry`` names and return it in the form that typer's group runs."""
    target = entry.load()
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, rich_markup_mode=None)
        settings = getattr(function, "context_settings", None)
        target.command(entry.name, context_settings=settings)(function)
    command = typer.main.get_command(target)
    command.name = entry.name
    return command


class LazyGroup(TyperGroup):
    """Lists commands from their entry points; imports one only when it is the one to run."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return list(commands())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a stand-in that carries the name and the one-line help; None if there is no such command."""
        entry = commands().get(cmd_name)
        return None if entry is None else TyperCommand(cmd_name, short_help=summary(entry))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the imported command for the first of ``args``; a usage error if there is no such
        command.
        """
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if command is None else load_command(commands()[command.name]), rest


app = typer.Typer(
    name="pvq",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pvq {importlib.metadata.version('pvq-vllm')}")
        raise typer.Exit


@app.callback()
def pvq(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """PVQ for vLLM: quantize a model to 2, 3 or 4 bits a weight, inspect, evaluate, serve and load-test
    it.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pvq`` with ``argv`` (default: the arguments of the process) and return its exit status."""
    try:
        result = typer.main.get_command(app)(
            args=None if argv is None else list(argv), prog_name="pvq", standalone_mode=True
        )
    except PVQError as error:
        print(f"pvq: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return result or 0


if __name__ == "__main__":
    sys.exit(main())
