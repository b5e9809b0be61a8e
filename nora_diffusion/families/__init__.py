"""Model families: which there are, which one a base model belongs to, and loading one.

The names can be read without importing torch.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nora_diffusion.config import UserError

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from nora_diffusion.families.base import Family

FAMILIES = {
    "sd": "nora_diffusion.families.sd",
    "sdxl": "nora_diffusion.families.sdxl",
    "sd3": "nora_diffusion.families.sd3",
    "flux": "nora_diffusion.families.flux",
    "flux2_klein": "nora_diffusion.families.flux2_klein",
    "z_image": "nora_diffusion.families.z_image",
    "pixart": "nora_diffusion.families.pixart",
    "sana": "nora_diffusion.families.sana",
}
"""Family name to its module; the module's ``FAMILY`` is the class."""

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2_klein",
    "ZImagePipeline": "z_image",
    "PixArtSigmaPipeline": "pixart",
    "SanaPipeline": "sana",
}
"""diffusers pipeline class to family name."""

ASSETS = Path(__file__).parent.parent / "assets"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ALLOWED = (
    '"mini" or "mini-128", a Hugging Face id such as "owner/name", a diffusers folder or a '
    ".safetensors file"
)


def load_pipeline(base: Any = "mini", **kwargs: Any) -> DiffusionPipeline:
    """Load a base model as a diffusers pipeline.

    Args:
        base: ``"mini"`` or ``"mini-128"`` (built in), a Hugging Face id, a diffusers folder, or
            one .safetensors file: Stable Diffusion 1.x, 2.x or XL in the original layout (read
            without any download), or the transformer of SD 3, Flux.1, Flux.2 klein or Z-Image (the
            other parts from the diffusers folder it lies in, or from the hub).
        kwargs: for diffusers' ``from_pretrained`` or ``from_single_file``, such as ``dtype``
            (also under its older name ``torch_dtype``); for a single SD 2.x file also
            ``prediction_type="epsilon" | "v_prediction"``, which is otherwise found out from
            the weights.

    Raises:
        UserError: when there is no such base, or none of a family this package knows.
    """
    if "torch_dtype" in kwargs:
        if "dtype" in kwargs:
            raise UserError("dtype and torch_dtype are two names of one setting; give dtype alone")
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    source = locate(base)
    with _quiet(source), told_of_damage(base):
        pipe = family_class(detect_family(source)).load_pipeline(source, **kwargs)
    _name_parts(pipe, _lasting_name(source))
    return pipe


def load_family(
    base: Any,
    *,
    family: str = "auto",
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = "none",
    **kwargs: Any,
) -> Family:
    """Load a base model for training and sampling; further arguments as for ``load_pipeline``.

    Args:
        base: as ``load_pipeline`` takes it.
        family: its family's name, or "auto".
        dtype: number format of denoiser and text encoders.
        device: where they go.
        quantize: "none", or the format of the frozen linear layers: "nf4", "int8" or "fp8".
        kwargs: for ``load_pipeline``.

    Raises:
        UserError: when there is no such base, ``family`` does not fit it, or the library that
            quantises is missing.
    """
    source = locate(base)
    with _quiet(source), told_of_damage(base):
        found = detect_family(source)
        if quantize != "none":
            kwargs |= _quantise().while_loading(source, quantize, dtype)
        if family not in ("auto", found):
            raise UserError(
                f'model.family = "{family}": {base} is of family "{found}"; '
                f'use "auto" or one of {", ".join(FAMILIES)} that fits the base'
            )
        loaded = family_class(found).load(source, dtype=dtype, device=device, **kwargs)
        if quantize != "none":
            _quantise().after_loading(loaded.components.pipeline, quantize, dtype)
    loaded.components.base = _lasting_name(source)
    _name_parts(loaded.components.pipeline, loaded.components.base)
    return loaded


