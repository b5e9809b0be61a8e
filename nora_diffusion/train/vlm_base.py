"""Vision-language models as bases: found, checked, and loaded with their processor.

Pictures are all that is asked here, so a processor that also reads videos does without that half
where torchvision, which it needs for them, is missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.utils import is_torchvision_available

from nora_diffusion.families.base import resolve_device, resolve_dtype
from nora_diffusion.families.quiet import quiet_loading
from nora_diffusion.settings import UserError, quote
from nora_diffusion.vision_language_config import VisionLanguageConfig

_VIDEOS = "video_processor"
_PARTS = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
# SmolVLM's processor asks its video half for settings in every call; that of Idefics3, the model it
# was made from, treats pictures the same.
_FOR_PICTURES = {"SmolVLMProcessor": Idefics3Processor}


def check_base(base: str) -> None:
    """Refuse what needs no download to be seen: the built-in CLIP, a path to nothing, another type.

    Raises:
        UserError: saying which task takes the base, or what is wanted.
    """
    if base == "mini_clip":
        raise UserError(
            'model.base = "mini_clip": is the built-in CLIP, which writes no text and is for '
            'model.task = "few_shot" (nora vlm clip_fewshot); for "instructions" give a model that '
            "reads pictures and writes text, such as HuggingFaceTB/SmolVLM-256M-Instruct"
        )
    path = Path(base).expanduser()
    if path.is_dir():
        _config_of(base)
    elif path.is_absolute() or base.count("/") > 1:
        raise UserError(
            f"model.base = {quote(base)}: no such folder; give one of save_pretrained, or a hub id"
        )


def load_vlm(config: VisionLanguageConfig) -> tuple[Any, Any]:
    """Returns the frozen model and its processor.

    Raises:
        UserError: it cannot be loaded, has no chat template, or there is no such device.
    """
    base = config.model.base
    check_base(base)
    device = resolve_device(config.model.device, mps=False)
    dtype = resolve_dtype(config.model.dtype, device)
    processor = load_processor(base)
    if not getattr(processor, "chat_template", None):
        raise UserError(f"model.base = {quote(base)}: its processor has no chat template")
    with _told(base):
        model = AutoModelForImageTextToText.from_pretrained(_place(base), dtype=dtype)
    return model.requires_grad_(False).to(device), processor  # pyright: ignore[reportArgumentType]


def load_processor(base: str) -> Any:
    """The processor of a base; without torchvision, one that reads no videos.

    Raises:
        UserError: it cannot be loaded, or not without torchvision.
    """
    of_base = _config_of(base)
    with _told(base), quiet_loading():
        try:
            return AutoProcessor.from_pretrained(_place(base))
        except (OSError, ValueError, ImportError) as error:
            told = str(error).lower()
            if is_torchvision_available() or not ("torchvision" in told or "video" in told):
                raise
    kind: Any = PROCESSOR_MAPPING.get(type(of_base), None)
    kind = _FOR_PICTURES.get(getattr(kind, "__name__", ""), kind)
    try:
        with quiet_loading():
            return _without_videos(kind, _place(base))
    except Exception as error:  # as many as there are processors
        raise UserError(
            f"model.base = {quote(base)}: its processor needs torchvision, which is not "
            "installed; run: pip install torchvision"
        ) from error


def _without_videos(kind: Any, place: str) -> Any:
    """A processor as ``kind.from_pretrained`` makes it, but for the part that reads videos.

    Raises:
        Exception: of any type, where a class needs that part, or has others than are known here.
    """

    class Pictures(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == _VIDEOS and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    Pictures.__name__ = kind.__name__  # some tell models apart by it
    parts = [
        None if name == _VIDEOS else _PARTS[name].from_pretrained(place)
        for name in kind.get_attributes()
    ]
    described, _ = kind.get_processor_dict(place)
    return Pictures.from_args_and_dict(parts, described)


def _config_of(base: str) -> Any:
    """The config of a base.

    Raises:
        UserError: it cannot be had, or is that of another kind of model.
    """
    with _told(base):
        found = AutoConfig.from_pretrained(_place(base))
    if type(found) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"model.base = {quote(base)}: is a model of type {quote(found.model_type)}, which does "
            "not read pictures and write text; give one that does, such as "
            "HuggingFaceTB/SmolVLM-256M-Instruct (any AutoModelForImageTextToText)"
        )
    return found


def _place(base: str) -> str:
    path = Path(base).expanduser()
    return str(path) if path.is_dir() else base


@contextmanager
def _told(base: str) -> Iterator[None]:
    """What transformers raises, as a mistake in ``model.base``."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"model.base = {quote(base)}: no model that reads pictures and writes text could be "
            f"loaded: {lines[0]}"
        ) from None
