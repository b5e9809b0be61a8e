"""Batches of token sequences: padded rows, or several examples a row that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nora_diffusion.data.instructions import UNTRAINED, Example


def pack(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Fill rows of at most ``max_tokens``, longest example first into the first row with room.

    Every example is in one row, whole.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: len(e.ids), reverse=True):
        size = len(example.ids)
        index = next((i for i, left in enumerate(room) if left >= size), None)
        if index is None:
            rows.append([])
            room.append(max_tokens)
            index = len(rows) - 1
        rows[index].append(example)
        room[index] -= size
    return rows


@dataclass(frozen=True)
class Collator:
    """Makes a batch for a causal language model from rows of examples.

    Attributes:
        pad_id: token that fills a row up; any will do, nothing sees it.
        packed: whether rows hold several examples. Their positions start again with each example,
            and transformers keeps apart what such positions part: its masks read it off them, but
            only where no cache of keys and values is made, so a batch says ``use_cache=False``.
        logits_to_keep: whether the model takes that argument. Then it computes logits only where
            some row has a trained token: of a 49,000-word vocabulary most of a step's memory.
    """

    pad_id: int
    packed: bool = False
    logits_to_keep: bool = True

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Any]:
        """Batch rows.

        Returns:
            ``input_ids`` (B, T), padded on the right, where causal attention lets nothing see the
            padding; ``labels`` and ``shift_labels`` (B, K), what each of the K kept positions shall
            predict; ``logits_to_keep`` (K,); ``position_ids`` (B, T) of packed rows.
        """
        length = max(sum(len(example.ids) for example in row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_id)
        position_ids = torch.zeros(len(rows), length, dtype=torch.long)
        targets = torch.full((len(rows), length), UNTRAINED)
        for index, row in enumerate(rows):
            start = 0
            for example in row:
                end = start + len(example.ids)
                input_ids[index, start:end] = torch.tensor(example.ids)
                position_ids[index, start:end] = torch.arange(end - start)
                # A position predicts the next token; the first of an example is predicted by none.
                targets[index, start : end - 1] = torch.tensor(example.labels[1:])
                start = end
        batch: dict[str, Tensor | bool] = {"input_ids": input_ids, "use_cache": False}
        if self.packed:
            batch["position_ids"] = position_ids
        if self.logits_to_keep:
            return {**batch, **keep_trained(targets)}
        return {**batch, "labels": targets, "shift_labels": targets}


def keep_trained(targets: Tensor) -> dict[str, Tensor]:
    """What asks a causal language model for logits where some row has a trained token alone.

    Args:
        targets: (B, T), what each position shall predict; ``UNTRAINED`` where nothing is learnt.

    Returns:
        ``labels`` and ``shift_labels`` (B, K), what each of the K kept positions shall predict, and
        ``logits_to_keep`` (K,).
    """
    kept = (targets != UNTRAINED).any(dim=0).nonzero().flatten()
    targets = targets[:, kept]
    return {"labels": targets, "shift_labels": targets, "logits_to_keep": kept}
