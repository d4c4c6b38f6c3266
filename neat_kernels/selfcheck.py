"""Does each backend compute on this machine what the reference computes in float64?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from neat_kernels import functional, reference
from neat_kernels.environment import devices
from neat_kernels.plan import available_backends, device_obstacle

# Large enough for csrc to take every product, and no multiple of any tile.
TOKENS, OUT_FEATURES, IN_FEATURES, RANK = 151, 163, 193, 9
SCALING = 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 0


@dataclass(frozen=True)
class Case:
    """One layer to check."""

    orientation: str
    depth: int
    activation: str

    def __str__(self) -> str:
        return f"{self.orientation}, depth {self.depth}, {self.activation}"


CASES = (Case("out", 0, "relu"), Case("in", 0, "relu"), Case("out", 2, "sin2pi"), Case("in", 2, "gelu"))


@dataclass(frozen=True)
class Outcome:
    """How far one backend is from float64 in one case.

    Args:
        backend: its name.
        device: where it ran.
        dtype: of every tensor.
        case: the layer.
        tensor: the output or gradient with the least room to its limit.
        error: its relative error in the Frobenius norm.
        limit: the largest error that rounding explains.
        failure: the error that was raised, if one was.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    case: Case
    tensor: str = ""
    error: float = float("inf")
    limit: float = 0.0
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return not self.failure and self.error <= self.limit


def self_check() -> Iterator[Outcome]:
    """Yield the outcome of every case on every backend that is available, on each device it runs on."""
    for backend, reason in available_backends().items():
        for device in backend_devices(backend) if reason is None else ():
            for dtype in DTYPES:
                for case in CASES:
                    yield check(Outcome(backend, device, dtype, case))


def backend_devices(backend: str) -> list[torch.device]:
    """The devices that a backend computes on."""
    return [device for device in devices() if backend != "triton" or device_obstacle(device) is None]


def check(outcome: Outcome) -> Outcome:
    """Run one case and compare it with float64."""
    inputs = draw_inputs(outcome.case, outcome.dtype)
    exact = run_reference({name: tensor.double() for name, tensor in inputs.items()}, outcome.case)
    eager = run_reference(inputs, outcome.case)
    try:
        there = {name: tensor.to(outcome.device) for name, tensor in inputs.items()}
        computed = run_backend(there, outcome.case, outcome.backend)
    except Exception as error:  # whatever a backend raises is what this check is here to show
        return replace(outcome, failure=f"{type(error).__name__}: {error}")
    return worst(outcome, computed, eager, exact)


def worst(outcome: Outcome, computed: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> Outcome:
    """The outcome for the tensor whose error comes closest to its limit or is furthest beyond it."""
    unit = torch.finfo(outcome.dtype).eps / 2
    errors = {name: relative_error(computed[name], value) for name, value in exact.items()}
    limits = {name: 1.5 * relative_error(eager[name], value) + 8 * unit for name, value in exact.items()}
    name = max(errors, key=lambda name: errors[name] / limits[name] if errors[name] == errors[name] else float("inf"))
    return replace(outcome, tensor=name, error=errors[name], limit=limits[name])


def relative_error(computed: Tensor, exact: Tensor) -> float:
    """‖computed − exact‖ / ‖exact‖ in the Frobenius norm, in float64 on the CPU."""
    return float((computed.detach().cpu().double() - exact).norm() / exact.norm())


def draw_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one case, rounded to its dtype; drawn on the CPU, so that every machine checks the same ones."""
    generator = torch.Generator().manual_seed(SEED)
    across = OUT_FEATURES if case.orientation == "out" else IN_FEATURES
    shapes = {
        "x": (TOKENS, IN_FEATURES),
        "weight": (OUT_FEATURES, IN_FEATURES),
        "A": (RANK, across),
        "B": (across, RANK),
        "bias": (OUT_FEATURES,),
        "dy": (TOKENS, OUT_FEATURES),
    }
    shapes |= {f"{chain}.{i}": (RANK, RANK) for chain in ("encoders", "decoders") for i in range(case.depth)}
    # Small enough that sin2pi's chain does not amplify rounding until any error would pass.
    scale = {"weight": IN_FEATURES**-0.5, "A": 0.3, "B": RANK**-0.5}
    scale |= {name: 0.5 * RANK**-0.5 for name in shapes if "coders" in name}
    return {
        name: (scale.get(name, 1.0) * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def run_reference(inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Output and gradients of the reference, in the inputs' own dtype."""
    return outputs(reference.neat_linear, inputs, case)


def run_backend(inputs: dict[str, Tensor], case: Case, backend: str) -> dict[str, Tensor]:
    """Output and gradients of one backend, which runs or raises."""
    return outputs(partial(functional.neat_linear, backend=backend), inputs, case)


def outputs(function: Callable[..., Tensor], inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """y and the gradient of every input but the frozen weight."""
    leaves = {name: tensor.clone().requires_grad_(name != "weight") for name, tensor in inputs.items() if name != "dy"}
    y = function(
        *(leaves[name] for name in ("x", "weight", "A", "B", "bias")),
        encoders=[leaves[f"encoders.{i}"] for i in range(case.depth)],
        decoders=[leaves[f"decoders.{i}"] for i in range(case.depth)],
        orientation=case.orientation,
        activation=case.activation,
        scaling=SCALING,
    )
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(y, list(trained.values()), inputs["dy"])
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(trained, gradients, strict=True)}
