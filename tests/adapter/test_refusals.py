"""What cannot be loaded or saved is refused with advice, and nothing is changed by the attempt."""

import copy
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from nora_diffusion.adapter import NoraConfig, header, iter_nora_layers
from nora_diffusion.adapter.components import restored
from nora_diffusion.adapter.files import (
    AdapterFileError,
    adapter_info,
    load_adapter,
    save_adapter,
)
from nora_diffusion.adapter.native import HEADER_KEY, VERSION_KEY
from tests.tiny import (
    adapt,
    predict,
    text_encoder_names,
    tiny_gpt2,
    tiny_pipeline,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe = tiny_pipeline()
    adapt(pipe)
    return save_adapter(pipe, folder / "a.safetensors", metadata={"base": "tiny"})


def rewrite(path: Path, out: Path, edit) -> Path:
    """Apply `edit(tensors, header)` to a file and write it as this project would."""
    contents = header.read(path)
    fields = json.loads(contents.metadata[HEADER_KEY])
    metadata = dict(contents.metadata)
    edit(contents.tensors, fields)
    metadata[HEADER_KEY] = json.dumps(fields)
    return header.write(out, contents.tensors, metadata)


def first(tensors: dict) -> str:
    return min(tensors)


def set_nan(tensors, _):
    tensors[first(tensors)][0, 0] = float("nan")


def set_infinity(tensors, _):
    tensors[first(tensors)][0, 0] = float("inf")


def drop_tensor(tensors, _):
    del tensors[first(tensors)]


def drop_module(tensors, fields):
    module = first(tensors).rpartition(".")[0]
    for side in "AB":
        del tensors[f"{module}.nora_inner_{side}"]


def foreign_tensor(tensors, _):
    tensors["unet.conv_in.weight"] = torch.zeros(2, 2)


def foreign_component(tensors, _):
    tensors["vae.decoder.nora_inner_A"] = torch.zeros(2, 8)


def wrong_shape(tensors, _):
    tensors[first(tensors)] = torch.zeros(3, 8)


def larger_rank(tensors, fields):
    fields["components"]["unet"]["config"]["r"] = 4


def integer_tensor(tensors, _):
    tensors[first(tensors)] = torch.zeros(2, 8, dtype=torch.int32)


def unknown_setting(_, fields):
    fields["components"]["unet"]["config"]["inner_rr"] = 2


def bad_setting(_, fields):
    fields["components"]["unet"]["config"]["dropout"] = 7


def unknown_module(tensors, fields):
    old = first(tensors).rpartition(".")[0]
    component, _, module = old.partition(".")
    prints = fields["components"][component]["fingerprints"]
    prints["no.such.module"] = prints.pop(module)
    for side in "AB":
        moved = tensors.pop(f"{old}.nora_inner_{side}")
        tensors[f"{component}.no.such.module.nora_inner_{side}"] = moved


def module_of_another_kind(tensors, fields):
    old = next(name for name in sorted(tensors) if name.startswith("unet")).rpartition(".")[0]
    prints = fields["components"]["unet"]["fingerprints"]
    prints["conv_norm_out"] = prints.pop(old.partition(".")[2])
    for side in "AB":
        tensors[f"unet.conv_norm_out.nora_inner_{side}"] = tensors.pop(f"{old}.nora_inner_{side}")


def second_text_encoder(tensors, fields):
    fields["components"]["text_encoder_2"] = fields["components"].pop("text_encoder")
    for name in list(tensors):
        if name.startswith("text_encoder."):
            tensors[name.replace("text_encoder.", "text_encoder_2.")] = tensors.pop(name)


EDITS = [
    (set_nan, "NaN"),
    (set_infinity, "NaN"),
    (drop_tensor, "missing"),
    (drop_module, "modules named in the header"),
    (foreign_tensor, "foreign tensor"),
    (foreign_component, "does not list"),
    (wrong_shape, "wrong shape"),
    (larger_rank, "wrong shape"),
    (integer_tensor, "integer"),
    (unknown_setting, "unknown field 'inner_rr'; upgrade"),
    (bad_setting, "dropout"),
    (unknown_module, "are not in this"),
    (module_of_another_kind, "GroupNorm"),
    (second_text_encoder, "'text_encoder_2', which this pipeline lacks"),
]


def state_of(pipe) -> dict:
    """Everything a load may touch."""
    state = {}
    for name in ("unet", *text_encoder_names(pipe)):
        model = getattr(pipe, name)
        state[name] = (
            [(n, type(m)) for n, m in model.named_modules()],
            [(n, p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()],
            copy.copy(getattr(model, "peft_config", None)),
            getattr(model, "_hf_peft_config_loaded", None),
            [(n, m.active_adapters) for n, m in iter_nora_layers(model)],
        )
    return state


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=lambda v: getattr(v, "__name__", None))
def test_unusable_content_is_refused_and_nothing_changes(saved, tmp_path, edit, message):
    path = rewrite(saved, tmp_path / "a.safetensors", edit)
    pipe = tiny_pipeline()
    before = state_of(pipe)
    with pytest.raises(AdapterFileError, match=message) as refusal:
        load_adapter(pipe, path)
    assert str(path) in str(refusal.value)
    assert state_of(pipe) == before


def test_a_failed_second_load_leaves_the_first_adapter_as_it_was(saved, tmp_path):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "good", weight=0.8)
    pipe.unet.requires_grad_(False)
    before, output = state_of(pipe), predict(pipe)
    path = rewrite(saved, tmp_path / "a.safetensors", unknown_module)
    with pytest.raises(AdapterFileError):
        load_adapter(pipe, path, "bad")
    assert state_of(pipe) == before
    assert torch.equal(predict(pipe), output)


