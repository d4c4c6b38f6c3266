"""From (device, dtypes, sizes, requested backend) to the plan that runs a call, with the reason."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch

from neat_kernels import cpu
from neat_kernels.torch_backend.gemm import casts_blocks
from neat_kernels.vocabulary import BACKENDS, HALF_DTYPES, check_choice

# The rank up to which the kernels hold an r-wide tile in registers; above it the branch is a GEMM like any other.
MAX_R = 128
# Longest reduction for which the fused GEMM is chosen on a device that was not measured and that the cost model does
# not know.
FUSED_UP_TO = 2048
# Tokens and rank up to which one read of W each way serves both sides of a layer; a rule, since no device was measured.
# The rank is as large as registers allow (python -m benchmarks.gate). Orientation "out" writes and reads partial sums
# of the token product, 4·M / 256 of W's bytes (kernels/small_reads.py): at 32 tokens half of the read that it saves.
SMALL_BATCH, SMALL_BATCH_R, SMALL_BATCH_OUT = 128, 64, 32
_LOWEST_CAPABILITY = (8, 0)
_AMD_ARCHS = ("gfx942",)


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run here; nothing was computed on another one instead."""


@dataclass(frozen=True)
class Plan:
    """The way one call runs: backend, plan of the base GEMM, and why they were chosen."""

    backend: str
    base_gemm: str
    reason: str

    def __str__(self) -> str:
        return f"backend={self.backend}, base GEMM={self.base_gemm}: {self.reason}"


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run in this process, else the reason why it cannot."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {"torch": None, "triton": device_obstacle(device)}


@functools.cache
def _device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        import triton

        if triton.knobs.runtime.interpret:
            return None
        return "Triton needs a GPU, or its interpreter: TRITON_INTERPRET=1 in the environment of a new process"
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA and ROCm devices, not on {device.type}"
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return None if arch in _AMD_ARCHS else f"the Triton kernels need one of {', '.join(_AMD_ARCHS)}, got {arch}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LOWEST_CAPABILITY:
        return f"the Triton kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return None


