"""The layer as functions: validation of the arguments, choice of the backend, call of the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neat_kernels.ops.features import FEATURES
from neat_kernels.ops.low_rank import LOW_RANK_ADD, LOW_RANK_LINEAR
from neat_kernels.ops.neat import NEAT_LINEAR
from neat_kernels.plan import choose_backend, token_backend
from neat_kernels.torch_backend.dropout import draw_seed
from neat_kernels.vocabulary import (
    ACTIVATIONS,
    HALF_DTYPES,
    ORIENTATIONS,
    autocast_dtype,
    check_choice,
    check_compute_dtype,
    check_dropout,
    check_scaling,
    is_sharded,
)

__all__ = ["low_rank_add", "low_rank_linear", "neat_features", "neat_linear"]


def neat_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    *,
    encoders: Sequence[Tensor] = (),
    decoders: Sequence[Tensor] = (),
    orientation: str = "out",
    activation: str = "relu",
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with the Neat update of its frozen weight, never formed.

    y = x·(W + ΔW)ᵀ + bias;  out: ΔWᵀ = s·g(Wᵀ·Aᵀ)·Bᵀ;  in: ΔW = s·g(W·Aᵀ)·Bᵀ

    Args:
        x: [..., K], any rank >= 1, in W's dtype (any float dtype under autocast).
        weight: W [N,K], frozen; may be strided.
        A: [r,N] (out) or [r,K] (in), any float dtype.
        B: [N,r] (out) or [K,r] (in), A's dtype.
        bias: [N] in W's dtype, or None.
        encoders: p tensors [r,r], A's dtype.
        decoders: p tensors [r,r], A's dtype.
        orientation: which of W's dimensions A acts on, "out" (PEFT's PEANuT) or "in" (the paper's formula).
        activation: σ; one of relu, sin2pi, sin, gelu, gelu_tanh, silu, tanh, sigmoid, identity.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x in the adapter branch.
        training: whether dropout is active.
        compute_dtype: dtype of the adapter branch; None is x's, torch.float32 is the only other one for half inputs.
        backend: "auto", or "torch" / "triton", which runs or raises.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, dtype, device or option is not as above, W requires a gradient or is a shard.
        TypeError: scaling or dropout is no number.
        RuntimeError: a tensor has a tangent of forward-mode AD.
        BackendUnavailableError: `backend` cannot run here.

    Source: arXiv 2410.01870.
    """
    chain = _check_network(weight, A, encoders, decoders, orientation, activation)
    out_features, in_features = weight.shape
    r, columns = A.shape
    _check_device("the weight", weight.device, x=x, B=B, bias=bias)
    if tuple(B.shape) != (columns, r) or B.dtype != A.dtype:
        raise ValueError(f"B must be [{columns}, {r}] in A's {A.dtype}, got {tuple(B.shape)} in {B.dtype}")
    _check_tokens(x, weight, bias, scaling, dropout, compute_dtype)
    _check_no_tangent(x, weight, A, B, chain, bias)
    seed = draw_seed(x) if training and dropout > 0.0 else None
    chosen = choose_backend(backend, x.device, (x.dtype, weight.dtype, A.dtype), r)
    y, _, _, _ = NEAT_LINEAR(
        x,
        weight,
        bias,
        A,
        B,
        chain,
        seed,
        orientation,
        activation,
        float(scaling),
        dropout if seed is not None else 0.0,
        compute_dtype,
        token_backend(chosen, x.device, autocast_dtype(x), in_features, out_features),
    )
    return y


