"""The memory plan against what runs really allocate, on configurations it was not made with."""

import pytest
import torch

from nora_diffusion.config import UserError, load_config
from nora_diffusion.train import adapters, dreambooth
from nora_diffusion.train.live_memory import LiveMemory, bytes_of
from nora_diffusion.train.memory import check_memory, plan_memory
from nora_diffusion.train.prepare import prepare
from nora_diffusion.train.report import Report

CONFIGURATIONS = {
    "one picture": {"train": {"batch_size": 1}},
    "three pictures": {"train": {"batch_size": 3}},
    "larger pictures": {"data": {"resolution_px": 96}, "train": {"batch_size": 2}},
    "sigma and feed-forward": {
        "adapter": {"init": "sigma", "targets": ("attention", "feed_forward")},
        "train": {"batch_size": 2},
    },
    "convolutions and an average": {
        "adapter": {"targets": ("convolution",), "r": 16},
        "train": {"batch_size": 2, "ema_decay": 0.9},
    },
    "text encoder": {"text_encoder": {"train": True}, "train": {"batch_size": 4}},
    "checkpointing": {"train": {"batch_size": 4, "gradient_checkpointing": True}},
    "prodigy": {"train": {"batch_size": 1, "optimizer": "prodigy", "learning_rate": 1.0}},
    "8 bits, some large matrices": {
        "adapter": {"targets": ("attention", "feed_forward"), "r": 128, "inner_r": 40},
        "train": {"batch_size": 1, "optimizer": "adamw_8bit"},
    },
    "half precision": {"model": {"dtype": "bf16"}, "train": {"batch_size": 4}},
}


def peak_of(call) -> int:
    """Most bytes a call had allocated at once, by torch's own profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_plan_is_within_15_percent_of_what_a_run_allocates(make_config, tmp_path, name):
    sections = CONFIGURATIONS[name]
    sections["model"] = {"base": "mini", **sections.get("model", {})}
    sections["data"] = {"resolution_px": 64, **sections.get("data", {})}
    cfg = make_config(**sections)
    plan = plan_memory(cfg, pictures=3)
    report = Report(tmp_path, total_steps=1, log_every=1)
    session = prepare(cfg, tmp_path, report)
    for model in session.models.values():
        model.train()

    parts = session.family.components
    frozen = [parts.pipeline.vae, *parts.text_encoders.values(), parts.denoiser]
    trained = list(session.parameters.values())
    outer = [
        tensor
        for model in session.models.values()
        for _, layer in adapters.iter_nora_layers(model)
        for tensor in layer.outer(adapters.NAME).buffers()
    ]
    present = bytes_of(t for m in frozen for t in (*m.parameters(), *m.buffers()))
    assert plan.outer_factors == bytes_of(outer)
    # What else is there are the initial pairs of init="sigma".
    assert plan.weights == pytest.approx(present - bytes_of(outer) - bytes_of(trained), rel=1e-3)

    step = peak_of(lambda: dreambooth.accumulate_gradients(session, 0))
    gradients = bytes_of(p.grad for p in trained)
    assert gradients == bytes_of(trained)
    assert plan.activations == pytest.approx(step - gradients, rel=0.15)
    session.optimizer.step()
    kept = [value for state in session.optimizer.state.values() for value in state.values()]
    states = bytes_of(t for t in kept if isinstance(t, torch.Tensor) and t.ndim)
    average = 0 if session.ema is None else bytes_of(session.ema.average.values())
    assert plan.trained == bytes_of(trained) + gradients + states + average
    assert plan.training == pytest.approx(present + step + states + average, rel=0.15)


def test_live_memory_counts_what_autograd_saves():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    saved: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    x = torch.randn(32, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    on_meta = model.to("meta")
    x = x.to("meta")
    with LiveMemory() as memory:
        memory.ignore([*on_meta.parameters(), x])
        out = on_meta(x)
    # The graph keeps all that was saved but the input, which was there before; and there is `out`.
    assert memory.live == sum(saved.values()) - x.nbytes + out.nbytes
    del out
    assert memory.live == 0


def test_attention_is_counted_without_its_matrix_of_scores():
    q, k, v = (torch.empty(1, 2, 512, 8, device="meta", requires_grad=True) for _ in range(3))
    with LiveMemory() as memory:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert 0 < memory.peak < 2 * 512 * 512 * 4


def test_a_run_that_cannot_fit_is_refused_with_what_each_change_saves(make_config):
    cfg = make_config(model={"base": "mini"}, data={"resolution_px": 512}, train={"batch_size": 4})
    plan = plan_memory(cfg)
    check_memory(cfg, plan, plan.peak)
    with pytest.raises(UserError, match=r"needs .* GB and the device has") as error:
        check_memory(cfg, plan, plan.peak // 2)
    told = str(error.value)
    for key in ("train.gradient_checkpointing = true: -", "train.batch_size = 1: -"):
        assert key in told
    assert "which fits" in told


def test_hub_ids_are_planned_from_configs_that_come_with_the_package(tmp_path):
    settings = ["--data.subject", str(tmp_path), "--data.class_name", "dog"]
    small = load_config("sd15", [*settings, "--model.dtype", "bf16", "--model.device", "cpu"])
    plan = plan_memory(small)
    # 859,520,964 parameters of the UNet and the decoder's half of the autoencoder
    assert plan.weights == pytest.approx(2 * 859_520_964 + 4 * 49_490_199, rel=0.001)
    assert plan.outer_factors == pytest.approx(26e6, rel=0.05)


def test_a_timestep_law_is_planned_at_its_full_rank_without_a_warning(make_config, recwarn):
    plain, law = (
        plan_memory(make_config(adapter={"timestep_rank": value})) for value in (None, 1.0)
    )
    assert law.peak == plain.peak
    assert not [str(w.message) for w in recwarn if "timestep" in str(w.message)]
