"""The adapter on a CUDA device: the same factors, the same identity, sharing through moves."""

import pytest
import torch

from nora_diffusion.adapter import NoraConfig, factorise
from tests.adapter.toys import INITS, LAYERS, adapted, base_of, inner, input_for, perturb

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(320, 320), (1280, 768), (40, 24)])
def test_factors_are_those_of_the_cpu(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    on_cpu = factorise(weight, 16, use_cache=False)
    on_gpu = factorise(weight.cuda(), 16, use_cache=False)
    assert on_gpu.outer_A.is_cuda
    for name in ("outer_B", "outer_A"):
        assert (getattr(on_gpu, name).cpu() - getattr(on_cpu, name)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", LAYERS)
def test_identity_training_merging_and_restoring(kind, init, dtype):
    base, x = base_of(kind).to("cuda", dtype), input_for(kind).to("cuda", dtype)
    expected, original = base(x), base.weight.clone()
    layer = adapted(base, init=init)
    assert torch.equal(layer(x), expected)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(layer(x), base(x))
    layer(x).float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.is_cuda for p in inner(layer))
    perturb(layer.cpu())
    layer.cuda()
    moved = layer(x)
    layer.merge()
    assert (layer(x) - moved).norm() < 0.05 * moved.norm()
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)


def test_adapters_share_their_factors_through_moves():
    layer = adapted(base_of("linear"))
    layer.update_layer("second", NoraConfig(r=8), 8, 4)
    for device in ("cuda", "cpu", "cuda"):
        outer = layer.to(device).nora_outer_A
        assert outer["default"].device.type == device
        assert outer["default"].data_ptr() == outer["second"].data_ptr()