def neat_features(
    weight: Tensor,
    A: Tensor,
    *,
    encoders: Sequence[Tensor] = (),
    decoders: Sequence[Tensor] = (),
    orientation: str = "out",
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """Features of the frozen weight.

    H = g(Wᵀ·Aᵀ) [K,r] (out) or g(W·Aᵀ) [N,r] (in)
    g: σ, then p encoders h = σ(h·Eᵀ), then p decoders h = σ(h·Dᵀ) + skip

    Args:
        weight: W [N,K], frozen; may be strided.
        A: [r,N] (out) or [r,K] (in), any float dtype.
        encoders: p tensors [r,r], A's dtype.
        decoders: p tensors [r,r], A's dtype.
        orientation: "out" or "in".
        activation: σ.
        backend: "auto", or a backend that runs or raises.

    Returns:
        H in float32, or float64 if W or A is.

    Raises:
        ValueError: a shape, dtype, device or option is not as above, W requires a gradient or is a shard.
        RuntimeError: a tensor has a tangent of forward-mode AD.
        BackendUnavailableError: `backend` cannot run here.

    Source: arXiv 2410.01870.
    """
    chain = _check_network(weight, A, encoders, decoders, orientation, activation)
    _check_no_tangent(weight, A, chain)
    chosen = choose_backend(backend, weight.device, (weight.dtype, A.dtype), A.shape[0])
    H, _ = FEATURES(weight, A, chain, orientation, activation, chosen)
    return H


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frozen linear layer plus a low-rank update: the token side of Neat, and a LoRA layer as it stands.

    S = x̃·D;  y = x·Wᵀ + bias + s·S·Uᵀ;  x̃ is x under dropout.  LoRA: D = lora_Aᵀ, U = lora_B.

    Args:
        x: [..., K], any rank >= 1, in W's dtype (any float dtype under autocast).
        weight: W [N,K], frozen; may be strided.
        down: D [K,r], any float dtype.
        up: U [N,r], any float dtype.
        bias: [N] in W's dtype, or None.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x in the branch.
        training: whether dropout is active.
        compute_dtype: dtype of the branch; None is x's, torch.float32 is the only other one for half inputs.
        backend: "auto", or a backend that runs or raises.

    Returns:
        y [..., N] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, dtype, device or option is not as above, W requires a gradient or is a shard.
        TypeError: scaling or dropout is no number.
        RuntimeError: a tensor has a tangent of forward-mode AD.
        BackendUnavailableError: `backend` cannot run here.

    Source: arXiv 2106.09685 (LoRA); arXiv 2410.01870 (Neat).
    """
    _check_weight(weight)
    out_features, in_features = weight.shape
    _check_device("the weight", weight.device, x=x, down=down, up=up, bias=bias)
    _check_factors(weight, down, up)
    _check_tokens(x, weight, bias, scaling, dropout, compute_dtype)
    _check_no_tangent(x, weight, down, up, bias)
    seed = draw_seed(x) if training and dropout > 0.0 else None
    chosen = choose_backend(backend, x.device, (x.dtype, weight.dtype, down.dtype, up.dtype), down.shape[1])
    y, _ = LOW_RANK_LINEAR(
        x,
        weight,
        bias,
        down,
        up,
        seed,
        float(scaling),
        dropout if seed is not None else 0.0,
        compute_dtype,
        token_backend(chosen, x.device, autocast_dtype(x), in_features, out_features),
    )
    return y


def low_rank_add(
    x: Tensor,
    base: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The low-rank branch alone, added to what another layer has made of x: for a W that only that layer can multiply.

    S = x̃·D;  y = base + s·S·Uᵀ;  x̃ is x under dropout.

    Args:
        x: [..., K], any rank >= 1.
        base: [..., N], the other layer's output; left as it is.
        down: D [K,r], any float dtype.
        up: U [N,r], any float dtype.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x.
        training: whether dropout is active.
        compute_dtype: dtype of the branch; None is x's, torch.float32 is the only other one for half inputs.
        backend: "auto", or a backend that runs or raises.

    Returns:
        y [..., N] in base's dtype.

    Raises:
        ValueError: a shape, dtype, device or option is not as above.
        TypeError: scaling or dropout is no number.
        RuntimeError: a tensor has a tangent of forward-mode AD.
        BackendUnavailableError: `backend` cannot run here.
    """
    r = down.shape[-1] if down.ndim else 0
    if down.ndim != 2 or up.ndim != 2 or r < 1 or up.shape[1] != r:
        raise ValueError(f"down and up must be [in, r] and [out, r], got {tuple(down.shape)} and {tuple(up.shape)}")
    (in_features, _), (out_features, _) = down.shape, up.shape
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] for down {tuple(down.shape)}, got {tuple(x.shape)}")
    if tuple(base.shape) != (*x.shape[:-1], out_features):
        raise ValueError(f"base must be {(*x.shape[:-1], out_features)}, got {tuple(base.shape)}")
    for name, t in {"x": x, "base": base, "down": down, "up": up}.items():
        _check_float(name, t)
    _check_device("x", x.device, base=base, down=down, up=up)
    _check_branch(x, scaling, dropout, compute_dtype)
    _check_no_tangent(x, base, down, up)
    seed = draw_seed(x) if training and dropout > 0.0 else None
    chosen = choose_backend(backend, x.device, (x.dtype, base.dtype, down.dtype, up.dtype), r)
    y, _ = LOW_RANK_ADD(
        x,
        base,
        down,
        up,
        seed,
        float(scaling),
        dropout if seed is not None else 0.0,
        compute_dtype,
        token_backend(chosen, x.device, autocast_dtype(x), in_features, out_features),
    )
    return y


