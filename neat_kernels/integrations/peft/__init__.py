"""Neat under Hugging Face PEFT: its PEANuT and LoRA layers made fast by one call, and the method NEAT.

Importing this package adds the type NEAT to PEFT's own.
"""

try:
    import peft
    from peft import PeanutConfig as _  # noqa: F401
except ImportError as error:
    found = f"PEFT {peft.__version__}" if "peft" in globals() else "none"
    raise ImportError(
        f"expected PEFT 0.19 or newer, found {found} ({error}): pip install 'neat-kernels[hf]'"
    ) from error

from neat_kernels.integrations.peft.accelerate import Report, accelerate
from neat_kernels.integrations.peft.neat import NeatConfig, NeatLayer, NeatLinear, NeatModel
from neat_kernels.integrations.peft.neat.register import register

register()

__all__ = ["NeatConfig", "NeatLayer", "NeatLinear", "NeatModel", "Report", "accelerate"]
