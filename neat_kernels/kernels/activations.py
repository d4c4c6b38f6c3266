"""The activations of the feature network and their derivatives, as device functions on fp32 tiles.

h = σ(z)    dz = dh·σ'(z)

Built from arithmetic, exp and erf alone: tl.sin has a slow path through local memory for huge
arguments, which the range reduction below makes needless, and there is no tanh that every target shares.
"""

import triton
import triton.language as tl

_TWO_PI = tl.constexpr(6.283185307179586)
_INV_TWO_PI = tl.constexpr(0.15915494309189535)
# 2π in three parts with few enough bits that n times the first two is exact for |n| < 2¹².
_TWO_PI_HIGH = tl.constexpr(6.28125)
_TWO_PI_MIDDLE = tl.constexpr(0.0019350051879882812)
_TWO_PI_LOW = tl.constexpr(3.019915981956753e-07)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_SQRT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def _sin_quarter(u):
    """sin(u) for |u| <= π/2: Taylor to u¹¹, whose next term is 6e-8."""
    s = u * u
    p = 1.0 / 362880 - s * (1.0 / 39916800)
    p = 1.0 / 120 - s * (1.0 / 5040 - s * p)
    return u * (1.0 - s * (1.0 / 6 - s * p))


@triton.jit
def _sin_turns(t):
    """sin(2πt) for |t| <= 1/2."""
    t = tl.where(t > 0.25, 0.5 - t, t)
    t = tl.where(t < -0.25, -0.5 - t, t)
    return _sin_quarter(t * _TWO_PI)


@triton.jit
def _cos_turns(t):
    """cos(2πt) for |t| <= 1/2."""
    return _sin_quarter((0.25 - tl.abs(t)) * _TWO_PI)


@triton.jit
def _turns(z):
    """z - rint(z), exact; a tie may go either way, since the sine has period one turn."""
    return z - tl.floor(z + 0.5)


@triton.jit
def _turns_of_radians(z):
    """z / 2π less its nearest integer, by Cody and Waite.

    Beyond |z| = 2.5e4 the first step rounds, by no more than z itself is uncertain; the last one keeps the sine a sine.
    """
    n = tl.floor(z * _INV_TWO_PI + 0.5)
    t = _turns((((z - n * _TWO_PI_HIGH) - n * _TWO_PI_MIDDLE) - n * _TWO_PI_LOW) * _INV_TWO_PI)
    # A compiler that fuses the last product with the subtraction leaves the product's rounding, huge where z is.
    return tl.where(tl.abs(t) > 1.0, 0.0, t)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    """tanh(z): Taylor below 0.3, where 1 - exp(-2|z|) would cancel, and exp above."""
    s = z * z
    p = 62.0 / 2835 - s * (1382.0 / 155925)
    small = z * (1.0 - s * (1.0 / 3 - s * (2.0 / 15 - s * (17.0 / 315 - s * p))))
    e = tl.exp(-2.0 * tl.abs(z))
    large = tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.3, small, large)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))


@triton.jit
def _gelu_inner(z):
    return (z + 0.044715 * z * z * z) * _SQRT_TWO_OVER_PI


@triton.jit
def act_forward(z, ACTIVATION: tl.constexpr):
    """h = σ(z)."""
    if ACTIVATION == "relu":
        # Not maximum(z, 0): a NaN must stay one.
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "sin2pi":
        return _sin_turns(_turns(z))
    elif ACTIVATION == "sin":
        return _sin_turns(_turns_of_radians(z))
    elif ACTIVATION == "gelu":
        return z * _normal_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * z * (1.0 + _tanh(_gelu_inner(z)))
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    elif ACTIVATION == "tanh":
        return _tanh(z)
    elif ACTIVATION == "sigmoid":
        return _sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def act_backward(dh, z, ACTIVATION: tl.constexpr):
    """dz = dh·σ'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, dh, 0.0)
    elif ACTIVATION == "sin2pi":
        return dh * _cos_turns(_turns(z)) * _TWO_PI
    elif ACTIVATION == "sin":
        return dh * _cos_turns(_turns_of_radians(z))
    elif ACTIVATION == "gelu":
        return dh * (_normal_cdf(z) + z * _INV_SQRT_TWO_PI * tl.exp(-0.5 * z * z))
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(_gelu_inner(z))
        slope = (1.0 + 3.0 * 0.044715 * z * z) * _SQRT_TWO_OVER_PI
        return dh * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        return dh * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        return dh * (1.0 - t * t)
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(z)
        return dh * s * (1.0 - s)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return dh
