"""`make test-sanitizers`: every kernel on the emulated device under AddressSanitizer and
UndefinedBehaviorSanitizer, then under ThreadSanitizer; and that seeded bugs are caught by them.

    python tests/sanitizers.py [--quick]      (--quick: without the seeded bugs)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}

# Every barrier of csrc, by its file and comment: without one, most results here stay the same.
BARRIERS = [
    ("before the first turn", "project_mma.cuh", "the first stages are there"),
    (
        "between two turns",
        "project_mma.cuh",
        "the next stages are there, and these were read by all",
    ),
    ("before squares are summed", "project_source.cuh", "all rows of squares are there"),
    ("after squares are summed", "project_source.cuh", "scratch is free again"),
    ("before a tile's norms", "project_epilogue.cuh", "all warps' sums are there"),
    ("after a slab of z", "project_dot.cuh", "the slab of z is there"),
    ("before the next slab of z", "project_dot.cuh", "and was read by all"),
    ("before dots are summed", "project_dot.cuh", "every warp's share is there"),
    ("after dots are summed", "project_dot.cuh", "and was read before the next row"),
    ("before sparse sums by row", "project_sparse.cuh", "the sums of all channels are there"),
    ("before sparse sums by column", "project_sparse.cuh", "the sums of all rank rows are there"),
    ("before the head's products", "project_head.cuh", "the rows of z are there"),
    ("after the head's products", "project_head.cuh", "and were read by all"),
    ("before the last block goes on", "scale.cuh", "all threads know"),
    ("in a block's sum", "common.cuh", "the warps' sums are there"),
    ("after a block's sum", "common.cuh", "and were read before the next sum"),
    ("before the rates of adamw", "adamw.cuh", "the rates are there"),
]
# name, sanitizer, file, what stands there, what the bug makes of it
BUGS = [
    *((f"no barrier {place}", "thread", file, f"__syncthreads();  // {comment}", f"// {comment}")
      for place, file, comment in BARRIERS),
    ("a row read past its end", "address", "common.cuh",
     "values[i] = i < n ? from[i] : T{};", "values[i] = i <= n ? from[i] : T{};"),
    ("a row written past its end", "address", "common.cuh",
     "if (i < n) to[i] = values[i];", "if (i <= n) to[i] = values[i];"),
    ("a wide access where nothing is aligned", "address", "common.cuh",
     "return ((reinterpret_cast<uintptr_t>(base)", "return true || ((uintptr_t(base)"),
    ("moments beyond the last channel", "address", "project_epilogue.cuh",
     "return 8 * row < channels ? ranks : 0;", "return ranks;"),
    ("dense parameters read past their end", "address", "adamw.cuh",
     "n = WHOLE ? N : count - i;", "n = WHOLE ? N : count - i + 1;"),
    ("a whole block of dense parameters that is none", "address", "adamw.cuh",
     "wide && p.count - begin >= kDenseElements", "wide"),
    ("a whole tile of apply that is none", "address", "apply.cuh",
     "row + rows <= at.outer", "row < at.outer"),
    ("q of a channel that is not there", "address", "project_source.cuh",
     "if (c < Shape::kChannels && c < left)", "if (c < Shape::kChannels)"),
    ("sparse channels beyond the last one", "address", "project_sparse.cuh",
     "c < channels ? n : 0", "n"),
    ("sparse sums beyond the end of K", "address", "project_sparse.cuh",
     "const int n = k < k_end ? (k_end - k < E ? int(k_end - k) : E) : 0;", "const int n = E;"),
    ("sparse moments beyond the last channel", "address", "project_sparse.cuh",
     "return channel < CHANNELS && at.c0 + channel < channels ? left : 0;", "return left;"),
    ("an offset without its part of the workspace", "address", "plan.cpp",
     "      m.r += r;", "      m.r += r + 1;"),
    ("an owner's share that is longer than it is", "address", "parts.cuh",
     "c < launch.owners * p.share", "c <= launch.owners * p.share"),
    ("a map longer than its blocks", "address", "plan.cpp",
     "to = std::fill_n(to, end - rows[i].*first, int32_t(i));",
     "to = std::fill_n(to, end - rows[i].*first + 1, int32_t(i));"),
]  # fmt: skip


def build(sources: Path, sanitizer: str, out: Path) -> None:
    folder = ROOT / "tests" / "cuda_on_cpu"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-Wno-unknown-pragmas",
         "-DAPOLLO_EMULATED", "-DEMULATED_STATIC_SHARED", *FLAGS[sanitizer],
         f"-I{folder}", f"-I{sources}", "-x", "c++",
         str(sources / "launch.cu"), str(sources / "plan.cpp"), str(folder / "emulated_device.cpp"),
         str(sources / ".." / "tests" / "cuda_on_cpu" / "driver.cpp"), "-o", str(out), "-lpthread"],
        check=True,
    )  # fmt: skip


def run(program: Path, sanitizer: str, order: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EMULATED_ORDER": str(order), "TSAN_OPTIONS": "halt_on_error=1"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run(
        [str(program), *(["small"] if sanitizer == "thread" else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def copy_with(bug: tuple[str, ...] | None, folder: Path) -> Path:
    """The sources in a folder of their own, with a bug seeded."""
    for place in ("csrc", "tests/cuda_on_cpu"):
        (folder / place).mkdir(parents=True)
        for path in (ROOT / place).iterdir():
            (folder / place / path.name).write_text(path.read_text())
    if bug is not None:
        name, _, file, good, bad = bug
        path = folder / "csrc" / file
        text = path.read_text()
        assert good in text, f"{name}: {file} no longer has {good!r}"
        path.write_text(text.replace(good, bad))
    return folder / "csrc"


def clean(sanitizer: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        build(copy_with(None, Path(folder)), sanitizer, program)
        sums = set()
        for order in (0, 1, 7):
            done = run(program, sanitizer, order)
            if done.returncode != 0:
                return f"FAIL {sanitizer}, order {order}:\n{done.stderr[-3000:]}"
            sums.add(done.stdout.strip())
    return f"{'pass' if len(sums) == 1 else 'FAIL'} {sanitizer}: sums of all bits {sorted(sums)}"


def seeded(bug: tuple[str, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        build(copy_with(bug, Path(folder)), bug[1], program)
        for order in (0, 7):
            if run(program, bug[1], order).returncode != 0:
                return f"pass {bug[1]} catches: {bug[0]}"
    return f"FAIL {bug[1]} misses: {bug[0]}"


def main() -> None:
    bugs = [] if "--quick" in sys.argv else BUGS
    failed = False
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(clean, s) for s in FLAGS] + [pool.submit(seeded, b) for b in bugs]
        for item in work:
            line = item.result()
            failed |= line.startswith("FAIL")
            print(line, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
