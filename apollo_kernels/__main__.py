"""The command line: ``python -m apollo_kernels info``, and ``... estimate MODEL``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from apollo_kernels import estimate, info
from apollo_kernels import run as run_command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apollo_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions and back ends, ready to paste")
    command.add_argument("--json", action="store_true", help="machine-readable")
    planned = commands.add_parser("estimate", help="what a model's training takes in memory")
    estimate.add_arguments(planned)
    run_command.add_arguments(commands.add_parser("run", help="a program that wants apollo_torch"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return run_command.command(options)
        if options.command == "estimate":
            print(estimate.command(options))
            return 0
    except ValueError as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2
    collected = info.collect()
    print(json.dumps(collected, indent=2) if options.json else info.as_text(collected))
    return 0


def run() -> int:
    """main() as a program: whoever reads the output may close it early, as ``head`` does."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the exit flushes once more
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run())
