"""Loss, gradients and the rows of the Fisher, without layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.losses import output_cotangents
from natgrad_jax.losses.example_weights import check_values
from natgrad_jax.losses.terms import LossFn
from natgrad_jax.state.walk import plain, states
from natgrad_jax.statistics import forward
from natgrad_jax.statistics.checks import check_axes
from natgrad_jax.statistics.example_jacobian import problem_of
from natgrad_jax.statistics.fisher_rows import Choice, gram_of, rows_of
from natgrad_jax.tracing import model
from natgrad_jax.tracing.trace import trace
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.sharding import psum, vary

GRAM = "gram"  # the word in a state's request


def value_and_rows(
    loss_fn: LossFn, fisher: str, samples: int, has_aux: bool, axes: tuple[str, ...]
) -> Any:
    """:func:`natgrad_jax.value_and_grad` without layers."""

    def grad_fn(
        params: Any, *args: Any, rng: Any = None, opt_state: Any = None, loss_scale: Any = None
    ) -> Any:
        pieces = wants_pieces(opt_state)
        if pieces and axes:
            raise ValueError(
                "whole_jacobian=False works under jit, also with a sharded batch; with axis_name "
                "every device would need the others' rows. Keep J whole there."
            )
        check_rng(fisher, rng)
        tree, rest = model.split(params)
        check_axes(tree, args, axes)
        tree = vary(tree, axes)
        traced = trace(loss_fn, tree, rest, args, has_aux)
        training = partial(forward.plain, traced, axes)
        (value, outputs), pullback, (loss, aux, state) = jax.vjp(training, tree, has_aux=True)
        check_values(loss)
        model.propagate(params, state)
        none = jax.tree.map(jnp.zeros_like, outputs)
        grads = scaled(lambda one: pullback((one, none))[0], jnp.ones_like(value), loss_scale)
        rows: Any = None
        if fisher != "none":
            problem = problem_of(loss_fn, tree, rest, args, traced)
            choice = Choice(fisher, rng, samples, axes)
            if pieces:
                rows = gram_of(problem, loss, choice, pullback, jnp.zeros_like(value))
            else:
                rows = rows_of(problem, loss, choice)
        value, grads = psum(value, axes), psum(grads, axes)
        return ((value, aux) if has_aux else value), grads, rows

    return grad_fn


def scaled(pullback: Callable[[Any], Any], one: Any, loss_scale: Any) -> Any:
    """The gradients, through a loss that is multiplied by ``loss_scale``."""
    if loss_scale is None:
        return pullback(one)
    over = lambda x: (x.astype(at_least_float32(x.dtype)) / loss_scale).astype(x.dtype)
    return jax.tree.map(over, pullback(one * jnp.asarray(loss_scale, one.dtype)))


def check_rng(fisher: str, rng: Any) -> None:
    """Raise without the key that sampling needs, and for what is no key."""
    if fisher == "mc" and rng is None:
        raise ValueError(
            'fisher="mc" samples labels from the model and needs a key: call '
            "grad_fn(params, batch, rng=key), with a new key each step."
        )
    output_cotangents.check_key(rng)


def wants_pieces(opt_state: Any) -> bool:
    """Whether a transformation wants K instead of J."""
    return any(GRAM in getattr(s, "request", {}) for s in states(plain(opt_state)))
