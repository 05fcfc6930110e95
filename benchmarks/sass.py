"""SASS, the machine code of Nvidia GPUs: its instructions, loops, and the cycles that they take on an SM.

Each of the four partitions of an SM issues one warp instruction per cycle. The rates are those of Hopper: 16 lanes per
partition for integers and comparisons (`alu`) and for integer multiplication (`imad`, one half of the FMA pipe), 32 for
float multiply-add (`fma`), 4 for exponentials and other special functions (`mufu`), 8 for loads, stores and shuffles
(`lsu`), and 1024 FLOP per cycle in half precision (`tensor`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

KINDS = ('integer', 'fp32', 'exp', 'load/store', 'mma', 'other')
PIPES = ('issue', 'alu', 'fma', 'mufu', 'lsu', 'tensor')
FLOP_PER_CYCLE = 1024  # of the tensor cores of a partition, in half precision

# An instruction has the kind, the pipe and the cycles per warp of the first pattern that matches its start. The cycles
# of matrix products, and of accesses of more than 32 bits per thread, depend on their size.
RULES = [
    (re.compile(pattern), kind, pipe, cycles)
    for pattern, kind, pipe, cycles in (
        (r'MUFU', 'exp', 'mufu', 8),
        (r'(I2F|F2I|F2F|FRND)\b', 'fp32', 'mufu', 8),
        (r'(POPC|FLO|BREV)\b', 'integer', 'mufu', 8),
        (r'HFMA2\S* \w+, -RZ, RZ,', 'other', 'fma', 1),  # moves a constant
        (r'(UTC)?[HQID]G?MMA', 'mma', 'tensor', 1),
        (r'(LDTM|STTM|UTMA|UBLK)', 'load/store', None, 0),  # tensor memory and bulk copies
        (r'(LD|ST|ATOM|RED)(G|S|L|SM|GSTS|GMC)?\b', 'load/store', 'lsu', 4),
        (r'SHFL', 'other', 'lsu', 4),
        (r'IMAD\.(MOV|U32)', 'other', 'imad', 2),
        (r'IMAD\.(WIDE|HI)', 'integer', 'imad', 4),
        (r'IMAD', 'integer', 'imad', 2),
        (r'(FFMA|FMUL|FADD|HFMA|HADD|HMUL)', 'fp32', 'fma', 1),
        (r'(FMNMX|FSETP|FSEL|FSET|F2FP|I2FP|FCHK|HMNMX|HSET)', 'fp32', 'alu', 2),
        (r'(MOV|VOTE|P2R|R2P)\b', 'other', 'alu', 2),
        (r'(IADD|LOP|SHF|LEA|ISETP|SEL|V?IMNMX|VIADD|PRMT|PLOP|IABS|SGXT|BMSK)', 'integer', 'alu', 2),
        (r'(UMOV|ULDC|UTC|USETMAXREG|UVIRT)', 'other', None, 0),
        (r'U', 'integer', None, 0),  # uniform: once per warp, on a separate pipe
        (r'', 'other', None, 0),
    )
]
LINE = re.compile(r'/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*?)\s*;')
GLOBAL = re.compile(r'(LDG|STG|LDGSTS)\b')
TARGET = re.compile(r'BRA.*\b0x([0-9a-f]+)')


class Instruction(NamedTuple):
    """An instruction, without its predicate, as in `BRA 0x1230`."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        """Name and modifiers."""
        return self.text.split()[0]


def parse(text: str) -> list[Instruction]:
    """Parse the output of `cuobjdump -sass` up to the end of the kernel; subroutines for rare cases follow it."""
    code = [Instruction(int(address, 16), text) for address, text in LINE.findall(text)]
    end = max((i for i, instruction in enumerate(code) if instruction.opcode == 'EXIT'), default=len(code))
    return code[: end + 1]


def count(code: Iterable[Instruction]) -> Counter:
    """Instructions by kind, and cycles of a partition by pipe, for one warp.

    Also `ex2`, the exponentials, and `bytes`, the traffic to and from global memory.
    """
    found = Counter()
    for instruction in code:
        kind, pipe, cycles = _cost(instruction)
        found += Counter({kind: 1, 'issue': 1, 'ex2': instruction.opcode == 'MUFU.EX2'})
        if GLOBAL.match(instruction.text):
            found['bytes'] += 32 * _bytes(instruction.opcode)
        if pipe:
            found[pipe] += cycles
    return found


def _cost(instruction: Instruction) -> tuple[str, str | None, float]:
    _, kind, pipe, cycles = next(rule for rule in RULES if rule[0].match(instruction.text))
    if pipe == 'tensor':
        cycles = _mma_cycles(instruction.opcode)
    elif pipe == 'lsu':
        cycles *= _words(instruction.opcode)
    return kind, pipe, cycles


def _mma_cycles(opcode: str) -> float:
    """Cycles of HMMA.16816 (a warp) and HGMMA.64x32x16 (a quarter of its four warps); 0 if the name has no size."""
    size = re.search(r'\.(64)x(\d+)x(\d+)|\.(16)(8)(8|16)\b', opcode)
    if not size:
        return 0
    m, n, k = (int(n) for n in size.groups() if n)
    flop = 2 * m * n * k / (4 if m == 64 else 1)
    return flop / FLOP_PER_CYCLE * (2 if 'TF32' in opcode else 1)


def _bytes(opcode: str) -> int:
    """Bytes per thread."""
    narrow = re.search(r'\.[US](8|16)\b', opcode)
    return int(narrow[1]) // 8 if narrow else 4 * _words(opcode)


def _words(opcode: str) -> int:
    """32-bit words per thread; loads for matrix products read one to four tiles."""
    width = re.search(r'\.(128|64)\b|M88\.(\d)|MT88\.(\d)', opcode)
    return {'128': 4, '64': 2}.get(width[1]) or int(width[2] or width[3]) if width else 1


def fma_cycles(found: Counter) -> float:
    """Cycles of the FMA pipe, one half of which also runs `imad`."""
    return max(found['imad'], found['imad'] / 2 + found['fma'])


def loops(code: Sequence[Instruction]) -> list[range]:
    """Indices of the instructions of each loop: from the target of a backward branch to the branch."""
    places = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, instruction in enumerate(code):
        target = TARGET.match(instruction.text)
        start = places.get(int(target[1], 16), i) if target else i
        if start < i:
            found.append(range(start, i + 1))
    return found


def split(code: Sequence[Instruction]) -> tuple[list[Instruction], list[Instruction], list[Instruction]]:
    """Split code into that outside of loops, that of the loops around the main loop, and the main loop.

    The main loop is the innermost one with the most matrix products, or with the most exponentials in float32, where
    products are ordinary FMA instructions. Without such a loop it is empty.
    """
    weights = {places: _products(code[places.start : places.stop]) for places in loops(code)}
    products = [places for places, weight in weights.items() if weight]
    inner = [a for a in products if not any(a != b and _within(b, a) for b in products)]
    main = max(inner, key=weights.get, default=range(0))
    around = [places for places in weights if main and _within(main, places)]
    first, end = min((p.start for p in around), default=0), max((p.stop for p in around), default=0)
    return (
        [*code[:first], *code[end:]],
        [*code[first : main.start], *code[main.stop : end]],
        list(code[main.start : main.stop]),
    )


def _products(code: Iterable[Instruction]) -> int:
    found = count(code)
    return found['mma'] or found['ex2']


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
