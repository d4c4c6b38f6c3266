"""Quantised linear layers that run on a CPU, each made from an nn.Linear, with the W that it multiplies."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn


class Base(NamedTuple):
    """How to quantise a linear layer, and how to dequantise it again by its library's own means."""

    make: Callable[[nn.Linear], nn.Module]
    weight: Callable[[nn.Module], torch.Tensor]
    config: Callable[[], object] | None = None  # torchao's configuration


def _bitsandbytes_4bit(kind, double):
    def make(linear):
        bnb = pytest.importorskip("bitsandbytes")
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type=kind,
            compress_statistics=double,
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    def weight(layer):
        import bitsandbytes as bnb

        weight = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            codes, state = bnb.functional._convert_weight_packed_for_cpu_inverse(
                weight.data, copy.copy(weight.quant_state)
            )
            return bnb.functional.dequantize_4bit(codes, state)
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)

    return Base(make, weight)


def _bitsandbytes_int8():
    def make(linear):
        bnb = pytest.importorskip("bitsandbytes")
        # A threshold of 0 keeps every column in int8.
        layer = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=0.0
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    def weight(layer):
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        return layer.weight.data.double() * (scales.double() / 127.0).unsqueeze(1)

    return Base(make, weight)


def _torchao(name):
    def config():
        return getattr(pytest.importorskip("torchao.quantization"), name)()

    def make(linear):
        layer = copy.deepcopy(linear)
        pytest.importorskip("torchao.quantization").quantize_(layer, config())
        return layer

    return Base(make, lambda layer: layer.weight.dequantize(), config)


def _hqq():
    def make(linear):
        pytest.importorskip("hqq")
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=4, group_size=32)
        return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")

    return Base(make, lambda layer: layer.dequantize())


BASES = {
    "nf4": _bitsandbytes_4bit("nf4", False),
    "nf4 double": _bitsandbytes_4bit("nf4", True),
    "fp4": _bitsandbytes_4bit("fp4", False),
    "bnb int8": _bitsandbytes_int8(),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
    "HQQ": _hqq(),
}