def test_a_failure_in_the_middle_is_undone_in_every_model(saved):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "good")
    before, output = state_of(pipe), predict(pipe)
    with pytest.raises(KeyboardInterrupt), restored([pipe.unet, pipe.text_encoder], "bad"):
        pipe.unet.add_adapter(NoraConfig(r=4, inner_r=2, target_modules=["conv1"]), "bad")
        pipe.unet.set_adapters(["good", "bad"], [0.5, 1.0])
        raise KeyboardInterrupt
    assert {k: v[:2] for k, v in state_of(pipe).items()} == {k: v[:2] for k, v in before.items()}
    assert state_of(pipe)["unet"][2:] == before["unet"][2:]
    pipe.set_adapters("good", 1.0)
    assert torch.equal(predict(pipe), output)


def test_another_base_is_refused(saved):
    other = tiny_pipeline(seed=1)
    before = state_of(other)
    with pytest.raises(AdapterFileError, match="other weights here.*was trained on tiny"):
        load_adapter(other, saved)
    assert state_of(other) == before
    with pytest.raises(AdapterFileError, match="another shape|are not in this"):
        load_adapter(tiny_pipeline("sdxl"), saved)


def test_a_base_with_a_single_changed_weight_is_refused(saved):
    pipe = tiny_pipeline()
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    with pytest.raises(AdapterFileError, match="1 of .* modules have other weights"):
        load_adapter(pipe, saved)


