"""Loading without the libraries' remarks and progress bars that tell a user nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

# Said of every base with a tiny autoencoder, of every machine without torchvision, of every model
# that is cast, and of int8 weights in float32: all work.
_HARMLESS = {
    "diffusers.models.modeling_utils": "should be kept in float32: []",
    "diffusers.configuration_utils": "were passed to AutoencoderTiny",
    "diffusers.pipelines.pipeline_utils": "Expected types for",
    "transformers.utils.import_utils": "requires torchvision",
    "diffusers.quantizers.torchao.torchao_quantizer": "only bfloat16 is supported right now",
}


@contextmanager
def quiet_loading(bars: bool = False) -> Iterator[None]:
    """Drop the harmless remarks, and the bars that run for a second; warnings stay.

    Args:
        bars: keep the progress bars, as downloads deserve.
    """
    with ExitStack() as stack:
        for name, text in _HARMLESS.items():
            stack.enter_context(_without(logging.getLogger(name), text))
        for library in () if bars else (diffusers_logging, transformers_logging):
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
        yield


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Drop the remark on a property that PEFT reads and transformers renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@contextmanager
def _without(logger: logging.Logger, text: str) -> Iterator[None]:
    def keep(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
