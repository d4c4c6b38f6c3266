"""nn.DataParallel: shallow copies of the modules run in threads, with copies of the parameters, on parts of a batch."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.parallel import replicate

import neat_kernels as nk

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import language_batch
from trainer_problem import WAYS, adapted

REPLICAS = 2


class Broadcast(torch.autograd.Function):
    """torch's own, which is for GPUs alone: a copy per device, and the sum of the copies' gradients."""

    @staticmethod
    def forward(ctx, *tensors):
        copies = [t.clone() for _ in range(REPLICAS) for t in tensors]
        frozen = [not needed for needed in ctx.needs_input_grad] * REPLICAS
        ctx.mark_non_differentiable(*[copy for copy, is_frozen in zip(copies, frozen, strict=True) if is_frozen])
        ctx.count = len(tensors)
        return tuple(copies)

    @staticmethod
    def backward(ctx, *gradients):
        return tuple(sum(gradients[i :: ctx.count]) for i in range(ctx.count))


@pytest.fixture(autouse=True)
def _broadcast_on_a_cpu(monkeypatch):
    def broadcast(tensors, devices, detach=False):
        # Without gradients the first device has the tensors themselves, not copies.
        first = list(tensors) if detach else None
        copies = Broadcast.apply(*tensors) if tensors else ()
        split = [list(copies[i * len(tensors) : (i + 1) * len(tensors)]) for i in range(REPLICAS)]
        return [first, *split[1:]] if detach else split

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast)


def halves(batch):
    return [{name: t.chunk(REPLICAS)[i] for name, t in batch.items()} for i in range(REPLICAS)]


def run(model, batch, grad):
    """Logits of the batch, as DataParallel computes them, and the gradients of the mean of the losses."""
    replicas = replicate(model, list(range(REPLICAS)), detach=not grad)

    def part(i):
        with torch.set_grad_enabled(grad):
            return replicas[i](**halves(batch)[i])

    with ThreadPoolExecutor(REPLICAS) as threads:
        outputs = list(threads.map(part, range(REPLICAS)))
    if grad:
        (sum(output.loss for output in outputs) / REPLICAS).backward()
    return torch.cat([output.logits for output in outputs])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", [*WAYS, "lora"])
def test_replicas_train_as_one_model_does(way):
    model, batch = adapted("llama", way).double().train(), language_batch()
    logits = run(model, batch, grad=True)
    ours = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    expected = model(**batch)
    expected.loss.backward()
    torch.testing.assert_close(logits, expected.logits)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_replicas_do_not_serve_one_another_s_features(way):
    model, batch = adapted("llama", way).double().eval(), language_batch()
    before = run(model, batch, grad=False)
    with torch.no_grad():
        torch.testing.assert_close(before, model(**batch).logits)
        for name, p in model.named_parameters():
            if p.requires_grad and ("_A" in name or "_B" in name):
                p.mul_(1.5)
    after = run(model, batch, grad=False)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(**batch).logits)


def test_reused_features_are_refused_in_a_replica():
    model, batch = adapted("llama", "fused").train(), language_batch()
    with nk.reuse_features(model), pytest.raises(RuntimeError, match="replicas"):
        run(model, batch, grad=True)