def test_portable_file_on_a_base_of_another_width_is_refused(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = save_adapter(pipe, tmp_path / "a.safetensors", portable=True)
    with pytest.raises(AdapterFileError, match="another shape"):
        load_adapter(tiny_pipeline("sd2"), path)


def test_a_newer_format_is_refused_with_advice(saved, tmp_path):
    contents = header.read(saved)
    path = header.write(
        tmp_path / "a.safetensors", contents.tensors, {**contents.metadata, VERSION_KEY: "2"}
    )
    for use in (adapter_info, lambda path: load_adapter(tiny_pipeline(), path)):
        with pytest.raises(AdapterFileError, match="format 2.*reads up to 1.*pip install -U"):
            use(path)


def test_files_that_are_no_adapters_are_refused(tmp_path):
    pipe = tiny_pipeline()
    empty, text = tmp_path / "empty.safetensors", tmp_path / "text.safetensors"
    empty.write_bytes(b"")
    text.write_text("not a safetensors file at all")
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    pickled, plain = tmp_path / "weights.bin", tmp_path / "plain.safetensors"
    torch.save({"a": torch.zeros(2)}, pickled)
    save_file({"weight": torch.zeros(2, 2)}, plain)
    for path, message in (
        (tmp_path / "missing.safetensors", "no such file"),
        (empty, "too few"),
        (text, "not safetensors"),
        (huge, "not safetensors"),
        (pickled, "pickle.*safetensors"),
        (plain, "neither a native adapter nor a LoRA"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            load_adapter(pipe, path)
    with pytest.raises(AdapterFileError, match="not written by nora-diffusion"):
        adapter_info(plain)


def test_a_peft_folder_is_sent_to_peft(tmp_path):
    model = get_peft_model(tiny_gpt2(), NoraConfig(r=4, inner_r=2, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"PeftModel\.from_pretrained"):
        load_adapter(tiny_gpt2(), tmp_path)
    assert isinstance(PeftModel.from_pretrained(tiny_gpt2(), tmp_path), PeftModel)


def test_names_and_arguments_are_checked(saved, tmp_path):
    pipe = tiny_pipeline()
    load_adapter(pipe, saved, "mine")
    with pytest.raises(ValueError, match="'mine' is in use.*adapter_name"):
        load_adapter(pipe, saved, "mine")
    with pytest.raises(ValueError, match="'yours'; adapters here: mine"):
        save_adapter(pipe, tmp_path / "a.safetensors", "yours")
    with pytest.raises(ValueError, match="dtype=torch.int8"):
        save_adapter(pipe, tmp_path / "a.safetensors", "mine", dtype=torch.int8)
    with pytest.raises(TypeError, match="diffusers pipeline"):
        load_adapter({"unet": pipe.unet}, saved)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": "1"}, TypeError, "weight='1'"),
        ({"weight": None}, TypeError, "weight=None"),
        ({"weight": float("nan")}, ValueError, "weight=nan.*finite"),
        ({"weight": float("-inf")}, ValueError, "weight=-inf.*finite"),
        ({"adapter_name": "a.b"}, ValueError, "adapter_name='a.b'.*dot"),
        ({"adapter_name": ""}, ValueError, "adapter_name=''.*empty"),
        ({"adapter_name": None}, TypeError, "adapter_name=None"),
    ],
)
def test_names_and_weights_that_cannot_be_are_refused(saved, arguments, error, message):
    with pytest.raises(error, match=message):
        load_adapter(tiny_pipeline(), saved, **arguments)


def test_a_load_switches_disabled_adapters_on_again_and_a_failed_one_does_not(saved, tmp_path):
    pipe, both = tiny_pipeline(), tiny_pipeline()
    base = predict(pipe)
    load_adapter(pipe, saved, "one")
    pipe.disable_lora()
    assert torch.equal(predict(pipe), base)
    with pytest.raises(AdapterFileError):
        load_adapter(pipe, rewrite(saved, tmp_path / "a.safetensors", unknown_module), "bad")
    assert torch.equal(predict(pipe), base)
    assert all(layer.disable_adapters for _, layer in iter_nora_layers(pipe.unet))
    load_adapter(pipe, saved, "two")
    for name in ("one", "two"):
        load_adapter(both, saved, name)
    assert torch.equal(predict(pipe), predict(both))
    assert not torch.equal(predict(pipe), base)


def test_a_lora_in_eight_bit_floats_is_not_called_damaged(tmp_path):
    key = "unet.mid_block.attentions.0.proj_in.lora_{}.weight"
    tensors = {key.format(side): torch.zeros(4, 4).to(torch.float8_e4m3fn) for side in "AB"}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="is in F8_E4M3, .*convert.*float16") as refusal:
        load_adapter(tiny_pipeline(), tmp_path / "a.safetensors")
    assert "damaged" not in str(refusal.value)


def test_nan_is_not_saved(tmp_path):
    pipe = tiny_pipeline()
    adapt(pipe)
    _, layer = next(iter_nora_layers(pipe.unet))
    layer.nora_inner_A["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(pipe, tmp_path / "a.safetensors")
    layer.nora_inner_A["default"].data[0, 0] = 1e6
    with pytest.raises(ValueError, match="in torch.float16.*dtype=torch.float32"):
        save_adapter(pipe, tmp_path / "a.safetensors", dtype=torch.float16)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_an_interrupted_write_leaves_the_old_file(saved, tmp_path, monkeypatch):
    pipe = tiny_pipeline()
    adapt(pipe)
    path = tmp_path / "a.safetensors"
    path.write_bytes(saved.read_bytes())

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(pipe, path)
    assert path.read_bytes() == saved.read_bytes()
    assert list(tmp_path.glob(".*")) == []
