"""Making NEAT a type of PEFT, which has no plug-in path for one: a member of its enumeration, then its registry."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

from neat_kernels.adapters.names import NEAT


def add_peft_type() -> None:
    """Add PeftType.NEAT; once is enough."""
    if NEAT in PeftType.__members__:
        return
    # What enum's metaclass does for the members of a class body; adding one later is not foreseen.
    member = str.__new__(PeftType, NEAT)
    member._name_, member._value_ = NEAT, NEAT
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    type.__setattr__(PeftType, NEAT, member)
    PeftType._member_names_.append(NEAT)
    PeftType._member_map_[NEAT] = member
    PeftType._value2member_map_[NEAT] = member


def register() -> None:
    """Let PEFT know NEAT: get_peft_model, from_pretrained and the rest; once is enough."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from neat_kernels.integrations.peft.neat.config import NeatConfig
    from neat_kernels.integrations.peft.neat.model import NeatModel

    add_peft_type()
    if PeftType[NEAT] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="neat", config_cls=NeatConfig, model_cls=NeatModel, prefix=NeatModel.prefix)
