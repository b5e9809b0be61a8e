"""The queue of training runs: with the real command on mini, in runs of a few steps."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from nora_diffusion.config import UserError, load_run
from nora_diffusion.events import EventLog
from tests.webui.server import ROOT
from webui import runner
from webui.database import open_database
from webui.jobs import Jobs, JobView
from webui.models import Job
from webui.paths import DataFolder
from webui.progress import POINTS, Progress, seconds_a_step
from webui.recipe import WITHHELD

SHORT = {
    "train.steps": 3,
    "train.batch_size": 1,
    "train.log_every": 1,
    "text_encoder.train": False,
    "adapter.targets": ["attention"],
    "sample.prompts": ["a {trigger} {class_name}"],
    "sample.n": 1,
    "sample.steps": 1,
    "output.lora": False,
}
TIMEOUT_S = 240  # of a machine with much else to do
SERVE = """
import sys, time
from webui.database import open_database
from webui.jobs import Jobs
from webui.paths import DataFolder
folder = DataFolder.open(sys.argv[1])
Jobs(folder, open_database(folder.database)).start()
time.sleep(600)
"""


@pytest.fixture
def jobs(studio):
    """The queue, with nobody working on it until ``start``."""
    return studio.jobs


def wait(jobs: Jobs, id: str, fits: Callable[[JobView], bool]) -> JobView:
    """The job once it fits; the log when it never does."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        view = jobs.status("", id)
        if fits(view):
            return view
        time.sleep(0.05)
    raise AssertionError(f"{jobs.status('', id)}\n{jobs.log('', id)}")


def ended(jobs: Jobs, id: str) -> JobView:
    return wait(jobs, id, lambda job: job.state not in ("queued", "running", "stopping"))


def adapter_of(jobs: Jobs, id: str) -> bytes:
    return (jobs.folder.of("runs", id) / "adapter.safetensors").read_bytes()


def test_a_run_is_stopped_resumed_and_done_and_the_one_behind_it_fails_with_a_sentence(
    studio, subject
):
    called: list[str] = []
    jobs = Jobs(
        studio.folder,
        studio.jobs.sessions,
        before_start=lambda: called.append("before"),
        on_done=called.append,
    )
    first = jobs.submit("", subject.id, "mini", SHORT | {"train.steps": 16})
    failing = jobs.submit("", subject.id, "mini", SHORT | {"model.base": "nobody/nothing"})
    assert [job.message for job in jobs.all("")] == ["Next.", "Waits for 1 other run."]
    jobs.start()
    try:
        wait(jobs, first, lambda job: job.step >= 1)
        assert jobs.status("", failing).state == "queued"
        jobs.stop("", first)
        stopped = ended(jobs, first)
        assert stopped.state == "stopped" and stopped.resumable and 1 <= stopped.step < 16
        assert stopped.message.endswith(f"Resume goes on from step {stopped.step}.")
        assert not (studio.folder.of("runs", first) / "adapter.safetensors").exists()
        jobs.resume("", first)

        failed = ended(jobs, failing)
        assert failed.state == "failed" and failed.resumable
        assert failed.message.startswith('model.base = "nobody/nothing": its configs are not on')
        assert "give weights that are" in failed.message and "Traceback" not in failed.message

        done = ended(jobs, first)
        assert (done.state, done.step, done.steps) == ("done", 16, 16) and done.loss is not None
        assert [step for step, _ in done.losses] == list(range(1, 17))
        assert done.sheet is not None and done.sheet.is_relative_to(studio.folder.root)
        assert adapter_of(jobs, first)
    finally:
        jobs.close()
    assert called == ["before", "before", "before", first]
    # Deleting the subject can remove what was made of its photos: it is in a folder of its own.
    assert len(list(studio.folder.of("latents", subject.id).rglob("*.safetensors"))) == 5
    assert not (studio.folder.part("cache") / "latents").exists()


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_weights_of_one_that_was_never_stopped(jobs, subject):
    settings = SHORT | {"train.steps": 16}
    whole = jobs.submit("", subject.id, "mini", settings)
    parted = jobs.submit("", subject.id, "mini", settings)
    jobs.start()
    assert ended(jobs, whole).state == "done"
    wait(jobs, parted, lambda job: job.step >= 1)
    jobs.stop("", parted)
    assert ended(jobs, parted).step < 16
    jobs.resume("", parted)
    assert ended(jobs, parted).state == "done"
    assert adapter_of(jobs, parted) == adapter_of(jobs, whole)


