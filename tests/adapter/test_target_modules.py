"""`target_modules`: "attention" in models of every kind, "all-linear", expressions, lists."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nora_diffusion import load_adapter, save_adapter
from nora_diffusion.adapter import NoraConfig, attention_projections, iter_nora_layers
from nora_diffusion.adapter.components import plain_name
from tests.tiny import tiny_unet

RANKS = {"r": 8, "inner_r": 2}
TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 60, "num_layers": 2}
BERT_NAMES = "self.query self.key self.value attention.output.dense"
# Of each: the model, and the names of the projections of one attention.
MODELS = {
    "LlamaForCausalLM": (TINY, "q_proj k_proj v_proj o_proj", 2),
    "Qwen2ForCausalLM": (TINY, "q_proj k_proj v_proj o_proj", 2),
    "Qwen3ForCausalLM": (TINY, "q_proj k_proj v_proj o_proj", 2),
    "Phi3ForCausalLM": (TINY, "qkv_proj o_proj", 2),
    "GPT2LMHeadModel": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60},
        "attn.c_attn attn.c_proj",
        2,
    ),
    "GPTNeoXForCausalLM": (TINY, "attention.query_key_value attention.dense", 2),
    "BertModel": (TINY, BERT_NAMES, 2),
    "RobertaForSequenceClassification": (TINY, BERT_NAMES, 2),
    "DistilBertModel": (
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 60},
        "q_lin k_lin v_lin out_lin",
        2,
    ),
    "ModernBertModel": (TINY, "attn.Wqkv attn.Wo", 2),
    "CLIPTextModel": (TINY, "q_proj k_proj v_proj out_proj", 2),
    # Two of its layers attend to themselves in the encoder, two in the decoder, which attend to the
    # encoder too.
    "T5ForConditionalGeneration": (T5, "Attention.q Attention.k Attention.v Attention.o", 6),
    "T5EncoderModel": (T5, "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o", 2),
    "ViTModel": (
        {**TINY, "image_size": 8, "patch_size": 4},
        "q_proj k_proj v_proj o_proj",
        2,
    ),
}


def build(name: str) -> nn.Module:
    fields = MODELS[name][0]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**fields)).eval()


def adapted(model: nn.Module) -> list[str]:
    return [
        plain_name(name).removeprefix("base_model.model.") for name, _ in iter_nora_layers(model)
    ]


def nora(target_modules="attention", **fields) -> NoraConfig:
    return NoraConfig(**RANKS, target_modules=target_modules, **fields)


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_its_projections_and_nothing_else(name):
    _, names, count = MODELS[name]
    model = build(name)
    wanted = [
        found
        for found, module in model.named_modules()
        if found.endswith(tuple(names.split())) and hasattr(module, "weight")
    ]
    assert len(wanted) == len(names.split()) * count
    assert list(attention_projections(model)) == wanted
    model.add_adapter(nora())
    assert adapted(model) == wanted
    assert list(attention_projections(model)) == wanted  # an adapted model names them alike


def test_attention_through_get_peft_model_and_both_kinds_of_add_adapter():
    model = get_peft_model(build("BertModel"), nora())
    names = adapted(model)
    model.add_adapter("second", nora())
    assert adapted(model) == names == adapted(get_peft_model(build("BertModel"), nora()))
    config = nora()
    unet = tiny_unet()
    unet.add_adapter(config)
    assert set(adapted(unet)) == set(attention_projections(tiny_unet()))
    assert {name.rpartition(".attn")[2][2:] for name in adapted(unet)} == {
        "to_q", "to_k", "to_v", "to_out.0"
    }  # fmt: skip


def test_attention_beside_a_lora_that_is_there_already():
    model = build("LlamaForCausalLM")
    wanted = list(attention_projections(model))
    model.add_adapter(LoraConfig(r=2, target_modules=wanted), "lora")
    assert list(attention_projections(model)) == wanted
    model.add_adapter(nora(), "nora")
    assert adapted(model) == wanted


def test_a_saved_config_names_the_modules_that_were_adapted(tmp_path):
    model = get_peft_model(build("GPT2LMHeadModel"), nora(init_weights=False))
    model.save_pretrained(tmp_path / "peft")
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == sorted(adapted(model))
    again = PeftModel.from_pretrained(build("GPT2LMHeadModel"), str(tmp_path / "peft"))
    ids = torch.arange(5)[None]
    assert adapted(again) == adapted(model)
    assert torch.equal(again(ids).logits, model(ids).logits)

    file = save_adapter(model, tmp_path / "adapter.safetensors")
    native = build("GPT2LMHeadModel")
    assert load_adapter(native, file) == len(adapted(model))
    assert adapted(native) == adapted(model)
    assert torch.equal(native(ids).logits, model(ids).logits)


def test_a_saved_config_stays_short_in_a_large_model():
    fields = {**TINY, "num_hidden_layers": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    config = nora()
    model.add_adapter(config)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("target_modules", "wanted"),
    [
        ("all-linear", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (r".*\.mlp\.(up|down)_proj", "up_proj down_proj"),
        (["q_proj", "v_proj"], "q_proj v_proj"),
    ],
)
def test_the_other_ways_to_name_modules(target_modules, wanted):
    model = build("LlamaForCausalLM")
    model.add_adapter(nora(target_modules))
    assert {name.rpartition(".")[2] for name in adapted(model)} == set(wanted.split())
    assert len(adapted(model)) == 2 * len(wanted.split())


def test_exclude_modules_applies_to_attention():
    model = build("LlamaForCausalLM")
    model.add_adapter(nora(exclude_modules=["k_proj"]))
    assert len(adapted(model)) == 6 and not any("k_proj" in name for name in adapted(model))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Linear(8, 8)


def test_torchs_own_attention_is_one_target():
    """Its out_proj is never called, so a layer in its place would learn nothing."""
    blocks = nn.Sequential(Block(), Block())
    assert list(attention_projections(blocks)) == ["0.attn", "1.attn"]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict(
            {name: nn.Linear(4, 4) for name in ("to_q", "to_out_gate", "pos_bias")}
        )
        self.attentions = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(4, 4)})])


def test_gates_and_lists_of_blocks_are_no_projections():
    assert list(attention_projections(Gated())) == ["attention.to_q"]


def test_a_model_without_attention_is_told_what_was_looked_for():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    with pytest.raises(ValueError, match="Target modules not found in this Sequential") as error:
        get_peft_model(model, nora())
    message = str(error.value)
    assert "query, key, value" in message and 'ends with "attn"' in message
    assert "N.0 (3)" in message and "all-linear" in message
