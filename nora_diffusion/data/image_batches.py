"""Image instructions as a model's inputs, by its own processor and chat template."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nora_diffusion.data.image_instructions import Record
from nora_diffusion.data.instructions import UNTRAINED
from nora_diffusion.data.packing import keep_trained
from nora_diffusion.settings import UserError

Span = tuple[int, int | None]
"""Where an answer begins and ends among the tokens; None: with the last of them."""

_REWRITES = (
    "the model's chat template rewrites earlier turns, so answers cannot be told from questions; "
    "give records of one question and one answer"
)


def encode(processor: Any, record: Record, with_answers: bool = True) -> dict[str, Tensor]:
    """One record as the model's inputs, each with a leading dimension of 1.

    Args:
        processor: of the model, with a chat template.
        record: the conversation.
        with_answers: False ends before the last answer, where the model shall go on.

    Returns:
        What the processor gives; with answers also `labels` (1, L): the answers' tokens, and
        `UNTRAINED` elsewhere.

    Raises:
        UserError: the template does not write turn after turn.
    """
    n = len(record.turns)
    if not with_answers:
        return _render(processor, record, n - 1, True)
    inputs = _render(processor, record, n, False)
    return _with_labels(inputs, _answer_spans(processor, record, inputs["input_ids"]))


def _answer_spans(processor: Any, record: Record, ids: Tensor) -> list[Span]:
    n, spans = len(record.turns), list[Span]()
    for i in range(1, n, 2):
        before = _render(processor, record, i, True)["input_ids"].shape[1]
        last = i + 1 == n
        upto = ids if last else _render(processor, record, i + 1, False)["input_ids"]
        if not torch.equal(upto, ids[:, : upto.shape[1]]):
            raise UserError(_REWRITES)
        spans.append((before, None if last else upto.shape[1]))
    return spans


def _with_labels(inputs: dict[str, Tensor], spans: Sequence[Span]) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, UNTRAINED)
    for start, end in spans:
        if start >= (ids.shape[1] if end is None else end):
            raise UserError(_REWRITES)
        labels[:, start:end] = ids[:, start:end]
    return inputs | {"labels": labels}


def _render(processor: Any, record: Record, n_turns: int, ask: bool) -> dict[str, Tensor]:
    return dict(
        processor.apply_chat_template(
            record.messages(n_turns),
            add_generation_prompt=ask,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


class Records(Dataset):
    """Records encoded as they are asked for; those above `max_length` are left out and counted."""

    def __init__(self, processor: Any, records: Sequence[Record], max_length: int):
        self.processor = processor
        starts = [encode(processor, record, False)["input_ids"].shape[1] for record in records]
        # The answer's length is that of its text; the picture is in the question.
        lengths = [
            start + len(processor.tokenizer(record.answer)["input_ids"])
            for start, record in zip(starts, records, strict=True)
        ]
        kept = [i for i, length in enumerate(lengths) if length <= max_length]
        if not kept:
            raise UserError(
                f"data.max_length = {max_length}: every record is longer, up to {max(lengths)}"
            )
        self.records = [records[i] for i in kept]
        # To find where answers are, a record's pictures are processed again for each: once.
        single = (i for i, record in enumerate(self.records) if len(record.turns) == 2)
        self._spans: dict[int, list[Span]] = {i: [(starts[kept[i]], None)] for i in single}
        self.left_out = len(records) - len(self.records)
        self.longest = max(lengths[i] for i in kept)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        inputs = _render(self.processor, record, len(record.turns), False)
        if index not in self._spans:
            self._spans[index] = _answer_spans(self.processor, record, inputs["input_ids"])
        return _with_labels(inputs, self._spans[index])


def collate(items: Sequence[dict[str, Tensor]], pad_id: int, left: bool = False) -> dict:
    """Encoded records as one batch: what runs along the tokens is padded, the rest put together.

    Args:
        items: what `encode` gives.
        pad_id: token id to fill up with.
        left: pad before the text, for generation.
    """
    fill = {"input_ids": pad_id, "labels": UNTRAINED}
    longest = max(item["input_ids"].shape[1] for item in items)
    batch = {}
    for key, first in items[0].items():
        if first.shape != items[0]["input_ids"].shape:
            batch[key] = torch.cat([item[key] for item in items])
            continue
        rows = []
        for item in items:
            missing = longest - item[key].shape[1]
            sides = (missing, 0) if left else (0, missing)
            rows.append(nn.functional.pad(item[key], sides, value=fill.get(key, 0)))
        batch[key] = torch.cat(rows)
    return batch


def with_trained_positions(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that asks for logits where some row has a trained token, and nowhere else.

    A picture is hundreds of tokens, none of which is trained, and the logits of each are as many
    numbers as the vocabulary has words.

    Returns:
        The batch with what `keep_trained` gives.
    """
    return batch | keep_trained(nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=UNTRAINED))


@torch.no_grad()
def learns_from_trained_positions(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether a model's loss of `with_trained_positions` is the cross-entropy at these positions.

    Not every class takes the argument, or hands shifted labels on to its loss: a batch is tried.
    """
    batch, training = with_trained_positions(batch), model.training
    model.eval()  # without dropout
    try:
        found = model(**batch)
        loss = nn.functional.cross_entropy(
            found.logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=UNTRAINED
        )
    except (TypeError, ValueError, RuntimeError):  # arguments or shapes that it refuses
        return False
    finally:
        model.train(training)
    return bool(torch.isclose(found.loss.float(), loss, rtol=1e-4))


def pad_id_of(processor: Any) -> int:
    """The token id that fills up a batch."""
    tokenizer = processor.tokenizer
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
