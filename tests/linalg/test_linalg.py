"""Each algorithm on its own, against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.linalg import (
    cholesky,
    eigh,
    gram,
    low_rank,
    newton_schulz,
    orthogonal_iteration,
    pseudo_inverse,
    retry,
    woodbury,
)
from natgrad_jax.linalg.batched_solve import Problem, in_stacks

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("float64")]


@pytest.mark.parametrize("n", [1, 7, 128, 515])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_damped_inverse(n: int, batch: tuple[int, ...]) -> None:
    random = np.random.default_rng(n)
    root = random.normal(size=(*batch, n, max(n // 2, 1)))
    factor = root @ np.swapaxes(root, -1, -2)  # of half rank: damping makes it invertible
    damping = random.uniform(0.1, 1, size=batch)
    found = jax.jit(cholesky.damped_inverse)(factor, damping)
    expected = np.linalg.inv(factor + damping[..., None, None] * np.eye(n))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 64, 150])
def test_upper_factor(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = np.random.default_rng(n).normal(size=(n, n))
    M = root @ root.T + np.eye(n)
    found = cholesky.upper_factor(jnp.asarray(M))
    np.testing.assert_allclose(found, np.linalg.cholesky(M).T, rtol=1e-11, atol=1e-11)
    assert np.isnan(cholesky.upper_factor(jnp.asarray(M - 2 * np.trace(M) * np.eye(n)))).any()
    monkeypatch.setattr(cholesky, "OWN", 1)  # LAPACK's
    np.testing.assert_allclose(found, cholesky.upper_factor(jnp.asarray(M)), rtol=1e-11, atol=1e-11)


def test_upper_factor_is_as_stable_as_lapacks() -> None:
    root = np.random.default_rng(0).normal(size=(300, 40)) @ np.diag(10.0 ** -np.arange(40))
    M = root @ root.T + 16 * np.finfo(float).eps * np.trace(root @ root.T) * np.eye(300)
    U = np.asarray(cholesky.upper_factor(jnp.asarray(M)))
    assert np.linalg.norm(U.T @ U - M) < 4e-16 * np.linalg.norm(M)


@pytest.mark.parametrize("n", [2, 515])
@pytest.mark.parametrize("at", [0, -1])
def test_an_indefinite_matrix_gives_nan(n: int, at: int) -> None:
    found = cholesky.damped_inverse(jnp.eye(n).at[at, at].set(-2.0), jnp.array(1.0))
    assert np.isnan(np.trace(found))


@pytest.mark.parametrize("n", [1, 6, 60])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_eigenbasis_and_its_refinement(n: int, batch: tuple[int, ...]) -> None:
    random = np.random.default_rng(n)
    Q, _ = np.linalg.qr(random.normal(size=(*batch, n, n)))
    values = np.sort(random.uniform(size=(*batch, n)) ** 4, axis=-1)
    factor = jnp.asarray((Q * values[..., None, :]) @ np.swapaxes(Q, -1, -2))
    off, refine = jax.jit(orthogonal_iteration.off_diagonal), jax.jit(orthogonal_iteration.refine)
    basis, found = map(np.asarray, jax.jit(eigh.eigenbasis)(factor))
    np.testing.assert_allclose(found, values, atol=1e-12)
    rebuilt = (basis * found[..., None, :]) @ np.swapaxes(basis, -1, -2)
    np.testing.assert_allclose(rebuilt, factor, atol=1e-12)
    assert np.all(off(factor, basis) < 1e-7)
    # from the eigenbasis of a matrix near by, steps come nearer and stay orthogonal
    other = random.normal(size=(*batch, n, n)) * 1e-3
    near = jnp.asarray(factor + other @ np.swapaxes(other, -1, -2))
    step = basis
    for _ in range(30):
        step, along = refine(near, step)
    eye = np.broadcast_to(np.eye(n), (*batch, n, n))
    np.testing.assert_allclose(np.swapaxes(step, -1, -2) @ np.asarray(step), eye, atol=1e-10)
    assert np.all(off(near, step) <= off(near, basis) + 1e-12)
    np.testing.assert_allclose(along.sum(-1), np.trace(near, axis1=-2, axis2=-1), rtol=1e-9)


def test_many_batches_at_once_finish() -> None:
    """Batched LAPACK calls of one program can wait for one another for ever on CPU."""
    factors = [jnp.eye(128) + jnp.zeros((8, 128, 128)) * i for i in range(6)]
    invert = jax.jit(lambda fs: [cholesky.damped_inverse(f, jnp.ones(8)) for f in fs])
    for found in invert(factors):
        np.testing.assert_allclose(found[0], np.eye(128) / 2, atol=1e-12)


def spd(n: int, rank: int, seed: int = 0, batch: tuple[int, ...] = ()) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(*batch, n, rank))
    return root @ np.swapaxes(root, -1, -2) / rank


@pytest.mark.parametrize("n, rank", [(1, 1), (9, 9), (40, 13)])
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_pseudo_inverse(n: int, rank: int, batch: tuple[int, ...]) -> None:
    factor = spd(n, rank, batch=batch)
    found = pseudo_inverse.pseudo_inverse(jnp.asarray(factor), jnp.zeros(batch), 1e-10)
    np.testing.assert_allclose(found, np.linalg.pinv(factor, rcond=1e-10), rtol=1e-7, atol=1e-7)
    damped = pseudo_inverse.pseudo_inverse(jnp.asarray(factor), jnp.full(batch, 0.3))
    np.testing.assert_allclose(damped, np.linalg.inv(factor + 0.3 * np.eye(n)), atol=1e-9)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_woodbury_and_sherman_morrison(batch: tuple[int, ...]) -> None:
    M = spd(12, 30, batch=batch)
    U = np.random.default_rng(1).normal(size=(*batch, 12, 4))
    found = woodbury.woodbury(jnp.linalg.inv(M), jnp.asarray(U), jnp.array(0.7))
    expected = np.linalg.inv(0.7 * M + 0.3 * U @ np.swapaxes(U, -1, -2))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    one = woodbury.sherman_morrison(jnp.linalg.inv(M), jnp.asarray(U[..., 0]), jnp.array(0.7))
    u = U[..., :1]
    expected = np.linalg.inv(0.7 * M + 0.3 * u @ np.swapaxes(u, -1, -2))
    np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [5, 8, 30])
def test_root_is_exact_for_small_ranks(rank: int) -> None:
    F = spd(30, 5)
    U = np.asarray(woodbury.root(jnp.asarray(F), rank))
    np.testing.assert_allclose(U @ U.T, F, atol=1e-9)


def test_root_of_nothing_is_nothing() -> None:
    assert np.abs(woodbury.root(jnp.zeros((4, 4)), 2)).max() < 1e-12


@pytest.mark.parametrize("batch", [(), (2,)])
def test_low_rank_inverse(batch: tuple[int, ...]) -> None:
    """Exact for k large eigenvalues above equal ones; the iteration converges from anywhere."""
    Q = np.linalg.qr(np.random.default_rng(0).normal(size=(*batch, 20, 20)))[0]
    values = np.concatenate([np.linspace(10, 30, 4), np.full(16, 0.2)])
    F = (Q * values) @ np.swapaxes(Q, -1, -2)
    V = low_rank.initial_subspace((*batch, 20), 4, jnp.float64)
    for _ in range(8):
        found = low_rank.low_rank_inverse(jnp.asarray(F), jnp.full(batch, 0.5), V)
        V = found.V
    expected = np.linalg.inv(F + 0.5 * np.eye(20))
    np.testing.assert_allclose(found.as_matrix(), expected, atol=1e-10)
    x = np.random.default_rng(1).normal(size=(*batch, 20, 3))
    np.testing.assert_allclose(found.apply(jnp.asarray(x)), expected @ x, atol=1e-10)


def test_subspace_finds_leading_eigenpairs() -> None:
    F = spd(50, 60)
    V = low_rank.initial_subspace((50,), 50, jnp.float64)
    V, values = low_rank.subspace(jnp.asarray(F), V)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(F), atol=1e-9)  # rank n: exact
    np.testing.assert_allclose(V.T @ V, np.eye(50), atol=1e-10)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_failed_factorisation_takes_more_damping(batch: tuple[int, ...]) -> None:
    """Tenfold until positive definite; the others of a batch are not touched."""
    factor = np.broadcast_to(np.diag([1.0, -0.5]), (*batch, 2, 2)).copy()
    factor[..., 1, 1] *= np.arange(1, 1 + np.prod(batch, dtype=int)).reshape(batch) % 3
    damping = np.full(batch, 0.01)
    found, failures = retry.raised(
        jnp.asarray(factor), jnp.asarray(damping), op=cholesky.damped_inverse
    )
    expected = {-0.5: 2, -1.0: 3, 0.0: 0}
    assert failures.tolist() == np.vectorize(expected.get)(factor[..., 1, 1]).tolist()
    lam = damping * 10.0**failures
    inverse = np.linalg.inv(factor + lam[..., None, None] * np.eye(2))
    np.testing.assert_allclose(found, inverse, rtol=1e-12)


def test_a_hopeless_factorisation_ends() -> None:
    nothing = lambda factor, damping: factor * jnp.nan
    found, failures = retry.raised(jnp.eye(2), jnp.array(1.0), op=nothing)
    assert failures == retry.ATTEMPTS and np.isnan(found).all()


def test_problems_of_nearly_equal_size_are_filled_up() -> None:
    """With zeros, which changes no result, and so they are one call of one program."""
    shapes = []

    def inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
        shapes.append(factor.shape)
        return cholesky.damped_inverse(factor, damping)

    given = [(jnp.asarray(spd(n, 2 * n)), jnp.array(0.1)) for n in (30, 31, 100, 101)]
    found = in_stacks([Problem(inverse, args, fills=True) for args in given])
    assert shapes == [(2, 32, 32), (2, 104, 104)]
    for args, x in zip(given, found, strict=True):
        np.testing.assert_allclose(x, inverse(*args), atol=1e-12)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_low_rank_on_both_sides_at_once(batch: tuple[int, ...]) -> None:
    left, right = (
        low_rank.low_rank_inverse(
            jnp.asarray(spd(n, n, batch=batch)),
            jnp.full(batch, 0.2),
            low_rank.initial_subspace((*batch, n), k, float),
        )
        for n, k in ((12, 3), (9, 2))
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*batch, 12, 9)))
    expected = left.as_matrix() @ x @ right.as_matrix()
    np.testing.assert_allclose(low_rank.between(left, x, right), expected, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_newton_schulz(batch: tuple[int, ...], damping: float) -> None:
    """From nothing, and in few rounds from the inverse of a matrix near by."""
    factor = spd(20, 10, batch=batch)
    lam, eye = np.full(batch, damping), np.eye(20)
    last = np.broadcast_to(eye, factor.shape)
    found = newton_schulz.newton_schulz_inverse(*map(jnp.asarray, (factor, lam, last)))
    expected = np.linalg.inv(factor + damping * eye)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    later = newton_schulz.newton_schulz_inverse(jnp.asarray(1.1 * factor), jnp.asarray(lam), found)
    expected = np.linalg.inv(1.1 * factor + damping * eye)
    np.testing.assert_allclose(later, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_newton_schulz_that_does_not_converge_is_nan() -> None:
    indefinite = jnp.diag(jnp.array([1.0, -2.0]))
    found = newton_schulz.newton_schulz_inverse(indefinite, jnp.array(0.5), jnp.eye(2))
    assert np.isnan(found).all()


@pytest.mark.parametrize(
    ("backend", "precision"), [("cpu", "HIGHEST"), ("gpu", "HIGH"), ("tpu", "HIGHEST")]
)
def test_gram_matrices_are_in_tf32_on_gpus_alone(backend, precision, monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jaxpr = jax.make_jaxpr(lambda rows: gram.gram(rows, rows.dtype))(jnp.ones((4, 1, 3)))
    assert set(re.findall(r"Precision\.(\w+)", str(jaxpr))) == {precision}
