"""pytest-benchmark: a training step of a whole model of two layers' depth and more."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.model_contenders import CONTENDERS, WARM_UP, prepare, timed
from benchmarks.models import MODELS
from neat_kernels.finetune.memory import peak_of_step

pytest.importorskip("transformers")
# What patches transformers has no place in a process with others.
_NAMES = [name for name in CONTENDERS if name != "peft_lora_liger"]


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize(
    ("device", "model", "dtype"),
    [
        pytest.param("cpu", "llama-4x1024", "float32", id="cpu-llama-4x1024"),
        pytest.param("cuda", "llama-3.2-3b-2-layers", "bfloat16", id="cuda-llama-2-layers", marks=pytest.mark.gpu),
    ],
)
def test_model_step(benchmark: BenchmarkFixture, device: str, model: str, dtype: str, name: str) -> None:
    """Time forward, backward and AdamW of one contender."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name.startswith("peft") or name == "accelerated":
        pytest.importorskip("peft")
    training = prepare(name, model, "default", dtype, torch.device(device))
    benchmark.group = f"model-{device}-{model}-{dtype}"
    benchmark.pedantic(timed, args=(training,), rounds=3, warmup_rounds=WARM_UP)
    peak = peak_of_step(training.step, training.model, training.optimizer)
    tokens = MODELS[model].tokens
    benchmark.extra_info |= {"trained": training.trained, "tokens": tokens, "peak_bytes": peak, "loss": training.loss}
