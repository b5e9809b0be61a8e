"""The report on a folder of photos."""

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from nora_diffusion.data.images import read_photos
from nora_diffusion.data.survey import near_duplicates, survey


def scene(seed: int, size=(320, 240)) -> Image.Image:
    draw_in = Image.new("RGB", size, tuple(np.random.default_rng(seed).integers(0, 255, 3)))
    draw = ImageDraw.Draw(draw_in)
    for x, y, r, *colour in np.random.default_rng(seed + 1).integers(0, 255, (12, 6)):
        draw.ellipse((x - r // 3, y - r // 3, x + r // 3, y + r // 3), fill=tuple(colour))
    return draw_in


def test_what_is_cut_off_enlarged_skipped_and_there_is_told(tmp_path):
    scene(1, (640, 320)).save(tmp_path / "wide.png")
    scene(2, (64, 64)).save(tmp_path / "small.png")
    scene(3, (512, 512)).save(tmp_path / "whole.png")
    (tmp_path / "wide.txt").write_text("a caption")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    photos, skipped = read_photos(tmp_path)
    lines = survey(photos, skipped, "photos", targets=[(256, 256)] * 3, captions=False)
    assert lines == [
        "3 photos in photos, 1 caption (not used: data.captions = false)",
        "  small.png: enlarged 4.0 times (it has 64 x 64 px) for 256 x 256",
        "  wide.png: 50% cut off for 256 x 256",
        "1 other file skipped:",
        "  Thumbs.db: not an image",
    ]
    lines = survey(photos, [], "photos", targets=[(256, 256), (256, 256), (320, 160)])
    assert "  buckets: 2 of 256 x 256, 1 of 320 x 160" in lines
    assert not any("cut off" in line for line in lines)
    assert survey(photos, [], "photos") == ["3 photos in photos, 1 caption"]


def test_copies_are_found_and_other_scenes_are_not(tmp_path):
    for seed in range(12):
        scene(10 * seed).save(tmp_path / f"{seed:02d}.png")
    scene(30).resize((160, 120)).save(tmp_path / "x-smaller.png")
    scene(30).save(tmp_path / "y-compressed.jpg", quality=30)
    ImageEnhance.Brightness(scene(30)).enhance(0.8).save(tmp_path / "z-darker.png")
    pairs = near_duplicates(read_photos(tmp_path)[0])
    names = ["03.png", "x-smaller.png", "y-compressed.jpg", "z-darker.png"]
    assert pairs == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
