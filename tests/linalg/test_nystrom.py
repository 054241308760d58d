"""Sketches of matrices against the matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.linalg import low_rank, nystrom
from natgrad_jax.linalg.gram import gram

N, K = 60, 20


def matrix(rank: int, seed: int = 0) -> np.ndarray:
    """Of eigenvalues 1, 1/2, 1/4, …"""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(N, rank)))[0]
    return (Q * 0.5 ** np.arange(rank)) @ Q.T


def test_signs_are_the_same_everywhere_and_as_good_as_random() -> None:
    few = np.asarray(nystrom.signs(2**16, 4, jnp.dtype("float32")))
    assert [int(x) for x in few[:: 2**12, 0]] == [
        -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1, -1, 1,
    ]  # fmt: skip
    assert set(np.unique(few)) == {-1, 1}
    many = np.asarray(nystrom.signs(5000, 127, jnp.dtype("float32")))
    assert np.array_equal(many[:, :4], few[:5000])
    # of random signs: 1 ± √(127 / 5000), Marchenko & Pastur
    singular = np.linalg.svd(many, compute_uv=False) / 5000**0.5
    assert 0.83 < singular[-1] < singular[0] < 1.17


@pytest.mark.parametrize("rank", [1, K])
def test_a_matrix_of_small_rank_is_found_exactly(rank: int) -> None:
    with jax.enable_x64(True):
        F = jnp.stack([matrix(rank), matrix(rank, 1)])
        found = nystrom.sketched_matrix(nystrom.sketch_of(F, K)).as_matrix()
        np.testing.assert_allclose(found, F, atol=1e-8)


def test_any_other_is_approximated_from_below_nearly_as_well_as_it_can_be() -> None:
    with jax.enable_x64(True):
        F = jnp.asarray(matrix(N))
        Q, T, trace = nystrom.decomposed(nystrom.sketch_of(F, K))
        left = np.linalg.eigvalsh(F - Q @ T @ Q.T)
        assert left[0] > -1e-8 and left[-1] < 0.5 ** (K - 6)
        np.testing.assert_allclose(trace, jnp.trace(F))
        standing = nystrom.sketched_matrix(nystrom.sketch_of(F, K)).as_matrix()
        np.testing.assert_allclose(jnp.trace(standing), trace)


def test_sketches_are_sums_over_rows() -> None:
    rows = jax.random.normal(jax.random.key(0), (7, 3, 2, N))
    dtype = jnp.dtype("float32")
    whole = nystrom.sketch_of(gram(rows, dtype), 5)
    np.testing.assert_allclose(nystrom.sketched_gram(rows, 5, dtype), whole, rtol=1e-4, atol=1e-3)
    each = [nystrom.sketched_gram(rows[i : i + 1], 5, dtype) for i in range(7)]
    np.testing.assert_allclose(sum(each), whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 8])
def test_the_inverse_is_that_of_the_matrix_it_stands_for(rank: int | None) -> None:
    with jax.enable_x64(True):
        sketch = nystrom.sketch_of(jnp.stack([matrix(N), matrix(N, 1)]), K)
        standing = nystrom.sketched_matrix(sketch).as_matrix()
        d = jnp.array([1e-3, 0.1])
        if rank is None:
            found = nystrom.sketched_inverse(sketch, d)
            wanted = jnp.linalg.inv(standing + d[:, None, None] * jnp.eye(N))
        else:
            start = jnp.linalg.eigh(standing)[1][..., -rank:]
            found = nystrom.sketched_inverse(sketch, d, start)
            wanted = low_rank.low_rank_inverse(standing, d, start).as_matrix()
        np.testing.assert_allclose(found.as_matrix(), wanted, rtol=1e-5, atol=1e-5)
        V, values = nystrom.sketched_subspace(sketch, 3)
        np.testing.assert_allclose(standing @ V, V * values[:, None], atol=1e-8)


def test_nothing_has_the_inverse_of_its_damping() -> None:
    found = nystrom.sketched_inverse(jnp.zeros((N, K + 1)), jnp.array(0.5))
    np.testing.assert_allclose(found.as_matrix(), 2 * jnp.eye(N), rtol=1e-5, atol=1e-5)
