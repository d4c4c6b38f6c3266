"""The error budget of a fused result against float64 on the same, already rounded inputs, in the Frobenius norm.

err <= 1.5 * err(eager) + u * (8 * |ref| + sqrt(L) * ||P| |Q||)

eager is neat_kernels.reference with the layer's rounding points, u the unit roundoff of the accumulator, L the length
of the reductions that lead to the result and |P| |Q| the product of absolute values that its last one sums.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import neat_kernels as nk

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}
# Of TF32x3, which multiplies fp32 on tensor cores: an operand is two pieces of 11 bits, and the product of the lower
# ones is left out.
UNIT_TF32X3 = 3 * 2.0**-22


@dataclass
class Case:
    """One layer call with every tensor drawn; `leaves` are the tensors whose gradients are compared."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor | None
    dy: Tensor
    encoders: list[Tensor] = field(default_factory=list)
    decoders: list[Tensor] = field(default_factory=list)
    options: dict = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "A": self.A, "B": self.B, "bias": self.bias}
        named |= {f"encoders.{i}": t for i, t in enumerate(self.encoders)}
        named |= {f"decoders.{i}": t for i, t in enumerate(self.decoders)}
        return {name: t for name, t in named.items() if t is not None}

    def map(self, fn) -> "Case":
        return Case(
            fn(self.x),
            fn(self.weight),
            fn(self.A),
            fn(self.B),
            None if self.bias is None else fn(self.bias),
            fn(self.dy),
            [fn(t) for t in self.encoders],
            [fn(t) for t in self.decoders],
            dict(self.options),
        )


def draw_case(
    tokens,
    out_features,
    in_features,
    r,
    *,
    dtype=torch.float32,
    adapter_dtype=None,
    orientation="out",
    depth=0,
    activation="gelu",
    bias=True,
    generator=None,
    **options,
) -> Case:
    """Random inputs with B != 0 and features of order one; for relu, redrawn until no Z is near its kink."""
    g = generator or torch.Generator().manual_seed(hash((tokens, out_features, in_features, r)) % 2**31)
    columns = out_features if orientation == "out" else in_features
    adapter_dtype = adapter_dtype or dtype

    def randn(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(to)

    def chain():
        # Gains near one, or four chained sines of slope 2*pi would push fp16 gradients out of range.
        return [randn(r, r, scale=r**-0.5 / steepness(activation), to=adapter_dtype) for _ in range(depth)]

    weight = randn(out_features, in_features, scale=in_features**-0.5)
    for _ in range(100):
        A = randn(r, columns, scale=(in_features / columns) ** 0.5, to=adapter_dtype)
        Z = (weight.double().t() if orientation == "out" else weight.double()) @ A.double().t()
        if activation != "relu" or Z.abs().min() > 1e-5 * Z.abs().max():
            break
    return Case(
        x=randn(tokens, in_features),
        weight=weight,
        A=A,
        B=randn(columns, r, scale=r**-0.5, to=adapter_dtype),
        bias=randn(out_features) if bias else None,
        dy=randn(tokens, out_features),
        encoders=chain(),
        decoders=chain(),
        options={"orientation": orientation, "activation": activation, **options},
    )


def steepness(activation: str) -> float:
    """The order of the largest slope of σ."""
    return 2 * torch.pi if activation == "sin2pi" else 1.0


def evaluate(fn, case: Case, frozen: Iterable[str] = (), **more) -> dict[str, Tensor]:
    """y and the gradient of every leaf that is not frozen, on the very tensors of the case: a clone is contiguous."""
    leaves = {name: t.detach().requires_grad_(name not in frozen) for name, t in case.leaves().items()}
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    encoders = [t for name, t in leaves.items() if name.startswith("encoders")]
    decoders = [t for name, t in leaves.items() if name.startswith("decoders")]
    y = fn(
        leaves["x"],
        case.weight,
        leaves["A"],
        leaves["B"],
        leaves.get("bias"),
        encoders=encoders,
        decoders=decoders,
        **{**case.options, **more},
    )
    grads = torch.autograd.grad(y, list(trained.values()), case.dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}}


