"""Faults: what is not finite never reaches a state, and no input that is finite makes it so."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformations import BASE, Batch, Poison, batch, compiled, finite

import natgrad_jax as ng
from natgrad_jax.state.clock import Clock
from natgrad_jax.state.walk import states
from natgrad_jax.transforms.common.refresh_schedule import PERIOD

pytestmark = pytest.mark.once

# every base row, and those that invert, follow or find their bases in another way
NAMES = [*BASE, "kfac, eigh", "kfac, woodbury", "kfac, low rank, spread, a half"]
NAMES += ["kfac, Newton-Schulz, bfloat16 factors", "ekfac, running average, qr, schedules"]
each = pytest.mark.parametrize("name", NAMES)
DEPTH = 2

Fault = Callable[[Any, Batch], tuple[Any, Batch]]


def at_layer(path: tuple[str, str], of: Callable[[jax.Array], jax.Array]) -> Fault:
    """Of one parameter."""
    module, leaf = path
    return lambda params, own: (
        params | {module: params[module] | {leaf: of(params[module][leaf])}}, own
    )  # fmt: skip


def at_inputs(of: Callable[[jax.Array], jax.Array]) -> Fault:
    return lambda params, own: (params, own._replace(x=of(own.x)))


# Inputs and parameters that are finite: so must every number be that comes of them.
DEGENERATE: dict[str, Fault] = {
    "no activation": at_inputs(jnp.zeros_like),
    "constant inputs": at_inputs(jnp.ones_like),
    "duplicated examples": at_inputs(lambda x: jnp.broadcast_to(x[:1], x.shape)),
    "a dead unit": at_layer(("hidden_0", "kernel"), lambda k: k.at[:, 0].set(0)),
    "a layer of dead units": at_layer(("hidden_0", "kernel"), jnp.zeros_like),
    "a layer that nothing depends on": at_layer(("head", "kernel"), jnp.zeros_like),
    "everything zero": lambda params, own: (jax.tree.map(jnp.zeros_like, params), own),
    "inputs times 1e15": at_inputs(lambda x: 1e15 * x),
    "inputs times 1e-15": at_inputs(lambda x: 1e-15 * x),
    "inner activations times 1e15": at_layer(("norm", "scale"), lambda s: 1e15 * s),
    "inner activations times 1e-15": at_layer(("norm", "scale"), lambda s: 1e-15 * s),
    "gradients times 1e15": at_layer(("head", "kernel"), lambda k: 1e15 * k),
    "gradients times 1e-15": at_layer(("head", "kernel"), lambda k: 1e-15 * k),
    "duplicates times 1e15": at_inputs(lambda x: jnp.broadcast_to(1e15 * x[:1], x.shape)),
}

# What is not finite in the data, and in what was measured.
DATA = {f"{value} in the activations": at_inputs(lambda x, v=value: x.at[0, 0].set(v))
        for value in (np.nan, np.inf)}  # fmt: skip
DATA["negative weights"] = lambda params, own: (
    params, own._replace(weights=own.weights.at[0].set(-0.5))
)  # fmt: skip
POISONS = {f"{value} in {field}": Poison(**{field: value})
           for field in Poison._fields for value in (np.nan, np.inf)}  # fmt: skip


def due(state: Any) -> Any:
    """The state with everything due: statistics, and a refresh."""
    is_clock = lambda x: isinstance(x, Clock)
    now = Clock(jnp.zeros((), jnp.int32), jnp.ones((), bool))
    return jax.tree.map(lambda x: now if is_clock(x) else x, state, is_leaf=is_clock)


def rejected(state: Any) -> int:
    """All events that were counted, in every state there is."""
    counts = [x for p, x in jax.tree_util.tree_leaves_with_path(state)
              if getattr(p[-1], "name", "") in ("rejected", "refused")]  # fmt: skip
    return sum(map(int, counts))


def trained(name: str) -> tuple[Any, Any]:
    """Parameters and state after a good step."""
    s, state, step = compiled(name, DEPTH)
    return step(s.params, state, batch(), jax.random.key(0), Poison())[:2]


@each
def test_degenerate_inputs_give_finite_steps(name: str) -> None:
    """From the first step, and after a good one."""
    s, fresh, step = compiled(name, DEPTH)
    failed = []
    for fault, spoil in DEGENERATE.items():
        for params, state in ((s.params, fresh), trained(name)):
            params, own = spoil(params, batch(1))
            for i in range(3):
                params, state, updates, _ = step(params, due(state), own, jax.random.key(i),
                                                 Poison())  # fmt: skip
                if not finite((updates, state)):
                    failed.append((fault, i))
    assert failed == []
    assert step.traces == 1


def matters(name: str, poison: Poison) -> bool:
    """Whether this transformation looks at what is poisoned."""
    state = compiled(name, DEPTH)[1]
    field = next(f for f, x in poison._asdict().items() if not np.isfinite(x))
    if field == "grads":
        return True
    if any(isinstance(x, ng.ExactNGDState) for x in states(state)):
        return field in ("A", "G")  # of its rows J and the residual
    own = [x for x in states(state) if hasattr(x, "request") and getattr(x, "factors", None)]
    if field == "A" or not own:
        return bool(own)
    if field == "leftover":
        return any(hasattr(x, "diagonal") for x in own)
    if field == "moments":
        return any("moments" in x.request for x in own)
    return any(f.G is not None for x in own for f in x.factors.values())


@each
def test_what_is_not_finite_never_reaches_the_state(name: str) -> None:
    """Nor the step; the event is counted, and the next good step is one of any other."""
    _, _, step = compiled(name, DEPTH)
    params, state = trained(name)
    cases = {fault: (spoil(params, batch(1))[1], Poison()) for fault, spoil in DATA.items()}
    cases |= {fault: (batch(1), poison) for fault, poison in POISONS.items()}
    failed = []
    for fault, (own, poison) in cases.items():
        _, later, updates, _ = step(params, due(state), own, jax.random.key(1), poison)
        if not finite((updates, later)):
            failed.append((fault, "not finite"))
        looked = fault in DATA or matters(name, poison)
        counted = rejected(later) > rejected(state)
        if counted != looked and name != "clip_by_trust_radius":  # which has nothing to keep
            failed.append((fault, "not counted" if looked else "counted"))
        _, after, updates, _ = step(params, due(later), batch(2), jax.random.key(2), Poison())
        if not finite((updates, after)) or not any(np.any(x) for x in jax.tree.leaves(updates)):
            failed.append((fault, "no recovery"))
        if rejected(after) > rejected(later):
            failed.append((fault, "counted twice"))
    assert failed == []


@each
def test_the_last_good_factors_stay(name: str) -> None:
    """Those of the layer that was not finite; of the others the new ones."""
    _, _, step = compiled(name, DEPTH)
    params, state = trained(name)
    own = [x for x in states(state) if getattr(x, "factors", None)]
    if not own:
        pytest.skip("it keeps no factors")
    before = ng.factors(state)
    poison = Poison(A=np.nan) if hasattr(own[0], "request") else Poison(grads=np.nan)
    _, later, *_ = step(params, due(state), batch(1), jax.random.key(1), poison)
    for path, factors in ng.factors(later).items():
        assert all(map(np.array_equal, jax.tree.leaves(factors), jax.tree.leaves(before[path])))
    _, later, *_ = step(params, due(state), batch(1), jax.random.key(1), Poison())
    head = next(path for path in before if path[0] == "head")
    assert not np.array_equal(ng.factors(later)[head].A, before[head].A)


@each
def test_a_basis_that_cannot_be_found_leaves_the_last(name: str) -> None:
    """As of a factor that a fault of the memory has spoiled: whatever factorises it fails."""
    _, _, step = compiled(name, DEPTH)
    params, state = trained(name)
    if not any(getattr(x, "factors", None) for x in states(state)):
        pytest.skip("it keeps no factors")
    is_ours = lambda x: bool(getattr(x, "factors", None))
    head = next(path for path in ng.factors(state) if path[0] == "head")

    def spoiled(x: Any) -> Any:
        if not is_ours(x):
            return x
        nan = jax.tree.map(lambda f: f.at[(0,) * f.ndim].set(jnp.nan), x.factors[head])
        return x._replace(factors=x.factors | {head: nan})

    bad = jax.tree.map(spoiled, due(state), is_leaf=is_ours)
    nothing = batch(1)._replace(weights=jnp.zeros_like(batch(1).weights))  # measures no new factor
    later = bad
    for _ in range(PERIOD):  # by then it was every layer's turn
        _, later, updates, _ = step(params, later, nothing, jax.random.key(1), Poison())
        assert finite((updates, ng.bases(later)))
    old, new = (ng.bases(x)[head] for x in (state, later))
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(old)))
    assert rejected(later) > rejected(state)
