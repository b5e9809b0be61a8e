"""A damaged file is refused: it never loads as something else, and never ends the process."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.adapter import header as container
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.lora import export_lora
from nora_diffusion.adapter.native import parse_header, parse_native
from tests.tiny import train

MUTATIONS = {"compact": 2000, "portable": 500, "lora": 500}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")


def make_file(folder: Path, kind: str) -> Path:
    trained = get_peft_model(model(), NoraConfig(r=3, inner_r=2, target_modules=["0", "2"]))
    train(trained)
    metadata = {"base": "tiny", "trigger": "sks", "steps": 30}
    path = save_adapter(trained, folder / "a.safetensors", portable=kind == "portable",
                        dtype=torch.float16, metadata=metadata)  # fmt: skip
    if kind == "lora":
        path = export_lora(path, folder / "adapter_model.safetensors", "peft", base=model())
    return path


def flip_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_header_bit(data: bytearray, rng: random.Random) -> None:
    (length,) = struct.unpack("<Q", data[:8])
    data[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def append(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.randint(1, 64))


def remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 32)]


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randint(1, 64)]


def swap_tensors(data: bytearray, rng: random.Random) -> None:
    """Exchange where two tensors of one size lie: a valid file with other content."""

    def edit(table: dict) -> None:
        names = sorted(name for name in table if name != "__metadata__")
        one = rng.choice(names)
        two = rng.choice([n for n in names if table[n]["shape"] == table[one]["shape"]])
        offsets = table[one]["data_offsets"], table[two]["data_offsets"]
        table[two]["data_offsets"], table[one]["data_offsets"] = offsets

    edit_header(data, edit)


def edit_entry(data: bytearray, rng: random.Random) -> None:
    """Rename, drop, retype, reshape or move a tensor in the header."""

    def edit(table: dict) -> None:
        name = rng.choice(sorted(name for name in table if name != "__metadata__"))
        match rng.randrange(5):
            case 0:
                table[name + "x"] = table.pop(name)
            case 1:
                del table[name]
            case 2:
                table[name]["dtype"] = rng.choice(["F32", "BF16", "I16", "U16", "F4", "C64", "?"])
            case 3:
                table[name]["shape"] = rng.choice([[], [0], [-1], [2**63], [3, 2], [6], ["a"]])
            case _:
                table[name]["data_offsets"] = [rng.randrange(99), rng.randrange(99)]

    edit_header(data, edit)


def edit_metadata(data: bytearray, rng: random.Random) -> None:
    """Change, drop or add a metadata entry, or a value inside the project's own header."""

    def edit(table: dict) -> None:
        metadata = table["__metadata__"]
        key = rng.choice(sorted(k for k in metadata if k.startswith("nora.")))
        match rng.randrange(4):
            case 0:
                metadata[key] = rng.choice(["", "0", "2", "-1", "null", "{}", "[]", "1e999", "²"])
            case 1:
                del metadata[key]
            case 2:
                metadata[f"nora.{rng.randrange(10)}"] = "1"
            case _:
                fields = json.loads(metadata["nora.header"])
                fields[rng.choice(sorted(fields))] = rng.choice([None, 1, "x", [], {}, True])
                metadata["nora.header"] = json.dumps(fields)

    edit_header(data, edit)


def edit_header(data: bytearray, edit) -> None:
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(bytes(data[8 : 8 + length]))
    edit(table)
    text = json.dumps(table).encode()
    data[: 8 + length] = struct.pack("<Q", len(text)) + text


EDITS = [
    flip_bit, flip_header_bit, overwrite, truncate, append, remove, repeat,
    swap_tensors, edit_entry, edit_metadata,
]  # fmt: skip


def content(path: Path) -> tuple:
    """All that a load takes from a file: its project metadata, and its tensors to the bit."""
    contents = container.read(path)
    fields = parse_header(path, contents.metadata)
    if fields is None:
        raise AdapterFileError("taken for another program's file")
    if fields.get("kind") == "native":
        parse_native(path, contents, fields)
    tensors = {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist())
        for name, tensor in contents.tensors.items()
    }
    return fields, tensors


