"""Global memory accesses of a kernel and the operands that they go to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# The width of a copy by the tensor memory accelerator: a whole tile, whatever the threads do.
TMA = 0


class Access(NamedTuple):
    """One instruction that reads or writes global memory.

    Fields:
        kind: "load" or "store".
        operand: the kernel's arguments that the address may come from, joined by "|"; "" if none was found.
        width: bytes for each thread, or TMA.
    """

    kind: str
    operand: str
    width: int


class Assignment(NamedTuple):
    """An instruction as dataflow sees it: `values` are written from `sources`."""

    values: tuple[str, ...]
    sources: tuple[str, ...]


def origins(assignments: Iterable[Assignment], roots: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Which roots every value may have come from, through any chain of assignments.

    Args:
        assignments: the program's, in any order.
        roots: value → name of its root.

    Returns:
        value → names of roots; values that come from none are left out.
    """
    readers: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for assignment in assignments:
        for source in assignment.sources:
            readers[source].append(assignment.values)
    found: dict[str, set[str]] = {value: {name} for value, name in roots.items()}
    waiting = list(found)
    while waiting:
        source = waiting.pop()
        for values in readers[source]:
            for value in values:
                known = found.setdefault(value, set())
                if not found[source] <= known:
                    known |= found[source]
                    waiting.append(value)
    return {value: frozenset(names) for value, names in found.items()}


def parameter_names(compiled: Any) -> list[str]:
    """The names of a compiled kernel's parameters, in order; "" for those that hold no address.

    A descriptor takes several parameters, of which one holds the address. TTGIR tells those that do; its names are not
    the arguments' where a kernel assigns an argument to a variable, hence the names of the JIT's signature.
    """
    signature = re.search(r"tt\.func public @\S+?\((.*)\) attributes", compiled.asm["ttgir"])
    if signature is None:
        raise ValueError(f"no function found in the TTGIR of {compiled.metadata.name}")
    arguments = [name for name, kind in _flat(compiled.src.signature.items()) if kind.startswith(("*", "tensordesc"))]
    kinds = re.findall(r"%[\w.]+: (!tt\.ptr|!tt\.tensordesc|\w+)", signature[1])
    if sum(kind.startswith("!tt.") for kind in kinds) != len(arguments):
        raise ValueError(f"{compiled.metadata.name}: expected addresses of {arguments}, got parameters {kinds}")
    names = iter(arguments)
    return [next(names) if kind.startswith("!tt.") else "" for kind in kinds]


def _flat(signature: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Names and types of arguments, those of tuples one by one."""
    for name, kind in signature:
        if isinstance(kind, tuple):
            yield from _flat((f"{name}.{i}", part) for i, part in enumerate(kind))
        else:
            yield name, kind


def by_operand(accesses: Iterable[Access]) -> dict[str, dict[str, dict[str, int]]]:
    """Accesses counted for a report: operand → kind → width → number of instructions."""
    counted: dict[str, dict[str, dict[str, int]]] = {}
    for (kind, operand, width), number in sorted(Counter(accesses).items()):
        counted.setdefault(operand, {}).setdefault(kind, {})["tma" if width == TMA else str(width)] = number
    return counted
