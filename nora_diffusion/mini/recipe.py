"""What a version of mini is trained on, and for how long."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One version of mini.

    Attributes:
        name: of the version, and of its work folder.
        size_px: side of the pictures.
        concept_set: which emoji the denoiser is shown, see `sources.concepts`.
        autoencoder_samples: pictures shown to the autoencoder; 0 takes that of the mini the run
            goes on from.
        decoder_samples: pictures shown to its finer decoder.
        denoiser_samples: pictures shown to UNet and text encoder together.
        batch_size: of the denoiser.
        clip_samples: pictures shown to mini-CLIP.
        clip_concept_set: which emoji mini-CLIP is shown.
        clip_batch_size: of mini-CLIP.
        learning_rate: peak of the denoiser's cosine.
        ema_decay: a step, of the denoiser's averaged weights.
        backgrounds: how many the denoiser's pictures choose from.
    """

    name: str
    size_px: int
    concept_set: str
    autoencoder_samples: int
    decoder_samples: int
    denoiser_samples: int
    batch_size: int
    clip_samples: int
    clip_concept_set: str
    clip_batch_size: int
    learning_rate: float = 6e-4
    ema_decay: float = 0.9995
    backgrounds: int = 6000


PRESETS = {
    "cpu": Recipe("mini-64-v3", 64, "few", 120_000, 48_000, 480_000, 32, 100_000, "full", 96),
    # Goes on from the shipped 64 px, whose autoencoder does better at 128 px than at 64. The
    # backgrounds, 6 ms each, are drawn on one core while the GPU waits.
    "gpu": Recipe(
        "mini-128-v1",
        128,
        "few",
        0,
        0,
        6_000_000,
        256,
        3_000_000,
        "full",
        1024,
        learning_rate=1e-3,
        ema_decay=0.998,
        backgrounds=3000,
    ),
}