def device_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device, or None."""
    return _device_obstacle(device)


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo along with this package.
device_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_obstacle(device: torch.device, dtypes: tuple[torch.dtype, ...], r: int) -> str | None:
    """Why the Triton kernels cannot take a call with these tensors, or None."""
    obstacle = device_obstacle(device)
    if obstacle is not None:
        return obstacle
    if torch.float64 in dtypes:
        return "the Triton kernels accumulate in float32 and take no float64"
    if r > MAX_R:
        return f"the Triton kernels take r up to {MAX_R}, got {r}"
    return None


def choose_backend(requested: str, device: torch.device, dtypes: tuple[torch.dtype, ...], r: int) -> str:
    """The backend that `requested` means for a call.

    Args:
        requested: "auto", or a backend that must run.
        device: where the tensors are.
        dtypes: of all tensors of the call.
        r: rank.

    Returns:
        The name of a backend that can run. "auto" takes "triton" on a GPU where that can run, else "torch"; on a CPU,
        where Triton has only its interpreter, always "torch".

    Raises:
        ValueError: `requested` is no backend.
        BackendUnavailableError: an explicit request cannot be met.
    """
    check_choice("backend", requested, BACKENDS)
    if requested == "torch" or (requested == "auto" and device.type == "cpu"):
        return "torch"
    obstacle = triton_obstacle(device, dtypes, r)
    if obstacle is None:
        return "triton"
    if requested == "auto":
        return "torch"
    raise BackendUnavailableError(f"backend={requested!r} was requested for tensors on {device}, but {obstacle}")


class FusedLimit(NamedTuple):
    """The longest reduction for which the fused GEMM is chosen, and where that comes from."""

    length: int
    source: str


@functools.cache
def fused_limit(device: torch.device, dtype: torch.dtype) -> FusedLimit:
    """The limit for half matrices on a GPU: measured where there is a measurement, else predicted, else a rule.

    It does not depend on the number of tokens, since the plan is part of an operator's arguments: a batch of another
    size must not compile anything.
    """
    from neat_kernels.model.devices import reported_as
    from neat_kernels.model.gemm import fused_up_to
    from neat_kernels.model.measured import measured_plan

    name = torch.cuda.get_device_properties(device).name
    measured = measured_plan(name, _short(dtype))
    if measured is not None:
        return FusedLimit(measured.fused_up_to, f"measured on {name}: {measured.source}")
    known = reported_as(name)
    predicted = None if known is None else fused_up_to(known, "bf16" if dtype == torch.bfloat16 else "fp16")
    if predicted is not None:
        return FusedLimit(predicted, f"from the cost model of {name}, a prediction and not a measurement")
    return FusedLimit(FUSED_UP_TO, f"a rule, since {name} was not measured and the cost model does not know it")


def _fused_up_to(device: torch.device, dtype: torch.dtype) -> int:
    return fused_limit(device, dtype).length


_fused_up_to._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_gemm(device: torch.device, dtype: torch.dtype, length: int) -> str:
    """How the Triton backend runs a base GEMM that reduces over `length`: "fused" or "cublas".

    fp32 goes to cuBLAS, which follows torch's TF32 setting and has the faster IEEE kernels.
    """
    if device.type == "cpu" or (dtype in HALF_DTYPES and length <= _fused_up_to(device, dtype)):
        return "fused"
    return "cublas"


def is_small_batch(
    backend: str, device: torch.device, dtype: torch.dtype, orientation: str, tokens: int, r: int
) -> bool:
    """Whether `kernels/small_batch.py` runs a layer, whose features are not given, under so many tokens of this dtype.

    Asked inside the operators: the number of tokens must not be part of their arguments.
    """
    multiplies = dtype in HALF_DTYPES or device.type == "cpu"
    return backend != "torch" and multiplies and 0 < tokens <= most_of_a_small_batch(orientation, r)


def most_of_a_small_batch(orientation: str, r: int) -> int:
    """The most tokens that are few for a layer; 0 where its rank is too large for any."""
    if r > SMALL_BATCH_R:
        return 0
    return min(SMALL_BATCH - r, SMALL_BATCH_OUT) if orientation == "out" else SMALL_BATCH - r


def token_backend(backend: str, device: torch.device, dtype: torch.dtype, in_features: int, out_features: int) -> str:
    """What the operators of the token side are told: "torch", or "triton:" and the plans of apply and dgrad."""
    if backend == "torch":
        return backend
    return f"triton:{choose_gemm(device, dtype, in_features)}:{choose_gemm(device, dtype, out_features)}"


def gemm_plans(token_backend: str) -> tuple[str, str]:
    """The plans of apply and dgrad in what `token_backend` returned."""
    _, apply, dgrad = token_backend.split(":")
    return apply, dgrad


def make_plan(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    r: int,
    in_features: int,
    out_features: int,
    orientation: str = "out",
    tokens: int | None = None,
) -> Plan:
    """The plan that an input of this dtype on this device would take, for `FusedNeatLinear.explain`.

    `tokens` is how many there are where the features are computed along, else None.
    """
    backend = choose_backend(requested, device, (dtype, adapter_dtype), r)
    asked = "requested" if requested != "auto" else _why_auto(device, (dtype, adapter_dtype), r)
    if backend == "triton":
        apply, dgrad = gemm_plans(token_backend(backend, device, dtype, in_features, out_features))
        if tokens is not None and is_small_batch(backend, device, dtype, orientation, tokens, r):
            most = most_of_a_small_batch(orientation, r)
            why = f"x and the features share a read of W up to {most} tokens, a rule"
            return Plan(backend, "small batch", f"{asked}; {why}{_measured_launches(device)}")
        gemm = apply if apply == dgrad else f"{apply} forward, {dgrad} backward"
        return Plan(backend, gemm, f"{asked}; {_why_gemm(device, dtype)}{_measured_launches(device)}")
    if casts_blocks(device, dtype):
        why = f"fp32 casts of row blocks, since this CPU has no fast {_short(dtype)} GEMM"
        return Plan(backend, "blocks", f"{asked}; {why}{_narrow_products(device, dtype, adapter_dtype)}")
    why = "torch's GEMM and the low-rank product add up in place"
    return Plan(backend, "native", f"{asked}; {why}{_narrow_products(device, dtype, adapter_dtype)}")


def _narrow_products(device: torch.device, *dtypes: torch.dtype) -> str:
    """A clause on what multiplies r-wide matrices on a CPU."""
    if device.type != "cpu":
        return ""
    obstacle = "csrc takes no float64" if torch.float64 in dtypes else cpu.obstacle()
    return f"; products of rank r by {'csrc, where large enough' if obstacle is None else f'torch: {obstacle}'}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why_auto(device: torch.device, dtypes: tuple[torch.dtype, ...], r: int) -> str:
    if device.type == "cpu":
        return "chosen by auto, since on a CPU Triton has only its interpreter"
    obstacle = triton_obstacle(device, dtypes, r)
    return f"chosen by auto, since {obstacle or 'the Triton kernels run on this device'}"


def _why_gemm(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu":
        return "interpreted on the CPU, for tests and not for speed"
    if dtype not in HALF_DTYPES:
        return f"cuBLAS has the faster {_short(dtype)} GEMM, and follows torch's TF32 setting"
    limit = fused_limit(device, dtype)
    return f"fused up to a reduction of {limit.length}, cuBLAS beyond: {limit.source}"


def _measured_launches(device: torch.device) -> str:
    """A clause on the launch configurations, where some were measured on this device."""
    if device.type == "cpu":
        return ""
    from neat_kernels.kernels.launch import measured_on

    name = torch.cuda.get_device_properties(device).name
    date = measured_on(name)
    return "" if date is None else f"; launches as measured on {name}, {date}"
