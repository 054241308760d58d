"""Draws from a Laplace posterior."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from natgrad_jax.losses.output_cotangents import check_key
from natgrad_jax.posterior.powers import power
from natgrad_jax.posterior.record import Curvature
from natgrad_jax.tracing import model
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.hyperparams import check_not_negative, check_positive
from natgrad_jax.utils.precision import at_least_float32


def sample(
    curvature: Curvature,
    params: PyTree,
    rng: PRNGKeyArray,
    *,
    examples: float | Float[Array, ""],
    prior_precision: float | Float[Array, ""],
    temperature: float | Float[Array, ""] = 1.0,
) -> PyTree:
    """A draw from the Laplace posterior ``θ ~ N(θ*, T (N F + τ I)⁻¹)``.

    ``θ = θ* + √T (N F + τ I)^(−½) ε`` with white noise ε. Of a layer's matrix that is::

        K̄ = K̄* + √T Q_A [ε' / √(N S + τ)] Q_Gᵀ,    ε' = Q_Aᵀ ε Q_G, as white as ε

    Predict with several draws and average the predicted probabilities, for example
    ``jax.vmap(lambda key: predict(ng.posterior.sample(curvature, params, key, …)))(keys)``.

    For a posterior over the last layer, or over any others, pass
    ``ng.posterior.select(curvature, "head")``: all other parameters stay at θ*.

    Args:
      curvature: F, from :func:`from_state` or :func:`from_data`.
      params: θ*, the trained parameters, or the NNX model.
      rng: a key; the same key gives the same draw.
      examples: N, the number of training examples. N times the loss must be the negative log
        likelihood of all of them: F is the Fisher of their mean.
      prior_precision: τ ≥ 0 of the prior ``N(0, I / τ)``, in units of 1 / parameter squared. A
        weight decay w in the mean loss, ``½ w ‖θ‖²``, is ``τ = N w``.
      temperature: T ≥ 0; 1 is the posterior, less is a narrower one, 0 gives θ*.

    Returns:
      New parameters like ``params``, in their dtypes; for an NNX model, a new model.

    Raises:
      ValueError: a number out of range; parameters that are missing or have other shapes.
      TypeError: ``rng`` is no key.

    Source: Ritter et al. 2018, equations 6 to 9; Daxberger et al. 2021.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> key = jax.random.key(0)
    >>> drawn = ng.posterior.sample(curvature, params, key, examples=4, prior_precision=1.0)
    >>> drawn["kernel"].shape
    (4, 3)
    """
    check_positive(examples=examples)
    check_not_negative(prior_precision=prior_precision, temperature=temperature)
    check_key(rng)
    tree, rest = model.split(params)
    given = tree_paths.leaves(tree)
    keys = jax.random.split(rng, len(given))
    noise = {
        path: jax.random.normal(key, x.shape, at_least_float32(x.dtype))
        for key, (path, x) in zip(keys, given.items(), strict=True)
    }
    # (N F + τ)^(−½) = N^(−½) (F + τ / N)^(−½)
    white = tree_paths.replace(tree, noise)
    drawn = power(curvature, white, -0.5, prior_precision / examples)
    scale = jnp.sqrt(temperature / examples)
    moved = lambda old, x: (old + scale * x).astype(old.dtype)
    return model.merge(jax.tree.map(moved, tree, drawn), rest)
