"""What our subclasses of PEFT's layers share: the choice between the fused path and PEFT's own, and cached features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from neat_kernels import inference
from neat_kernels.cache import FeatureCache
from neat_kernels.integrations.peft.bases import is_hooked_part, matrix_shape
from neat_kernels.integrations.peft.branches import (
    Branch,
    Network,
    Route,
    Settings,
    route,
    run_branches,
    run_network,
)
from neat_kernels.integrations.peft.merging import (
    Original,
    delta_of_packed,
    merge_from_original,
    original_base,
    packed_base,
    quantise_merged,
    unmerge,
)
from neat_kernels.plan import make_plan
from neat_kernels.vocabulary import autocast_dtype, is_sharded


class FusedLayer(nn.Module):
    """Before a layer class of PEFT in a class's bases: its forward on the fused path wherever that can run.

    Whatever is not fused (a merged or disabled adapter, an adapter or base of another kind) runs PEFT's own forward.
    """

    _neat_settings: Settings
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    base_layer: nn.Module
    get_base_layer: Callable[[], nn.Module]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., N] of x [..., K]: the base layer and its active adapters."""
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        names = self._fused_names()
        if not names:
            return self.base_layer(x)
        way = self._route(names)
        return super().forward(x) if isinstance(way, str) else self._run(way, names, x)

    def explain(self, x: Tensor) -> str:
        """What a forward with x would run, in words.

        Args:
            x: an input of the layer; only its dtype, its device and the number of its tokens are looked at.
        """
        if self.disable_adapters or self.merged:
            return f"the base layer alone: the adapters are {'disabled' if self.disable_adapters else 'merged'}"
        names = self._fused_names()
        if not names:
            return "the base layer alone: no adapter is active"
        way = self._route(names)
        if isinstance(way, str):
            return f"PEFT's own forward: {way}"
        r, dtype = self._rank_and_dtype(names)
        out_features, in_features = matrix_shape(way.base)
        plan = make_plan(
            self._settings().backend,
            x.device,
            autocast_dtype(x),
            dtype,
            r,
            in_features,
            out_features,
            *self._along_with_features(way, names, x),
        )
        if way.weight is None:
            return f"the base layer is called ({way.why}), the branch is added: backend={plan.backend}"
        return str(plan)

    def _settings(self) -> Settings:
        return self._neat_settings

    def _route(self, names: list[str]) -> Route | str:
        for name in names:
            if obstacle := self._obstacle(name):
                return f"adapter {name!r}: {obstacle}"
        return route(self, self._settings())

    def _fused_names(self) -> list[str]:
        """The active adapters that this layer has."""
        known = self._known_names()
        return [name for name in self.active_adapters if name in known]

    def _known_names(self) -> Collection[str]:
        raise NotImplementedError

    def _obstacle(self, name: str) -> str | None:
        raise NotImplementedError

    def _along_with_features(self, way: Route, names: list[str], x: Tensor) -> tuple[str, int | None]:
        """The orientation, and how many tokens there are where one call computes features and tokens."""
        return "out", None

    def _run(self, way: Route, names: list[str], x: Tensor) -> Tensor:
        raise NotImplementedError

    def _rank_and_dtype(self, names: list[str]) -> tuple[int, torch.dtype]:
        raise NotImplementedError


