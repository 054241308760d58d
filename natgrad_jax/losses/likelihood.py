"""From a distribution to a loss: its negative log-likelihood, or its curvature alone."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Num, Real, Shaped

from natgrad_jax.losses.distribution_base import Predictive
from natgrad_jax.losses.example_weights import OUTPUTS_ALONE, example_weights
from natgrad_jax.losses.terms import Loss, Term
from natgrad_jax.utils.hyperparams import is_concrete


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Distribution(Predictive):
    """A predictive distribution; an own likelihood is a subclass of a few lines.

    Its annotated fields are arrays ``(*examples, *event)`` that broadcast to one shape: the
    *outputs* of the network. Every one that depends on parameters has its part in the Fisher. A
    subclass becomes a frozen dataclass and a pytree by itself, and defines

    * ``log_prob(self, targets)``: ``log p`` of each number, ``(*examples, *event)``;
    * ``sample(self, key)``: targets, for ``fisher="mc"``; or
    * ``fisher(self)``: the Fisher information of one number over the outputs, rows in the order of
      the fields, for ``fisher="exact"`` (``"mc"`` then draws from its root if there is no sampler).

    Inside these the outputs have at least float32. Class attributes: ``features``, by output the
    number of axes behind the event's (``{"logits": 1}`` for one logit a class); and
    ``usual_event_ndims``, the number of axes of an event if ``event_ndims`` is not given (1).

    Raises:
      TypeError: (for the class) neither ``sample`` nor ``fisher``, or no ``log_prob``.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> class Laplace(ng.Distribution):
    ...     location: jax.Array
    ...     log_scale: jax.Array
    ...
    ...     def log_prob(self, y):
    ...         return -jnp.abs(y - self.location) * jnp.exp(-self.log_scale) - self.log_scale
    ...
    ...     def fisher(self):
    ...         return (jnp.exp(-2 * self.log_scale), 0.0), (0.0, 1.0)
    >>> params = {"location": jnp.zeros(1), "log_scale": jnp.zeros(1)}
    >>> loss_fn = lambda p, y: Laplace(p["location"], p["log_scale"]).nll(y)
    >>> float(Laplace(jnp.zeros((4, 1)), jnp.zeros(1)).nll(jnp.ones((4, 1))).value)
    1.0
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        writes = lambda name: getattr(cls, name) is not getattr(Predictive, name)
        ways = any(map(writes, ("sample", "fisher", "root_of_numbers", "root_column")))
        if not (ways and (writes("log_prob") or writes("nll_per_example"))):
            raise TypeError(
                f"{cls.__name__}: a distribution defines log_prob(self, targets), and sample(self, "
                "key) or fisher(self)."
            )
        jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))

    def nll(
        self,
        targets: ArrayLike,
        where: Shaped[ArrayLike, "*#examples"] | None = None,
        weights: Real[ArrayLike, "*#examples"] | None = None,
    ) -> Loss:
        """The mean negative log-likelihood over examples, as a :class:`Loss`.

        ``Σ w (−log p) / Σ w`` over all examples, with ``w = where · weights``; a missing mask or
        weight counts as 1. No gradient flows into ``w``. Masked examples contribute nothing to the
        loss and to its curvature: a batch gives the factors that it gives without them. So do
        masked positions (tokens), in layers whose rows lie along the mask's axes.

        Multiplied by a negative number, a loss keeps its gradient and loses its curvature.

        Args:
          targets: the observed targets. For :class:`Categorical` class indices ``(*examples,)`` or
            probabilities ``(*examples, C)``; otherwise an array of the outputs' shape.
          where: a mask that broadcasts to ``(*examples,)``.
          weights: nonnegative weights that broadcast to ``(*examples,)``. Under ``jit`` their
            values cannot be checked; negative ones then make the loss and its gradients NaN.

        Raises:
          TypeError: complex outputs. ValueError: targets of the wrong shape; targets or weights out
            of range, if concrete.
        """
        full, weight = _weighted(self, "nll", where, weights)
        if OUTPUTS_ALONE.get():
            return Loss((Term(full, None, None),))
        targets = jnp.asarray(targets)
        if weight is not None and targets.shape[: len(full.examples)] == full.examples:
            # targets of masked examples may be anything, for example −1 or NaN
            behind = tuple(range(len(full.examples), targets.ndim))
            counts = jnp.expand_dims(weight > 0, behind)
            targets = jnp.where(counts, targets, full.possible(targets))
        full.check(targets)
        return Loss((Term(full, targets, weight),))

    def curvature(
        self,
        where: Shaped[ArrayLike, "*#examples"] | None = None,
        weights: Real[ArrayLike, "*#examples"] | None = None,
        centred: bool = False,
    ) -> Loss:
        """The distribution's Fisher alone: a :class:`Loss` of value 0, for :func:`loss`.

        ``F = Σ w Jₙᵀ Hₙ Jₙ / Σ w``, Hₙ the Fisher of example n over the outputs, Jₙ their Jacobian.

        Args:
          where, weights: as for :meth:`nll`.
          centred: use ``Jₙ − J̄``, J̄ the weighted mean over examples: the covariance instead of the
            second moment, as for unnormalized models ``log |ψ|``. :func:`exact_ngd` and
            :func:`fisher` have it exactly, the diagonal of leftover parameters in expectation. What
            K-FAC and EKFAC sum over examples (Kronecker factors, full blocks, moments) is the
            second moment, without weights times ``1 − 1/N`` in expectation: J̄ is not taken away.
            Each micro-batch has its own mean.

        Raises:
          TypeError: complex outputs. ValueError: weights out of range, if concrete.
        """
        full, weight = _weighted(self, "curvature", where, weights)
        if not centred:
            return Loss((Term(full, None, weight),))
        centre = {k: _centred(full, x, weight) for k, x in full.outputs.items()}
        return Loss((Term(full.with_outputs(centre), None, weight, uncentred=full.outputs),))


