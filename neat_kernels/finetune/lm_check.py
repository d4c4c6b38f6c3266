"""Whether a model reads a text from left to right, and whether it keeps packed texts apart."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neat_kernels.finetune.lm_batches import LmTokens, Piece
from neat_kernels.finetune.model import LanguageModel
from neat_kernels.usage import UsageError

# Tokens of each text of the trial, and the texts in each of its rows.
_LENGTH, _ROWS = 16, (3, 2)
# Texts that leak differ as texts that were simply run together do, not by a tenth of it.
_SHARE_OF_A_LEAK = 0.1


@torch.no_grad()
def why_not_packed(backbone: nn.Module, tokens: LmTokens, vocabulary: int, device: torch.device) -> str | None:
    """Run a packed row and each of its texts alone, and compare the logits.

    They may differ by rounding, for which half of the digits of the model's dtype are allowed, and by a tenth of what
    they differ by in a row of texts that were run together without saying where one ends.

    Args:
        backbone: a language model as it was loaded.
        tokens: texts to try it with.
        vocabulary: number of token ids that the model knows.
        device: where to run it.

    Returns:
        Why texts cannot be packed for this model, or None if they can.

    Raises:
        UsageError: what the model says of a token depends on the ones after it.
    """
    model = LanguageModel(backbone).to(device).eval()
    texts = [tokens.pieces[index % len(tokens.pieces)].ids[:_LENGTH] for index in range(sum(_ROWS))]
    alone = [_run(model, [text], device) for text in texts]
    rounding = math.sqrt(torch.finfo(alone[0].dtype).eps)
    _refuse_if_it_looks_ahead(model, texts, vocabulary, rounding, device)
    takes = inspect.signature(backbone.forward).parameters
    if "position_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return "the model takes no positions"
    packed, joined = (_of_rows(model, texts, packed, device) for packed in (True, False))
    leak = _distance([joined[index] for index in _later()], [alone[index] for index in _later()])
    far, size = _distance(packed, alone), math.sqrt(sum(text.double().square().sum().item() for text in alone))
    if far <= rounding * size and far <= _SHARE_OF_A_LEAK * leak:
        return None
    return f"in a packed row the logits differ by {far / size:.1g} of themselves from those of each text alone"


def _refuse_if_it_looks_ahead(
    model: LanguageModel, texts: Sequence[Tensor], vocabulary: int, rounding: float, device: torch.device
) -> None:
    """Raise UsageError if other tokens behind a text change what the model says of the text."""
    first, then = texts[:2]
    before, after = (_run(model, [first, behind], device)[: len(first)] for behind in (then, (then + 1) % vocabulary))
    if _distance([after], [before]) > rounding * before.double().norm().item():
        raise UsageError(
            "--task lm: expected a causal language model, got one whose logits depend on the tokens after them "
            f"({type(model.backbone).__name__})"
        )


def _of_rows(model: LanguageModel, texts: Sequence[Tensor], packed: bool, device: torch.device) -> list[Tensor]:
    """The logits of each text, several in a row; packed as in training, or run together."""
    pieces = tuple(Piece(text, text, index) for index, text in enumerate(texts))
    ends = [sum(_ROWS[: row + 1]) for row in range(len(_ROWS))]
    rows = tuple(tuple(range(end - count, end)) for end, count in zip(ends, _ROWS, strict=True))
    batch = LmTokens(pieces, rows, pad_id=0, packed=packed).batch(range(len(rows)), device)
    logits = model(**batch.inputs)
    found = []
    for row, members in enumerate(rows):
        lengths = [len(texts[index]) for index in members]
        found += list(logits[row, : sum(lengths)].split(lengths))
    return found


def _run(model: LanguageModel, texts: Sequence[Tensor], device: torch.device) -> Tensor:
    """The logits of one row, which is the texts one after the other."""
    ids = torch.cat(list(texts))[None].to(device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def _later() -> list[int]:
    """The texts that are not the first of their row."""
    starts = {sum(_ROWS[:row]) for row in range(len(_ROWS))}
    return [index for index in range(sum(_ROWS)) if index not in starts]


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The Frobenius norm of all differences."""
    squares = (float((a.double() - b.double()).square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(sum(squares))
