"""Targets, laws and weights against their published equations."""

import math

import pytest
import torch

from nora_diffusion.families import objective

T = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2
CUMULATED = torch.cumprod(1 - BETAS, dim=0)
ZERO_TERMINAL = torch.cat([CUMULATED[:-1], torch.zeros(1, dtype=torch.float64)])


def _samples(batch: int = 5):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, 2, 3)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return latents, noise, torch.tensor([0, 10, 500, 998, 999])[:batch]


@pytest.mark.parametrize("kind", objective.PREDICTION_TYPES)
def test_clean_latents_follow_from_noised_ones_and_the_target(kind):
    latents, noise, timesteps = _samples()
    alpha, sigma = objective.alpha_sigma(CUMULATED, timesteps)
    noisy = objective.add_noise(latents, noise, alpha, sigma)
    target = objective.diffusion_target(kind, latents, noise, alpha, sigma)
    solved = {
        "epsilon": lambda: (noisy - sigma * target) / alpha,
        "v_prediction": lambda: alpha * noisy - sigma * target,
        "sample": lambda: target,
    }[kind]()
    torch.testing.assert_close(solved, latents)


def test_at_zero_terminal_snr_the_latents_are_pure_noise_and_v_is_minus_the_image():
    latents, noise, timesteps = _samples()
    alpha, sigma = objective.alpha_sigma(ZERO_TERMINAL, timesteps)
    noisy = objective.add_noise(latents, noise, alpha, sigma)
    assert torch.equal(noisy[-1], noise[-1])
    v = objective.diffusion_target("v_prediction", latents, noise, alpha, sigma)
    assert torch.equal(v[-1], -latents[-1])


def test_unknown_prediction_type_is_named():
    latents, noise, _ = _samples()
    with pytest.raises(ValueError, match="'flow'.*epsilon, v_prediction, sample"):
        objective.diffusion_target("flow", latents, noise, noise, noise)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_paper(gamma):
    timesteps = torch.arange(T)
    snr = CUMULATED / (1 - CUMULATED)
    capped = snr.clamp(max=gamma)
    for kind, expected in (
        ("epsilon", capped / snr),
        ("v_prediction", capped / (snr + 1)),
        ("sample", capped),
    ):
        weight = objective.min_snr_weight(CUMULATED, timesteps, gamma, kind)
        torch.testing.assert_close(weight, expected)


def test_min_snr_weights_take_their_limits_where_the_ratio_is_zero_or_infinite():
    ends = torch.tensor([1.0, 0.0])
    for kind, at_clean, at_noise in (("epsilon", 0.0, 1.0), ("v_prediction", 0.0, 0.0)):
        weight = objective.min_snr_weight(ends, torch.tensor([0, 1]), 5.0, kind)
        assert weight.tolist() == [at_clean, at_noise]
    assert objective.min_snr_weight(ends, torch.tensor([1]), 5.0, "sample").item() == 0.0


def test_flow_path_runs_from_image_to_noise_at_constant_velocity():
    latents, noise, _ = _samples()
    start, end = (
        objective.interpolate(latents, noise, torch.zeros(1)),
        objective.interpolate(latents, noise, torch.ones(1)),
    )
    torch.testing.assert_close(start, latents)
    torch.testing.assert_close(end, noise)
    here, there = (objective.interpolate(latents, noise, torch.tensor(s)) for s in (0.2, 0.7))
    torch.testing.assert_close((there - here) / 0.5, objective.flow_target(latents, noise))


def test_uniform_timesteps_cover_all_and_only_the_schedule():
    drawn = objective.uniform_timesteps(20_000, 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10)
    assert len(counts) == 10
    # 2,000 each; six standard deviations of a binomial count.
    assert (counts - 2000).abs().max() < 6 * math.sqrt(20_000 * 0.1 * 0.9)


def test_logit_normal_has_its_quantiles():
    sigmas = objective.logit_normal_sigmas(40_000, torch.Generator().manual_seed(0), 0.5, 2.0)
    for quantile, z in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        expected = 1 / (1 + math.exp(-(0.5 + 2.0 * z)))
        assert sigmas.quantile(quantile).item() == pytest.approx(expected, abs=0.01)


def test_shift_keeps_the_ends_and_composes():
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = objective.shift_sigmas(sigmas, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > sigmas[1:-1]).all()
    twice = objective.shift_sigmas(objective.shift_sigmas(sigmas, 2.0), 1.5)
    torch.testing.assert_close(twice, shifted)
    assert torch.equal(objective.shift_sigmas(sigmas, 1.0), sigmas)


@pytest.mark.parametrize("kind", objective.PREDICTION_TYPES)
@pytest.mark.parametrize("cumulated", [CUMULATED, ZERO_TERMINAL])
def test_soft_min_snr_is_the_harmonic_form_of_the_cap(kind, cumulated):
    timesteps = torch.tensor([1, 300, 600, 998])
    signal = cumulated[timesteps]
    snr, gamma = signal / (1 - signal), 5.0
    of_own_loss = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(4)}[kind]
    expected = 1 / (1 / snr + 1 / gamma) / of_own_loss
    options = objective.LossOptions(min_snr_gamma=gamma, soft_min_snr=True)
    weight = objective.snr_weight(cumulated, timesteps, options, kind)
    torch.testing.assert_close(weight, expected)
    ends = objective.soft_min_snr_weight(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), 5.0, kind)
    assert torch.isfinite(ends).all() and (ends >= 0).all()


def test_no_cap_is_no_weight():
    assert (
        objective.snr_weight(CUMULATED, torch.tensor([1]), objective.LossOptions(), "epsilon")
        is None
    )


def test_mode_law_has_its_published_quantiles():
    generator, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    u = torch.rand(4000, generator=again)
    expected = 1 - u - 1.29 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    torch.testing.assert_close(objective.mode_sigmas(4000, generator), expected.clamp(0, 1))
    sigmas = objective.law_sigmas("mode", 20_000, torch.Generator().manual_seed(1))
    middle = ((sigmas > 0.25) & (sigmas < 0.75)).float().mean()
    assert middle > 0.55  # half of the draws if it were uniform


@pytest.mark.parametrize("law", ["default", "uniform", "logit_normal", "mode"])
def test_every_law_stays_in_range_and_repeats_for_its_seed(law):
    def draw():
        generator = torch.Generator().manual_seed(4)
        return objective.law_timesteps(law, 5000, T, generator)

    timesteps = draw()
    assert torch.equal(timesteps, draw())
    assert timesteps.dtype == torch.int64 and 0 <= timesteps.min() < timesteps.max() < T
    sigmas = objective.law_sigmas(law, 5000, torch.Generator().manual_seed(4))
    assert 0 <= sigmas.min() and sigmas.max() <= 1


def test_an_unknown_law_is_named():
    with pytest.raises(ValueError, match="'cosmap'.*logit_normal or mode"):
        objective.law_sigmas("cosmap", 1, torch.Generator())


def test_offset_noise_is_constant_over_space_and_leaves_the_noise_alone():
    def draw(offset):
        generator = torch.Generator().manual_seed(2)
        return objective.draw_noise(torch.Size([3000, 2, 4, 4]), generator, offset)

    added = draw(0.5) - draw(0.0)
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-5, rtol=0)
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.05)


def test_a_mask_takes_its_places_out_of_the_mean():
    error = torch.arange(1.0, 33.0).reshape(2, 4, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    expected = error[:, :, 0, 0].sum(dim=1) / 16
    torch.testing.assert_close(objective.mean_per_sample(error, mask), expected)
    torch.testing.assert_close(objective.mean_per_sample(error), error.mean(dim=(1, 2, 3)))
