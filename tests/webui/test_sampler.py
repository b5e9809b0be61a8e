"""Pictures from the real worker process on mini; one worker serves the whole module."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
from PIL import Image

from nora_diffusion.config import UserError
from webui.paths import DataFolder, new_id
from webui.pictures import read_settings
from webui.protocol import Request, Weighted
from webui.sampler import Sampler

PROMPT = "a {trigger} {class_name} on the beach"
BASE = Request("mini", PROMPT, n=1, seed=3, steps=2)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    opened = Sampler(DataFolder.open(tmp_path_factory.mktemp("sampler") / "data"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def adapters(sampler):
    """Two native adapters of mini that change its pictures a lot, and the second as a LoRA."""
    from nora_diffusion import export_lora, load_pipeline, save_adapter
    from tests.tiny import adapt

    pipe = load_pipeline("mini")
    found = {}
    for seed, name in enumerate(("one", "two")):
        adapt(pipe, name, seed, text_encoders=False, r=16, inner_r=4, scaling=2.0)
        home = sampler.folder.of("adapters", new_id())
        home.mkdir()
        about = {"base": "mini", "trigger": "sks", "class_name": "flower"}
        path = save_adapter(pipe, home / "adapter.safetensors", name, metadata=about)
        found[name] = Weighted(path, 1.0, home.name, f"{name} <b>")
        pipe.delete_adapters(name)
    home = sampler.folder.of("adapters", new_id())
    home.mkdir()
    lora = export_lora(found["two"].path, home / "lora.safetensors", "kohya", base="mini")
    found["lora"] = Weighted(lora, 1.0, home.name, "lora")
    return found


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def drawn(sampler, *adapters, **changes):
    return sampler.draw(replace(BASE, adapters=adapters, **changes))


def far(one, other):
    return np.abs(one - other).mean() > 1


def near(one, other):
    return np.abs(one - other).max() <= 2


def worker_of(sampler):
    return psutil.Process(sampler._process.pid)


def test_pictures_are_those_of_the_command_and_hold_their_settings(sampler, adapters, tmp_path):
    from nora_diffusion.sampling import sample_to_folder

    found = drawn(sampler, replace(adapters["one"], weight=0.7), n=2, negative_prompt="ugly")
    files = sample_to_folder(
        adapters["one"].path, [PROMPT], tmp_path, n=2, seed=3, steps=2, guidance=3.0, weight=0.7,
        negative_prompt="ugly", device="cpu",
    )  # fmt: skip
    for ours, theirs in zip(found.files, files, strict=True):
        assert near(pixels(ours), pixels(theirs))
    assert far(pixels(files[0]), pixels(files[1]))
    with Image.open(found.files[1]) as image:
        assert image.info["Comment"] == "AI-generated"
        assert image.info["prompt"] == "a sks flower on the beach"
        assert str(sampler.folder.root) not in str(image.info)
    inside = read_settings(found.files[1])
    assert (inside.prompt, inside.seed) == ("a sks flower on the beach", 4)
    assert (inside.steps, inside.guidance, inside.width, inside.height) == (2, 3.0, 64, 64)
    assert inside.negative_prompt == "ugly" and inside.base == "mini"
    (used,) = inside.adapters
    assert (used.id, used.name, used.weight) == (adapters["one"].id, "one <b>", 0.7)
    assert (
        inside.model_dump().items()
        <= {
            **found.settings[1],
            "adapters": [used.model_dump()],
        }.items()
    )
    assert found.notes["device"] in ("cpu", "cuda", "mps")
    assert found.notes["safety_checker"] is False


def test_effects_add_up_whatever_kind_the_files_are(sampler, adapters):
    one, two, lora = adapters["one"], adapters["two"], adapters["lora"]
    base, only_one, only_two = (
        pixels(drawn(sampler, *chosen, prompt="a flower").files[0])
        for chosen in ((), (one,), (two,))
    )
    both = pixels(drawn(sampler, one, two, prompt="a flower").files[0])
    mixed = pixels(drawn(sampler, one, lora, prompt="a flower").files[0])
    pictures = [base, only_one, only_two, both]
    assert all(far(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    assert near(both, mixed)
    off = [replace(adapter, weight=0.0) for adapter in (one, two)]
    assert (pixels(drawn(sampler, *off, prompt="a flower").files[0]) == base).all()


def test_nothing_is_loaded_twice(sampler, adapters):
    first = drawn(sampler, adapters["one"], adapters["two"])
    again = [drawn(sampler, adapters[name]) for name in ("two", "one", "two")]
    assert {one.notes["base_loads"] for one in again} == {first.notes["base_loads"]}
    assert {one.notes["adapter_loads"] for one in again} == {first.notes["adapter_loads"]}


def test_several_strengths_give_a_grid(sampler, adapters):
    found = drawn(sampler, adapters["one"], n=2, strengths=(0.0, 1.0))
    assert [one["seed"] for one in found.settings] == [3, 4, 3, 4]
    assert [one["adapters"][0]["weight"] for one in found.settings] == [0.0, 0.0, 1.0, 1.0]
    alone = drawn(sampler, prompt="a sks flower on the beach", n=2)
    assert (pixels(found.files[0]) == pixels(alone.files[0])).all()
    assert found.sheet is not None and found.sheet_settings["grid"] == [0.0, 1.0]
    assert pixels(found.sheet).shape[0] > 2 * 64
    assert read_settings(found.sheet).seed == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "number of pictures: 0"),
        ({"n": 11, "strengths": (0, 0.5, 1, 2, 3, 4)}, "number of pictures: 66"),
        ({"guidance": float("nan")}, "finite"),
        ({"width_px": 10_000}, "width = 10000"),
        ({"width_px": 60}, r"width = 60: this base draws in steps of 8 px"),
        ({"steps": 0}, "steps = 0: this base has 1000"),
        ({"seed": 2**70}, "seed = "),
        ({"prompt": "bad \udcff"}, "no valid text"),
        ({"base": "no/../such"}, "there is no such file or folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused(sampler, changes, message):
    before = set(sampler.folder.part("pictures").iterdir())
    with pytest.raises(UserError, match=message):
        drawn(sampler, **changes)
    assert set(sampler.folder.part("pictures").iterdir()) == before


def test_adapter_files_are_refused_by_the_name_they_are_shown_under(sampler, adapters, tmp_path):
    outside = tmp_path / "adapter.safetensors"
    shutil.copy(adapters["one"].path, outside)
    with pytest.raises(UserError, match="outside the data folder"):
        drawn(sampler, replace(adapters["one"], path=outside))
    link = sampler.folder.part("adapters") / "link.safetensors"
    link.symlink_to(outside)
    with pytest.raises(UserError, match="outside the data folder"):
        drawn(sampler, replace(adapters["one"], path=link))
    link.unlink()
    cut = sampler.folder.part("adapters") / "cut.safetensors"
    cut.write_bytes(outside.read_bytes()[:-100])
    with pytest.raises(UserError, match="^Mine: damaged") as caught:
        drawn(sampler, replace(adapters["one"], path=cut, name="Mine"))
    assert str(sampler.folder.root) not in str(caught.value)
    with pytest.raises(UserError, match="its file is gone"):
        drawn(sampler, replace(adapters["one"], path=cut.with_name("gone.safetensors")))
    with pytest.raises(UserError, match="5 adapters; choose at most 4"):
        drawn(sampler, *[adapters["one"]] * 5)
    assert len(drawn(sampler, adapters["one"]).files) == 1


def test_ten_at_once_each_get_their_own_in_order(sampler):
    begun, answers, threads = [], {}, []
    first, go = threading.Event(), threading.Event()

    def draw(number):
        def progress(done, text):
            if number not in begun:
                begun.append(number)
                first.set()
                go.wait(60)

        request = replace(BASE, prompt=f"a flower, {number}", seed=100 * number, steps=1)
        answers[number] = sampler.draw(request, progress)

    for number in range(10):  # the first one holds the turn until all others have queued up
        threads.append(threading.Thread(target=draw, args=(number,)))
        threads[-1].start()
        assert first.wait(120)
        waits_for(lambda number=number: sampler._turns._work_queue.qsize() == number)
    go.set()
    for thread in threads:
        thread.join(300)
    assert begun == list(range(10))
    for number in range(10):
        (settings,) = answers[number].settings
        assert (settings["prompt"], settings["seed"]) == (f"a flower, {number}", 100 * number)
        assert read_settings(answers[number].files[0]).seed == 100 * number
    assert len({path for one in answers.values() for path in one.files}) == 10


def waits_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_stop_ends_ones_own_request_alone_and_keeps_the_worker(sampler):
    drawn(sampler)
    pid, tried = worker_of(sampler).pid, []
    before = set(sampler.folder.part("pictures").iterdir())

    def stop(done, text):
        if not tried:
            tried.extend([sampler.stop("somebody else"), sampler.stop("me")])

    with pytest.raises(UserError, match="stopped"):
        sampler.draw(replace(BASE, steps=500), stop, owner="me")
    assert tried == [False, True] and not sampler.stop("me")
    assert set(sampler.folder.part("pictures").iterdir()) == before
    assert len(drawn(sampler).files) == 1 and worker_of(sampler).pid == pid


def test_a_worker_killed_in_the_middle_costs_nobody_their_pictures(sampler):
    expected = pixels(drawn(sampler).files[0])
    killed = []

    def kill(done, text):
        if done and not killed:
            killed.append(worker_of(sampler))
            killed[0].kill()

    found = sampler.draw(BASE, kill)
    assert len(killed) == 1 and not killed[0].is_running()
    assert near(pixels(found.files[0]), expected)


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_is_a_message_and_the_next_request_works(sampler):
    def kill(done, text):
        if done:
            worker_of(sampler).kill()

    with pytest.raises(UserError, match="ended twice"):
        sampler.draw(BASE, kill)
    assert len(drawn(sampler).files) == 1


@pytest.mark.slow
def test_a_released_worker_is_gone_and_comes_back(sampler):
    drawn(sampler)
    process = sampler._process
    sampler.release()
    assert process.returncode == 0
    assert len(drawn(sampler).files) == 1


@pytest.mark.slow
def test_while_a_run_trains_the_cpu_still_draws_and_a_gpu_does_not(sampler, monkeypatch):
    monkeypatch.setattr(sampler, "_is_training", lambda: True)
    drawn(sampler)
    monkeypatch.setattr(sampler, "_device", "cuda")
    with pytest.raises(UserError, match="a training run is using the cuda device"):
        drawn(sampler)
    monkeypatch.undo()
    assert len(drawn(sampler).files) == 1


@pytest.mark.slow
def test_more_adapters_than_are_kept(sampler, adapters):
    plain = pixels(drawn(sampler, adapters["one"]).files[0])
    for _ in range(9):
        copy = sampler.folder.of("adapters", new_id(), ".safetensors")
        shutil.copy(adapters["two"].path, copy)
        drawn(sampler, replace(adapters["two"], path=copy))
    assert near(pixels(drawn(sampler, adapters["one"]).files[0]), plain)


@pytest.mark.slow
def test_the_worker_ends_with_the_app_even_in_the_middle_of_its_work(sampler):
    process = []

    def leave(done, text):
        if done and not process:
            process.append(worker_of(sampler))
            sampler._process.stdin.close()

    # As if the app had died: the worker goes at once. This one has not, so it asks another one.
    assert len(sampler.draw(replace(BASE, steps=30), leave).files) == 1
    assert not process[0].is_running()
    assert worker_of(sampler).pid != process[0].pid