def _check_weight(weight: Tensor) -> None:
    if is_sharded(weight):
        raise ValueError(
            "weight must be whole in this process, got a DTensor: under fully_shard() call the model that holds the "
            "layer, which gathers it, or unshard() its module"
        )
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    _check_float("weight", weight)
    if weight.device.type == "meta":
        raise ValueError("weight must hold data, got a tensor on the meta device")
    if weight.requires_grad:
        raise ValueError(
            "weight must be frozen, got requires_grad=True: its gradient is never computed; call "
            "requires_grad_(False), and shard with fully_shard(), since FSDP1 flattens what is frozen and what is not"
        )


def _check_float(name: str, t: Tensor) -> None:
    if not t.is_floating_point() or t.element_size() < 2:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {t.dtype}")


def _check_factors(weight: Tensor, down: Tensor, up: Tensor) -> None:
    out_features, in_features = weight.shape
    _check_float("down", down)
    _check_float("up", up)
    r = down.shape[-1] if down.ndim else 0
    if down.ndim != 2 or down.shape[0] != in_features or r < 1:
        raise ValueError(f"down must be [{in_features}, r] for a weight {tuple(weight.shape)}, got {tuple(down.shape)}")
    if tuple(up.shape) != (out_features, r):
        raise ValueError(f"up must be [{out_features}, {r}] to match weight and down, got {tuple(up.shape)}")


def _check_tokens(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: float,
    compute_dtype: torch.dtype | None,
) -> None:
    out_features, in_features = weight.shape
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x must be [..., {in_features}] for a weight {tuple(weight.shape)}, got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")
    _check_dtypes(x, weight, bias)
    _check_branch(x, scaling, dropout, compute_dtype)


def _check_network(
    weight: Tensor,
    A: Tensor,
    encoders: Sequence[Tensor],
    decoders: Sequence[Tensor],
    orientation: str,
    activation: str,
) -> Tensor | None:
    """The chain [2p,r,r], once the arguments of the features are what they must be."""
    check_choice("orientation", orientation, ORIENTATIONS)
    check_choice("activation", activation, ACTIVATIONS)
    _check_weight(weight)
    columns = weight.shape[0 if orientation == "out" else 1]
    _check_float("A", A)
    if A.ndim != 2 or A.shape[0] < 1 or A.shape[1] != columns:
        raise ValueError(
            f"A must be [r, {columns}] for a weight {tuple(weight.shape)} and orientation={orientation!r}, "
            f"got {tuple(A.shape)}"
        )
    _check_device("the weight", weight.device, A=A)
    return _stack_chain(encoders, decoders, A)


def _check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_float("x", x)
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype != weight.dtype and not (autocast and torch.float64 not in (x.dtype, weight.dtype)):
        raise ValueError(f"x must have the weight's dtype {weight.dtype} outside autocast, got {x.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias must have the weight's dtype {weight.dtype}, got {bias.dtype}")


def _check_branch(x: Tensor, scaling: float, dropout: float, compute_dtype: torch.dtype | None) -> None:
    check_scaling(scaling)
    check_dropout(dropout)
    dtype = autocast_dtype(x)
    if compute_dtype is None or compute_dtype == dtype:
        return
    check_compute_dtype(compute_dtype)
    if not (compute_dtype == torch.float32 and dtype in HALF_DTYPES):
        raise ValueError(
            f"compute_dtype must be None, the input's {dtype}, or torch.float32 over a half input; got {compute_dtype}"
        )


def _check_device(owner: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} must be on {owner}'s device {device}, got {t.device}")


def _check_no_tangent(*tensors: Tensor | None) -> None:
    # Without this check the operators would drop the tangent and jvp would return zeros.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("forward-mode AD (jvp) is not supported by the fused path; neat_kernels.reference has it")


def _stack_chain(encoders: Sequence[Tensor], decoders: Sequence[Tensor], A: Tensor) -> Tensor | None:
    if len(encoders) != len(decoders):
        raise ValueError(f"encoders and decoders must pair up, got {len(encoders)} and {len(decoders)}")
    if not encoders:
        return None
    r = A.shape[0]
    for name, layers in (("encoders", encoders), ("decoders", decoders)):
        for i, layer in enumerate(layers):
            if tuple(layer.shape) != (r, r) or layer.dtype != A.dtype:
                raise ValueError(
                    f"{name}[{i}] must be [{r}, {r}] in {A.dtype}, got {tuple(layer.shape)} in {layer.dtype}"
                )
            _check_device("the weight", A.device, **{f"{name}[{i}]": layer})
    return torch.stack((*encoders, *decoders))