def test_a_run_that_outlives_its_server_is_ended_and_can_be_resumed(studio, subject):
    jobs = studio.jobs
    running = jobs.submit("", subject.id, "mini", SHORT | {"train.steps": 2000})
    queued = jobs.submit("", subject.id, "mini", SHORT)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(studio.folder.root)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait(jobs, running, lambda job: job.step >= 1)
        with jobs.sessions() as session:
            pid = session.get_one(Job, running).pid
        assert pid is not None
        process = psutil.Process(pid)
    finally:
        server.kill()
        server.wait()
    assert process.is_running(), "the run goes on without its server"
    jobs.stop("", queued)  # so that nothing else is started here
    jobs.start()
    left = ended(jobs, running)
    assert left.state == "interrupted" and left.resumable and left.step >= 1
    assert left.message == (
        f"The app ended while this run was at work. Resume goes on from step {left.step}."
    )
    assert not runner.is_alive(process)
    assert "stopped by SIGTERM" in jobs.log("", running), "it has saved before it ended"
    jobs.close()


@pytest.mark.slow
def test_a_run_that_diverges_says_what_to_change(studio, subject):
    jobs = studio.jobs
    absurd = {"train.steps": 60, "train.learning_rate": 1e6, "train.lr_warmup_steps": 0}
    id = jobs.submit("", subject.id, "mini", SHORT | absurd | {"train.max_grad_norm": 1e9})
    jobs.start()
    failed = ended(jobs, id)
    assert failed.state == "failed"
    assert "lower train.learning_rate" in failed.message and "Traceback" not in failed.message


@pytest.mark.slow
def test_closing_the_app_saves_the_run_and_keeps_the_queue_for_a_moved_folder(studio, subject):
    jobs = studio.jobs
    running = jobs.submit("", subject.id, "mini", SHORT | {"train.steps": 2000})
    queued = jobs.submit("", subject.id, "mini", SHORT)
    jobs.start()
    wait(jobs, running, lambda job: job.step >= 1)
    jobs.close()
    left = jobs.status("", running)
    assert left.state == "interrupted" and left.resumable
    assert left.message.endswith(f"from step {left.step}.")
    assert jobs.status("", queued).state == "queued"
    folder = DataFolder.open(studio.folder.root.rename(studio.folder.root.with_name("moved")))
    moved = Jobs(folder, open_database(folder.database))
    moved.start()
    try:
        assert ended(moved, queued).state == "done"
    finally:
        moved.close()


def test_the_queue_is_reordered_and_runs_leave_it(studio, jobs, subject):
    first, second, third = (jobs.submit("", subject.id, "mini", SHORT) for _ in range(3))

    def order() -> list[str]:
        # As a server that is started anew finds it.
        other = Jobs(studio.folder, open_database(studio.folder.database))
        return [job.id for job in other.all("") if job.state == "queued"]

    jobs.move("", third, -1)
    assert order() == [first, third, second]
    jobs.move("", first, 1)
    assert order() == [third, first, second]
    jobs.move("", third, -1)  # is first already
    jobs.move("", second, 1)  # is last already
    assert order() == [third, first, second]
    jobs.cancel("", first)
    assert order() == [third, second]
    assert not jobs.folder.of("runs", first).exists()
    with pytest.raises(UserError, match="no such run"):
        jobs.status("", first)
    jobs.stop("", third)
    assert jobs.status("", third).state == "stopped" and order() == [second]
    jobs.resume("", third)
    assert order() == [second, third]
    jobs.stop("", second)
    for act in (jobs.stop, jobs.cancel, lambda owner, id: jobs.move(owner, id, 1)):
        with pytest.raises(UserError, match="this run is stopped; only"):
            act("", second)


def test_others_neither_see_nor_control_a_run(jobs, subject):
    id = jobs.submit("", subject.id, "mini", SHORT)
    assert jobs.all("eve") == []
    for method in (jobs.status, jobs.stop, jobs.resume, jobs.cancel, jobs.log):
        with pytest.raises(UserError, match="^there is no such run$"):
            method("eve", id)
    with pytest.raises(UserError, match="^there is no such run$"):
        jobs.move("eve", id, 1)
    with pytest.raises(UserError, match="^there is no such subject"):
        jobs.submit("eve", subject.id, "mini", {})
    assert jobs.status("", id).state == "queued"


def test_moving_ones_own_runs_leaves_those_of_others_in_their_places(studio, jobs, subject):
    mine = [jobs.submit("", subject.id, "mini", SHORT)]
    theirs = jobs.submit("", subject.id, "mini", SHORT)
    mine.append(jobs.submit("", subject.id, "mini", SHORT))
    with jobs.sessions.begin() as session:
        session.get_one(Job, theirs).owner = "eve"
    jobs.move("", mine[1], -1)
    with jobs.sessions() as session:
        queue = session.query(Job).order_by(Job.position).all()
    assert [job.id for job in queue] == [mine[1], theirs, mine[0]]


