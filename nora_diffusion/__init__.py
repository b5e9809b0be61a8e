"""NoRA: nested low-rank adaptation that teaches diffusion models a subject from a few photos.

Importing this package is cheap: it pulls in neither torch nor PEFT. The public names below are
resolved on first use (PEP 562), and the first of them that is touched registers the PEFT type
``NORA``. Code that only calls ``PeftModel.from_pretrained`` on a NoRA folder must
``import nora_diffusion.adapter`` first.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import NoraConfig
    from .adapter.files import adapter_info, save_adapter
    from .adapter.lora import export_lora
    from .denoiser_hooks import load_adapter
    from .families import load_pipeline

__version__ = "0.1.0"

_HOME_OF = {
    "NoraConfig": "nora_diffusion.adapter",
    "adapter_info": "nora_diffusion.adapter.files",
    "export_lora": "nora_diffusion.adapter.lora",
    "load_adapter": "nora_diffusion.denoiser_hooks",
    "load_pipeline": "nora_diffusion.families",
    "save_adapter": "nora_diffusion.adapter.files",
}

__all__ = [
    "NoraConfig",
    "adapter_info",
    "export_lora",
    "load_adapter",
    "load_pipeline",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use.

    Raises:
        AttributeError: ``name`` is not one of ``nora_diffusion.__all__``.
    """
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Every public name works on NoRA layers or files, so the first of them registers the PEFT type.
    importlib.import_module("nora_diffusion.adapter")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names beside what is loaded already."""
    return sorted({*globals(), *__all__})
