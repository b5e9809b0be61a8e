"""Stage 2: text encoder and UNet, trained jointly by v-prediction with zero terminal SNR."""

import time
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from nora_diffusion.mini.autoencoder import LATENT_CHANNELS
from nora_diffusion.mini.compose import Compositor, to_signed
from nora_diffusion.mini.sources import concepts, write_manifest
from nora_diffusion.mini.state import Trained, learning_rate_at, load_state, save_state
from nora_diffusion.mini.text import WIDTH, build_text_encoder, build_tokenizer

CHUNK = 4096  # composites encoded at once; a resumed run starts at a chunk's beginning
PASSES = 3  # times a chunk is shown, each with new noise: encoding costs a fifth of a step
UNCONDITIONAL = 0.1  # share of captions dropped, for classifier-free guidance


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
    """
    shape, device = latents.shape, latents.device
    noise = torch.randn(shape, generator=generator).to(device)
    top = scheduler.config["num_train_timesteps"]
    middle = torch.randn(shape[0], generator=generator).sigmoid()
    anywhere = torch.rand(shape[0], generator=generator)
    chosen = torch.where(torch.rand(shape[0], generator=generator) < 2 / 3, middle, anywhere)
    timesteps = (chosen * top).long().clamp(max=top - 1).to(device)
    noisy = scheduler.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    target = scheduler.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    return F.mse_loss(model(noisy, timesteps, token_ids).float(), target)


@torch.no_grad()
def encode(model: AutoencoderTiny, images: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) -> scaled latents (N, 16, H/8, W/8), float32, on the CPU."""
    out = []
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        for batch in images.split(256):
            batch = to_signed(batch).to(device, memory_format=torch.channels_last)
            latents = model.encoder(batch).float().cpu()
            out.append(latents * float(model.config["scaling_factor"]))
    return torch.cat(out)


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> token ids (N, 32), padded as the pipeline pads prompts."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def train_denoiser(
    work: Path,
    autoencoder: AutoencoderTiny,
    size_px: int,
    samples: int,
    device: str,
    concept_set: str = "common",
    batch_size: int = 32,
    learning_rate: float = 6e-4,
    further: bool = True,
    compiled: bool = False,
) -> tuple[Joint, CLIPTokenizer, int]:
    """Trains, or continues, UNet and text encoder for `samples` pictures.

    Args:
        work: work folder; the state is ``work/denoiser.safetensors``.
        autoencoder: the trained autoencoder.
        size_px: side of the pictures.
        samples: length of the whole run, the part already done included.
        device: "cpu" or "cuda".
        concept_set: which emoji, see `sources.concepts`.
        batch_size: pictures a step.
        learning_rate: peak of the cosine.
        further: False takes the denoiser as far as it has been trained.
        compiled: True compiles the UNet first: 2 minutes once, then a fifth more samples a
            second on two cores. Needs a C++ compiler.

    Returns:
        The averaged model in float32, in eval mode; its tokenizer; the steps it has taken.
    """
    state_path = work / "denoiser.safetensors"
    seen = concepts(work, concept_set)
    # Of all words that users may name, not only those of a small set.
    worded = concepts(work, "common") if concept_set == "few" else seen
    tokenizer = build_tokenizer(worded, work / "tokenizer")
    scheduler = build_scheduler()
    torch.manual_seed(0)
    model = Joint(build_unet(size_px), build_text_encoder(tokenizer))
    model.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]
    trained = Trained(model, learning_rate, ema_decay=0.9995, weight_decay=0.01)
    if state_path.exists():
        tensors, progress = load_state(state_path)
        trained.restore(tensors, progress["step"])
    total = samples // batch_size
    if further and trained.step < total:
        write_manifest(seen, work / "manifests" / "denoiser.txt")
        if compiled:
            model.unet.compile()
        compositor = Compositor(seen, size_px, device=device, seed=2)
        autoencoder.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportArgumentType, reportCallIssue]
        while trained.step < total:
            index = trained.step * batch_size // (CHUNK * PASSES)
            images, captions, _ = compositor.sample(CHUNK, seed=2_000_000 + index)
            latents = encode(autoencoder, images, device)
            ids = tokenise(tokenizer, _drop(captions, index))
            loss, rate = _train_chunk(trained, scheduler, latents, ids, total, batch_size, device)
            print(
                f"denoiser step {trained.step}/{total} loss {loss:.4f} {rate:.0f} samples/s",
                flush=True,
            )
            save_state(state_path, trained.tensors(), {"step": trained.step})
    trained.use_average()
    return model.eval(), tokenizer, trained.step


def _drop(captions: list[str], seed: int) -> list[str]:
    random = Random(seed)
    return ["" if random.random() < UNCONDITIONAL else c for c in captions]


def _train_chunk(
    trained: Trained[Joint],
    scheduler: DDIMScheduler,
    latents: torch.Tensor,
    ids: torch.Tensor,
    total: int,
    batch_size: int,
    device: str,
) -> tuple[float, float]:
    """Shows a chunk `PASSES` times; returns the mean loss and the samples a second."""
    begin, losses = time.perf_counter(), []
    generator = torch.Generator().manual_seed(trained.step)
    for _ in range(PASSES):
        for index in torch.randperm(len(latents), generator=generator).split(batch_size):
            batch = latents[index].to(device, memory_format=torch.channels_last)
            tokens = ids[index].to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = v_loss(trained.module, scheduler, batch, tokens, generator)
            loss.backward()
            trained.update(learning_rate_at(trained.step, total, trained.learning_rate))
            losses.append(loss.detach())
    seen = len(losses) * batch_size
    return float(torch.stack(losses).mean()), seen / (time.perf_counter() - begin)
