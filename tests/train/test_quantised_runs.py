"""Runs on a quantised base, and what the plan says of their memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from nora_diffusion.config import UserError, load_run
from nora_diffusion.families import load_family, quantise
from nora_diffusion.sampling import load_adapted
from nora_diffusion.train import adapters, common, dreambooth
from nora_diffusion.train.memory import part_bytes, plan_memory
from nora_diffusion.train.prepare import check_offload, prepare
from nora_diffusion.train.report import Report
from tests.families.test_quantise import held_bytes
from tests.train.test_memory import peak_of


@pytest.fixture
def int8():
    pytest.importorskip("torchao")
    return {"quantize": "int8"}


def losses(run) -> list[float]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def test_a_run_on_a_quantised_base_resumes_and_saves_what_any_base_can_load(
    make_config, base, tmp_path, int8
):
    model = {"base": str(base), "device": "cpu", **int8}
    train = {"steps": 4, "batch_size": 2, "log_every": 1, "checkpoint_every": 2}
    whole = dreambooth.run(
        make_config(model=model, train=train, output={"dir": str(tmp_path / "whole")})
    )
    half = make_config(
        model=model, train={**train, "steps": 2}, output={"dir": str(tmp_path / "half")}
    )
    dreambooth.run(half)
    dreambooth.run(load_run(tmp_path / "half", ["train.steps=4"]), resume=True)
    assert losses(tmp_path / "half") == losses(whole)
    with safe_open(whole / "adapter.safetensors", "pt") as file:  # it brings its outer factors
        assert any(name.endswith("nora_outer_A") for name in file.keys())
    family = load_adapted(whole, device="cpu", dtype="fp32")  # on the base as it is
    layers = dict(adapters.iter_nora_layers(family.components.denoiser))
    assert layers and not any(layer.quantization_backend for layer in layers.values())
    plain = make_config(train=train, output={"dir": str(tmp_path / "plain")})
    assert losses(dreambooth.run(plain)) != losses(whole)


def test_the_quantised_base_is_told_apart_when_resuming(make_config, base, int8):
    device = torch.device("cpu")
    whole = load_family(base, dtype=torch.float32, device=device).components.denoiser
    small = load_family(base, dtype=torch.float32, device=device, **int8).components.denoiser
    before = common.weights_digest(small)
    assert before != common.weights_digest(whole)
    weight = small.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    scale = getattr(weight, "scale", None)
    assert scale is not None  # codes alone would not do
    scale.mul_(1.5)
    assert common.weights_digest(small) != before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_counts_quantised_weights(make_config, tmp_path, int8, dtype):
    cfg = make_config(
        model={"base": "mini", "dtype": dtype, **int8},
        data={"resolution_px": 64}, train={"batch_size": 2},
    )  # fmt: skip
    plan = plan_memory(cfg, pictures=3)
    session = prepare(cfg, tmp_path, Report(tmp_path, total_steps=1, log_every=1))
    session.models["unet"].train()
    parts = session.family.components
    trained = sum(p.nbytes for p in session.parameters.values())
    vae = sum(t.nbytes for t in (*parts.pipeline.vae.parameters(), *parts.pipeline.vae.buffers()))
    assert plan.weights == pytest.approx(held_bytes(parts.denoiser) - trained + vae, rel=0.01)
    whole = plan_memory(cfg.model_copy(update={"model": cfg.model.model_copy(
        update={"quantize": "none"})}), pictures=3)  # fmt: skip
    assert plan.weights < whole.weights
    step = peak_of(lambda: dreambooth.accumulate_gradients(session, 0)) - trained
    assert plan.activations == pytest.approx(step, rel=0.15)


def test_real_bases_shrink_as_their_formats_say(tmp_path):
    """Flux.1's transformer has 11.9e9 parameters in bf16: 23.8 GB."""
    from nora_diffusion.config import load_config
    from nora_diffusion.families.skeleton import skeleton

    family = skeleton("black-forest-labs/FLUX.1-dev", torch.bfloat16)
    settings = ["--data.subject", str(tmp_path), "--data.class_name", "dog"]
    found = {}
    for mode in ("none", *quantise.LIBRARIES):
        cfg = load_config("flux", [*settings, "--model.quantize", mode, "--model.device", "cpu"])
        found[mode] = part_bytes(cfg, family)
    assert found["none"]["transformer"] == pytest.approx(23.8e9, rel=0.01)
    assert found["int8"]["transformer"] == pytest.approx(11.9e9, rel=0.01)
    assert found["nf4"]["transformer"] == pytest.approx(23.8e9 * 0.258, rel=0.01)
    assert found["nf4"]["text_encoder"] == found["none"]["text_encoder"]  # CLIP
    assert found["nf4"]["text_encoder_2"] < 0.6 * found["none"]["text_encoder_2"]


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({}, "the device is cpu"),
        ({"model": {"quantize": "int8"}}, 'not with model.quantize = "int8"'),
        ({"model": {"compile": True}}, "not with model.compile = true"),
        ({"adapter": {"basis": "activation"}}, 'not with adapter.basis = "activation"'),
    ],
)
def test_what_offloading_cannot_go_with_is_refused(make_config, base, sections, told):
    model = {"base": str(base), "offload": "group", **sections.get("model", {})}
    cfg = make_config(**{**sections, "model": model})
    device = torch.device("cuda" if sections else "cpu")
    with pytest.raises(UserError, match='model.offload = "group": ') as error:
        check_offload(cfg, device)
    assert told in str(error.value)
