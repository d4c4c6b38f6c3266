"""LoRA through the same operator, and the LoRA adapter that a Neat layer is."""

import torch
from torch import nn

import neat_kernels as nk

R, ALPHA = 8, 16


def lora_layer_matches_autograd() -> None:
    linear = nn.Linear(128, 192).requires_grad_(False)
    lora_A = nn.Parameter(torch.randn(R, 128) / 128**0.5)
    lora_B = nn.Parameter(0.1 * torch.randn(192, R))
    x = torch.randn(4, 32, 128, requires_grad=True)
    dy = torch.randn(4, 32, 192)

    plain = linear(x) + (ALPHA / R) * (x @ lora_A.t() @ lora_B.t())
    expected = torch.autograd.grad(plain, (x, lora_A, lora_B), dy)

    fused = nk.functional.low_rank_linear(
        x, linear.weight, down=lora_A.t(), up=lora_B, bias=linear.bias, scaling=ALPHA / R
    )
    got = torch.autograd.grad(fused, (x, lora_A, lora_B), dy)

    for name, a, b in zip(("y", "dx", "dlora_A", "dlora_B"), (fused, *got), (plain, *expected), strict=True):
        error = (a - b).norm() / b.norm()
        print(f"LoRA through low_rank_linear: {name:8} relative difference {error:.1e}")
        assert error < 1e-5


def neat_is_lora() -> None:
    linear = nn.Linear(128, 192)
    layer = nk.FusedNeatLinear.from_linear(linear, r=R, depth=1, activation="sin2pi", scaling=0.5).eval()
    nn.init.normal_(layer.neat_B, std=0.1)
    lora_A, lora_B = layer.lora_factors()
    print(f"Neat as LoRA: lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}")

    x = torch.randn(16, 128)
    with torch.no_grad():
        as_neat = layer(x)
        as_lora = linear(x) + x @ lora_A.t() @ lora_B.t()
        as_merged = nn.functional.linear(x, linear.weight + layer.delta_weight(), linear.bias)
    for name, y in (("two factors", as_lora), ("one merged weight", as_merged)):
        error = (y - as_neat).norm() / as_neat.norm()
        print(f"Neat as {name}: relative difference {error:.1e}")
        assert error < 1e-5


def main() -> None:
    torch.manual_seed(0)
    lora_layer_matches_autograd()
    neat_is_lora()


if __name__ == "__main__":
    main()
