"""The real server killed in the middle of its work, and in a crowd: nothing is lost or mixed up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.utils import Status
from PIL import Image

from nora_diffusion.disk import is_temporary
from tests.webui.browser import chromium
from tests.webui.conftest import SAMPLES
from tests.webui.server import Server
from tests.webui.test_adapters_tab import adopted
from tests.webui.test_jobs import SHORT
from webui.paths import DataFolder
from webui.pictures import PictureView, read_settings
from webui.studio import Studio

TIMEOUT_S = 300  # of a machine with much else to do
STEPS = 300
CLIENTS = 10
CROWD_S = 60


def client_of(server: Server) -> Client:
    return Client(server.url, verbose=False, download_files=False)


def pictures_of(data: Path) -> list[PictureView]:
    """The gallery, oldest first, with every file of it whole."""
    studio = Studio.open(DataFolder.open(data))
    found = studio.pictures.all("", 10_000)[::-1]
    studio.close()
    for one in found:
        Image.open(one.path).load()
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def wait_for(fits) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not fits():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_while_it_trains_and_draws_it_has_everything_and_goes_on(tmp_path, finished_run):
    from playwright.sync_api import expect

    data = tmp_path / "data"
    studio = Studio.open(DataFolder.open(data))
    adopted(studio, finished_run, "Rose")
    studio.close()
    with Server(data) as server:
        client = client_of(server)
        files = [handle_file(path) for path in SAMPLES]
        made = client.predict("Hibiscus", files, "flower", "sks", True, api_name="/upload")
        rose = [{"name": "Rose", "weight": 1.0}]
        client.predict("a sks flower", rose, 2, 5, 2, api_name="/sample")
        # The killed server's training goes on until the next one ends it, and must not be done.
        settings = SHORT | {"train.steps": STEPS, "train.checkpoint_every": 5}
        job = client.predict(made["subject"], "mini", settings, api_name="/train")
        wait_for(lambda: client.predict(job, api_name="/status")["step"] > 5)
        before = [client.predict(api_name=name) for name in ("/subjects", "/adapters")]
        drawing = client.submit("a sks flower", rose, 16, 50, 150, api_name="/sample")
        wait_for(lambda: drawing.status().code == Status.PROCESSING)
        assert client.predict(job, api_name="/status")["state"] == "running"
        server.kill()

    gallery = pictures_of(data)
    assert [one.settings["seed"] for one in gallery] == [5, 6]
    with Server(data) as server, chromium() as browser:
        client = client_of(server)
        assert [client.predict(api_name=name) for name in ("/subjects", "/adapters")] == before
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_role("tab", name="Train").click()
        state = page.locator(".run-state")
        expect(state).to_have_text("Interrupted")
        kept = client.predict(job, api_name="/status")["step"]
        assert kept >= 5
        page.get_by_role("button", name="Resume").click()
        expect(state).to_have_text("Done")
        page.get_by_role("tab", name="Create").click()
        expect(page.locator("#create-gallery img")).to_have_count(2)
        page.get_by_role("tab", name="Adapters").click()
        expect(page.locator("#adapters-list h3")).to_have_count(2)
        client.predict("a sks flower", rose, 1, 7, 2, api_name="/sample")
        assert client.predict(job, api_name="/status")["step"] == STEPS
    assert [one.id for one in pictures_of(data)[:2]] == [one.id for one in gallery]
    assert len(list((data / "pictures").iterdir())) == 3
    photos = sorted((data / "subjects").glob("*/photos/*.jpg"))
    assert [path.read_bytes() for path in photos] == [path.read_bytes() for path in SAMPLES]
    assert [path for path in data.rglob("*") if is_temporary(path)] == []
    steps = [line for line in _events(data, job) if '"event": "start"' in line]
    assert f"resumed at step {kept}" in steps[-1]


def _events(data: Path, job: str) -> list[str]:
    return (data / "runs" / job / "events.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.slow
def test_ten_clients_at_once_for_a_minute_each_get_their_own_pictures_in_turn(tmp_path):
    data = tmp_path / "data"
    asked: dict[tuple[int, int], float] = {}  # client and seed to the time of the request
    failures: list[Exception] = []
    with Server(data) as server:
        clients = [client_of(server) for _ in range(CLIENTS)]
        clients[0].predict("warm", steps=1, api_name="/sample")
        end = time.monotonic() + CROWD_S

        def sample(number: int) -> None:
            seed = 1000 * number
            while time.monotonic() < end:
                asked[number, seed] = time.time()
                answer = clients[number].predict(
                    f"a flower, {number}", seed=seed, steps=2, api_name="/sample"
                )
                (settings,) = answer["settings"]
                assert (settings["prompt"], settings["seed"]) == (f"a flower, {number}", seed)
                seed += 1

        def guarded(number: int) -> None:
            try:
                sample(number)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert failures == []

        drawn = pictures_of(data)[1:]
        order = [(int(one.settings["prompt"].split()[-1]), one.settings["seed"]) for one in drawn]
        assert sorted(order) == sorted(asked)  # none lost, none twice
        for one in drawn:
            inside = read_settings(one.path)
            assert (inside.prompt, inside.seed) == (one.settings["prompt"], one.settings["seed"])
        for number in range(CLIENTS):  # what was drawn in the crowd is what it says it is
            first = drawn[order.index((number, 1000 * number))]
            prompt = f"a flower, {number}"
            clients[number].predict(prompt, seed=1000 * number, steps=2, api_name="/sample")
            again = pictures_of(data)[-1]
            assert np.abs(pixels(first.path) - pixels(again.path)).max() <= 2
    _in_turn(order, asked, [one.created_at for one in drawn])


def _in_turn(
    order: list[tuple[int, int]], asked: dict[tuple[int, int], float], done: list[float]
) -> None:
    """First come, first served: while somebody waits, nobody else is served three times.

    One picture of another client may be at work, and one request be there before; a third would
    have been asked for after this one.
    """
    counts = [sum(number == one for one, _ in order) for number in range(CLIENTS)]
    print(f"{len(order)} pictures, {min(counts)} to {max(counts)} a client")
    assert min(counts) >= 1 and max(counts) - min(counts) <= 2
    for place, key in enumerate(order):
        meanwhile = [
            number
            for (number, _), moment in zip(order[:place], done[:place], strict=True)
            if moment > asked[key]
        ]
        assert all(meanwhile.count(number) <= 2 for number in set(meanwhile)), key
