"""Adapters: from finished runs, from files, to files, and to the bin."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from webui.models import Job
from webui.paths import new_id


@pytest.fixture
def finished_job(studio, finished_run) -> str:
    """A job that is done, with its run folder."""
    return add_job(studio, finished_run)


def add_job(studio, run: Path, owner: str = "", name: str = "Hibiscus") -> str:
    id = new_id()
    shutil.copytree(run, studio.folder.of("runs", id))
    with studio.library.sessions.begin() as session:
        session.add(
            Job(
                id=id, owner=owner, name=name, base="mini", config="mini", state="done",
                position=1.0, steps=2,
            )
        )  # fmt: skip
    return id


def test_what_a_run_left_is_taken_over_once(studio, finished_job, finished_run):
    adapter = studio.library.adopt(finished_job)
    assert adapter == studio.library.adopt(finished_job)
    assert studio.library.all("") == [adapter]
    assert (adapter.name, adapter.kind, adapter.base, adapter.family) == (
        "Hibiscus", "nora", "mini", "sd",
    )  # fmt: skip
    assert (adapter.trigger, adapter.class_name) == ("sks", "flower")
    assert (adapter.r, adapter.inner_r, adapter.steps) == (32, 8, 2)
    assert adapter.loss is not None and adapter.loss > 0
    assert adapter.path.read_bytes() == (finished_run / "adapter.safetensors").read_bytes()
    assert adapter.size_bytes == adapter.path.stat().st_size
    assert adapter.thumbnail is not None and adapter.card is not None
