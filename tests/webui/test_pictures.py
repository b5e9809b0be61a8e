"""The gallery, and what a PNG from anybody may say."""

from __future__ import annotations

import json
import shutil
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nora_diffusion.config import UserError
from webui.paths import new_id
from webui.pictures import read_settings
from webui.protocol import SETTINGS_KEY

GOOD = {
    "prompt": "a sks flower",
    "negative_prompt": "",
    "seed": 5,
    "steps": 25,
    "guidance": 3.0,
    "width": 64,
    "height": 64,
    "base": "mini",
    "adapters": [{"id": "0123456789abcdef", "name": "Hibiscus", "weight": 1.0, "checksum": "ff"}],
}


def png(path, text, compressed=False, size=(8, 8)):
    info = PngInfo()
    if text is not None:
        info.add_text(SETTINGS_KEY, text, zip=compressed)
    Image.new("RGB", size, "red").save(path, pnginfo=info)
    return path


def drawn(studio, owner, settings=GOOD):
    path = png(studio.folder.of("pictures", new_id(), ".png"), json.dumps(settings))
    return studio.pictures.add(owner, path, settings)


def test_newest_first_and_each_sees_their_own(studio):
    made = [drawn(studio, owner) for owner in ("ann", "bob", "ann", "ann")]
    ours = [made[3].id, made[2].id, made[0].id]
    assert [one.id for one in studio.pictures.all("ann")] == ours
    assert [one.id for one in studio.pictures.all("ann", limit=2)] == ours[:2]
    assert studio.pictures.get("bob", made[1].id).settings == GOOD
    for act in (studio.pictures.get, studio.pictures.delete):
        with pytest.raises(UserError, match="no such picture"):
            act("bob", made[0].id)
        with pytest.raises(UserError, match="no such picture"):
            act("bob", "../../nora.sqlite3")
    assert len(studio.pictures.all("ann")) == 3


def test_deleted_is_gone_with_the_copies_that_pages_were_shown(studio):
    picture = drawn(studio, "")
    copy = studio.folder.part("uploads") / "abc" / "shown.png"
    copy.parent.mkdir()
    shutil.copy(picture.path, copy)
    studio.pictures.delete("", picture.id)
    assert not picture.path.exists() and not copy.exists()
    assert studio.pictures.all("") == []
    assert picture.id.encode() not in studio.folder.database.read_bytes()


def test_a_picture_whose_file_is_gone_is_left_out_and_files_of_nobody_are_removed(studio):
    kept, lost = drawn(studio, ""), drawn(studio, "")
    lost.path.unlink()
    orphan = png(studio.folder.of("pictures", new_id(), ".png"), None)
    assert [one.id for one in studio.pictures.all("")] == [kept.id]
    studio.pictures.tidy()
    assert kept.path.exists() and not orphan.exists()
    studio.pictures.delete("", lost.id)


def test_settings_come_back(tmp_path):
    found = read_settings(png(tmp_path / "a.png", json.dumps(GOOD | {"more": [1, 2]})))
    assert found.model_dump().keys() == GOOD.keys()
    assert found.adapters[0].id == "0123456789abcdef" and found.seed == 5
    assert read_settings(png(tmp_path / "b.png", json.dumps(GOOD), compressed=True)) == found


def changed(**values):
    return json.dumps(GOOD | values)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        "[" * 50_000,
        '{"prompt": ' * 5_000,
        json.dumps({"prompt": "a"}),
        changed(prompt=["a"]),
        changed(prompt="a" * 5_000),
        changed(prompt="a" * 100_000),
        changed(seed="5"),
        changed(seed=2**80),
        changed(seed=1.5),
        changed(seed=True),
        changed(steps=0),
        changed(steps=10**9),
        changed(guidance="inf"),
        changed().replace("3.0", "NaN"),
        changed().replace("3.0", "1e999"),
        changed(width=10**6),
        changed(height=-64),
        changed(base={"path": "/etc/passwd"}),
        changed(base="x" * 300),
        changed(adapters="../../x"),
        changed(adapters=GOOD["adapters"] * 5),
        changed(adapters=[{"id": "../../../etc/passwd", "weight": 1.0}]),
        changed(adapters=[{"id": "/etc/passwd", "weight": 1.0}]),
        changed(adapters=[{"id": "0123456789abcdef\n", "weight": 1.0}]),
        changed(adapters=[{"id": "0123456789abcdef", "weight": 1e6}]),
        changed(adapters=[{"id": "0123456789abcdef", "weight": None}]),
        changed(adapters=[{"id": 1, "weight": 1.0}]),
    ],
    ids=range(32),
)
def test_hostile_settings_are_a_message(tmp_path, text):
    with pytest.raises(UserError, match="settings"):
        read_settings(png(tmp_path / "a.png", text))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height):
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )


BOMB = SETTINGS_KEY.encode() + b"\0\0" + zlib.compress(b"a" * 50_000_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"\xff\xd8\xff\xe0 a JPEG",
        header(8, 8),
        header(8, 8)[:20],
        header(100_000, 100_000) + chunk(b"IDAT", b""),
        header(15_000, 7_000) + chunk(b"IDAT", b""),
        header(8, 8) + chunk(b"zTXt", BOMB) + chunk(b"IDAT", b""),
        header(8, 8) + struct.pack(">I", 2**31 - 1) + b"tEXt" + b"x" * 100,
        header(8, 8) + chunk(b"tEXt", SETTINGS_KEY.encode() + b"\0\xff\xfe") + chunk(b"IDAT", b""),
    ],
    ids=range(10),
)
def test_hostile_files_are_a_message(tmp_path, data):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match="settings"):
        read_settings(path)
