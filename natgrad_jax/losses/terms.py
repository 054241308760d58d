"""Losses that keep the distributions they were made of."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Num, Shaped

from natgrad_jax.losses.distribution_base import Outputs, Predictive
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.sharding import devices_along, psum, vary

# What a loss can be multiplied by; arrays of shape ().
Number = float | np.integer | np.floating | np.ndarray | Array


class Part(NamedTuple):
    """The place of a micro-batch in its batch.

    ``number``: its index, from 0. ``examples``: the weighted number of examples in the whole batch.
    """

    number: Int[Array, ""]
    examples: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Term:
    """One negative log-likelihood inside a loss: ``scale · Σ w (−log p) / Σ w``.

    Without ``targets`` it has a Fisher and no value.
    In a micro-batch (``part``) the denominator sums over the whole batch: micro-batches then add.
    ``scale`` is a Python number if its value is known, also while ``loss_fn`` is traced.
    ``uncentred``: the outputs whose mean over examples was taken away, if it was.
    """

    distribution: Predictive
    targets: Shaped[Array, "..."] | None
    weight: Float[Array, "*examples"] | None
    scale: Float[Array, ""] | float = 1.0
    part: Part | None = None
    uncentred: Outputs | None = None

    @property
    def raw(self) -> Outputs:
        """The network's outputs, before they were centred."""
        names = self.distribution.outputs
        if self.uncentred is None:
            return names
        return {name: self.uncentred[name] for name in names}

    def at(self, outputs: Outputs) -> "Term":
        """The term at other outputs."""
        return replace(self, distribution=self.distribution.with_outputs(outputs))

    @property
    def count(self) -> Float[Array, ""]:
        """The weighted number of examples."""
        if self.weight is None:
            return jnp.asarray(math.prod(self.distribution.examples), float)
        return self.weight.sum()

    @property
    def total(self) -> Float[Array, ""]:
        """``scale · Σ w (−log p)``."""
        if self.targets is None:
            return jnp.zeros(())
        losses = self.distribution.nll_per_example(self.targets)
        if self.weight is not None:  # NaN weights (negative under jit) must reach the loss
            losses = jnp.where(self.weight == 0, 0, losses * self.weight.astype(losses.dtype))
        return jnp.asarray(self.scale, losses.dtype) * losses.sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A scalar loss that keeps the distributions it was made of; a pytree.

    Losses can be added to each other and to scalars, and multiplied by scalars. ``loss.value`` is
    the loss as an array. Added scalars, for example weight decay, contribute to the gradient and
    not to the Fisher.

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
    scalar: Num[Array, ""] | None = None

    @property
    def value(self) -> Float[Array, ""]:
        """The loss as an array of shape ``()``."""
        return self.contribution(())

    def contribution(self, axes: Sequence[str]) -> Float[Array, ""]:
        """This device's summand of the global loss, which is the sum over the named ``axes``."""
        parts = []
        for term in self.terms:
            total = term.total
            parts.append(total / positive(whole_count(term, axes)).astype(total.dtype))
        if self.scalar is not None:
            parts.append(self.scalar / devices_along(axes))
        return functools.reduce(jnp.add, parts)

    def as_part(
        self, number: Int[Array, ""], of: int, examples: Sequence[Float[Array, ""]]
    ) -> "Loss":
        """This loss as micro-batch ``number`` out of ``of``: its summand of the batch's loss.

        ``examples``: for each term the weighted number of examples in the whole batch.
        """
        terms = tuple(
            replace(term, part=Part(number, total))
            for term, total in zip(self.terms, examples, strict=True)
        )
        return Loss(terms, None if self.scalar is None else self.scalar / of)

    def __add__(self, other: "Loss | Number") -> "Loss":
        if not isinstance(other, Loss):
            other = Loss((), _scalar(other, "add to a Loss"))
        scalars = [s for s in (self.scalar, other.scalar) if s is not None]
        return Loss(
            self.terms + other.terms, functools.reduce(jnp.add, scalars) if scalars else None
        )

    __radd__ = __add__

    def __mul__(self, other: Number) -> "Loss":
        factor = _scalar(other, "multiply a Loss by")
        # a Python number: under a trace an array's value would be unknown
        known = float(other) if is_concrete(other) else factor
        terms = tuple(replace(t, scale=t.scale * known) for t in self.terms)
        return Loss(terms, None if self.scalar is None else self.scalar * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "Loss":
        return self * -1

    def __sub__(self, other: "Loss | Number") -> "Loss":
        return self + (-other)

    def __truediv__(self, other: Number) -> "Loss":
        _scalar(other, "divide a Loss by")
        return self * (1 / other)

    def __float__(self) -> float:
        raise TypeError(
            "a Loss is not a number: write float(loss.value). The first result of the function "
            "that ng.value_and_grad(loss_fn, layers) returns is the number itself."
        )

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        # works for any leaves: JAX's errors print losses of tracers, shapes or plain objects
        what = lambda t: "curvature" if t.targets is None else "nll"
        shape = lambda x: getattr(x.parametrized[x.first], "shape", "?")
        names = [f"{type(t.distribution).__name__} {what(t)} of {t.distribution.first} "
                 f"{shape(t.distribution)}" for t in self.terms]  # fmt: skip
        parts = " + ".join(names + ["scalar"] * (self.scalar is not None))
        how = (
            "differentiate it with ng.value_and_grad(loss_fn, layers), or loss.value with jax.grad"
        )
        return f"Loss({parts}): {how}"


# ``loss_fn(params, *args)`` returns a Loss, or ``(Loss, aux)``.
LossFn = Callable[..., Loss | tuple[Loss, Any]]


def _scalar(value: Loss | Number, doing: str) -> Num[Array, ""]:
    """``value`` as an array of shape ``()``; ``doing``: the operation, for the error."""
    if isinstance(value, Loss) or jnp.shape(value) != ():
        what = "a Loss" if isinstance(value, Loss) else f"an array of shape {jnp.shape(value)}"
        raise TypeError(
            "Losses can be added to each other and to scalars, and multiplied by scalars: cannot "
            f"{doing} {what}."
        )
    return jnp.asarray(value)


def as_loss(out: object, has_aux: bool | None = None) -> Loss:
    """The Loss in the result of ``loss_fn``; raises TypeError that says what to return."""
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
            "distribution, not only the value: return ng.Categorical(logits).nll(labels), say, "
            f"or ng.loss(value, ng.Categorical(logits)).{hint}"
        )
    if not loss.terms:
        raise TypeError("loss_fn returned a Loss without a distribution; add an nll to it.")
    if any(jnp.shape(term.scale) for term in loss.terms):
        raise TypeError(
            "loss_fn returned a batch of losses, from vmap or scan. Map only the model, and call "
            "nll once on the stacked outputs: it takes the mean over all leading axes."
        )
    return loss


def global_count(term: Term, axes: Sequence[str]) -> Float[Array, ""]:
    """The term's weighted number of examples, over all devices of the named axes."""
    return psum(vary(term.count, axes), axes)


def whole_count(term: Term, axes: Sequence[str]) -> Float[Array, ""]:
    """:func:`global_count` over all micro-batches of the batch."""
    if term.part is None:
        return global_count(term, axes)
    return psum(vary(term.part.examples, axes), axes)


def positive(count: Float[Array, ""]) -> Float[Array, ""]:
    """``count``, or 1 if it is zero: a safe denominator. NaN, from negative weights, stays."""
    return jnp.where(count == 0, 1, count)


def value_range(x: ArrayLike) -> tuple[float, float]:
    """The least and the greatest value of a concrete array.

    By NumPy: under ``jit`` JAX's own functions would return tracers.
    """
    values = np.asarray(x)
    return values.min().item(), values.max().item()
