"""Pictures of the web app for its pages and for whoever changes it: each tab, wide and narrow.

Starts the app, has it learn the sample subject and draw with it, and photographs what it shows, in
light and dark. A data folder that has a picture already is photographed as it is.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from gradio_client import Client, handle_file
from playwright.sync_api import expect, sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parent.parent
SUBJECT = ROOT / "sample_data" / "subject"
PROMPT = "a sks flower on the beach"
OTHERS = ("a sks flower in the snow", "a sks flower on a wooden table")
WIDTHS_PX = (1440, 390)
TIMEOUT_MS = 300_000
STARTED = 120  # seconds


@contextmanager
def served(data_dir: Path) -> Iterator[str]:
    """The app on a free port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "webui", "--port", str(port), "--data-dir", str(data_dir)]
    app = subprocess.Popen(command, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(url, app)
        yield url
    finally:
        app.terminate()
        app.wait()


def _wait_for(url: str, app: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTED
    while app.poll() is None and time.monotonic() < end:
        try:
            httpx.get(f"{url}/config", timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the app does not start; see above")


def fill(url: str, steps: int) -> None:
    """Teach the app the sample subject, and draw a few pictures with it."""
    client = Client(url, verbose=False, download_files=False)
    if not client.predict(api_name="/adapters"):
        photos = [handle_file(path) for path in sorted(SUBJECT.glob("*.jpg"))]
        made = client.predict("Hibiscus", photos, "flower", "sks", True, api_name="/upload")
        settings = {"train.steps": steps}
        job = client.predict(made["subject"], "mini", settings, api_name="/train")
        _wait_until_done(client, job)
    adapters = [{"name": "Hibiscus", "weight": 1.0}]
    for seed, prompt in enumerate(OTHERS, start=1):
        client.predict(prompt, adapters, 2, 10 * seed, api_name="/sample")


def _wait_until_done(client: Client, job: str) -> None:
    while True:
        status: dict[str, Any] = client.predict(job, api_name="/status")
        print(f"{status['state']}: step {status['step']} of {status['steps']}", flush=True)
        if status["state"] == "done":
            return
        if status["state"] not in ("queued", "running"):
            raise SystemExit(status["message"])
        time.sleep(5)


def show_subject(page: Page) -> None:
    page.get_by_role("button", name="Edit: Hibiscus").click()
    expect(page.locator("#subject-checks img")).to_have_count(5)
    page.get_by_label("64 px (mini)").check()
    expect(page.locator("#subject-checks")).not_to_contain_text("too small")


def show_train(page: Page) -> None:
    expect(page.locator("#train-sheet img")).to_be_visible()
    expect(page.locator("#train-forecast")).to_contain_text("Predicted time")


def show_create(page: Page) -> None:
    page.locator("#create-adapters input").click()
    page.get_by_role("option", name="Hibiscus").click()
    expect(page.locator("#create-strength-1")).to_contain_text("Strength of Hibiscus")
    page.keyboard.press("Escape")
    page.locator("#create-prompt textarea").fill(PROMPT)
    page.locator("#create-count input[type=number]").fill("2")
    page.get_by_role("button", name="Compare with base").click()
    expect(page.locator("#create-told")).to_contain_text("Drawn on")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
    page.locator("#create-gallery button.thumbnail-item").nth(1).click()
    expect(page.get_by_role("button", name="Use these settings")).to_be_visible()


def show_adapters(page: Page) -> None:
    page.get_by_role("button", name="Open: Hibiscus").click()
    expect(page.locator("#adapters-facts")).to_contain_text("Hibiscus")


TABS = {
    "Subject": show_subject,
    "Train": show_train,
    "Create": show_create,
    "Adapters": show_adapters,
}


def photograph(url: str, out: Path) -> None:
    """Write ``out/TAB-WIDTH-THEME.png`` for all of them."""
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for width in WIDTHS_PX:
            for theme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 900})
                page.set_default_timeout(TIMEOUT_MS)
                page.goto(f"{url}/?__theme={theme}")
                for tab, show in TABS.items():
                    page.get_by_role("tab", name=tab).click()
                    show(page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(700)  # until messages and transitions are over
                    path = out / f"{tab.lower()}-{width}-{theme}.png"
                    page.screenshot(path=path, full_page=True)
                    print(path, flush=True)
                page.close()
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "screenshots")
    parser.add_argument("--steps", type=int, default=40, help="of the run on mini (default: 40)")
    parser.add_argument("--data-dir", type=Path, help="keep the app's data, or use what is there")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        with served((given.data_dir or Path(scratch)).resolve()) as url:
            fill(url, given.steps)
            photograph(url, given.out)


if __name__ == "__main__":
    main()
