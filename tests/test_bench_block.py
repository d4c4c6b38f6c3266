"""A transformer block as a problem: every contender is the block it claims to be, and a wrong one is refused."""

import pytest
import torch

pytest.importorskip("transformers")
from neat_kernels.bench import block
from neat_kernels.bench.block import ADAPTED, BlockSizes, contender, make_block_problem, parse_block
from neat_kernels.bench.measure import WrongResultError, check, sample_ms
from neat_kernels.bench.memory import saved_bytes
from neat_kernels.bench.worker import measure

# Nothing is square, q and k differ, and of a relu there are enough features not to be all zero.
SIZES = BlockSizes(hidden=48, intermediate=80, heads=4, key_value_heads=2)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(block.BLOCKS, "tiny", SIZES)


def problem_of(dtype):
    return make_block_problem("tiny", 33, 4, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ADAPTED)
def test_every_contender_is_the_block_it_claims_to_be(name, dtype):
    one = contender(name)
    if one.unavailable() is not None:
        pytest.skip(one.unavailable())
    problem = problem_of(dtype)
    layer = one.build(problem)
    names = [] if name == "frozen" else [f"d{which} {layer}" for layer in problem.adapted for which in "AB"]
    assert len(problem.adapted) == 7
    assert set(check(one, layer, problem)) == {"y", "dx", *names}
    assert set(check(one, layer, problem, "inference")) == {"y"}
    assert sample_ms([layer], problem, "inference") > 0
    assert saved_bytes(layer, problem) > problem.x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["an adapter left out", "another A", "a frozen A"])
def test_a_wrong_block_is_refused(fault, dtype):
    problem = problem_of(dtype)
    one = contender("neat")
    layer = one.build(problem)
    down = layer.forward.layer.mlp.down_proj
    with torch.no_grad():
        if fault == "an adapter left out":
            down.neat_B.zero_()
        elif fault == "another A":
            down.neat_A.add_(0.3 * down.neat_A.std() * torch.randn_like(down.neat_A))
        else:
            down.neat_A.requires_grad_(False)
    with pytest.raises(WrongResultError, match="down_proj"):
        check(one, layer, problem)


def test_the_answer_is_the_block_s_in_float64():
    """Of the frozen block the answer is the block itself, converted."""
    problem = problem_of(torch.float32)
    wide = block.Block(SIZES).double()
    wide.load_state_dict(problem.frozen_block.state_dict())
    expected = wide(problem.x.detach().double())
    torch.testing.assert_close(problem.answer("none")["y"], expected)
    assert (problem.answer("neat")["y"] - expected).norm() > 0.1 * expected.norm()
    assert (problem.answer("lora")["y"] - problem.answer("neat")["y"]).norm() > 0.1 * expected.norm()


def test_a_block_is_a_case_like_a_layer():
    case = {
        "mode": "training", "block": "tiny", "shape": "33x48x48x4", "dtype": "float32", "device": "cpu",
        "threads": 1, "seconds": 0.0, "memory": True, "contenders": ["frozen", "neat"],
    }  # fmt: skip
    found = measure(case)["contenders"]
    assert [entry["status"] for entry in found.values()] == ["timed", "timed"]
    assert found["neat"]["saved_bytes"] > found["frozen"]["saved_bytes"] > 0


def test_blocks_are_read():
    assert parse_block("llama-3-8b@2048x8")[1].r == 8
    assert str(parse_block("tiny@16")[1]) == "16x48x48x16"
    for text in ("tiny", "tiny@0", "vit-b@16", "tiny@16x"):
        with pytest.raises(ValueError, match="expected MODEL@TOKENS"):
            parse_block(text)
    with pytest.raises(ValueError, match="expected a contender that adapts a block"):
        contender("formula")
