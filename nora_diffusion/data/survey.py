"""What was found in a folder of photos, and what will be done to it: said before training."""

from collections.abc import Sequence
from itertools import combinations

from nora_diffusion.data.buckets import Size, cut_share, enlargement
from nora_diffusion.data.images import Photo, Skipped, describe_skipped
from nora_diffusion.data.quality import BLURRED

WORTH_SAYING = 0.02
"""Shares cut off and enlargements up to this are left unsaid."""

SAME_LOOK_BITS = 3
"""Most of 64 bits of ``Photo.look`` in which two pictures of one scene differ."""


def survey(
    photos: Sequence[Photo],
    skipped: Sequence[Skipped],
    folder: str,
    *,
    targets: Sequence[Size] | None = None,
    captions: bool = True,
    masks: bool = False,
) -> list[str]:
    """Lines for people: what is in a folder, and which photos lose or lack pixels.

    Args:
        photos: those that will be used.
        skipped: other files there.
        folder: as the user gave it.
        targets: width and height of the training picture of each photo; None: not known yet.
        captions: whether captions are used.
        masks: whether masks are used.
    """
    lines = [f"{_count(len(photos), 'photo')} in {folder}{_extras(photos, captions, masks)}"]
    for photo, target in zip(photos, targets or [None] * len(photos), strict=True):
        told = [_told(photo, target)] if target else []
        told += ["blurred"] if is_blurred(photo) else []
        told = [text for text in told if text]
        lines += [f"  {photo.path.name}: {', '.join(told)}"] if told else []
    lines += [f"  {a} and {b}: nearly the same picture" for a, b in near_duplicates(photos)]
    if targets and len(set(targets)) > 1:
        sizes = {size: targets.count(size) for size in dict.fromkeys(targets)}
        told = ", ".join(f"{n} of {w} x {h}" for (w, h), n in sizes.items())
        lines.append(f"  buckets: {told}")
    if skipped:
        lines += [f"{_count(len(skipped), 'other file')} skipped:", describe_skipped(skipped)]
    return lines


def near_duplicates(photos: Sequence[Photo]) -> list[tuple[str, str]]:
    """Names of the photos that show nearly the same, in pairs."""
    return [
        (a.path.name, b.path.name)
        for a, b in combinations(photos, 2)
        if a.digest == b.digest or _looks_differ(a, b) <= SAME_LOOK_BITS
    ]


def is_blurred(photo: Photo) -> bool:
    """Whether a photo shows hardly any detail; see ``quality``."""
    return photo.sharpness is not None and photo.sharpness < BLURRED


def _looks_differ(a: Photo, b: Photo) -> int:
    return 64 if a.look is None or b.look is None else (a.look ^ b.look).bit_count()


def _told(photo: Photo, target: Size) -> str:
    width, height = photo.size
    cut, factor = cut_share(photo.size, target), enlargement(photo.size, target)
    told = [f"{cut:.0%} cut off"] if cut > WORTH_SAYING else []
    if factor > 1 + WORTH_SAYING:
        told.append(f"enlarged {factor:.1f} times (it has {width} x {height} px)")
    return f"{', '.join(told)} for {target[0]} x {target[1]}" if told else ""


def _extras(photos: Sequence[Photo], captions: bool, masks: bool) -> str:
    counts = {
        "caption": (sum(photo.caption is not None for photo in photos), captions),
        "mask": (sum(bool(photo.mask or photo.transparent) for photo in photos), masks),
    }
    told = [
        _count(n, name) + ("" if used else f" (not used: data.{name}s = false)")
        for name, (n, used) in counts.items()
        if n
    ]
    return f", {', '.join(told)}" if told else ""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
