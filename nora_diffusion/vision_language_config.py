"""The schema of ``nora vlm``: few-shot classification with CLIP, and image instructions."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from nora_diffusion.schema import RunConfig, Section, setting
from nora_diffusion.sections import Seed

Tower = Literal["vision", "language"]


class Model(Section):
    """The base model, and what it shall learn."""

    base: str = setting(
        "mini_clip",
        'Base model: "mini_clip" (built in), a Hugging Face id or a folder; for few_shot a '
        "CLIPModel or an OpenCLIP folder, for instructions any AutoModelForImageTextToText.",
        min_length=1,
    )
    task: Literal["few_shot", "instructions"] = setting(
        "few_shot",
        "few_shot: classify pictures from a few of each class; instructions: answer questions on "
        "pictures.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Number format of the frozen base; auto: bf16 where the GPU has it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where to train; auto: cuda, then cpu.", resume=True
    )


class Adapter(Section):
    """The NoRA adapter on the attention of one tower or both."""

    r: int = setting(64, "Outer rank: directions taken from each frozen weight.", ge=1)
    inner_r: int = setting(8, "Inner rank: rank of the trained core; at most adapter.r.", ge=1)
    scaling: float = setting(1.0, "Factor on the adapter's output, independent of the ranks.", gt=0)
    init: Literal["orthogonal", "sigma"] = setting(
        "orthogonal", "Start of the inner pair; both leave the base model unchanged at step 0."
    )
    basis: Literal["weight", "weight_minor", "random"] = setting(
        "weight", "Where the frozen outer directions come from."
    )
    dropout: float = setting(
        0.0,
        "Share of the adapter's hidden features, of which a module has r, dropped while training.",
        ge=0.0,
        lt=1.0,
    )
    seed: Seed = setting(0, "Seed of the factorisation and of the inner initialisation.")
    towers: tuple[Tower, ...] = setting(
        ("vision", "language"), "Which towers to adapt.", min_length=1, strict=False
    )
    learning_rate: float = setting(3e-3, "Peak learning rate: 1 to 10 times what suits LoRA.", gt=0)

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.inner_r > self.r:
            raise ValueError(
                f"adapter.inner_r = {self.inner_r}: must be at most adapter.r = {self.r}"
            )
        return self


class FewShot(Section):
    """Classification from k pictures of each class, by the protocol of CLIP-LoRA."""

    images: str | None = setting(
        None,
        "Folder to learn from: a subfolder a class, named as prompts shall name it.",
        min_length=1,
        resume=True,
    )
    test: str | None = setting(
        None,
        "Folder of test pictures with the same subfolders; none: every second picture of "
        "few_shot.images, which is then not trained on.",
        min_length=1,
        resume=True,
    )
    template: str = setting("a photo of a {}", "Prompt of a class; {} is its name.", min_length=1)
    shots: tuple[int, ...] = setting(
        (1, 2, 4, 8, 16),
        "Numbers of training pictures a class.",
        min_length=1,
        strict=False,
        allowed="a non-empty list of whole numbers >= 1",
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2),
        "Seeds of the choice of pictures and of training.",
        min_length=1,
        strict=False,
        allowed="a non-empty list of whole numbers >= 0",
    )
    lora_ranks: tuple[int, ...] = setting(
        (2, 16),
        "Ranks of LoRA to train beside NoRA; an empty list: none.",
        strict=False,
        allowed="a list of whole numbers >= 1",
    )
    lora_learning_rate: float = setting(1e-3, "Peak learning rate of LoRA.", gt=0)

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        for name, least in (("shots", 1), ("seeds", 0), ("lora_ranks", 1)):
            wrong = [value for value in getattr(self, name) if value < least]
            if wrong:
                raise ValueError(f"few_shot.{name} = {wrong[0]}: must be at least {least}")
        if "{}" not in self.template:
            raise ValueError(
                f"few_shot.template = {self.template!r}: must hold {{}}, where the class goes"
            )
        return self


class Data(Section):
    """Image instructions: a JSON list, or JSON lines, of records."""

    train: str | None = setting(
        None,
        "File of records { image, instruction, output }, or { image, messages }.",
        min_length=1,
        resume=True,
    )
    test: str | None = setting(
        None,
        "File of such records to ask before and after training.",
        min_length=1,
        resume=True,
    )
    images: str | None = setting(
        None,
        "Folder that the records' image paths start from; none: the folder of their file.",
        min_length=1,
        resume=True,
    )
    max_length: int = setting(
        1024, "Longest record, picture included; longer ones are left out and counted.",
        unit="tokens", ge=8,
    )  # fmt: skip


class Train(Section):
    """The optimisation."""

    steps: int = setting(300, "Optimiser steps.", unit="steps", ge=1)
    steps_per_shot: int = setting(
        30, "few_shot: optimiser steps for each picture of a class, but train.steps at most.",
        unit="steps", ge=1,
    )  # fmt: skip
    batch_size: int = setting(32, "Pictures a step.", unit="images", ge=1)
    gradient_accumulation_steps: int = setting(
        1, "instructions: forward passes added up for one optimiser step.", ge=1
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", ge=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = setting(
        "cosine",
        "instructions: course of the learning rate after the warm-up; cosine and linear end at 0. "
        "few_shot takes a cosine.",
    )
    lr_warmup_steps: int = setting(
        20,
        "Steps in which the learning rate rises; a third of all at most, in few_shot a tenth.",
        unit="steps",
        ge=0,
    )
    max_grad_norm: float = setting(1.0, "Gradients above this norm are scaled down to it.", gt=0)
    seed: Seed = setting(0, "instructions: seed of the order of the records.")
    gradient_checkpointing: bool = setting(
        False, "Recompute activations: less memory, slower steps.", resume=True
    )
    checkpoint_every: int = setting(
        100, "instructions: save a resumable checkpoint every N steps.", unit="steps",
        resume=True, ge=1,
    )  # fmt: skip
    checkpoints_keep: int = setting(
        2, "instructions: newest checkpoints to keep.", resume=True, ge=1
    )
    log_every: int = setting(
        5, "instructions: write loss and rate every N steps.", unit="steps", resume=True, ge=1
    )


class Output(Section):
    """The run folder."""

    dir: str = setting("runs/vlm", "The run folder; it must be empty or new.", min_length=1)


class VisionLanguageConfig(RunConfig):
    """All settings of one ``nora vlm`` run."""

    command: ClassVar[str] = "nora vlm"

    model: Model = Model()
    adapter: Adapter = Adapter()
    few_shot: FewShot = FewShot()
    data: Data = Data()
    train: Train = Train()
    output: Output = Output()

    @model_validator(mode="after")
    def _data_is_given(self) -> Self:
        given, key = self.few_shot.images, "few_shot.images"
        if self.model.task == "instructions":
            given, key = self.data.train, "data.train"
        if given is None:
            raise ValueError(
                f'{key}: missing; model.task = "{self.model.task}" needs it; give it as --{key}'
            )
        return self