@contextmanager
def told_of_damage(base: Any) -> Iterator[None]:
    """Turn what libraries raise on damaged or missing files of a base into a ``UserError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the system: it names the file itself
            raise
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f'model.base = "{base}": cannot be read ({first}); files of it are damaged or missing: '
            "download or copy it again"
        ) from error


def family_class(name: str) -> Any:
    """The class of a family by its name.

    Raises:
        UserError: on an unknown name.
    """
    if name not in FAMILIES:
        raise UserError(f'model.family = "{name}": use "auto" or one of {", ".join(FAMILIES)}')
    return importlib.import_module(FAMILIES[name]).FAMILY


def locate(base: Any) -> str | Path:
    """Where a base model is: a path on this machine, or the Hugging Face id itself.

    Raises:
        UserError: when ``base`` is none of the allowed kinds.
    """
    text = str(base)
    shipped = ASSETS / text
    if re.fullmatch(r"[\w-]+", text) and (shipped / "model_index.json").is_file():
        return shipped
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(
                f'model.base = "{text}": this folder has no model_index.json, so it is no '
                f"diffusers pipeline; give {_ALLOWED}"
            )
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f'model.base = "{text}": only .safetensors files are read, because other formats '
                "can run code when opened; convert the file, or use another download of the model"
            )
        return path
    if text == "mini":
        raise UserError('model.base = "mini": its weights are missing from this installation')
    if _HUB_ID.fullmatch(text) and path.suffix != ".safetensors":
        return text
    raise UserError(f'model.base = "{text}": there is no such file or folder; give {_ALLOWED}')


def built_in_version(base: str) -> dict[str, str]:
    """Name and hash of a built-in base as released (``mini-64-v3``); empty for other bases."""
    path = ASSETS / base / "mini.json"
    if not re.fullmatch(r"[\w-]+", base) or not path.is_file():
        return {}
    about = json.loads(path.read_text(encoding="utf-8"))
    return {"base_version": about["name"], "base_hash": about["hash"]}


def detect_family(source: Any) -> str:
    """Family name of a loaded pipeline, a located base model, or a single file.

    Raises:
        UserError: when its family is not supported or the hub cannot be reached.
    """
    if isinstance(source, Path) and source.is_file():
        return importlib.import_module("nora_diffusion.families.single_file").detect_family(source)
    if isinstance(source, str | Path):
        class_name = _pipeline_class(source)
    else:
        class_name = type(source).__name__
    if class_name not in PIPELINES:
        raise UserError(
            f"model.base = {str(source)!r}: it is a {class_name}; supported pipelines are "
            f"{', '.join(PIPELINES)}"
        )
    return PIPELINES[class_name]


def _lasting_name(source: str | Path) -> str:
    """What a located base is called in any working folder; a built-in one on any machine."""
    if isinstance(source, str):
        return source
    return source.name if source.parent == ASSETS else str(source.resolve())


def _name_parts(pipe: Any, base: str) -> None:
    """Tell a pipeline and its models what they were loaded from, for adapters saved from them."""
    from torch import nn

    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    part: Any
    for part in (pipe, *models):
        if hasattr(part, "register_to_config"):  # of diffusers, whose configs are frozen
            part.register_to_config(_name_or_path=base)
        elif hasattr(part, "config"):
            part.config._name_or_path = base


def _quantise() -> Any:
    return importlib.import_module("nora_diffusion.families.quantise")


def _quiet(source: str | Path) -> AbstractContextManager[None]:
    from nora_diffusion.families.quiet import quiet_loading

    return quiet_loading(bars=isinstance(source, str))  # a hub id may have to be downloaded


def _pipeline_class(source: str | Path) -> str:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        config = cast(dict[str, Any], DiffusionPipeline.load_config(str(source)))
    except OSError as error:
        raise UserError(
            f'model.base = "{source}": neither on this machine nor found on the Hugging Face hub '
            f"({str(error).splitlines()[0]}); give {_ALLOWED}"
        ) from error
    return str(config["_class_name"])
