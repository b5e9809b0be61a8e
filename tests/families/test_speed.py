"""Attention kernels and compiled blocks."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from torch.nn import functional as F

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.families import speed
from tests.tiny import ATTENTION, tiny_pipeline, train
from tests.tiny_dit import tiny_dit
from tests.tiny_flow import tiny_flow

BASES = {
    "sd15": (lambda: tiny_pipeline("sd15").unet, 1 + 1 + 2),  # down, middle, two going up
    "flux": (lambda: tiny_flow("flux_dev").transformer, 1 + 2),
    "sd3": (lambda: tiny_dit("sd35_medium").transformer, None),
    "pixart": (lambda: tiny_dit("pixart_sigma").transformer, None),
    "sana": (lambda: tiny_dit("sana").transformer, None),
    "z_image": (lambda: tiny_flow("z_image").transformer, None),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def adapted_unet():
    unet = tiny_pipeline("sd15").unet.requires_grad_(False)
    unet.add_adapter(NoraConfig(r=8, inner_r=2, target_modules=ATTENTION))
    train(unet)
    return unet.train()


def step(unet, size: int = 8) -> tuple[float, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, size, size, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    unet.zero_grad()
    loss = unet(latents, torch.tensor([10, 700]), text).sample.square().mean()
    loss.backward()
    pairs = [layer.nora_inner_B["default"].grad for _, layer in iter_nora_layers(unet)]
    return loss.item(), [gradient.clone() for gradient in pairs]


def same(left, right, relative: float) -> bool:
    scale = max(gradient.abs().max() for gradient in left[1])
    apart = max((a - b).abs().max() for a, b in zip(left[1], right[1], strict=True))
    return abs(left[0] - right[0]) <= relative * left[0] and bool(apart <= relative * scale)


@pytest.mark.parametrize("name", BASES)
def test_every_family_has_blocks_to_compile(name):
    make, count = BASES[name]
    model = make()
    blocks = speed.repeated_blocks(model)
    assert blocks and (count is None or len(blocks) == count)
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert inside > 0.05 * everything  # most of a tiny model is in what a block is told of time


def test_compiled_blocks_do_what_eager_ones_do_after_any_other_size():
    """Through dynamo and autograd's tracing, without the C++ compiler."""
    unet = adapted_unet()
    expected = step(unet)
    assert speed.compile_blocks(unet, backend="aot_eager") == 4
    first = step(unet)
    assert same(expected, first, 1e-5)
    for size in (16, 4):  # sampling at other sizes in between changes no bit of a step
        step(unet, size)
    again = step(unet)
    assert again[0] == first[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_checkpointed_blocks_can_be_compiled():
    unet = adapted_unet()
    expected = step(unet)
    unet.enable_gradient_checkpointing()
    speed.compile_blocks(unet, backend="aot_eager")
    assert same(expected, step(unet), 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for the CPU's kernels")
def test_compiled_kernels_do_what_eager_ones_do():
    unet = adapted_unet()
    expected = step(unet)
    speed.compile_blocks(unet)
    assert same(expected, step(unet), 1e-5)


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "sana"])
def test_xformers_computes_what_the_model_does_or_is_not_taken(name, monkeypatch):
    """Attention of xformers' contract takes its place; diffusers would give it to any class."""

    def attention(query, key, value, attn_bias=None, op=None, scale=None, **_):
        heads = [x.transpose(1, 2) if x.ndim == 4 else x for x in (query, key, value)]
        found = F.scaled_dot_product_attention(*heads, attn_mask=attn_bias, scale=scale)
        return found.transpose(1, 2) if query.ndim == 4 else found

    ops = SimpleNamespace(memory_efficient_attention=attention)
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
    randn = torch.randn  # diffusers tries the kernel on the GPU
    model, said = BASES[name][0](), []
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.cuda, "is_available", lambda: True)
        on_gpu.setattr(torch, "randn", lambda *size, **_: randn(*size))
        used = speed.use_attention(model, "xformers", said.append)
    if name == "sana":  # linear attention
        assert used == "sdpa" and "SanaLinearAttnProcessor2_0" in said[0]
        return
    assert used == "xformers" and not said
    kinds = {type(getattr(m, "processor", None)).__name__ for m in model.modules()} - {"NoneType"}
    assert kinds and all(kind.startswith("XFormers") for kind in kinds)
    attn = next(m for m in model.modules() if hasattr(m, "processor"))
    hidden = torch.randn(2, 5, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    other = {"encoder_hidden_states": hidden} if "Joint" in kinds.pop() else {}
    with torch.no_grad():
        found = attn(hidden, **other)
        attn.set_processor(JointAttnProcessor2_0() if other else AttnProcessor2_0())
        wanted = attn(hidden, **other)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_xformers_falls_back_with_a_message(name):
    if torch.cuda.is_available():
        pytest.skip("it may well be usable here")
    model, said = BASES[name][0](), []
    assert speed.use_attention(model, "xformers", said.append) == "sdpa"
    (message,) = said
    assert message.startswith('model.attention = "xformers" cannot be used here (')
    if name == "sd15":
        kinds = {type(processor) for processor in model.attn_processors.values()}
        assert kinds == {AttnProcessor2_0}
    said.clear()
    assert speed.use_attention(model, "sdpa", said.append) == "sdpa" and not said
