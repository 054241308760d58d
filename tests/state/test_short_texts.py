"""What states and statistics print as: a short text at any size, and no number of large arrays."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import natgrad_jax as ng

SIZES = (200, 100, 100, 100, 10)
X, Y = jnp.ones((16, 200)), jnp.arange(16) % 10
PARAMS = {
    f"Dense_{i}": {"kernel": jnp.ones((n, m)) / n, "bias": jnp.zeros(m)}
    for i, (n, m) in enumerate(itertools.pairwise(SIZES))
}


def loss_fn(params, x, y):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return ng.Categorical(x).nll(y)


LAYERS = ng.find_layers(loss_fn, PARAMS, X, Y)
MAKE = {
    "KFACState": lambda: ng.scale_by_kfac(LAYERS),
    "EKFACState": lambda: ng.scale_by_ekfac(LAYERS),
    "InCoordinatesState": lambda: ng.prong(0.01, LAYERS),
    "SOAPState": ng.scale_by_soap,
    "ShampooState": ng.scale_by_shampoo,
    "ExactNGDState": lambda: ng.scale_by_exact_ngd(1.0, momentum=0.9),
    "AdaptiveDampingState": lambda: ng.adaptive_kfac(LAYERS, loss_fn),
}


def test_a_state_of_kfac_in_full():
    state = ng.scale_by_kfac(LAYERS, damping=0.5).init(PARAMS)
    assert (
        repr(state)
        == str(state)
        == (
            "KFACState(step=0, damping=0.5, examples=1, rejected=0; 536 kB; also weights, bases; "
            "factors:\n"
            "  Dense_0: Factors(A=float32[201,201], G=float32[100,100])\n"
            "  Dense_1 and 1 more: Factors(A=float32[2,101,101], G=float32[2,100,100])\n"
            "  Dense_3: Factors(A=float32[101,101], G=float32[10,10]))"
        )
    )


@pytest.mark.parametrize("name", MAKE)
def test_a_state_has_a_short_text(name):
    state = MAKE[name]().init(PARAMS)
    text = repr(state)
    assert name in text and "Array(" not in text and len(text) < 1500
    assert "step=0" in text


def test_statistics_and_what_readers_return():
    _, _, statistics = ng.value_and_grad(loss_fn, LAYERS)(PARAMS, X, Y, rng=jax.random.key(0))
    first = "  Dense_0: Sums(A=float32[201,201], G=float32[100,100], rows=16)"
    head, line, *_ = repr(statistics).split("\n")
    assert head.startswith("Statistics(examples=16; ") and head.endswith("sums:") and line == first
    state = ng.scale_by_kfac(LAYERS).init(PARAMS)
    inverse = repr(ng.bases(state)["Dense_0",].A)
    assert inverse == "LowRankInverse(V=float32[201,32], inner=float32[32,32], shift=1)"


def test_rows_of_the_exact_natural_gradient():
    rows = ng.value_and_grad(loss_fn, fisher="exact")(PARAMS, X, Y)[2]
    assert "Dense_0/kernel: float32[160,200,100]" in repr(rows)


def test_a_report_prints_its_table_everywhere():
    report = ng.diagnostics.report(LAYERS, ng.scale_by_kfac(LAYERS).init(PARAMS))
    assert repr(report) == str(report) and "Dense_0" in str(report).split("\n")[2]
    shapes = jax.eval_shape(lambda: report)
    assert repr(shapes).startswith("Report of kfac/Dense_0, ")


def test_a_text_of_anything_that_a_tree_can_hold():
    """In errors and under transformations leaves are tracers, shapes, labels, variables or gone."""
    tx = ng.scale_by_kfac(LAYERS)
    state = tx.init(PARAMS)
    texts = []
    jax.jit(lambda state: texts.append(repr(state)))(state)
    texts.append(repr(jax.eval_shape(tx.init, PARAMS)))
    assert all(text.startswith("KFACState(step=int32[], damping=float32[]") for text in texts)
    assert "step='label'" in repr(jax.tree.map(lambda x: "label", state))
    model = nnx.Linear(200, 10, rngs=nnx.Rngs(0))
    layers = ng.find_layers(lambda m, x, y: ng.Categorical(m(x)).nll(y), model, X, Y)
    optimizer = nnx.Optimizer(model, ng.scale_by_kfac(layers), wrt=nnx.Param)
    assert repr(optimizer.opt_state).startswith("KFACState(step=0, damping=")
    gone = tx.init(PARAMS)
    jax.tree.map(lambda x: x.delete(), gone)
    assert repr(gone).startswith("KFACState(step=int32[]")


def test_states_stay_the_tuples_that_they_are():
    tx = optax.chain(ng.scale_by_kfac(LAYERS), optax.trace(0.9))
    state = tx.init(PARAMS)
    assert isinstance(state[0], tuple) and state[0]._replace(damping=1.0).damping == 1.0
    again = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert repr(again[0]) == repr(state[0])


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # its import
def test_treescope_shows_a_states_fields():
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text(ng.scale_by_kfac(LAYERS).init(PARAMS))
    assert text.startswith("KFACState(") and "clock=Clock(" in text and "float32(201, 201)" in text
