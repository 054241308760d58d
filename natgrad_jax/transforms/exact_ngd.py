"""The exact damped natural gradient of any function, solved in sample space."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from natgrad_jax.layers.collection import Layers
from natgrad_jax.linalg.cholesky import upper_factor
from natgrad_jax.state.clock import Clock, start, tick
from natgrad_jax.statistics.fisher_rows import Gram, Rows, gram
from natgrad_jax.statistics.sample_space import GRAM
from natgrad_jax.statistics.spec import EncodedSpec
from natgrad_jax.transforms.common.chain import descent
from natgrad_jax.transforms.common.trust_radius import (
    PerExample,
    TrustRadius,
    before_rate,
    checked,
    radius_at,
)
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.finite import only_finite
from natgrad_jax.utils.hyperparams import Scalar, at, check_fraction, check_positive
from natgrad_jax.utils.precision import HIGHEST, at_least_float32
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path

# By parameter.
Tree = dict[Path, Float[Array, "..."]]


@printed_short
class ExactNGDState(NamedTuple):
    """State of :func:`scale_by_exact_ngd`.

    ``clock``; ``damping``: λ of the last step, ``()``; ``last``: the last direction, for the
    momentum, a tree like the gradients, None without; ``rejected``: how many updates were not
    finite and replaced by zeros, int32 ``()``; ``request``: what is to be measured.

    >>> import natgrad_jax as ng
    >>> float(ng.scale_by_exact_ngd(0.5).init({}).damping)
    0.5
    """

    clock: Clock
    damping: jax.Array
    last: Any
    rejected: jax.Array
    request: EncodedSpec


def scale_by_exact_ngd(
    damping: Scalar = 1e-3, *, momentum: Scalar | None = None,
    trust_radius: TrustRadius | None = None, whole_jacobian: bool = True,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Precondition gradients by the exact damped Fisher of the batch.

    With M rows ``F = Jᵀ J`` (examples times columns of the output Fisher), and the gradient split
    into ``∇ = Jᵀ r + g``, g what does not come through the outputs (weight decay)::

        Δ = (F + λ)⁻¹ ∇ = Jᵀ K⁻¹ r + (g − Jᵀ K⁻¹ J g) / λ,   K = J Jᵀ + λ I,  M × M

    With momentum μ (SPRING) Δ is the minimiser of ``½ ΔᵀFΔ − ∇ᵀΔ + ½ λ ‖Δ − μ Δ₋‖²``, Δ₋ the last
    one. Where g is below the rounding of ∇ it is left out.

    Any function of any parameters, without layers. Memory for M × parameters numbers, time for M³.
    Complex ones too, by the real Fisher over their real and imaginary parts: give gradients as
    ``value_and_grad`` returns them, without the conjugate that optax's other transformations want;
    updates are ready for ``optax.apply_updates``.

    Args:
      damping: λ > 0, in the units of the Fisher (loss per parameter squared). It is raised to 16
        roundings of tr K: 2e-6 tr K in float32, below which K has no reliable inverse there.
      momentum: μ in [0, 1); None: no momentum.
      trust_radius: κ; Δ is scaled by ``min(1, √(κ / ΔᵀFΔ))`` with the damped F. The learning rate
        is taken as 1 here (:func:`exact_ngd` uses its own). None: no bound.
      whole_jacobian: whether J lies in memory. If not, K is summed over parameters, one after
        another (memory for M × the largest of them), and Jᵀ is one more backward pass: a pass over
        the batch for each parameter. ``value_and_grad`` then needs ``opt_state=``; not for
        micro-batches, masked parameters and named axes.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``: the :class:`Rows` of
      ``ng.value_and_grad(loss_fn, fisher="exact")``, without layers.

    Raises:
      TypeError: statistics of layers. ValueError: numbers out of range; rows of other parameters.

    Source: Chen & Heyl 2024 (MinSR); Guzmán-Cordero et al. 2025 (ENGD by Woodbury's identity);
    Goldshlager, Abrahamsen & Lin 2024 (SPRING).

    >>> import jax.numpy as jnp, optax, natgrad_jax as ng
    >>> params, x = {"w": jnp.ones(3)}, jnp.eye(3)
    >>> loss_fn = lambda p, x: ng.Gaussian(x @ p["w"], event_ndims=0).nll(jnp.zeros(3))
    >>> tx = ng.scale_by_exact_ngd(1e-6)
    >>> loss, grads, rows = ng.value_and_grad(loss_fn, fisher="exact")(params, x)
    >>> tx.update(grads, tx.init(params), statistics=rows)[0]["w"].round(3)
    Array([1., 1., 1.], dtype=float32)
    """
    check_positive(damping=damping)
    radius = checked(trust_radius)
    check_fraction(momentum=0 if momentum is None else momentum)

    def init_fn(params: optax.Params) -> ExactNGDState:
        zero = jnp.zeros((), jnp.int32)
        last = None if momentum is None else jax.tree.map(jnp.zeros_like, params)
        request: EncodedSpec = {} if whole_jacobian else {GRAM: ()}
        return ExactNGDState(start(), at(damping, zero), last, jnp.copy(zero), request)

    def update_fn(
        updates: optax.Updates,
        state: ExactNGDState,
        params: optax.Params | None = None,
        *,
        statistics: Rows | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ExactNGDState]:
        del params, extra
        step, gradient = state.clock.step, tree_paths.leaves(updates)
        rows = _checked(statistics, gradient)
        prior = None
        if momentum is not None:
            mu = at(momentum, step)
            prior = {p: mu * x for p, x in tree_paths.leaves(state.last).items()}
        wide = {p: x.astype(at_least_float32(x.dtype)) for p, x in gradient.items()}
        J = _operators(rows, gradient)
        found, quadratic, used = direction(J, wide, at(damping, step), prior)
        if radius is not None:
            kappa = radius_at(radius, step, rows.examples)
            bound = jnp.sqrt(kappa / jnp.where(quadratic > 0, quadratic, 1))
            scale = jnp.where(quadratic > 0, jnp.minimum(1, bound), 1)
            found = {p: x * scale for p, x in found.items()}
        found = {p: x.astype(gradient[p].dtype) for p, x in found.items()}
        found, bad = only_finite(found)
        new = tree_paths.replace(updates, found)
        last = state.last
        if last is not None:
            last = jax.tree.map(lambda x, old: jnp.where(bad, old, x), new, last)
        new = jax.tree.map(jnp.conj, new)  # of complex numbers gradients are the conjugate
        clock = tick(state.clock, state.clock.statistics_due, rows.examples)
        return new, ExactNGDState(clock, used, last, state.rejected + bad, state.request)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def exact_ngd(
    learning_rate: Scalar, *, damping: Scalar = 1e-3, momentum: Scalar | None = None,
    trust_radius: Scalar | PerExample | None = None, weight_decay: Scalar = 0.0,
    whole_jacobian: bool = True,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The exact natural gradient, with SPRING's momentum, a trust region and weight decay.

    :func:`scale_by_exact_ngd`, then ``weight_decay · params`` added, then the learning rate.

    Args:
      learning_rate: η, a float, an array or a schedule; 1 is the Gauss-Newton step. For a line
        search chain :func:`scale_by_exact_ngd`, ``optax.scale(-1)`` and one of optax, with
        ``value_fn=lambda params, statistics: loss_fn(params, batch).value``: it must name every
        extra argument of ``update``.
      damping, momentum, whole_jacobian: as in :func:`scale_by_exact_ngd`.
      trust_radius: κ; the update is scaled by ``min(1, √(κ / (η² ΔᵀFΔ)))``; None: no bound;
        :class:`~natgrad_jax.PerExample`: in proportion to the batch.
      weight_decay: decoupled, as in ``optax.adamw``; per step, times the learning rate.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      As :func:`scale_by_exact_ngd`.

    Source: as :func:`scale_by_exact_ngd`.

    >>> import natgrad_jax as ng
    >>> tx = ng.exact_ngd(1.0, damping=1e-4, momentum=0.9)
    """
    inner = scale_by_exact_ngd(
        damping,
        momentum=momentum,
        trust_radius=before_rate(trust_radius, learning_rate),
        whole_jacobian=whole_jacobian,
    )
    return descent(inner, Layers({}), learning_rate, optax.identity(), weight_decay)


class Operators(NamedTuple):
    """J as what it does: ``K = J Jᵀ``, ``push(v) = J v``, ``pull(y) = Jᵀ y``, and r."""

    K: Float[Array, "M M"]
    push: Callable[[Tree], Float[Array, " M"]]
    pull: Callable[[Float[Array, " M"]], Tree]
    r: Float[Array, " M"]


def direction(
    J: Operators, gradient: Tree, damping: Float[Array, ""], prior: Tree | None = None
) -> tuple[Tree, Float[Array, ""], Float[Array, ""]]:
    """``Δ``, ``ΔᵀFΔ`` with the damped F, and the λ that was used; ``prior``: μ Δ₋."""
    eps, r = jnp.finfo(J.K.dtype).eps, J.r
    trace = jnp.trace(J.K)  # λ enters the state: of rows that are not finite it takes nothing
    floor = jnp.where(jnp.isfinite(trace), 16 * eps * trace, 0)
    used = jnp.maximum(damping, floor).astype(J.K.dtype)
    factor = upper_factor(J.K + used * jnp.eye(len(r), dtype=J.K.dtype))
    solve = lambda y: jax.scipy.linalg.cho_solve((factor, False), y)

    own = J.pull(r)
    rest = {p: x - own[p] for p, x in gradient.items()}
    size = lambda tree: jnp.sqrt(sum(_square(x) for x in tree.values()))
    whole = size(gradient)
    negligible = jnp.isfinite(whole) & (size(rest) <= 64 * eps * whole)
    rest = {p: jnp.where(negligible, 0, x) / used for p, x in rest.items()}
    if prior is not None:
        r = r - J.push(prior)
    found = J.pull(solve(r - J.push(rest)))
    found = {p: x + rest[p] + (0 if prior is None else prior[p]) for p, x in found.items()}
    quadratic = _square(J.push(found)) + used * sum(_square(x) for x in found.values())
    return found, quadratic, used.astype(damping.dtype)


def _operators(statistics: Rows | Gram, gradient: Tree) -> Operators:
    """The operators of these statistics over the parameters of ``gradient``, with F a mean."""
    weight = statistics.examples[statistics.term]
    share = jnp.where(weight > 0, 1 / jnp.sqrt(jnp.where(weight > 0, weight, 1)), 0)
    if isinstance(statistics, Gram):
        scale = share.astype(statistics.K.dtype)
        whole = statistics
        return Operators(
            whole.K * scale[:, None] * scale,
            lambda v: whole.push({p: x.astype(gradient[p].dtype) for p, x in v.items()}) * scale,
            lambda y: whole.pull(y * scale),
            (whole.residual * share).astype(scale.dtype),
        )
    rows = lambda p, x: statistics.J[p].reshape(len(share), x.size) * share[:, None]
    J = {p: rows(p, x).astype(at_least_float32(x.dtype)) for p, x in gradient.items()}
    K = functools.reduce(jnp.add, map(gram, J.values()), jnp.zeros((len(share),) * 2, jnp.float32))
    r = (statistics.residual * share).astype(K.dtype)
    return Operators(K, partial(_push, J, jnp.zeros_like(r)), partial(_pull, J, gradient), r)


def _push(J: Tree, zero: Float[Array, " rows"], v: Tree) -> Float[Array, " rows"]:
    """``J v``; complex numbers are pairs of real ones, as gradients give them."""
    of = lambda j, x: jnp.matmul(j, x.conj().ravel().astype(j.dtype), precision=HIGHEST).real
    return functools.reduce(jnp.add, [of(j, v[p]) for p, j in J.items()], zero)


def _pull(J: Tree, like: Tree, y: Float[Array, " rows"]) -> Tree:
    """``Jᵀ y``, in the shapes of ``like``."""
    of = lambda j, x: jnp.matmul(y.astype(j.dtype), j, precision=HIGHEST).reshape(x.shape)
    return {p: of(j, like[p]) for p, j in J.items()}


def _square(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(jnp.abs(x)))


def _checked(statistics: Any, gradient: Tree) -> Rows | Gram:
    """The statistics of these gradients; raises for anything else."""
    if not isinstance(statistics, Rows | Gram):
        came = "none" if statistics is None else f"a {type(statistics).__name__}"
        raise (ValueError if statistics is None else TypeError)(
            f"exact_ngd needs rows as statistics; got {came}. Write grad_fn = "
            'ng.value_and_grad(loss_fn, fisher="exact"), without layers, and tx.update(grads, '
            "opt_state, params, statistics=statistics) with its third result."
        )
    if isinstance(statistics, Gram):
        measured = jax.eval_shape(statistics.pull, statistics.residual)
        if measured.keys() != gradient.keys():
            raise ValueError(
                "exact_ngd with whole_jacobian=False cannot leave parameters out: K is of all that "
                "loss_fn gets. Keep J whole, or pass frozen parameters as another argument."
            )
        return statistics
    for path, x in gradient.items():
        own = statistics.J.get(path)
        if own is None or own.shape[1:] != x.shape:
            came = "are missing" if own is None else f"have shape {own.shape[1:]}"
            raise ValueError(
                f"the rows of {tree_paths.join(path)} {came}, its gradient has shape {x.shape}: "
                "statistics and gradients must come from one call of value_and_grad."
            )
    return statistics
