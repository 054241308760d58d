"""Layers of equal geometry, kept and handled as one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import natgrad_jax as ng
from natgrad_jax.layers.bundles import bundled
from natgrad_jax.state.walk import states
from natgrad_jax.transforms.common import preconditioner

MAKERS: dict[str, Any] = {
    "kfac": (ng.scale_by_kfac, {}),
    "kfac, low rank": (ng.scale_by_kfac, {"inverse": ng.LowRank(2)}),
    "kfac, woodbury": (ng.scale_by_kfac, {"inverse": ng.Woodbury(2), "statistics_period": 1}),
    "ekfac": (ng.scale_by_ekfac, {}),
    "ekfac, low rank": (ng.scale_by_ekfac, {"basis": ng.LowRank(2)}),
    "ekfac, running average": (ng.scale_by_ekfac, {"moments": "running_average"}),
    "kfac, groups": (ng.scale_by_kfac, {"approximation": ng.Approximation(group_size=4)}),
}


class Deep(nn.Module):
    """Equal layers among unequal ones, and two outputs that are wide enough for factors without a
    null space, whose basis would be any."""

    depth: int = 3
    width: int = 6

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(self.depth):
            x = x + nn.Dense(self.width)(nn.tanh(nn.LayerNorm()(x)))
        return nn.Dense(7)(x), nn.Dense(7)(x)


def setting(terms: int = 1, depth: int = 3) -> tuple[Any, Any, Any]:
    net, random = Deep(depth), np.random.default_rng(0)
    batch = (jnp.asarray(random.normal(size=(16, 6))), jnp.asarray(random.normal(size=(16, 7))))
    params = net.init(jax.random.key(0), batch[0])["params"]
    params = jax.tree.map(lambda x: x.astype(batch[0].dtype), params)

    def loss_fn(p: Any, x: jax.Array, y: jax.Array) -> Any:
        a, b = net.apply({"params": p}, x)
        both = ng.Gaussian(a).nll(y), ng.Gaussian(b).nll(y * 2)
        return both[0] + both[1] if terms > 1 else ng.Gaussian(a + b).nll(y)

    return loss_fn, params, batch


def run(name: str, terms: int, **more: Any) -> tuple[list[Any], Any]:
    make, options = MAKERS[name]
    loss_fn, params, batch = setting(terms)
    layers = ng.find_layers(loss_fn, params, *batch)
    tx = make(layers, 0.1, **{"statistics_period": 2, **options, **more})
    state, found = tx.init(params), []
    grad_fn = ng.value_and_grad(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        _, grads, statistics = grad_fn(params, *batch, opt_state=state)
        updates, state = tx.update(grads, state, params, statistics=statistics)
        return (
            updates,
            optax.apply_updates(params, jax.tree.map(lambda x: -0.1 * x, updates)),
            state,
        )

    for _ in range(5):
        updates, params, state = step(params, state)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    ("name", "terms"), [*((name, 1) for name in MAKERS), ("kfac", 2), ("ekfac", 2)]
)
def test_they_are_as_they_were_one_by_one(
    name: str, terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates, factors and bases at every layer's own path."""
    refresh = ng.every(3)
    with jax.enable_x64(True):
        together, state = run(name, terms, refresh=refresh)
        monkeypatch.setattr(preconditioner, "bundled", lambda layers: layers)
        alone, other = run(name, terms, refresh=refresh)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
        jax.tree.map(close, together, alone)
        assert len(state.factors) < len(other.factors)
        unsigned = np.abs if "ekfac" in name else np.asarray  # an eigenvector's sign is LAPACK's
        for read, form in ((ng.factors, np.asarray), (ng.bases, unsigned)):
            own = (dict(sorted(read(s).items())) for s in (state, other))
            jax.tree.map(lambda a, b, form=form: close(form(a), form(b)), *own)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_each_is_refreshed_in_its_turn(name: str) -> None:
    """Staggered, each of the equal layers once in a period, at different steps."""
    seen: dict[Any, list[int]] = {}
    make, _ = MAKERS[name]
    loss_fn, params, batch = setting()
    layers = ng.find_layers(loss_fn, params, *batch)
    tx = make(layers, 0.1, refresh=ng.staggered(6), statistics_period=1)
    state = tx.init(params)
    grad_fn = ng.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(state: Any, key: jax.Array) -> Any:
        _, grads, statistics = grad_fn(params, *batch, rng=key, opt_state=state)
        return tx.update(grads, state, params, statistics=statistics)[1]

    before = None
    for i in range(13):
        state = step(state, jax.random.key(i))
        now = ng.bases(state)
        for path in now if before is not None else ():
            pairs = zip(jax.tree.leaves(now[path]), jax.tree.leaves(before[path]), strict=True)
            if not all(np.array_equal(a, b) for a, b in pairs):
                seen.setdefault(path, []).append(i)
        before = now
    assert all(len(at) == 2 and at[1] - at[0] == 6 for at in seen.values())
    equal = [seen[(f"Dense_{i}",)][0] for i in range(3)]
    assert len(set(equal)) > 1


def test_a_program_does_not_grow_with_the_number_of_refreshes() -> None:
    def loops(depth: int) -> int:
        loss_fn, params, batch = setting(depth=depth)
        layers = ng.find_layers(loss_fn, params, *batch)
        tx = ng.scale_by_kfac(layers)
        state = tx.init(params)
        grad_fn = ng.value_and_grad(loss_fn, layers)
        statistics = grad_fn(params, *batch, rng=jax.random.key(0))[2]
        update = lambda g, s, p: tx.update(g, s, p, statistics=statistics)
        text = jax.jit(update).lower(params, state, params).as_text()
        return text.count("stablehlo.while") + text.count("stablehlo.case")

    assert loops(3) == loops(12)


def test_what_is_not_equal_is_apart() -> None:
    loss_fn, params, batch = setting()
    layers = ng.find_layers(loss_fn, params, *batch)
    found = bundled(layers)
    sizes = {path: len(layer.each) for path, layer in found.items()}
    assert sizes == {("Dense_0",): 3, ("LayerNorm_0",): 3, ("Dense_3",): 2}
    whole = bundled(layers.replace("Dense_1", "full"))
    assert len(whole[("Dense_0",)].each) == 2 and len(whole[("Dense_1",)].each) == 1


def test_a_masked_member_is_not_kept() -> None:
    loss_fn, params, batch = setting()
    layers = ng.find_layers(loss_fn, params, *batch)
    labels = {k: "still" if k == "Dense_1" else "own" for k in params}
    tx = optax.partition({"own": ng.kfac(0.1, layers), "still": optax.set_to_zero()}, labels)
    state = tx.init(params)
    grad_fn = ng.value_and_grad(loss_fn, layers)
    _, grads, statistics = grad_fn(params, *batch, rng=jax.random.key(0), opt_state=state)
    updates, state = tx.update(grads, state, params, statistics=statistics)
    assert ("Dense_1",) not in ng.factors(state) and ("Dense_2",) in ng.factors(state)
    assert len(next(iter(states(state))).factors[("Dense_2",)].A) == 7
    assert not np.asarray(updates["Dense_1"]["kernel"]).any()
    assert np.asarray(updates["Dense_2"]["kernel"]).any()
