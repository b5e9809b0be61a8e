"""Outer factors: a deterministic truncated factorisation of a frozen weight.

``U`` (`outer_B`) and ``V`` (`outer_A`) are never stored in a compact adapter file, so they must
come out the same wherever the same weight bytes are found: float64, a start matrix from a
counter-based generator, canonical signs and a canonical basis inside any cluster of equal singular
values. On a slowly decaying spectrum the last vectors are an approximation of the weight's own
singular vectors, but a deterministic one, and ``U^T W = diag(s) V`` holds by construction.
"""

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import factor_cache
from .factor_cache import Factors, cached_factors, fingerprint

__all__ = [
    "BASES",
    "Basis",
    "DATA_BASES",
    "FactorJob",
    "Factors",
    "cached_factors",
    "factorise",
    "factorise_many",
    "fingerprint",
    "seeded_orthonormal",
]

Basis = Literal["weight", "weight_minor", "activation", "gradient", "random"]
BASES: tuple[Basis, ...] = ("weight", "weight_minor", "activation", "gradient", "random")
#: Bases that need statistics of data beside the weight, so that their files must carry the factors.
DATA_BASES: tuple[Basis, ...] = ("activation", "gradient")

# torch ships no annotations for its linear algebra.
_linalg: Any = torch.linalg

_POOL = threading.Lock()  # the thread count is the process's, so one pool at a time changes it

_OVERSAMPLING = 8
# Shares of the largest singular value. Values closer together than the first have no individual
# vectors that float64 could reproduce; those below the second are the rounding of a float32 zero.
_CLUSTER_TOLERANCE = 1e-8
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FactorJob:
    """One weight to factorise: arguments of `factorise`, and the name to use in errors."""

    weight: Tensor
    r: int
    basis: Basis = "weight"
    seed: int = 0
    statistics: Tensor | None = None
    name: str = "weight"


def factorise(
    weight: Tensor,
    r: int,
    basis: Basis = "weight",
    seed: int = 0,
    statistics: Tensor | None = None,
    fingerprint: str | None = None,
    use_cache: bool = True,
) -> Factors:
    """Compute the outer factors of one weight (NoRA paper, section 3; docs/method.md).

    Args:
        weight: ``(out, in)``, any float dtype and device; a convolution is unfolded by the caller.
        r: Outer rank, at least 1; lowered to ``min(out, in)`` where it is larger.
        basis: One of `BASES`.
        seed: Seed of the start matrix, of the random basis and of the directions that complete a
            rank-deficient weight.
        statistics: For ``"activation"`` the mean absolute input ``(in,)``; for ``"gradient"`` the
            averaged weight gradient ``(out, in)``; otherwise None.
        fingerprint: Digest of the weight's bytes if the caller has it; computed otherwise.
        use_cache: Read and write the cache on disk (only for bases derived from the weight alone).

    Returns:
        Float32 factors on the device of ``weight``: orthonormal columns `outer_B` ``(out, r)``,
        orthonormal rows `outer_A` ``(r, in)``, `singular_values` ``(r,)`` in descending order.

    Raises:
        ValueError: The weight is not a matrix or holds NaN or infinity, `r` is below 1, the basis
            is unknown, or its statistics are missing or have the wrong shape.
    """
    _check_arguments(weight, r, basis, statistics)
    r = min(r, *weight.shape)
    if fingerprint is None:
        fingerprint = factor_cache.fingerprint(weight)
    use_cache = use_cache and basis in ("weight", "weight_minor")
    if use_cache:
        found = cached_factors(fingerprint, r, basis, seed)
        if found is not None and _shapes_match(found, weight, r):
            return found.to(weight.device)

    # MPS has no float64, nor may it be asked for one on the way; every other device computes where
    # the weight lies.
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    matrix = weight.detach().to(device).to(torch.float64)
    # A float64 sum of narrower floats cannot overflow, and is ten times faster than isfinite.
    if not math.isfinite(float(matrix.sum())):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinite values, so it has no "
            "factors; reload or repair the base model, or exclude the module (exclude_modules)"
        )
    if statistics is not None:
        statistics = statistics.detach().to(device).to(torch.float64)
    outer_B, singular_values, outer_A = _outer_basis(matrix, r, basis, seed, statistics)
    factors = Factors(
        outer_B=outer_B.to(torch.float32).contiguous(),
        outer_A=outer_A.to(torch.float32).contiguous(),
        singular_values=singular_values.to(torch.float32).contiguous(),
        fingerprint=fingerprint,
    ).to(weight.device)
    if use_cache:
        factor_cache.store(factors, r, basis, seed)
    return factors


