"""Tiny random language models with a tokenizer of whole words, and texts that they can learn."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

WORDS = [f"{kind}{index}" for kind in ("cat", "dog", "tree") for index in range(12)]
NAMES = ["[PAD]", "[UNK]", "<s>", "</s>", "user:", "assistant:", *WORDS]
BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
CONFIGS = {
    "llama": LlamaConfig(**BLOCKS, intermediate_size=48, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=64, bos_token_id=2, eos_token_id=3),
    "opt": OPTConfig(**BLOCKS, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64),
    "falcon": FalconConfig(**BLOCKS, alibi=True),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64),
    "bert": BertConfig(**BLOCKS, intermediate_size=48),
}
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant: {% generation %}{{ m.content }} </s>"
    "{% endgeneration %} {% else %}user: {{ m.content }} {% endif %}{% endfor %}"
)


def tokenizer(begins=True, chat_template=None):
    """Words between spaces; <s> stands before a text, as Llama's writes it, or (begins=False) nothing, as of GPT-2."""
    core = Tokenizer(WordLevel({name: index for index, name in enumerate(NAMES)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    if begins:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        model_max_length=64,
    )  # fmt: skip
    made.chat_template = chat_template
    return made


def save_model(folder, kind="llama", **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def texts(count=120):
    """Walks over the twelve words of one kind, each word the one after the last: what follows can be learned."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for index in range(count):
        words = WORDS[12 * (index % 3) : 12 * (index % 3) + 12]
        start, length = torch.randint(12, (), generator=generator).item(), 3 + index % 9
        drawn.append(" ".join([words[(start + step) % 12] for step in range(length)] + [words[index % 12]] * 2))
    return list(dict.fromkeys(drawn))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_everything(folder):
    """Every model, and the texts as texts, as prompts with answers and as chats."""
    for kind in CONFIGS:
        save_model(folder / kind, kind, chat_template=CHAT)
    walks = texts()
    (folder / "texts.txt").write_text("\n\n".join(walks))
    prompts = [dict(zip(("q", "text"), walk.split(" ", 1), strict=True)) for walk in walks]
    write_jsonl(folder / "prompts.jsonl", prompts)
    chats = [[{"role": "user", "content": p["q"]}, {"role": "assistant", "content": p["text"]}] for p in prompts]
    write_jsonl(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    return folder
