"""Tiny random models from transformers configurations, each with one batch that has a loss: nothing is downloaded."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

VOCABULARY, WIDTH, HEADS, BLOCKS, CLASSES = 64, 32, 4, 2, 3
BATCH, LENGTH, IMAGE, PATCH, MELS = 4, 10, 16, 8, 8


class Case(NamedTuple):
    """How to make a model, what to call it with, and which layers Neat adapts in it."""

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    target_modules: list[str]
    layers: int  # those that "all-linear" means


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=HEADS,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=CLASSES,
    )
    return RobertaForSequenceClassification(config)


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=48,
        image_size=IMAGE,
        patch_size=PATCH,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=48,
        num_layers=BLOCKS,
        num_heads=HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=BLOCKS,
        decoder_layers=BLOCKS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=MELS,
        max_source_positions=LENGTH,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def language_batch():
    tokens = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def classification_batch():
    return {**language_batch(), "labels": torch.randint(0, CLASSES, (BATCH,))}


def image_batch():
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE), "labels": torch.randint(0, CLASSES, (BATCH,))}


def sound_batch():
    return {"input_features": torch.randn(BATCH, MELS, 2 * LENGTH), "labels": torch.randint(2, VOCABULARY, (BATCH, 6))}


CASES = {
    "llama": Case(llama, language_batch, ["q_proj", "v_proj", "down_proj"], 7 * BLOCKS),
    "gpt2": Case(gpt2, language_batch, ["c_attn", "mlp.c_proj"], 4 * BLOCKS),
    "roberta": Case(roberta, classification_batch, ["query", "value", "intermediate.dense"], 6 * BLOCKS),
    "vit": Case(vit, image_batch, ["q_proj", "v_proj", "fc2"], 6 * BLOCKS),
    # An encoder and a decoder, whose attention has two sets of projections.
    "t5": Case(t5, language_batch, ["q", "v", "wo"], 16 * BLOCKS),
    "whisper": Case(whisper, sound_batch, ["q_proj", "v_proj", "fc2"], 16 * BLOCKS),
}


def make_case(name):
    """The model of `CASES[name]` in train mode and its batch, from a fixed seed."""
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, case.batch()