class FusedNetworks(FusedLayer):
    """A fused layer whose adapters are Neat networks; their features are cached as FusedNeatLinear caches them."""

    _neat_cache: FeatureCache
    _neat_original: Original | None = None
    # What PEFT knows of how the model was quantised; merging needs it for torchao.
    _neat_quantization: Mapping[str, Any] = {}

    def _network(self, name: str) -> Network:
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW [N,K] of an adapter; over a quantised base of the dequantised W, in float32."""
        if packed_base(self) is None:
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        with original_base(self):
            return delta_of_packed(self, adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight, as PEFT does; a quantised one is quantised again."""
        self._neat_cache.drop()
        if packed_base(self) is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        elif names := self._to_merge(adapter_names):
            merge_from_original(self, names, lambda every: quantise_merged(self, safe_merge, every))

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        known = self._known_names()
        return [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in known]

    def unmerge(self) -> None:
        """Put the base weight back; a quantised one is the very tensor from before merge()."""
        self._neat_cache.drop()
        if self._neat_original is None:
            super().unmerge()  # type: ignore[misc]
        else:
            unmerge(self)
            self.invalidate()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        self.invalidate()

    def _run(self, way: Route, names: list[str], x: Tensor) -> Tensor:
        networks = [self._network(name) for name in names]
        # First: bitsandbytes repacks its weight, with other scales, in the first call in eval mode on a CPU.
        base = self.base_layer(x) if way.weight is None else None
        branches = self._cached(way, networks, x)
        if branches is None:
            if way.weight is not None and len(networks) == 1:
                return run_network(way, x, networks[0], self._settings(), self.training)
            branches = [network.branch(way.features(network)) for network in networks]
        elif way.weight is not None:
            settings, (down, up, *_) = self._settings(), branches[0]
            y = inference.linear(x, way.weight, way.bias, down, up, 1.0, settings.compute_dtype, settings.backend)
            if y is not None:
                return y
        return run_branches(way, x, base, branches, self._settings(), self.training)

    def _rank_and_dtype(self, names: list[str]) -> tuple[int, torch.dtype]:
        networks = [self._network(name) for name in names]
        return sum(network.A.shape[0] for network in networks), networks[0].A.dtype

    def _along_with_features(self, way: Route, names: list[str], x: Tensor) -> tuple[str, int | None]:
        networks = [self._network(name) for name in names]
        if way.weight is None or len(networks) > 1 or self._cacheable(way, networks) is not None:
            return "out", None
        return networks[0].orientation, x.shape[:-1].numel()

    def _cacheable(self, way: Route, networks: list[Network]) -> tuple[Tensor, ...] | None:
        """What the features are cached for, where nothing is trained and they may be kept; else None."""
        if self.training or torch.is_grad_enabled():
            return None
        parameters = self._feature_parameters(networks, way.base)
        return parameters if self._neat_cache.usable(parameters) else None

    def _cached(self, way: Route, networks: list[Network], x: Tensor) -> list[Branch] | None:
        """The adapters as one branch, where nothing is trained and the features may be kept."""
        parameters = self._cacheable(way, networks)
        if parameters is None:
            return None
        dtype = self._settings().for_tokens(x)["compute_dtype"] or autocast_dtype(x)
        key = (dtype, *((n.orientation, n.activation, n.scaling) for n in networks))
        factors = self._neat_cache.get(parameters, key)
        if factors is None:
            # Outside inference mode, so that what is kept serves later calls in any mode.
            with torch.inference_mode(False), torch.no_grad():
                branches = [network.branch(way.features(network)) for network in networks]
                kept = inference.factor_dtype(x.device, dtype)
                down = torch.cat([branch.down.to(dtype) for branch in branches], dim=1).to(kept)
                up = torch.cat([branch.scaled_up().to(dtype) for branch in branches], dim=1).to(kept)
            factors = self._neat_cache.put(parameters, key, (down, up))
        return [Branch(*factors, 1.0, 0.0)]

    def _feature_parameters(self, networks: list[Network], base: nn.Module) -> tuple[Tensor, ...]:
        # A quantised W changes in no way but through merge(), unmerge() and _apply(), which drop the cache.
        weight = getattr(base, "weight", None)
        own = tuple(p for network in networks for p in network.parameters)
        return (weight, *own) if type(weight) is nn.Parameter else own

    def invalidate(self) -> None:
        """Drop cached features; needed after parameters were written through `.data`, which no version counter sees."""
        names = [name for name in self._fused_names() if self._obstacle(name) is None]
        self._neat_cache.reset(self._feature_parameters([self._network(name) for name in names], self.get_base_layer()))

    def train(self, mode: bool = True) -> FusedNetworks:
        """Set the training mode and drop cached features."""
        super().train(mode)
        self._neat_cache.drop()
        return self

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Set the active adapters, as PEFT does."""
        super().set_adapter(*args, **kwargs)  # type: ignore[misc]
        self.invalidate()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT does."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.invalidate()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedNetworks:
        # torch.utils.swap_tensors refuses tensors that have a weak reference.
        self._neat_cache.forget()
        super()._apply(fn, recurse)
        self.invalidate()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_neat_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._neat_cache = FeatureCache()
        self.invalidate()


def after_load(layer: nn.Module, incompatible_keys: Any) -> None:
    """A hook of load_state_dict: assign=True puts new parameters in place, which the cache must come to know."""
    if isinstance(layer, FusedNetworks):
        layer.invalidate()


def hangs_on(*linears: nn.Module) -> str | None:
    """Why what PEFT calls cannot be replaced by a product with its weight, or None."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            return f"a part of it is a {type(linear).__name__}, not nn.Linear"
        if is_sharded(linear.weight):
            return "a part of it is sharded"
        if is_hooked_part(linear):
            return "hooks hang on a part of it"
    return None
