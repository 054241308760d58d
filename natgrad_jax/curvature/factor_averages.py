"""Factors: bias-corrected moving averages of what batches measured."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.layers.factor_structure import FactorStructure
from natgrad_jax.layers.layer import Layer
from natgrad_jax.utils.short_repr import printed_short

T = TypeVar("T")


@printed_short
class Factors(NamedTuple):
    """``A`` over inputs (bias last) and ``G`` over outputs: ``(*stack, *blocks, n, n)`` each.

    With groups there is a matrix for each, ``(*stack, *blocks, groups, n, n)``. The A of an
    embedding is its diagonal. A block that is no Kronecker product has one matrix, A.
    """

    A: jax.Array
    G: jax.Array | None = None


@printed_short
class FactorsAndBias(NamedTuple):
    """Factors of a convolution under SUA or in groups: matrices over channels, and a separate bias.

    ``bias``: the entry of A at the bias, ``(*stack, *blocks)``.
    """

    A: jax.Array
    G: jax.Array
    bias: jax.Array


class FactorsLike(Protocol):
    """Factors, or what is held for them: inverses or bases, each in its structure's form."""

    @property
    def A(self) -> Any: ...  # noqa: N802 the field's letters

    @property
    def G(self) -> Any: ...  # noqa: N802

    @property
    def _replace(self) -> Callable[..., Any]: ...


def make_factors(A: Any, G: Any = None, bias: Any = None) -> FactorsLike:
    """Factors, or inverses or bases of them; G and a separate bias only where they exist."""
    return Factors(A, G) if bias is None else FactorsAndBias(A, G, bias)


def bias_of(factors: object) -> jax.Array | None:
    """The entry of A at a bias that is stored separately, or None."""
    return getattr(factors, "bias", None)


def zero_factors(layer: Layer, inputs_only: bool = False, dtype: Any = None) -> FactorsLike:
    """Factors before the first measurement; ``dtype``: for storage, the layer's by default, and in
    any case for sketches, of which small eigenvalues would be rounding errors otherwise."""
    stack, blocks = layer.stack_sizes, layer.factor_blocks

    def zeros(side: FactorStructure) -> jax.Array:
        own = layer.factor_dtype if side.rank or dtype is None else dtype
        return jnp.zeros((*stack, *blocks, *side.shape), own)

    outputs, apart = layer.output_side, layer.input_side.bias_apart
    return make_factors(
        zeros(layer.input_side),
        None if outputs is None or inputs_only else zeros(outputs),
        jnp.zeros(stack + blocks, dtype or layer.factor_dtype) if apart else None,
    )


def stored_as(dtype: Any) -> Any:
    """The checked dtype of stored factors; None: the layers' own."""
    is_array = isinstance(dtype, jax.Array)
    if dtype is not None and (is_array or not jnp.issubdtype(dtype, jnp.floating)):
        raise ValueError(
            f"factor_dtype must be a floating dtype, such as jnp.bfloat16, or None; got {dtype!r}. "
            "(Under optax.inject_hyperparams name it in static_args.)"
        )
    return dtype


def in_full(layer: Layer, factors: T) -> T:
    """Stored factors in the precision that they are inverted in."""
    return jax.tree.map(lambda x: x.astype(layer.factor_dtype), factors)


class Batch(NamedTuple):
    """The factors of one batch; whether each element of the stack was ``seen``, and whether it is
    ``good``: seen and finite. Both have a leading axis of terms if the factors have shares.
    ``good_inputs``: whether A is, where it is averaged without waiting for G."""

    factors: Any
    seen: jax.Array
    good: jax.Array
    good_inputs: jax.Array | None = None


