"""The vocabulary of the model: a layer, and what one kernel of it reads, writes and computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from neat_kernels.plan import MAX_R, most_of_a_small_batch
from neat_kernels.vocabulary import ORIENTATIONS, check_choice, check_int

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
HALF = ("bf16", "fp16")


@dataclass(frozen=True)
class Layer:
    """One adapted layer and the tokens that pass through it.

    Args:
        tokens: M, rows of x.
        in_features: K.
        out_features: N.
        r: rank.
        dtype: of x, W, bias and the branch: bf16, fp16 or fp32.
        adapter_dtype: of the adapter's parameters, fp32 or `dtype`.
        orientation: the side of W that A acts on, "out" or "in".
        depth: pairs of encoder and decoder.
        bias: whether the frozen linear has one; it is never trained here.

    Raises:
        ValueError: a size, a dtype or an option is not as above.
    """

    tokens: int
    in_features: int
    out_features: int
    r: int = 16
    dtype: str = "bf16"
    adapter_dtype: str = "fp32"
    orientation: str = "out"
    depth: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "in_features", "out_features", "r"):
            check_int(name, getattr(self, name), 1)
        check_int("depth", self.depth, 0)
        if self.r > MAX_R:
            raise ValueError(f"r must be at most {MAX_R}, the most that the kernels take; got {self.r}")
        check_choice("dtype", self.dtype, tuple(ITEMSIZE))
        check_choice("adapter_dtype", self.adapter_dtype, ("fp32", self.dtype))
        check_choice("orientation", self.orientation, ORIENTATIONS)

    @property
    def shape(self) -> str:
        """Tokens, in_features and out_features, as the command line takes them."""
        return f"{self.tokens}x{self.in_features}x{self.out_features}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x, W, y."""
        return ITEMSIZE[self.dtype]

    @property
    def adapter_itemsize(self) -> int:
        """Bytes of an element of the adapter's parameters."""
        return ITEMSIZE[self.adapter_dtype]


def is_small_batch(layer: Layer) -> bool:
    """Whether one read of W each way is how the kernels train a layer on a GPU."""
    return layer.dtype in HALF and layer.tokens <= most_of_a_small_batch(layer.orientation, layer.r)


@dataclass(frozen=True)
class Work:
    """One launch.

    Args:
        kernel: as the code names it: "down._down_kernel", or "torch.mm" for an operation of torch's.
        reads: bytes by operand, each counted once: what several programs read comes from the cache.
        writes: bytes by operand, each counted once.
        flops: additions and multiplications as executed: r padded to the columns of a tile, and what several programs
            compute again counted again.
        unit: what multiplies: bf16, fp16, fp32, or tf32x3.
        efficiency: throughput as a fraction of the vendor's GEMM library's.
    """

    kernel: str
    reads: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    flops: int = 0
    unit: str = "fp32"
    efficiency: float = 1.0

    @property
    def bytes_read(self) -> int:
        """Bytes of all that it reads."""
        return sum(self.reads.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of all that it writes."""
        return sum(self.writes.values())


@dataclass(frozen=True)
class Step:
    """A way to run a layer: the launches of its forward and of its backward, in order."""

    name: str
    forward: tuple[Work, ...]
    backward: tuple[Work, ...] = ()

    @property
    def launches(self) -> tuple[Work, ...]:
        """All of them."""
        return self.forward + self.backward


def present(**sizes: int | None) -> dict[str, int]:
    """The operands that are there: None stands for one that is not."""
    return {name: size for name, size in sizes.items() if size is not None}


class Sum(NamedTuple):
    """Partial sums in fp32 and what they add up to, in bytes."""

    partial: int
    out: int


def reduce(*sums: Sum | None) -> tuple[Work, ...]:
    """The launches that take the sums, two at a time; None is none."""
    given = [one for one in sums if one is not None]
    return tuple(
        Work(
            "reduce._reduce_kernel",
            present(partial_ptr=first.partial, also_partial_ptr=None if also is None else also.partial),
            present(out_ptr=first.out, also_out_ptr=None if also is None else also.out),
            (first.partial + (0 if also is None else also.partial)) // ITEMSIZE["fp32"],
        )
        for first, also in zip_longest(given[::2], given[1::2])
    )