@pytest.mark.parametrize("key", WITHHELD)
def test_settings_that_lead_out_of_the_data_folder_are_refused(jobs, subject, key):
    with pytest.raises(UserError, match=f"{key} = .*cannot be set here; "):
        jobs.submit("", subject.id, "mini", {key: "/etc/passwd"})
    assert jobs.all("") == [] and list(jobs.folder.part("runs").iterdir()) == []


@pytest.mark.parametrize(
    "key",
    [
        "--output.dir",
        "output.dir=/tmp/x;",
        "data.subjects[0].path",
        "output.dir\n",
        "output",
        "",
        "ｏutput.dir",
        "model.base=/etc/x --output.dir",
    ],
)
def test_a_key_that_is_none_never_reaches_the_settings(jobs, subject, key):
    with pytest.raises(UserError, match="not a setting"):
        jobs.submit("", subject.id, "mini", {key: "/tmp/x"})


def test_all_problems_are_told_at_once(jobs, subject):
    wrong = {"train.batch_size": "many", "train.stepz": 5, "output.dir": "/", "sample.n": 0}
    with pytest.raises(UserError) as raised:
        jobs.submit("", subject.id, "mini", wrong)
    message = str(raised.value)
    for part in ("4 problems", 'batch_size = "many"', "did you mean train.steps", "output.dir",
                 "sample.n = 0: must be"):  # fmt: skip
        assert part in message
    with pytest.raises(UserError, match="the presets are 8gb"):
        jobs.submit("", subject.id, "mini", {}, "9gb")


def test_values_arrive_as_they_were_given(jobs, subject):
    given = {
        "sample.prompts": ["--output.dir=/tmp", 'a "{trigger}", [x]', "none", "= {1}\t", "日本 🌺"],
        "sample.negative_prompt": "--train.steps 5",
        "adapter.timestep_rank": {"alpha": 1.5, "k_min": 2},
        "adapter.target_modules": None,
        "adapter.targets": ["feed_forward"],
        "train.learning_rate": 1e-7,
        "train.ema_decay": None,
        "train.steps": "auto",
        "output.portable": True,
    }
    settings = jobs.settle("", subject.id, "mini", given)
    assert settings.sample.prompts == tuple(given["sample.prompts"])
    assert settings.sample.negative_prompt == "--train.steps 5"
    assert settings.adapter.timestep_rank == {"alpha": 1.5, "k_min": 2}
    assert settings.adapter.targets == ("feed_forward",) and not settings.adapter.target_modules
    assert settings.train.learning_rate == 1e-7 and settings.output.portable is True
    assert settings.train.steps == 400  # for five photos, four a step
    run = jobs.folder.of("runs", jobs.submit("", subject.id, "mini", given))
    saved = load_run(run)
    assert dataclasses.asdict(saved.data.each()[0]) == dataclasses.asdict(settings.data.each()[0])
    assert saved.sample == settings.sample and saved.train == settings.train
    assert saved.data.subject == str(jobs.folder.of("subjects", subject.id) / "photos")


@pytest.mark.parametrize(
    "base",
    [
        "/etc",
        ".",
        "..",
        "../../x",
        "../x",
        "~/model",
        "x.safetensors",
        "uploads/abc",
        "subjects/abc",
        "owner/file.safetensors",
        "a/b/c",
        "a\x00/b",
        "",
    ],
)
def test_with_logins_a_base_is_built_in_or_of_the_hub(jobs, studio, upload, base):
    studio.subjects.rights.confirm("ada")
    photos = upload(*sorted((ROOT / "sample_data" / "subject").glob("*.jpg"))[:2])
    own = studio.subjects.create("ada", "Mug", "mug", "sks", photos)[0]
    with pytest.raises(UserError, match="model.base = "):
        jobs.settle("ada", own.id, "mini", {"model.base": base})
    settings = jobs.settle("ada", own.id, "sdxl", {"model.base": "somebody/a-model"})
    assert settings.model.base == "somebody/a-model"


def test_the_family_of_a_local_base_is_found_without_loading_it(jobs, subject, tmp_path):
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    settings = jobs.settle("", subject.id, str(folder), {})
    assert settings.model.base == str(folder) and settings.data.resolution_px == 1024
    hub = jobs.settle("", subject.id, "stabilityai/stable-diffusion-xl-base-1.0", {})
    assert hub.data.resolution_px == 1024
    with pytest.raises(UserError, match="give one of .*sdxl.* and this as model.base"):
        jobs.settle("", subject.id, str(tmp_path / "nothing.safetensors"), {})


