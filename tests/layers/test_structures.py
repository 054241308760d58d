"""Structures of factors against explicit matrices; names that have no meaning raise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.grouped_structures import Grouped, Shared
from natgrad_jax.layers.simple_structures import Dense, Diagonal, input_structure, output_structure
from natgrad_jax.layers.sketched import Sketched
from natgrad_jax.layers.traits import traits_of
from natgrad_jax.linalg.nystrom import sketched_inverse, sketched_subspace

PLACES, CHANNELS, N, T = 3, 5, 7, 2
STRUCTURES = {
    "dense": Dense(4),
    "diagonal": Diagonal(4),
    "sketched": Sketched(9, 3),
    "shared": Shared(PLACES, CHANNELS),
    "shared, bias": Shared(PLACES, CHANNELS, bias=True),
    "grouped": Grouped(1, CHANNELS, 2),
    "grouped, places, bias": Grouped(PLACES, CHANNELS, 2, bias=True),
    "grouped, shared, bias": Grouped(PLACES, CHANNELS, 2, bias=True, shared=True),
}


def rows_of(structure: FactorStructure) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (N, T, structure.size))
    return x.at[..., -1].set(1) if structure.bias_apart or structure.mean_included else x


def measured(structure: FactorStructure) -> tuple[jax.Array, jax.Array | None]:
    """A factor, and its entry at a bias apart."""
    factor = structure.gram(structure.rows(rows_of(structure)), jnp.dtype("float32"))
    return factor, jnp.asarray(2.0) if structure.bias_apart else None


def explicit(structure: FactorStructure, factor: jax.Array, bias: jax.Array | None) -> jax.Array:
    return structure.apply(factor, bias, jnp.eye(structure.packed))


@pytest.mark.parametrize("name", [*STRUCTURES, "shared, mean"])
def test_own_sums_are_cut_out_of_the_whole_matrix(name: str) -> None:
    structure = STRUCTURES.get(name, Shared(PLACES, CHANNELS, mean=True))
    x = rows_of(structure)
    own = structure.gram(structure.rows(x), jnp.dtype("float32"))
    whole = jnp.einsum("nti,ntj->ij", x, x)
    assert own.shape == structure.shape
    np.testing.assert_allclose(structure.narrow(whole), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_operators_against_the_explicit_matrix(name: str) -> None:
    structure = STRUCTURES[name]
    factor, bias = measured(structure)
    M = explicit(structure, factor, bias)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    close(structure.trace(factor, bias), jnp.trace(M))
    close(structure.squared_norm(factor, bias), jnp.sum(M**2))
    values = structure.spread(structure.eigenvalues(factor), bias)
    close(jnp.sort(values), jnp.linalg.eigvalsh(M))
    close(explicit(structure, structure.identity((), M.dtype), None), jnp.eye(structure.packed))
    x = jax.random.normal(jax.random.key(1), (2, structure.packed))
    if bias is None:  # none of a layer's outputs has one
        close(structure.apply_right(factor, x), x @ M)
    given = jax.random.normal(jax.random.key(2), (2, structure.size))
    close(structure.unpack(structure.pack(given, -1), -1), given)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name != "sketched"])
def test_eigenvectors_against_the_explicit_matrix(name: str) -> None:
    structure = STRUCTURES[name]
    factor, bias = measured(structure)
    basis, values = structure.direct_eigenbasis(factor) or jnp.linalg.eigh(factor)[::-1]
    x = jax.random.normal(jax.random.key(1), (structure.packed, 3))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    along = structure.spread(values, bias)[:, None] * structure.rotate(basis, x)
    close(structure.rotate_back(basis, along), structure.apply(factor, bias, x))
    close(structure.project(basis, x.T[:, None])[:, 0], structure.rotate(basis, x).T)
    close(structure.transport(x, basis, basis), x)
    found, left, norms = structure.along(factor, basis)
    close(found, values)
    close(left, 0 * values)
    close(norms, values**2)


def test_a_diagonal_is_inverted_directly() -> None:
    structure, damping = Diagonal(4), jnp.asarray(0.5)
    factor, _ = measured(structure)
    inverse = structure.direct_inverse(factor, damping)
    assert inverse is not None
    np.testing.assert_allclose(inverse, 1 / (factor + damping), rtol=1e-6)
    np.testing.assert_allclose(
        structure.inverse_error(factor, damping, inverse, jnp.eye(1)), 0, atol=1e-10
    )


def test_a_sketch_has_some_eigenvectors() -> None:
    structure, damping = STRUCTURES["sketched"], jnp.asarray(0.5)
    factor, _ = measured(structure)
    M = explicit(structure, factor, None)
    V, values = sketched_subspace(factor, 2)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    close(M @ V, V * values)
    close(structure.along(factor, V)[0], values)
    rows = jax.random.normal(jax.random.key(1), (N, T, structure.size))
    close(structure.project(V, rows), rows @ V)
    close(structure.rotate(V, rows[0].T), V.T @ rows[0].T)
    close(structure.mean_eigenvalue(factor), jnp.trace(M) / structure.size)
    inverse = sketched_inverse(factor, damping)
    close(structure.inverse_error(factor, damping, inverse, jnp.eye(structure.size)), 0)


def test_structures_are_chosen_by_what_is_asked_for() -> None:
    assert input_structure(1, 5, True) == Dense(6) == input_structure(1, 5, True, shared=True)
    assert input_structure(9, 5, True) == Dense(46)
    assert input_structure(9, 5, True, shared=True) == Shared(9, 5, bias=True)
    assert input_structure(9, 5, True, 2, True, True) == Shared(9, 5, mean=True)
    assert input_structure(9, 5, False, None, True, True) == Shared(9, 5)
    assert input_structure(9, 5, True, 8) == Grouped(9, 5, 5, bias=True)
    assert input_structure(1, 5, True, 8) == Grouped(1, 6, 6)
    assert output_structure(5) == Dense(5) and output_structure(5, 2) == Grouped(1, 5, 2)
    assert input_structure(1, 5, True, None, max_size=5, columns=2) == Sketched(6, 2)
    assert input_structure(9, 5, True, None, max_size=45, columns=2) == Shared(9, 5, bias=True)
    assert output_structure(5, None, 4, 2) == Sketched(5, 2)
    assert output_structure(5, None, 4) == Diagonal(5) and output_structure(5, None, 5) == Dense(5)
    assert output_structure(5, 2).describe() == "3 × 2²"


def test_an_unknown_kind_raises_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'dense', 'conv', 'embed'.*got 'convolution'"):
        traits_of("convolution")
