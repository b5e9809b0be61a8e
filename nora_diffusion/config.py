"""The one schema: config files, command-line overrides, form fields and saved runs come from it."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import model_validator

from nora_diffusion.disk import write_atomically
from nora_diffusion.presets import Choice, find_preset
from nora_diffusion.schema import Section, get_key, list_keys, setting
from nora_diffusion.sections import Adapter, Model, Output, Sample, TextEncoder, Train
from nora_diffusion.settings import (
    ConfigError,
    UserError,
    apply_overrides,
    quote,
    read_toml,
    to_toml,
    validate,
)
from nora_diffusion.subjects import Subject, SubjectFolder, find_problems, settle_subjects

__all__ = [
    "ConfigError",
    "DreamboothConfig",
    "SubjectFolder",
    "UserError",
    "load_config",
    "load_run",
]

RUN_CONFIG = "config.toml"
"""Name of the resolved config inside a run folder."""


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


class DreamboothConfig(Section):
    """All settings of one ``nora-dreambooth`` run."""

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
    """The configs that come with the package, by name."""
    package = Path(__file__).parent
    # A wheel carries them inside the package; a checkout keeps them at its top level.
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


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
    given = _lay_over(read_toml(find_config(source)), choices)
    values, problems = apply_overrides(DreamboothConfig, given, overrides)
    origin = f"{source} and the command line" if overrides else str(source)
    return validate(DreamboothConfig, values, origin, problems)


def _lay_over(values: dict[str, Any], choices: Sequence[Choice]) -> dict[str, Any]:
    """A preset's choices over the values of a file."""
    merged = dict(values)
    for choice in choices:
        section, key = choice.key.split(".")
        given = merged.get(section, {})
        if isinstance(given, dict):  # else validate says what is wrong with the section
            merged[section] = {**cast(dict[str, Any], given), key: choice.value}
    return merged


def find_config(source: str | Path) -> Path:
    """The file behind a path or a shipped name.

    Raises:
        ConfigError: when there is no such file and no shipped config of that name.
    """
    shipped = shipped_configs()
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    near = difflib.get_close_matches(str(source), shipped, n=1)
    problem = f"CONFIG = {quote(str(source))}: no such file, nor one of {', '.join(shipped)}"
    problem += f"; did you mean {near[0]}?" if near else ""
    raise ConfigError([problem], "the command line")


def save_config(config: DreamboothConfig, folder: str | Path) -> Path:
    """Write the resolved config into a run folder, atomically; returns its path."""
    path = Path(folder) / RUN_CONFIG
    text = f"# Continue this run with: nora-dreambooth --resume DIR\n{to_toml(config)}"
    write_atomically(path, text.encode())
    return path


_SPOILT = (
    "The run's checkpoints do not depend on this file. Print the settings the run was started with "
    "by nora-dreambooth CONFIG ... --dry-run (with another --output.dir), put them in its place, "
    "and resume: they are compared with those of the checkpoint."
)


def load_run(
    folder: str | Path, overrides: Sequence[str] = (), preset: str | None = None
) -> DreamboothConfig:
    """The config of an existing run, for resuming it.

    Args:
        folder: the run folder; it becomes ``output.dir``, so a run may have been moved.
        overrides: may change only the keys that leave finished steps as they are (and repeat
            any other key with the run's own value).
        preset: taken before the overrides, under the same rule.

    Raises:
        ConfigError: when an override contradicts the run, or its config is spoilt.
    """
    path = Path(folder) / RUN_CONFIG
    try:
        saved = read_toml(path)
        if isinstance(output := saved.setdefault("output", {}), dict):
            output["dir"] = str(folder)
        before = validate(DreamboothConfig, saved, str(path))
    except ConfigError as error:
        raise ConfigError(error.problems, str(path), _SPOILT) from None
    choices = () if preset is None else find_preset(preset)
    given = _lay_over(saved, choices)
    values, problems = apply_overrides(DreamboothConfig, given, overrides)
    after = validate(DreamboothConfig, values, f"{path} and the command line", problems)

    keys = list_keys(DreamboothConfig)
    free = ", ".join(key.name for key in keys if key.resume)
    contradictions = [
        f"{key.name} = {quote(get_key(after, key.name))}: this run was started with "
        f"{quote(get_key(before, key.name))}"
        for key in keys
        if not key.resume and _differs(key.name, before, after)
    ]
    if contradictions:
        cure = f"A resumed run can change only {free}; for others start one in a new output.dir."
        raise ConfigError(contradictions, f"the settings for resuming {folder}", cure)
    return after


def _differs(name: str, before: DreamboothConfig, after: DreamboothConfig) -> bool:
    old, new = get_key(before, name), get_key(after, name)
    if name == "output.dir":
        return Path(old).resolve() != Path(new).resolve()
    if name == "data.subjects":  # photos may be in another place
        old, new = ([one.model_dump(exclude={"path"}) for one in each] for each in (old, new))
    return old != new
