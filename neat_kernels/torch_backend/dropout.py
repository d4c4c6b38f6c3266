"""The dropout mask of the adapter branch, a pure function of (seed, row, column).

keep(m, k) = Philox4x32-10(counter = m·K + k, key = seed)[0] ≥ p·2³²

The same bits on every backend, so that backward recomputes the mask instead of storing it.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# One block of counters: 64 K int64 words are 512 KiB, so that the ten rounds stay in the L2 cache.
_BLOCK_ELEMENTS = 1 << 16


def draw_seed(x: Tensor) -> Tensor:
    """A fresh dropout seed: int64 [1] on x's device, never read back to the host."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def threshold(dropout: float) -> int:
    """The smallest 32-bit word that is kept: round(p·2³²)."""
    return round(dropout * 2**32)


def keep_mask(seed: Tensor, rows: slice, columns: int, dropout: float) -> Tensor:
    """Boolean mask [rows, columns], True where an element is kept with probability 1 - dropout; seed int64 [1]."""
    mask = torch.empty((rows.stop - rows.start) * columns, dtype=torch.bool, device=seed.device)
    first = rows.start * columns
    for start in range(0, mask.numel(), _BLOCK_ELEMENTS):
        stop = min(start + _BLOCK_ELEMENTS, mask.numel())
        counter = torch.arange(first + start, first + stop, dtype=torch.int64, device=seed.device)
        torch.ge(philox(seed, counter), threshold(dropout), out=mask[start:stop])
    return mask.view(-1, columns)


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """First output word of Philox4x32-10 as int64 in [0, 2³²), for int64 counters and a 64-bit key."""
    c0, c1 = counter & _WORD, (counter >> 32) & _WORD
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        # The 64-bit product wraps as a signed number; its high and low words are right all the same.
        p0, p2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((p2 >> 32) & _WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = ((p0 >> 32) & _WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p2.bitwise_and_(_WORD), p0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0
