"""Distributions of numpyro, distrax and others as predictive distributions; none is imported."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Shaped

from natgrad_jax.losses.distribution_base import Outputs
from natgrad_jax.losses.likelihood import Distribution


class FromDistribution(Distribution):
    """What :func:`from_distribution` returns.

    ``given``: the outputs by name. ``make``: from them to the library's distribution. ``own``: the
    number of axes of each that lie behind those of the batch.
    """

    given: Any
    make: Callable[..., Any] = field(metadata={"static": True})
    own: tuple[tuple[str, int], ...] = field(metadata={"static": True})
    usual_event_ndims = 0

    @property
    def features(self) -> Mapping[str, int]:  # type: ignore[override]
        return dict(self.own)

    @property
    def parametrized(self) -> Outputs:
        return self.given

    def _with(self, arguments: Outputs) -> "FromDistribution":
        changed: dict[str, Any] = {"given": {**self.given, **arguments}}
        return super()._with(changed)

    def wide(self) -> "FromDistribution":
        whole = lambda x: not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        counts = {name: x for name, x in self.given.items() if whole(x)}
        return super().wide()._with(counts)

    def log_prob(self, targets: Shaped[Array, "..."]) -> Float[Array, "*examples_and_event"]:
        return self.make(**self.given).log_prob(targets)

    def sample(self, key: PRNGKeyArray) -> Shaped[Array, "..."]:
        draw = self.make(**self.given).sample
        return draw(seed=key) if "seed" in inspect.signature(draw).parameters else draw(key)

    def possible(self, targets: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        drawn = jax.lax.stop_gradient(self.sample(jax.random.key(0))).astype(targets.dtype)
        return drawn if drawn.shape == targets.shape else super().possible(targets)

    def check(self, targets: Shaped[Array, "..."]) -> None:
        d = self.make(**self.given)
        if targets.shape != (*d.batch_shape, *d.event_shape):
            raise ValueError(
                f"from_distribution: targets of a {type(d).__name__} of batch_shape "
                f"{tuple(d.batch_shape)} and event_shape {tuple(d.event_shape)} have these axes, "
                f"in this order; got {targets.shape}."
            )


def from_distribution(
    make: Callable[..., Any], /, *, event_ndims: int = 0, **outputs: Float[ArrayLike, "..."]
) -> FromDistribution:
    """A distribution of numpyro, distrax or another library as a :class:`Distribution`.

    Its batch axes are the examples' axes, its event belongs to one example. ``fisher="mc"`` and
    ``"empirical"`` use its own sampler and ``log_prob``; ``"exact"`` has no formula.

    Args:
      make: a class of the library, or a function ``make(**outputs)`` that builds the distribution;
        it is called for the batch, and for single examples. The distribution has ``log_prob``,
        ``sample(key)`` or ``sample(seed=key)``, ``batch_shape`` and ``event_shape``, and its batch
        axes broadcast.
      event_ndims: how many of its last batch axes belong to one example too.
      outputs: its arguments by name. Those that depend on parameters have their part in the Fisher;
        the parameters that ``make`` itself refers to have none.

    Raises:
      TypeError: a distribution instead of what builds it, or no outputs.
      ValueError: (from ``nll``) targets of the wrong shape; (from ``fisher="exact"``) always.

    >>> import types, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> def exponential(rate):  # for numpyro: ng.from_distribution(dist.Exponential, rate=rate)
    ...     return types.SimpleNamespace(
    ...         log_prob=lambda y: jnp.log(rate) - rate * y,
    ...         sample=lambda key: jax.random.exponential(key, rate.shape) / rate,
    ...         batch_shape=rate.shape, event_shape=())
    >>> float(ng.from_distribution(exponential, rate=jnp.ones(4)).nll(jnp.full(4, 2.0)).value)
    2.0
    """
    if not callable(make) or (hasattr(make, "log_prob") and not isinstance(make, type)):
        name = type(make).__name__
        raise TypeError(
            "from_distribution(make, **outputs) takes what builds the distribution, and its "
            f"arguments; got a {name}. Write ng.from_distribution({name}, loc=loc, scale=scale), "
            "or a function of the outputs in place of the class."
        )
    if not outputs:
        raise TypeError(
            "from_distribution needs the distribution's arguments by name, such as loc=loc: the "
            "Fisher is taken over them."
        )
    given, own = {}, _own_axes(make, outputs)
    for name, x in outputs.items():
        if isinstance(x, np.ndarray | jax.Array) and np.ndim(x) < own[name]:
            x = jnp.reshape(x, (1,) * (own[name] - np.ndim(x)) + np.shape(x))
        given[name] = x
    return FromDistribution(given, make, tuple(own.items()), event_ndims=event_ndims)


def _own_axes(make: Callable[..., Any], outputs: Mapping[str, ArrayLike]) -> dict[str, int]:
    """For each argument the number of its axes behind those of the batch.

    Found by giving it more axes in front, and counting the batch's.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for name, x in outputs.items()
    }

    def batch_axes(**changed: jax.ShapeDtypeStruct) -> int:
        found = []
        jax.eval_shape(lambda given: found.append(len(make(**given).batch_shape)), shapes | changed)
        return found[0]

    more = batch_axes() + 4
    longer = lambda x: jax.ShapeDtypeStruct((1,) * more + x.shape, x.dtype)
    return {
        name: more + len(x.shape) - batch_axes(**{name: longer(x)}) for name, x in shapes.items()
    }
