"""How commands speak: colours on a terminal, tables, a progress bar, and files that are whole."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

COLOURS = {"green": 32, "red": 31, "yellow": 33, "bold": 1, "dim": 2}


def has_colours(stream: TextIO) -> bool:
    """On a terminal that knows them, unless NO_COLOR (no-color.org) asks for none."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour of COLOURS where ``stream``, by default stdout, shows them."""
    if not has_colours(stream or sys.stdout):
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned columns; text to the left, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(key)) for key in keys] for row in rows]
    numeric = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in keys]
    widths = [max(len(key), *(len(c[i]) for c in cells)) for i, key in enumerate(keys)]
    lines = []
    for line in [keys, *cells]:
        aligned = zip(line, widths, numeric, strict=True)
        lines.append("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned))
    return "\n".join(line.rstrip() for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Progress:
    """A bar on stderr, if that is a terminal; else nothing."""

    WIDTH = 30

    def __init__(self, what: str, total: int, stream: TextIO | None = None):
        self.what, self.total, self.done = what, max(total, 1), 0
        self.stream = stream or sys.stderr
        self.shown, self.begin, self.drawn = self.stream.isatty(), time.monotonic(), 0.0

    def update(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.shown and (now - self.drawn > 0.1 or self.done >= self.total):
            self.drawn = now
            full = self.WIDTH * self.done // self.total
            left = (now - self.begin) * (self.total - self.done) / max(self.done, 1)
            bar = "#" * full + "." * (self.WIDTH - full)
            line = f"\r{self.what} [{bar}] {self.done}/{self.total}, {left:.0f} s left "
            self.stream.write(line)
            self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.stream.write("\r\x1b[K")  # the line is free again
            self.stream.flush()


def check_target(path: str | Path | None, replace: bool) -> None:
    """Raises ValueError, in one line, if ``write_whole`` could not write there, or would write over
    a file that nobody said to ``replace``; before the work is done whose result is to be written.
    None is right."""
    if path is not None:
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path}: Is a directory")
        if path.exists() and not replace:
            raise ValueError(f"{str(path)!r} exists: add --force to replace it")
        with _temporary(path):
            pass


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[IO[bytes]]:
    """A file beside ``path`` that is gone at the end, unless it has been renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """``write`` fills a temporary file beside ``path``, which then takes its place: a kill leaves
    the former file, or none.

    Raises
        ValueError: in one line, if the file cannot be written.
    """
    path = Path(path)
    with _temporary(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        file.close()  # Windows renames no open file
        os.replace(file.name, path)


def matplotlib_figure(option: str, **options: Any) -> Any:
    """A Figure that draws without a display; ValueError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"{option} needs matplotlib (pip install matplotlib)") from None
    figure = Figure(layout="constrained", **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, dpi=130, format="png"))
