"""Classification, tagging and sequence to sequence through PEFT's task types."""

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from nora_diffusion.adapter import NoraConfig, iter_nora_layers

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    num_labels=3,
)
T5 = T5Config(
    vocab_size=40,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_heads=2,
    num_layers=1,
    decoder_start_token_id=0,
    pad_token_id=0,
)
IDS = torch.arange(1, 13).reshape(2, 6)
# Of each task: the model, its labels, and the module that is trained in full.
TASKS = {
    TaskType.SEQ_CLS: (BertForSequenceClassification, BERT, torch.tensor([0, 2]), "classifier"),
    TaskType.TOKEN_CLS: (BertForTokenClassification, BERT, IDS % 3, "classifier"),
    TaskType.SEQ_2_SEQ_LM: (T5ForConditionalGeneration, T5, IDS[:, :4].contiguous(), None),
}


def base_model(task):
    kind, config, *_ = TASKS[task]
    torch.manual_seed(0)
    return kind(config).eval()


def loss_of(model, task):
    return model(input_ids=IDS, labels=TASKS[task][2]).loss


def logits_of(model, task):
    with torch.no_grad():
        return model(input_ids=IDS, labels=TASKS[task][2]).logits


def trained(task):
    """An adapted model after a few steps, and its parameters before them."""
    config = NoraConfig(r=8, inner_r=4, task_type=task, target_modules="attention")
    model = get_peft_model(base_model(task), config).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, task).backward()
        optimizer.step()
    return model, before


@pytest.mark.parametrize("task", TASKS)
def test_training_changes_the_inner_pairs_and_the_head_alone(task):
    model, before = trained(task)
    head = TASKS[task][3]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    inner = {
        f"{name}.{part}.default"
        for name, _ in iter_nora_layers(model)
        for part in ("nora_inner_A", "nora_inner_B")
    }
    heads = {name for name in before if head and f"{head}.modules_to_save.default" in name}
    assert inner and bool(heads) is (head is not None)
    assert changed == inner | heads
    assert {name for name, p in model.named_parameters() if p.requires_grad} == changed


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_adapter_gives_the_same_answer(task, tmp_path):
    model, _ = trained(task)
    base = logits_of(base_model(task), task)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(task), str(tmp_path)).eval()
    assert type(again) is type(model)
    assert torch.equal(logits_of(again, task), logits_of(model, task))
    assert not torch.allclose(logits_of(again, task), base, atol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_the_merged_model_gives_the_same_answer(task):
    model, _ = trained(task)
    expected = logits_of(model, task)
    merged = model.merge_and_unload()
    assert not any(True for _ in iter_nora_layers(merged))
    assert torch.allclose(logits_of(merged, task), expected, atol=1e-5)


def test_sequence_to_sequence_generates_as_the_merged_model_does():
    model, _ = trained(TaskType.SEQ_2_SEQ_LM)
    options = {"input_ids": IDS, "max_new_tokens": 5, "do_sample": False}
    words = model.generate(**options)
    assert torch.equal(model.merge_and_unload().generate(**options), words)
