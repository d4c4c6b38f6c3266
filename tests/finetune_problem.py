"""A tiny random BERT with its own tokenizer, and texts that it can learn to tell apart."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

WORDS = [f"{kind}{index}" for kind in ("cat", "dog", "tree") for index in range(12)]
LABELS = ("animal", "plant", "pet")
SIZES = {"vocab_size": 64, "max_position_embeddings": 64}
CONFIGS = {
    "bert": BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **SIZES),
    "llama": LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, **SIZES),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64),
}


def tokenizer():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    core = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def save_model(folder, kind="bert"):
    torch.manual_seed(0)
    AutoModel.from_config(CONFIGS[kind]).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(count=120):
    """(text, label) pairs; the label is decided by the kind of the words."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for index in range(count):
        words = WORDS[12 * (index % 3) : 12 * (index % 3) + 12]
        picks = torch.randint(12, (3 + index % 5,), generator=generator).tolist()
        drawn.append((" ".join(words[pick] for pick in picks) + f" {index}", LABELS[index % 3]))
    return drawn


def write_jsonl(path, pairs):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return path
