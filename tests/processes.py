"""Two processes that talk by gloo, and a model made parallel over them."""

import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from trainer_problem import assert_same

WORLD = 2


def in_two_processes(function, *arguments):
    """Call function(rank, *arguments) in each of two processes; an exception in one is raised here, as text."""
    # A server that has imported the large libraries forks in milliseconds what would take seconds to start.
    multiprocessing.set_forkserver_preload(["torch", "transformers", "peft"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run, (Path(folder) / "rendezvous", function, arguments), nprocs=WORLD, start_method="forkserver"
        )


def _run(rank, rendezvous, function, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # What torchrun sets, by which a Trainer finds out that it is not alone.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "localhost"}
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def parallel(model, kind, **options):
    """A model under DistributedDataParallel ("ddp"), fully_shard() of each block and the rest ("fsdp2"), or FSDP1."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, **options)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **options)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    """A tensor with all of its values, which every process asks for together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(batch, rank):
    """The rows of a batch that a process has."""
    return {key: value.chunk(WORLD)[rank] for key, value in batch.items()}


def by_name(parameters):
    """Of the trained parameters, without the names that wrappers put before them."""
    return {name.removeprefix("module."): p for name, p in parameters if p.requires_grad}


def assert_same_gradients(model, plain):
    """The whole gradients of a model that processes share, and those of one that they do not."""
    gradients = {name: whole(p.grad) for name, p in by_name(model.named_parameters()).items()}
    assert_same(gradients, {name: p.grad for name, p in by_name(plain.named_parameters()).items()})


def logits(model, batch):
    """In eval mode, where features are cached if anything is; asked twice, so that a cache would be read."""
    model.eval()
    with torch.no_grad():
        model(**batch)
        found = model(**batch).logits
    model.train()
    return found
