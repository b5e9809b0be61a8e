"""Quantised bases on tiny models: by torchao on the CPU, nf4 by bitsandbytes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.config import UserError
from nora_diffusion.families import load_family, quantise
from nora_diffusion.train.common import weights_digest
from tests.tiny import ATTENTION, tiny_pipeline
from tests.tiny_flow import tiny_flow

CPU = torch.device("cpu")


def installed(mode: str) -> None:
    pytest.importorskip(quantise.LIBRARIES[mode])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, pipe in (("sd", tiny_pipeline("sd15")), ("flux", tiny_flow("flux_dev"))):
        found[name] = tmp_path_factory.mktemp("base") / name
        pipe.save_pretrained(found[name])
    return found


def held_bytes(module: nn.Module) -> int:
    """Bytes of what a quantised model really holds: codes, scales, and what is as it was."""
    total = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if hasattr(parameter, "__tensor_flatten__"):
            names = parameter.__tensor_flatten__()[0]
            total += sum(getattr(parameter, name).nbytes for name in names)
        elif state is not None:
            total += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            total += parameter.nbytes
    return total


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("mode", quantise.LIBRARIES)
def test_the_bytes_predicted_from_shapes_are_those_held(folders, name, mode):
    installed(mode)
    dtype = torch.bfloat16
    plain = load_family(folders[name], dtype=dtype, device=CPU).components.pipeline
    small = load_family(folders[name], dtype=dtype, device=CPU, quantize=mode).components.pipeline
    saved = quantise.bytes_saved(plain, mode)
    parts = {"sd": {"unet"}, "flux": {"transformer", "text_encoder_2"}}[name]  # CLIP is left alone
    assert saved.keys() == parts
    for part, predicted in saved.items():
        real = held_bytes(getattr(plain, part)) - held_bytes(getattr(small, part))
        # Transformers chooses for T5: it also leaves the one layer that has another purpose.
        assert predicted == real or (part == "text_encoder_2" and abs(predicted / real - 1) < 0.05)


@pytest.mark.parametrize("name", ["sd", "flux"])
@pytest.mark.parametrize("mode", quantise.LIBRARIES)
def test_a_quantised_base_is_close_to_the_whole_one_and_an_adapter_starts_at_it(
    folders, name, mode
):
    installed(mode)
    family = load_family(folders[name], dtype=torch.float32, device=CPU, quantize=mode)
    whole = load_family(folders[name], dtype=torch.float32, device=CPU)
    denoiser = family.components.denoiser
    channels = family.components.pipeline.vae.config.latent_channels
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss(of, seed: int = 1) -> torch.Tensor:
        with torch.no_grad():
            conditioning = of.encode_prompts(["a toy"]).repeat(2)
        return of.loss(
            of.components.denoiser, latents, conditioning, torch.Generator().manual_seed(seed)
        )

    before = loss(family).detach()
    difference = (before - loss(whole).detach()).abs().max()
    assert 0 < difference < {"nf4": 0.1, "int8": 0.01, "fp8": 0.05}[mode]
    digest = weights_digest(denoiser)
    denoiser.add_adapter(NoraConfig(r=8, inner_r=4, target_modules=ATTENTION))
    assert torch.equal(loss(family).detach(), before)
    pairs = [p for _, layer in iter_nora_layers(denoiser) for p in layer.parameters()]
    optimizer = torch.optim.AdamW([p for p in pairs if p.requires_grad], lr=0.03)
    for _ in range(10):
        optimizer.zero_grad()
        loss(family).mean().backward()
        optimizer.step()
    assert loss(family).mean() < 0.999 * before.mean()
    assert all(layer.quantization_backend for _, layer in iter_nora_layers(denoiser))
    for _, layer in iter_nora_layers(denoiser):  # what is quantised did not move
        layer.get_base_layer().requires_grad_(False)
    fresh = load_family(folders[name], dtype=torch.float32, device=CPU, quantize=mode)
    assert weights_digest(fresh.components.denoiser) == digest


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(mode):
    """Else a quantised base would take more memory in training than a whole one."""
    installed(mode)
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False)
    quantize_(linear, quantise._torchao_config(mode))
    kept: list[int] = []
    inputs = torch.randn(5, 64, requires_grad=True)

    def saved_by(call) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(0 if quantise.is_torchao(t) else t.nbytes), t)[1], lambda t: t
        ):
            call().sum().backward()
        return sum(kept)

    weight_bytes = 64 * 48 * 4
    assert saved_by(lambda: linear(inputs)) >= weight_bytes  # what torchao alone does
    expected, inputs.grad = inputs.grad, None
    output = linear(inputs).detach()
    linear.__class__ = quantise.FrozenLinear
    assert saved_by(lambda: linear(inputs)) == 0
    assert torch.equal(linear(inputs), output)
    assert torch.allclose(inputs.grad, expected, atol=1e-6)


def test_a_missing_library_names_the_extra(folders, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name)
    )
    with pytest.raises(UserError, match=r'model.quantize = "int8": torchao.*\[quant\]'):
        load_family(folders["sd"], dtype=torch.float32, device=CPU, quantize="int8")


def test_one_file_is_quantised_after_loading(folders):
    """And what is not a linear layer keeps its format."""
    installed("int8")
    pipe = tiny_pipeline("sd15")
    quantise.after_loading(pipe, "int8", torch.float32)
    layers = [m for m in pipe.unet.modules() if isinstance(m, nn.Linear)]
    assert layers and all(quantise.is_torchao(layer.weight) for layer in layers)
    assert type(pipe.unet.conv_in.weight) is nn.Parameter
    at_once = load_family(folders["sd"], dtype=torch.float32, device=CPU, quantize="int8")
    assert weights_digest(pipe.unet) == weights_digest(at_once.components.denoiser)
