"""The subjects of a run: one in ``[data]``, or several in ``[[data.subjects]]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nora_diffusion.schema import Section, setting


class Subject(Section):
    """One of several subjects; what it leaves out is taken from ``[data]``."""

    path: str = setting(
        ..., "Folder with 1 to 20 photos of this subject.", min_length=1, resume=True
    )
    trigger: str | None = setting(None, "Word that will stand for it in prompts.", min_length=1)
    class_name: str | None = setting(None, "Common noun for it.", min_length=1)
    repeats: int | None = setting(None, "Times an epoch shows each of its photos.", ge=1)
    class_images: str | None = setting(None, "Folder of pictures of its class.", min_length=1)


@dataclass(frozen=True)
class SubjectFolder:
    """One subject with everything settled.

    Attributes:
        key: the user's key for its folder, for messages.
        path: folder with its photos.
        trigger: word that stands for it in prompts.
        class_name: common noun for it.
        repeats: times an epoch shows each of its photos.
        class_images: folder of pictures of its class, or None.
    """

    key: str
    path: str
    trigger: str
    class_name: str
    repeats: int
    class_images: str | None


class DataSettings(Protocol):
    """What of ``[data]`` concerns the subjects."""

    @property
    def subject(self) -> str | None: ...  # noqa: D102
    @property
    def subjects(self) -> Sequence[Subject]: ...  # noqa: D102
    @property
    def class_name(self) -> str | None: ...  # noqa: D102
    @property
    def trigger(self) -> str: ...  # noqa: D102
    @property
    def repeats(self) -> int: ...  # noqa: D102
    @property
    def class_images(self) -> str | None: ...  # noqa: D102


def settle_subjects(data: DataSettings) -> tuple[SubjectFolder, ...]:
    """The subjects of a run in the user's order; ``find_problems`` must have found none."""
    listed = data.subjects or (Subject(path=data.subject or ""),)
    return tuple(
        SubjectFolder(
            key=f"data.subjects[{index}].path" if data.subjects else "data.subject",
            path=one.path,
            trigger=one.trigger or data.trigger,
            class_name=one.class_name or data.class_name or "",
            repeats=one.repeats or data.repeats,
            class_images=one.class_images or data.class_images,
        )
        for index, one in enumerate(listed)
    )


def find_problems(data: DataSettings, missing: dict[str, str]) -> list[str]:
    """What does not fit together in ``[data]``, a sentence each.

    Args:
        data: the settings.
        missing: what to say of ``subject`` and ``class_name`` where they are needed and not there.
    """
    if not data.subjects:
        needed = {"subject": data.subject, "class_name": data.class_name}
        return [missing[name] for name, value in needed.items() if value is None]
    problems: list[str] = []
    if data.subject is not None:
        problems.append(
            f'data.subject = "{data.subject}": data.subjects is given too; give one of the two '
            '(data.subject = "none" unsets it)'
        )
    problems += [
        f"data.subjects[{index}].class_name: missing; give it there, or data.class_name for all"
        for index, one in enumerate(data.subjects)
        if not (one.class_name or data.class_name)
    ]
    called: dict[str, str] = {}
    for index, one in enumerate(data.subjects):
        trigger, class_name = one.trigger or data.trigger, one.class_name or data.class_name or ""
        if called.setdefault(trigger, class_name) != class_name:
            problems.append(
                f'data.subjects[{index}].trigger = "{trigger}": it already stands for a '
                f"{called[trigger]}; give each subject a word of its own"
            )
    classes = {one.class_name or data.class_name for one in data.subjects if not one.class_images}
    if data.class_images is not None and len(classes) > 1:
        problems.append(
            f'data.class_images = "{data.class_images}": there are several classes; give '
            "class_images in each of data.subjects"
        )
    return problems
