"""What the frozen linear and PEFT's LoRA launch, operation by operation, as torch runs them eagerly.

PEFT computes result + lora_B(lora_A(x)) * scaling around the frozen linear, and autograd its backward. With fp32
adapters over a half weight, PEFT's default (`autocast_adapter_dtype`), x is cast to fp32 first, everything in the
branch is fp32, the sum is fp32 and is cast back. Every operation reads and writes memory.
"""

from __future__ import annotations

from neat_kernels.model.work import ITEMSIZE, Layer, Step, Work, present


def frozen(layer: Layer) -> Step:
    """y = x·Wᵀ + bias and dx = dy·W: the floor."""
    return Step("frozen linear", (_base(layer),), (_dgrad(layer),))


def _sizes(layer: Layer) -> tuple[int, int, int]:
    e = layer.itemsize
    M, N, K = layer.tokens, layer.out_features, layer.in_features
    return M * K * e, N * K * e, M * N * e


def _base(layer: Layer) -> Work:
    x, W, y = _sizes(layer)
    bias = layer.out_features * layer.itemsize if layer.bias else None
    flops = 2 * layer.tokens * layer.in_features * layer.out_features
    name = "torch.mm" if bias is None else "torch.addmm"
    return Work(name, present(x=x, W=W, bias=bias), {"y": y}, flops, layer.dtype)


def _dgrad(layer: Layer) -> Work:
    x, W, y = _sizes(layer)
    flops = 2 * layer.tokens * layer.in_features * layer.out_features
    return Work("torch.mm", {"dy": y, "W": W}, {"dx": x}, flops, layer.dtype)


def peft_lora(layer: Layer) -> Step:
    """PEFT's LoRA with adapters in the layer's `adapter_dtype`, without dropout and outside autocast."""
    wide = layer.adapter_dtype != layer.dtype
    return Step(f"PEFT LoRA, {layer.adapter_dtype} adapter", _lora_forward(layer, wide), _lora_backward(layer, wide))


def _lora_forward(layer: Layer, wide: bool) -> tuple[Work, ...]:
    M, N, K, r = layer.tokens, layer.out_features, layer.in_features, layer.r
    x, _, y = _sizes(layer)
    a, unit = ITEMSIZE[layer.adapter_dtype], layer.adapter_dtype
    branch = (
        Work("torch.mm", {"x": M * K * a, "lora_A": r * K * a}, {"S": M * r * a}, 2 * M * K * r, unit),
        Work("torch.mm", {"S": M * r * a, "lora_B": N * r * a}, {"update": M * N * a}, 2 * M * N * r, unit),
        Work("torch.mul", {"update": M * N * a}, {"scaled": M * N * a}, M * N),
        Work("torch.add", {"result": y, "scaled": M * N * a}, {"sum": M * N * a}, M * N),
    )
    if not wide:
        return (_base(layer), *branch)
    cast = Work("torch._to_copy", {"x": x}, {"x wide": M * K * a})
    back = Work("torch._to_copy", {"sum": M * N * a}, {"y": y})
    return (_base(layer), cast, *branch, back)


def _lora_backward(layer: Layer, wide: bool) -> tuple[Work, ...]:
    M, N, K, r = layer.tokens, layer.out_features, layer.in_features, layer.r
    x, _, y = _sizes(layer)
    a, unit = ITEMSIZE[layer.adapter_dtype], layer.adapter_dtype
    up, S, A, B = M * N * a, M * r * a, r * K * a, N * r * a
    branch = (
        Work("torch.mul", {"dsum": up}, {"dupdate": up}, M * N),
        Work("torch.mm", {"dupdate": up, "S": S}, {"dlora_B": B}, 2 * M * N * r, unit),
        Work("torch.mm", {"dupdate": up, "lora_B": B}, {"dS": S}, 2 * M * N * r, unit),
        Work("torch.mm", {"dS": S, "x": M * K * a}, {"dlora_A": A}, 2 * M * K * r, unit),
        Work("torch.mm", {"dS": S, "lora_A": A}, {"dx of branch": M * K * a}, 2 * M * K * r, unit),
    )
    added = Work("torch.add", {"dx": x, "dx of branch": x}, {"dx": x}, M * K)
    if not wide:
        return (*branch, _dgrad(layer), added)
    return (
        Work("torch._to_copy", {"dy": y}, {"dsum": up}),
        Work("torch._to_copy", {"dsum": up}, {"dresult": y}),
        *branch,
        Work("torch._to_copy", {"dx wide": M * K * a}, {"dx of branch": x}),
        _dgrad(layer),
        added,
    )
