"""NVIDIA machine code: what ptxas says while it assembles a kernel, and the instructions that it chose."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.compiler import make_backend

from benchmarks.gate.targets import Target

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_KINDS = {"LDG": "load", "LDGSTS": "load", "STG": "store", "UTMALDG": "load", "UTMASTG": "store"}


class Code(NamedTuple):
    """What ptxas and the machine code say.

    Fields:
        registers: of a thread.
        spill_stores: bytes that a thread stores to spill registers.
        spill_loads: bytes that a thread loads back.
        local_bytes: the stack frame of a thread, spills included.
        local_accesses: instructions that read or write it.
        machine_accesses: kind → bytes → number of instructions.
        atomics: opcode → how often it is written, on global memory.
        warnings: ptxas' warnings and its notes of lost performance.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    local_bytes: int
    local_accesses: int
    machine_accesses: dict[str, dict[str, int]]
    atomics: dict[str, int]
    warnings: list[str]


def read(compiled: Any, target: Target) -> Code:
    """Read a compiled kernel's machine code.

    Args:
        compiled: Triton's CompiledKernel.
        target: what it was compiled for.

    Returns:
        Resources, accesses, atomics and warnings.

    Raises:
        RuntimeError: assembled again, the kernel came out with other registers.
    """
    cubin, log = _assemble(compiled, target)
    registers = _number(r"Used (\d+) registers", log)
    built = _registers(compiled.asm["cubin"])
    if registers != built:
        raise RuntimeError(f"{compiled.metadata.name}: expected {built} registers, as Triton built it, got {registers}")
    opcodes = Counter(_INSTRUCTION.findall(_tool("nvdisasm", cubin, "-c")))
    return Code(
        registers=registers,
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        local_bytes=_number(r"(\d+) bytes stack frame", log),
        local_accesses=sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0] in ("LDL", "STL")),
        machine_accesses=_accesses(opcodes),
        # Not ATOMS, on shared memory: ptxas allocates tensor memory with it. The PTX tells of those that were meant.
        atomics={opcode: n for opcode, n in opcodes.items() if re.match(r"(ATOMG?|REDG?|UTMAREDG)(\.|$)", opcode)},
        warnings=_warnings(log),
    )


def ptxas_versions(targets: list[Target]) -> dict[str, str]:
    """The release of the ptxas that Triton uses for each NVIDIA target."""
    from triton.backends.nvidia.compiler import get_ptxas

    return {target.name: get_ptxas(target.arch).version for target in targets if target.is_cuda}


def _assemble(compiled: Any, target: Target) -> tuple[bytes, str]:
    """The cubin and ptxas' log, by Triton's own call of ptxas: its choice of binary and of flags is its versions'."""
    backend = make_backend(target.gpu_target)
    metadata = compiled.metadata._asdict()
    options = backend.parse_options(metadata)
    printed = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        triton.knobs.nvidia.dump_ptxas_log = True
        cubin = backend.make_cubin(compiled.asm["ptx"], dict(metadata), options, target.arch)
    return cubin, printed.getvalue()


def _registers(cubin: bytes) -> int:
    return _number(r"REG:(\d+)", _tool("cuobjdump", cubin, "-res-usage"))


def _tool(name: str, cubin: bytes, option: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"expected {pattern!r} in what the CUDA tools print, got:\n{text[:2000]}")
    return int(found[1])


def _warnings(log: str) -> list[str]:
    """Warnings, and notes such as C7510, C7511 and C7515: wgmma instructions were serialized."""
    found = [line.partition(":")[2].strip() for line in log.splitlines() if re.search("warning|Performance Loss", line)]
    return list(dict.fromkeys(re.sub(" in (?:the function|line) .*", "", line) for line in found))


def _accesses(opcodes: Counter[str]) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = {}
    for opcode, number in sorted(opcodes.items()):
        name, *modifiers = opcode.split(".")
        if name in _KINDS:
            width = "tma" if name.startswith("UTMA") else _width(modifiers)
            widths = counted.setdefault(_KINDS[name], {})
            widths[width] = widths.get(width, 0) + number
    return counted


def _width(modifiers: list[str]) -> str:
    """Bytes a thread; whole modifiers only, since LTC128B is a cache policy."""
    for modifier, width in {"256": "32", "128": "16", "64": "8", "U16": "2", "S16": "2", "U8": "1", "S8": "1"}.items():
        if modifier in modifiers:
            return width
    return "4"
