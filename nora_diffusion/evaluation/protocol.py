"""The DreamBooth protocol's numbers, from features of pictures (Ruiz et al. 2023, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nora_diffusion.evaluation.backends import Backend
from nora_diffusion.evaluation.image_features import mean_pairwise_cosine

Rows = Sequence[Sequence[Image.Image]]


@dataclass(frozen=True)
class Pictures:
    """What is compared: P prompts, n pictures each, the same seeds throughout.

    Attributes:
        base: by the base model, of the prompts with the trigger word.
        adapted: the same with the adapter.
        base_class: by the base, of the prompts without the trigger word.
        adapted_class: the same with the adapter.
        training: photos that the adapter was trained on.
        held_out: other photos of the subject; may be empty.
        class_prompts: the P prompts without the trigger word.
    """

    base: Rows
    adapted: Rows
    base_class: Rows
    adapted_class: Rows
    training: Sequence[Image.Image]
    held_out: Sequence[Image.Image]
    class_prompts: Sequence[str]


def measure(pictures: Pictures, backend: Backend) -> dict[str, Any]:
    """All that one backend says of a run.

    Returns:
        ``training`` and, with held-out photos, ``held_out``: mean pairwise cosine to those photos
        of the ``base``'s pictures, of the ``adapted`` and the ``ceiling`` that real photos reach
        (training photos among themselves; held-out photos to the training photos), with the
        ``gap_closed``, (adapted - base) / (ceiling - base); ``diversity``: mean 1 - cosine between
        pictures of one prompt, None for one picture a prompt, and among the photos; ``drift`` of
        the class without the trigger word: ``moved``, mean 1 - cosine to the base's picture of the
        same seed, and how much ``nearer_to_subject``. Where the backend reads texts, ``text``: mean
        cosine to the prompt without the trigger word; of one that cannot tell subjects apart, that
        alone.
    """
    rows = {
        name: _features(getattr(pictures, name), backend)
        for name in ("base", "adapted", "base_class", "adapted_class")
    }
    found: dict[str, Any] = {"backend": backend.name}
    if backend.of_subjects:
        found |= _of_subject(pictures, rows, backend)
    if backend.embed_texts is not None:
        texts = backend.embed_texts(pictures.class_prompts)[:, None]
        found["text"] = {
            name: float((rows[name] * texts).sum(-1).mean()) for name in ("base", "adapted")
        }
    return found


def _of_subject(pictures: Pictures, rows: dict[str, Tensor], backend: Backend) -> dict[str, Any]:
    training = backend.embed(pictures.training)
    held_out = backend.embed(pictures.held_out) if pictures.held_out else None
    found: dict[str, Any] = {"training": _fidelity(rows, training, _among(training))}
    if held_out is not None:
        ceiling = mean_pairwise_cosine(held_out, training)
        found["held_out"] = _fidelity(rows, held_out, ceiling)
    among = _among(training)
    found["diversity"] = {
        "base": _diversity(rows["base"]),
        "adapted": _diversity(rows["adapted"]),
        "photos": None if among is None else 1 - among,
    }
    plain, drifted = rows["base_class"].flatten(0, 1), rows["adapted_class"].flatten(0, 1)
    subject = training if held_out is None else held_out
    nearer = mean_pairwise_cosine(drifted, subject) - mean_pairwise_cosine(plain, subject)
    found["drift"] = {
        "moved": 1 - float((plain * drifted).sum(1).mean()),
        "nearer_to_subject": nearer,
    }
    return found


def _features(rows: Rows, backend: Backend) -> Tensor:
    """(P, n, D)."""
    flat = [image for row in rows for image in row]
    return backend.embed(flat).unflatten(0, (len(rows), -1))


def _fidelity(rows: dict[str, Tensor], photos: Tensor, ceiling: float | None) -> dict[str, Any]:
    base, adapted = (
        mean_pairwise_cosine(rows[name].flatten(0, 1), photos) for name in ("base", "adapted")
    )
    gap = None if ceiling is None or ceiling <= base else (adapted - base) / (ceiling - base)
    return {"base": base, "adapted": adapted, "ceiling": ceiling, "gap_closed": gap}


def _among(photos: Tensor) -> float | None:
    return mean_pairwise_cosine(photos) if len(photos) > 1 else None


def _diversity(rows: Tensor) -> float | None:
    """Mean 1 - cosine between different pictures of one prompt (P, n, D)."""
    n = rows.shape[1]
    if n < 2:
        return None
    cosines = torch.einsum("pnd,pmd->pnm", rows, rows)
    return float(
        1 - (cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()) / (len(rows) * n * (n - 1))
    )