@pytest.mark.parametrize("kind", MUTATIONS)
def test_no_mutation_loads_as_something_else(tmp_path, kind):
    path = make_file(tmp_path, kind)
    original, expected = path.read_bytes(), content(path)
    rng = random.Random(kind)
    mutant = tmp_path / "mutant.safetensors"
    refused, unchanged = 0, 0
    for index in range(MUTATIONS[kind]):
        data = bytearray(original)
        EDITS[index % len(EDITS)](data, rng)
        mutant.write_bytes(data)
        try:
            found = content(mutant)
        except AdapterFileError as error:
            refused += 1
            # Which file, and what to do about it.
            assert str(mutant) in str(error) or "another program" in str(error)
        else:
            # Harmless edits remain: a swap of a tensor with itself, another spelling in JSON.
            assert found == expected, (index, EDITS[index % len(EDITS)].__name__)
            unchanged += 1
    assert refused > 0.85 * MUTATIONS[kind]
    assert refused + unchanged == MUTATIONS[kind]


@pytest.mark.parametrize("kind", ["compact", "lora"])
def test_every_single_bit_flip_is_noticed(tmp_path, kind):
    path = make_file(tmp_path, kind)
    original, expected = path.read_bytes(), content(path)
    mutant = tmp_path / "mutant.safetensors"
    rng = random.Random(0)
    for position in range(len(original)):
        data = bytearray(original)
        data[position] ^= 1 << rng.randrange(8)
        mutant.write_bytes(data)
        try:
            found = content(mutant)
        except AdapterFileError:
            continue
        # In a LoRA file, entries that only other programs read (titles, tags) are not covered.
        assert kind == "lora" and found == expected, position


def test_a_mutant_never_changes_a_model(tmp_path):
    path = make_file(tmp_path, "compact")
    original, expected = path.read_bytes(), content(path)
    x = torch.linspace(-1, 1, 6)[None]
    target = model()
    before, modules = target(x), list(target.named_modules())
    rng = random.Random(1)
    mutant = tmp_path / "mutant.safetensors"
    for index in range(200):
        data = bytearray(original)
        EDITS[index % len(EDITS)](data, rng)
        mutant.write_bytes(data)
        try:
            assert content(mutant) == expected
            continue  # harmless
        except AdapterFileError:
            pass
        for use in (adapter_info, lambda path: load_adapter(target, path)):
            with pytest.raises(AdapterFileError):
                use(mutant)
    assert list(target.named_modules()) == modules
    assert torch.equal(target(x), before)
    assert load_adapter(target, path) == 2
    assert len(list(iter_nora_layers(target))) == 2 and not torch.equal(target(x), before)


def edited_values(rng: random.Random, value):
    """Replace one leaf somewhere in a JSON value."""
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return {**value, key: edited_values(rng, value[key])}
    if isinstance(value, list) and value:
        index = rng.randrange(len(value))
        return [*value[:index], edited_values(rng, value[index]), *value[index + 1 :]]
    junk = [None, True, -1, 0, 1, 2**70, 0.5, "", "a" * 99, "[", [], {}, [[]], {"alpha": "x"}]
    return rng.choice(junk)


def test_a_header_with_a_valid_checksum_and_senseless_values_is_no_crash(tmp_path):
    """The checksum keeps accidents out; this is a file that somebody wrote."""
    path = make_file(tmp_path, "portable")
    contents = container.read(path)
    rng = random.Random(2)
    x = torch.linspace(-1, 1, 6)[None]
    for _ in range(300):
        fields = edited_values(rng, json.loads(contents.metadata["nora.header"]))
        metadata = {**contents.metadata, "nora.header": json.dumps(fields)}
        mutant = container.write(tmp_path / "mutant.safetensors", contents.tensors, metadata)
        target = model()
        before = target(x)
        try:
            assert load_adapter(target, mutant) == 2
        except AdapterFileError:
            assert torch.equal(target(x), before)
            assert not list(iter_nora_layers(target))
