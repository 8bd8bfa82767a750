"""From a basic block's instructions to one Python function ``run(R, m, S)``.

R is the list of registers, each an array over the block's threads; m the mask of the threads that
are here; S the machine. Registers are never written in place, so arrays may be shared. Three
variants: "all" threads are here; all that are left ("live") are; "some" are, and results are merged
under the mask. An opcode that is not known here is an error that names its line.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from . import arithmetic
from .parser import SHARED_BEGIN, WIDTH, BasicBlock, Instruction, Kernel, PtxError, operands

# Generic addresses of shared memory and of parameters.
SHARED_WINDOW, PARAM_WINDOW = 1 << 60, 1 << 61
KIND = {"p": "?", "b": "u", "u": "u", "s": "i", "f": "f"}
NUMPY = {t: "u2" if t == "bf16" else KIND[t[0]] + (str(w) if w else "") for t, w in WIDTH.items()}
FLOATS = ("f16", "bf16", "f32", "f64")

# Modifiers without an effect here: caching, scopes and orders of memory (atomics and fences have
# methods of their own), rounding to nearest, and alignment of warps.
HINTS = ("L1::", "L2::", "volatile", "relaxed", "acquire", "release", "weak", "gpu", "sys", "cta",
         "cg", "ca", "cs", "lu", "cv", "wb", "wt")  # fmt: skip
INTEGRAL = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
PLAIN = {"rn", "ftz", "approx", "full", "lo", "wide", "hi", "NaN"}


class Translator:
    def __init__(self, kernel: Kernel, threads: int):
        self.k, self.threads = kernel, threads
        self.constants: list[np.ndarray] = []
        self._places: dict[tuple[int, str], int] = {}
        self._functions: dict[tuple[int, str], Any] = {}
        self.line = 0
        self.out: list[str] = []
        self.merge: str | None = None  # the mask under which results are kept
        self.lanes: str | None = None  # the mask of threads that reach memory

    def function(self, block: BasicBlock, variant: str):
        key = block.order, variant
        if key not in self._functions:
            self._functions[key] = self._translate(block, variant)
        return self._functions[key]

    def _translate(self, block: BasicBlock, variant: str):
        self.out = []
        for i in block.code:
            self.line = i.line
            self.merge = "m" if variant == "some" else None
            self.lanes = None if variant == "all" else "m"
            if i.guard:
                test = f"{'~' * (i.guard[0] == '!')}R[{self.k.registers[i.guard.lstrip('!')]}]"
                self.out.append(f"q = {test}" if self.lanes is None else f"q = m & {test}")
                self.merge = self.lanes = "q"
            try:
                self._instruction(i)
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                raise PtxError(f"unknown: {self.k.where(i.line)} ({error!r})") from error
        if block.end[0] == "branch":
            self.out.append(f"return R[{self.k.registers[block.end[1]]}]")
        body = "\n ".join(self.out or ["pass"])
        scope = {**vars(arithmetic), "K": self.constants}
        exec(compile(f"def run(R, m, S):\n {body}", f"<{self.k.name}>", "exec"), scope)
        return scope["run"]

    def _instruction(self, i: Instruction) -> None:
        op, args, t = i.op, i.args, i.op[-1]
        method = getattr(self, f"op_{op[0]}", None)
        if method:
            method(op, args, t)
            return
        if not set(op[1:-1]) <= PLAIN:
            raise KeyError(i.text)
        result = t[0] + str(16 * WIDTH[t]) if "wide" in op else t
        self.assign(args[0], result, self.arithmetic(op, args[1:], t))

    # Operands and results.

    def constant(self, bits: int, kind: str) -> str:
        if (bits, kind) not in self._places:
            self._places[bits, kind] = len(self.constants)
            width = np.dtype(kind).itemsize
            self.constants.append(np.full(self.threads, bits, f"u{width}").view(kind))
        return f"K[{self._places[bits, kind]}]"

    def source(self, arg: str, t: str) -> str:
        """An operand as an expression of type t."""
        kind, width = NUMPY[t], WIDTH[t]
        if arg in self.k.registers:
            at = self.k.registers[arg]
            text, own = f"R[{at}]", self.k.widths[at]
            if own > width > 0:
                text = f"{text}.astype(u{width})"
            elif own != width:
                raise ValueError(f"{arg} as .{t}")
            return text if kind[0] in "u?" else f"{text}.view({kind})"
        if arg.startswith("%"):
            text = f"S.special({arg!r})"
            return text if width == 4 else f"{text}.astype(u{width})"
        if re.match(r"0[fd][0-9A-Fa-f]+$", arg):
            value = int(arg[2:], 16)
        elif re.match(r"-?(0x)?[0-9A-Fa-f]+U?$", arg):
            value = int(arg.rstrip("U"), 0)
        elif arg in self.k.params:
            value = PARAM_WINDOW + self.k.params[arg][0]
        elif arg in self.k.shared:
            value = self.k.shared[arg]
        elif arg in self.k.dynamic:
            value = SHARED_BEGIN + -(-self.k.static_shared // 128) * 128
        else:
            raise ValueError(f"operand {arg!r}")
        if t == "pred":
            return self.constant(int(bool(value)), "?")
        return self.constant(value & ((1 << 8 * width) - 1), kind)

    def address(self, arg: str) -> str:
        base, offset = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", arg).groups()
        known = self.k.registers.get(base)
        t = "b64" if known is None or self.k.widths[known] == 8 else "b32"
        text = self.source(base, t)
        offset = int(offset or "0", 0)
        return f"({text} + {self.source(str(offset), t)})" if offset else text

    def assign(self, arg: str, t: str, text: str) -> None:
        if arg == "_":
            return
        at = self.k.registers[arg]
        own, width, kind = self.k.widths[at], WIDTH[t], NUMPY[t]
        if own > width:
            text = f"({text}).astype({'i' if kind[0] == 'i' else 'u'}{own}).view(u{own})"
        elif own < width:
            raise ValueError(f".{t} into {arg}")
        elif kind[0] in "if":
            text = f"({text}).view(u{own})"
        merged = f"where({self.merge}, {text}, R[{at}])" if self.merge else text
        self.out.append(f"R[{at}] = {merged}")

    def call(self, text: str) -> str:
        """A method of the machine, which is told the lanes and the line."""
        return f"S.{text[:-1]}{', ' * (text[-2] != '(')}m={self.lanes}, line={self.line})"

    # Numbers.

    def arithmetic(self, op: list[str], args: list[str], t: str) -> str:
        name, is_float = op[0], t in ("f32", "f64")
        plain = t if is_float or t == "pred" else f"b{8 * WIDTH[t]}"  # wraps alike with a sign
        flush = "ftz" if "ftz" in op else ""

        def s(i: int, kind: str = t) -> str:
            return self.source(args[i], kind)

        if name in ("mul", "mad") and not is_float:
            return self.product(op, args, t, plain)
        signs = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
        if name in signs:
            text = f"{flush}({s(0, plain)} {signs[name]} {s(1, plain)})"
            return text if plain == t else f"{text}.view({NUMPY[t]})"
        if name in ("sqrt", "rsqrt", "rcp", "lg2", "ex2", "sin", "cos", "tanh"):
            if "approx" in op:
                return f"approx({name!r}, {s(0)}, {bool(flush)})" if t == "f32" else (
                    {"rcp": f"rcp_gross({s(0)})"}[name])  # fmt: skip
            return f"{flush}({({'sqrt': f'np.sqrt({s(0)})', 'rcp': f'(1 / {s(0)})'})[name]})"
        if name == "div" and is_float:
            exact = "rn" in op
            return f"{flush}({s(0)} / {s(1)})" if exact else (
                f"div_approx({s(0)}, {s(1)}, {bool(flush)})")  # fmt: skip
        simple = {
            "fma": lambda: f"{flush}(fma{t[1:]}({s(0)}, {s(1)}, {s(2)}))",
            "div": lambda: f"divide({s(0)}, {s(1)})",
            "rem": lambda: f"remainder({s(0)}, {s(1)})",
            "shl": lambda: f"shift_left({s(0)}, {s(1, 'u32')})",
            "shr": lambda: f"shift_right({s(0)}, {s(1, 'u32')})",
            "neg": lambda: f"{flush}(-{s(0)})",
            "abs": lambda: f"{flush}(np.abs({s(0)}))",
            "not": lambda: f"(~{s(0)})",
            "copysign": lambda: f"np.copysign({s(1)}, {s(0)})",  # the sign of a, the value of b
            "selp": lambda: f"where({s(2, 'pred')}, {s(0)}, {s(1)})",
            "bfi": lambda: f"bfi({s(0)}, {s(1)}, {s(2, 'u32')}, {s(3, 'u32')})",
            "bfe": lambda: f"bfe({s(0)}, {s(1, 'u32')}, {s(2, 'u32')})",
            "prmt": lambda: f"prmt({s(0)}, {s(1)}, {s(2)})",
            "lop3": lambda: f"lop3({s(0)}, {s(1)}, {s(2)}, {int(args[3], 0)})",
            "brev": lambda: f"brev({s(0)})",
        }
        if name in ("min", "max"):
            if is_float:
                return f"{flush}(min_max({name!r}, {s(0)}, {s(1)}, {'NaN' in op}))"
            return f"np.{name}imum({s(0)}, {s(1)})"
        return simple[name]()

    def product(self, op: list[str], args: list[str], t: str, plain: str) -> str:
        result = t
        if "lo" in op:
            a, b = (self.source(x, plain) for x in args[:2])
            text = f"({a} * {b}).view({NUMPY[t]})"
        else:
            a, b = (self.source(x, t) for x in args[:2])
            text = f"mul_high({a}, {b})"
        if "wide" in op:
            result = t[0] + str(16 * WIDTH[t])
            text = f"({a}.astype({NUMPY[result]}) * {b})"
        return f"{text} + {self.source(args[2], result)}" if op[0] == "mad" else text

    def op_popc(self, op, args, t):
        self.assign(args[0], "u32", f"{op[0]}({self.source(args[1], t)})")

    op_clz = op_popc

    def op_shf(self, op, args, t):
        a, b, n = (self.source(x, "u32") for x in args[1:])
        left, wrap = {"l": True, "r": False}[op[1]], {"wrap": True, "clamp": False}[op[2]]
        self.assign(args[0], "b32", f"funnel({a}, {b}, {n}, {left}, {wrap})")

    def op_setp(self, op, args, t):
        test = f"compare({op[1]!r}, {self.source(args[1], t)}, {self.source(args[2], t)})"
        more = [m for m in op[2:-1] if m != "ftz"]
        if more:  # combined with another predicate
            sign = {"and": "&", "or": "|", "xor": "^"}[more[0]]
            test = f"({test} {sign} {self.source(args[3], 'pred')})"
        if "|" in args[0] or len(more) > 1:
            raise KeyError("setp")
        self.assign(args[0], "pred", test)

    def op_mov(self, op, args, t):
        if args[0].startswith("{"):
            parts = operands(args[0].strip("{} "))
            width = WIDTH[t] // len(parts)
            whole = self.source(args[1], t)
            self.out.append(f"t = {whole}.view(u{width}).reshape(-1, {len(parts)})")
            for i, part in enumerate(parts):
                self.assign(part, f"b{8 * width}", f"t[:, {i}].copy()")
        elif args[1].startswith("{"):
            parts = operands(args[1].strip("{} "))
            width = WIDTH[t] // len(parts)
            stacked = ", ".join(self.source(p, f"b{8 * width}") for p in parts)
            whole = f"np.stack([{stacked}], 1).view(u{WIDTH[t]})[:, 0].view({NUMPY[t]})"
            self.assign(args[0], t, whole)
        else:
            self.assign(args[0], t, self.source(args[1], t))

    def op_cvt(self, op, args, t):
        to, of, how = op[-2], op[-1], set(op[1:-2])
        if to in ("bf16x2", "f16x2") and of == "f32" and how == {"rn"}:
            half = "to_bf16({})" if to == "bf16x2" else "{}.astype(f2).view(u2)"
            high, low = (f"{half.format(self.source(a, 'f32'))}.astype(u4)" for a in args[1:])
            self.assign(args[0], "b32", f"({high} << 16) | {low}")
            return
        x, flush = self.source(args[1], of), "ftz" if "ftz" in how else ""
        how -= {"ftz"}
        if of in FLOATS and to not in FLOATS:
            (how,) = how
            text = f"float_to_int({flush}({x}), {NUMPY[to]}, {how!r})"
        elif of == to and how & set(INTEGRAL):
            (how,) = how
            text = f"np.{INTEGRAL[how]}({x})"
        elif how - {"rn"} or (to == "bf16" and of not in ("f32", "bf16")):
            raise KeyError(".".join(op))
        elif to == "bf16":
            text = x if of == "bf16" else f"to_bf16({x})"
        elif of in FLOATS:
            text = f"{flush}({f'from_bf16({x})' if of == 'bf16' else x}).astype({NUMPY[to]})"
        else:
            text = f"{x}.astype({NUMPY[to]})"
        self.assign(args[0], to, text)

    # Memory.

    def op_cvta(self, op, args, t):
        back = op[1] == "to"
        window = {"shared": SHARED_WINDOW, "global": 0, "param": 0}[op[1 + back]]
        text = (
            f"({self.source(args[1], 'b64')} {'-' if back else '+'} {self.constant(window, 'u8')})"
        )
        self.assign(args[0], "b64", text)

    def op_createpolicy(self, op, args, t):
        self.assign(args[0], "b64", self.constant(0, "u8"))

    def access(self, op: list[str]) -> tuple[str, int]:
        space, vector = "generic", 1
        for m in op[1:-1]:
            if m.split("::")[0] in ("global", "shared", "param"):
                space = m.split("::")[0]
            elif m in ("v2", "v4", "v8"):
                vector = int(m[1])
            elif m == "nc":
                space = "constant"  # global memory that nobody may write during the launch
            elif not m.startswith(HINTS):
                raise KeyError(m)
        return space, vector

    def parts(self, arg: str, count: int) -> list[str]:
        parts = operands(arg.strip("{} ")) if arg.startswith("{") else [arg]
        if len(parts) != count:
            raise ValueError("vector size")
        return parts

    def op_ld(self, op, args, t):
        space, n = self.access(op)
        text = self.call(f"load({space!r}, {self.address(args[1])}, {WIDTH[t]}, {n})")
        self.out.append(f"t = {text}")
        for i, part in enumerate(self.parts(args[0], n)):
            view = f".view({NUMPY[t]})" if NUMPY[t][0] in "if" else ""
            self.assign(part, t, f"t[{i}]{view}")

    def op_st(self, op, args, t):
        space, n = self.access(op)
        values = ", ".join(self.source(p, f"b{8 * WIDTH[t]}") for p in self.parts(args[1], n))
        self.out.append(
            self.call(f"store({space!r}, {self.address(args[0])}, {WIDTH[t]}, [{values}])")
        )

    def op_atom(self, op, args, t):
        scopes = ("global", "gpu", "cta", "sys", "relaxed", "acquire", "release", "acq_rel")
        (how,) = [m for m in op[1:-1] if m not in scopes]
        target, at, *values = args if op[0] == "atom" else ["_", *args]
        fenced = bool({"acquire", "release", "acq_rel"} & set(op))
        values = ", ".join(self.source(x, t) for x in values)
        text = self.call(f"atomic({how!r}, {self.address(at)}, [{values}], fenced={fenced})")
        self.out.append(f"t = {text}")
        self.assign(target, t, "t")

    op_red = op_atom

    def op_membar(self, op, args, t):
        if op[1] not in ("cta", "proxy"):
            self.out.append(self.call("fence()"))

    def op_fence(self, op, args, t):
        if "cta" not in op and "proxy" not in op:
            self.out.append(self.call("fence()"))

    def op_prefetch(self, op, args, t):
        pass

    op_discard = op_applypriority = op_nanosleep = op_prefetch

    def op_cp(self, op, args, t):
        if op[1] != "async" or "bulk" in op:
            raise KeyError(".".join(op))
        if op[2] == "commit_group":
            self.out.append(self.call("commit()"))
        elif op[2] in ("wait_group", "wait_all"):
            self.out.append(self.call(f"wait({args[0] if args else -1})"))
        else:
            size = int(args[2], 0)
            have = self.source(args[3], "u32") if len(args) > 3 else self.constant(size, "u4")
            to, of = self.address(args[0]), self.address(args[1])
            self.out.append(self.call(f"copy_async({to}, {of}, {size}, {have})"))

    # Warps.

    def op_shfl(self, op, args, t):
        target, *valid = (x.strip() for x in args[0].split("|"))
        value = self.source(args[1], "b32")
        b, c, members = (self.source(x, "u32") for x in args[2:5])
        text = self.call(f"shuffle({op[2]!r}, {value}, {b}, {c}, {members})")
        self.out.append(f"t, v = {text}")
        self.assign(target, "b32", "t")
        if valid:
            self.assign(valid[0], "pred", "v")

    def op_redux(self, op, args, t):
        x, members = self.source(args[1], t), self.source(args[2], "u32")
        self.assign(args[0], t, self.call(f"reduce({op[2]!r}, {x}, {members})"))

    def op_vote(self, op, args, t):
        negated = args[1].startswith("!")
        x = "~" * negated + self.source(args[1].lstrip("!"), "pred")
        result = "b32" if op[2] == "ballot" else "pred"
        text = self.call(f"vote({op[2]!r}, {x}, {self.source(args[2], 'u32')})")
        self.assign(args[0], result, text)

    def op_activemask(self, op, args, t):
        self.assign(args[0], "b32", self.call("active_mask()"))

    def op_bar(self, op, args, t):  # bar.warp.sync; the others end a basic block
        self.out.append(self.call("whole_warps()"))

    def op_ldmatrix(self, op, args, t):
        if op[1:4] != ["sync", "aligned", "m8n8"] or t != "b16":
            raise KeyError("ldmatrix")
        parts = self.parts(args[0], {"x1": 1, "x2": 2, "x4": 4}[op[4]])
        at = self.address(args[1])
        self.out.append("t = " + self.call(f"load_matrices({at}, {len(parts)}, {'trans' in op})"))
        for i, part in enumerate(parts):
            self.assign(part, "b32", f"t[{i}]")

    def op_mma(self, op, args, t):
        kind = op[7]
        if op[1:] != ["sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32"]:
            raise KeyError("mma")
        d, a, b, c = (operands(x.strip("{} ")) for x in args)
        a, b, c = (", ".join(self.source(x, "b32") for x in y) for y in (a, b, c))
        self.out.append(self.call("whole_warps()"))
        self.out.append(f"t = mma([{a}], [{b}], [{c}], {kind!r})")
        for i, part in enumerate(d):
            self.assign(part, "b32", f"t[{i}]")
