"""The log determinant of the posterior's precision, and the evidence that it gives."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from natgrad_jax.curvature.eigenbases import everywhere
from natgrad_jax.posterior.record import Curvature, covered, covered_leaves
from natgrad_jax.tracing import model
from natgrad_jax.utils.hyperparams import check_not_negative, check_positive


def log_determinant(
    curvature: Curvature,
    *,
    examples: float | Float[Array, ""],
    prior_precision: float | Float[Array, ""],
) -> Float[Array, ""]:
    """``log det(N F + τ I)`` over the parameters that have a block, ``Σ log(N S + τ)``.

    Args:
      curvature: F, from :func:`from_state` or :func:`from_data`.
      examples: N, the number of training examples.
      prior_precision: τ ≥ 0, in units of 1 / parameter squared; with τ = 0 the result is −∞ for an
        F without full rank.

    Returns:
      ``()``.

    Raises:
      ValueError: a number out of range.

    Source: MacKay 1992; Ritter et al. 2018, section 2.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> ng.posterior.log_determinant(curvature, examples=4, prior_precision=1.0).shape
    ()
    """
    check_positive(examples=examples)
    check_not_negative(prior_precision=prior_precision)
    of = lambda S: jnp.sum(jnp.log(examples * S + prior_precision), dtype=float)
    total = jnp.zeros((), float)
    for path, layer in curvature.layers.items():
        S = everywhere(layer, curvature.bases[path], curvature.eigenvalues[path])
        total += of(S)
        # groups of channels may be padded by coordinates that no parameter has: there S is 0
        padded = S.size - sum(p.size for p in layer.parameters)
        if padded:
            total -= padded * jnp.log(jnp.asarray(prior_precision, float))
    return total + sum(of(x) for x in curvature.diagonal.values())


def log_marginal_likelihood(
    curvature: Curvature,
    params: PyTree,
    loss: float | Float[Array, ""],
    *,
    examples: float | Float[Array, ""],
    prior_precision: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The evidence of the prior's precision τ, by Laplace's approximation.

    Over the P parameters θ that have a block, with the prior ``N(0, I / τ)``::

        log p(D | τ) ≈ −N loss − ½ τ ‖θ*‖² + ½ P log τ − ½ log det(N F + τ I)

    It compares values of τ, and models: the larger, the better. Choose τ without a validation set:
    ``jax.vmap(lambda τ: ng.posterior.log_marginal_likelihood(…, prior_precision=τ))(grid)``.

    Args:
      curvature: F, from :func:`from_state` or :func:`from_data`.
      params: θ*, the trained parameters, or the NNX model.
      loss: the mean negative log likelihood of the training examples at θ*, without penalties.
        Constants that it leaves out (``½ log 2π`` of a Gaussian) are left out of the result.
      examples: N, the number of training examples.
      prior_precision: τ > 0, in units of 1 / parameter squared.

    Returns:
      ``()``, in nats.

    Raises:
      ValueError: a number out of range; parameters that are missing or have other shapes.

    Source: MacKay 1992; Immer et al. 2021, equation 4.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> evidence = lambda tau: ng.posterior.log_marginal_likelihood(
    ...     curvature, params, loss_fn(params, x, y).value, examples=4, prior_precision=tau)
    >>> bool(evidence(1.0) > evidence(1e-3))
    True
    """
    check_positive(prior_precision=prior_precision)
    tau = jnp.asarray(prior_precision, float)
    own = covered_leaves(curvature, model.split(params)[0]).values()
    squared = sum(jnp.sum(jnp.square(x), dtype=float) for x in own)
    number = sum(p.size for p in covered(curvature.layers).values())
    logdet = log_determinant(curvature, examples=examples, prior_precision=prior_precision)
    return -examples * loss - 0.5 * (tau * squared - number * jnp.log(tau) + logdet)