def loss(
    value: Num[ArrayLike, ""],
    *distributions: Distribution | Loss,
    where: Shaped[ArrayLike, "*#examples"] | None = None,
    weights: Real[ArrayLike, "*#examples"] | None = None,
    centred: bool = False,
) -> Loss:
    """A loss with the value and gradient of ``value``, and the Fisher of the distributions.

    For losses that are no likelihoods: policy gradients, variational Monte Carlo, contrastive and
    adversarial losses.

    Args:
      value: the scalar to be minimised.
      distributions: whose Fisher is the curvature: :class:`Distribution`, or
        ``scale * distribution.curvature(where=…, weights=…)`` for a scale, mask and weights of its
        own. Several add.
      where, weights, centred: of the bare distributions among them, as in
        :meth:`Distribution.curvature`.

    Returns:
      A :class:`Loss`; it adds to others. ``fisher="empirical"`` has no labels here.

    Raises:
      TypeError: a value that is no scalar; no distributions, or others than these; where, weights
        or centred without bare ones.

    Source: Wu et al. 2017, section 3 (ACKTR: the Fisher of the policy and the critic); Pfau et al.
    2020, appendix (log |ψ|).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> logits, advantage = jnp.zeros((2, 3)), jnp.array([1.0, -1.0])
    >>> surrogate = -jnp.mean(advantage * jax.nn.log_softmax(logits)[:, 0])
    >>> float(ng.loss(surrogate, ng.Categorical(logits)).value)
    0.0
    """
    terms: tuple[Term, ...] = ()
    for x in distributions:
        own = x.curvature(where, weights, centred) if isinstance(x, Distribution) else x
        if not isinstance(own, Loss) or own.scalar is not None:
            raise TypeError(
                "ng.loss(value, *distributions): pass distributions (ng.Categorical(logits)) "
                "or 0.5 * ng.Gaussian(values).curvature() with a scale or mask of its own; got "
                f"{type(x).__name__}."
            )
        # a likelihood gives its Fisher alone
        terms += tuple(replace(term, targets=None) for term in own.terms)
    if not terms:
        raise TypeError("ng.loss(value, *distributions) needs at least one distribution.")
    unused = where is not None or weights is not None or centred
    if unused and not any(isinstance(x, Distribution) for x in distributions):
        raise TypeError(
            "ng.loss: where, weights and centred are for bare distributions, and there are none. "
            "Give them to curvature(where=…, weights=…, centred=…)."
        )
    return Loss(terms) + value  # type: ignore[operator]


def _weighted(
    distribution: Distribution, doing: str, where: Any, weights: Any
) -> tuple[Distribution, Float[Array, "*examples"] | None]:
    """The distribution in its full shape, numbers fixed, and the weights of its examples."""
    given = distribution.parametrized
    traced = not is_concrete(given[distribution.first])
    constant = lambda x: not isinstance(x, jax.Array) or (traced and is_concrete(x))
    counts = lambda x: not jnp.issubdtype(jnp.result_type(x), jnp.inexact)  # no derivative by them
    fixed = {name for name, x in given.items() if constant(x) or counts(x)}
    fixed = fixed.union(distribution.fixed)
    full = replace(distribution, fixed=tuple(sorted(fixed - {distribution.first}))).broadcast()
    shape = full.parametrized[full.first].shape
    if not math.prod(shape):
        raise ValueError(
            f"{type(full).__name__}.{doing} got an empty batch: its {full.first} have shape "
            f"{shape}. Skip empty batches before the loss."
        )
    return full, None if OUTPUTS_ALONE.get() else example_weights(full, where, weights)


def _centred(
    full: Distribution, x: Float[Array, "..."], weight: Float[Array, "*examples"] | None
) -> Float[Array, "..."]:
    """``x − x̄ + stop_gradient(x̄)``: the same value, centred derivatives."""
    axes = tuple(range(len(full.examples)))
    if weight is not None:
        weight = jnp.expand_dims(weight, tuple(range(weight.ndim, x.ndim)))
        weight = jnp.broadcast_to(weight, x.shape)
    mean = jnp.average(x, axes, weight)
    return x - (mean - jax.lax.stop_gradient(mean))
