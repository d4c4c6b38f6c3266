"""One layer: wrap a frozen nn.Linear, run it forward and backward, look inside, merge and unmerge."""

import torch
from torch import nn

import neat_kernels as nk


def main() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    x = torch.randn(4, 10, 64)
    before = linear(x).detach()

    layer = nk.FusedNeatLinear.from_linear(linear, r=8, activation="sin2pi")
    assert layer.weight is linear.weight, "the frozen weight is shared, not copied"
    print(layer.explain(x))

    # neat_B is zero at first, so that the layer starts as the frozen one. Draw it here, as if it had been trained.
    assert torch.equal(layer(x), before)
    nn.init.normal_(layer.neat_B, std=0.1)

    y = layer(x)
    y.square().mean().backward()
    for name, p in layer.named_parameters():
        gradient = "none, frozen" if p.grad is None else f"norm {p.grad.norm():.4f}"
        print(f"{name:8} {tuple(p.shape)!s:10} gradient: {gradient}")
    assert layer.weight.grad is None
    assert layer.neat_A.grad is not None

    # The forward never forms the update; delta_weight() does, to check the forward against it.
    update = layer.delta_weight()
    expected = nn.functional.linear(x, linear.weight + update, linear.bias)
    error = (y - expected).norm() / expected.norm()
    print(f"rank of the update: {torch.linalg.matrix_rank(update)} (r = {layer.r}), relative error: {error:.1e}")
    assert error < 1e-5
    assert torch.linalg.matrix_rank(update) <= layer.r

    original = layer.weight.detach().clone()
    layer.eval()
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    assert torch.equal(layer.weight, original), "unmerge() puts back the very same weight"
    print(f"merged and unmerged outputs differ by {(merged - y).norm() / y.norm():.1e}")


if __name__ == "__main__":
    main()
