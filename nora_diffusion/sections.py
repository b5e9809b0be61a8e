"""The sections of a config that stand for themselves; ``config`` adds ``[data]`` and the whole."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from nora_diffusion.schema import Section, setting


def _check_ranks(section: str, r: int, inner_r: int) -> None:
    if inner_r > r:
        raise ValueError(f"{section}.inner_r = {inner_r}: must be at most {section}.r = {r}")


class TimestepLaw(TypedDict):
    """The law k(t) = floor(((T-t)/T)^alpha (k - k_min)) + k_min of the active inner rank."""

    alpha: Annotated[float, Field(gt=0)]
    k_min: Annotated[int, Field(ge=1)]


Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Targets = tuple[Literal["attention", "feed_forward", "convolution"], ...]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "prodigy", "schedule_free"]


class Model(Section):
    """The base model and where it runs."""

    base: str = setting(
        "mini",
        'Base model: "mini" or "mini-128" (built in), a Hugging Face id, a diffusers folder, or '
        "one .safetensors file.",
        min_length=1,
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Number format of the frozen base; auto: bf16 where the GPU has it, else fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "Where to train; auto: cuda, then mps, then cpu.", resume=True
    )
    family: str = setting("auto", "Model family; auto: read from the base model.", min_length=1)
    quantize: Literal["none", "nf4", "int8", "fp8"] = setting(
        "none", "Number format of the frozen linear layers: 4 bits (nf4) or 8 (int8, fp8) a weight."
    )
    attention: Literal["sdpa", "xformers"] = setting(
        "sdpa", "Attention kernels: PyTorch's own, or those of xformers where they can be had."
    )
    compile: bool = setting(
        False, "Compile the denoiser's blocks: minutes at the start, then faster steps."
    )
    offload: Literal["none", "group"] = setting(
        "none",
        "Keep the denoiser's weights in main memory and bring each layer to the GPU in its turn.",
        resume=True,
    )


class Adapter(Section):
    """The NoRA adapter on the denoiser."""

    r: int = setting(64, "Outer rank: directions taken from each frozen weight.", ge=1)
    inner_r: int = setting(8, "Inner rank: rank of the trained core; at most adapter.r.", ge=1)
    scaling: float = setting(1.0, "Factor on the adapter's output, independent of the ranks.", gt=0)
    dropout: float = setting(
        0.0,
        "Share of the adapter's hidden features, of which a module has r, dropped while training.",
        ge=0.0,
        lt=1.0,
    )
    init: Literal["orthogonal", "sigma", "gradient"] = setting(
        "gradient",
        "Start of the inner pair; each leaves the base model unchanged at step 0, and gradient is "
        "fitted to the photos first (docs/comparison.md).",
    )
    basis: Literal["weight", "weight_minor", "activation", "gradient", "random"] = setting(
        "weight", "Where the frozen outer directions come from."
    )
    seed: Seed = setting(0, "Seed of the factorisation and of the inner initialisation.")
    timestep_rank: float | TimestepLaw | None = setting(
        None,
        "Fewer inner dimensions at noisier timesteps: exponent alpha, or alpha and k_min.",
        allowed="a number > 0, or { alpha = A > 0, k_min = 1 to adapter.inner_r }, or none",
    )
    targets: Targets = setting(
        ("attention",), "Parts of the denoiser to adapt.", min_length=1, strict=False
    )
    target_modules: tuple[str, ...] | None = setting(
        None, "Names of the modules to adapt, instead of adapter.targets.", strict=False
    )
    init_from: str | None = setting(None, "Adapter file or run folder to start from.", min_length=1)

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        _check_ranks("adapter", self.r, self.inner_r)
        law = self.timestep_rank
        if isinstance(law, float | int) and law <= 0:
            raise ValueError(f"adapter.timestep_rank = {law}: must be a number > 0")
        if isinstance(law, dict) and law["k_min"] > self.inner_r:
            raise ValueError(
                f"adapter.timestep_rank.k_min = {law['k_min']}: must be at most "
                f"adapter.inner_r = {self.inner_r}"
            )
        return self


class TextEncoder(Section):
    """An adapter on the text encoder(s), trained together with the denoiser's."""

    train: bool = setting(False, "Adapt the text encoder(s) as well.")
    r: int = setting(64, "Outer rank in the text encoder(s).", ge=1)
    inner_r: int = setting(8, "Inner rank in the text encoder(s); at most text_encoder.r.", ge=1)
    basis: Literal["weight", "weight_minor", "random"] = setting(
        "random",
        "Where their frozen outer directions come from; the largest ones of the weight cost "
        "backgrounds and text (docs/comparison.md).",
    )
    learning_rate: float | None = setting(
        None, "Learning rate of the text encoder(s); none: train.learning_rate.", gt=0
    )

    @model_validator(mode="after")
    def _ranks_fit(self) -> Self:
        _check_ranks("text_encoder", self.r, self.inner_r)
        return self


