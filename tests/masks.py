"""Dropout under a seed."""

import torch


def assert_masks_follow_the_seed(call):
    """Two calls drop different elements, and two after the same torch.manual_seed the same."""
    assert not torch.equal(call(), call())
    torch.manual_seed(3)
    first = call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