def slack(case: Case) -> dict[str, float]:
    """sqrt(L) * ||P| |Q|| of every result, from float64 absolute values."""
    case = case.map(lambda t: t.double())
    tokens, in_features, out_features = case.x.shape[0], case.x.shape[1], case.dy.shape[1]
    r = case.A.shape[0]
    scaling = abs(case.options.get("scaling", 1.0))
    orientation, activation = case.options["orientation"], case.options["activation"]
    H = nk.reference.neat_features(
        case.weight,
        case.A,
        encoders=case.encoders,
        decoders=case.decoders,
        orientation=orientation,
        activation=activation,
    )
    D, U = (H, case.B) if orientation == "out" else (case.B, H)
    S, dS = case.x @ D, scaling * case.dy @ U
    x, W, dy = case.x.abs(), case.weight.abs(), case.dy.abs()
    dD, dU = x.t() @ dS.abs(), scaling * dy.t() @ S.abs()
    dH, dB = (dD, dU) if orientation == "out" else (dU, dD)
    # dH bounds dZ up to the slope of σ.
    steep = steepness(activation)
    dA = (W @ dH if orientation == "out" else W.t() @ dH) * steep
    norms = {
        "y": (x @ W.t() + scaling * x @ D.abs() @ U.abs().t(), in_features + r),
        "dx": (dy @ W + dS.abs() @ D.abs().t(), out_features + r),
        "dB": (dB, tokens + in_features + out_features),
        "dA": (dA, tokens + in_features + out_features),
        "dbias": (dy.sum(0), tokens),
    }
    chain = steep * dH.norm() * H.norm()
    result = {name: (length**0.5) * product.norm().item() for name, (product, length) in norms.items()}
    for i in range(len(case.encoders)):
        for kind in ("encoders", "decoders"):
            result[f"d{kind}.{i}"] = (tokens + in_features + out_features) ** 0.5 * chain.item()
    return result


def branch_rounding(case: Case) -> dict[str, float]:
    """What it costs to write the branch in x's dtype before the GEMM accumulates onto it, as the native plan does."""
    dtype, case = case.x.dtype, case.map(lambda t: t.double())
    leaves = {"orientation": case.options["orientation"], "activation": case.options["activation"]}
    H = nk.reference.neat_features(case.weight, case.A, encoders=case.encoders, decoders=case.decoders, **leaves)
    D, U = (H, case.B) if case.options["orientation"] == "out" else (case.B, H)
    scaling = case.options.get("scaling", 1.0)
    branch = scaling * case.x @ D @ U.t() + (0.0 if case.bias is None else case.bias)
    unit = torch.finfo(dtype).eps / 2
    return {"y": unit * branch.norm().item(), "dx": unit * (scaling * case.dy @ U @ D.t()).norm().item()}


def assert_within_budget(
    fused: dict[str, Tensor],
    eager: dict[str, Tensor],
    case: Case,
    extra: dict[str, float] | None = None,
    unit: float | None = None,
) -> None:
    """Compare every result of `fused` with float64, allowing what the budget (and a plan's extra rounding) allows.

    `unit` is the unit roundoff of products, where it is not the accumulator's.
    """
    exact = evaluate(nk.reference.neat_linear, case.map(lambda t: t.double()), **_exact_options(case))
    allowed_sum = slack(case)
    u = unit or UNIT_ROUNDOFF[case.x.dtype]
    for name, value in fused.items():
        assert value.shape == exact[name].shape
        assert torch.isfinite(value).all(), name
        error = (value.double() - exact[name]).norm().item()
        eager_error = (eager[name].double() - exact[name]).norm().item()
        allowed = 1.5 * eager_error + u * (8 * exact[name].norm().item() + allowed_sum[name])
        allowed += (extra or {}).get(name, 0.0)
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (eager {eager_error:.3e})"


def _exact_options(case: Case) -> dict:
    return {"compute_dtype": None} if "compute_dtype" in case.options else {}
