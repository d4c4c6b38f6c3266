"""A linear layer of any kind that PEFT adapts, and its Neat adapters: y = x·Wᵀ + bias + Σ_a s_a·(x̃·D_a)·U_aᵀ."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from neat_kernels import reference
from neat_kernels.base_layer import as_matrix, is_conv1d
from neat_kernels.cache import FeatureCache
from neat_kernels.functional import neat_features
from neat_kernels.integrations.peft.bases import matrix_shape
from neat_kernels.integrations.peft.branches import Network, Settings
from neat_kernels.integrations.peft.fused import FusedNetworks, after_load, hangs_on
from neat_kernels.integrations.peft.merging import device_of, merge_from_original, not_finite, original_base
from neat_kernels.merge import merge
from neat_kernels.options import LayerOptions


class NeatLayer(BaseTunerLayer):
    """The Neat adapters of one base layer, by adapter name."""

    adapter_layer_names: tuple[str, ...] = ("neat_A", "neat_B", "neat_encoders", "neat_decoders")
    other_param_names: tuple[str, ...] = ("options",)

    # Of PEFT and of modules held by name, which have no types.
    get_base_layer: Any
    neat_A: Any
    neat_B: Any
    neat_encoders: Any
    neat_decoders: Any

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.neat_A, self.neat_B = nn.ModuleDict(), nn.ModuleDict()
        self.neat_encoders, self.neat_decoders = nn.ModuleDict(), nn.ModuleDict()
        self.options: dict[str, LayerOptions] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.out_features, self.in_features = matrix_shape(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, options: LayerOptions, *, init_weights: bool = True, inference_mode: bool = False
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: its name.
            options: its options.
            init_weights: B starts at zero; False draws it like A.
            inference_mode: the adapter is not trained.

        Raises:
            ValueError: another adapter of the layer insists on another backend. Nothing is changed then.
        """
        _backend({**self.options, adapter_name: options})
        columns = self.out_features if options.orientation == "out" else self.in_features
        self.options[adapter_name] = options
        self.neat_A[adapter_name] = nn.Linear(columns, options.r, bias=False)
        self.neat_B[adapter_name] = nn.Linear(options.r, columns, bias=False)
        for chain in (self.neat_encoders, self.neat_decoders):
            chain[adapter_name] = nn.ModuleList(
                nn.Linear(options.r, options.r, bias=False) for _ in range(options.depth)
            )
        self.reset_neat_parameters(adapter_name, init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name, device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_neat_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Draw A and the chain anew (Kaiming uniform, a=√5); B is zero, or drawn if `init_weights` is False."""
        for part in (self.neat_A, self.neat_encoders, self.neat_decoders, self.neat_B):
            for parameter in part[adapter_name].parameters():
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.neat_B[adapter_name].weight)


class _Unfused(nn.Module, NeatLayer):
    """What a Neat layer does where the fused path does not run, and merging into a W that is not quantised."""

    base_layer: Any
    _network: Any
    _to_merge: Any
    _route: Any
    _fused_names: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        options: LayerOptions,
        *,
        init_weights: bool = True,
        inference_mode: bool = False,
    ) -> None:
        super().__init__()
        NeatLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._neat_cache = FeatureCache()
        self.register_load_state_dict_post_hook(after_load)
        self.update_layer(adapter_name, options, init_weights=init_weights, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer where adapters are merged or disabled; eager torch where W is trained; else an error."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            raise TypeError(f"a Neat layer takes x alone, got {len(args)} more arguments and keywords {sorted(kwargs)}")
        if is_trained(self.get_base_layer()):
            return self._eager(x)
        raise RuntimeError(f"this Neat layer cannot run: {self._route(self._fused_names())}")

    def _eager(self, x: Tensor) -> Tensor:
        """The same in torch's own operators, whose autograd reaches W; the features cast W whole."""
        y, base = self.base_layer(x), self.get_base_layer()
        weight = as_matrix(base.weight, is_conv1d(base))
        for name in self._fused_names():
            network = self._network(name)
            down, up, scaling, dropout = network.branch(reference.neat_features(weight, network.A, **network.shape))
            tokens = functional.dropout(x, dropout, self.training)
            y = y + ((tokens.to(down.dtype) @ down) @ up.to(down.dtype).t() * scaling).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, of the W from before merging, in the layout and dtype of the weight."""
        with torch.no_grad(), original_base(self):
            down, up, weight = self._factors([adapter])
            delta = (up.float() @ down.float().t()).to(weight.dtype)
        return as_matrix(delta, is_conv1d(self.get_base_layer()))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight; a sum that is not finite is refused with and without `safe_merge`."""
        if names := self._to_merge(adapter_names):
            merge_from_original(self, names, self._write)

    def unmerge(self) -> None:
        """Say that nothing is merged."""
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def _write(self, names: Sequence[str]) -> None:
        base = self.get_base_layer()
        with torch.no_grad():
            down, up, weight = self._factors(names)
            backend = _backend(self.options)
            try:
                merged = merge(weight, down, up, scaling=1.0, rounding="nearest", seed=None, backend=backend)
            except ValueError:
                raise not_finite(names) from None
        base.weight = nn.Parameter(as_matrix(merged, is_conv1d(base)), requires_grad=False)

    def _factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """D [K,Σr] and s·U [N,Σr] of adapters, and W [N,K]."""
        base = self.get_base_layer()
        weight = as_matrix(base.weight, is_conv1d(base)).detach()
        networks = [self._network(name) for name in names]
        branches = [n.branch(neat_features(weight, n.A, **n.shape, backend=_backend(self.options))) for n in networks]
        down, up = [b.down for b in branches], [b.scaled_up() for b in branches]
        return torch.cat(down, dim=1), torch.cat(up, dim=1), weight


class NeatLinear(FusedNetworks, _Unfused):
    """A frozen linear layer of a model under PEFT with Neat adapters, on the fused path."""

    def explain(self, x: Tensor) -> str:
        """What a forward with x would run, in words.

        Args:
            x: an input of the layer; only its dtype, its device and the number of its tokens are looked at.
        """
        unfused = "eager torch" if is_trained(self.get_base_layer()) else "an error"
        return super().explain(x).replace("PEFT's own forward", unfused)

    def _known_names(self) -> Collection[str]:
        return self.neat_A.keys()

    def _obstacle(self, name: str) -> str | None:
        chain = (*self.neat_encoders[name], *self.neat_decoders[name])
        return hangs_on(self.neat_A[name], self.neat_B[name], *chain)

    def _settings(self) -> Settings:
        dtypes = {self.options[name].compute_dtype for name in self._fused_names()}
        # Where adapters differ, the widest of what they ask for.
        return Settings(dtypes.pop() if len(dtypes) == 1 else torch.float32, _backend(self.options))

    def _network(self, name: str) -> Network:
        options = self.options[name]
        return Network(
            self.neat_A[name].weight,
            self.neat_B[name].weight,
            tuple(linear.weight for linear in self.neat_encoders[name]),
            tuple(linear.weight for linear in self.neat_decoders[name]),
            options.orientation,
            options.activation,
            options.scaling,
            options.dropout,
        )

    def __repr__(self) -> str:
        return "neat." + super().__repr__()


def _backend(options: dict[str, LayerOptions]) -> str:
    """The backend that the adapters of a layer ask for: at most one explicit one."""
    explicit = sorted({o.backend for o in options.values()} - {"auto"})
    if len(explicit) > 1:
        raise ValueError(f"the adapters of one layer must run on one backend, got {' and '.join(explicit)}")
    return explicit[0] if explicit else "auto"


def is_trained(base: nn.Module) -> bool:
    """Whether W takes part in autograd, as in the flat parameter that FSDP1 makes of a frozen W and what is trained."""
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and weight.requires_grad
