"""A pytest plugin for PEFT's own tests: its PEANuT cases on our layers, every outcome to a file.

--neat stock: PEFT as it is.
--neat accelerate: every adapter that PEFT adds is put on the fused path at once.
--neat config: NEAT takes PEANuT's place, under the names of its configuration and of its parts.
"""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.peanut.layer import Linear as PeanutLinear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from neat_kernels.adapters.names import ACTIVATION
from neat_kernels.integrations.peft import NeatConfig, NeatLinear, accelerate
from neat_kernels.integrations.peft.fused import FusedLayer

outcomes: dict[str, str] = {}
layers_made = {"fused": 0, "stock": 0}


@dataclass
class PeanutConfig(NeatConfig):
    """NeatConfig with PEANuT's name and its name of the activation."""

    act_fn: str = "relu"

    def __post_init__(self):
        self.activation = ACTIVATION[self.act_fn]
        super().__post_init__()


class NamedAsPeanut(NeatLinear):
    """A Neat layer whose parts have the names of PEANuT's, too."""

    peanut_A = property(lambda self: self.neat_A)
    peanut_B = property(lambda self: self.neat_B)
    peanut_encoders = property(lambda self: self.neat_encoders)
    peanut_decoders = property(lambda self: self.neat_decoders)

    def __getattr__(self, name):
        # No property: PEFT looks for what a deleted adapter leaves behind in every attribute that dir() names.
        if name == "res_num":
            return {adapter: options.depth for adapter, options in self.options.items()}
        return super().__getattr__(name)


def pytest_addoption(parser):
    parser.addoption("--neat", choices=["stock", "accelerate", "config"], required=True, help="what runs the cases")
    parser.addoption("--outcomes", type=Path, required=True, help="JSON file of the outcome of every test")


def pytest_configure(config):
    mode, inject = config.getoption("--neat"), BaseTuner.inject_adapter
    if mode == "config":
        peft.PeanutConfig = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.NEAT] = PeanutConfig

    @functools.wraps(inject)
    def inject_and_switch(self, model, *args, **kwargs):
        inject(self, model, *args, **kwargs)
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        if mode == "accelerate" and any(type(layer) in (PeanutLinear, LoraLinear) for layer in layers):
            # Refused where no layer can be fused, as with variants of LoRA.
            with contextlib.suppress(ValueError):
                accelerate(model)
        for layer in layers:
            if type(layer) is NeatLinear:
                layer.__class__ = NamedAsPeanut
            layers_made["fused" if isinstance(layer, FusedLayer) else "stock"] += 1

    BaseTuner.inject_adapter = inject_and_switch


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session):
    result = {"peft": peft.__version__, "layers": layers_made, "outcomes": outcomes}
    session.config.getoption("--outcomes").write_text(json.dumps(result))
