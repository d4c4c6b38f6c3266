"""Gradient accumulation: compute the features of W once for all micro-batches, and compare the gradients."""

import torch
from torch import Tensor, nn

import neat_kernels as nk

MICRO_BATCHES = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    nk.apply_neat(model, nk.NeatConfig(r=8, target_modules=["0", "2"], depth=1, activation="silu"))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.neat_B, std=0.1)
    return model


def accumulate(model: nn.Module, data: Tensor) -> None:
    for micro_batch in data.chunk(MICRO_BATCHES):
        (model(micro_batch).square().mean() / MICRO_BATCHES).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def main() -> None:
    torch.manual_seed(1)
    data = torch.randn(32, 256)

    plain = make_model()
    accumulate(plain, data)

    reused = make_model()
    with nk.reuse_features(reused):
        accumulate(reused, data)
        # B takes its gradient from each backward; A and the chain are waiting for the end of the block.
        assert reused[0].neat_B.grad is not None
        assert reused[0].neat_A.grad is None

    expected, got = gradients(plain), gradients(reused)
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm()
        print(f"{name:18} gradient {gradient.norm():.4f}, relative difference {error:.1e}")
        assert error < 1e-5

    optimizer = torch.optim.SGD([p for p in reused.parameters() if p.requires_grad], lr=0.1)
    try:
        with nk.reuse_features(reused):
            accumulate(reused, data)
            optimizer.step()
            reused(data)
    except RuntimeError as error:
        print(f"an optimizer step inside the block is refused: {error}")
    else:
        raise AssertionError("a step inside the block must be refused")


if __name__ == "__main__":
    main()
