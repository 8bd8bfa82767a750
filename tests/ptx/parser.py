"""PTX text -> kernels: parameters, shared variables, registers, basic blocks in running order."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SHARED_BEGIN = 1024  # the first address of shared memory: a null pointer is no place in it

WIDTH = {
    "pred": 0, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8,
}  # fmt: skip


class PtxError(Exception):
    """The program did what no GPU would let it do, or what this interpreter does not know."""


@dataclass(eq=False)
class Instruction:
    line: int
    text: str
    guard: str  # a predicate register, "!" before it if negated; empty if there is none
    op: list[str]  # the opcode, cut at its dots
    args: list[str]


@dataclass(eq=False)
class BasicBlock:
    """``end`` is one of ("next",), ("ret",), ("bra", target), ("branch", predicate, negated,
    target), ("bar", line), which is __syncthreads."""

    place: int  # in the text
    code: list[Instruction] = field(default_factory=list)
    end: tuple = ("next",)
    order: int = -1  # in which threads that have parted run


def operands(text: str) -> list[str]:
    """Operands, cut at the commas outside of brackets."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            parts.append(text[last:i].strip())
            last = i + 1
    return [*parts, text[last:].strip()] if text.strip() else []


class Kernel:
    """One .entry."""

    def __init__(self, name: str, dynamic: set[str], head: str, body: list[str], first_line: int):
        self.name, self.dynamic = name, dynamic
        self.text: dict[int, str] = {}
        self.params, self.param_bytes = _parameters(head)
        bound = re.search(r"\.(?:max|req)ntid\s+(\d+)", head[head.rindex(")") :])
        self.max_threads = int(bound[1]) if bound else 1024
        self.shared: dict[str, int] = {}  # name -> address
        self.static_shared = 0
        self.registers: dict[str, int] = {}  # name -> number
        self.widths: list[int] = []  # by number
        self.labels: dict[str, BasicBlock] = {}
        self.blocks = [BasicBlock(0)]
        self._read(body, first_line)
        self.by_order = _running_order(self.blocks, self._successors)
        code = [i for b in self.blocks for i in b.code]
        accesses = [i for i in code if i.op[0] in ("ld", "st") and "param" not in i.op]
        narrow = [WIDTH[i.op[-1]] for i in accesses if "shared" in i.text]
        self.granule = min([4, *narrow])  # bytes of shared memory that are watched as one
        narrow = [WIDTH[i.op[-1]] for i in accesses if "shared" not in i.text]
        self.global_granule = min([2, *narrow])  # and of global memory
        self.translated: dict = {}  # by threads per block; instructions.py fills it

    def where(self, line: int) -> str:
        return f"{self.name}:{line} `{self.text.get(line, '')}`"

    def _read(self, body: list[str], first_line: int) -> None:
        unfinished, scope = "", {}
        for number, raw in enumerate(body, first_line):
            text = raw.split("//")[0].strip()
            if not text or text in "{}" or text.startswith((".loc", ".file")):
                continue
            self.text[number] = text
            text = f"{unfinished} {text}".strip()
            while label := re.match(r"([\w$]+):\s*", text):
                self.labels[label[1]] = self._fresh()
                text = text[label.end() :]
            *statements, unfinished = text.split(";")
            unfinished = unfinished.strip(" \t}")  # the end of an inline scope
            for statement in map(str.strip, statements):
                if statement[:1] in "{}":  # an inline scope begins or has ended
                    statement, scope = statement.lstrip("{} \t"), {}
                    if own := re.match(r"\.reg \.\w+ (%?\w+)$", statement):
                        scope = {own[1]: f"{own[1]}@{number}"}
                for name, own in scope.items():
                    statement = re.sub(rf"(?<![%\w]){name}(?!\w)", own, statement)
                if statement.startswith("."):
                    self._declare(statement)
                elif statement:
                    self._instruction(statement, number)
        if self.blocks[-1].end == ("next",):
            self.blocks[-1].end = ("ret",)

    def _fresh(self) -> BasicBlock:
        """The block that takes the next instruction: the last one, if nothing stands in it yet."""
        last = self.blocks[-1]
        if last.code or last.end != ("next",):
            last = BasicBlock(len(self.blocks))
            self.blocks.append(last)
        return last

    def _instruction(self, statement: str, line: int) -> None:
        found = re.match(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
        if not found:
            raise PtxError(f"{self.name}:{line}: cannot parse {statement!r}")
        guard = (found[1] or "") + (found[2] or "")
        op, args = found[3].split("."), operands(found[4])
        block = self._fresh()
        if op[0] == "bra":
            block.end = ("bra", args[0])
            if guard:
                block.end = ("branch", guard.lstrip("!"), guard[0] == "!", args[0])
        elif op[0] in ("ret", "exit") or (op[0] in ("bar", "barrier") and "warp" not in op):
            if guard:  # becomes a branch around it
                around = f"@{line}"
                block.end = ("branch", guard.lstrip("!"), guard[0] != "!", around)
                block = self._fresh()
            block.end = ("ret",) if op[0] in ("ret", "exit") else ("bar", line)
            if block.end[0] == "bar" and (op[1], args) != ("sync", ["0"]):
                raise PtxError(f"unknown: {self.name}:{line} `{statement}`")
            if guard:
                self.labels[around] = self._fresh()
        else:
            block.code.append(Instruction(line, statement, guard, op, args))

    def _declare(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name, count in re.findall(r"([%\w$@]+)(?:<(\d+)>)?", names):
                for i in range(int(count)) if count else [""]:
                    self.registers[f"{name}{i}"] = len(self.widths)
                    self.widths.append(WIDTH[kind[1:]])
        elif text.startswith(".shared"):
            form = r"\.shared\s+\.align (\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
            align, kind, name, count = re.match(form, text).groups()
            at = -(-self.static_shared // int(align)) * int(align)
            self.shared[name] = SHARED_BEGIN + at
            self.static_shared = at + WIDTH[kind] * int(count or 1)
        elif not text.startswith(".pragma"):
            raise PtxError(f"{self.name}: directive {text!r}")

    def _successors(self, b: BasicBlock) -> list[int]:
        follow = [b.place + 1] if b.end[0] in ("next", "bar", "branch") else []
        jump = b.end[0] in ("bra", "branch")
        return follow + ([self.labels[b.end[-1]].place] if jump else [])


def _parameters(head: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> (offset, bytes), and the bytes of all."""
    params, at = {}, 0
    for declared in operands(head[head.index("(") + 1 : head.rindex(")")]):
        align = int((re.search(r"\.align (\d+) \.b8", declared) or [0, 0])[1])
        count = int((re.search(r"\[(\d+)\]", declared) or [0, 1])[1])
        kind = next(w for w in declared.replace(".", " ").split() if w in WIDTH)
        size = WIDTH[kind] * count
        align = align or size
        at = -(-at // align) * align
        params[re.search(r"([\w$]+)(\[\d+\])?$", declared)[1]] = (at, size)
        at += size
    return params, at


def _running_order(blocks: list[BasicBlock], successors) -> list[BasicBlock]:
    """Numbers the blocks topologically, every loop contiguous, so that what comes after a loop or a
    branch has a higher number. Threads that have parted meet again as early as the program allows
    if those with the lowest number run first."""
    graph = [successors(b) for b in blocks]
    order: list[int] = []

    def visit(nodes: set[int]) -> None:
        for part in _components(graph, nodes):
            if len(part) == 1:
                order.extend(part)
                continue
            entries = [v for u in range(len(graph)) if u not in part for v in graph[u] if v in part]
            head = entries[0] if entries else min(part)
            order.append(head)
            visit(part - {head})

    visit(set(range(len(blocks))))
    for number, place in enumerate(order):
        blocks[place].order = number
    return [blocks[place] for place in order]


def _components(graph: list[list[int]], nodes: set[int]) -> list[set[int]]:
    """Strongly connected components within ``nodes``, in topological order (Tarjan, by a stack)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    on_path: set[int] = set()
    found = []

    def enter(v: int):
        index[v] = low[v] = len(index)
        path.append(v)
        on_path.add(v)
        return v, iter(graph[v])

    for root in sorted(nodes):
        work = [enter(root)] if root not in index else []
        while work:
            v, edges = work[-1]
            w = next((w for w in edges if w in nodes and (w not in index or w in on_path)), None)
            if w is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[v])
                if low[v] == index[v]:
                    at = path.index(v)
                    found.append(set(path[at:]))
                    on_path.difference_update(path[at:])
                    del path[at:]
            elif w in index:
                low[v] = min(low[v], index[w])
            else:
                work.append(enter(w))
    return found[::-1]


class Module:
    """A PTX file; its kernels are parsed when they are first asked for."""

    def __init__(self, text: str):
        self.text = text
        self.dynamic = set(re.findall(r"\.extern \.shared .*?([\w$]+)\[\];", text))
        self._parsed: dict[str, Kernel] = {}
        self._entries: dict[str, tuple[str, list[str], int]] = {}
        lines = text.splitlines()
        for at, line in enumerate(lines):
            if entry := re.match(r"\.visible \.entry ([\w$]+)\(", line):
                begin = next(i for i in range(at, len(lines)) if lines[i].startswith("{"))
                end = next(i for i in range(begin, len(lines)) if lines[i].startswith("}"))
                head = " ".join(x.split("//")[0] for x in lines[at:begin])
                self._entries[entry[1]] = head, lines[begin + 1 : end], begin + 2

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        if name not in self._parsed:
            self._parsed[name] = Kernel(name, self.dynamic, *self._entries[name])
        return self._parsed[name]
