"""`torch.compile`: one graph, and no compilation that an adapter switch could have reused."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from nora_diffusion.adapter import NoraConfig
from tests.adapter.toys import LAYERS, adapted, base_of, inner, input_for, perturb


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(layer):
    counter = CompileCounter()
    return torch.compile(layer, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("fields", [{}, {"init": "sigma"}, {"timestep_rank": 1.0}])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_backward_are_one_graph(kind, fields):
    layer, x = perturb(adapted(base_of(kind), **fields)), input_for(kind)
    layer.set_progress(torch.tensor([0.2, 0.9]))
    expected = layer(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in inner(layer)]
    layer.zero_grad()
    fast, counter = compiled(layer)
    assert torch.allclose(fast(x), expected, atol=1e-6)
    fast(x).square().sum().backward()
    for found, parameter in zip(gradients, inner(layer), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-4)
    assert counter.frame_count == 1


def test_autocast_is_one_graph():
    layer, x = perturb(adapted(base_of("linear"))), input_for("linear")
    fast, counter = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), layer(x))
    assert counter.frame_count == 1


def test_new_values_in_place_need_no_compilation():
    layer, x = adapted(base_of("linear"), timestep_rank=1.0), input_for("linear")
    fast, counter = compiled(layer)
    layer.set_progress(torch.tensor([0.1, 0.2]))
    fast(x)
    # Another subject in the same slot, and another timestep.
    for step in range(3):
        perturb(layer)
        layer.set_progress(torch.tensor([0.2 * step, 0.3]))
        assert torch.allclose(fast(x), layer(x), atol=1e-6)
    assert counter.frame_count == 1


def test_switching_between_known_adapters_needs_no_compilation():
    layer, x = adapted(base_of("linear")), input_for("linear")
    layer.update_layer("second", NoraConfig(r=8, seed=1), 8, 4)
    layer.derive_factors("second")
    perturb(layer)
    model = nn.Sequential(layer)
    fast, counter = compiled(model)
    choices = (["default"], ["second"], ["default", "second"])
    for names in choices:
        layer.set_adapter(names)
        assert torch.allclose(fast(x), model(x), atol=1e-6)
    seen = counter.frame_count
    for names in choices * 2:
        layer.set_adapter(names)
        assert torch.allclose(fast(x), model(x), atol=1e-6)
    assert counter.frame_count == seen <= len(choices)