def factorise_many(jobs: Sequence[FactorJob], workers: int | None = None) -> list[Factors]:
    """Factorise several weights side by side, in single-threaded workers.

    A truncated factorisation of a few hundred rows scales badly over the threads of one matrix
    product, so one module a core is faster than one module on all cores.

    Args:
        jobs: The weights and what to make of them.
        workers: Threads to use; the CPU count by default. Weights on an accelerator run one by one.

    Returns:
        One `Factors` a job, in the order of the jobs.

    Raises:
        ValueError: As `factorise`.
    """

    def run(job: FactorJob) -> Factors:
        try:
            return factorise(job.weight, job.r, job.basis, job.seed, job.statistics)
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from error

    on_cpu = all(job.weight.device.type in ("cpu", "mps") for job in jobs)
    workers = min(workers or len(_usable_cpus()), len(jobs))
    if workers < 2 or not on_cpu:
        return [run(job) for job in jobs]
    # The largest first, so that no worker starts a long one when the others have finished.
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].weight.numel())
    with _POOL, ThreadPoolExecutor(1) as fresh:
        # The count of the process, which a new thread starts with: that of a thread whose first
        # use of torch fell into another's pool is 1.
        threads = fresh.submit(torch.get_num_threads).result()
        torch.set_num_threads(1)
        try:
            # OpenMP keeps its thread count per thread, hence the initializer as well.
            with ThreadPoolExecutor(workers, initializer=lambda: torch.set_num_threads(1)) as pool:
                futures = {index: pool.submit(run, jobs[index]) for index in order}
                return [futures[index].result() for index in range(len(jobs))]
        finally:
            torch.set_num_threads(threads)


def seeded_orthonormal(rows: int, columns: int, seed: int, purpose: str) -> Tensor:
    """Return a float64 ``(rows, columns)`` matrix with orthonormal columns, the same everywhere.

    Args:
        rows: At least ``columns``.
        columns: Number of orthonormal columns.
        seed: Any integer.
        purpose: Keeps matrices of one seed and shape apart when they serve different ends.
    """
    return _positive_qr(_start_matrix(rows, columns, seed, purpose))


def _usable_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _check_arguments(weight: Tensor, r: int, basis: str, statistics: Tensor | None) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight must be a non-empty matrix (out, in), got {tuple(weight.shape)}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if basis not in BASES:
        raise ValueError(f"basis must be one of {', '.join(BASES)}, got {basis!r}")
    expected = {"activation": (weight.shape[1],), "gradient": tuple(weight.shape)}.get(basis)
    given = None if statistics is None else tuple(statistics.shape)
    if given != expected:
        raise ValueError(
            f"basis={basis!r} takes statistics of shape {expected} for a weight "
            f"{tuple(weight.shape)}, got {given}"
        )


def _shapes_match(factors: Factors, weight: Tensor, r: int) -> bool:
    rows, columns = weight.shape
    return factors.outer_B.shape == (rows, r) and factors.outer_A.shape == (r, columns)


