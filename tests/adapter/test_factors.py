"""Outer factors: orthonormal, faithful to the weight, and the same wherever the bytes are."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nora_diffusion.adapter import Factors, cached_factors, factorise, factorise_many, fingerprint
from nora_diffusion.adapter.factor_cache import store
from nora_diffusion.adapter.factors import FactorJob, seeded_orthonormal

KEY = ("weight", 0)


def matrix(rows, columns, decay=0.0, seed=0):
    """Random matrix; with a decay, singular values (1 + index) ** -decay."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if decay == 0:
        return noise.float()
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    values = torch.arange(1, len(values) + 1, dtype=torch.float64) ** -decay
    return (left * values @ right).float()


def orthonormality_error(factors):
    eye = torch.eye(factors.r)
    columns = (factors.outer_B.T @ factors.outer_B - eye).abs().max()
    rows = (factors.outer_A @ factors.outer_A.T - eye).abs().max()
    return max(columns.item(), rows.item())


def difference(a, b):
    pairs = ((a.outer_B, b.outer_B), (a.outer_A, b.outer_A))
    return max((x - y).abs().max().item() for x, y in pairs)


WEIGHTS = {
    "gaussian": lambda: matrix(320, 320),
    "wide": lambda: matrix(96, 400),
    "tall": lambda: matrix(400, 96),
    "decaying": lambda: matrix(256, 256, decay=1.0),
    "outliers": lambda: matrix(256, 256) + 30 * torch.outer(torch.ones(256), torch.ones(256)) / 16,
    "small": lambda: matrix(40, 24),
    "identity": lambda: torch.eye(200),
    "orthogonal": lambda: torch.linalg.qr(matrix(160, 160).double()).Q.float(),
    "rank 5": lambda: matrix(200, 5) @ matrix(5, 200, seed=1),
    "zero": lambda: torch.zeros(100, 80),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_pair_is_orthonormal_and_diagonalises_the_weight(name):
    weight = WEIGHTS[name]()
    factors = factorise(weight, 16)
    assert orthonormality_error(factors) < 2e-6
    # U^T W = diag(s) V: what makes an approximate basis as good as an exact one.
    residual = factors.outer_B.T @ weight - factors.singular_values[:, None] * factors.outer_A
    assert residual.abs().max() <= 2e-6 * max(1.0, weight.norm().item())
    assert (factors.singular_values[:-1] >= factors.singular_values[1:] - 1e-5).all()
    assert (factors.singular_values >= 0).all()


@pytest.mark.parametrize("name", WEIGHTS)
def test_factors_do_not_depend_on_the_number_of_threads(name):
    weight, threads = WEIGHTS[name](), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(factorise(weight, 16, use_cache=False))
    finally:
        torch.set_num_threads(threads)
    assert difference(*found) < 1e-6


@pytest.mark.parametrize("name", ["gaussian", "decaying", "outliers", "orthogonal", "rank 5"])
def test_factors_do_not_depend_on_the_last_bits_of_the_arithmetic(name):
    """Noise of float64's own size stands for another BLAS, device or order of summation."""
    weight = WEIGHTS[name]().double()
    noise = 1e-15 * weight.abs().max() * matrix(*weight.shape, seed=3).double()
    first, second = (factorise(w, 16, use_cache=False) for w in (weight, weight + noise))
    assert difference(first, second) < 1e-6


@pytest.mark.parametrize("name", ["gaussian", "wide", "tall", "decaying", "outliers"])
def test_captured_energy_is_within_one_percent_of_the_exact_svd(name):
    weight = WEIGHTS[name]()
    exact = torch.linalg.svdvals(weight.double())[:16].square().sum()
    captured = (factorise(weight, 16).outer_B.T @ weight).double().square().sum()
    assert 0.99 * exact < captured <= exact * (1 + 1e-5)


def test_well_separated_vectors_are_the_weights_own():
    weight = matrix(256, 200, decay=1.0)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    factors = factorise(weight, 8)
    assert torch.allclose(factors.singular_values.double(), values[:8], rtol=1e-6)
    cosines = (factors.outer_B.double() * left[:, :8]).sum(0).abs()
    assert torch.allclose(cosines, torch.ones(8, dtype=torch.float64), atol=1e-6)


def test_signs_are_canonical():
    factors = factorise(matrix(120, 90), 12)
    largest = factors.outer_B.abs().argmax(dim=0)
    assert (factors.outer_B[largest, torch.arange(12)] > 0).all()
    flipped = factorise(-matrix(120, 90), 12)
    assert torch.allclose(flipped.outer_B, factors.outer_B, atol=1e-6)
    assert torch.allclose(flipped.outer_A, -factors.outer_A, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_gives_the_factors_of_its_values(dtype):
    weight = matrix(150, 150).to(dtype)
    assert difference(factorise(weight, 8), factorise(weight.double(), 8)) < 1e-6


def test_minor_basis_holds_the_last_directions():
    weight = matrix(60, 80, decay=1.0)
    values = torch.linalg.svdvals(weight.double())
    factors = factorise(weight, 6, basis="weight_minor")
    assert orthonormality_error(factors) < 2e-6
    assert torch.allclose(factors.singular_values.double(), values[-6:], rtol=1e-5)


def test_random_basis_ignores_the_weight_and_follows_the_seed():
    first, second = (factorise(matrix(60, 80, seed=s), 6, basis="random") for s in (0, 1))
    assert difference(first, second) == 0
    assert orthonormality_error(first) < 2e-6
    other_seed = factorise(matrix(60, 80), 6, basis="random", seed=1)
    assert difference(first, other_seed) > 0.1


def test_activation_basis_prefers_the_inputs_that_are_active():
    weight, magnitude = matrix(64, 64), torch.full((64,), 1e-4)
    magnitude[:4] = 100.0
    factors = factorise(weight, 4, basis="activation", statistics=magnitude)
    assert orthonormality_error(factors) < 2e-6
    # U holds the outputs that the four loud inputs drive.
    driven = torch.linalg.qr(weight[:, :4].double()).Q
    overlap = torch.linalg.svdvals(driven.T @ factors.outer_B.double())
    assert overlap.min() > 0.999


def test_gradient_basis_is_the_top_of_the_gradient():
    gradient = torch.outer(matrix(64, 1)[:, 0], matrix(48, 1, seed=1)[:, 0])
    factors = factorise(matrix(64, 48), 4, basis="gradient", statistics=gradient)
    assert orthonormality_error(factors) < 2e-6
    restored = factors.outer_B @ (factors.outer_B.T @ gradient @ factors.outer_A.T)
    assert torch.allclose(restored @ factors.outer_A, gradient, atol=1e-5)


def test_rank_is_clamped_to_the_smaller_side():
    assert factorise(matrix(10, 30), 64).outer_A.shape == (10, 30)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_refused(value):
    weight = matrix(20, 20)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        factorise(weight, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": 4, "basis": "wieght"}, "basis must be one of weight, .*got 'wieght'"),
        ({"r": 4, "basis": "gradient"}, r"statistics of shape \(6, 5\).*got None"),
        ({"r": 4, "basis": "activation", "statistics": torch.ones(6)}, r"\(5,\).*got \(6,\)"),
        ({"r": 4, "statistics": torch.ones(5)}, "shape None"),
    ],
)
def test_wrong_arguments_say_what_was_given_and_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorise(matrix(6, 5), **arguments)


def test_many_equals_one_by_one_and_leaves_the_thread_count():
    weights = [matrix(40 + 10 * n, 50, seed=n) for n in range(5)]
    threads = torch.get_num_threads()
    together = factorise_many([FactorJob(weight, 8) for weight in weights], workers=3)
    assert torch.get_num_threads() == threads
    for weight, factors in zip(weights, together, strict=True):
        assert difference(factors, factorise(weight, 8, use_cache=False)) < 1e-6


def test_an_error_among_many_names_the_module():
    jobs = [FactorJob(matrix(8, 8), 2, name="fine"), FactorJob(torch.full((8, 8), torch.nan), 2)]
    jobs[1] = FactorJob(jobs[1].weight, 2, name="mid.to_q")
    with pytest.raises(ValueError, match="^mid.to_q: "):
        factorise_many(jobs, workers=2)


def test_fingerprint_covers_dtype_shape_and_every_byte():
    weight = matrix(6, 8)
    changed = weight.clone()
    changed.view(torch.int32)[5, 7] ^= 1
    variants = [weight, changed, weight.reshape(8, 6), weight.half(), weight.bfloat16()]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(weight.T.contiguous().T) == fingerprint(weight)
    assert fingerprint(torch.nn.Parameter(weight)) == fingerprint(weight)


def test_the_cache_is_read_and_keyed_by_everything_that_matters(own_cache):
    weight = matrix(50, 60)
    factors = factorise(weight, 8)
    digest = fingerprint(weight)
    found = cached_factors(digest, 8, "weight", 0)
    assert found is not None and difference(found, factors) == 0
    assert found.fingerprint == digest
    others = [(digest, 7, "weight", 0), (digest, 8, "weight_minor", 0), (digest, 8, "weight", 1)]
    assert [cached_factors(*other) for other in others] == [None] * 3
    # What the cache holds is what factorise returns.
    store(Factors(-factors.outer_B, -factors.outer_A, factors.singular_values, digest), 8, *KEY)
    assert difference(factorise(weight, 8), factors) > 0.1
    assert not list(own_cache.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other entry"])
def test_a_damaged_cache_entry_is_computed_again(own_cache, damage):
    weight = matrix(50, 60)
    factors = factorise(weight, 8)
    (entry,) = own_cache.rglob("*.safetensors")
    data = bytearray(entry.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    if damage == "other entry":
        factorise(matrix(50, 60, seed=9), 8)
        (other,) = set(own_cache.rglob("*.safetensors")) - {entry}
        data = other.read_bytes()
    entry.write_bytes({"truncate": data[:-7], "empty": b""}.get(damage, data))
    with pytest.warns(UserWarning, match="damaged"):
        again = factorise(weight, 8)
    assert difference(factors, again) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factorise(weight, 8)


def test_the_cache_can_be_switched_off_or_unwritable(tmp_path, monkeypatch):
    monkeypatch.setenv("NORA_CACHE_DIR", "")
    weight = matrix(20, 20)
    factors = factorise(weight, 4)
    assert cached_factors(fingerprint(weight), 4, "weight", 0) is None
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NORA_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning) as told:
        assert difference(factorise(weight, 4), factors) == 0
        factorise(matrix(20, 20, seed=1), 4)  # whose entry is in another sub-folder
    (warning,) = told
    assert f"in {tmp_path / 'file'} (" in str(warning.message)
    assert "NORA_CACHE_DIR" in str(warning.message)


def test_two_threads_at_once_leave_the_thread_count_as_it_was():
    """Each finds the count that the process has, not the 1 of the other's workers."""

    def count_of_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    def work(size):
        torch.manual_seed(size)
        return factorise_many([FactorJob(torch.randn(size, size), 8)] * 2, workers=2)

    own = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(2) as pool:
            # The second starts while the first works, and ends after it.
            first = pool.submit(work, 200)
            while not first.done() and count_of_new_thread() == 3:
                pass
            second = pool.submit(work, 400)
            first.result(), second.result()
        assert count_of_new_thread() == 3
    finally:
        torch.set_num_threads(own)


def test_seeded_matrices_are_the_same_for_ever():
    """The words of Philox are guaranteed; these digits pin what is made of them."""
    block = seeded_orthonormal(4, 2, 0, "test")
    assert torch.allclose(block.T @ block, torch.eye(2, dtype=torch.float64), atol=1e-14)
    expected = [
        [0.671043870478, -0.119594221212],
        [-0.07689527995, 0.821215902582],
        [0.273819168365, -0.413361573613],
        [0.684697234441, 0.374745077432],
    ]
    assert torch.allclose(block, torch.tensor(expected, dtype=torch.float64), atol=1e-11)


class OnMps(torch.Tensor):
    """Stands for a tensor on Apple's GPU, which has no float64."""

    @property
    def device(self):
        return torch.device("mps")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        if any(value is torch.float64 for value in given):
            raise TypeError("Cannot convert a MPS Tensor to float64")
        result = super().__torch_function__(func, types, args, kwargs)
        away = any(isinstance(value, torch.device) and value.type == "cpu" for value in given)
        return result.as_subclass(torch.Tensor) if away else result


@pytest.mark.parametrize("basis", ["weight", "activation"])
def test_a_device_without_float64_gets_the_same_factors(monkeypatch, basis):
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    statistics = torch.rand(40) if basis == "activation" else None
    expected = factorise(weight, 8, basis, statistics=statistics, use_cache=False)
    went = []
    monkeypatch.setattr(Factors, "to", lambda factors, device: (went.append(device), factors)[1])
    with pytest.raises(TypeError, match="float64"):
        weight.as_subclass(OnMps).to(torch.float64)
    given = None if statistics is None else statistics.as_subclass(OnMps)
    found = factorise(
        weight.as_subclass(OnMps), 8, basis, statistics=given, fingerprint="x", use_cache=False
    )
    for part in ("outer_A", "outer_B", "singular_values"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert went == [torch.device("mps")]
