"""Run any optax transformation in coordinates of each layer: whitened, or an eigenbasis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from natgrad_jax.layers import gradients
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.layers.collection import Layers, check_layers
from natgrad_jax.layers.layer import Layer
from natgrad_jax.reparametrization import change_of_basis, coordinates as charts
from natgrad_jax.reparametrization.coordinates import CHOICES
from natgrad_jax.reparametrization.parameters import unwhiten, whiten
from natgrad_jax.state.clock import due
from natgrad_jax.state.divided import divided
from natgrad_jax.statistics.batch_statistics import Statistics
from natgrad_jax.statistics.checks import check_statistics
from natgrad_jax.statistics.spec import StatisticsSpec, is_one
from natgrad_jax.transforms.common import coordinate_state, estimators
from natgrad_jax.transforms.common.coordinate_state import InCoordinatesState
from natgrad_jax.transforms.common.options import approximation_of, renamed_keywords
from natgrad_jax.transforms.common.refresh_schedule import Refresh, every, refresh_schedule
from natgrad_jax.transforms.common.transport import ON_REFRESH
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.finite import only_finite
from natgrad_jax.utils.hyperparams import Scalar, at, check_fraction, check_period, check_positive
from natgrad_jax.utils.tree_paths import Path


@renamed_keywords
def in_coordinates(
    inner: optax.GradientTransformation, layers: Layers, coordinates: str = "whitening", *,
    epsilon: Scalar = 1e-2, decay: Scalar = 0.95, statistics_period: Scalar | None = None,
    refresh_period: Scalar | None = None, samples: Scalar | None = None,
    on_refresh: str = "transport", approximation: Approximation | str = "sua",
    refresh: Refresh | str | None = None, rank: int | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Run an optax transformation in coordinates of each layer, without changing the model.

    With ``K̄ = [K; b]`` of a layer, ``K̄ = L_A K̂ L_Gᵀ``::

        ∇̂ = L_Aᵀ ∇K̄ L_G,    K̂ = L_A⁻¹ K̄ L_G⁻ᵀ,    Δ̂ = inner(∇̂, K̂),    Δ = L_A Δ̂ L_Gᵀ

    The inner transformation sees gradients and parameters in these coordinates, in trees of the
    same structure and shapes: weight decay acts on ``K̂``, masks by path work. ``value_fn`` and
    ``grad`` among the extra arguments (line searches) are converted too. Layers without coordinates
    (normalizations, free parameters, embeddings that are attended to) and leftover parameters stay
    canonical. Non-finite values never enter the state: the inner transformation sees zeros in place
    of a non-finite gradient. ``state.rejected`` counts such events.

    ``coordinates``:

    - ``"whitening"`` (PRONG): inputs centred and white, ``L_A = [[Uᵀ, 0], [−cᵀUᵀ, 1]]``,
      ``U = diag(σ + ε)^{-1/2} Ũᵀ``; convolutions whiten across feature maps, with the same U at
      every kernel offset. It needs no Fisher pass: ``grad_fn`` makes none, whatever its ``fisher``.
    - ``"whitening_plus"`` (PRONG+): the same, with σ measured in the basis Ũ on every batch, so
      that each whitened unit keeps variance 1.
    - ``"both_sides"``: gradients of the outputs white too; with SGD inside this is K-FAC.
    - ``"eigenbasis"``: the Kronecker eigenbasis; with ``optax.adam`` inside much like SOAP.
    - ``"identity"``: the inner transformation as it is.

    At a refresh the coordinates change, and ``on_refresh`` determines what happens to those parts
    of the inner state that have the parameters' structure and shapes. ``"transport"`` treats them
    as averages of gradients (momentum, Adam's mean) and writes them in the new coordinates,
    ``L'_Aᵀ L_A⁻ᵀ m̂ L_G⁻¹ L'_G``, so that the canonical gradients they represent do not change; the
    fields ``nu``, ``nu_max``, ``sum_of_squares``, ``e_g``, ``e_x`` are averages of squares and are
    mapped by the squared entries of that map. ``"keep"`` leaves the numbers unchanged. ``"reset"``
    calls ``inner.init`` on the parameters in the new coordinates; use it for inner states that hold
    parameters (lookahead, schedule-free) or pairs of steps (L-BFGS).

    Args:
      inner: any optax transformation.
      layers: from :func:`natgrad_jax.find_layers`.
      coordinates: see above.
      epsilon: ε > 0, added to variances of activations; for ``"both_sides"`` K-FAC's λ, divided
        between inputs and outputs.
      decay: of the factors: factor = decay · old + (1 − decay) · batch, bias-corrected.
      statistics_period: steps between measurements, 10 by default and 1 for ``"whitening_plus"``;
        the first step always measures, and so does a step that refreshes.
      refresh_period: T, steps between refreshes of the coordinates; None: 100. The first step
        always computes them (whitened initialization). To whiten by more than its batch, give the
        first update the sum of several batches' statistics.
      samples: Nₛ, instead of ``decay`` and ``statistics_period``: factors are the mean over about
        the last Nₛ examples before a refresh, and only those are measured.
      on_refresh: see above.
      approximation: ``"sua"`` (channels alone), ``"kfc"`` (whole patches), or an
        :class:`~natgrad_jax.Approximation` without groups.
      refresh: :func:`~natgrad_jax.every`, with the devices that share the work (``over``). All
        coordinates change in one step, since the inner state is transported as a whole.
      rank: k, for ``"whitening"`` and ``"whitening_plus"``: whiten the k leading directions of a
        layer (warm-started) and all others by their mean variance,
        ``L = V diag(s) Vᵀ + r (I − V Vᵀ)``, where that is cheaper (2 k less than the number of
        inputs); None: all directions.

    Returns:
      A transformation with ``update(grads, state, params, *, statistics)``.

    Raises:
      ValueError: unknown choices, numbers out of range, ``statistics`` missing or of other layers;
        ``on_refresh="reset"`` without ``params``.

    Source: Desjardins et al. 2015, sections 3 and 4 (PRONG, PRONG+) and its footnote 4; Fujimoto &
    Ohira 2018 (both sides); Laurent et al. 2018 (SUA).

    >>> import optax, natgrad_jax as ng
    >>> tx = ng.in_coordinates(optax.adam(1e-3), ng.Layers({}), "whitening")
    """
    check_layers(layers)
    _check_inner(inner)
    choice = _choice(coordinates, on_refresh, rank, samples)
    if statistics_period is None:
        statistics_period = 1 if choice.rescaled else 10
    check_positive(epsilon=epsilon, samples=1 if samples is None else samples)
    check_period(statistics_period=statistics_period)
    check_fraction(decay=decay)
    schedule = refresh_schedule(refresh, refresh_period, every(100))
    form = approximation_of(approximation)
    form = dataclasses.replace(form, centred=choice.centred, beyond="diagonal")
    if schedule.staggered or form.group_size is not None:
        raise ValueError(
            "all coordinates change in one step, and correlations between all channels are kept: "
            "use refresh=ng.every(100), and an approximation without group_size."
        )
    config = coordinate_state.CoordinateConfig(
        choice, epsilon, decay, statistics_period, schedule, samples, on_refresh
    )
    every_step = samples is None and is_one(statistics_period)
    request = StatisticsSpec(form, inputs_only=not choice.outputs, every_step=every_step)
    approximated = layers.approximate(form)
    has_some = [
        path for path, x in approximated.items() if charts.applies(x) and choice.find is not None
    ]
    all_own = approximated.within(has_some)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> InCoordinatesState:
        # params only say which layers to keep; shapes come from the layers
        kept = all_own.within(approximated.of(params))
        state = jax.jit(lambda: coordinate_state.initial_state(kept, choice, request, rank))()
        return estimators.for_params(state, params)._replace(inner=inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: InCoordinatesState,
        params: optax.Params | None = None,
        *,
        statistics: Statistics | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, InCoordinatesState]:
        gradients.check_paths(tree_paths.leaves(updates), layers)
        own = all_own.within(state.factors)
        if own:
            check_statistics(statistics, own, "in_coordinates", choice.outputs)
            assert statistics is not None
            statistics = statistics.ready()
            state = _followed(state, statistics, updates, params, inner, own, config)
        mapped = _run(inner, _frozen(updates, layers), state, params, own, extra)
        examples = jnp.zeros(()) if statistics is None else statistics.examples
        return _frozen(mapped[0], layers), coordinate_state.advance(mapped[1], config, examples)

    return divided(init_fn, update_fn)


