"""The dropout mask: the published generator, a pure function of (seed, row, column), unbiased."""

import pytest
import torch

import neat_kernels as nk
from neat_kernels.torch_backend.dropout import draw_seed, keep_mask, philox, threshold


def test_known_answer_of_philox():
    # The first known-answer vector of Philox4x32-10 in the Random123 distribution: all words of counter and key zero.
    assert philox(torch.tensor([0]), torch.tensor([0])).item() == 0x6627E8D5


def plain_philox(seed: int, counter: int) -> int:
    """Philox4x32-10 in Python integers, written from the paper."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF])
def test_philox_against_python_integers(seed):
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62]
    words = philox(torch.tensor([seed]), torch.tensor(counters))
    assert words.tolist() == [plain_philox(seed, counter) for counter in counters]


def test_mask_depends_on_row_and_column_alone():
    seed = torch.tensor([42])
    whole = keep_mask(seed, slice(0, 700), 311, 0.3)
    assert torch.equal(keep_mask(seed, slice(513, 700), 311, 0.3), whole[513:])
    assert whole[2, 5].item() == (plain_philox(42, 2 * 311 + 5) >= threshold(0.3))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_kept_share(dropout):
    kept = keep_mask(torch.tensor([7]), slice(0, 1000), 1000, dropout).double().mean().item()
    # Five standard deviations of a mean of a million draws.
    assert abs(kept - (1 - dropout)) < 5 * (dropout * (1 - dropout) / 1e6) ** 0.5


def test_dropout_acts_in_training_only_and_follows_the_torch_seed():
    layer = nk.FusedNeatLinear(64, 32, r=4, dropout=0.5)
    torch.nn.init.normal_(layer.neat_B)
    x = torch.randn(8, 64)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    assert torch.equal(
        layer.eval()(x), nk.functional.neat_linear(x, layer.weight, layer.neat_A, layer.neat_B, layer.bias)
    )


def test_dropout_leaves_the_base_layer_alone():
    layer = nk.FusedNeatLinear(64, 32, r=4, dropout=0.9)
    x = torch.randn(8, 64)
    assert torch.equal(layer(x), layer.eval()(x))


def test_seed_is_drawn_on_the_device_of_x():
    seed = draw_seed(torch.empty(1))
    assert seed.shape == (1,)
    assert seed.dtype == torch.int64
    assert seed.device.type == "cpu"


def test_recomputation_in_checkpointing_sees_the_same_mask():
    layer = nk.FusedNeatLinear(16, 16, r=4, dropout=0.5, dtype=torch.float64)
    torch.nn.init.normal_(layer.neat_B)
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, layer.neat_A, layer.neat_B]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
