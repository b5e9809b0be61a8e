"""What is trained on and in which order: a pure function of photos, settings and seed."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageEnhance

from nora_diffusion.config import fill_prompt
from nora_diffusion.data.buckets import Size, closest_bucket
from nora_diffusion.data.images import Photo, fit

SUBJECT_PROMPT = "a {trigger} {class_name}"
CLASS_PROMPT = "{article} {class_name}"

RANDOM_CROPS = 8
"""Crops made of each photo under ``data.crop = "random"``; each is encoded once."""

COLOUR_VARIANTS = 4
"""Variants of each photo under ``data.color_jitter``, the photo itself one of them."""

AS_IT_IS = (1.0, 1.0, 1.0)
"""Factors on brightness, contrast and saturation that change nothing."""


@dataclass(frozen=True)
class Item:
    """One picture with its prompt, as the loss sees it.

    Attributes:
        photo: where the pixels come from.
        prompt: the words for it.
        weight: factor on its loss; a class image is an item with another weight.
        place: where along x and y the picture is cut out, 0 to 1.
        flip: whether it is mirrored.
        bucket: width and height in px; None: the square of the training resolution.
        colour: factors on brightness, contrast and saturation. Hue is left alone: it tells a
            subject from others of its class.
        class_name: noun for what it shows.
        prompt_without_trigger: the words for it where the subject is not named.
        prior: whether it is a class image.
    """

    photo: Photo
    prompt: str
    weight: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    bucket: Size | None = None
    colour: tuple[float, float, float] = AS_IT_IS
    class_name: str = ""
    prompt_without_trigger: str = ""
    prior: bool = False

    @property
    def image_id(self) -> str:
        """Name of the pixels alone: items with equal names encode to equal latents."""
        x, y = self.place
        parts = [f"{self.photo.digest} {x:.6f} {y:.6f} {int(self.flip)}"]
        parts += [f"{self.bucket[0]}x{self.bucket[1]}"] if self.bucket else []
        parts += [" ".join(f"{c:.6f}" for c in self.colour)] if self.colour != AS_IT_IS else []
        return " ".join(parts)

    def size(self, resolution_px: int) -> Size:
        """Width and height of the picture at a training resolution."""
        return self.bucket or (resolution_px, resolution_px)

    def pixels(self, resolution_px: int) -> torch.Tensor:
        """The picture as a (3, height, width) float32 tensor in [-1, 1]."""
        image = fit(_open(self.photo), self.size(resolution_px), self.place, self.flip)
        tools = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for tool, factor in zip(tools, self.colour, strict=True):
            image = tool(image).enhance(factor) if factor != 1 else image
        array = np.asarray(image, dtype=np.float32)
        return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()

    def mask(self, resolution_px: int) -> torch.Tensor | None:
        """What of the picture is to be learnt, (height, width) in [0, 1]; None: all of it.

        Raises:
            UserError: when the photo's mask cannot be used.
        """
        mask = _open_mask(self.photo)
        if mask is None:
            return None
        cut = fit(mask, self.size(resolution_px), self.place, self.flip)
        return torch.from_numpy(np.asarray(cut, dtype=np.float32) / 255)


@lru_cache(maxsize=1)
def _open(photo: Photo) -> Image.Image:
    # The views of a photo come one after another, and decoding a large one takes half a second.
    return photo.open()


@lru_cache(maxsize=1)
def _open_mask(photo: Photo) -> Image.Image | None:
    return photo.open_mask()


def class_prompt(class_name: str) -> str:
    """The prompt for a class image, with the right article."""
    word = class_name.lower()
    vowel = word.startswith(tuple("aeiou")) and not word.startswith(("eu", "one", "uni", "use"))
    return CLASS_PROMPT.format(article="an" if vowel else "a", class_name=class_name)


def without_trigger(prompt: str, trigger: str, class_name: str) -> str:
    """A prompt that does not name the subject: for its class, where nothing else is left."""
    if prompt == fill_prompt(SUBJECT_PROMPT, trigger, class_name):
        return class_prompt(class_name)
    words = re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", "", prompt)
    tidy = re.sub(r"\s+([,.;:])", r"\1", " ".join(words.split())).strip(" ,")
    return tidy or class_prompt(class_name)


def subject_views(
    photos: Sequence[Photo],
    *,
    trigger: str,
    class_name: str,
    captions: bool = True,
    flip: bool = False,
    crop: str = "center",
    seed: int = 0,
    buckets: Sequence[Size] = (),
    color_jitter: float = 0.0,
    first: int = 0,
) -> list[list[Item]]:
    """The items of each subject photo: its crops, mirror images and colour variants.

    Args:
        photos: the subject's photos.
        trigger: the word that stands for the subject.
        class_name: the noun for it.
        captions: whether a photo's own caption replaces the usual prompt.
        flip: whether mirror images are added.
        crop: ``"center"``, or ``"random"`` for several places along the side that is too long.
        seed: of the random crops and colours.
        buckets: sizes to choose from for each photo; none: squares.
        color_jitter: most by which brightness, contrast and saturation differ from 1.
        first: number of the first photo in the run, so that several subjects draw differently.

    Returns:
        For each photo the items that may stand for it; an epoch takes one of them.
    """
    views: list[list[Item]] = []
    for index, photo in enumerate(photos, start=first):
        text = photo.caption if captions and photo.caption else SUBJECT_PROMPT
        prompt = fill_prompt(text, trigger, class_name)
        bucket = closest_bucket(photo.size, buckets) if buckets else None
        places = _places(photo.size, bucket or (1, 1), crop, seed, index)
        colours = _colours(color_jitter, seed, index)
        # Paired, not crossed: crops times colours would be many times the encoding for little.
        looks = [
            (places[turn % len(places)], colours[turn % len(colours)])
            for turn in range(max(len(places), len(colours)))
        ]
        views.append(
            [
                Item(
                    photo, prompt, place=place, flip=mirrored, bucket=bucket, colour=colour,
                    class_name=class_name,
                    prompt_without_trigger=without_trigger(prompt, trigger, class_name),
                )
                for place, colour in looks
                for mirrored in ((False, True) if flip else (False,))
            ]
        )  # fmt: skip
    return views


def _places(
    photo: Size, target: Size, crop: str, seed: int, index: int
) -> list[tuple[float, float]]:
    if crop != "random" or photo[0] * target[1] == photo[1] * target[0]:
        return [(0.5, 0.5)]
    draws = _generator(seed, index, stream=1).random(RANDOM_CROPS).tolist()
    return [(draw, draw) for draw in draws]  # only one of the sides has room to move


def _colours(jitter: float, seed: int, index: int) -> list[tuple[float, float, float]]:
    if not jitter:
        return [AS_IT_IS]
    draws = _generator(seed, index, stream=4).uniform(-jitter, jitter, (COLOUR_VARIANTS - 1, 3))
    return [AS_IT_IS, *((1 + b, 1 + c, 1 + s) for b, c, s in draws.tolist())]


def class_items(
    photos: Sequence[Photo], class_name: str, weight: float, buckets: Sequence[Size] = ()
) -> list[Item]:
    """Class images as items that keep the class as it was."""
    prompt = class_prompt(class_name)
    return [
        Item(
            photo, prompt, weight, class_name=class_name, prompt_without_trigger=prompt,
            bucket=closest_bucket(photo.size, buckets) if buckets else None, prior=True,
        )
        for photo in photos
    ]  # fmt: skip


class Dataset:
    """Items and their endless order.

    An epoch shows every subject photo once (or as often as it is to be repeated), in an order of
    its own; with class images, each photo is followed by one of its class, so any batch of even
    size is half subject, half class. Where items have several sizes, each waits for others of its
    size until a batch is full: batches never mix sizes and are never short, and every photo is
    shown as often as without buckets. A batch depends on the seed and its number alone: a resumed
    run sees the same items.

    Attributes:
        items: every item that can occur; ``batch`` returns indices into it.
    """

    def __init__(
        self,
        subject: Sequence[Sequence[Item]],
        prior: Sequence[Item] = (),
        seed: int = 0,
        repeats: Sequence[int] | None = None,
    ) -> None:
        """Lay out the views of each subject photo, then the class images.

        Args:
            subject: for each photo the items that may stand for it.
            prior: class images, of all classes.
            seed: of the order.
            repeats: times an epoch shows each photo; None: once.

        Raises:
            ValueError: when there is no subject photo, or one has no view.
        """
        if not subject or not all(subject):
            raise ValueError("a dataset needs at least one subject photo, each with a view")
        self.items = tuple(item for views in subject for item in views) + tuple(prior)
        self.seed = seed
        self._one_size = len({item.bucket for item in self.items}) == 1
        self._views = [len(views) for views in subject]
        self._slots = np.repeat(np.arange(len(subject)), repeats or [1] * len(subject))
        self._classes = [views[0].class_name for views in subject]
        self._of_class = Counter(self._classes[photo] for photo in self._slots)
        self._priors: dict[str, list[int]] = defaultdict(list)
        for index in range(sum(self._views), len(self.items)):
            self._priors[self.items[index].class_name].append(index)
        self._laid: dict[int, tuple[Iterator[list[int]], list[list[int]]]] = {}

    @property
    def epoch_length(self) -> int:
        """Items in one epoch."""
        followed = (count for name, count in self._of_class.items() if self._priors.get(name))
        return len(self._slots) + sum(followed)

    def epoch(self, epoch: int) -> list[int]:
        """Indices of the items of one epoch, in order."""
        generator = _generator(self.seed, epoch, stream=2)
        starts = np.cumsum([0, *self._views[:-1]])
        shown: dict[str, int] = defaultdict(int)
        indices: list[int] = []
        for slot in generator.permutation(len(self._slots)):
            photo = self._slots[slot]
            indices.append(int(starts[photo] + generator.integers(self._views[photo])))
            name = self._classes[photo]
            if self._priors.get(name):
                indices.append(self._prior(name, epoch * self._of_class[name] + shown[name]))
                shown[name] += 1
        return indices

    def batch(self, position: int, size: int) -> list[int]:
        """Indices of ``size`` items, starting at the ``position``-th of the whole run."""
        indices: list[int] = []
        epoch, offset = divmod(position, self.epoch_length)
        while len(indices) < size:
            indices += self.epoch(epoch)[offset : offset + size - len(indices)]
            epoch, offset = epoch + 1, 0
        return indices

    def batch_of_one_size(self, number: int, size: int) -> list[int]:
        """Indices of batch ``number`` (from 0) of ``size`` items whose pictures are equally large.

        The first call for a late batch walks there from the start; that takes microseconds a batch.
        """
        if self._one_size:
            return self.batch(number * size, size)
        laying, laid = self._laid.setdefault(size, (self._lay(size), []))
        while len(laid) <= number:
            laid.append(next(laying))
        return laid[number]

    def _lay(self, size: int) -> Iterator[list[int]]:
        waiting: dict[Size | None, list[int]] = defaultdict(list)
        for epoch in itertools.count():
            for index in self.epoch(epoch):
                queue = waiting[self.items[index].bucket]
                queue.append(index)
                if len(queue) == size:
                    yield queue.copy()
                    queue.clear()

    def _prior(self, class_name: str, turn: int) -> int:
        """The class image shown as number ``turn`` of its class: all once, then reshuffled."""
        indices = self._priors[class_name]
        round_, place = divmod(turn, len(indices))
        stream = 3 + 16 * list(self._priors).index(class_name)
        return indices[_generator(self.seed, round_, stream).permutation(len(indices))[place]]


def dropped(seed: int, number: int, size: int) -> tuple[list[float], list[float]]:
    """Two uniform draws for each item of batch ``number``: for its caption, and for its trigger."""
    draws = _generator(seed, number, stream=5).random((2, size)).tolist()
    return draws[0], draws[1]


def _generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """A counter-based generator: the same numbers on every platform, nothing carried over."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, stream]))
