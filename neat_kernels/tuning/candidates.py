"""What is tried for each stage, as data: one number of the present configuration moved at a time, and a few more."""

from __future__ import annotations

from typing import Any

from neat_kernels.kernels.configs import Config

# The numbers that a stage's configuration may differ in.
AXES = {
    "gemm": ("block_m", "block_n", "block_k", "num_warps", "num_stages"),
    "gemm descriptor": ("block_m", "block_n", "block_k", "num_warps", "num_stages", "persistent"),
    "rows": ("block_m", "block_k", "num_warps", "num_stages"),
    "down": ("block_m", "block_n", "block_k", "num_warps", "num_stages"),
    "columns": ("block_m", "block_k", "num_warps", "num_stages"),
    "up_backward": ("block_m", "block_n", "num_warps", "num_stages"),
    "finish": ("block_m", "block_n", "num_warps"),
    "stacked": ("block_m", "block_k", "num_warps", "num_stages"),
    "crossed": ("block_m", "block_k", "num_warps", "num_stages"),
    "small_down": ("block_m", "block_k", "num_warps", "num_stages"),
    "small_finish": ("block_m", "block_n", "num_warps"),
    "merge": ("block_m", "block_n", "num_warps"),
    "chain": ("block_m", "num_warps"),
}
# The values of each in order, all that a measured configuration may have; a candidate takes the one before or after the
# present one.
VALUES: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256, 512),
    "block_n": (16, 32, 64, 128, 256, 512),
    "block_k": (16, 32, 64, 128, 256, 512),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6, 7, 8),
    "persistent": (False, True),
}
# Shapes of tiles that are more than one step away from any in the table.
MORE = {
    "gemm": (Config(128, 256, 64, 8, 3), Config(64, 256, 32, 4, 4), Config(64, 128, 32, 4, 4)),
    "gemm descriptor": (
        Config(128, 256, 64, 8, 4, persistent=True),
        Config(128, 128, 64, 4, 4),
        Config(128, 128, 128, 8, 2, persistent=True),
    ),
}
# Values of a tile that a thread may hold: above, registers spill, and the compiler takes minutes over it.
_VALUES_A_THREAD = 128


def stage_of(table: str) -> str:
    """The stage of a launch table, of which there is one for each kind of operands."""
    return table.removesuffix(" fp32").removesuffix(" dropout").removesuffix(" narrow")


def candidates(table: str, present: Config) -> list[Config]:
    """The configurations to try beside the present one, without it."""
    stage = stage_of(table)
    tried = []
    for axis in AXES[stage]:
        values, value = VALUES[axis], getattr(present, axis)
        near = [one for one in (values.index(value) - 1, values.index(value) + 1) if 0 <= one < len(values)]
        tried += [present._replace(**{axis: values[one]}) for one in near]
    tried += MORE.get(stage, ())
    return [one for one in dict.fromkeys(tried) if one != present and _fits(one)]


def _fits(config: Config) -> bool:
    tile = config.block_m * max(config.block_n, config.block_k)
    return tile <= _VALUES_A_THREAD * 32 * config.num_warps
