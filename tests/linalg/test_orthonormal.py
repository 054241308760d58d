"""Orthonormal columns by products alone, against QR."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.linalg.low_rank import initial_subspace, subspace
from natgrad_jax.linalg.orthogonal_iteration import off_diagonal, refine
from natgrad_jax.linalg.orthonormal import orthonormal

pytestmark = pytest.mark.once


def factor(n: int, decay: float, dtype: Any) -> jax.Array:
    """A symmetric matrix with eigenvalues ``i^(−decay)``."""
    random = np.random.default_rng(n)
    Q = np.linalg.qr(random.normal(size=(n, n)))[0]
    return jnp.asarray((Q * np.arange(1.0, n + 1) ** -decay) @ Q.T, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("n", "k"), [(130, 64), (300, 64), (300, 140), (40, 1), (5, 5)])
def test_it_spans_what_qr_spans(n: int, k: int, decay: float, dtype: Any) -> None:
    with jax.enable_x64(True):
        F = factor(n, decay, dtype)
        Y = jax.jit(lambda F: F @ initial_subspace((n,), k, dtype))(F)
        Q, right = jax.jit(orthonormal)(Y), jnp.linalg.qr(Y)[0]
        assert Q.dtype == dtype
        rounding = float(jnp.finfo(dtype).eps) * k
        np.testing.assert_allclose(Q.T @ Q, np.eye(k), atol=200 * rounding)
        captured = lambda Q: float(jnp.trace(Q.T @ F @ Q))
        np.testing.assert_allclose(captured(Q), captured(right), rtol=200 * rounding)


def test_batches_and_lost_columns() -> None:
    Y = jnp.stack([jnp.eye(6)[:, :3], jnp.ones((6, 3)), jnp.zeros((6, 3))])
    Q = orthonormal(Y)
    np.testing.assert_allclose(Q[0], Y[0], atol=1e-5)
    assert np.isfinite(np.asarray(Q)).all()
    np.testing.assert_allclose(jnp.linalg.norm(Q[1].T @ jnp.ones(6)), 6**0.5, rtol=1e-4)
    assert not np.asarray(Q[2]).any()


def test_directions_come_back_after_a_factor_of_zeros() -> None:
    start = initial_subspace((200,), 64, jnp.float32)
    V, values = subspace(jnp.zeros((200, 200)), start)
    assert not np.asarray(values).any()
    F = factor(200, 1.0, jnp.float32)
    for _ in range(5):
        V, values = subspace(F, V)
    np.testing.assert_allclose(values[-8:], np.sort(1 / np.arange(1.0, 9)), rtol=1e-3)


def test_what_is_not_finite_stays_so() -> None:
    assert not np.isfinite(np.asarray(orthonormal(jnp.full((5, 2), jnp.nan)))).any()


@pytest.mark.parametrize("n", [5, 127, 128, 129, 300])
@pytest.mark.parametrize("rank", ["whole", "a third", "zero"])
def test_a_refined_basis_is_orthogonal_and_nearer_in_float32(n: int, rank: str) -> None:
    """Also where the factor is zero: from the identity, towards the eigenvectors."""
    columns = {"whole": n, "a third": n // 3, "zero": 0}[rank]
    rows = np.random.default_rng(n).normal(size=(n, columns)) / np.arange(1, columns + 1)
    F = jnp.asarray(rows @ rows.T, jnp.float32)
    Q, before = jnp.eye(n, dtype=jnp.float32), off_diagonal(F, jnp.eye(n, dtype=jnp.float32))
    for _ in range(10):
        Q, along = jax.jit(refine)(F, Q)
        np.testing.assert_allclose(Q.T @ Q, np.eye(n), atol=1e-5)
    assert off_diagonal(F, Q) <= 0.2 * before
    np.testing.assert_allclose(along.sum(), jnp.trace(F), rtol=1e-4)