class Train(Section):
    """The optimisation."""

    steps: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        400,
        "Optimiser steps; auto: 100 for each photo, divided by the square root of the pictures a "
        "step, within 400 and 2000.",
        unit="steps",
        resume=True,
        allowed="a whole number >= 1, or auto",
    )
    batch_size: int = setting(
        4, "Images in one forward pass, of each process.", unit="images", ge=1
    )
    gradient_accumulation_steps: int = setting(
        1, "Forward passes added up for one optimiser step.", ge=1
    )
    optimizer: Optimizer = setting(
        "adamw",
        "AdamW; adamw_8bit: the same, its state in 8 bits where an inner matrix has 4096 numbers "
        "or more; adafactor: hardly any state; prodigy: finds the learning rate; schedule_free: "
        "averages its steps instead of lowering the rate.",
    )
    learning_rate: float = setting(
        1e-3,
        "Peak learning rate: 1 to 10 times what suits LoRA (docs/comparison.md); with prodigy a "
        "factor on the rate it finds, 1.0 as a rule.",
        gt=0,
    )
    loraplus_lr_ratio: float = setting(
        1.0,
        "Learning rate of P, which is train.learning_rate, over that of Q (LoRA+; "
        "docs/training.md); 1: one rate for both, as ever with prodigy.",
        gt=0,
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "Course of the learning rate after the warm-up; cosine and linear end at 0."
    )
    lr_warmup_steps: int = setting(
        20, "Steps in which the learning rate rises from 0.", unit="steps", ge=0
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients above this norm are scaled down to it.", gt=0)
    seed: Seed = setting(0, "Seed of data order, noise, timesteps and dropout.")
    prior: Literal["class_images", "base_prediction", "none"] = setting(
        "none",
        "What keeps the class from drifting: pictures of the class, the base model's own "
        "predictions, or nothing.",
    )
    prior_weight: float = setting(1.0, "Weight of the prior beside the subject's loss.", ge=0)
    prior_images: int = setting(
        100, 'Class images for train.prior = "class_images".', unit="images", ge=1
    )
    min_snr_gamma: float | None = setting(
        None, "Cap on the signal-to-noise weight of the loss (Min-SNR; 5 is usual).", gt=0
    )
    soft_min_snr: bool = setting(False, "Use the smooth form of that cap.")
    timestep_law: Literal["default", "uniform", "logit_normal", "mode"] = setting(
        "default",
        "How often each noise level is trained; default: uniform for diffusion, logit-normal for "
        "flow models.",
    )
    offset_noise: float = setting(
        0.0, "Noise that is constant over each channel, for darker and brighter pictures.", ge=0
    )
    ema_decay: float | None = setting(
        None, "Decay of the moving average of the inner pair that is saved.", gt=0, lt=1
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations: less memory, slower steps.", resume=True
    )
    checkpoint_every: int = setting(
        100, "Save a resumable checkpoint every N steps; 0: at the end.", unit="steps",
        resume=True, ge=0,
    )  # fmt: skip
    checkpoints_keep: int = setting(2, "Newest checkpoints to keep.", resume=True, ge=1)
    log_every: int = setting(
        10, "Write loss and rate every N steps.", unit="steps", resume=True, ge=1
    )

    @property
    def total_steps(self) -> int:
        """``steps`` as a number.

        Raises:
            ValueError: while it is "auto"; ``train.steps.resolve_steps`` makes it a number.
        """
        if self.steps == "auto":
            raise ValueError("train.steps is still auto")
        return self.steps

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if self.optimizer == "prodigy" and not 0.1 <= self.learning_rate <= 10:
            raise ValueError(
                f"train.learning_rate = {self.learning_rate:g}: with train.optimizer = "
                f'"prodigy" it is a factor on the rate that Prodigy finds; set it to 1.0 '
                "(0.1 to 10 are allowed)"
            )
        if self.optimizer == "schedule_free" and self.lr_schedule != "constant":
            raise ValueError(
                f'train.lr_schedule = "{self.lr_schedule}": train.optimizer = "schedule_free" '
                'averages its steps instead of lowering the rate; set it to "constant"'
            )
        if self.optimizer == "schedule_free" and self.ema_decay is not None:
            raise ValueError(
                f"train.ema_decay = {self.ema_decay:g}: train.optimizer = "
                '"schedule_free" saves an average of its own; set it to "none"'
            )
        return self


class Sample(Section):
    """Pictures made while training and at its end."""

    every: int = setting(
        0, "Make a validation sheet every N steps; 0: at the end.", unit="steps", resume=True, ge=0
    )
    prompts: tuple[str, ...] = setting(
        ("a {trigger} {class_name}", "a {trigger} {class_name} on the beach"),
        "Prompts; {trigger} and {class_name} are filled in.",
        resume=True,
        min_length=1,
        strict=False,
    )
    n: int = setting(2, "Pictures a prompt.", unit="images", resume=True, ge=1)
    steps: int = setting(25, "Denoising steps.", unit="steps", resume=True, ge=1)
    guidance: float = setting(5.0, "Classifier-free guidance scale; 1: off.", resume=True, ge=0)
    seed: Seed = setting(0, "Seed of the first picture; picture i takes seed + i.", resume=True)
    negative_prompt: str = setting("", "What the pictures should not show.", resume=True)


class Output(Section):
    """The run folder."""

    dir: str = setting("runs/dreambooth", "The run folder; it must be empty or new.", min_length=1)
    lora: bool = setting(True, "Write the exact LoRA export beside the adapter.", resume=True)
    dtype: Literal["fp32", "bf16", "fp16"] | None = setting(
        None, "Number format of the saved adapter; none: as trained.", resume=True
    )
    portable: bool | None = setting(
        None,
        "Save the outer factors too, so that the file needs no exact base; none: only where "
        "they cannot be derived again.",
        resume=True,
    )
    tensorboard: bool = setting(False, "Also write TensorBoard logs.", resume=True)
    wandb: str | None = setting(
        None,
        "Weights & Biases project to log to as well; WANDB_MODE=offline keeps the log in the run "
        "folder.",
        resume=True,
        min_length=1,
    )
    push_to_hub: str | None = setting(
        None,
        "Hugging Face repository, as USER/NAME, to upload the finished run to; a new one is "
        "private. before_after.png shows the photos.",
        resume=True,
        min_length=1,
    )
