"""Image instructions in three spellings, and what is wrong with those that cannot be used."""

import json

import pytest
from PIL import Image

from nora_diffusion.data.image_instructions import read_records
from nora_diffusion.settings import UserError


@pytest.fixture
def folder(tmp_path):
    Image.new("RGBA", (8, 6), (255, 0, 0, 128)).save(tmp_path / "a.png")
    return tmp_path


def test_three_spellings_say_the_same(folder):
    asked, answered = "What is it?", "a dog"
    entries = [
        {"image": "a.png", "instruction": asked, "input": "", "output": answered},
        {"image": "a.png", "messages": [{"role": "user", "content": asked},
                                        {"role": "assistant", "content": answered}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": f"<image>\n{asked}"},
                                             {"from": "gpt", "value": answered}]},
    ]  # fmt: skip
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)))
    for name in ("list.json", "lines.jsonl"):
        records = read_records(folder / name)
        assert {r.turns for r in records} == {(("user", asked), ("assistant", answered))}
    message = records[0].messages()[0]
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][0]["image"].mode == "RGB"
    assert len(records[0].messages(1)) == 1
    assert records[0].answer == answered


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"instruction": "q", "output": "a"}, "image: missing"),
        ({"image": "b.png", "instruction": "q", "output": "a"}, "no such file"),
        ({"image": "a.png", "instruction": "q"}, "output: missing"),
        ({"image": "a.png", "messages": "q"}, "messages: no list"),
        ({"image": "a.png", "messages": [{"role": "user", "content": "q"}]}, "found user"),
        ({"image": "a.png", "messages": [{"role": "tool", "content": "q"}]}, r"found \?"),
    ],
)
def test_what_is_wrong_is_said_with_its_number(folder, entry, said):
    good = {"image": "a.png", "instruction": "q", "output": "a"}
    (folder / "d.json").write_text(json.dumps([good, entry]))
    with pytest.raises(UserError, match=f"record 2: .*{said}"):
        read_records(folder / "d.json")


def test_files_that_are_no_json_are_refused(folder):
    for text, said in (("{", "not valid JSON"), ("", "no examples"), ('["a"]', "not an object")):
        (folder / "d.json").write_text(text)
        with pytest.raises(UserError, match=said):
            read_records(folder / "d.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_records(folder / "missing.json")


def test_images_may_be_elsewhere(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("records")
    (other / "d.json").write_text(
        json.dumps([{"image": "a.png", "instruction": "q", "output": "a"}])
    )
    assert read_records(other / "d.json", folder)[0].image == folder / "a.png"
    with pytest.raises(UserError, match="no such file"):
        read_records(other / "d.json")
