"""What a compiled kernel must be: the violations of a report against what was meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.gate.accesses import TMA
from benchmarks.gate.machine_code import KernelReport


@dataclass(frozen=True)
class Expectations:
    """What was meant of one kernel; spills, local memory, atomics, warnings and too much shared memory never are.

    Args:
        mma: the matrix instructions meant, each by words of its name: ("wgmma bf16",). Each must occur, and no matrix
            instruction may occur that none of them names. (): a kernel without matrix instructions. None: not checked.
        widths: argument → bytes that each of its global loads and stores must have at least; TMA is wide enough. Where
            an address may belong to two arguments, both must be named or neither is checked by name alone.
        blocks_per_multiprocessor: blocks that must fit on a multiprocessor at once.
    """

    mma: tuple[str, ...] | None = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    blocks_per_multiprocessor: int = 1


def violations(report: KernelReport, expected: Expectations) -> list[str]:
    """Everything in which a compiled kernel is not what was meant.

    Args:
        report: the kernel's.
        expected: what was meant.

    Returns:
        One sentence each; [] for a good kernel.
    """
    return [*_memory(report, expected), *_instructions(report, expected), *_widths(report, expected)]


def _memory(report: KernelReport, expected: Expectations) -> list[str]:
    found = []
    if report.spill_stores or report.spill_loads:
        found.append(f"spills: {report.spill_stores} bytes stored, {report.spill_loads} bytes loaded by each thread")
    if report.spilled_registers:
        found.append(f"spills: {report.spilled_registers} registers")
    if report.local_bytes or report.local_accesses:
        found.append(f"local memory: {report.local_bytes} bytes a thread, {report.local_accesses} instructions")
    if report.shared > report.shared_limit:
        found.append(f"shared memory: {report.shared} bytes a block, {report.target} has {report.shared_limit}")
    elif report.blocks_per_multiprocessor < expected.blocks_per_multiprocessor:
        found.append(
            f"occupancy: expected {expected.blocks_per_multiprocessor} blocks a multiprocessor, got "
            f"{report.blocks_per_multiprocessor} ({report.registers} registers, {report.shared} bytes of shared memory)"
        )
    return found


def _instructions(report: KernelReport, expected: Expectations) -> list[str]:
    found = [f"atomic: {number} × {opcode}" for opcode, number in report.atomics.items()]
    found += [f"warning: {warning}" for warning in report.warnings]
    if expected.mma is None:
        return found
    for meant in expected.mma:
        if not any(_is(name, meant) for name in report.mma):
            found.append(f"matrix instructions: expected {meant}, got {', '.join(report.mma) or 'none'}")
    for name in report.mma:
        if not any(_is(name, meant) for meant in expected.mma):
            found.append(f"matrix instructions: expected {' or '.join(expected.mma) or 'none'}, got also {name}")
    return found


def _is(name: str, meant: str) -> bool:
    """Whether every word of `meant` is a word of the instruction's name: f16 is not bf16."""
    return set(re.split(r"[ .]", meant)) <= set(re.split(r"[ ./]", name))


def _widths(report: KernelReport, expected: Expectations) -> list[str]:
    found = []
    for operand, least in expected.widths.items():
        accesses = [access for access in report.accesses if operand in access.operand.split("|")]
        if not accesses:
            found.append(f"accesses: expected some of {operand}, found none")
        for kind in ("load", "store"):
            narrow = [a.width for a in accesses if a.kind == kind and a.width != TMA and a.width < least]
            if narrow:
                widths = ", ".join(f"{narrow.count(width)} × {width}" for width in sorted(set(narrow)))
                found.append(f"narrow {kind}s of {operand}: expected {least} bytes, got {widths}")
    # An address that dataflow lost could be a narrow access of any operand.
    lost = sum(not access.operand for access in report.accesses)
    if lost and expected.widths:
        found.append(f"accesses: {lost} of global memory belong to no argument")
    return found
