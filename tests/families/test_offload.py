"""Layers in main memory: what the CPU can show; `tests/train/test_runs_on_gpu.py` has the rest."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from nora_diffusion.adapter import NoraConfig, iter_nora_layers
from nora_diffusion.families.offload import offload_layers
from tests.tiny import ATTENTION, tiny_pipeline, train

CPU = torch.device("cpu")


def step(*, offloaded: bool, checkpointing: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A forward and a backward pass of a tiny UNet, and the gradients of its adapter."""
    unet = tiny_pipeline("sd15").unet.requires_grad_(False)
    if offloaded:
        offload_layers(unet, CPU, prefetch=False)
    unet.add_adapter(NoraConfig(r=8, inner_r=2, target_modules=ATTENTION))
    train(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    answer = unet.train()(latents, torch.tensor([10, 700]), text).sample
    answer.square().mean().backward()
    pairs = [p for _, layer in iter_nora_layers(unet) for p in layer.parameters()]
    return answer.detach(), [p.grad for p in pairs if p.requires_grad]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_change_no_bit_and_every_adapter_gets_its_gradient(checkpointing):
    expected, gradients = step(offloaded=False, checkpointing=checkpointing)
    found, offloaded = step(offloaded=True, checkpointing=checkpointing)
    assert torch.equal(found, expected)
    assert len(gradients) == 2 * 4 * 8  # blocks and the projections in each
    for left, right in zip(gradients, offloaded, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-9) and bool(left.abs().max() > 0)


@pytest.mark.parametrize("removed", [False, True])
def test_the_backward_pass_looks_weights_up_where_they_are_then(removed):
    """Kept copies would hold all of the model on the device.

    That diffusers removes a hook changes nothing: with prefetching it does after the first pass.
    """
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
    ).requires_grad_(False)
    torch.nn.init.normal_(model[1].weight)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(ModelHook(), "of one pass")
    offload_layers(model, CPU, prefetch=False)
    if removed:
        registry.remove_hook("of one pass", recurse=False)
    inputs = torch.randn(3, 4, requires_grad=True)
    loss = model(inputs).sum()
    (expected,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    for parameter in model.parameters():  # as a swap does: other storage
        parameter.data = 2 * parameter.data
    loss.backward()
    assert not torch.allclose(inputs.grad, expected)
    assert torch.allclose(inputs.grad, 8 * expected, rtol=1e-4)
