"""The dropout mask as a device function: the bits of neat_kernels.torch_backend.dropout.

keep(m, k) = Philox4x32-10(counter = m·K + k, key = seed)[0] ≥ p·2³²
"""

import triton
import triton.language as tl


@triton.jit
def random_word(seed_ptr, index):
    """First output word of Philox4x32-10 as uint32, for counters index [int64] and the 64-bit key at seed_ptr."""
    seed = tl.load(seed_ptr)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word


@triton.jit
def kept(tile, seed_ptr, index, threshold):
    """tile ∘ keep, for elements whose index m·K + k [same shape, int64] is given; exact in every dtype."""
    return tl.where(random_word(seed_ptr, index).to(tl.int64) >= threshold, tile, 0.0)