def of_one_term(
    layer: Layer, sums: Sums, examples: jax.Array, saw: jax.Array | None = None
) -> Batch:
    """The factors of one batch for one term of the loss with ``examples`` examples.

    With N examples and T positions, ``A ⊗ G = Σ ā āᵀ ⊗ Σ g gᵀ / (N · N T)``. Convolutions put the
    positions' share on G (``A = Σ ā āᵀ / N``: Grosse & Martens 2016), other layers on A
    (``A = Σ ā āᵀ / NT``: Eschenhagen et al. 2023, expand). Under reduce T is 1. Centred factors
    are always divided by N T, and there is no G if outputs were not measured. ``saw``: the inputs'
    number of examples, if it differs from the term's.
    """
    if layer.uses > 1:
        return _joined_uses(layer, sums, examples)
    seen = (sums.rows > 0) & (examples > 0)
    rows, count = jnp.where(seen, sums.rows, 1), jnp.where(seen, examples, 1)
    if layer.output_side is None:
        finite = _finite(layer, layer.input_side, sums.A)
        return Batch(Factors(divide(sums.A, count)), seen, seen & finite)
    on_outputs = layer.traits.has_receptive_field and not layer.approximation.centred
    over_a, over_g = (count, rows) if on_outputs else (rows, count)
    if on_outputs and saw is not None:
        over_a, over_g = saw, count * rows / saw
    bias = None
    if layer.input_side.bias_apart:
        bias = jnp.ones(layer.stack_sizes + layer.factor_blocks, sums.A.dtype)
        bias = bias * jnp.expand_dims(rows / over_a, tuple(range(rows.ndim, bias.ndim)))
    lead = layer.stack_sizes + layer.factor_blocks
    A = _form(layer.input_side, sums.A, lead)
    good = seen & _finite(layer, layer.input_side, A)
    if sums.G is None:
        return Batch(make_factors(divide(A, over_a), None, bias), seen, good)
    G = _form(layer.output_side, sums.G, lead)
    factors = make_factors(divide(A, over_a), divide(G, over_g), bias)
    return Batch(factors, seen, good & _finite(layer, layer.output_side, G), good)


def _joined_uses(layer: Layer, sums: Sums, examples: jax.Array) -> Batch:
    """One Kronecker product for the uses of one matrix."""
    assert sums.G is not None and layer.output_side is not None
    axis = len(layer.stack)
    rows = sums.rows.sum(axis)
    seen = (rows > 0) & (examples > 0)
    one = jnp.where(sums.rows > 0, sums.rows, 1)
    G = _form(layer.output_side, sums.G, (*layer.stack_sizes, layer.uses))
    A_i, G_i = divide(sums.A, one), divide(G, jnp.where(examples > 0, examples, 1))
    A, G = partial_traces(layer, A_i, G_i, axis)
    finite = _finite(layer, layer.input_side, A) & _finite(layer, layer.output_side, G)
    return Batch(Factors(A, G), seen, seen & finite)


def partial_traces(
    layer: Layer, A_i: jax.Array, G_i: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """One Kronecker product for a sum of them over an axis, ``F = Σ Aᵢ ⊗ Gᵢ``.

    ``A ⊗ G = tr_G F ⊗ tr_A F / tr F``, the product of the partial traces: exact for one product,
    and independent of how each product divides its scale between Aᵢ and Gᵢ.
    """
    assert layer.output_side is not None
    on_a, on_g = layer.input_side.trace(A_i, None), layer.output_side.trace(G_i, None)
    total = (on_a * on_g).sum(axis)
    root = jnp.sqrt(jnp.where(total > 0, total, 1))
    A = (A_i * _wide(on_g, A_i)).sum(axis)
    G = (G_i * _wide(on_a, G_i)).sum(axis)
    return divide(A, root), divide(G, root)


def _form(side: FactorStructure, factor: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """A factor in the form of ``side``: measured in it, or cut out of the whole factor."""
    return factor if factor.shape == lead + side.shape else side.narrow(factor)


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """``x / divisor``, with an array over the leading axes of ``x`` as divisor."""
    return x / _wide(divisor.astype(x.dtype), x)  # float64 counts do not widen float32 sums


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(x, tuple(range(x.ndim, like.ndim)))


def _finite(layer: Layer, side: FactorStructure, factor: jax.Array) -> jax.Array:
    """Whether each element of the stack is finite: ``(*stack,)``.

    A trace is a sum of squares, so that any NaN or inf that went into a factor shows in it.
    """
    traces = side.trace(factor, None)
    return jnp.isfinite(traces.sum(tuple(range(len(layer.stack), traces.ndim))))


def rate(
    weight: jax.Array, decay: jax.Array, informative: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How far a bias-corrected moving average moves, and its new weight.

    ``f ← f + (1 − decay) / w · (new − f)``, ``w ← decay · w + (1 − decay)``, from w = 0: the first
    measurement is taken as it is. The rate is 0 where ``informative`` is False.

    Args:
      weight, informative: ``(*stack,)``; decay: scalar.
    """
    later = jnp.where(informative, decay * weight + (1 - decay), weight).astype(weight.dtype)
    return jnp.where(informative, (1 - decay) / jnp.where(later > 0, later, 1), 0), later


def step(rate: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """``old + rate · (new − old)``; ``old`` where the rate is 0, even if ``new`` is non-finite.

    Computed in the wider of the two dtypes, returned in that of ``old``.
    """
    wide = jnp.promote_types(old.dtype, new.dtype)
    rate, before = _wide(rate.astype(wide), old), old.astype(wide)
    after = before + rate * (new.astype(wide) - before)
    return jnp.where(rate == 0, old, after.astype(old.dtype))
