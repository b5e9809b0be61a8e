"""What the app remembers: subjects, photos, jobs, adapters, pictures (SQLAlchemy, SQLite).

Times are seconds since 1970, UTC, as in ``events.jsonl``. ``owner`` is the name somebody logged in
with, or "" where the app runs without logins; every query asks for it.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from webui.paths import new_id


class Base(DeclarativeBase):
    """Base of all tables."""


def _id() -> Mapped[str]:
    return mapped_column(String(16), primary_key=True, default=new_id)


class Subject(Base):
    """Somebody's dog, mug or toy; its photos lie in ``subjects/ID/photos``.

    A ``draft`` is one that somebody has begun with and not yet saved: each has one at most.
    """

    __tablename__ = "subjects"

    id: Mapped[str] = _id()
    owner: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    class_name: Mapped[str]
    trigger: Mapped[str]
    draft: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float] = mapped_column(default=time.time)
    deleted_at: Mapped[float | None] = mapped_column(default=None)
    photos: Mapped[list[Photo]] = relationship(
        back_populates="subject", cascade="all, delete-orphan", order_by="Photo.position"
    )


class Photo(Base):
    """One photo of a subject; ``file_name`` is ours, ``shown_name`` the one it came with.

    The rest is as of ``data.images.Photo``; ``look`` is in hex, for SQLite has no unsigned numbers.
    """

    __tablename__ = "photos"

    id: Mapped[str] = _id()
    subject_id: Mapped[str] = mapped_column(ForeignKey("subjects.id", ondelete="CASCADE"))
    position: Mapped[int]
    file_name: Mapped[str]
    shown_name: Mapped[str]
    digest: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    look: Mapped[str | None]
    sharpness: Mapped[float | None]
    caption: Mapped[str] = mapped_column(default="")
    subject: Mapped[Subject] = relationship(back_populates="photos")


class Job(Base):
    """One training run; its run folder is ``runs/ID``, its output ``logs/ID.log``.

    ``state`` is a ``dispatcher.State``. ``pid`` and ``pid_started`` name the process while there
    is one, so that a server that was killed finds it again.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = _id()
    owner: Mapped[str] = mapped_column(index=True)
    subject_id: Mapped[str | None] = mapped_column(
        ForeignKey("subjects.id", ondelete="SET NULL"), index=True
    )
    name: Mapped[str]
    base: Mapped[str]
    config: Mapped[str]
    preset: Mapped[str | None]
    overrides: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    steps: Mapped[int | None]
    state: Mapped[str] = mapped_column(index=True)
    position: Mapped[float]
    message: Mapped[str | None]
    pid: Mapped[int | None]
    pid_started: Mapped[float | None]
    created_at: Mapped[float] = mapped_column(default=time.time)
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]


class Adapter(Base):
    """A trained or imported adapter; its files lie in ``adapters/ID``.

    ``kind`` is "nora" for the native file, "lora" for any other. ``file_name`` is the adapter
    itself, beside it may lie the LoRA export, model card and thumbnail.
    """

    __tablename__ = "adapters"

    id: Mapped[str] = _id()
    owner: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    kind: Mapped[str]
    file_name: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    base: Mapped[str]
    family: Mapped[str | None]
    trigger: Mapped[str | None]
    class_name: Mapped[str | None]
    r: Mapped[int | None]
    inner_r: Mapped[int | None]
    steps: Mapped[int | None]
    loss: Mapped[float | None]
    size_bytes: Mapped[int]
    checksum: Mapped[str | None]
    created_at: Mapped[float] = mapped_column(default=time.time)
    deleted_at: Mapped[float | None] = mapped_column(default=None)


class Picture(Base):
    """A picture in the gallery, ``pictures/ID.png``; its settings are inside the file as well."""

    __tablename__ = "pictures"

    id: Mapped[str] = _id()
    owner: Mapped[str] = mapped_column(index=True)
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[float] = mapped_column(default=time.time, index=True)


class Choice(Base):
    """What somebody has chosen once and for all, such as that they may use their photos."""

    __tablename__ = "choices"
    __table_args__ = (UniqueConstraint("owner", "key"),)

    id: Mapped[str] = _id()
    owner: Mapped[str]
    key: Mapped[str]
    value: Mapped[str]
