"""Tiny models adapted in each way that the Trainer's tests train, and data for them."""

import torch
from models import CLASSES, LENGTH, VOCABULARY, make_case
from torch import nn
from torch.utils.data import Dataset

import neat_kernels as nk

WAYS = ("peanut", "neat", "fused")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "roberta": ["query", "value"]}
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}


class Texts(Dataset):
    """Random texts without padding, with labels that a model can be trained on."""

    def __init__(self, name, size=16, padded=0):
        drawn = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(2, VOCABULARY, (size, LENGTH), generator=drawn)
        self.classes = torch.randint(0, CLASSES, (size,), generator=drawn)
        self.name, self.padded = name, padded

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - self.padded :] = 0
        labels = self.tokens[i] if self.name == "llama" else self.classes[i]
        return {"input_ids": self.tokens[i], "attention_mask": mask, "labels": labels}


def adapted(name, way, activation="gelu", depth=1, r=4, **options):
    """A tiny model adapted by accelerated PEANuT, NEAT under PEFT, apply_neat, or LoRA, with B away from zero."""
    model, _ = make_case(name)
    with torch.no_grad():
        # The models' own small weights would leave the gradients of A and the chain next to nothing.
        for p in model.parameters():
            p.mul_(8.0 if p.ndim > 1 else 1.0)
    torch.manual_seed(1)
    if way == "fused":
        config = nk.NeatConfig(r=r, target_modules=TARGETS[name], activation=activation, depth=depth, **options)
        nk.apply_neat(model, config)
    else:
        model = under_peft(model, way, name, activation, depth, r, options)
    for parameter_name, p in model.named_parameters():
        if any(part in parameter_name for part in ("neat_B", "peanut_B", "lora_B")):
            nn.init.normal_(p, std=0.05)
    return model


def under_peft(model, way, name, activation, depth, r, options):
    import peft

    from neat_kernels.integrations.peft import NeatConfig, accelerate

    common = {"r": r, "target_modules": TARGETS[name]} | options
    if name == "roberta":
        common["task_type"] = "SEQ_CLS"
    if way == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(**common))
    if way == "neat":
        return peft.get_peft_model(model, NeatConfig(activation=activation, depth=depth, **common))
    act_fn = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    config = peft.PeanutConfig(act_fn=act_fn, depth=depth, **common)
    model = peft.get_peft_model(model, config)
    assert not accelerate(model).unchanged
    return model


def trainer_of(model, output_dir, data, trainer=None, **arguments):
    """A Trainer that runs on the CPU, in the order of the data, without a progress bar."""
    import transformers

    options = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
        **arguments,
    }
    given = transformers.TrainingArguments(**options)
    return transformers.Trainer(model, given, train_dataset=data, **(trainer or {}))


def loop(model, data, steps=3, batch=4, dtype=None):
    """Plain steepest descent, as SGD asks the Trainer for, over the data in order."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=SGD["learning_rate"])
    losses = []
    for step in range(steps):
        rows = [data[i] for i in range(step * batch, (step + 1) * batch)]
        inputs = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model):
    """Copies of the trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(ours[name], p, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
