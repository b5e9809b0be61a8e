"""From the settings of ``[data]`` to what is trained on: folders read, views laid out, reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nora_diffusion.config import DreamboothConfig, SubjectFolder, UserError, fill_prompt
from nora_diffusion.data.buckets import Size, bucket_sizes, closest_bucket
from nora_diffusion.data.dataset import Item, subject_views
from nora_diffusion.data.images import Photo, Skipped, read_photos
from nora_diffusion.data.survey import survey


@dataclass(frozen=True)
class Found:
    """A subject, its photos, and what else was in its folder."""

    subject: SubjectFolder
    photos: list[Photo]
    skipped: list[Skipped]


def read_subjects(cfg: DreamboothConfig) -> list[Found]:
    """The photos of every subject.

    Raises:
        UserError: naming the key of a folder that holds no photo or too many.
    """
    return [Found(one, *read_photos(one.path, one.key)) for one in cfg.data.each()]


def all_photos(found: Sequence[Found]) -> list[Photo]:
    """The photos of all subjects, in order."""
    return [photo for one in found for photo in one.photos]


def buckets_of(cfg: DreamboothConfig, resolution_px: int, multiple_px: int) -> tuple[Size, ...]:
    """Sizes to choose from; none without ``data.buckets``."""
    return bucket_sizes(resolution_px, multiple_px) if cfg.data.buckets else ()


def lay_out(
    cfg: DreamboothConfig, found: Sequence[Found], buckets: Sequence[Size]
) -> tuple[list[list[Item]], list[int]]:
    """For each photo the items that may stand for it, and how often an epoch shows it."""
    data = cfg.data
    views: list[list[Item]] = []
    repeats: list[int] = []
    for one in found:
        repeats += [one.subject.repeats] * len(one.photos)
        views += subject_views(
            one.photos,
            trigger=one.subject.trigger,
            class_name=one.subject.class_name,
            captions=data.captions,
            flip=data.flip,
            crop=data.crop,
            seed=cfg.train.seed,
            buckets=buckets,
            color_jitter=data.color_jitter,
            first=len(views),
        )
    return views, repeats


def report_lines(
    cfg: DreamboothConfig, found: Sequence[Found], sizes: tuple[int, int] | None
) -> list[str]:
    """What was found, skipped, cut off, enlarged or is there twice.

    Args:
        cfg: the settings.
        found: what ``read_subjects`` returned.
        sizes: resolution and multiple of the base in px; None: not known yet.
    """
    lines: list[str] = []
    for one in found:
        targets = None if sizes is None else [target_of(cfg, photo, *sizes) for photo in one.photos]
        told = survey(
            one.photos, one.skipped, one.subject.path, targets=targets,
            captions=cfg.data.captions, masks=cfg.data.masks,
        )  # fmt: skip
        if len(found) > 1:
            told[0] += f': "{one.subject.trigger} {one.subject.class_name}"'
        lines += told
    return lines


def target_of(cfg: DreamboothConfig, photo: Photo, resolution_px: int, multiple_px: int) -> Size:
    """Width and height of a photo's training picture."""
    buckets = buckets_of(cfg, resolution_px, multiple_px)
    return closest_bucket(photo.size, buckets) if buckets else (resolution_px, resolution_px)


def count_pictures(cfg: DreamboothConfig, found: Sequence[Found]) -> int:
    """How many pictures are encoded and kept, about: views of the photos, and class images."""
    views, _ = lay_out(cfg, found, ())
    classes = {one.subject.class_name for one in found}
    made = cfg.train.prior_images * len(classes) if cfg.train.prior == "class_images" else 0
    return sum(map(len, views)) + made


def distinct_subjects(cfg: DreamboothConfig) -> list[SubjectFolder]:
    """The subjects, each once: several folders may be of the same one."""
    first: dict[tuple[str, str], SubjectFolder] = {}
    for one in cfg.data.each():
        first.setdefault((one.trigger, one.class_name), one)
    return list(first.values())


def scene_prompts(cfg: DreamboothConfig) -> list[str]:
    """``sample.prompts`` with trigger and class filled in: once for each subject, where named."""
    filled = [
        fill_prompt(text, one.trigger, one.class_name)
        for text in cfg.sample.prompts
        for one in distinct_subjects(cfg)
    ]
    return list(dict.fromkeys(filled))


def check_masks(cfg: DreamboothConfig, found: Sequence[Found]) -> None:
    """Refuse ``data.masks`` where no photo has one.

    Raises:
        UserError: naming the names a mask may have.
    """
    if cfg.data.masks and not any(p.mask or p.transparent for p in all_photos(found)):
        raise UserError(
            "data.masks = true: no photo has a mask; give NAME-masklabel.png, NAME-mask.png or "
            "masks/NAME.png for a photo NAME.*, or photos with transparent places"
        )