def test_a_run_without_its_subject_fails_with_a_sentence(jobs, studio, subject):
    id = jobs.submit("", subject.id, "mini", SHORT)
    with jobs.sessions.begin() as session:
        session.get_one(Job, id).subject_id = None
    jobs.start()
    assert ended(jobs, id).message.startswith("Its subject was deleted")
    assert not jobs.status("", id).resumable


@pytest.mark.parametrize(
    ("code", "error", "output", "expected"),
    [
        (-9, None, "", "for want of memory. Choose a preset for less memory (8gb)"),
        (-11, None, "", "ended by SIGSEGV"),
        (1, None, "x\nnora-dreambooth: error: CUDA out of memory. Tried 2 GB", "8gb"),
        (2, "old", "warning: x\nnora-dreambooth: error: data.masks: no\n  mask\n", "no\n  mask"),
        (2, "stopped at step 3: the loss is nan. Start a new run", "", "Start a new run"),
        (1, "boom", "Traceback (most recent call last):\n  File x\nKeyError: 'y'\n", "(boom)"),
        (1, None, "Traceback (most recent call last):\n  F\nKeyError: 'y'\n", "(KeyError: 'y')"),
        (3, None, "", "(exit code 3)"),
    ],
)
def test_why_a_run_failed(code, error, output, expected):
    message = runner.explain_failure(code, error, output)
    assert expected in message and "Traceback" not in message


def test_the_log_is_what_a_terminal_shows(tmp_path):
    path = tmp_path / "x.log"
    assert runner.read_log(path) == ""
    path.write_bytes(b"start\n\r 10%\r 20%\r\nend \x1b[1mbold\xff\n")
    assert runner.read_log(path) == "start\n 20%\nend bold\ufffd\n"
    path.write_bytes(b"a" * 200_000 + b"\nlast")
    assert len(runner.read_log(path)) == runner.LOG_TAIL_BYTES
    assert runner.read_log(path, 200_001) == "last"


def test_a_process_is_known_by_its_number_and_its_start():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(child.pid).create_time()
    assert runner.find_process(child.pid, started - 5) is None  # the number was another's
    found = runner.find_process(child.pid, started)
    assert found is not None and runner.is_alive(found)
    runner.kill(child.pid)
    while found.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not runner.is_alive(found)
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert runner.find_process(child.pid, started) is None
    runner.ask_to_stop(child.pid)  # gone: nothing to ask


def test_progress_reads_only_what_is_new_and_forgets_steps_that_are_done_again(tmp_path):
    log, progress = EventLog(tmp_path / "events.jsonl"), Progress(tmp_path)
    assert progress.update().last is None
    log.write("start", 0)
    for step in range(1, 8):
        log.write("step", step, loss=1 / step, eta_s=9.0)
    log.write("checkpoint", 5)
    assert (progress.update().step, progress.checkpoint, len(progress.losses)) == (5, 5, 7)
    size = log.path.stat().st_size
    log.path.write_bytes(b" " * (size - 1) + b"\n")  # what was read is not read again
    log.write("start", 5)
    log.write("step", 6, loss=0.5)
    with open(log.path, "ab") as file:
        file.write(b'{"torn')
    progress.update()
    assert [step for step, _ in progress.losses] == [1, 2, 3, 4, 5, 6]
    assert progress.losses[-1] == (6, 0.5)


def test_a_picture_outside_the_run_folder_is_not_shown(tmp_path):
    run = tmp_path / "run"
    log = EventLog(run / "events.jsonl")
    log.write("sample", 1, image="samples/sheet.png")
    for outside in ("../other.png", "/etc/passwd"):
        log.write("sample", 2, image=outside)
    assert Progress(run).update().image == run / "samples" / "sheet.png"


def test_a_long_run_keeps_a_plot_of_bounded_size(tmp_path):
    log, progress = EventLog(tmp_path / "events.jsonl"), Progress(tmp_path)
    for step in range(1, 3 * POINTS):
        log.write("step", step, loss=1.0)
        if step % 50 == 0:
            progress.update()
    assert POINTS / 2 <= len(progress.update().losses) <= POINTS
    assert progress.losses[0][0] < 10 and progress.losses[-1][0] > 3 * POINTS - 10


def test_the_time_of_a_step_leaves_pauses_and_restarts_out():
    def event(name: str, step: int, at: float):
        return {"event": name, "step": step, "time": at}

    events = [event("start", 0, 0.0), *(event("step", s, s * 0.5) for s in (10, 20, 30))]
    events += [event("step", 40, 999.0), event("start", 40, 5000.0), event("step", 50, 6000.0)]
    assert seconds_a_step(events) == 0.5  # pyright: ignore[reportArgumentType]
    assert seconds_a_step(events[:2]) is None  # pyright: ignore[reportArgumentType]
