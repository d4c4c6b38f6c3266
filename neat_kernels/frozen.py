"""The part of an adapted layer that holds a frozen W: shared with another module, merged and put back, sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neat_kernels.base_layer import as_matrix
from neat_kernels.vocabulary import is_sharded


class FrozenLinear(nn.Module):
    """W [N,K] and the bias of a linear layer, frozen; `weight` is W, or W + ΔW while the layer is merged."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _original: nn.Module | None
    _unmerged: nn.Parameter | None
    _is_sharded: bool

    def _share(self, linear: nn.Module, original: nn.Module | None) -> None:
        """Take and freeze the parameters of `linear`; `original` is the module that plain_linear() gives back."""
        self._hold(_original=original, _unmerged=None, _is_sharded=False)
        self.transposed = not isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.weight, linear.bias  # type: ignore[assignment]
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.out_features, self.in_features = self._matrix().shape

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen W itself, whether or not the layer is merged, in the layout of the base layer."""
        return self._unmerged if self._unmerged is not None else self.weight

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds W + ΔW."""
        return self._unmerged is not None

    def plain_linear(self, weight: nn.Parameter) -> nn.Module:
        """The original module (a new nn.Linear for a layer made from sizes) with `weight` and this layer's bias."""
        linear = self._original
        if linear is None:
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = weight, self.bias  # type: ignore[assignment]
        return linear.train(self.training)

    def _matrix(self) -> Tensor:
        return as_matrix(self.weight, self.transposed)

    def _refuse_shards(self) -> None:
        if self._is_sharded:
            raise RuntimeError(
                "expected a layer whose W is whole, got one that fully_shard() has sharded, which would put W back"
            )

    def _put_merged(self, merged: nn.Parameter) -> None:
        self._hold(_unmerged=self.weight)
        self.weight = merged

    def _put_unmerged_back(self) -> None:
        assert self._unmerged is not None
        self.weight = self._unmerged
        self._hold(_unmerged=None)

    def _hold(self, **references: nn.Module | nn.Parameter | bool | None) -> None:
        # Past nn.Module.__setattr__, which would register the original module and the unmerged W a second time.
        self.__dict__.update(references)

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_parameters", {}).get(name)
        super().__setattr__(name, value)
        if not isinstance(before, nn.Parameter) or not isinstance(value, nn.Parameter):
            return
        if is_sharded(value):
            self._hold(_is_sharded=True)
        # The original module follows where another parameter takes the place of W or the bias, as under fully_shard()
        # and load_state_dict(assign=True): it would keep the old one alive.
        if self._original is not None and self._unmerged is None and getattr(self._original, name, None) is before:
            setattr(self._original, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            moved = fn(self._unmerged.data)
            if torch._has_compatible_shallow_copy_type(self._unmerged, moved):
                self._unmerged.data = moved
            else:
                self._hold(_unmerged=nn.Parameter(moved, requires_grad=False))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A checkpoint holds W and the adapter, whether or not they are merged just now.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            destination[prefix + "weight"] = self._unmerged if keep_vars else self._unmerged.detach()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'the layer'} is merged: call unmerge() before load_state_dict()"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)
