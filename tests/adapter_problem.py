"""Models with adapters that are not zero, and what they compute."""

from contextlib import contextmanager

import pytest
import torch

import neat_kernels as nk
from tests.models import CASES, make_case

HEADS = {"roberta": ["classifier"], "vit": ["classifier"]}


def adapted(name, **options):
    """The model of `CASES[name]` with every trained value drawn anew, in eval mode, and a batch."""
    model, batch = make_case(name)
    options = {
        "r": 4,
        "target_modules": CASES[name].target_modules,
        "scaling": 0.5,
        "modules_to_save": HEADS.get(name),
        **options,
    }
    nk.apply_neat(model, nk.NeatConfig(**options))
    shake(model)
    return model.eval(), batch


def shake(model, size=0.1):
    """Add noise to what trains."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
    return model


def base(name):
    """The model before anything was trained."""
    return make_case(name)[0].eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def agree(actual, expected, share=1e-5):
    """Equal to a share of the largest logit: the same sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * expected.abs().max().item())


@contextmanager
def full_disk(room):
    """Let no file grow beyond `room` bytes: write(2) fails where a full disk would let it fail."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that would come first.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
