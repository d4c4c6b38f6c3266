"""What a kernel was compiled to: resources, matrix instructions, memory accesses by operand, atomics, warnings."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gate import amdgcn, ptx, sass
from benchmarks.gate.accesses import Access, by_operand, parameter_names
from benchmarks.gate.fake_driver import Launch
from benchmarks.gate.targets import Target, blocks_per_multiprocessor


@dataclass(frozen=True)
class KernelReport:
    """One kernel in one specialization for one target.

    Args:
        kernel: as Launch has it.
        target: the device's name.
        num_warps: warps of a block as launched; warp specialization may add some.
        num_stages: stages of the software pipeline.
        constants: the tl.constexpr values and other arguments compiled in, as text.
        registers: of a thread; on AMD vector registers, accumulators included.
        spill_stores: bytes that a thread stores to spill registers; NVIDIA.
        spill_loads: bytes that a thread loads back; NVIDIA.
        spilled_registers: registers that were spilled; AMD.
        local_bytes: local (private) memory of a thread: spills, and arrays that are indexed.
        local_accesses: instructions that read or write it.
        shared: bytes of shared memory (LDS) of a block.
        shared_limit: what the device allows.
        tensor_memory: columns of tensor memory of a block.
        blocks_per_multiprocessor: blocks that fit on an SM or CU at once.
        mma: matrix instruction → how often it is written.
        accesses: of global memory.
        machine_accesses: kind → bytes → number of instructions in the machine code.
        atomics: opcode → how often it is written.
        warnings: the assembler's warnings and notes of lost performance.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    constants: dict[str, str]
    registers: int
    spill_stores: int
    spill_loads: int
    spilled_registers: int
    local_bytes: int
    local_accesses: int
    shared: int
    shared_limit: int
    tensor_memory: int
    blocks_per_multiprocessor: int
    mma: dict[str, int]
    accesses: tuple[Access, ...]
    machine_accesses: dict[str, dict[str, int]]
    atomics: dict[str, int]
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON can hold it, accesses counted by operand."""
        return {**asdict(self), "accesses": by_operand(self.accesses), "warnings": list(self.warnings)}


def inspect(launch: Launch) -> KernelReport:
    """Read the machine code of a launch's kernel.

    Args:
        launch: from `capture`.

    Returns:
        The report.
    """
    compiled, target = launch.compiled, launch.target
    metadata = compiled.metadata
    found = _cuda(compiled, target) if target.is_cuda else _hip(compiled)
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    return KernelReport(
        kernel=launch.kernel,
        target=target.name,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        constants={name: str(launch.arguments[name]) for name in launch.arguments if name in launch.constants},
        shared=metadata.shared,
        shared_limit=target.shared_per_block,
        tensor_memory=tensor_memory,
        blocks_per_multiprocessor=blocks_per_multiprocessor(
            target, metadata.num_warps, found["registers"], metadata.shared, tensor_memory
        ),
        **found,
    )


def _cuda(compiled: Any, target: Target) -> dict[str, Any]:
    text = ptx.read(compiled.asm["ptx"], parameter_names(compiled))
    code = sass.read(compiled, target)
    return {
        "registers": code.registers,
        "spill_stores": code.spill_stores,
        "spill_loads": code.spill_loads,
        "spilled_registers": 0,
        "local_bytes": code.local_bytes,
        "local_accesses": code.local_accesses,
        "mma": _with_tensor_memory_shapes(text.mma, compiled.asm["ttgir"]),
        "accesses": tuple(text.accesses),
        "machine_accesses": code.machine_accesses,
        "atomics": {**text.atomics, **code.atomics},
        "warnings": tuple(code.warnings),
    }


def _hip(compiled: Any) -> dict[str, Any]:
    code = amdgcn.read(compiled.asm["llir"], compiled.asm["amdgcn"], parameter_names(compiled))
    return {
        **code._asdict(),
        "accesses": tuple(code.accesses),
        "spill_stores": 0,
        "spill_loads": 0,
        "warnings": (),
    }


def _with_tensor_memory_shapes(mma: dict[str, int], ttgir: str) -> dict[str, int]:
    """tcgen05's PTX does not say its shape; TTGIR does, as the blocks of the accumulators in tensor memory."""
    blocks = re.findall(r"tensor_memory_encoding<blockM = (\d+), blockN = (\d+)", ttgir)
    shapes = "/".join(dict.fromkeys(f"m{m}n{n}" for m, n in blocks))
    return {name.replace("tcgen05 ", f"tcgen05 {shapes} ") if shapes else name: number for name, number in mma.items()}
