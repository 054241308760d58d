"""Gradients and parameters to and from a layer's coordinates, and from old ones to new."""

import jax
import jax.numpy as jnp

from natgrad_jax.layers.layer import Layer
from natgrad_jax.linalg.low_rank import from_eigenpairs
from natgrad_jax.reparametrization.coordinates import Coordinates
from natgrad_jax.utils.precision import HIGHEST


def gradient_to(layer: Layer, own: Coordinates, x: jax.Array) -> jax.Array:
    """``L_Aᵀ ∇ L_G``: the gradient with respect to ``K̂`` from that with respect to ``K̄``."""
    main, bias = _parts(layer, own, x)
    if own.mean is not None:
        main = main - own.mean[..., None, :, None] * bias[..., None, :, :]
    main = _into(own, main, 1)
    return _over_columns(own, _joined(main, bias, x), scale=True)


def gradient_from(layer: Layer, own: Coordinates, x: jax.Array) -> jax.Array:
    """The inverse of :func:`gradient_to`: ``L_A⁻ᵀ ∇̂ L_G⁻¹``."""
    main, bias = _parts(layer, own, _off_columns(own, x, divide=True))
    main = _out_of(own, main, -1)
    if own.mean is not None:
        main = main + own.mean[..., None, :, None] * bias[..., None, :, :]
    return _joined(main, bias, x)


def to_whitened(layer: Layer, own: Coordinates, x: jax.Array) -> jax.Array:
    """``K̂ = L_A⁻¹ K̄ L_G⁻ᵀ``: whitened parameters, ``V = U⁻ᵀ K``, ``d = b + cᵀ K``."""
    main, bias = _parts(layer, own, x)
    if own.mean is not None:
        bias = bias + jnp.sum(own.mean[..., None, :, None] * main, axis=(-3, -2))[..., None, :]
    main = _into(own, main, -1)
    return _over_columns(own, _joined(main, bias, x), scale=False)


def from_whitened(layer: Layer, own: Coordinates, x: jax.Array) -> jax.Array:
    """``K̄ = L_A K̂ L_Gᵀ``: canonical parameters, ``K = Uᵀ V``, ``b = d − cᵀ K``."""
    main, bias = _parts(layer, own, _off_columns(own, x, divide=False))
    main = _out_of(own, main, 1)
    if own.mean is not None:
        bias = bias - jnp.sum(own.mean[..., None, :, None] * main, axis=(-3, -2))[..., None, :]
    return _joined(main, bias, x)


def transport_gradients(
    layer: Layer, old: Coordinates, new: Coordinates, x: jax.Array
) -> jax.Array:
    """A gradient in the old coordinates, written in the new ones."""
    return gradient_to(layer, new, gradient_from(layer, old, x))


def transport_squares(layer: Layer, old: Coordinates, new: Coordinates, S: jax.Array) -> jax.Array:
    """Mean squares of gradients in the old coordinates, in the new ones: ``P_A² S (P_G²)ᵀ``.

    P maps gradients from old to new coordinates, squares are elementwise: the new mean squares if
    entries are uncorrelated in the old coordinates.
    """
    main, bias = _parts(layer, old, S)
    if old.A_rest is not None or new.A_rest is not None:
        between = _into(new, _out_of(old, jnp.eye(main.shape[-2], dtype=main.dtype)[None], -1), 1)
        main = jnp.matmul(jnp.square(between), main, precision=HIGHEST)
    else:
        main = _squared_map(old.A, old.A_scale, new.A, new.A_scale, main)
    if old.mean is not None and new.mean is not None:
        moved = _into(new, (old.mean - new.mean)[..., None, :, None], 1)
        main = main + jnp.square(moved) * bias[..., None, :, :]
    S = _joined(main, bias, S)
    columns = S.mT[..., None, :, :]
    return _squared_map(old.G, old.G_scale, new.G, new.G_scale, columns)[..., 0, :, :].mT


def _parts(layer: Layer, own: Coordinates, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(…, rows, columns)`` as ``(…, offsets, n, columns)``, and a separate bias row if any."""
    n = x.shape[-2] if own.A is None else own.A.shape[-2]
    end = x.shape[-2] - (layer.bias is not None and n != x.shape[-2])
    main = x[..., :end, :].reshape(*x.shape[:-2], end // n, n, x.shape[-1])
    return main, x[..., end:, :]


def _joined(main: jax.Array, bias: jax.Array, like: jax.Array) -> jax.Array:
    main = main.reshape(*like.shape[:-2], -1, like.shape[-1])
    return jnp.concatenate([main, bias], axis=-2) if bias.shape[-2] else main


def _matmul(matrix: jax.Array | None, x: jax.Array, transposed: bool = False) -> jax.Array:
    if matrix is None:
        return x
    matrix = matrix.mT if transposed else matrix
    return jnp.matmul(matrix[..., None, :, :], x, precision=HIGHEST)


def _into(own: Coordinates, x: jax.Array, power: int) -> jax.Array:
    """``diag(s)^p Qᵀ x`` over ``(…, offsets, n, columns)``."""
    if own.A_rest is not None:
        return _symmetric(own, x, power)
    x = _matmul(own.A, x, transposed=True)
    return _times(own.A_scale, x) if power > 0 else _over(own.A_scale, x)


def _out_of(own: Coordinates, x: jax.Array, power: int) -> jax.Array:
    """``Q diag(s)^p x``."""
    if own.A_rest is not None:
        return _symmetric(own, x, power)
    return _matmul(own.A, _times(own.A_scale, x) if power > 0 else _over(own.A_scale, x))


def _symmetric(own: Coordinates, x: jax.Array, power: int) -> jax.Array:
    """``(V diag(s) Vᵀ + r (I − V Vᵀ))^p x``."""
    assert own.A is not None and own.A_scale is not None and own.A_rest is not None
    return from_eigenpairs(own.A, own.A_scale**power, own.A_rest**power).repeated().apply(x)


def _times(scale: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if scale is None else scale[..., None, :, None] * x


def _over(scale: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if scale is None else x / scale[..., None, :, None]


def _over_columns(own: Coordinates, x: jax.Array, scale: bool) -> jax.Array:
    """``x Q_G``, with columns multiplied or divided by the scale."""
    x = x if own.G is None else jnp.matmul(x, own.G, precision=HIGHEST)
    if own.G_scale is None:
        return x
    s = own.G_scale[..., None, :]
    return x * s if scale else x / s


def _off_columns(own: Coordinates, x: jax.Array, divide: bool) -> jax.Array:
    """``x diag(s)^{±1} Q_Gᵀ``."""
    if own.G_scale is not None:
        s = own.G_scale[..., None, :]
        x = x / s if divide else x * s
    return x if own.G is None else jnp.matmul(x, own.G.mT, precision=HIGHEST)


def _squared_map(
    old: jax.Array | None,
    old_scale: jax.Array | None,
    new: jax.Array | None,
    new_scale: jax.Array | None,
    S: jax.Array,
) -> jax.Array:
    """``(diag(s') Q'ᵀ Q diag(1/s))² S`` of ``(…, offsets, n, columns)``."""
    S = _over(None if old_scale is None else jnp.square(old_scale), S)
    if old is not None and new is not None:
        overlap = jnp.matmul(new.mT, old, precision=HIGHEST)
        S = _matmul(jnp.square(overlap), S)
    return _times(None if new_scale is None else jnp.square(new_scale), S)
