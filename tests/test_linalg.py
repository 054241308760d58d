"""Each algorithm on its own, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.linalg import cholesky, eigenbasis, orthogonal_iteration


@pytest.fixture(autouse=True)
def float64() -> Any:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("n", [1, 7, 128, 301])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_damped_inverse(n: int, batch: tuple[int, ...]) -> None:
    random = np.random.default_rng(n)
    root = random.normal(size=(*batch, n, max(n // 2, 1)))
    factor = root @ np.swapaxes(root, -1, -2)  # of half rank: damping makes it invertible
    damping = random.uniform(0.1, 1, size=batch)
    found = cholesky.damped_inverse(jnp.asarray(factor), jnp.asarray(damping))
    expected = np.linalg.inv(factor + damping[..., None, None] * np.eye(n))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_an_indefinite_matrix_gives_nan() -> None:
    found = cholesky.damped_inverse(jnp.diag(jnp.array([1.0, -2.0])), jnp.array(1.0))
    assert np.isnan(np.trace(found))


@pytest.mark.parametrize("n", [1, 6, 60])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_eigenbasis_and_its_refinement(n: int, batch: tuple[int, ...]) -> None:
    random = np.random.default_rng(n)
    Q, _ = np.linalg.qr(random.normal(size=(*batch, n, n)))
    values = np.sort(random.uniform(size=(*batch, n)) ** 4, axis=-1)
    factor = jnp.asarray((Q * values[..., None, :]) @ np.swapaxes(Q, -1, -2))
    basis, found = eigenbasis.eigenbasis(factor)
    np.testing.assert_allclose(found, values, atol=1e-12)
    rebuilt = (basis * found[..., None, :]) @ jnp.swapaxes(basis, -1, -2)
    np.testing.assert_allclose(rebuilt, factor, atol=1e-12)
    assert np.all(orthogonal_iteration.off_diagonal(factor, basis) < 1e-7)
    # from the eigenbasis of a matrix near by, steps come nearer and stay orthogonal
    other = random.normal(size=(*batch, n, n)) * 1e-3
    near = jnp.asarray(factor + other @ np.swapaxes(other, -1, -2))
    step = basis
    for _ in range(30):
        step, along = orthogonal_iteration.refine(near, step)
    eye = np.broadcast_to(np.eye(n), (*batch, n, n))
    np.testing.assert_allclose(jnp.swapaxes(step, -1, -2) @ step, eye, atol=1e-10)
    off = orthogonal_iteration.off_diagonal
    assert np.all(off(near, step) <= off(near, basis) + 1e-12)
    np.testing.assert_allclose(along.sum(-1), np.trace(near, axis1=-2, axis2=-1), rtol=1e-9)


def test_many_batches_at_once_finish() -> None:
    """Batched LAPACK calls of one program can wait for one another for ever on CPU."""
    factors = [jnp.eye(128) + jnp.zeros((8, 128, 128)) * i for i in range(6)]
    invert = jax.jit(lambda fs: [cholesky.damped_inverse(f, jnp.ones(8)) for f in fs])
    for found in invert(factors):
        np.testing.assert_allclose(found[0], np.eye(128) / 2, atol=1e-12)
