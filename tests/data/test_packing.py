"""Rows of several examples: nothing lost, nothing seen by another, the same loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nora_diffusion.data.instructions import UNTRAINED, Example
from nora_diffusion.data.packing import Collator, pack
from nora_diffusion.language_model import takes_logits_to_keep
from tests.tiny_language import KINDS, tiny_model


def example(length: int, answer: int, seed: int) -> Example:
    ids = torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [UNTRAINED] * (length - answer) + ids[length - answer :])


EXAMPLES = [example(12, 3, 0), example(7, 2, 1), example(20, 9, 2), example(5, 1, 3)]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths):
    examples = [example(length, 1, seed) for seed, length in enumerate(lengths)]
    rows = pack(examples, 30)
    assert sorted(id(e) for row in rows for e in row) == sorted(id(e) for e in examples)
    assert all(sum(len(e.ids) for e in row) <= 30 for row in rows)


def summed_loss(model, batch) -> float:
    count = (batch["shift_labels"] != UNTRAINED).sum()
    return float(model(**batch).loss * count)


def plain_loss(model, one: Example) -> float:
    """By the model's own loss on one example alone."""
    labels = torch.tensor([one.labels])
    out = model(input_ids=torch.tensor([one.ids]), labels=labels)
    return float(out.loss * (labels != UNTRAINED).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_of_a_batch_is_that_of_its_examples_one_by_one(kind, keep, packed):
    model = tiny_model(kind)
    rows = [EXAMPLES[:3], EXAMPLES[3:]] if packed else [[one] for one in EXAMPLES]
    batch = Collator(0, packed, keep)(rows)
    alone = sum(plain_loss(model, one) for one in EXAMPLES)
    assert summed_loss(model, batch) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_one_row_do_not_see_each_other(kind):
    model = tiny_model(kind)
    first, second, other = EXAMPLES[0], EXAMPLES[1], example(12, 3, 99)
    collate = Collator(0, packed=True, logits_to_keep=False)
    start = len(first.ids)
    logits = [model(**collate([[one, second]])).logits[0, start:] for one in (first, other)]
    assert torch.equal(*logits)
    alone = model(input_ids=torch.tensor([second.ids])).logits[0]
    torch.testing.assert_close(logits[0], alone, rtol=1e-4, atol=1e-5)


def test_logits_are_computed_where_they_are_needed_alone():
    batch = Collator(0)([[one] for one in EXAMPLES])
    model = tiny_model()
    width = model(**batch).logits.shape[1]
    assert width == len(batch["logits_to_keep"]) < max(len(one.ids) for one in EXAMPLES)


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_can_leave_out_logits_are_known(kind):
    class Plain(nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert takes_logits_to_keep(tiny_model(kind))
    assert not takes_logits_to_keep(Plain())
