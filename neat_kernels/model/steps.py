"""The ways to run a layer on a GPU: ours by plan, in training and in inference, and what it is compared with."""

from __future__ import annotations

from neat_kernels.kernels import launch
from neat_kernels.model import features, small, tokens
from neat_kernels.model.devices import Device
from neat_kernels.model.gemm import fused_up_to
from neat_kernels.model.measured import measured_limit
from neat_kernels.model.work import HALF, Layer, Step, is_small_batch
from neat_kernels.plan import FUSED_UP_TO

# Plans of the base GEMM, and the one of a small batch, which has none.
GEMM_PLANS = ("fused", "cublas")
PLANS = (*GEMM_PLANS, "small")


def plans(layer: Layer) -> tuple[str, ...]:
    """The plans that the kernels have for a layer: fp32 goes to the vendor's GEMM alone."""
    gemms = GEMM_PLANS if layer.dtype in HALF else ("cublas",)
    return (*gemms, "small") if is_small_batch(layer) else gemms


def target_of(device: Device) -> launch.Target:
    """What launches on a device are configured for."""
    return launch.Target(device.arch, device.multiprocessors)


def aligned_loads(device: Device) -> str:
    """How the fused GEMM loads matrices with aligned rows on a device."""
    return "descriptors" if launch.has_descriptors(target_of(device)) else "pointers"


def training(layer: Layer, device: Device, plan: str) -> Step:
    """One training step of a layer whose adapter and input need gradients, by one plan or two ("fused:cublas")."""
    target = target_of(device)
    side = tokens.Tokens(layer, target)
    if plan == "small":
        return Step(f"neat-kernels, {plan}", small.forward(side), small.backward(side))
    apply, dgrad = split_plan(plan)
    down, dH, left = tokens.down_backward(side)
    return Step(
        f"neat-kernels, {plan}",
        features.forward(layer, target) + tokens.forward(side, apply),
        (
            *tokens.up_backward(side, dgrad),
            tokens.dgrad(side, dgrad),
            *down,
            *features.backward(layer, target, dH, left),
        ),
    )


def inference(layer: Layer, device: Device, plan: str) -> Step:
    """One forward with cached features, which leave nothing to share with a read of W: "small" is the chosen GEMM."""
    plan = _chosen_gemm(layer, device) if plan == "small" else plan
    apply, _ = split_plan(plan)
    side = tokens.Tokens(layer, target_of(device), cached=True)
    return Step(f"neat-kernels, {plan}, cached features", tokens.forward(side, apply))


def split_plan(plan: str) -> tuple[str, str]:
    """The plans of apply and dgrad."""
    apply, _, dgrad = plan.partition(":")
    return apply, dgrad or apply


def chosen_plan(layer: Layer, device: Device) -> str:
    """The plan that the layer takes in training on a device."""
    return "small" if is_small_batch(layer) else _chosen_gemm(layer, device)


def _chosen_gemm(layer: Layer, device: Device) -> str:
    if layer.dtype not in HALF:
        return "cublas"
    limit = measured_limit(device.reported, layer.dtype)
    limit = fused_up_to(device, layer.dtype) if limit is None else limit
    limit = FUSED_UP_TO if limit is None else limit
    apply, dgrad = ("fused" if n <= limit else "cublas" for n in (layer.in_features, layer.out_features))
    return apply if apply == dgrad else f"{apply}:{dgrad}"
