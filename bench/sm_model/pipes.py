"""Which part of an SM executes an instruction, for how long, and what it moves."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sass import Instruction, is_wide

from sm_model import cards
from sm_model.cards import Card

_ALU = """IADD3 IADD LOP3 LOP SHF SHL SHR PRMT ISETP SEL LEA FSETP FSEL FMNMX FMNMX3 IMNMX PLOP3 MOV
CS2R F2FP IABS POPC FLO BREV VOTE VIADD VIADDMNMX VIMNMX P2R R2P VABSDIFF FCHK SGXT BMSK I2IP I2FP
ISCADD HSETP2 HMNMX2 MATCH""".split()
_FMA = "FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2".split()
_MUFU = "MUFU F2F F2I I2F FRND".split()
_TENSOR = "HMMA IMMA".split()
_MEMORY = """LDG LD STG ST LDGSTS LDS STS LDSM STSM LDC LDL STL SHFL ATOM ATOMG ATOMS RED
REDUX CCTL""".split()
_UNIFORM = """UIADD3 ULOP3 UMOV USHF ULEA UIMAD USEL UISETP R2UR ULDC UPRMT UP2UR UPLOP3 S2UR S2R
UFLO UPOPC UBREV USGXT UBMSK""".split()
_FLOAT64 = "DFMA DADD DMUL DSETP DMNMX".split()
_CONTROL = """BRA BSSY BSYNC BAR NOP WARPSYNC EXIT BREAK CALL RET DEPBAR LDGDEPBAR ERRBAR MEMBAR
NANOSLEEP YIELD BMOV JMP PREEXIT ACQBULK ENDCOLLECTIVE""".split()

# How a load's latency is counted.
NOWHERE, SHARED, L1, L2, DRAM = range(5)


@dataclass(frozen=True)
class Use:
    """``busy``: clocks of the pipe; ``data``: clocks of the SM's data path; ``moved``: bytes that
    cross the memory border, per warp."""

    pipe: str
    busy: int = 0
    data: int = 0
    place: int = NOWHERE
    moved: int = 0


def use(x: Instruction, card: Card) -> Use:
    """Raises ValueError for an instruction that is in none of the lists."""
    name = x.name
    if name in _TENSOR:
        return Use("tensor", card.mma)
    if name in _MEMORY:
        return _memory(x)
    if name == "IMAD":
        wide = re.match(r"IMAD\.(WIDE|HI)", x.op)
        return Use("multiply", cards.WIDE_MULTIPLY if wide else cards.FMA_PIPE)
    known = (
        (_ALU, Use("alu", cards.ALU)),
        (_FMA, Use("fma", cards.FMA_PIPE)),
        (_MUFU, Use("mufu", cards.MUFU)),
        (_UNIFORM, Use("uniform", cards.UNIFORM)),
        (_FLOAT64, Use("float64", cards.FLOAT64)),
        (_CONTROL, Use("control")),
    )
    for names, what in known:
        if name in names:
            return what
    raise ValueError(f"no pipe for {x.op}: say in bench/sm_model/pipes.py what executes it")


def _memory(x: Instruction) -> Use:
    found = re.search(r"\.(64|128)", x.op)
    clocks = int(found[1]) // 32 if found else 1  # 128 bytes per clock: 4 bytes of each lane
    if x.name in ("LDSM", "STSM"):
        return Use("lsu", 0, int(x.op[-1]) if x.op[-1] in "24" else 1, SHARED)
    if x.name in ("LDG", "LD", "LDGSTS"):
        return Use("lsu", 0, clocks, DRAM, 512) if is_wide(x) else Use("lsu", 0, clocks, L1)
    if x.name in ("STG", "ST"):
        return Use("lsu", 0, clocks, NOWHERE, 512 if is_wide(x) else 32 * 4)
    return Use("lsu", 0, 0 if x.name == "LDC" else clocks, SHARED)
