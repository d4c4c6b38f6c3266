"""Reading what Triton compiles for AMD: accesses by operand from LLVM IR, the rest from the assembly."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from benchmarks.gate.accesses import Access, Assignment, origins

_VALUE = re.compile(r"%[\w.]+")
_LOAD = re.compile(r"load (?:volatile )?(<[^>]*>|\w+), ptr addrspace\(1\) (%[\w.]+)")
_STORE = re.compile(r"store (?:volatile )?(<[^>]*>|\w+) .*?, ptr addrspace\(1\) (%[\w.]+)")
_BUFFER_LOAD = re.compile(
    r"call (<[^>]*>|\w+) @llvm\.amdgcn\.raw\.ptr\.buffer\.load\.\w+\(ptr addrspace\(8\) (%[\w.]+)"
)
_BUFFER_STORE = re.compile(
    r"call void @llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\((<[^>]*>|\w+) .*?, ptr addrspace\(8\) (%[\w.]+)"
)
# From global memory to LDS past the registers; the third operand is the bytes of a lane.
_TO_LDS = re.compile(
    r"@llvm\.amdgcn\.(?:raw\.ptr\.buffer|global)\.load\.(?:async\.)?lds\S*\("
    r"ptr addrspace\([18]\) (%[\w.]+), ptr addrspace\(3\) \S+ i32 (\d+)"
)
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}
_MATRIX = re.compile(r"^\s*v_s?mfmac?_(\w+?)_(\d+)x(\d+)x(\d+)_?(\w+?)\s", re.MULTILINE)
_ATOMIC = re.compile(
    r"^\s*((?:global|flat|buffer)_atomic_\w+|ds_(?:add|sub|rsub|inc|dec|min|max|and|or|xor|mskor|cmpst|wrxchg|pk_add)_\w+)",
    re.MULTILINE,
)
_MEMORY = re.compile(
    r"^\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?(dwordx[234]|dword|[us]?short|[us]?byte)", re.MULTILINE
)
_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


class Code(NamedTuple):
    """What a kernel's LLVM IR and assembly say.

    Fields:
        accesses: of global memory, as LLVM IR has them.
        machine_accesses: kind → bytes → number of instructions, as the assembly has them.
        mma: matrix instruction → how often it is written.
        atomics: opcode → how often it is written.
        registers: vector registers, accumulators included.
        spilled_registers: scalar and vector registers that were spilled.
        local_bytes: private memory of a thread.
        local_accesses: instructions that read or write it.
    """

    accesses: list[Access]
    machine_accesses: dict[str, dict[str, int]]
    mma: dict[str, int]
    atomics: dict[str, int]
    registers: int
    spilled_registers: int
    local_bytes: int
    local_accesses: int


def read(llir: str, assembly: str, parameters: list[str]) -> Code:
    """Read a kernel's LLVM IR and assembly.

    Args:
        llir: the text of Triton's LLVM IR.
        assembly: the text of the assembly.
        parameters: the names of its parameters in order, "" for those that hold no address.

    Returns:
        Accesses, matrix instructions, atomics and resources.
    """
    return Code(
        accesses=_accesses(llir, parameters),
        machine_accesses=_machine_accesses(assembly),
        mma=dict(Counter(f"mfma m{m}n{n}k{k} {out}.{of}" for out, m, n, k, of in _MATRIX.findall(assembly))),
        atomics=dict(Counter(_ATOMIC.findall(assembly))),
        # On gfx90a and later .vgpr_count is the total of both kinds: 512 where .agpr_count is 256.
        registers=_metadata(assembly, "vgpr_count"),
        spilled_registers=_metadata(assembly, "vgpr_spill_count") + _metadata(assembly, "sgpr_spill_count"),
        local_bytes=_metadata(assembly, "private_segment_fixed_size"),
        local_accesses=len(re.findall(r"^\s*scratch_(?:load|store)_", assembly, re.MULTILINE)),
    )


def _metadata(assembly: str, field: str) -> int:
    found = re.search(rf"^\s*(?:- )?\.{field}:\s+(\d+)", assembly, re.MULTILINE)
    if found is None:
        raise ValueError(f"no {field} in the kernel's metadata")
    return int(found[1])


def _accesses(llir: str, parameters: list[str]) -> list[Access]:
    definition = re.search(r"define amdgpu_kernel void @[^(]+\((.*)\) .*\{", llir)
    if definition is None:
        raise ValueError("no kernel in the LLVM IR")
    arguments = _VALUE.findall(definition[1])
    # Triton appends the addresses of its scratch memory to the parameters.
    names = [*parameters, "(scratch)", "(scratch)"]
    roots = {value: name for value, name in zip(arguments, names, strict=False) if name}
    lines = llir[definition.end() :].splitlines()
    found = [(line, _global_access(line)) for line in lines]
    flow = origins((_assignment(line) for line, access in found if access is None), roots)
    return [
        Access(kind, "|".join(sorted(flow.get(address, frozenset()))), width)
        for _, access in found
        if access is not None
        for kind, width, address in [access]
    ]


def _assignment(line: str) -> Assignment:
    value, equals, rest = line.strip().partition(" = ")
    if not equals or not value.startswith("%") or rest.startswith("load "):
        return Assignment((), ())
    return Assignment((value,), tuple(_VALUE.findall(rest)))


def _global_access(line: str) -> tuple[str, int, str] | None:
    for kind, pattern in (("load", _LOAD), ("store", _STORE), ("load", _BUFFER_LOAD), ("store", _BUFFER_STORE)):
        match = pattern.search(line)
        if match:
            return kind, _type_bytes(match[1]), match[2]
    match = _TO_LDS.search(line)
    return ("load", int(match[2]), match[1]) if match else None


def _type_bytes(name: str) -> int:
    vector = re.fullmatch(r"<(\d+) x (\w+)>", name)
    count, scalar = (int(vector[1]), vector[2]) if vector else (1, name)
    return count * (_BITS[scalar] if scalar in _BITS else int(scalar[1:])) // 8


def _machine_accesses(assembly: str) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    for (kind, unit), number in sorted(Counter(_MEMORY.findall(assembly)).items()):
        width = str(_BYTES.get(unit) or _BYTES[unit[1:]])
        counted.setdefault(kind, {})
        counted[kind][width] = counted[kind].get(width, 0) + number
    return counted
