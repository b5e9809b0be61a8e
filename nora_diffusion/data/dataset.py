"""What is trained on and in which order: a pure function of photos, settings and seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from nora_diffusion.config import fill_prompt
from nora_diffusion.data.images import Photo, square

SUBJECT_PROMPT = "a {trigger} {class_name}"
CLASS_PROMPT = "{article} {class_name}"

RANDOM_CROPS = 8
"""Crops made of each photo under ``data.crop = "random"``; each is encoded once."""


@dataclass(frozen=True)
class Item:
    """One picture with its prompt, as the loss sees it.

    Attributes:
        photo: where the pixels come from.
        prompt: the words for it.
        weight: factor on its loss; a class image is an item with another weight.
        place: where along x and y the square is cut out, 0 to 1.
        flip: whether it is mirrored.
    """

    photo: Photo
    prompt: str
    weight: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False

    @property
    def image_id(self) -> str:
        """Name of the pixels alone: items with equal names encode to equal latents."""
        x, y = self.place
        return f"{self.photo.digest} {x:.6f} {y:.6f} {int(self.flip)}"

    def pixels(self, resolution_px: int) -> torch.Tensor:
        """The picture as a (3, resolution_px, resolution_px) float32 tensor in [-1, 1]."""
        image = square(_open(self.photo), resolution_px, self.place, self.flip)
        array = np.asarray(image, dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


@lru_cache(maxsize=1)
def _open(photo: Photo) -> Image.Image:
    # The views of a photo come one after another, and decoding a large one takes half a second.
    return photo.open()


def class_prompt(class_name: str) -> str:
    """The prompt for a class image, with the right article."""
    word = class_name.lower()
    vowel = word.startswith(tuple("aeiou")) and not word.startswith(("eu", "one", "uni", "use"))
    return CLASS_PROMPT.format(article="an" if vowel else "a", class_name=class_name)


def subject_views(
    photos: Sequence[Photo],
    *,
    trigger: str,
    class_name: str,
    captions: bool = True,
    flip: bool = False,
    crop: str = "center",
    seed: int = 0,
) -> list[list[Item]]:
    """The items of each subject photo: its crops and mirror images.

    Args:
        photos: the subject's photos.
        trigger: the word that stands for the subject.
        class_name: the noun for it.
        captions: whether a photo's own caption replaces the usual prompt.
        flip: whether mirror images are added.
        crop: ``"center"``, or ``"random"`` for several places along the longer side.
        seed: of the random crops.

    Returns:
        For each photo the items that may stand for it; an epoch takes one of them.
    """
    views: list[list[Item]] = []
    for index, photo in enumerate(photos):
        text = photo.caption if captions and photo.caption else SUBJECT_PROMPT
        prompt = fill_prompt(text, trigger, class_name)
        places = [(0.5, 0.5)]
        if crop == "random" and photo.size[0] != photo.size[1]:
            draws = _generator(seed, index, stream=1).random(RANDOM_CROPS).tolist()
            places = [(draw, draw) for draw in draws]  # the shorter side has no room to move
        views.append(
            [
                Item(photo, prompt, place=place, flip=mirrored)
                for place in places
                for mirrored in ((False, True) if flip else (False,))
            ]
        )
    return views


def class_items(photos: Sequence[Photo], class_name: str, weight: float) -> list[Item]:
    """Class images as items that keep the class as it was."""
    prompt = class_prompt(class_name)
    return [Item(photo, prompt, weight) for photo in photos]


class Dataset:
    """Items and their endless order.

    An epoch shows every subject photo once, in an order of its own; with class images, each
    photo is followed by one of them, so any batch of even size is half subject, half class.
    ``batch`` depends on the seed and the position alone: a resumed run sees the same items.

    Attributes:
        items: every item that can occur; ``batch`` returns indices into it.
    """

    def __init__(
        self, subject: Sequence[Sequence[Item]], prior: Sequence[Item] = (), seed: int = 0
    ) -> None:
        """Lay out the views of each subject photo, then the class images.

        Raises:
            ValueError: when there is no subject photo, or one has no view.
        """
        if not subject or not all(subject):
            raise ValueError("a dataset needs at least one subject photo, each with a view")
        self.items = tuple(item for views in subject for item in views) + tuple(prior)
        self.seed = seed
        self._views = [len(views) for views in subject]
        self._first_prior = sum(self._views)
        self._priors = len(prior)

    @property
    def epoch_length(self) -> int:
        """Items in one epoch."""
        return len(self._views) * (2 if self._priors else 1)

    def epoch(self, epoch: int) -> list[int]:
        """Indices of the items of one epoch, in order."""
        generator = _generator(self.seed, epoch, stream=2)
        starts = np.cumsum([0, *self._views[:-1]])
        indices: list[int] = []
        for turn, photo in enumerate(generator.permutation(len(self._views))):
            indices.append(int(starts[photo] + generator.integers(self._views[photo])))
            if self._priors:
                indices.append(self._prior(epoch * len(self._views) + turn))
        return indices

    def batch(self, position: int, size: int) -> list[int]:
        """Indices of ``size`` items, starting at the ``position``-th of the whole run."""
        indices: list[int] = []
        epoch, offset = divmod(position, self.epoch_length)
        while len(indices) < size:
            indices += self.epoch(epoch)[offset : offset + size - len(indices)]
            epoch, offset = epoch + 1, 0
        return indices

    def _prior(self, count: int) -> int:
        """The class image shown as number ``count``: all of them once, then reshuffled."""
        round_, place = divmod(count, self._priors)
        order = _generator(self.seed, round_, stream=3).permutation(self._priors)
        return self._first_prior + int(order[place])


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """A counter-based generator: the same numbers on every platform, nothing carried over."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, stream]))
