"""SASS as cuobjdump prints it, from lines with the few control codes that a test is about.

"LDG.E.128 R4, [R2] sets=0"      "@P0 BRA {edge}"      "edge: EXIT"      "FADD R1, R2 waits=0"
"""

import re

_FREE = 7  # no scoreboard


def assemble(lines, stall=1):
    """The text of a function; ``{name}`` becomes the address of the line that ``name:`` begins."""
    labels, bare = {}, []
    for i, line in enumerate(lines):
        label, _, rest = line.rpartition(": ")
        if label:
            labels[label] = hex(16 * i)
        bare.append(rest)
    text = "\tFunction : f\n"
    for i, line in enumerate(bare):
        named = dict(re.findall(r"\b(stall|sets|frees|waits)=(\d+)", line))
        code = re.sub(r"\s+(stall|sets|frees|waits)=\d+", "", line).format(**labels)
        control = int(named.get("stall", stall)) | 1 << 4  # the warp keeps the scheduler
        control |= int(named.get("sets", _FREE)) << 5 | int(named.get("frees", _FREE)) << 8
        if "waits" in named:
            control |= 1 << 11 + int(named["waits"])
        text += f"        /*{16 * i:04x}*/  {code} ;  /* 0x{0:016x} */\n"
        text += f"                /* 0x{control << 41:016x} */\n"
    return text
