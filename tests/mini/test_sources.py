"""Held-out emoji stay out of every training list."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nora_diffusion.mini.__main__ import SHIPPED
from nora_diffusion.mini.sources import (
    Concept,
    concept_lists,
    fetch,
    is_held_out,
    rgba,
    write_manifest,
)
from nora_diffusion.mini.subjects import SUBJECTS


def test_no_held_out_emoji_is_in_the_classes():
    lists = concept_lists()
    trained = [name for names in lists["classes"].values() for name in names]
    assert len(trained) > 100
    assert not [name for name in trained if is_held_out(name)]


def test_variants_and_skin_tones_are_held_out_too():
    assert is_held_out("person surfing: dark skin tone")
    assert is_held_out("woman surfing: light skin tone")
    assert not is_held_out("person swimming: dark skin tone")
    assert not is_held_out("dog")


def test_forty_emoji_are_held_out_and_every_class_word_is_one_that_mini_knows():
    lists = concept_lists()
    assert len(lists["held_out"]) >= 40
    assert set(lists["held_out"].values()) <= set(lists["classes"])
    assert set(SUBJECTS) <= set(lists["held_out"])


def test_every_spoken_name_belongs_to_a_trained_emoji():
    lists = concept_lists()
    trained = {name for names in lists["classes"].values() for name in names}
    assert set(lists["spoken"]) <= trained


@pytest.mark.parametrize("folder", SHIPPED.values(), ids=lambda folder: folder.name)
def test_shipped_manifests_name_no_held_out_emoji(folder: Path):
    manifests = sorted((folder / "manifests").glob("*.txt"))
    assert [m.stem for m in manifests] == ["autoencoder", "denoiser"]
    for manifest in manifests:
        names = manifest.read_text(encoding="utf-8").splitlines()
        assert len(names) > 50
        assert not [name for name in names if is_held_out(name)]


def test_a_manifest_lists_what_was_seen(tmp_path: Path):
    seen = [Concept("dog", "dog", "dog", tmp_path), Concept("cat", "cat", "cat", tmp_path)]
    write_manifest(seen, tmp_path / "m" / "list.txt")
    assert (tmp_path / "m" / "list.txt").read_text(encoding="utf-8") == "dog\ncat\n"


def test_transparent_pixels_do_not_bleed_into_the_edge(tmp_path: Path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255  # red everywhere, visible only on the left
    pixels[:, :4, 1] = 200
    pixels[:, :4, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    small = rgba(tmp_path / "half.png", 2)
    assert small.shape == (4, 2, 2)
    assert small[:, :, 1] == pytest.approx(0)
    assert small[1, 0, 0] == pytest.approx(200 / 255, abs=1e-6)


def test_a_package_that_two_want_at_once_is_fetched_once(tmp_path, monkeypatch):
    npm = tmp_path / "bin/npm"  # what `npm pack` does, slowly
    npm.parent.mkdir()
    npm.write_text(
        f"""#!/bin/sh
echo "$4" >> {tmp_path}/fetched
mkdir -p {tmp_path}/package
echo "{{}}" > {tmp_path}/package/data-by-emoji.json
sleep 0.3
tar -czf "$3/a.tgz" -C {tmp_path} package
"""
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: fetch("unicode-emoji-json", tmp_path / "work"), range(3)))
    assert {(folder / "data-by-emoji.json").read_text() for folder in folders} == {"{}\n"}
    assert (tmp_path / "fetched").read_text() == "unicode-emoji-json@0.9.0\n"
