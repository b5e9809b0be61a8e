"""``train.steps = "auto"``: how long to train, from the photos that are there."""

from __future__ import annotations

from nora_diffusion.config import DreamboothConfig
from nora_diffusion.presets import auto_steps
from nora_diffusion.train.photos import all_photos, read_subjects


def resolve_steps(cfg: DreamboothConfig, processes: int = 1) -> tuple[DreamboothConfig, str | None]:
    """The settings with a number for ``train.steps``, and a line that says where it is from.

    The line is None where a number was given. Each of the ``processes`` takes a batch of its own.

    Raises:
        UserError: when the photos cannot be counted.
    """
    train = cfg.train
    if train.steps != "auto":
        return cfg, None
    photos = len(all_photos(read_subjects(cfg)))
    pictures = train.batch_size * train.gradient_accumulation_steps * processes
    steps = auto_steps(photos, pictures)
    told = (
        f"train.steps = auto: {steps} steps, for {photos} photo{'s' if photos > 1 else ''} and "
        f"{pictures} picture{'s' if pictures > 1 else ''} a step"
    )
    return cfg.model_copy(update={"train": train.model_copy(update={"steps": steps})}), told
