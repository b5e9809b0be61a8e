"""Names of adapted modules as other programs spell them: pure functions on strings.

A module is known here by its component (`unet`, `transformer`, `text_encoder`, `text_encoder_2`, or
`model` for a bare model) and its dotted path inside that component.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
DENOISERS = ("unet", "transformer")
BARE_MODEL = "model"
_IN_CLIP = ("embeddings.", "encoder.layers.", "final_layer_norm")


@dataclass(frozen=True)
class Dialect:
    """What a kohya-style name depends on besides the module's own name.

    Attributes:
        sdxl: SDXL files name UNet blocks as the original (SGM) code does and number the text
            encoders; SD 1.x and 2.x files use the diffusers block names and one `te`.
        layers_per_block: resnets in each block of the UNet, which the SGM numbering counts.
        transformer: "flux" or "sd3" where files name the layers of the transformer's original code
            (`original_keys`) and number the text encoders as SDXL files do, else "".
    """

    sdxl: bool = False
    layers_per_block: int = 2
    transformer: str = ""


def text_encoder_path(module: str) -> str:
    """Path of a text encoder's module, with the `text_model.` level if the encoder is a CLIP.

    transformers 5 dropped that level from `CLIPTextModel` (not from `CLIPTextModelWithProjection`),
    but files of every other program keep it. T5 and Gemma never had it.
    """
    return f"text_model.{module}" if module.startswith(_IN_CLIP) else module


def diffusers_name(component: str, module: str) -> str:
    """Name in the diffusers layout, e.g. `unet.mid_block.attentions.0.proj_in`."""
    return f"{component}.{_clip_path(component, module)}"


def kohya_name(component: str, module: str, dialect: Dialect) -> str:
    """Name in the kohya-ss layout, which A1111 and ComfyUI read too.

    Args:
        component: name of the model in its pipeline.
        module: path in it; in a transformer a layer of the original code.
        dialect: of the names.

    Raises:
        ValueError: the layout has no name for this component.
    """
    if component == "unet":
        path = sgm_path(module, dialect.layers_per_block) if dialect.sdxl else module
        prefix = "lora_unet_"
    elif component == "transformer" and dialect.transformer:
        path, prefix = module, "lora_unet_"
    elif component in TEXT_ENCODERS:
        path = text_encoder_path(module)
        numbered = dialect.sdxl or dialect.transformer
        prefix = f"lora_te{TEXT_ENCODERS.index(component) + 1 if numbered else ''}_"
    else:
        raise ValueError(
            f"layout 'kohya' names the modules of SD 1.x, 2.x, SDXL, SD 3 and Flux.1, not of "
            f"this {component!r}; use layout='diffusers'"
        )
    return prefix + path.replace(".", "_")


_SGM_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def sgm_path(module: str, layers_per_block: int) -> str:
    """Path of a diffusers UNet module in the original SDXL code (SGM).

    SGM numbers the layers of the encoder and of the decoder straight through: a block of `n`
    layers takes `n + 1` numbers, the last of them (or the end of the last decoder layer) for its
    sampler; number 0 of the encoder is `conv_in`.

    Raises:
        ValueError: no such module in that code.
    """
    if module in _SGM_FIXED:
        return _SGM_FIXED[module]
    match = _BLOCK.fullmatch(module)
    if match is None:
        raise ValueError(f"UNet module {module!r} has no name in SDXL's original block structure")
    kind, layer, rest = match["kind"], int(match["layer"]), match["rest"]
    if kind == "resnets":
        rest = _SGM_RESNET.get(rest, rest)
    inner = 0 if kind == "resnets" else 1
    if match["side"] is None:
        return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
    first = int(match["block"]) * (layers_per_block + 1)
    if match["side"] == "down":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block + 1}.0.op"
        return f"input_blocks.{first + layer + 1}.{inner}.{rest}"
    if kind == "upsamplers":
        # Every SDXL decoder block that has a sampler has attention, so the sampler comes third.
        return f"output_blocks.{first + layers_per_block}.2.{rest}"
    return f"output_blocks.{first + layer}.{inner}.{rest}"


def find_module(name: str, available: Collection[str]) -> str | None:
    """Module of a model under the name a file gives it, or None.

    Accepts a CLIP path with or without its `text_model.` level.
    """
    stripped = name.removeprefix("text_model.")
    for candidate in (name, stripped, f"text_model.{stripped}"):
        if candidate in available:
            return candidate
    return None


def _clip_path(component: str, module: str) -> str:
    return text_encoder_path(module) if component in TEXT_ENCODERS else module
