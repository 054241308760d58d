"""Each algorithm on its own, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.linalg import cholesky


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
