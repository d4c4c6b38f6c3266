"""The registry of layers that are timed against one another. A new contender is one decorated function."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.bench.problem import Problem, Update


@dataclass(frozen=True)
class Layer:
    """A built contender.

    Args:
        forward: the call that is timed.
        trainable: parameters by the name of their gradient.
        frozen: weight and bias, where `forward` is a function.
        caches: whether inference reads features from a cache.
        given: the forward with features made beforehand, where a CUDA graph cannot read those that `forward` caches.
    """

    forward: Callable[[Tensor], Tensor]
    trainable: dict[str, nn.Parameter] = field(default_factory=dict)
    frozen: tuple[Tensor, ...] = ()
    caches: bool = False
    given: Callable[[Tensor], Tensor] | None = None

    @property
    def held(self) -> list[Tensor]:
        """The tensors that are there whether or not anything runs."""
        own = self.forward.parameters() if isinstance(self.forward, nn.Module) else ()
        return [*own, *self.trainable.values(), *self.frozen]

    def train(self, training: bool) -> None:
        """Set the mode of a contender that is a module; what is a function has none."""
        if isinstance(self.forward, nn.Module):
            self.forward.train(training)

    @property
    def adapter_dtype(self) -> str | None:
        """The dtype that the adapter is kept in, or None without one."""
        return next((str(p.dtype).removeprefix("torch.") for p in self.trainable.values()), None)


@dataclass(frozen=True)
class Contender:
    """One way to run the layer.

    Args:
        name: key in CONTENDERS.
        label: what tables call it.
        update: which answer it is held to.
        build: makes the layer around a copy of the problem's frozen linear.
        needs: modules that it imports, each with the attributes that it uses.
        half_only: whether it differs from its sibling only over half-precision weights.
        alone: whether importing it changes other libraries, so that no other contender may run in its process.
    """

    name: str
    label: str
    update: Update
    build: Callable[[Problem], Layer]
    needs: dict[str, tuple[str, ...]]
    half_only: bool
    alone: bool

    def differs_in(self, dtype: str) -> bool:
        """Whether it is another contender than its sibling over weights of this dtype."""
        return not (self.half_only and dtype == "float32")

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        for module, attributes in self.needs.items():
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
            loaded = importlib.import_module(module)
            for attribute in attributes:
                if not hasattr(loaded, attribute):
                    return f"{module} {getattr(loaded, '__version__', '')} has no {attribute}"
        return None


CONTENDERS: dict[str, Contender] = {}


# The floor that every other contender is a ratio to.
BASELINE = "frozen"


def _contender(
    name: str,
    label: str,
    update: Update,
    needs: dict[str, tuple[str, ...]] | None = None,
    half_only: bool = False,
    alone: bool = False,
) -> Callable[[Callable[[Problem], Layer]], Callable[[Problem], Layer]]:
    def register(build: Callable[[Problem], Layer]) -> Callable[[Problem], Layer]:
        CONTENDERS[name] = Contender(name, label, update, build, needs or {}, half_only, alone)
        return build

    return register


def check_company(names: Sequence[str]) -> None:
    """Refuse contenders that cannot run in one process.

    Raises:
        ValueError: one that must be alone has company other than the floor.
    """
    for name in names:
        others = [other for other in names if other not in (name, BASELINE)]
        if CONTENDERS[name].alone and others:
            raise ValueError(
                f"expected {name} with {BASELINE} alone, since importing it changes what others run; "
                f"got {', '.join(others)} too"
            )


@_contender(BASELINE, "frozen nn.Linear", "none")
def _frozen(problem: Problem) -> Layer:
    return Layer(_linear(problem))


@_contender("neat", "neat-kernels", "neat", {"neat_kernels": ("FusedNeatLinear",)})
def _neat(problem: Problem) -> Layer:
    return _fused_neat(problem, None)


@_contender("neat_half", "neat-kernels, half adapter", "neat", {"neat_kernels": ("FusedNeatLinear",)}, half_only=True)
def _neat_half(problem: Problem) -> Layer:
    return _fused_neat(problem, problem.dtype)


@_contender("peft_lora", "PEFT LoRA", "lora", {"peft": ("LoraConfig",)})
def _peft_lora(problem: Problem) -> Layer:
    return _stock_lora(problem, autocast_adapter_dtype=True)


@_contender("peft_lora_half", "PEFT LoRA, half adapter", "lora", {"peft": ("LoraConfig",)}, half_only=True)
def _peft_lora_half(problem: Problem) -> Layer:
    return _stock_lora(problem, autocast_adapter_dtype=False)


@_contender("neat_lora", "neat-kernels run as LoRA", "lora", {"neat_kernels": ("FusedLoraLinear",)})
def _neat_lora(problem: Problem) -> Layer:
    import neat_kernels as nk

    layer = nk.FusedLoraLinear(_linear(problem), r=problem.shape.r)
    return _with_adapter(layer, problem, "lora", layer.lora_A, layer.lora_B)


@_contender("lora_by_hand", "LoRA by hand", "lora")
def _lora_by_hand(problem: Problem) -> Layer:
    linear = _linear(problem)
    A, B = _parameters(problem, "lora")

    def forward(x: Tensor) -> Tensor:
        y: Tensor = _LoraByHand.apply(x, linear.weight, linear.bias, A, B)
        return y

    return Layer(forward, {"dA": A, "dB": B}, (linear.weight, linear.bias))


@_contender("unsloth_lora", "Unsloth's LoRA", "lora", {"unsloth": ()}, alone=True)
def _unsloth_lora(problem: Problem) -> Layer:
    from unsloth.kernels.fast_lora import LoRA_W

    linear = _linear(problem)
    A, B = _parameters(problem, "lora")

    def forward(x: Tensor) -> Tensor:
        # It takes a batch of sequences, and leaves a bias to its caller.
        y: Tensor = LoRA_W.apply(x.unsqueeze(0), linear.weight, None, A, B, 1.0)
        return y.squeeze(0) + linear.bias

    return Layer(forward, {"dA": A, "dB": B}, (linear.weight, linear.bias))


@_contender("formula", "formula, eager", "neat")
def _formula(problem: Problem) -> Layer:
    return _by_formula(problem, _neat_formula)


@_contender("formula_compiled", "formula, torch.compile", "neat")
def _formula_compiled(problem: Problem) -> Layer:
    return _by_formula(problem, _compiled_formula())


_OURS_UNDER_PEFT: dict[str, tuple[str, ...]] = {"peft": ("PeanutConfig",), "neat_kernels.integrations": ()}


@_contender("peft_peanut", "PEFT PEANuT", "neat", {"peft": ("PeanutConfig",)})
def _peft_peanut(problem: Problem) -> Layer:
    return _stock_peanut(problem, accelerated=False)


@_contender("accelerated", "PEFT PEANuT, accelerated", "neat", _OURS_UNDER_PEFT)
def _accelerated(problem: Problem) -> Layer:
    return _stock_peanut(problem, accelerated=True)


@_contender("peft_neat", "PEFT, NeatConfig", "neat", _OURS_UNDER_PEFT)
def _peft_neat(problem: Problem) -> Layer:
    from neat_kernels.integrations.peft import NeatConfig

    config = NeatConfig(r=problem.shape.r, activation="relu", target_modules=["linear"])
    layer = _inject(problem, config, autocast_adapter_dtype=True)
    A, B = layer.neat_A["default"].weight, layer.neat_B["default"].weight
    return dataclasses.replace(_with_adapter(layer, problem, "neat", A, B), caches=True)


def _stock_peanut(problem: Problem, accelerated: bool) -> Layer:
    import peft

    config = peft.PeanutConfig(r=problem.shape.r, depth=0, act_fn="relu", scaling=1.0, target_modules=["linear"])
    layer = _inject(problem, config, autocast_adapter_dtype=True)
    if accelerated:
        from neat_kernels.integrations.peft import accelerate

        accelerate(layer)
    A, B = layer.peanut_A["default"].weight, layer.peanut_B["default"].weight
    return dataclasses.replace(_with_adapter(layer, problem, "neat", A, B), caches=accelerated)


def _stock_lora(problem: Problem, autocast_adapter_dtype: bool) -> Layer:
    import peft

    r = problem.shape.r
    config = peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, bias="none", target_modules=["linear"])
    layer = _inject(problem, config, autocast_adapter_dtype)
    return _with_adapter(layer, problem, "lora", layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def _inject(problem: Problem, config: Any, autocast_adapter_dtype: bool) -> Any:
    """Let PEFT adapt a model of one linear layer and return the layer: the model's own call is not the layer's cost."""
    import peft

    model = nn.Module()
    model.linear = _linear(problem)
    adapted: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    return adapted.base_model.model.linear


def _fused_neat(problem: Problem, adapter_dtype: torch.dtype | None) -> Layer:
    import neat_kernels as nk

    layer = nk.FusedNeatLinear.from_linear(
        _linear(problem),
        r=problem.shape.r,
        orientation="out",
        depth=0,
        activation="relu",
        scaling=1.0,
        dtype=adapter_dtype,
    )
    built = _with_adapter(layer, problem, "neat", layer.neat_A, layer.neat_B)
    return dataclasses.replace(built, caches=True, given=_with_features(layer, problem.dtype))


def _with_features(layer: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    import neat_kernels as nk

    with torch.no_grad():
        down = nk.functional.neat_features(layer.weight, layer.neat_A, activation="relu").to(dtype)
        up = layer.neat_B.to(dtype)
    return lambda x: nk.functional.low_rank_linear(x, layer.weight, down, up, layer.bias)


def _with_adapter(
    layer: Callable[[Tensor], Tensor], problem: Problem, update: Update, A: nn.Parameter, B: nn.Parameter
) -> Layer:
    with torch.no_grad():
        for parameter, value in zip((A, B), problem.adapters[update], strict=True):
            parameter.copy_(value)
    return Layer(layer, {"dA": A, "dB": B})


def _linear(problem: Problem) -> nn.Linear:
    """A frozen linear with its own copy of the weight: contenders must not keep each other's in cache."""
    N, K = problem.weight.shape
    linear = nn.Linear(K, N, device="meta")
    linear.weight = nn.Parameter(problem.weight.clone(), requires_grad=False)
    linear.bias = nn.Parameter(problem.bias.clone(), requires_grad=False)
    return linear


def _neat_formula(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return nn.functional.linear(x, weight + B @ torch.relu(A @ weight), bias)


@functools.cache
def _compiled_formula() -> Callable[..., Tensor]:
    return torch.compile(_neat_formula, fullgraph=True, dynamic=False)


def _by_formula(problem: Problem, formula: Callable[..., Tensor]) -> Layer:
    linear = _linear(problem)
    A, B = _parameters(problem, "neat")
    frozen = (linear.weight, linear.bias)
    return Layer(lambda x: formula(x, *frozen, A, B), {"dA": A, "dB": B}, frozen)


def _parameters(problem: Problem, update: Update) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B in the problem's own dtype."""
    A, B = (nn.Parameter(t.to(problem.dtype)) for t in problem.adapters[update])
    return A, B


class _LoraByHand(torch.autograd.Function):
    """LoRA as fine-tuning libraries write it by hand: products accumulated in place, x·Aᵀ made again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        return torch.addmm(bias, x, weight.t()).addmm_(x @ A.t(), B.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        dS = dy @ B
        dA = dS.t() @ x
        dB = dy.t() @ (x @ A.t())
        return (dy @ weight).addmm_(dS, A), None, None, dA, dB
