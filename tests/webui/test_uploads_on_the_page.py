"""What a person reads in Chromium after dropping files that are no photos, or odd ones."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from tests.webui.browser import chromium
from tests.webui.conftest import SAMPLES
from tests.webui.server import Server
from tests.webui.test_picture_safety import png

WHOLE = "give a whole JPEG, PNG, WebP or HEIC file"
MESSAGES = {
    "notes.jpg": f"notes.jpg cannot be used: not an image; {WHOLE}",
    "empty.jpg": rf"empty.jpg cannot be used: empty \(0 bytes\); {WHOLE}",
    "bomb.png": r"bomb.png cannot be used: .*million pixels",
    "broken.heic": r"broken.heic cannot be used: ",
    "moving.gif": f"moving.gif cannot be used: it is a GIF file; {WHOLE}",
}


def bad_files(folder: Path) -> list[Path]:
    (folder / "notes.jpg").write_text("no photo")
    (folder / "empty.jpg").touch()
    (folder / "bomb.png").write_bytes(png(20_000, 20_000))
    kind = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"
    (folder / "broken.heic").write_bytes(kind + b"\0\0\1\0meta" + bytes(300))
    frames(folder / "moving.gif")
    return [folder / name for name in MESSAGES]


def frames(path: Path) -> Path:
    """The sample photos as a moving picture."""
    first, *others = [Image.open(photo) for photo in SAMPLES]
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


def turned(path: Path) -> Path:
    """A photo as a phone writes it that was held upright: wide, with a note to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(SAMPLES[1]).resize((320, 240)).save(path, exif=exif)
    return path


def test_each_message_is_shown_and_odd_photos_are_taken(tmp_path):
    from playwright.sync_api import expect

    with Server(tmp_path / "data") as server, chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("I have the right to use").check()
        chosen = page.locator("#subject-files input[type=file]")
        chosen.set_input_files(bad_files(tmp_path))
        told = page.locator("#subject-checks .n-unusable")
        expect(told).to_have_count(len(MESSAGES))
        for message, shown in zip(MESSAGES.values(), told.all_inner_texts(), strict=True):
            assert re.match(message, " ".join(shown.split())), shown
        expect(page.locator("#subject-checks")).to_contain_text("No photos yet")

        chosen.set_input_files([*SAMPLES * 5])
        expect(
            page.get_by_text("that would be 25 photos; a subject has at most 20")
        ).to_be_visible()
        expect(page.locator("#subject-checks")).to_contain_text("No photos yet")

        moving, upright = frames(tmp_path / "moving.webp"), turned(tmp_path / "upright.jpg")
        page.locator("#subject-files").get_by_label("Clear").click()
        chosen.set_input_files([moving, upright])
        photos = page.locator("#subject-checks .n-photo")
        expect(photos).to_have_count(2)
        expect(photos.filter(has_text="moving.webp")).to_contain_text("256 × 256 px")
        expect(photos.filter(has_text="upright.jpg")).to_contain_text("240 × 320 px")
