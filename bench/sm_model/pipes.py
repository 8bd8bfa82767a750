"""Which part of an SM executes an instruction, for how long, and what it moves."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sass import Instruction, global_bytes, products

from sm_model import cards
from sm_model.cards import Card

_NAMES = {
    "alu": """IADD3 IADD LOP3 LOP SHF SHL SHR PRMT ISETP SEL LEA FSETP FSEL FMNMX FMNMX3 IMNMX PLOP3
        MOV CS2R F2FP IABS POPC FLO BREV VOTE VIADD VIADDMNMX VIMNMX P2R R2P VABSDIFF FCHK SGXT BMSK
        I2IP I2FP ISCADD HSETP2 HMNMX2 MATCH""",
    "fma": "FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2",
    "multiply": "IMAD",  # on one of the FMA pipes
    "mufu": "MUFU F2F F2I I2F FRND",
    "tensor": "HMMA HGMMA IMMA",
    "float64": "DFMA DADD DMUL DSETP DMNMX",
    "uniform": """UIADD3 ULOP3 UMOV USHF ULEA UIMAD USEL UISETP R2UR ULDC UPRMT UP2UR UPLOP3 S2UR
        S2R UFLO UPOPC UBREV USGXT UBMSK""",
    "lsu": """LDG LD STG ST LDGSTS LDS STS LDSM STSM LDC LDL STL SHFL ATOM ATOMG ATOMS RED REDUX
        CCTL""",
    "control": """BRA BSSY BSYNC BAR NOP WARPSYNC EXIT BREAK CALL RET DEPBAR LDGDEPBAR ERRBAR MEMBAR
        NANOSLEEP YIELD BMOV JMP PREEXIT ACQBULK WARPGROUP FENCE""",
}
_PIPES = {name: pipe for pipe, names in _NAMES.items() for name in names.split()}
_BUSY = {
    "alu": cards.ALU,
    "fma": cards.FMA_PIPE,
    "multiply": cards.FMA_PIPE,
    "mufu": cards.MUFU,
    "uniform": cards.UNIFORM,
}

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
    """Raises ValueError for an instruction that no pipe is known of."""
    pipe = _PIPES.get(x.name)
    if pipe is None:
        raise ValueError(f"no pipe for {x.op}: say in bench/sm_model/pipes.py what executes it")
    if pipe == "lsu":
        return _memory(x)
    if x.name == "HGMMA":  # a warp's quarter of A [64, 16] and B [N, 16], from shared memory
        count = products(x.op)
        return Use(pipe, count * cards.WGMMA, (64 + 8 * count) * 16 * 2 // 4 // cards.DATA_BYTES)
    if pipe == "tensor":
        return Use(pipe, card.mma)
    if pipe == "float64":
        return Use(pipe, card.float64)
    if re.match(r"IMAD\.(WIDE|HI)", x.op):
        return Use(pipe, cards.WIDE_MULTIPLY)
    return Use(pipe, _BUSY.get(pipe, 0))


def _memory(x: Instruction) -> Use:
    found = re.search(r"\.(64|128)", x.op)
    size = int(found[1]) // 8 if found else 4
    clocks = 32 * size // cards.DATA_BYTES
    if x.name in ("LDSM", "STSM"):
        return Use("lsu", 0, int(x.op[-1]) if x.op[-1] in "24" else 1, SHARED)
    size = global_bytes(x.op)
    clocks = clocks if size == 0 else max(1, 32 * size // cards.DATA_BYTES)
    if x.name in ("STG", "ST"):
        return Use("lsu", 0, clocks, NOWHERE, 32 * size)
    if size:  # scalars are tables and scales, which many lanes and blocks read
        return Use("lsu", 0, clocks, DRAM, 32 * size) if size >= 8 else Use("lsu", 0, clocks, L1)
    return Use("lsu", 0, 0 if x.name == "LDC" else clocks, SHARED)
