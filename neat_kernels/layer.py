"""FusedNeatLinear: a frozen linear layer and its Neat update as one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neat_kernels import functional, inference
from neat_kernels.base_layer import adapter_dtype, as_matrix, checked_weight
from neat_kernels.cache import Factors, FeatureCache, ReusedFeatures, refuse_reuse_in_parallel
from neat_kernels.frozen import FrozenLinear
from neat_kernels.merge import merge
from neat_kernels.options import LayerOptions
from neat_kernels.plan import Plan, make_plan
from neat_kernels.torch_backend.gemm import ieee_fp32
from neat_kernels.vocabulary import COMPUTE_DTYPES, arrange, autocast_dtype, check_int, wide_dtype


class FusedNeatLinear(FrozenLinear):
    """Frozen linear layer plus an update that is a small neural network of the frozen weight.

    y = x·(W + ΔW)ᵀ + bias;  out: ΔWᵀ = s·g(Wᵀ·Aᵀ)·Bᵀ;  in: ΔW = s·g(W·Aᵀ)·Bᵀ;  ΔW is never formed.

    B starts at zero, so a fresh layer computes exactly what the frozen layer does. `weight` and `bias` are frozen; set
    `layer.bias.requires_grad_(True)` to train the bias.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        r: rank, the width of the small network.
        orientation: which of W's dimensions A acts on, "out" (PEFT's PEANuT) or "in" (the paper's formula).
        depth: pairs of encoder and decoder layers [r,r] between A and B.
        activation: σ; one of relu, sin2pi, sin, gelu, gelu_tanh, silu, tanh, sigmoid, identity.
        scaling: s.
        dropout: probability in [0, 1) of dropping an element of x in the adapter branch, in training.
        compute_dtype: dtype of the adapter branch; None is the input's, torch.float32 the only other one for half
            inputs.
        backend: "auto", or "torch" / "triton", which runs or raises.
        device: where the parameters are.
        dtype: dtype of every parameter.

    Raises:
        ValueError: an option is not as above.
        TypeError: an option is of another type.

    Source: arXiv 2410.01870.
    """

    r: int
    orientation: str
    depth: int
    activation: str
    scaling: float
    dropout: float
    compute_dtype: torch.dtype | None
    backend: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        orientation: str = "out",
        depth: int = 0,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_dtype(dtype)
        check_int("in_features", in_features, 1)
        check_int("out_features", out_features, 1)
        options = LayerOptions(
            r=r,
            orientation=orientation,
            depth=depth,
            activation=activation,
            scaling=scaling,
            dropout=dropout,
            compute_dtype=compute_dtype,
            backend=backend,
        )
        self._setup(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), None, options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int = 16,
        orientation: str = "out",
        depth: int = 0,
        activation: str = "relu",
        scaling: float = 1.0,
        dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FusedNeatLinear:
        """Wrap an existing nn.Linear, or GPT-2's Conv1D, sharing its parameters: nothing of W's size is copied.

        The shared weight and bias are frozen. A Conv1D keeps its [in,out] layout.

        Args:
            linear: the layer to adapt.
            r: rank.
            orientation: "out" or "in".
            depth: encoder-decoder pairs.
            activation: σ.
            scaling: s.
            dropout: probability in [0, 1).
            compute_dtype: dtype of the adapter branch.
            backend: "auto", "torch" or "triton".
            device: must be None or the weight's device, where the adapter goes.
            dtype: dtype of the adapter; None is the weight's, but float32 over a half weight, since small updates of
                half parameters round away.

        Returns:
            The adapted layer, in the training mode of `linear`.

        Raises:
            TypeError: `linear` is neither nn.Linear nor Conv1D, or an option is of another type.
            ValueError: its weight is not a floating tensor that holds data, or an option is not valid.
        """
        options = LayerOptions(
            r=r,
            orientation=orientation,
            depth=depth,
            activation=activation,
            scaling=scaling,
            dropout=dropout,
            compute_dtype=compute_dtype,
            backend=backend,
        )
        weight = checked_weight(linear)
        if device is not None and torch.empty(0, device=device).device != weight.device:
            raise ValueError(f"device must be the weight's device {weight.device}, got {device}")
        _check_dtype(dtype)
        layer = cls.__new__(cls)
        layer._setup(linear, linear, options, dtype or adapter_dtype(weight.dtype))
        return layer.train(linear.training)

    def _setup(
        self,
        linear: nn.Module,
        original: nn.Module | None,
        options: LayerOptions,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._share(linear, original)
        for name, value in asdict(options).items():
            setattr(self, name, value)
        self._make_adapter(adapter_dtype)
        self._reused: ReusedFeatures | None = None
        self._cache = FeatureCache()
        self.invalidate()
        self.register_load_state_dict_post_hook(_after_load)

    def _make_adapter(self, dtype: torch.dtype | None) -> None:
        def parameter(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, device=self.weight.device, dtype=dtype or self.weight.dtype))

        columns = self.out_features if self.orientation == "out" else self.in_features
        self.neat_A, self.neat_B = parameter(self.r, columns), parameter(columns, self.r)
        self.neat_encoders = nn.ParameterList(parameter(self.r, self.r) for _ in range(self.depth))
        self.neat_decoders = nn.ParameterList(parameter(self.r, self.r) for _ in range(self.depth))
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draw A and the chain anew (Kaiming uniform, a=√5) and set B to zero: an exact no-op."""
        for p in (self.neat_A, *self.neat_encoders, *self.neat_decoders):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
        nn.init.zeros_(self.neat_B)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features], any rank >= 1.

        Returns:
            y [..., out_features] in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError: x does not fit the weight.
            RuntimeError: the layer is merged and is asked to train its adapter.
            BackendUnavailableError: an explicit backend cannot run here.
        """
        if self.merged:
            self._refuse_training_while_merged()
            return F.linear(x, self._matrix(), self.bias)
        weight = self._matrix()
        given = self._given_factors(x)
        if given is not None and self._reused is None:
            y = inference.linear(x, weight, self.bias, *given, self.scaling, self.compute_dtype, self.backend)
            if y is not None:
                return y
        token_side: dict[str, Any] = {
            "scaling": self.scaling,
            "dropout": self.dropout,
            "training": self.training,
            "compute_dtype": self.compute_dtype,
            "backend": self.backend,
        }
        if given is not None:
            return functional.low_rank_linear(x, weight, *given, self.bias, **token_side)
        return functional.neat_linear(x, weight, self.neat_A, self.neat_B, self.bias, **self._network(), **token_side)

    def delta_weight(self) -> Tensor:
        """The update ΔW = s·U·Dᵀ as a matrix, for inspection and tests.

        Returns:
            [out_features, in_features], float32 (float64 in float64), without a gradient.
        """
        lora_A, lora_B = self.lora_factors()
        with torch.autocast(lora_A.device.type, enabled=False), ieee_fp32(lora_A.device):
            return lora_B @ lora_A

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """The LoRA adapter that this layer is: lora_A = Dᵀ, lora_B = s·U, lora_B @ lora_A = ΔW.

        Returns:
            lora_A [r, in_features] and lora_B [out_features, r], float32 (float64 in float64), without a gradient.

        Raises:
            BackendUnavailableError: an explicit backend cannot run here.
        """
        wide = wide_dtype(self.base_weight, self.neat_A)
        H = self._features(as_matrix(self.base_weight, self.transposed))
        down, up = self._as_factors(H, self.neat_B)
        return down.to(wide).t().contiguous(), up.to(wide) * self.scaling

    @torch.no_grad()
    def merge(self, *, rounding: str = "nearest", seed: int | None = None) -> None:
        """Replace `weight` by a parameter that holds W + ΔW, added in float32 and rounded once; W itself is kept.

        In bf16 and fp16 whatever of ΔW is below half a unit in the last place of W rounds away: 0.2 to 0.4 % of |W| in
        bf16. Stochastic rounding keeps it in the mean.

        Args:
            rounding: "nearest", or "stochastic" for a bf16 weight.
            seed: as in `merged_weight`.

        Raises:
            RuntimeError: the layer is merged already, or sharded.
            ValueError: W + ΔW is not finite, or as in `merged_weight`.
            BackendUnavailableError: an explicit backend cannot run here.
        """
        if self.merged:
            raise RuntimeError("expected an unmerged layer, got a merged one: call unmerge() first")
        self._refuse_shards()
        with torch.inference_mode(False):
            merged = nn.Parameter(self.merged_weight(rounding=rounding, seed=seed), requires_grad=False)
        self._put_merged(merged)
        self.invalidate()

    def unmerge(self) -> None:
        """Put W back, bit for bit: it is the parameter from before merge().

        Raises:
            RuntimeError: the layer is not merged, or was sharded since.
        """
        if not self.merged:
            raise RuntimeError("expected a merged layer, got an unmerged one: call merge() first")
        self._refuse_shards()
        self._put_unmerged_back()
        self.invalidate()

    @torch.no_grad()
    def merged_weight(self, *, rounding: str = "nearest", seed: int | None = None) -> Tensor:
        """W + ΔW in W's dtype and layout, added in float32 (float64) on the layer's backend and rounded once.

        Args:
            rounding: "nearest", or "stochastic" for a bf16 weight: up or down, so that the mean is W + ΔW.
            seed: of stochastic rounding, 0 to 2⁶³ - 1: the same seed, the same rounding. None draws one, which follows
                torch.manual_seed.

        Raises:
            ValueError: the sum is not finite; a rounding or seed that is not as above, or a seed without "stochastic".
            BackendUnavailableError: an explicit backend cannot run here.
        """
        W = as_matrix(self.base_weight, self.transposed)
        D, U = self._as_factors(self._features(W), self.neat_B)
        merged = merge(W, D, U, scaling=self.scaling, rounding=rounding, seed=seed, backend=self.backend)
        return as_matrix(merged, self.transposed)

    def invalidate(self) -> None:
        """Drop cached features; needed after parameters were written through `.data`, which no version counter sees."""
        self._cache.reset(self._feature_parameters())

    def explain(self, x: Tensor) -> Plan:
        """The backend and plan that x would take, and why.

        Args:
            x: an input of the layer; only its dtype, its device and the number of its tokens are looked at.

        Returns:
            The plan; str() of it is a sentence.

        Raises:
            BackendUnavailableError: an explicit backend cannot run here.
        """
        if self.merged:
            return Plan("torch", "native", "the layer is merged, so that forward is F.linear with W + ΔW")
        return make_plan(
            self.backend,
            x.device,
            autocast_dtype(x),
            self.neat_A.dtype,
            self.r,
            self.in_features,
            self.out_features,
            self.orientation,
            None if self._features_are_given(self._feature_parameters()) else x.shape[:-1].numel(),
        )

    def extra_repr(self) -> str:
        """Sizes and options, as nn.Linear prints its own."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, orientation={self.orientation!r}, depth={self.depth}, activation={self.activation!r}, "
            f"scaling={self.scaling}"
        )
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text + (", merged=True" if self.merged else "")

    def train(self, mode: bool = True) -> FusedNeatLinear:
        """Set the training mode and drop cached features."""
        super().train(mode)
        self._cache.drop()
        return self

    def _feature_parameters(self) -> tuple[Tensor, ...]:
        return self.weight, self.neat_A, self.neat_B, *_items(self.neat_encoders), *_items(self.neat_decoders)

    def _features(self, weight: Tensor) -> Tensor:
        return functional.neat_features(weight, self.neat_A, **self._network(), backend=self.backend)

    def _network(self) -> dict[str, Any]:
        return {
            "encoders": tuple(_items(self.neat_encoders)),
            "decoders": tuple(_items(self.neat_decoders)),
            "orientation": self.orientation,
            "activation": self.activation,
        }

    def _as_factors(self, H: Tensor, B: Tensor) -> Factors:
        return arrange(self.orientation, H, B)

    def _given_factors(self, x: Tensor) -> Factors | None:
        """D and U where the features need not be computed anew: reused ones, or those of the cache."""
        parameters = self._feature_parameters()
        if not self._features_are_given(parameters):
            return None
        if self._reused is not None:
            refuse_reuse_in_parallel(self)
            return self._as_factors(self._reused.checked(parameters), self.neat_B)
        dtype = self.compute_dtype or autocast_dtype(x)
        key = (dtype, self.orientation, self.activation)
        return self._cache.get(parameters, key) or self._cache.put(parameters, key, self._detached_factors(dtype))

    def _features_are_given(self, parameters: tuple[Tensor, ...]) -> bool:
        """Whether a forward, here and now, takes reused features or those of the cache."""
        if self._reused is not None:
            return True
        return not (self.training or torch.is_grad_enabled()) and self._cache.usable(parameters)

    def _detached_factors(self, dtype: torch.dtype) -> Factors:
        # Outside inference mode, so that the cached tensors are ordinary ones and serve later calls in any mode.
        with torch.inference_mode(False), torch.no_grad():
            down, up = self._as_factors(self._features(self._matrix()), self.neat_B.detach())
            kept = inference.factor_dtype(down.device, dtype)
            return down.to(dtype, copy=True).to(kept), up.to(dtype, copy=True).to(kept)

    def _refuse_training_while_merged(self) -> None:
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self._feature_parameters()):
            raise RuntimeError("a merged layer cannot train its adapter: call unmerge() first, or eval() for inference")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedNeatLinear:
        self._cache.forget()
        if self._reused is not None:
            self._reused.invalidate()
        super()._apply(fn, recurse)
        self.invalidate()
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        self._cache.forget()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_reused": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cache = FeatureCache()
        self.invalidate()


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")


def _after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, FusedNeatLinear)
    layer.invalidate()


def neat_layers(model: nn.Module) -> Iterable[tuple[str, FusedNeatLinear]]:
    """Every Neat layer of `model` with its qualified name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, FusedNeatLinear))


def _items(parameters: nn.ParameterList) -> list[Tensor]:
    # By index: torch 2.11 under Python 3.12 cannot trace an iteration over a ParameterList.
    return [parameters[i] for i in range(len(parameters))]
