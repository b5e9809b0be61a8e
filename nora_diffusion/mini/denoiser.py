"""Stage 2: text encoder and UNet, trained jointly by v-prediction with zero terminal SNR."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from nora_diffusion.mini.autoencoder import LATENT_CHANNELS
from nora_diffusion.mini.compose import Compositor, to_signed
from nora_diffusion.mini.recipe import Recipe
from nora_diffusion.mini.sources import Concept, concepts, write_manifest
from nora_diffusion.mini.start import Start
from nora_diffusion.mini.state import Clock, Trained, learning_rate_at, load_state, save_state
from nora_diffusion.mini.text import WIDTH, build_text_encoder, build_tokenizer

CHUNK = 4096  # composites encoded at once; a resumed run starts at a chunk's beginning
PASSES = 3  # times a chunk is shown, each with new noise: encoding costs a fifth of a step
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance
REPORT_S = 10  # seconds between two lines of progress
SAVE_S = 60  # seconds between two saves on a GPU; on a CPU every chunk is saved


def build_unet(size_px: int) -> UNet2DConditionModel:
    """Returns the untrained UNet over latents (B, 16, size/8, size/8)."""
    return UNet2DConditionModel(
        sample_size=size_px // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(160, 160),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    """Returns mini's noise schedule: SD's betas rescaled to zero terminal SNR, v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # unused by trailing spacing; 0 makes diffusers warn
    )


class Joint(nn.Module):
    """UNet and text encoder as one module, so that one optimiser and one average hold both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Predicts v (B, 16, h, w) for latents at `timesteps` (B,) under `token_ids` (B, 32)."""
        hidden = self.text_encoder(token_ids).last_hidden_state
        return self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample


