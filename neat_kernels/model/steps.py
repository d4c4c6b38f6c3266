"""The ways to run a layer on a GPU: ours by plan, in training and in inference, and what it is compared with."""

from __future__ import annotations

from neat_kernels.kernels import launch
from neat_kernels.model import features, tokens
from neat_kernels.model.devices import Device
from neat_kernels.model.gemm import fused_up_to
from neat_kernels.model.work import HALF, Layer, Step
from neat_kernels.plan import FUSED_UP_TO

PLANS = ("fused", "cublas")


def plans(layer: Layer) -> tuple[str, ...]:
    """The plans that the kernels have for a layer: fp32 goes to the vendor's GEMM alone."""
    return PLANS if layer.dtype in HALF else ("cublas",)


def target_of(device: Device) -> launch.Target:
    """What launches on a device are configured for."""
    return launch.Target(device.arch, device.multiprocessors)


def aligned_loads(device: Device) -> str:
    """How the fused GEMM loads matrices with aligned rows on a device."""
    return "descriptors" if launch.has_descriptors(target_of(device)) else "pointers"


def training(layer: Layer, device: Device, plan: str) -> Step:
    """One training step of a layer whose adapter and input need gradients, by one plan or two ("fused:cublas")."""
    apply, dgrad = split_plan(plan)
    target = target_of(device)
    side = tokens.Tokens(layer, target)
    return Step(
        f"neat-kernels, {plan}",
        features.forward(layer, target) + tokens.forward(side, apply),
        tokens.backward(side, dgrad) + features.backward(layer, target),
    )


def inference(layer: Layer, device: Device, plan: str) -> Step:
    """One forward with cached features."""
    apply, _ = split_plan(plan)
    side = tokens.Tokens(layer, target_of(device), cached=True)
    return Step(f"neat-kernels, {plan}, cached features", tokens.forward(side, apply))


def split_plan(plan: str) -> tuple[str, str]:
    """The plans of apply and dgrad."""
    apply, _, dgrad = plan.partition(":")
    return apply, dgrad or apply


def chosen_plan(layer: Layer, device: Device) -> str:
    """The plan that the layer takes on a device where nobody has measured any."""
    if layer.dtype not in HALF:
        return "cublas"
    limit = fused_up_to(device, layer.dtype)
    limit = FUSED_UP_TO if limit is None else limit
    apply, dgrad = ("fused" if n <= limit else "cublas" for n in (layer.in_features, layer.out_features))
    return apply if apply == dgrad else f"{apply}:{dgrad}"
