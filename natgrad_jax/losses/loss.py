"""Losses that remember the distributions they came from, and how examples are weighed."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.sharding import devices_along, psum, vary


class Part(NamedTuple):
    """Which part of a batch a micro-batch is: its ``number``, from 0; ``examples``: how many there
    are in all of them, weighted."""

    number: jax.Array
    examples: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One negative log-likelihood inside a loss: ``scale · Σ w (−log p) / Σ w``; of a micro-batch
    (``part``), its share of that: the lower sum is over the whole batch.

    ``scale`` is a Python number where it is known, also while ``loss_fn`` is traced."""

    distribution: Any
    targets: jax.Array
    weight: jax.Array | None
    scale: jax.Array | float = 1.0
    part: Part | None = None

    @property
    def count(self) -> jax.Array:
        """The number of examples, weighted."""
        if self.weight is None:
            return jnp.asarray(math.prod(self.distribution.examples), float)
        return self.weight.sum()

    @property
    def total(self) -> jax.Array:
        """``scale · Σ w (−log p)``."""
        losses = self.distribution.nll_per_example(self.targets)
        if self.weight is not None:  # NaN where it was negative: that must show
            losses = jnp.where(self.weight == 0, 0, losses * self.weight.astype(losses.dtype))
        return jnp.asarray(self.scale, losses.dtype) * losses.sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A scalar loss that remembers the distributions it came from; a pytree.

    Losses add to one another and to scalars, and scale by scalars. The scalar itself is
    ``loss.value``. Added scalars (weight decay, …) take part in the gradient, not in the Fisher.

    Raises:
      TypeError: from arithmetic with anything else, and from ``float(loss)``.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> loss = 2.0 * ng.Gaussian(jnp.zeros((2, 3))).nll(jnp.ones((2, 3))) + 0.5
    >>> float(loss.value)
    3.5
    >>> loss
    Loss(Gaussian nll of mean (2, 3) + scalar): differentiate it with ng.value_and_grad(...
    """

    terms: tuple[Term, ...]
    scalar: jax.Array | None = None

    @property
    def value(self) -> jax.Array:
        """The loss as a scalar array."""
        return self.contribution(())

    def contribution(self, axes: Sequence[str]) -> jax.Array:
        """What this device adds to the global loss: the sum over ``axes`` is the global value."""
        parts = []
        for term in self.terms:
            total = term.total
            parts.append(total / positive(whole_count(term, axes)).astype(total.dtype))
        if self.scalar is not None:
            parts.append(self.scalar / devices_along(axes))
        return functools.reduce(jnp.add, parts)

    def as_part(self, number: jax.Array, of: int, examples: Sequence[jax.Array]) -> "Loss":
        """What micro-batch ``number``, one ``of`` so many, adds to the loss of the whole batch,
        whose terms have so many ``examples``."""
        terms = tuple(
            replace(term, part=Part(number, total))
            for term, total in zip(self.terms, examples, strict=True)
        )
        return Loss(terms, None if self.scalar is None else self.scalar / of)

    def __add__(self, other: Any) -> "Loss":
        if not isinstance(other, Loss):
            other = Loss((), _scalar(other, "add to a Loss"))
        scalars = [s for s in (self.scalar, other.scalar) if s is not None]
        return Loss(
            self.terms + other.terms, functools.reduce(jnp.add, scalars) if scalars else None
        )

    __radd__ = __add__

    def __mul__(self, other: Any) -> "Loss":
        factor = _scalar(other, "multiply a Loss by")
        # not as an array: within a trace it would no longer be known
        known = float(other) if is_concrete(other) else factor
        terms = tuple(replace(t, scale=t.scale * known) for t in self.terms)
        return Loss(terms, None if self.scalar is None else self.scalar * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "Loss":
        return self * -1

    def __sub__(self, other: Any) -> "Loss":
        return self + (-other)

    def __truediv__(self, other: Any) -> "Loss":
        _scalar(other, "divide a Loss by")
        return self * (1 / other)

    def __float__(self) -> float:
        raise TypeError(
            "a Loss is no number: write float(loss.value). What ng.value_and_grad(loss_fn, layers) "
            "returns first is the number itself."
        )

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        # whatever the leaves are: errors of JAX print a Loss of tracers, shapes or objects
        names = [f"{type(x).__name__} nll of {x.natural_name} {getattr(x.natural, 'shape', '?')}"
                 for x in (t.distribution for t in self.terms)]  # fmt: skip
        parts = " + ".join(names + ["scalar"] * (self.scalar is not None))
        how = (
            "differentiate it with ng.value_and_grad(loss_fn, layers), or loss.value with jax.grad"
        )
        return f"Loss({parts}): {how}"


def example_weights(distribution: Any, where: Any, weights: Any) -> jax.Array | None:
    """The mask and the weights of ``nll`` as one array of the examples' shape, or None."""
    examples = distribution.examples
    if where is None and weights is None:
        return None
    weight = jnp.ones((), float)
    for name, value in (("where", where), ("weights", weights)):
        if value is None:
            continue
        value = jnp.asarray(value)
        lined_up = zip(reversed(value.shape), reversed(examples), strict=False)
        if value.ndim > len(examples) or any(n not in (1, m) for n, m in lined_up):
            whole = value.shape == distribution.natural.shape
            raise ValueError(
                f"nll: {name} must broadcast to the examples' shape {examples}; got {value.shape}."
                + _for_each_output(name, distribution) * whole
            )
        weight = weight * (value if value.dtype == bool else _not_negative(name, value))
    return jax.lax.stop_gradient(jnp.broadcast_to(weight, examples))


def _for_each_output(name: str, distribution: Any) -> str:
    """What to write instead of a mask of single outputs."""
    reduced = f"{name}.any(-1)" if name == "where" else f"{name}.mean(-1)"
    told = f" It is one number for each example, such as {reduced}."
    if not hasattr(distribution, "event_ndims"):
        return told
    kind, natural = type(distribution).__name__, distribution.natural_name
    return told + (
        f" For each output apart, let every number be an example: ng.{kind}({natural}, "
        f"event_ndims=0).nll(targets, {name}={name}); its mean is over numbers."
    )


def _not_negative(name: str, value: jax.Array) -> jax.Array:
    """``value``, checked; under ``jit``, where nothing can raise, NaN where it is negative."""
    if not is_concrete(value):
        return jnp.where(value < 0, jnp.nan, value)
    low, high = value_range(value) if value.size else (0, 0)
    if not low >= 0:
        raise ValueError(
            f"nll: {name} must not be negative (nor NaN); got values from {low:g} to {high:g}. "
            "They say how often an example counts: 0, or where=mask, leaves one out. With signed "
            "weights (advantages, policy gradients) the sum is no likelihood of anything, and has "
            "no Fisher."
        )
    return value


def _scalar(value: Any, doing: str) -> jax.Array:
    if isinstance(value, Loss) or jnp.shape(value) != ():
        what = "a Loss" if isinstance(value, Loss) else f"an array of shape {jnp.shape(value)}"
        raise TypeError(f"Losses add, and scale by scalars: cannot {doing} {what}.")
    return jnp.asarray(value)


def as_loss(out: Any, has_aux: bool | None = None) -> Loss:
    """The Loss in what ``loss_fn`` returned, or an error that says what to return."""
    loss = out
    if has_aux is not False and isinstance(out, tuple) and len(out) == 2:
        loss = out[0]
    elif has_aux:
        raise TypeError(
            "with has_aux=True loss_fn must return a pair (Loss, aux); got "
            f"{type(out).__name__}. Drop has_aux, or return the pair."
        )
    if not isinstance(loss, Loss):
        hint = " Pass has_aux=True to return (Loss, aux)." if isinstance(out, tuple) else ""
        name = type(loss).__name__
        came = f"an array of shape {jnp.shape(loss)}" if hasattr(loss, "shape") else name
        raise TypeError(
            f"loss_fn must return a natgrad_jax.Loss; got {came}. The Fisher needs the predictive "
            "distribution, not only the number: return for example "
            f"ng.Categorical(logits).nll(labels).{hint}"
        )
    if not loss.terms:
        raise TypeError("loss_fn returned a Loss without any distribution; add an nll to it.")
    if any(jnp.shape(term.scale) for term in loss.terms):
        raise TypeError(
            "loss_fn returned a batch of losses, out of vmap or scan. Map the model alone, and "
            "call nll once on the stacked outputs: it takes the mean over all leading axes."
        )
    return loss


def global_count(term: Term, axes: Sequence[str]) -> jax.Array:
    """The term's example count over all devices of the named axes."""
    return psum(vary(term.count, axes), axes)


def whole_count(term: Term, axes: Sequence[str]) -> jax.Array:
    """The same over the whole batch that the term is a micro-batch of."""
    if term.part is None:
        return global_count(term, axes)
    return psum(vary(term.part.examples, axes), axes)


def positive(count: jax.Array) -> jax.Array:
    """``count`` made safe to divide by: nothing divided by no examples is nothing."""
    return jnp.where(count == 0, 1, count)  # NaN, of negative weights, stays


def value_range(x: Any) -> tuple[Any, Any]:
    """Least and greatest value of a concrete array; NumPy's, since jit stages JAX's."""
    values = np.asarray(x)
    return values.min(), values.max()
