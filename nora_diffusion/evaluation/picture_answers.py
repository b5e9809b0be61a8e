"""What a vision-language model answers to questions on pictures, and how much of it is right."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from nora_diffusion.adapter import kept_updates
from nora_diffusion.data.image_batches import collate, encode, pad_id_of
from nora_diffusion.data.image_instructions import Record


@torch.no_grad()
def answers(
    model: Any, processor: Any, records: Sequence[Record], batch_size: int = 16
) -> list[str]:
    """What the model says, greedily, where each record's last answer stands."""
    pad_id = pad_id_of(processor)
    room = max(len(processor.tokenizer(record.answer)["input_ids"]) for record in records) + 4
    model.eval()
    said = []
    with kept_updates(model):
        for start in range(0, len(records), batch_size):
            items = [encode(processor, r, False) for r in records[start : start + batch_size]]
            batch = collate(items, pad_id, left=True)
            batch = {key: value.to(model.device) for key, value in batch.items()}
            out = model.generate(**batch, max_new_tokens=room, do_sample=False, pad_token_id=pad_id)
            new = out[:, batch["input_ids"].shape[1] :]
            said += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in said]


def matches(said: str, expected: str) -> bool:
    """Whether two answers are the same but for case, punctuation and spaces."""
    return _words(said) == _words(expected)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ask(model: Any, processor: Any, test: Sequence[Record]) -> dict[str, Any]:
    """Asks all of `test`: the share that is right, their number, and what was said."""
    said = answers(model, processor, test)
    right = [matches(text, record.answer) for text, record in zip(said, test, strict=True)]
    return {"accuracy": sum(right) / len(right), "questions": len(right), "said": said}
