"""The shared flow-matching loss against the published equations."""

import pytest
import torch

from nora_diffusion.config import UserError
from nora_diffusion.families.flow import flow_loss
from nora_diffusion.families.objective import LossOptions

CPU = torch.device("cpu")
PLAIN = LossOptions()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def predict(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    return torch.sin(noisy) * sigmas.reshape(-1, *[1] * (noisy.ndim - 1))


def loss(latents: torch.Tensor, options: LossOptions = PLAIN, shift: float = 3.0, **more):
    return flow_loss(predict, latents, generator(), options, shift, CPU, torch.float32, **more)


@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (6, 4, 1, 8, 8)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_is_that_of_the_published_equations(shape, shift):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    same = generator()
    sigma = torch.sigmoid(torch.randn(6, generator=same))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise = torch.randn(shape, generator=same)
    at = sigma.reshape(-1, *[1] * (len(shape) - 1))
    noisy = (1 - at) * latents + at * noise
    expected = ((torch.sin(noisy) * at - (noise - latents)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss(latents, shift=shift), expected, rtol=1e-6, atol=1e-6)


def test_a_reference_is_the_target_at_the_same_sigmas_and_noise():
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loss(latents, reference_predict=predict), torch.zeros(4))
    other = loss(latents, reference_predict=lambda noisy, sigmas: predict(noisy, sigmas) + 2)
    torch.testing.assert_close(other, torch.full((4,), 4.0))


def test_masked_places_do_not_count_and_the_mean_is_over_all():
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    half = torch.zeros(4, 1, 8, 8)
    half[..., :4] = 1
    parts = loss(latents, mask=half) + loss(latents, mask=1 - half)
    torch.testing.assert_close(parts, loss(latents))
    assert torch.equal(loss(latents, mask=torch.zeros(4, 1, 8, 8)), torch.zeros(4))


def test_half_precision_is_handed_over_and_the_loss_is_float32():
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []

    def half(noisy, sigmas):
        seen.append((noisy.dtype, sigmas.dtype))
        return predict(noisy, sigmas.to(noisy.dtype))

    answer = flow_loss(half, latents, generator(), PLAIN, 3.0, CPU, torch.bfloat16)
    assert seen == [(torch.bfloat16, torch.float32)] and answer.dtype == torch.float32
    torch.testing.assert_close(answer, loss(latents), rtol=0.03, atol=0.03)


def test_a_signal_to_noise_weight_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"train\.min_snr_gamma = 5: .*flow model"):
        loss(torch.zeros(1, 4, 8, 8), LossOptions(min_snr_gamma=5.0))
