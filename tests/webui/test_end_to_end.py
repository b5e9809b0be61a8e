"""One person's way through the app in Chromium: from five photos to a LoRA in diffusers."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tests.webui.browser import TIMEOUT_MS, chromium
from tests.webui.conftest import SAMPLES
from tests.webui.server import ROOT, Server
from webui.pictures import PictureSettings, read_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STEPS = 100
AT_WORK = re.compile(rf"step [1-9]\d* of {STEPS}")
# Gradio's own, of a request that a reload or a closed page cuts off: the app did no wrong.
CUT_OFF = re.compile("AbortError|Failed to fetch|Connection errored out")
ROUNDING = 2  # of 255: the page has the adapter inside the base's weights, diffusers beside them


class Visit:
    """What one person does in one browser, what the browser asks for, and what it complains of."""

    def __init__(self, browser: Browser, url: str, screenshots: Path) -> None:
        self.url = url
        self.screenshots = screenshots
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.context = browser.new_context(viewport={"width": 1440, "height": 900})
        self.context.set_default_timeout(TIMEOUT_MS)
        self.context.on("console", self._hear)
        self.context.on("weberror", lambda error: self._complain(str(error.error)))
        self.context.on("request", self._notice)
        self.page = self.open("Subject")

    def open(self, tab: str) -> Page:
        """One more page of this browser, at a tab."""
        page = self.context.new_page()
        page.goto(self.url)
        page.get_by_role("tab", name=tab).click()
        return page

    def photograph(self, name: str) -> None:
        self.page.screenshot(path=self.screenshots / f"{name}.png", full_page=True)

    def _hear(self, message) -> None:
        if message.type == "error":
            self._complain(message.text)

    def _complain(self, told: str) -> None:
        if not CUT_OFF.search(told):
            self.complaints.append(told)

    def _notice(self, request) -> None:
        if not request.url.startswith((f"{self.url}/", "data:", "blob:")):
            self.elsewhere.append(request.url)


def test_from_photos_to_a_lora_that_diffusers_draws_the_same_picture_with(tmp_path):
    screenshots = tmp_path / "screenshots"
    print(f"screenshots: {screenshots}")
    with Server(tmp_path / "data") as server, chromium() as browser:
        visit = Visit(browser, server.url, screenshots)
        try:
            make_subject(visit)
            train_with_a_stop(visit)
            picture, settings = sample(visit)
            compare(visit)
            lora = download(visit, tmp_path)
        except BaseException:
            visit.photograph("failed")
            raise
    assert visit.complaints == [] and visit.elsewhere == []

    base, adapted = draw_with_diffusers(settings), draw_with_diffusers(settings, lora)
    assert np.abs(adapted - base).mean() > 2 * ROUNDING
    assert np.abs(adapted - picture).max() <= ROUNDING


def make_subject(visit: Visit) -> None:
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_label("I have the right to use").check()
    page.set_input_files("#subject-files input[type=file]", SAMPLES)
    expect(page.locator("#subject-checks img")).to_have_count(5)
    page.locator("#subject-name textarea").fill("Hibiscus")
    page.locator("#subject-class textarea").fill("flower")
    page.get_by_role("button", name="Save subject").click()
    expect(page.locator("#subject-status")).to_contain_text("Hibiscus is saved")
    visit.photograph("subject")


def train_with_a_stop(visit: Visit) -> None:
    """Start; reload; look at it in a second tab and stop it there; resume it in the first."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-subject input")).to_have_value("Hibiscus")
    steps = page.locator("#train-steps input")
    expect(steps).to_have_value("800")  # as mini's config has
    choose_base(page, "mini-128")
    expect(steps).to_have_value("200")
    steps.fill(str(STEPS))
    choose_base(page, "mini")
    expect(page.locator("#train-explained")).to_contain_text("Suggested: 800 steps")
    expect(steps).to_have_value(str(STEPS))
    page.get_by_role("button", name="Advanced").click()
    for section, keys in {"train": {"batch_size": 1}, "sample": {"steps": 2, "n": 1}}.items():
        page.locator(f"#section-{section} > button").click()
        for key, value in keys.items():
            page.locator(f"#setting-{section}-{key} input").fill(str(value))
    page.get_by_role("button", name="Start training").click()

    status = page.locator("#train-status")
    expect(status).to_contain_text(AT_WORK)
    before = steps_done(page)
    page.wait_for_function(
        "before => document.querySelector('#train-status progress').value > before", arg=before
    )
    page.reload()
    page.get_by_role("tab", name="Train").click()
    expect(status).to_contain_text(AT_WORK)
    assert steps_done(page) > before
    other = visit.open("Train")
    expect(other.locator("#train-status")).to_contain_text(AT_WORK)
    other.get_by_role("button", name="Stop").click()
    for one in (page, other):
        expect(one.locator("#train-status")).to_contain_text("Resume goes on from step")
    stopped = steps_done(page)
    assert before < stopped < STEPS
    visit.photograph("train-stopped")

    page.get_by_role("button", name="Resume").click()
    for one in (page, other):
        expect(one.locator(".run-state")).to_have_text("Done")
        assert steps_done(one) == STEPS
    expect(
        page.get_by_role("img", name=re.compile(f"^Loss from .* at step {STEPS}"))
    ).to_be_visible()
    expect(page.get_by_alt_text(re.compile("^Hibiscus: photos, base and adapted"))).to_be_visible()
    visit.photograph("train-done")
    other.close()