def v_loss(
    model: Joint,
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    token_ids: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of v; a scalar.

    Two timesteps of three come from a logit-normal law (arXiv 2403.03206, section 3.1): what an
    object looks like is decided in the middle. The rest is uniform, so that pure noise is learnt.
    `generator` is one of the latents' device.
    """
    n, device = len(latents), latents.device
    noise = torch.randn(latents.shape, generator=generator, device=device)
    top = scheduler.config["num_train_timesteps"]
    middle = torch.randn(n, generator=generator, device=device).sigmoid()
    anywhere = torch.rand(n, generator=generator, device=device)
    coin = torch.rand(n, generator=generator, device=device)
    chosen = torch.where(coin < 2 / 3, middle, anywhere)
    timesteps = (chosen * top).long().clamp(max=top - 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    target = scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return F.mse_loss(model(noisy, timesteps, token_ids).float(), target)


@torch.no_grad()
def encode(model: AutoencoderTiny, images: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) -> scaled latents (N, 16, H/8, W/8), float32, on `device`."""
    out = []
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for batch in images.split(256):
            batch = to_signed(batch).to(device, memory_format=torch.channels_last)
            latents = model.encoder(batch).float()
            out.append(latents * float(model.config["scaling_factor"]))
    return torch.cat(out)


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> token ids (N, 32), padded as the pipeline pads prompts."""
    # Without masks and as lists: it takes half the time, while a GPU waits.
    encoded = tokenizer(
        captions, padding="max_length", truncation=True, return_attention_mask=False
    )
    return torch.tensor(encoded.input_ids)


@dataclass(frozen=True)
class Denoiser:
    """A denoiser as far as it has been trained.

    Attributes:
        model: the averaged weights in float32, in eval mode.
        tokenizer: of its text encoder.
        steps: it has taken.
        samples: it was shown.
        seconds: of wall time that took.
    """

    model: Joint
    tokenizer: CLIPTokenizer
    steps: int
    samples: int
    seconds: float


def train_denoiser(
    work: Path,
    autoencoder: AutoencoderTiny,
    recipe: Recipe,
    device: str,
    start: Start | None = None,
    minutes: float | None = None,
    further: bool = True,
    compiled: bool = False,
) -> Denoiser:
    """Trains, or continues, UNet and text encoder.

    Args:
        work: work folder; the state is ``work/denoiser.safetensors``.
        autoencoder: the trained autoencoder, its latent scale set.
        recipe: what it is trained on, and for how long, the part already done included.
        device: "cpu" or "cuda".
        start: the mini whose weights it begins from; None begins from nothing.
        minutes: limit of the whole run's wall time; the learning rate has fallen when it ends.
        further: False takes the denoiser as far as it has been trained.
        compiled: True compiles the UNet first: 2 minutes once, then a fifth more samples a
            second on two cores. Needs a C++ compiler.
    """
    state_path, progress = work / "denoiser.safetensors", {}
    clock = Clock(minutes)
    seen = concepts(work, recipe.concept_set)
    model, tokenizer = _begin(work, recipe, seen, start)
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]
    trained = Trained(model, recipe.learning_rate, recipe.ema_decay, weight_decay=0.01)
    run = _Run(trained, recipe.denoiser_samples // recipe.batch_size, recipe.batch_size, clock)
    if state_path.exists():
        tensors, progress = load_state(state_path)
        trained.restore(tensors, progress["step"])
        # States of earlier versions hold the step alone.
        run.samples = progress.get("samples", trained.step * recipe.batch_size)
        clock.add(progress.get("seconds", 0.0))
    if further and not run.over():
        write_manifest(seen, work / "manifests" / "denoiser.txt")
        if device.startswith("cuda"):
            torch.backends.cudnn.benchmark = True  # every batch has the same shape
        if compiled:
            model.unet.compile()
        print(f"denoiser step {trained.step}/{run.total}: drawing backgrounds", flush=True)
        compositor = Compositor(seen, recipe.size_px, recipe.backgrounds, device, seed=2)
        autoencoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]
        saved = monotonic()
        while not run.over():
            index = run.samples // (CHUNK * PASSES)
            images, captions, _ = compositor.sample(CHUNK, seed=2_000_000 + index)
            latents = encode(autoencoder, images, device)
            run.show(latents, tokenise(tokenizer, _drop(captions, index)).to(device))
            if device == "cpu" or monotonic() - saved > SAVE_S:
                progress = run.save(state_path)
                saved = monotonic()
        if progress.get("step") != trained.step:
            progress = run.save(state_path)
    trained.use_average()
    seconds = progress.get("seconds", 0.0)
    return Denoiser(model.eval(), tokenizer, trained.step, run.samples, seconds)


def _begin(
    work: Path, recipe: Recipe, seen: list[Concept], start: Start | None
) -> tuple[Joint, CLIPTokenizer]:
    """The model before its first step, and its tokenizer."""
    if start is not None:
        return Joint(start.unet(recipe.size_px), start.text_encoder()).train(), start.tokenizer()
    # Of all words that users may name, not only those of a small set.
    worded = concepts(work, "common") if recipe.concept_set == "few" else seen
    tokenizer = build_tokenizer(worded, work / "tokenizer")
    torch.manual_seed(0)
    return Joint(build_unet(recipe.size_px), build_text_encoder(tokenizer)), tokenizer


def _drop(captions: list[str], seed: int) -> list[str]:
    random = Random(seed)
    return ["" if random.random() < UNCONDITIONAL else c for c in captions]


class _Run:
    """A denoiser under training, how far it is and how fast.

    Args:
        trained: the model with its optimiser.
        total: steps after which it ends.
        batch_size: pictures a step.
        clock: of its wall time.
    """

    def __init__(self, trained: Trained[Joint], total: int, batch_size: int, clock: Clock):
        self.trained, self.total, self.batch_size, self.clock = trained, total, batch_size, clock
        self.scheduler, self.samples = build_scheduler(), 0
        self._losses: list[torch.Tensor] = []
        self._reported: tuple[float, int] | None = None  # seconds and samples of the last line

    def over(self) -> bool:
        """Whether all steps are taken or all time is used up."""
        return self.trained.step >= self.total or self.clock.share() >= 1

    def save(self, path: Path) -> dict[str, float]:
        """Writes the state; returns what it says of the run: steps, samples and seconds."""
        seconds = round(self.clock.seconds(), 3)
        progress = {"step": self.trained.step, "samples": self.samples, "seconds": seconds}
        save_state(path, self.trained.tensors(), progress)
        return progress

    def show(self, latents: torch.Tensor, ids: torch.Tensor) -> None:
        """Shows a chunk `PASSES` times, or until the time is up.

        Args:
            latents: (N, 16, h, w).
            ids: (N, 32), on the same device.
        """
        trained, device = self.trained, latents.device
        generator = torch.Generator(device).manual_seed(trained.step)
        if self._reported is None:
            self._reported = self.clock.seconds(), self.samples
        for index in _batches(len(latents), self.batch_size, generator):
            elapsed = self.clock.share()
            if elapsed >= 1:
                break
            batch = latents[index].contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                loss = v_loss(trained.module, self.scheduler, batch, ids[index], generator)
            loss.backward()
            peak = trained.learning_rate
            trained.update(learning_rate_at(trained.step, self.total, peak, elapsed=elapsed))
            self.samples += len(index)
            self._losses.append(loss.detach())
            if self.clock.seconds() - self._reported[0] >= REPORT_S:
                self._report()
        if self._losses and self.over():
            self._report()

    def _report(self) -> None:
        """Prints where the run is; waits for the GPU."""
        loss = float(torch.stack(self._losses).mean())
        self._losses.clear()
        assert self._reported is not None
        before, shown = self._reported
        now = self.clock.seconds()
        self._reported = now, self.samples
        rate = (self.samples - shown) / max(now - before, 1e-9)
        left = (self.total - self.trained.step) * self.batch_size / max(rate, 1e-9)
        left = max(0.0, min(left, self.clock.limit_s - now))
        print(
            f"denoiser step {self.trained.step}/{self.total} loss {loss:.4f} "
            f"{rate:.0f} samples/s, {left:.0f} s left",
            flush=True,
        )


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of `n` samples in `PASSES` random orders, `size` at a time."""
    for _ in range(PASSES):
        yield from torch.randperm(n, generator=generator, device=generator.device).split(size)
