"""The launch configuration of a stage, and what else a launch needs to know of its device.

No configuration depends on the number of tokens, so that a batch of another size never compiles anything; but for the
tile of a small batch, which holds 16, 32, 64 or 128 of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl

from neat_kernels.kernels import bound, measured
from neat_kernels.kernels.configs import CONFIGS, Config


class Target(NamedTuple):
    """What configurations are chosen by: a family of devices and the number of its multiprocessors.

    `name` is what the driver calls the device, by which measured configurations are found; "" finds none.
    """

    arch: str
    multiprocessors: int
    name: str = ""


# Where a launch is to run: a device, or the target of one that is not here.
Place = torch.device | Target


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Families by compute capability. 8.6, 8.9 and 12.0 have 99 KiB of shared memory a block, the least of all: an unknown
# device takes what 8.6 does.
_ARCHS = {
    80: "sm_80",
    87: "sm_80",
    86: "sm_86",
    89: "sm_86",
    90: "sm_90",
    100: "sm_100",
    103: "sm_100",
    120: "sm_120",
    121: "sm_120",
}
_FALLBACK_ARCH = "sm_86"

# Small, so that a test of few elements has several tiles; one process interprets them one after the other.
_INTERPRETED = Config(32, 32, 64, 4, 1)


def family(capability: int) -> str:
    """The family of a CUDA device by its compute capability, 90 for 9.0."""
    return _ARCHS.get(capability, _FALLBACK_ARCH)


@functools.cache
def target(device: Place) -> Target:
    """The family and size of a device; a CPU is Triton's interpreter."""
    if isinstance(device, Target):
        return device
    if device.type == "cpu":
        return Target("interpreter", 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return Target(arch, properties.multi_processor_count, properties.name)
    arch = family(10 * properties.major + properties.minor)
    return Target(arch, properties.multi_processor_count, properties.name)


def tables() -> tuple[str, ...]:
    """The names of all tables: of a stage, and of one for each kind of operands that has its own."""
    return tuple(CONFIGS)


def table_name(stage: str, itemsize: int) -> str:
    """The name of the table that a stage takes for operands of `itemsize` bytes."""
    return f"{stage} fp32" if itemsize == 4 and f"{stage} fp32" in CONFIGS else stage


def config(stage: str, device: Place, r: int, itemsize: int) -> Config:
    """The configuration of a stage whose factors have rank r and are multiplied as operands of `itemsize` bytes.

    What was measured on this device comes before the table.
    """
    arch, _, name = target(device)
    table = table_name(stage, itemsize)
    by_key = measured_configs()
    if by_key:
        found = by_key.get(measured.Key(arch, name, table, block_r(r)))
        if found is not None:
            return found
    if arch == "interpreter":
        return _INTERPRETED
    by_arch = CONFIGS[table]
    by_rank = by_arch.get(arch, by_arch["default"])
    return next(chosen for largest, chosen in by_rank.items() if block_r(r) <= largest)


@functools.cache
def measured_configs() -> dict[measured.Key, Config]:
    """The measured configurations, read once; see `forget_measured`.

    Raises:
        ValueError: there is a file, and it does not hold what it must.
    """
    return {measured.key_of(entry): Config(**entry["config"]) for entry in measured_entries(measured.PATH)}


def measured_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of measured configurations, none where there is no file.

    Raises:
        ValueError: the file does not hold what it must.
    """
    entries = measured.read(path, CONFIGS, {*_ARCHS.values(), "gfx942"})
    for entry in entries:
        some = next(iter(CONFIGS[entry["stage"]]["default"].values()))
        unlike = [name for name in ("block_m", "block_n", "block_k")
                  if (entry["config"][name] == 0) != (getattr(some, name) == 0)]  # fmt: skip
        if unlike:
            raise ValueError(f"{path}: expected the blocks of {entry['stage']!r}, 0 for those it lacks, got {entry!r}")
        if entry["config"]["persistent"] and not entry["stage"].startswith("gemm descriptor"):
            raise ValueError(f"{path}: expected persistent with stages on descriptors only, got {entry!r}")
    return entries


def measured_on(name: str) -> str | None:
    """The day on which launch configurations of the device of this name were last measured, or None."""
    return measured.date_for(name, measured_entries(measured.PATH))


def use_measured(configs: Mapping[measured.Key, Config]) -> None:
    """Take these for measured, beside what the file says, until `forget_measured`."""
    measured_configs().update(configs)
    bound.forget()


def forget_measured() -> None:
    """Have the file read again."""
    measured_configs.cache_clear()
    bound.forget()


@contextlib.contextmanager
def trying(key: measured.Key, tried: Config) -> Iterator[None]:
    """Inside, `tried` is what was measured for `key`: for a tuner, not for threads."""
    before = measured_configs().get(key)
    use_measured({key: tried})
    try:
        yield
    finally:
        del measured_configs()[key]
        use_measured({} if before is None else {key: before})


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`; triton.cdiv, which kernels may call too, takes microseconds on the host."""
    return -(-size // block)


def block_r(r: int) -> int:
    """Columns of a tile that holds r of them: tl.dot wants a power of two of at least 16."""
    return max(16, 1 << (r - 1).bit_length())


def split(blocks: int, length: int, block: int, device: Place, fill: float = 2.0) -> tuple[int, int]:
    """(pieces, tiles in a piece) of a walk along `length`, so that `blocks` of them fill the device `fill` times.

    A piece keeps at least four tiles: shorter ones of a reduction would write more partial sums than they read.
    """
    tiles = cdiv(length, block)
    wanted = round(fill * target(device).multiprocessors / max(1, blocks))
    steps = max(1, cdiv(tiles, max(1, min(wanted, tiles // 4))))
    return max(1, cdiv(tiles, steps)), steps


class Walk(NamedTuple):
    """How a product with a stored matrix reduces along its rows: programs, and pieces of the reduction in tiles."""

    config: Config
    blocks: int
    pieces: int
    steps: int


def walk(rows: int, length: int, along_rows: bool, r: int, itemsize: int, device: Place) -> Walk:
    """The walk for a matrix [rows, length] times a narrow one, by the dimension that is contiguous in memory.

    Along contiguous rows one piece is enough wherever there is a block for every multiprocessor, which saves a launch.
    """
    stage = "rows" if along_rows else "columns"
    chosen = config(stage, device, r, itemsize)
    blocks = cdiv(rows, chosen.block_m)
    return Walk(chosen, blocks, *split(blocks, length, chosen.block_k, device, fill=1.0 if along_rows else 2.0))


class SharedRead(NamedTuple):
    """How one read of W [rows, length] makes both products of a small batch: partial sums of each, and the walk.

    Fields:
        config: tile [block_m, block_k].
        blocks: programs side by side; crossed, along the length, else along the rows.
        pieces: of the other dimension, and partial sums of the narrow product.
        steps: tiles of a piece.
        owned: elements of the dimension that the blocks divide, which is the narrow product's.
        of_tokens: partial sums of the token product.
    """

    config: Config
    blocks: int
    pieces: int
    steps: int
    owned: int
    of_tokens: int


def shared_read(rows: int, length: int, tokens: int, r: int, itemsize: int, crossed: bool, device: Place) -> SharedRead:
    """The shared read for `tokens` and a rank, the narrow product's operands having `itemsize` bytes."""
    chosen = config("crossed" if crossed else "stacked", device, max(block_r(tokens), r), itemsize)
    if crossed:
        blocks = cdiv(length, chosen.block_k)
        pieces, steps = split(blocks, rows, chosen.block_m, device, up_backward_fill(device))
        return SharedRead(chosen, blocks, pieces, steps, length, blocks)
    blocks = cdiv(rows, chosen.block_m)
    pieces, steps = split(blocks, length, chosen.block_k, device)
    return SharedRead(chosen, blocks, pieces, steps, rows, pieces)


def up_backward_fill(device: Place) -> float:
    """How often the up stage backward fills a device: more programs write more partial sums.

    From sm_90 a program has two tiles of 32 KiB or more under way, and one for each multiprocessor is the fastest: on
    an H200 at M=8192, N=4096, r=16 half of them takes 30.3 µs and all of them 21.9 (docs/performance-log.md).
    """
    return 1.0 if target(device).arch in ("sm_90", "sm_100") else 2.0


def branch_precision(device: Place) -> str:
    """How fp32 operands of the branch and the features are multiplied: to fp32 accuracy, on tensor cores if any."""
    return "tf32x3" if target(device).arch.startswith("sm_") else "ieee"


def takes_pieces(device: Place) -> bool:
    """Whether an fp32 operand of the features is taken apart over a bf16 W (kernels/skinny.py).

    On 9.0 that was measured; elsewhere the pieces of a tile spill at some ranks (python -m benchmarks.gate).
    """
    return target(device).arch in ("sm_90", "interpreter")


def has_descriptors(device: Place) -> bool:
    """Whether the GEMM copies its tiles by tensor descriptor (TMA).

    12.0 could too; triton 3.6 then puts 8 bytes of every thread into local memory (python -m benchmarks.gate).
    """
    return target(device).arch in ("sm_90", "sm_100", "interpreter")


def low_rank_first(device: Place) -> bool:
    """Whether the accumulator of the GEMM starts from the low-rank product.

    From sm_90 it must: ptxas serialises the wgmma of an 8-warp loop that starts from zeros (C7515, triton 3.6). Before,
    the product comes last, where its operands do not occupy registers during the loop.
    """
    return target(device).arch in ("sm_90", "sm_100", "interpreter")


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Inside, launches go to `device` and its current stream, whichever device is current outside."""
    if device.type == "cpu":
        from neat_kernels.kernels.interpreter import faithful

        return faithful()
    return _NOWHERE_ELSE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


_NOWHERE_ELSE = contextlib.nullcontext()