def _outer_basis(
    matrix: Tensor, r: int, basis: Basis, seed: int, statistics: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U (out, r), s (r,), V (r, in)`` in float64."""
    rows, columns = matrix.shape
    if basis == "weight":
        return _singular_triplets(matrix, r, seed)
    if basis == "weight_minor":
        # The last singular vectors have no cheap iteration that a rank-deficient weight survives.
        left, values, right = _singular_triplets(matrix, min(rows, columns), seed)
        return left[:, -r:], values[-r:], right[-r:]
    if basis == "random":
        left = seeded_orthonormal(rows, r, seed, "left").to(matrix)
        right = seeded_orthonormal(columns, r, seed, "right").to(matrix).mT
    elif basis == "gradient":
        assert statistics is not None
        left, _, right = _singular_triplets(statistics, r, seed)
    else:
        # ICCV version, section 3.2: inputs weigh in by the root of their mean magnitude; the scaled
        # right vectors are un-scaled again and made orthonormal by QR.
        assert statistics is not None
        scale = statistics.clamp_min(0).sqrt()
        scale = scale + max(1e-6 * float(scale.max()), 1e-12)
        left, _, right = _singular_triplets(matrix * scale, r, seed)
        right = _positive_qr((right / scale).mT).mT
    # These bases do not diagonalise W: their values are those of the core U^T W V^T.
    values = _linalg.svdvals(left.mT @ matrix @ right.mT)
    return left, values, right


def _singular_triplets(matrix: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top ``r`` triplets with canonical bases, completion and signs."""
    if min(matrix.shape) <= 2 * r:
        left, values, right = _linalg.svd(matrix, full_matrices=False)
    else:
        span = _dominant_subspace(matrix, r + _OVERSAMPLING, seed)
        # The small factorisation: span^T W = B S V, so that U = span B gives U^T W = S V exactly.
        small, values, small_left = _linalg.svd(matrix.mT @ span, full_matrices=False)
        left, right = span @ small_left.mT, small.mT
    left, right = _canonical_clusters(left, values, right, seed)
    left, values, right = left[:, :r], values[:r], right[:r]
    # A weight of lower rank determines only its first directions; seeded ones complete the rest.
    rank = int((values > _RANK_TOLERANCE * values[0]).sum())
    if rank < r:
        values = torch.where(torch.arange(r, device=values.device) < rank, values, 0.0)
        left = _complete(left[:, :rank], r, seed, "left")
        right = _complete(right[:rank].mT, r, seed, "right").mT
    signs = _canonical_signs(left)
    return left * signs, values, right * signs[:, None]


def factorise_flops(rows: int, columns: int, r: int) -> float:
    """Multiplications and additions of `factorise` on a weight ``(rows, columns)``, in float64.

    Counted are the products with the weight; where the weight is small enough for the exact SVD,
    LAPACK's as Golub and Van Loan (2013, figure 8.6.1) count it. What is left out, the QR and SVD
    of blocks of ``r + 8`` columns, is a share of about ``(r + 8) / min(rows, columns)``.
    """
    short, long = min(rows, columns), max(rows, columns)
    if short <= 2 * r:
        return 6.0 * long * short**2 + 20.0 * short**3
    products = 2 + 2 * _filter_degree((rows, columns))  # start, two a step, the small factorisation
    return 2.0 * products * rows * columns * (r + _OVERSAMPLING)


def _filter_degree(shape: Sequence[int]) -> int:
    """Enough to capture 99 % of the energy of Gaussian noise, the flattest spectrum there is."""
    return 5 if min(shape) <= 1280 else 8


def _dominant_subspace(matrix: Tensor, columns: int, seed: int) -> Tensor:
    """Seeded subspace iteration with a Chebyshev filter: ``(out, columns)``, orthonormal.

    A plain power iteration (Halko et al. 2011, algorithm 4.4) misses 5 % of the energy of a weight
    whose spectrum hardly decays. Shifting each iteration by a root of the Chebyshev polynomial on
    ``[0, smallest Ritz value]`` damps exactly the part that is not wanted, at the same cost.
    """
    degree = _filter_degree(matrix.shape)
    start = _start_matrix(matrix.shape[1], columns, seed, "span").to(matrix)
    span, _ = _orthonormalise(matrix @ start)
    for index in reversed(range(degree)):
        root = (1 + math.cos(math.pi * (2 * index + 1) / (2 * degree))) / 2
        # Orthonormal after each product, not after two: small directions then lose cond * eps of
        # their digits instead of cond^2 * eps. With W^T Q = Z R the shifted block is
        # (W W^T - shift) Q R^-1 = W Z - shift Q R^-1, whose span is the same.
        image, upper = _orthonormalise(matrix.mT @ span)
        ritz = _linalg.svdvals(upper).square()
        block = matrix @ image
        if bool(ritz[-1] > _RANK_TOLERANCE**2 * ritz[0]):
            inverse = _linalg.solve_triangular(upper, span, upper=True, left=False)
            block = block - (root * ritz[-1]) * inverse
        span, _ = _orthonormalise(block)
    # One Cholesky-QR leaves an error of cond^2 * eps, the second removes it.
    return _orthonormalise(span)[0]


def _orthonormalise(block: Tensor) -> tuple[Tensor, Tensor]:
    """QR by Cholesky, several times faster on tall blocks than Householder, its fallback."""
    cholesky, info = _linalg.cholesky_ex(block.mT @ block)
    pivots = cholesky.diagonal()
    # Beyond a condition number of about 1e6 the Gram matrix has lost most of float64's digits.
    if int(info) != 0 or not bool(pivots.min() > 1e-6 * pivots.max()):
        return _linalg.qr(block)
    upper = cholesky.mT
    return _linalg.solve_triangular(upper, block, upper=True, left=False), upper


def _canonical_clusters(
    left: Tensor, values: Tensor, right: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Turn the vectors inside each cluster of equal values to a basis that rounding cannot move.

    Any rotation inside such a cluster is a valid answer of the SVD, and which one comes out depends
    on the order of summation. A fixed matrix projected onto the cluster's span picks one of them.
    """
    joined = (values[:-1] - values[1:]) <= _CLUSTER_TOLERANCE * values[0]
    if not bool(joined.any()):
        return left, right
    left, right = left.clone(), right.clone()
    ends = [int(end) + 1 for end in torch.nonzero(~joined)]
    bounds = [0, *ends, len(values)]
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        # Null directions are replaced by `_complete` whatever they are.
        if end - begin < 2 or bool(values[begin] <= _RANK_TOLERANCE * values[0]):
            continue
        fixed = _start_matrix(left.shape[0], end - begin, seed, "cluster").to(left)
        rotation = _positive_qr(left[:, begin:end].mT @ fixed)
        left[:, begin:end] = left[:, begin:end] @ rotation
        right[begin:end] = rotation.mT @ right[begin:end]
    return left, right


def _complete(columns: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """Extend orthonormal ``columns`` by seeded directions to ``count`` of them."""
    extra = _start_matrix(columns.shape[0], count - columns.shape[1], seed, purpose).to(columns)
    for _ in range(2):  # one projection leaves rounding that the second removes
        extra = _positive_qr(extra - columns @ (columns.mT @ extra))
    return torch.cat([columns, extra], dim=1)


def _positive_qr(block: Tensor) -> Tensor:
    """Q of the QR with a positive diagonal of R, which makes it unique."""
    orthonormal, upper = _linalg.qr(block)
    return orthonormal * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def _canonical_signs(left: Tensor) -> Tensor:
    """Signs that make the largest entry of every column positive; the first of equals decides."""
    magnitude = left.abs()
    largest = (magnitude >= (1 - 1e-6) * magnitude.amax(dim=0)).to(torch.int8).argmax(dim=0)
    return torch.where(left.gather(0, largest[None])[0] < 0, -1.0, 1.0)


def _start_matrix(rows: int, columns: int, seed: int, purpose: str) -> Tensor:
    """Uniform entries in (-1, 1) from raw Philox words.

    Numpy guarantees the words of a bit generator for ever, unlike the streams of its distributions.
    """
    key = np.random.SeedSequence([*purpose.encode(), rows, columns, seed & (2**64 - 1)])
    words = np.random.Philox(key).random_raw(rows * columns)
    entries = (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    return torch.as_tensor(entries.reshape(rows, columns))
