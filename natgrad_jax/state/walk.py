"""The one walk over an optimizer state: this library's states in any chain or wrapper."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from natgrad_jax.state.clock import Clock
from natgrad_jax.state.divided import whole
from natgrad_jax.state.members import by_layer


def states(opt_state: Any) -> list[Any]:
    """Every state of this library inside an optimizer state, at any depth: those with a clock; each
    as readers see it, with every layer at its own path."""

    def is_ours(x: Any) -> bool:
        return isinstance(getattr(x, "clock", None), Clock)

    return [by_layer(whole(x)) for x in _nodes(opt_state, is_ours)]


def instances(opt_state: Any, kind: type) -> list[Any]:
    """Every state of that class inside an optimizer state, at any depth."""
    return _nodes(opt_state, lambda x: isinstance(x, kind))


def _nodes(tree: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=wanted) if wanted(x)]


def plain(opt_state: Any) -> Any:
    """The state with arrays in place of the variables that NNX optimizers wrap them in."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    unwrap = lambda x: x[...] if is_variable(x) else x
    return jax.tree.map(unwrap, opt_state, is_leaf=is_variable)


def statistics_due(opt_state: Any) -> jax.Array:
    """Whether any transformation in ``opt_state`` needs statistics in the next step: ``()``, or
    ``(terms,)`` for each term."""
    found = states(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no natgrad_jax transformation that determines when statistics are "
            "due. Pass the state of a chain that contains scale_by_kfac or another transformation "
            "of this library, or leave opt_state out to measure on every call."
        )
    # NNX optimizers wrap the arrays of their state in variables: a pytree of one leaf each
    wanted = [jax.tree.leaves(s.clock.statistics_due)[0] for s in found]
    return functools.reduce(jnp.logical_or, wanted)
