"""Latents as the tokens of a transformer and back, for families whose denoiser is handed tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2
"""Side of the square of latents that is one token."""


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) latents to (B, h/2 * w/2, 4 C) tokens, row by row.

    Raises:
        RuntimeError: when h or w is odd.
    """
    return pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of ``pack``, to latents (B, C, height, width)."""
    grid = (height // PATCH, width // PATCH)
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), PATCH)


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3) float32 positions (0, row, column) of tokens, row by row."""
    axes = [torch.arange(length, device=device) for length in (1, height, width)]
    return torch.cartesian_prod(*axes).float()