def _check_inner(inner: Any) -> None:
    if isinstance(inner, Layers) or not hasattr(inner, "update"):
        raise TypeError(
            "inner must be an optax transformation; got "
            f"{type(inner).__name__}. Write in_coordinates(optax.adam(1e-3), layers)."
        )


def _followed(
    state: InCoordinatesState,
    statistics: Statistics,
    updates: optax.Updates,
    params: optax.Params | None,
    inner: optax.GradientTransformationExtraArgs,
    layers: Mapping[Path, Layer],
    config: coordinate_state.CoordinateConfig,
) -> InCoordinatesState:
    """The state with this step's coordinates, and its inner state in them."""
    old, before = state.bases, state
    state = coordinate_state.average(state, statistics, layers, config)
    refresh = due(state.clock.step, at(config.refresh.period, state.clock.step))
    refresh |= estimators.first_seen(before, state)
    state = coordinate_state.refresh(state, layers, config, refresh)
    state = coordinate_state.transported(
        state, updates, params, inner, layers, old, config, refresh
    )
    return (
        coordinate_state.rescaled(state, statistics, layers, config)
        if config.choice.rescaled
        else state
    )


def _choice(coordinates: str, on_refresh: str, rank: Any, samples: Any) -> charts.Choice:
    """The checked choice; raises ValueError, also for keywords that exclude each other."""
    for name, value, known in (
        ("coordinates", coordinates, tuple(CHOICES)),
        ("on_refresh", on_refresh, ON_REFRESH),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
    choice = CHOICES[coordinates]
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if rank is not None and not (whole and choice.find is charts.white_inputs):
        raise ValueError(
            "rank counts directions: write a whole number of at least 1, and "
            f'coordinates="whitening" or "whitening_plus"; got {rank!r} with {coordinates!r}.'
        )
    if choice.rescaled and samples is not None:
        raise ValueError(
            'coordinates="whitening_plus" measures every batch for its diagonal: leave samples out.'
        )
    return choice


def _run(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: InCoordinatesState,
    params: optax.Params | None,
    layers: Mapping[Path, Layer],
    extra: dict[str, Any],
) -> tuple[optax.Updates, InCoordinatesState]:
    """Run the inner transformation in the current coordinates; return canonical updates."""
    bases = state.bases
    into = lambda tree: gradients.map_layers(
        tree, layers, lambda path, x: change_of_basis.gradient_to(layers[path], bases[path], x)
    )
    if "grad" in extra:
        extra = {**extra, "grad": into(extra["grad"])}
    if "value_fn" in extra:
        value_fn = extra["value_fn"]
        in_them = lambda hat, *args, **kwargs: value_fn(
            unwhiten(hat, layers, bases), *args, **kwargs
        )
        extra = {**extra, "value_fn": in_them}
    hat = None if params is None else whiten(params, layers, bases)
    # neither the inner state nor the parameters may see non-finite values
    seen, bad_gradient = only_finite(into(updates))
    found, inner_state = inner.update(seen, state.inner, hat, **extra)
    # unwhiten is linear, so it also maps updates, which are differences of parameters
    found, bad_update = only_finite(unwhiten(found, layers, bases))
    rejected = state.rejected + bad_gradient + bad_update
    return found, state._replace(inner=inner_state, rejected=rejected)


def _frozen(updates: optax.Updates, layers: Layers) -> optax.Updates:
    """The updates with zeros for frozen parameters."""
    given = tree_paths.leaves(updates)
    frozen = [x.path for x in layers.leftover if x.block == "frozen" and x.path in given]
    return tree_paths.replace(updates, {path: jnp.zeros_like(given[path]) for path in frozen})
