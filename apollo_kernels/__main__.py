"""The command line: ``python -m apollo_kernels COMMAND``, installed also as ``apollo-kernels``.

A command is a module with two functions:

    add_arguments(parser)   its arguments; also the parser's description and epilog
    command(options)        does the work; returns the text to print, or an exit code

It raises ValueError for wrong input: one line on stderr and exit code 2. A new one joins COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from apollo_kernels._version import __version__


class Command(NamedTuple):
    name: str
    module: str  # imported only for its own command
    help: str


COMMANDS = (
    Command("info", "apollo_kernels.info", "versions and back ends, ready to paste"),
    Command("check", "apollo_kernels.commands.check", "small steps against float64: does it work?"),
    Command(
        "groups", "apollo_kernels.commands.groups", "which parameter takes which step, and why"
    ),
    Command("estimate", "apollo_kernels.estimate", "what a model's training takes in memory"),
    Command("bench", "apollo_kernels.commands.bench", "a step's time next to AdamW's"),
    Command("convert", "apollo_kernels.commands.convert", "other optimizers' states to APOLLO's"),
    Command("run", "apollo_kernels.run", "a program that wants apollo_torch, with this package"),
    Command("plot", "apollo_kernels.commands.plot", "a training log as a picture"),
)

_DESCRIPTION = "APOLLO (arXiv 2412.05270), an optimizer for training large language models."
_EPILOG = """examples:
  {prog} info                       what runs on this machine, and what does not
  {prog} check                      a minute: is every back end right here?
  {prog} estimate 7b --batch 4      will it fit?
  {prog} groups 7b                  what goes into the low-rank group
  {prog} COMMAND --help             all about one command

exit codes: 0 done; 1 a check failed; 2 wrong input, told in one line on stderr; 130 interrupted.
Output is plain text; colours appear on a terminal only, and not where NO_COLOR is set."""


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line; a description that is one is wrapped."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def format_help(self) -> str:
        if self.description and "\n" not in self.description:
            self.description = textwrap.fill(self.description, 80)
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (usage: {self.prog} --help)\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """With the arguments of the command that ``words`` begin with; the others need no import."""
    script = Path(sys.argv[0]).name
    prog = script if script.startswith("apollo-kernels") else "python -m apollo_kernels"
    parser = _Parser(prog=prog, description=_DESCRIPTION, epilog=_EPILOG.format(prog=prog))
    parser.add_argument("--version", action="version", version=f"apollo_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help)
        if command.name == asked:
            importlib.import_module(command.module).add_arguments(own)
            if "exit codes" not in (own.epilog or ""):
                own.epilog = f"{own.epilog or ''}\n\nexit codes: 0 done; 2 wrong input.".strip()
    return parser


def _one_line(text: object) -> str:
    """Without the calls inside of torch that some of its errors list."""
    return " ".join(str(text).split("\nException raised from")[0].split())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Where in our source a warning was raised is nothing to whoever gives a command."""
    return f"warning: {_one_line(message)}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser(words).parse_args(words)
    module = next(c.module for c in COMMANDS if c.name == options.command)
    try:
        done = importlib.import_module(module).command(options)
    except ValueError as error:
        print(f"{options.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    if isinstance(done, str):
        print(done)
        return 0
    return int(done)


def run() -> int:
    """main() as a program: whoever reads the output may close it early, as ``head`` does."""
    warnings.formatwarning = _show_warning
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes once more
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(run())
