"""Launch configurations as data: the tile and the launch of every stage, by family of devices and rank."""

from typing import NamedTuple


class Config(NamedTuple):
    """Tile and launch of one kernel; zero stands for a block that the stage does not have.

    A persistent kernel has one program a multiprocessor, which takes one tile after another.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False


# Columns of C up to which the GEMM on descriptors takes narrow tiles: wide ones leave most of a device idle there.
NARROW = 768

# {stage: {arch: {largest block_r: configuration}}}, chosen from offline compilation (registers, shared memory); on
# sm_90, up to r = 16 and here and there beyond, from timings on an H200 (docs/performance-log.md). A stage has a table
# of its own for operands of 4 bytes, and for a dropout mask: ten rounds of Philox for every element take registers.
CONFIGS: dict[str, dict[str, dict[int, Config]]] = {
    # x·Wᵀ and dy·W with the low-rank product: tile [block_m, block_n].
    "gemm": {
        "sm_80": {32: Config(128, 128, 32, 8, 4), 128: Config(128, 128, 32, 8, 3)},
        "default": {32: Config(128, 128, 32, 8, 3), 128: Config(128, 128, 32, 8, 2)},
        "sm_90": {128: Config(128, 128, 64, 8, 3)},
        "sm_100": {128: Config(128, 128, 64, 8, 3)},
        "gfx942": {128: Config(128, 128, 32, 8, 2)},
    },
    "gemm dropout": {
        "sm_80": {32: Config(64, 64, 32, 4, 3), 128: Config(128, 64, 32, 8, 3)},
        "default": {32: Config(128, 64, 32, 8, 3), 128: Config(128, 64, 32, 8, 2)},
        "sm_90": {128: Config(128, 64, 64, 8, 3)},
        "sm_100": {128: Config(128, 64, 64, 8, 3)},
        "gfx942": {128: Config(128, 64, 64, 8, 2)},
    },
    # The same with an fp32 branch over half operands, masked or not.
    "gemm fp32": {
        "default": {32: Config(128, 64, 32, 8, 3), 128: Config(64, 64, 32, 8, 2)},
        "gfx942": {32: Config(128, 64, 64, 8, 2), 128: Config(64, 64, 64, 8, 2)},
    },
    # The same on tensor descriptors.
    "gemm descriptor": {
        "sm_90": {
            16: Config(128, 256, 64, 8, 3),
            64: Config(128, 128, 64, 4, 4),
            128: Config(128, 128, 64, 8, 3),
        },
        "default": {128: Config(128, 128, 64, 8, 3)},
    },
    # The same where N is at most NARROW: half a tile more for every multiprocessor is half of the time.
    "gemm descriptor narrow": {
        "default": {128: Config(128, 128, 64, 8, 3)},
        "sm_90": {128: Config(128, 128, 64, 4, 4)},
    },
    # Wider masked tiles spill 9 KB a thread on triton 3.9, and none on 3.7.
    "gemm descriptor dropout": {
        "default": {128: Config(128, 64, 64, 8, 4)},
        "sm_100": {32: Config(128, 64, 64, 8, 4), 64: Config(128, 64, 64, 8, 3), 128: Config(128, 64, 64, 8, 4)},
    },
    "gemm descriptor fp32": {
        "default": {128: Config(128, 128, 64, 8, 3)},
        "sm_90": {32: Config(128, 64, 64, 8, 4), 128: Config(128, 128, 64, 8, 3)},
    },
    # [block_m rows] of a tall matrix times a narrow one, block_k of the reduction at a time, contiguous along it.
    "rows": {
        "default": {32: Config(32, 0, 128, 4, 3), 128: Config(32, 0, 64, 4, 2)},
        "sm_90": {32: Config(32, 0, 128, 4, 4), 128: Config(32, 0, 64, 4, 2)},
        "gfx942": {32: Config(32, 0, 128, 4, 2), 128: Config(32, 0, 64, 4, 1)},
    },
    "rows fp32": {
        "default": {32: Config(32, 0, 64, 4, 3), 128: Config(32, 0, 32, 4, 2)},
        "sm_90": {
            16: Config(128, 0, 64, 8, 4),
            32: Config(64, 0, 64, 4, 4),
            64: Config(32, 0, 32, 4, 2),
            128: Config(64, 0, 32, 8, 2),
        },
        "gfx942": {32: Config(32, 0, 64, 4, 2), 128: Config(32, 0, 64, 4, 1)},
    },
    # The same for S, with tiles of block_n columns of a product of S that follows.
    "down": {
        "default": {32: Config(32, 128, 128, 4, 3), 128: Config(32, 64, 64, 4, 2)},
        "sm_90": {
            16: Config(32, 512, 128, 8, 4),
            32: Config(32, 256, 128, 4, 4),
            64: Config(32, 64, 128, 4, 4),
            128: Config(32, 64, 64, 4, 2),
        },
        "gfx942": {32: Config(32, 128, 64, 4, 2), 128: Config(64, 64, 64, 8, 1)},
    },
    "down dropout": {
        "default": {32: Config(32, 128, 64, 4, 3), 128: Config(32, 64, 64, 4, 2)},
        "sm_80": {32: Config(32, 128, 64, 4, 3), 128: Config(32, 64, 32, 4, 2)},
        "sm_100": {16: Config(32, 128, 64, 4, 3), 32: Config(32, 128, 64, 4, 2), 128: Config(32, 64, 64, 4, 2)},
        "gfx942": {16: Config(32, 128, 64, 4, 2), 32: Config(64, 128, 32, 4, 2), 128: Config(64, 64, 32, 4, 1)},
    },
    "down dropout fp32": {
        "default": {32: Config(32, 64, 64, 4, 3), 64: Config(32, 32, 32, 4, 2), 128: Config(32, 32, 32, 4, 1)},
        "sm_90": {32: Config(32, 64, 64, 4, 3), 64: Config(32, 32, 64, 4, 1), 128: Config(32, 32, 32, 4, 1)},
        "sm_100": {32: Config(32, 64, 64, 4, 3), 64: Config(32, 32, 64, 4, 1), 128: Config(32, 32, 32, 4, 1)},
        "gfx942": {32: Config(32, 64, 64, 4, 2), 128: Config(32, 32, 64, 4, 1)},
    },
    "down fp32": {
        "default": {32: Config(32, 64, 64, 4, 3), 128: Config(32, 32, 32, 4, 2)},
        "sm_120": {32: Config(32, 64, 64, 4, 2), 128: Config(32, 32, 32, 4, 2)},
        "gfx942": {32: Config(32, 64, 64, 4, 2), 128: Config(32, 32, 64, 4, 1)},
    },
    # The same, contiguous along the rows: the reduction runs down the columns of the stored matrix.
    "columns": {
        "default": {32: Config(64, 0, 64, 4, 3), 128: Config(64, 0, 64, 4, 2)},
        "sm_90": {64: Config(64, 0, 64, 4, 4), 128: Config(64, 0, 64, 4, 2)},
        "sm_86": {32: Config(64, 0, 64, 4, 3), 128: Config(64, 0, 64, 8, 2)},
        "sm_120": {32: Config(64, 0, 64, 4, 3), 128: Config(64, 0, 64, 8, 2)},
        "gfx942": {32: Config(64, 0, 64, 4, 2), 128: Config(64, 0, 32, 4, 1)},
    },
    "columns fp32": {
        "default": {32: Config(64, 0, 32, 4, 3), 128: Config(32, 0, 32, 4, 2)},
        "sm_90": {
            16: Config(128, 0, 64, 8, 3),
            32: Config(64, 0, 64, 4, 3),
            64: Config(32, 0, 32, 4, 1),
            128: Config(32, 0, 32, 4, 3),
        },
        "sm_100": {32: Config(64, 0, 32, 8, 3), 128: Config(32, 0, 32, 4, 2)},
        "sm_120": {
            16: Config(64, 0, 32, 8, 3),
            32: Config(64, 0, 32, 8, 2),
            64: Config(32, 0, 32, 4, 1),
            128: Config(32, 0, 32, 4, 2),
        },
        "gfx942": {32: Config(64, 0, 32, 4, 2), 128: Config(64, 0, 32, 4, 1)},
    },
    # Tiles of 32 rows take mma.sync: wgmma would be serialised by the mask (C7515).
    "columns dropout": {
        "default": {32: Config(32, 0, 64, 4, 3), 128: Config(32, 0, 64, 4, 2)},
        "gfx942": {32: Config(32, 0, 64, 4, 2), 128: Config(32, 0, 64, 4, 1)},
    },
    "columns dropout fp32": {
        "default": {32: Config(32, 0, 32, 4, 3), 64: Config(32, 0, 32, 4, 1), 128: Config(32, 0, 32, 4, 2)},
        "gfx942": {32: Config(64, 0, 32, 4, 2), 128: Config(64, 0, 32, 4, 1)},
    },
    # dS and dU from tiles of block_n columns of dy, block_m rows at a time.
    "up_backward": {
        "sm_80": {32: Config(64, 256, 0, 8, 3), 64: Config(64, 128, 0, 8, 3), 128: Config(64, 64, 0, 8, 3)},
        "default": {
            16: Config(32, 256, 0, 4, 3),
            32: Config(32, 256, 0, 4, 2),
            64: Config(32, 128, 0, 4, 2),
            128: Config(64, 64, 0, 8, 2),
        },
        "sm_90": {32: Config(64, 256, 0, 4, 3), 64: Config(64, 256, 0, 8, 3), 128: Config(64, 128, 0, 8, 3)},
        "sm_100": {
            16: Config(32, 512, 0, 8, 5),
            32: Config(64, 256, 0, 4, 3),
            64: Config(64, 256, 0, 8, 3),
            128: Config(64, 128, 0, 8, 3),
        },
        "sm_120": {32: Config(32, 256, 0, 4, 2), 64: Config(64, 128, 0, 8, 2), 128: Config(64, 64, 0, 8, 2)},
        "gfx942": {
            16: Config(64, 256, 0, 4, 1),
            32: Config(64, 256, 0, 8, 1),
            64: Config(64, 128, 0, 8, 1),
            128: Config(64, 64, 0, 8, 1),
        },
    },
    "up_backward fp32": {
        "default": {16: Config(32, 128, 0, 8, 2), 64: Config(32, 32, 0, 4, 2), 128: Config(32, 32, 0, 4, 1)},
        "sm_90": {16: Config(32, 128, 0, 8, 2), 64: Config(32, 64, 0, 8, 2), 128: Config(32, 32, 0, 4, 1)},
        "sm_100": {16: Config(32, 128, 0, 8, 2), 64: Config(32, 32, 0, 4, 2), 128: Config(32, 64, 0, 8, 1)},
        "sm_120": {
            16: Config(32, 64, 0, 4, 2),
            32: Config(32, 64, 0, 8, 1),
            64: Config(32, 32, 0, 4, 3),
            128: Config(32, 32, 0, 4, 1),
        },
        "gfx942": {16: Config(32, 128, 0, 8, 1), 128: Config(64, 32, 0, 4, 1)},
    },
    # dS from its partial sums, with tiles of block_n columns of a product of dS that follows.
    "finish": {
        "default": {32: Config(32, 128, 0, 4, 1), 128: Config(32, 64, 0, 4, 1)},
        "sm_90": {16: Config(16, 512, 0, 4, 1), 32: Config(16, 128, 0, 4, 1), 128: Config(32, 64, 0, 4, 1)},
        "sm_120": {128: Config(32, 64, 0, 4, 1)},
        "gfx942": {32: Config(32, 128, 0, 4, 1), 128: Config(16, 64, 0, 4, 1)},
    },
    "finish fp32": {
        "default": {32: Config(16, 64, 0, 4, 1), 128: Config(32, 32, 0, 4, 1)},
        "sm_90": {
            16: Config(16, 64, 0, 4, 1),
            32: Config(16, 128, 0, 4, 1),
            64: Config(32, 64, 0, 4, 1),
            128: Config(16, 64, 0, 4, 1),
        },
        "sm_100": {16: Config(16, 64, 0, 4, 1), 32: Config(32, 64, 0, 4, 1), 128: Config(16, 64, 0, 4, 1)},
        "sm_120": {64: Config(16, 64, 0, 4, 1), 128: Config(32, 32, 0, 4, 1)},
    },
    # Both products of one read of W: tile [block_m, block_k] of V, by the wider of tokens and rank.
    "stacked": {
        "default": {128: Config(64, 0, 64, 4, 3)},
        "sm_100": {32: Config(64, 0, 64, 4, 3), 64: Config(64, 0, 64, 4, 1), 128: Config(64, 0, 64, 4, 3)},
        "sm_120": {16: Config(64, 0, 64, 4, 3), 64: Config(64, 0, 64, 4, 2), 128: Config(64, 0, 64, 4, 3)},
    },
    "stacked fp32": {
        "default": {32: Config(64, 0, 64, 4, 3), 64: Config(64, 0, 32, 4, 3), 128: Config(64, 0, 32, 4, 2)},
        "sm_100": {128: Config(64, 0, 32, 8, 2)},
        "sm_120": {32: Config(64, 0, 64, 4, 3), 64: Config(32, 0, 32, 4, 2), 128: Config(64, 0, 32, 8, 2)},
        "gfx942": {32: Config(64, 0, 64, 4, 3), 128: Config(64, 0, 32, 4, 3)},
    },
    "crossed": {
        "default": {128: Config(64, 0, 256, 8, 3)},
        "sm_90": {16: Config(64, 0, 256, 4, 3), 128: Config(64, 0, 256, 8, 3)},
        "sm_100": {16: Config(64, 0, 256, 8, 3), 32: Config(64, 0, 256, 8, 1), 128: Config(64, 0, 256, 8, 3)},
        "gfx942": {16: Config(64, 0, 256, 8, 2), 128: Config(64, 0, 256, 8, 1)},
    },
    "crossed fp32": {
        "default": {32: Config(32, 0, 256, 8, 2), 128: Config(16, 0, 128, 8, 1)},
        "sm_80": {32: Config(32, 0, 256, 8, 2), 128: Config(16, 0, 128, 8, 2)},
        "sm_90": {16: Config(64, 0, 256, 8, 3), 32: Config(32, 0, 256, 8, 2), 128: Config(32, 0, 128, 8, 2)},
        "sm_100": {32: Config(32, 0, 256, 8, 2), 128: Config(32, 0, 128, 8, 2)},
        "gfx942": {16: Config(32, 0, 256, 8, 2), 32: Config(32, 0, 128, 4, 1), 128: Config(64, 0, 64, 8, 1)},
    },
    # S of a small batch in shares, masked or not.
    "small_down": {
        "default": {128: Config(32, 0, 64, 4, 2)},
        "gfx942": {16: Config(32, 0, 64, 4, 2), 128: Config(32, 0, 64, 4, 1)},
    },
    "small_down fp32": {
        "default": {128: Config(16, 0, 64, 4, 2)},
        "gfx942": {128: Config(32, 0, 64, 4, 1)},
    },
    # y and dx of a small batch from their partial sums: tile [block_m, block_n].
    "small_finish": {
        "default": {128: Config(16, 32, 0, 4, 1)},
    },
    # W + s·U·Dᵀ: tile [block_m, block_n] of W. Two to eight blocks a multiprocessor keep reads of W under way.
    "merge": {
        "default": {32: Config(64, 64, 0, 4, 1), 128: Config(32, 64, 0, 4, 1)},
        "sm_90": {128: Config(64, 64, 0, 4, 1)},
        "sm_100": {32: Config(64, 64, 0, 4, 1), 64: Config(64, 32, 0, 4, 1), 128: Config(64, 64, 0, 4, 1)},
        "sm_120": {32: Config(64, 64, 0, 4, 1), 128: Config(64, 32, 0, 4, 1)},
        "gfx942": {128: Config(64, 64, 0, 4, 1)},
    },
    # g and its backward on [block_m, r] tiles.
    "chain": {
        "default": {16: Config(64, 0, 0, 4, 1), 32: Config(32, 0, 0, 4, 1), 128: Config(16, 0, 0, 8, 1)},
        "sm_100": {32: Config(32, 0, 0, 4, 1), 128: Config(16, 0, 0, 8, 1)},
    },
}
# On 9.0 the mask takes the registers of a wider tile.
CONFIGS["finish dropout"] = CONFIGS["finish"] | {
    "sm_90": {16: Config(16, 256, 0, 4, 1), 32: Config(16, 128, 0, 4, 1), 128: Config(32, 64, 0, 4, 1)},
}
