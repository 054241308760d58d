"""Coordinates of a layer in which an optimizer runs: ``K̄ = L_A K̂ L_Gᵀ``.

L_A and L_G are each an orthogonal matrix and a scale, ``L = Q diag(s)``, so that the inverse needs
no second matrix; inputs may be centred too. Whitening has ``Q = Ũ``, ``s = (σ + ε)^{-1/2}``: in the
paper's letters ``U = diag(s) Qᵀ``. With k leading eigenvectors V alone and one scale r for all
other directions, ``L = V diag(s) Vᵀ + r (I − V Vᵀ)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from natgrad_jax.curvature import damping_split
from natgrad_jax.curvature.factor_averages import zero_factors
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.batched_solve import Problem, Solving, alone
from natgrad_jax.linalg.batching import trace_of
from natgrad_jax.linalg.eigh import eigenbasis
from natgrad_jax.linalg.low_rank import (
    from_eigenpairs,
    initial_subspace,
    is_cheaper,
    subspace,
)
from natgrad_jax.utils.precision import HIGHEST
from natgrad_jax.utils.short_repr import printed_short


@printed_short
class Coordinates(NamedTuple):
    """One layer's coordinates; a field is None where it has no such basis, scale or centre.

    ``A``: eigenvectors of the inputs' covariance as columns, ``(*stack, *blocks, n, n)``: n
    channels, the same at every kernel offset (n rows of ``K̄``, bias last, in eigenbases of dense
    layers). ``A_scale``: ``(*stack, *blocks, n)``. ``mean``: c, the same shape. With ``A_rest``,
    the scale of all other directions ``(*stack, *blocks)``, A has k columns. ``G``, ``G_scale``:
    the same for outputs. The inputs of an embedding are uncorrelated: it has no A.

    Source: Desjardins et al. 2015, section 3.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> ng.Coordinates(A=jnp.eye(2), A_scale=jnp.array([1.0, 2.0])).U
    Array([[1., 0.],
           [0., 2.]], dtype=float32)
    """

    A: jax.Array | None = None
    A_scale: jax.Array | None = None
    mean: jax.Array | None = None
    G: jax.Array | None = None
    G_scale: jax.Array | None = None
    A_rest: jax.Array | None = None

    @property
    def U(self) -> jax.Array:  # noqa: N802 the paper's letter
        """The whitening matrix ``diag(σ + ε)^{-1/2} Ũᵀ``: whitened inputs are ``U (h − c)``.

        Raises ValueError if these coordinates whiten no inputs.
        """
        if self.A is None or self.A_scale is None:
            raise ValueError(
                "U whitens the inputs of a layer, and these coordinates have no A or no A_scale: "
                'take coordinates="whitening", of a layer that is no embedding.'
            )
        if self.A_rest is not None:
            return from_eigenpairs(self.A, self.A_scale, self.A_rest).as_matrix()
        return self.A_scale[..., :, None] * self.A.mT


def white_inputs(
    layer: Layer, factors: Any, epsilon: jax.Array, old: Coordinates | None = None
) -> Solving[Coordinates]:
    """``c = E[h]``, ``E[(h−c)(h−c)ᵀ] = Ũ diag(σ) Ũᵀ``, ``L_A = Ũ diag(σ + ε)^{-1/2}``.

    A layer without bias cannot compensate a centre: there c = 0. If the old coordinates have k
    directions, the new ones have k too, iterated from those, and the others take their mean
    variance. A computation for :func:`~natgrad_jax.linalg.batched_solve.solve`, as the next two.
    """
    second, mean = second_and_mean(layer, factors.A)
    if old is not None and old.A is not None and old.A_rest is not None:
        ((basis, values),) = yield [Problem(subspace, (second, old.A))]
        rest = _root(_others(second, values), epsilon)
        return Coordinates(basis, _root(values, epsilon), mean, A_rest=rest)
    solutions = yield _eigenproblems(layer.input_side, second)
    return Coordinates(*_white(second, epsilon, solutions), mean)


def white_sides(
    layer: Layer, factors: Any, epsilon: jax.Array, old: Coordinates | None = None
) -> Solving[Coordinates]:
    """Whiten inputs as :func:`white_inputs`, and output gradients likewise, from ``G = E[g gᵀ]``.

    ε is divided between the two as K-FAC's λ, so that plain gradient descent in these coordinates
    is K-FAC (with inputs centred before damping).
    """
    del old
    second, mean = second_and_mean(layer, factors.A)
    assert layer.output_side is not None
    on_a, on_g = damping_split.rule(damping_split.DEFAULT)(
        layer.input_side.mean_eigenvalue(second),
        layer.output_side.mean_eigenvalue(factors.G),
        epsilon,
    )
    asked = [
        _eigenproblems(layer.input_side, second),
        _eigenproblems(layer.output_side, factors.G),
    ]
    found = iter((yield [problem for own in asked for problem in own]))
    of_a, of_g = ([next(found) for _ in own] for own in asked)
    return Coordinates(*_white(second, on_a, of_a), mean, *_white(factors.G, on_g, of_g))


def eigenbases(
    layer: Layer, factors: Any, epsilon: jax.Array, old: Coordinates | None = None
) -> Solving[Coordinates]:
    """The Kronecker eigenbasis: ``L_A = Q_A``, ``L_G = Q_G``, no scale and no centre."""
    del epsilon, old
    assert layer.output_side is not None
    asked = [
        _eigenproblems(layer.input_side, factors.A),
        _eigenproblems(layer.output_side, factors.G),
    ]
    found = iter((yield [problem for own in asked for problem in own]))
    A, G = (next(found)[0] if own else None for own in asked)
    return Coordinates(A, G=G)


class Choice(NamedTuple):
    """How coordinates are computed: ``find`` does it from the factors. Flags: the factors are
    ``centred``; output gradients are needed (``outputs``); every batch is ``rescaled``."""

    find: Callable[..., Solving[Coordinates]] | None
    outputs: bool = False
    centred: bool = True
    rescaled: bool = False


CHOICES = {
    "whitening": Choice(white_inputs),
    "whitening_plus": Choice(white_inputs, rescaled=True),
    "both_sides": Choice(white_sides, outputs=True),
    "eigenbasis": Choice(eigenbases, outputs=True, centred=False),
    "identity": Choice(None),
}


def applies(layer: Layer) -> bool:
    """Whether a layer has coordinates: normalizations, free parameters and embeddings that are
    attended to have none."""
    return layer.block == "kronecker" and layer.uses == 1


def start(layer: Layer, choice: Choice, rank: int | None = None) -> Coordinates:
    """Identity coordinates in the form of ``choice``.

    ``rank``: the number of input directions that they have, if that is less than half of all.
    """
    assert choice.find is not None
    find, zeros = choice.find, zero_factors(layer, not choice.outputs)
    form = jax.eval_shape(lambda f, epsilon: alone(find(layer, f, epsilon)), zeros, jnp.zeros(()))
    eye = lambda x: (
        None if x is None else jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)
    )
    ones = lambda x: None if x is None else jnp.ones(x.shape, x.dtype)
    mean = None if form.mean is None else jnp.zeros(form.mean.shape, form.mean.dtype)
    own = Coordinates(eye(form.A), ones(form.A_scale), mean, eye(form.G), ones(form.G_scale))
    if rank is None or own.A is None or not is_cheaper(rank, own.A.shape[-1]):
        return own
    *lead, n, _ = own.A.shape
    few, one = initial_subspace((*lead, n), rank, own.A.dtype), jnp.ones(lead, own.A.dtype)
    return own._replace(A=few, A_scale=jnp.ones((*lead, rank), few.dtype), A_rest=one)


def rescaled(layer: Layer, own: Coordinates, factors: Any, epsilon: jax.Array) -> Coordinates:
    """The same basis and centre, with the variances of another batch: PRONG+'s diagonal.

    ``s_i = (ũ_iᵀ Σ ũ_i + ε)^{-1/2}``: every whitened unit has variance 1 on that batch, up to ε.
    """
    second, _ = second_and_mean(layer, factors.A)
    if own.A is None:
        variances = second
    else:
        product = jnp.matmul(second, own.A, precision=HIGHEST)
        variances = jnp.maximum(jnp.sum(own.A * product, axis=-2), 0)
    if own.A_rest is not None:
        own = own._replace(A_rest=_root(_others(second, variances), epsilon))
    return own._replace(A_scale=_root(variances, epsilon))


def second_and_mean(layer: Layer, A: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The covariance of the inputs and their mean; second moments and None without a bias, or if
    only the diagonal is known."""
    if layer.bias is None or len(layer.input_side.shape) == 1:
        return A, None
    rows = A[..., -1:, -1]
    mean = A[..., :-1, -1] / jnp.where(rows > 0, rows, 1)
    second = A[..., :-1, :-1] / jnp.where(rows > 0, rows, 1)[..., None]
    return second - mean[..., :, None] * mean[..., None, :], mean


def _eigenproblems(side: FactorStructure, factor: jax.Array) -> list[Problem]:
    """The eigenproblem of a factor; none if its eigenbasis is known (a diagonal factor)."""
    known = side.direct_eigenbasis(factor) is not None
    return [] if known else [Problem(eigenbasis, (factor,))]


def _white(
    second: jax.Array, epsilon: jax.Array, solutions: list[Any]
) -> tuple[jax.Array | None, jax.Array]:
    """Basis and scale; a scale alone, of a diagonal factor, if there are no solutions."""
    if not solutions:
        return None, _root(second, epsilon)
    basis, values = solutions[0]
    return basis, _root(values, epsilon)


def _others(second: jax.Array, values: jax.Array) -> jax.Array:
    """The mean variance of all directions except those whose variances are given."""
    left = trace_of(second) - values.sum(-1)
    return jnp.maximum(left, 0) / (second.shape[-1] - values.shape[-1])


def _root(values: jax.Array, epsilon: jax.Array) -> jax.Array:
    epsilon = epsilon.astype(values.dtype)
    later = tuple(range(epsilon.ndim, values.ndim)) if epsilon.ndim else ()
    return jax.lax.rsqrt(values + jnp.expand_dims(epsilon, later))
