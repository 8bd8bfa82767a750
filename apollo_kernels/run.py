"""``python -m apollo_kernels run``: a program that finds apollo_kernels where it asks for
apollo_torch, and so do all Python programs that it starts.

They are told by PYTHONPATH, which gets the folder as_apollo_torch/ (standin.py) in front. Python
runs the sitecustomize.py in it at its start, whoever starts it: torchrun, accelerate launch, Ray.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apollo_kernels.standin import FOLDER


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given`` with the folder in front of PYTHONPATH, once."""
    paths = [p for p in given.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(FOLDER)]
    return {**given, "PYTHONPATH": os.pathsep.join([str(FOLDER), *paths])}


def command_line(program: list[str], module: bool = False) -> list[str]:
    """What to start: a module or a Python file by this Python, anything else as it is.

    Raises
        ValueError: if there is no such file or command.
    """
    if not program:
        raise ValueError("what to run is missing: SCRIPT.py, -m MODULE or a command")
    first = program[0]
    if module:
        return [sys.executable, "-m", *program]
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise ValueError(f"there is no file {first!r}")
        return [sys.executable, *program]
    beside = Path(sys.executable).parent  # the commands of an environment that is not activated
    found = shutil.which(first) or shutil.which(first, path=str(beside))
    if found is None:
        raise ValueError(f"there is no command {first!r}")
    return [found, *program[1:]]


def command(options: Any) -> int:
    """Becomes the program; where a process cannot (Windows), runs it and returns its exit code.

    Raises
        ValueError: if it cannot be started.
    """
    line, variables = command_line(options.program, options.module), environment(os.environ)
    sys.stdout.flush()
    try:
        if sys.platform == "win32":
            return subprocess.call(line, env=variables)
        os.execve(line[0], line, variables)
    except OSError as error:  # no program, as a script without its line #!
        raise ValueError(f"{line[0]!r} cannot be started: {error.strerror}") from None


def add_arguments(parser: Any) -> None:
    parser.description = (
        "Runs a program that finds apollo_kernels where it asks for apollo_torch, as do all Python "
        'programs that it starts: optim="apollo_adamw" of Hugging Face\'s Trainer, and '
        "LLaMA-Factory. The way there is PYTHONPATH, which `run` sets and children inherit."
    )
    parser.epilog = """examples:
  python -m apollo_kernels run train.py --epochs 3
  python -m apollo_kernels run torchrun --nproc-per-node 2 train.py
  python -m apollo_kernels run -m accelerate.commands.launch train.py
  python -m apollo_kernels run llamafactory-cli train apollo.yaml

exit codes: those of PROGRAM; 2 if it cannot be started."""
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module's name")
    parser.add_argument(
        "program", nargs="...", metavar="PROGRAM ...",
        help="a file SCRIPT.py, or a command such as torchrun; and its arguments",
    )  # fmt: skip
