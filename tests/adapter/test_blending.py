"""Several adapters at once: their effects add up, in the weights or beside them, and go again."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from nora_diffusion import export_lora, load_adapter, save_adapter
from nora_diffusion.adapter.blending import fold, remove_adapter, set_weights
from tests.tiny import adapt, base_bytes, distance, predict, tiny_pipeline

TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two native adapters of everything, and the second as a LoRA."""
    folder = tmp_path_factory.mktemp("blending")
    found = {}
    for seed, name in enumerate(("one", "two")):
        pipe = tiny_pipeline("sd15")
        adapt(pipe, seed=seed, everything=True)
        found[name] = save_adapter(pipe, folder / f"{name}.safetensors")
    base = tiny_pipeline("sd15")
    found["lora"] = export_lora(found["two"], folder / "lora.safetensors", "kohya", base=base)
    return found


def loaded(files, *names):
    pipe = tiny_pipeline("sd15")
    for name in names:
        load_adapter(pipe, files[name], name)
    return pipe


def test_a_blend_is_the_sum_of_its_parts_in_the_weights_too(files):
    pipe = loaded(files, "one", "two")
    for weights in ({}, {"one": 1.0}, {"two": -0.5}, {"one": 0.7, "two": 0.4}, {"one": 0.0}):
        set_weights(pipe, weights)
        beside = predict(pipe)
        undo = fold(pipe, weights)
        assert undo is not None
        inside = predict(pipe)
        undo()
        assert distance(inside, beside) < TOLERANCE
    assert distance(beside, predict(tiny_pipeline("sd15"))) == 0


def test_parts_change_the_answer_each_in_its_own_way(files):
    pipe = loaded(files, "one", "two")
    answers = []
    for weights in ({}, {"one": 1.0}, {"two": 1.0}, {"one": 1.0, "two": 1.0}):
        set_weights(pipe, weights)
        answers.append(predict(pipe))
    for index, answer in enumerate(answers):
        assert all(distance(answer, other) > 0.01 for other in answers[:index])


def test_what_is_undone_is_as_before_to_the_last_bit(files):
    pipe = loaded(files, "one", "lora")
    before = {name: base_bytes(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    undo = fold(pipe, {"one": 1.0, "lora": 1.0})
    assert undo is not None
    assert base_bytes(pipe.unet) != before["unet"]
    undo()
    assert {name: base_bytes(getattr(pipe, name)) for name in before} == before


@pytest.mark.parametrize("order", [("one", "lora"), ("lora", "one"), ("lora", "one", "two")])
def test_kinds_can_be_mixed_in_any_order(files, order):
    plain = loaded(files, "one", "two")
    set_weights(plain, {"one": 0.8, "two": 0.5})
    pipe = loaded(files, *order)
    weights = {"one": 0.8, "lora": 0.5}
    set_weights(pipe, weights)
    assert distance(predict(pipe), predict(plain)) < TOLERANCE
    assert fold(pipe, weights) is not None
    assert distance(predict(pipe), predict(plain)) < TOLERANCE


def test_what_depends_on_the_timestep_stays_beside_the_weights(tmp_path):
    pipe = tiny_pipeline("sd15")
    adapt(pipe, text_encoders=False, timestep_rank=1.0)
    file = save_adapter(pipe, tmp_path / "timed.safetensors")
    pipe = tiny_pipeline("sd15")
    load_adapter(pipe, file, "timed")
    expected = predict(pipe)
    assert fold(pipe, {"timed": 1.0}) is None
    assert distance(predict(pipe), expected) == 0


def test_a_removed_adapter_leaves_nothing_and_the_others_as_they_were(files):
    pipe = loaded(files, "one", "lora", "two")
    set_weights(pipe, {"two": 1.0})
    expected = predict(pipe)
    for name in ("one", "lora"):
        remove_adapter(pipe, name)
    assert distance(predict(pipe), expected) < TOLERANCE
    remove_adapter(pipe, "two")
    layers = [m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer)]
    assert layers == [] and not pipe.unet.peft_config
    fresh = tiny_pipeline("sd15")
    assert torch.equal(predict(pipe), predict(fresh))
    assert [n for n, _ in pipe.unet.named_parameters()] == [
        n for n, _ in fresh.unet.named_parameters()
    ]
    load_adapter(pipe, files["one"], "one")
    load_adapter(fresh, files["one"], "one")
    assert torch.equal(predict(pipe), predict(fresh))
