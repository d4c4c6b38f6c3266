"""What may be adapted: nn.Linear and GPT-2's Conv1D with a plain floating weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neat_kernels.vocabulary import HALF_DTYPES


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """W as [N,K]; a Conv1D stores Wᵀ."""
    return weight.t() if transposed else weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let `target` run the forward and backward hooks of `source`.

    The dictionaries themselves are shared, so that a handle that a user holds still removes its hook.
    """
    for name in _HOOKS:
        target.__dict__[name] = source.__dict__[name]


def adapter_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """An adapter's default dtype: the weight's, but float32 over a half weight, where small updates round away."""
    return torch.float32 if weight_dtype in HALF_DTYPES else weight_dtype


def checked_weight(linear: nn.Module) -> nn.Parameter:
    """The weight of `linear` if it can be adapted; else a TypeError or ValueError: what was expected and what came."""
    if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
        raise TypeError(f"expected nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
    if not is_conv1d(linear) and type(linear).forward is not nn.Linear.forward:
        raise TypeError(f"expected nn.Linear's forward, but {type(linear).__name__} has a forward of its own")
    if "forward" in vars(linear):
        raise TypeError("expected the class's forward, but it was replaced on the instance (by a dispatch hook?)")
    weight = linear.weight
    if type(weight) is not nn.Parameter or weight.ndim != 2:
        raise ValueError(f"expected a weight that is a plain 2-D nn.Parameter, got {type(weight).__name__}")
    if type(linear.bias) not in (nn.Parameter, type(None)):
        raise ValueError(f"expected a bias that is a plain nn.Parameter or None, got {type(linear.bias).__name__}")
    own = [*linear._parameters, *linear._buffers, *linear._modules]
    if strangers := [name for name in own if name not in ("weight", "bias")]:
        raise ValueError(f"expected a layer that holds a weight and a bias alone, got {strangers[0]!r} in it too")
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"expected a float64, float32, bfloat16 or float16 weight, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError("expected a weight that holds data, got one on the meta device: load the model first")
    return weight