def choose_base(page: Page, name: str) -> None:
    page.locator("#train-base input").click()
    page.get_by_role("option", name=f"{name}: built in").click()


def steps_done(page: Page) -> int:
    return int(page.locator("#train-status progress").get_attribute("value") or 0)


def sample(visit: Visit) -> tuple[np.ndarray, PictureSettings]:
    """One picture with the adapter, as the page shows it, and the settings inside its file."""
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("tab", name="Create").click()
    page.locator("#create-adapters input").click()
    page.get_by_role("option", name="Hibiscus").click()
    expect(page.locator("#create-strength-1")).to_contain_text("Strength of Hibiscus")
    page.locator("#create-prompt textarea").fill("a sks flower on the beach")
    page.locator("#create-count input[type=number]").fill("1")
    page.locator("#create-seed input").fill("7")
    page.get_by_role("button", name="Steps, guidance, size").click()
    set_slider(page, "#create-steps", "8")
    page.get_by_role("button", name="Generate").click()
    drawn = page.locator("#create-results img")
    expect(drawn).to_have_count(1)
    expect(page.locator("#create-told")).to_contain_text("seed 7")
    visit.photograph("create")
    file = visit.context.request.get(str(drawn.get_attribute("src"))).body()
    path = visit.screenshots / "drawn.png"
    path.write_bytes(file)
    settings = read_settings(path)
    assert (settings.prompt, settings.seed) == ("a sks flower on the beach", 7)
    assert (settings.steps, [one.name for one in settings.adapters]) == (8, ["Hibiscus"])
    return pixels(Image.open(io.BytesIO(file))), settings


def set_slider(page: Page, where: str, value: str) -> None:
    """Type a number beside a slider until the page has it.

    One typed the moment its section opens can be lost while Gradio is still putting it there; a
    person sees the old number and types again.
    """
    from playwright.sync_api import expect

    slider = page.locator(f"{where} input[type=range]")
    for _ in range(5):
        page.locator(f"{where} input[type=number]").fill(value)
        try:
            # The page's own state has it once the slider beside the number stands there.
            expect(slider).to_have_value(value, timeout=5000)
            return
        except AssertionError:
            continue
    expect(slider).to_have_value(value)


def compare(visit: Visit) -> None:
    from playwright.sync_api import expect

    page = visit.page
    expect(page.locator("#create-gallery img")).to_have_count(1)
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator("#create-results")).to_contain_text("base and adapted, same seeds")
    expect(page.locator("#create-gallery img")).to_have_count(4)  # both pictures and their sheet
    visit.photograph("create-compared")


def download(visit: Visit, folder: Path) -> Path:
    from playwright.sync_api import expect

    page = visit.page
    page.get_by_role("tab", name="Adapters").click()
    page.get_by_role("button", name="Open: Hibiscus").click()
    expect(page.locator("#adapters-facts")).to_contain_text(str(STEPS))
    visit.photograph("adapters")
    with page.expect_download() as loaded:
        page.get_by_role("button", name="LoRA (diffusers)").click()
    path = folder / loaded.value.suggested_filename
    loaded.value.save_as(path)
    return path


def draw_with_diffusers(settings: PictureSettings, lora: Path | None = None) -> np.ndarray:
    """The picture of these settings, by diffusers alone."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "nora_diffusion" / "assets" / "mini")
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    drawn = pipe(
        settings.prompt, negative_prompt=settings.negative_prompt, width=settings.width,
        height=settings.height, num_inference_steps=settings.steps,
        guidance_scale=settings.guidance, generator=torch.Generator().manual_seed(settings.seed),
    )  # fmt: skip
    return pixels(drawn.images[0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)
