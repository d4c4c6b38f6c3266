"""NeatModel: the tuner behind NeatConfig, which puts a Neat layer around each linear layer that is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING
from torch import nn

from neat_kernels.base_layer import is_conv1d
from neat_kernels.integrations.peft.bases import packed_weight
from neat_kernels.integrations.peft.merging import quantization_of
from neat_kernels.integrations.peft.neat.config import NeatConfig
from neat_kernels.integrations.peft.neat.layer import NeatLayer, NeatLinear


class NeatModel(BaseTuner):
    """A model with Neat adapters, made by `peft.get_peft_model(model, NeatConfig(...))`.

    Args:
        model: the model to adapt.
        config: what to adapt, and how.
        adapter_name: name of the first adapter.

    Raises:
        NotImplementedError: a layer that is named is no linear layer of a known kind.
        ValueError: `layer_options` names a layer that is not adapted, or a layer cannot be adapted where it is.

    Source: arXiv 2410.01870.
    """

    prefix: str = "neat_"
    tuner_layer_cls = NeatLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_PEANUT_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to a model, as PEFT does."""
        modules = {name for name, _ in model.named_modules()}
        config: NeatConfig = self.peft_config[adapter_name]
        if strangers := sorted(set(config.layer_options or {}) - modules):
            raise ValueError(f"layer_options must name layers of the model in full, got {strangers[0]!r}")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        # It makes new parameters, for which a layer would keep no features.
        for layer in self.model.modules():
            if isinstance(layer, NeatLinear):
                layer.invalidate()

    def _create_and_replace(
        self,
        peft_config: NeatConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        options = peft_config.of_layer(current_key)
        how = {"init_weights": peft_config.init_weights, "inference_mode": peft_config.inference_mode}
        if isinstance(target, NeatLayer):
            target.update_layer(adapter_name, options, **how)
            return
        _check_target(target, parent, current_key)
        layer = NeatLinear(target, adapter_name, options, **how)
        layer._neat_quantization = quantization_of(self.model)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, NeatLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # PEFT's would copy an attribute `weight`, which a head of several layers and HQQ's layer do not have.
            setattr(parent, child_name, new_module)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of two networks' parameters is not the network of the weighted sum of their ΔW."""
        raise NotImplementedError(
            "add_weighted_adapter is not defined for NEAT: expected a method that is linear in its parameters, such as "
            "LoRA; set_adapter([first, second]) adds the updates of several adapters up"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "adapter_names (several adapters in one batch) is not supported for NEAT: expected one active set of "
                "adapters for a batch; call set_adapter() and run the adapters' samples apart"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for chain in ("neat_encoders", "neat_decoders"):
            # The adapter's name is followed by an index here, where PEFT expects the parameter's name.
            if f".{chain}.{adapter_name}." in key:
                return key.replace(f".{chain}.{adapter_name}.", f".{chain}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


def _check_target(target: nn.Module, parent: nn.Module, name: str) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"{name} cannot be adapted: nn.MultiheadAttention reads its weight and never calls it, so that an adapter "
            "would have no effect; expected it among exclude_modules"
        )
    if packed_weight(base) is not None:
        return
    weight = getattr(base, "weight", None)
    linear = is_conv1d(base) or type(base).forward is nn.Linear.forward
    if not linear or type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        raise NotImplementedError(
            f"NEAT does not support target modules of type {type(base)} with a weight of type {type(weight).__name__} "
            f"and dtype {getattr(weight, 'dtype', None)}: expected nn.Linear or Conv1D of at least 16 bits, or a layer "
            f"quantised by bitsandbytes, torchao or HQQ; got {name}"
        )
