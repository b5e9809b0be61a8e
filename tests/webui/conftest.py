"""A data folder with the app's services, photos as a browser sends them, and one finished run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from webui.paths import DataFolder, new_id
from webui.studio import Studio
from webui.subjects import SubjectView

ROOT = Path(__file__).parent.parent.parent
SAMPLES = sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))

Upload = Callable[..., list[tuple[Path, str]]]


@pytest.fixture
def studio(tmp_path) -> Iterator[Studio]:
    """The services over a new data folder; its owner "" may use the photos. Nothing is started."""
    opened = Studio.open(DataFolder.open(tmp_path / "data"))
    opened.subjects.rights.confirm("")
    yield opened
    opened.close()


@pytest.fixture
def upload(studio) -> Upload:
    """Puts copies of files where Gradio keeps uploads; returns what ``Subjects.create`` takes."""

    def send(*paths: Path) -> list[tuple[Path, str]]:
        sent = []
        for path in paths:
            target = studio.folder.part("uploads") / new_id() / path.name
            target.parent.mkdir()
            sent.append((Path(shutil.copyfile(path, target)), path.name))
        return sent

    return send


@pytest.fixture
def subject(studio, upload) -> SubjectView:
    """The sample subject, saved for the owner ""."""
    return studio.subjects.create("", "Hibiscus", "flower", "sks", upload(*SAMPLES))[0]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """Run folder of two steps of ``nora-dreambooth`` on mini. Copy it; do not change it."""
    # One for all processes of a test run.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    run = shared / "finished-run"
    with FileLock(shared / "finished-run.lock"):
        if not (run / "README.md").is_file():
            _train(run)
    return run


def _train(run: Path) -> None:
    settings = {
        "output.dir": run,
        "data.subject": ROOT / "sample_data" / "subject",
        "data.class_name": "flower",
        "train.steps": 2,
        "train.batch_size": 1,
        "sample.n": 1,
        "sample.steps": 2,
        "sample.prompts": '["a {trigger} {class_name}"]',
    }
    overrides = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-c", "from nora_diffusion.cli import *; main_dreambooth()"]
    subprocess.run([*command, "mini", *overrides], cwd=ROOT, check=True, capture_output=True)
