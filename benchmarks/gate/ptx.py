"""Reading PTX: global memory accesses by operand, matrix instructions, atomics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gate.accesses import TMA, Access, Assignment, origins

_STATEMENT = re.compile(r"^\s*\{?\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\S.*)$")
_REGISTER = re.compile(r"%rd?\d+")
_PARAMETER = re.compile(r"\b\w+_param_(\d+)\b")
_BRACKETS = re.compile(r"\[([^\]]*)\]")
_SHAPE = re.compile(r"\.(m\d+n\d+k\d+)\.?(?:row\.col\.)?(.*)")
_ATOMICS = ("atom.", "red.", "cp.reduce.", "multimem.red", "multimem.ld_reduce")


class _Instruction(NamedTuple):
    opcode: str
    operands: str


class Code(NamedTuple):
    """What a kernel's PTX says.

    Fields:
        accesses: of global memory.
        mma: matrix instruction → how often it is written.
        atomics: opcode → how often it is written.
    """

    accesses: list[Access]
    mma: dict[str, int]
    atomics: dict[str, int]


def read(ptx: str, parameters: list[str]) -> Code:
    """Read a kernel's PTX.

    Args:
        ptx: the text.
        parameters: the names of its parameters in order, "" for those that hold no address.

    Returns:
        The accesses, matrix instructions and atomics.
    """
    instructions = list(_instructions(ptx))
    return Code(
        _accesses(instructions, parameters),
        dict(Counter(name for i in instructions if (name := _matrix_instruction(i.opcode)))),
        dict(Counter(i.opcode for i in instructions if i.opcode.startswith(_ATOMICS))),
    )


def _instructions(ptx: str) -> Iterator[_Instruction]:
    body = ptx[ptx.index("\n{") :]
    for line in body.splitlines():
        for statement in line.partition("//")[0].split(";"):
            match = _STATEMENT.match(statement)
            if match:
                yield _Instruction(match[1], match[2])


def _accesses(instructions: list[_Instruction], parameters: list[str]) -> list[Access]:
    flow = origins((_assignment(i) for i in instructions), _roots(instructions, parameters))
    found = []
    for instruction in instructions:
        access = _global_access(instruction)
        if access is not None:
            kind, width, address = access
            names: set[str] = set()
            # A bracket may hold coordinates after the address: [%rd1, {%r2, %r3}].
            for register in _REGISTER.findall(address.partition(",")[0]):
                names |= flow.get(register, frozenset())
            found.append(Access(kind, "|".join(sorted(names)), width))
    return found


def _roots(instructions: list[_Instruction], parameters: list[str]) -> dict[str, str]:
    """Parameter symbols that hold an address, by the argument's name.

    Triton appends the addresses of its scratch memory to the parameters.
    """
    symbols = {match[0]: int(match[1]) for i in instructions for match in _PARAMETER.finditer(i.operands)}
    names = [*parameters, "(scratch)", "(scratch)"]
    return {symbol: names[index] for symbol, index in symbols.items() if names[index]}


def _assignment(instruction: _Instruction) -> Assignment:
    """Registers written and read; none for loads, whose values are no addresses unless they are parameters."""
    opcode, operands = instruction
    loads = opcode.startswith(("ld", "atom")) and not opcode.startswith("ld.param")
    if loads or operands.startswith("["):
        return Assignment((), ())
    first = operands[: operands.index("}")] if operands.startswith("{") else operands.partition(",")[0]
    rest = operands[len(first) :]
    symbols = tuple(match[0] for match in _PARAMETER.finditer(rest))
    return Assignment(tuple(_REGISTER.findall(first)), (*_REGISTER.findall(rest), *symbols))


def _global_access(instruction: _Instruction) -> tuple[str, int, str] | None:
    """Kind, width and the text of the address, or None for any other instruction."""
    opcode, operands = instruction
    brackets = _BRACKETS.findall(operands)
    if opcode.startswith(("ld.global", "st.global")):
        return ("load" if opcode[0] == "l" else "store"), _vector_bytes(opcode), brackets[0]
    if opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
        return "load", int(operands.split("],")[2].split(",")[0], 0), brackets[1]
    if opcode.startswith("cp.async.bulk.") and ".global" in opcode and brackets:
        # destination.source: "….shared::cta.global.…" reads global memory, "….global.shared::cta.…" writes it.
        reads = ".shared::cta.global" in opcode or ".shared::cluster.global" in opcode
        return ("load", TMA, brackets[1]) if reads else ("store", TMA, brackets[0])
    return None


def _vector_bytes(opcode: str) -> int:
    vector = re.search(r"\.v(\d)\b", opcode)
    bits = re.search(r"\.[busf](\d+)$", opcode)
    if bits is None:
        raise ValueError(f"expected a type at the end of {opcode}")
    return (int(vector[1]) if vector else 1) * int(bits[1]) // 8


def _matrix_instruction(opcode: str) -> str | None:
    """For example "wgmma m64n128k16 f32.bf16.bf16"; None for any other instruction."""
    for family, prefix in (("wgmma", "wgmma.mma_async"), ("mma.sync", "mma.sync"), ("mma.sync", "mma.sp")):
        if opcode.startswith(prefix):
            shape = _SHAPE.search(opcode)
            return f"{family} {shape[1]} {shape[2]}" if shape else f"{family} {opcode}"
    if opcode.startswith("tcgen05.mma"):
        # Shape and types are in its descriptor, a register; the kind tells their family: f16 is bf16 too.
        return "tcgen05 " + opcode.partition(".kind::")[2].partition(".")[0]
    return None
