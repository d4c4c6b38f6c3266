"""y and every gradient of the kernels against float64, within the error budget of tests/budget.py."""

import pairwise
import pytest
import torch
from harness import DEVICE, DTYPES, INTERPRETED, check, draw, use_multiprocessors, use_plan

from neat_kernels.kernels import launch
from neat_kernels.vocabulary import ACTIVATIONS, HALF_DTYPES, ORIENTATIONS

# (tokens, out_features, in_features). The interpreter's tiles are 32 wide, and 32 or 64 long along a reduction.
SHAPES = [
    (1, 1, 1),
    (1, 37, 29),
    (64, 64, 64),
    (67, 97, 131),
    (3, 29, 419),
    (3, 419, 29),
    (419, 41, 35),
]
ROWS = pairwise.rows(
    {
        "shape": SHAPES,
        "r": [1, 4, 8, 16, 33, 64, 128],
        "dtype": DTYPES,
        "adapter_dtype": [None, torch.float32],
        "compute_dtype": [None, torch.float32],
        "orientation": ORIENTATIONS,
        "depth": [0, 1, 2],
        "activation": ACTIVATIONS,
        "bias": ["none", "frozen", "trained"],
        "scaling": [1.0, -0.37],
        "multiprocessors": [0, 1000],
        "plan": ["fused", "cublas"],
        "low_rank_first": [False, True],
    }
)


@pytest.mark.parametrize("row", ROWS, ids=pairwise.name)
def test_every_pair_of_options(row, monkeypatch):
    row = dict(row)
    shape, bias, plan = row.pop("shape"), row.pop("bias"), row.pop("plan")
    use_multiprocessors(monkeypatch, row.pop("multiprocessors"))
    use_plan(monkeypatch, plan)
    first = row.pop("low_rank_first")
    monkeypatch.setattr(launch, "low_rank_first", lambda device: first)
    if row["dtype"] not in HALF_DTYPES:
        # A wider branch is defined over half inputs alone.
        row.pop("compute_dtype")
    case = draw(*shape, row.pop("r"), bias=bias != "none", **row)
    check(case, frozen=("bias",) if bias == "frozen" else (), plan=plan)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("low_rank_first", [False, True])
def test_several_ragged_tiles_in_every_dimension(low_rank_first, depth, orientation, monkeypatch):
    monkeypatch.setattr(launch, "low_rank_first", lambda device: low_rank_first)
    check(draw(37, 45, 70, 5, orientation=orientation, depth=depth, activation="sigmoid", scaling=0.37))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_rank_wider_than_one_slice(orientation):
    check(draw(5, 13, 11, 120, orientation=orientation, depth=1))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("plan", ["fused", "cublas"])
def test_no_tokens(plan, depth, orientation, monkeypatch):
    use_plan(monkeypatch, plan)
    check(draw(0, 37, 41, 5, orientation=orientation, depth=depth), plan=plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "orientation", "depth"),
    [((5, 811, 13), "out", 1), ((5, 811, 13), "in", 0), ((811, 5, 13), "out", 0)],
    ids=str,
)
def test_reductions_in_uneven_pieces(shape, orientation, depth, dtype, monkeypatch):
    # 13 tiles of 64 make pieces of 5, 5 and 3 tiles, the last one ragged.
    use_multiprocessors(monkeypatch, 1000)
    if INTERPRETED:
        assert launch.split(1, 811, 64, DEVICE) == (3, 5)
    check(draw(*shape, 5, dtype=dtype, orientation=orientation, depth=depth))
