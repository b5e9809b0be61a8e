"""What only a GPU with a memory of its own can show: staged loading, offloaded layers, nf4."""

from __future__ import annotations

import pytest
import torch

from nora_diffusion.config import load_config
from nora_diffusion.train import dreambooth
from nora_diffusion.train.prepare import load_base, prepare
from nora_diffusion.train.report import Report

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def step(cfg, folder) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of two steps, and the most bytes that the second held."""
    folder.mkdir()
    session = prepare(cfg, folder, Report(folder, total_steps=2, log_every=1))
    for model in session.models.values():
        model.train()
    dreambooth.accumulate_gradients(session, 0)
    torch.cuda.reset_peak_memory_stats()
    loss = dreambooth.accumulate_gradients(session, 1)
    gradients = {n: p.grad.cpu() for n, p in session.parameters.items() if p.grad is not None}
    assert gradients.keys() == session.parameters.keys()
    assert {p.device.type for p in session.parameters.values()} == {"cuda"}
    return loss, gradients, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_layers_train_as_those_that_stay(make_config, tmp_path, checkpointing):
    found = {}
    for offload in ("none", "group"):
        cfg = make_config(
            model={"base": "mini", "device": "cuda", "dtype": "fp32", "offload": offload},
            data={"resolution_px": 64},
            train={"batch_size": 1, "gradient_checkpointing": checkpointing},
        )
        found[offload] = step(cfg, tmp_path / offload)
    assert found["group"][0] == pytest.approx(found["none"][0], rel=1e-4)
    scale = max(g.abs().max() for g in found["none"][1].values())
    for name, gradient in found["none"][1].items():
        assert (gradient - found["group"][1][name]).abs().max() < 1e-3 * scale
    assert found["group"][2] < found["none"][2]


def test_parts_wait_on_the_cpu_for_their_turn(make_config):
    cfg = make_config(model={"base": "mini", "device": "cuda"})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts = load_base(cfg, torch.float32, torch.device("cuda")).components
    assert torch.cuda.memory_allocated() == before
    with parts.placed("vae"):
        assert parts.pipeline.vae.device.type == "cuda"
        assert parts.denoiser.device.type == "cpu"
    assert torch.cuda.memory_allocated() == before
    parts.place_rest()
    assert parts.denoiser.device.type == "cuda"


@pytest.mark.parametrize("mode", ["nf4", "int8", "fp8"])
def test_quantised_bases_train_on_a_gpu(make_config, base, tmp_path, mode):
    pytest.importorskip("bitsandbytes" if mode == "nf4" else "torchao")
    model = {"base": str(base), "device": "cuda", "dtype": "bf16", "quantize": mode}
    run = dreambooth.run(make_config(model=model))
    assert (run / "adapter.safetensors").is_file()


def test_xformers_trains_where_it_is_installed(make_config, base):
    pytest.importorskip("xformers")
    model = {"base": str(base), "device": "cuda", "attention": "xformers"}
    dreambooth.run(make_config(model=model))


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(make_config, base, tmp_path):
    from safetensors.torch import load_file

    model = {"base": str(base), "device": "cuda", "compile": True}
    whole = make_config(model=model, output={"dir": str(tmp_path / "whole")})
    dreambooth.run(whole)
    half = whole.model_copy(
        update={
            "train": whole.train.model_copy(update={"steps": 2}),
            "output": whole.output.model_copy(update={"dir": str(tmp_path / "half")}),
        }
    )
    dreambooth.run(half)
    settings = ["--train.steps", str(whole.train.steps)]
    dreambooth.run(load_config(tmp_path / "half" / "config.toml", settings), resume=True)
    left = load_file(tmp_path / "whole" / "adapter.safetensors")
    right = load_file(tmp_path / "half" / "adapter.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)
