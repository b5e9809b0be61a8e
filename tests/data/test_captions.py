"""Captions in the files that other trainers' users have."""

import json

import pytest
from PIL import Image

from nora_diffusion.config import UserError
from nora_diffusion.data.images import read_photos


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.jpg", "c.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def captions(folder) -> list[str | None]:
    photos, skipped = read_photos(folder)
    assert skipped == []
    return [photo.caption for photo in photos]


FILES = {
    "NAME.txt": {"a.txt": " one\n two", "b.txt": "three"},
    "NAME.caption": {"a.caption": "one two", "b.caption": "three"},
    "NAME.json": {"a.json": '{"caption": "one two"}', "b.json": '{"text": "three"}'},
    "json text": {"a.json": '"one two"', "b.json": '{"prompt": "three"}'},
    "imagefolder jsonl": {
        "metadata.jsonl": '{"file_name": "a.png", "text": "one two"}\n\n'
        '{"file_name": "b.jpg", "prompt": "three"}\n'
    },
    "imagefolder csv": {"metadata.csv": 'file_name,text\na.png,"one two"\nb.jpg,three\n'},
    "captions.json": {"captions.json": '{"a.png": "one two", "b.jpg": {"caption": "three"}}'},
    "sd-scripts": {"captions.json": '{"/old/place/a": {"caption": "one two"}, "b": "three"}'},
    "list": {
        "captions.json": '[{"file_name": "a.png", "caption": "one two"}, '
        '{"file_name": "b.jpg", "caption": "three"}]'
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_captions(folder, kind):
    for name, text in FILES[kind].items():
        (folder / name).write_text(text, encoding="utf-8")
    assert captions(folder) == ["one two", "three", None]


def test_a_photos_own_file_goes_before_tables_and_txt_before_json(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.png,table\nb.jpg,table\nc.png,table\n")
    (folder / "captions.json").write_text('{"c.png": "lowest"}')
    (folder / "a.json").write_text('{"caption": "json"}')
    (folder / "a.txt").write_text("txt")
    (folder / "b.json").write_text('{"caption": "json"}')
    assert [photo.caption for photo in read_photos(folder)[0]] == ["txt", "json", "table"]


def test_json_that_is_no_caption_is_left_alone_and_listed(folder):
    (folder / "a.json").write_text(json.dumps({"title": "IMG_1", "geoData": {}}))
    photos, skipped = read_photos(folder)
    assert photos[0].caption is None
    assert [skip.path.name for skip in skipped] == ["a.json"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", r"captions in .*a\.json: not JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{', r"jsonl, line 2: not JSON"),
        ("metadata.jsonl", '{"image": "a.png", "text": "x"}', "row 1: must have a file_name"),
        ("metadata.csv", "file_name,width\na.png,3\n", "row 1: .* one of caption, text, prompt"),
        ("captions.json", '"x"', "must be .*photo.jpg"),
    ],
)
def test_broken_files_are_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_photos(folder)
