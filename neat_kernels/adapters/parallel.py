"""Models that several processes share: shards of fully_shard(), copies under DistributedDataParallel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from neat_kernels.vocabulary import is_sharded


def check_whole(model: nn.Module, error: type[ValueError] = ValueError) -> None:
    """Raise `error` if a part of the model is sharded, be its parameters gathered just now or not."""
    if _shards(model) or any(map(is_sharded, model.parameters())):
        raise error(
            "expected a model that is whole in this process, got one that fully_shard() has sharded: what is changed "
            "in it would be lost, or differ between processes"
        )


def check_not_copied(model: nn.Module, error: type[ValueError] = ValueError) -> None:
    """Raise `error` if the model is in DistributedDataParallel, which knows of no parameter that comes later."""
    if _copies(model) is not None:
        raise error("expected a model before DistributedDataParallel, which would not reduce the adapters' gradients")


@dataclass(frozen=True)
class Savers:
    """The processes that save one model.

    Args:
        is_first: whether this one writes.
        groups: process groups along each dimension of the mesh that holds the shards; none without shards.
    """

    is_first: bool
    groups: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Savers:
        """Those of a model, whose shards are put back: gathered ones may be older than the last step."""
        for module in _shards(model):
            module.reshard()
        shard: Any = next((p for p in model.parameters() if is_sharded(p)), None)
        if shard is not None:
            # A mesh of data-parallel processes may be a part of one that holds the model several times.
            mesh = getattr(shard.device_mesh, "_get_root_mesh", lambda: shard.device_mesh)()
            return cls(not any(mesh.get_coordinate()), tuple(mesh.get_group(i) for i in range(mesh.ndim)))
        copies = _copies(model)
        return cls(copies is None or distributed.get_rank(copies.process_group) == 0, ())

    def first(self, action: Callable[[], None]) -> None:
        """Let the first process act; where it fails, all that share the shards raise its error, and none waits."""
        error: Exception | None = None
        if self.is_first:
            try:
                action()
            except Exception as raised:
                error = raised
        for group in self.groups:
            told = [error]
            distributed.broadcast_object_list(told, group=group, group_src=0)
            error = told[0]
        if error is not None:
            raise error


def _shards(model: nn.Module) -> list[Any]:
    # Nobody can have called fully_shard() without importing it.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _copies(model: nn.Module) -> DistributedDataParallel | None:
    return next((m for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
