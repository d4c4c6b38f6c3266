"""Neat as a method of PEFT, of type NEAT."""

from neat_kernels.integrations.peft.neat.config import NeatConfig
from neat_kernels.integrations.peft.neat.layer import NeatLayer, NeatLinear
from neat_kernels.integrations.peft.neat.model import NeatModel

__all__ = ["NeatConfig", "NeatLayer", "NeatLinear", "NeatModel"]
