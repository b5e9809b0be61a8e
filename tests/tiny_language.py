"""Tiny language models with random weights, and a tokenizer of bytes with a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
KINDS = ("llama", "qwen2", "gpt2")


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a byte, and one for each role and the end of a message."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>"
    )
    made.chat_template = template
    return made


def tiny_model(kind: str = "llama", seed: int = 0):
    """A frozen causal language model of some 30,000 weights, float32, in evaluation mode."""
    torch.manual_seed(seed)
    vocab = len(tiny_tokenizer())
    common = {"vocab_size": vocab, "pad_token_id": 256, "eos_token_id": 260, "bos_token_id": 260}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common)
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        of_kind = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        }
        make_config, make_model = of_kind[kind]
        model = make_model(make_config(**sizes, **heads, max_position_embeddings=256, **common))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so large that answers are far from uniform
            torch.nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    return model.eval()


def save_base(folder: Path, kind: str = "llama") -> str:
    """A base as a folder of ``save_pretrained``."""
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def write_questions(file: Path, count: int) -> str:
    """Which letter stands twice? In the form of LLM-Adapters."""
    rows = []
    for index in range(count):
        letter = "abc"[index % 3]
        rows.append(
            {
                "instruction": f"{letter}{letter}? {index}\n\nAnswer format: a/b/c",
                "input": "",
                "output": f"it is {letter}",
                "answer": letter,
            }
        )
    file.write_text(json.dumps(rows))
    return str(file)
