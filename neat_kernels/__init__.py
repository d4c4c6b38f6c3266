"""Fused fine-tuning with Neat: a frozen linear layer plus a small network of its weight, at the price of LoRA."""

from neat_kernels import functional, reference
from neat_kernels._version import __version__
from neat_kernels.adapters.config import NeatConfig
from neat_kernels.adapters.summary import TrainableSummary, trainable_summary
from neat_kernels.adapters.swap import apply_neat, merge_neat, remove_neat
from neat_kernels.layer import FusedNeatLinear
from neat_kernels.plan import BackendUnavailableError, Plan
from neat_kernels.reuse import reuse_features

__all__ = [
    "BackendUnavailableError",
    "FusedNeatLinear",
    "NeatConfig",
    "Plan",
    "TrainableSummary",
    "__version__",
    "apply_neat",
    "functional",
    "merge_neat",
    "reference",
    "remove_neat",
    "reuse_features",
    "trainable_summary",
]
