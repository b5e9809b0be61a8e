"""The schema of ``nora-dreambooth``: its files, overrides, form fields and saved runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from nora_diffusion import run_config
from nora_diffusion.presets import find_preset
from nora_diffusion.run_config import RUN_CONFIG, save_config
from nora_diffusion.schema import RunConfig, Section, setting
from nora_diffusion.sections import Adapter, Model, Output, Sample, TextEncoder, Train
from nora_diffusion.settings import ConfigError, UserError
from nora_diffusion.subjects import Subject, SubjectFolder, find_problems, settle_subjects

__all__ = [
    "RUN_CONFIG",
    "ConfigError",
    "DreamboothConfig",
    "SubjectFolder",
    "UserError",
    "load_config",
    "load_run",
    "save_config",
]


class Data(Section):
    """The photos and the words for them."""

    subject: str | None = setting(
        None,
        "Folder with 1 to 20 photos of the subject, unless data.subjects is given; on resume only "
        "another place of the same ones.",
        required=True,
        min_length=1,
        resume=True,
    )
    class_name: str | None = setting(
        None,
        'Common noun for the subject, such as "dog" or "toy".',
        required=True,
        min_length=1,
    )
    trigger: str = setting("sks", "Word that will stand for the subject in prompts.", min_length=1)
    subjects: tuple[Subject, ...] = setting(
        (),
        "Several subjects in one run, instead of data.subject; what one leaves out is taken from "
        "data. On resume only their paths may change.",
        allowed="a list of tables { path, trigger, class_name, repeats, class_images }",
        strict=False,
    )
    repeats: int = setting(
        1, "Times an epoch shows each photo: more for a folder with fewer of them.", ge=1
    )
    resolution_px: int | None = setting(
        None,
        "Side of the training images; none: the base model's own.",
        unit="px",
        ge=32,
        le=4096,
        multiple_of=8,
    )
    buckets: bool = setting(
        False, "Keep the photos' proportions at about the same area, instead of cutting squares."
    )
    captions: bool = setting(
        True,
        "Use a photo's caption (NAME.txt, NAME.json, metadata.jsonl, ...) as its prompt; {trigger} "
        "and {class_name} are filled in.",
    )
    caption_dropout: float = setting(
        0.0, "Share of the photos shown with the empty prompt.", ge=0, le=1
    )
    trigger_dropout: float = setting(
        0.0, "Share of the photos shown without the trigger in their prompt.", ge=0, le=1
    )
    masks: bool = setting(
        False,
        "Weigh the loss by what is white in a photo's mask (NAME-masklabel.png, masks/NAME.png, "
        "else its transparency).",
    )
    mask_background: float = setting(
        0.1, "Weight of what a mask leaves out, under data.masks.", ge=0, le=1
    )
    flip: bool = setting(False, "Also train on mirrored photos.")
    crop: Literal["center", "random"] = setting(
        "center", "Where a photo that is too long is cut off."
    )
    color_jitter: float = setting(
        0.0,
        "Also train on variants whose brightness, contrast and saturation differ by up to this "
        "share.",
        ge=0,
        le=0.5,
    )
    class_images: str | None = setting(
        None,
        'Folder of class images for train.prior = "class_images"; images that are missing are '
        "made by the base model.",
        min_length=1,
    )
    cache: bool = setting(True, "Keep encoded images on disk for the next run.", resume=True)

    @model_validator(mode="after")
    def _subjects_are_whole(self) -> Self:
        missing = {
            name: f"data.{name}: missing; give it as --data.{name} "
            f"({(type(self).model_fields[name].description or '').rstrip('.')})"
            for name in ("subject", "class_name")
        }
        problems = find_problems(self, missing)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def each(self) -> tuple[SubjectFolder, ...]:
        """The subjects, with everything settled; one where ``data.subject`` is given."""
        return settle_subjects(self)


class DreamboothConfig(RunConfig):
    """All settings of one ``nora-dreambooth`` run."""

    command: ClassVar[str] = "nora-dreambooth"

    model: Model = Model()
    adapter: Adapter = Adapter()
    text_encoder: TextEncoder = TextEncoder()
    data: Data
    train: Train = Train()
    sample: Sample = Sample()
    output: Output = Output()

    @model_validator(mode="after")
    def _one_rate_for_prodigy(self) -> Self:
        rate = self.text_encoder.learning_rate
        if self.train.optimizer == "prodigy" and rate not in (None, self.train.learning_rate):
            raise ValueError(
                f"text_encoder.learning_rate = {rate:g}: Prodigy finds one rate for all that is "
                'trained; set it to "none"'
            )
        return self


def fill_prompt(text: str, trigger: str, class_name: str) -> str:
    """Put the trigger word and the class into a prompt or caption.

    Only ``{trigger}`` and ``{class_name}`` are replaced; other braces stay as they are.
    """
    return text.replace("{trigger}", trigger).replace("{class_name}", class_name)


def shipped_configs() -> dict[str, Path]:
    """The configs for ``nora-dreambooth`` that come with the package, by name."""
    return run_config.shipped_configs(DreamboothConfig.command)


def load_config(
    source: str | Path, overrides: Sequence[str] = (), preset: str | None = None
) -> DreamboothConfig:
    """Read a config file or a shipped config, and lay a preset and then overrides over it.

    Args:
        source: path of a TOML file, or the name of a shipped config such as ``"mini"``.
        overrides: as on the command line: ``"--train.steps", "300"`` or ``"train.steps=300"``.
        preset: name of one of ``presets.PRESETS``.

    Raises:
        ConfigError: naming every problem at once.
    """
    choices = () if preset is None else find_preset(preset)
    return run_config.load_config(DreamboothConfig, source, overrides, choices)


def load_run(
    folder: str | Path, overrides: Sequence[str] = (), preset: str | None = None
) -> DreamboothConfig:
    """The config of an existing run, for resuming it; see ``run_config.load_run``.

    Args:
        folder: the run folder.
        overrides: may change only the keys that leave finished steps as they are.
        preset: taken before the overrides, under the same rule.

    Raises:
        ConfigError: when an override contradicts the run, or its config is spoilt.
    """
    choices = () if preset is None else find_preset(preset)
    return run_config.load_run(DreamboothConfig, folder, overrides, choices)
