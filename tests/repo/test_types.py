"""A type checker finds the mistakes in a user's program, and nothing wrong in the README's."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.once

ROOT = Path(ng.__file__).parents[1]

# Strict, but for functions without annotations, such as the README's loss_fn and step.
FLAGS = ("--strict", "--allow-untyped-defs", "--allow-untyped-calls", "--no-check-untyped-defs",
         "--ignore-missing-imports", "--follow-imports=silent", "--config-file=")  # fmt: skip

SETUP = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import natgrad_jax as ng
from natgrad_jax import plots

params = {"kernel": jnp.ones((4, 3))}
x, y = jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> ng.Loss:
    return ng.Categorical(x @ params["kernel"]).nll(y)


def loss_and_aux(params: dict[str, jax.Array], x: jax.Array) -> tuple[ng.Loss, jax.Array]:
    return loss_fn(params, x, y), x


def scalar_loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return loss_fn(params, x, y).value


def nnx_loss(model: nnx.Linear, x: jax.Array) -> ng.Loss:
    return ng.Gaussian(model(x)).nll(x)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x)


layers = ng.find_layers(loss_fn, params, x, y)
grad_fn = ng.value_and_grad(loss_fn, layers)
nll = loss_fn(params, x, y)
opt_state = ng.kfac(0.1, layers).init(params)
mesh: Mesh = jax.make_mesh((1,), ("data",))
key = jax.random.key(0)
model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
"""

RIGHT = """
ng.kfac(optax.cosine_decay_schedule(0.1, 100), layers, damping=lambda step: 1e-3)
ng.kfac(jnp.asarray(0.1), layers, factor_dtype=jnp.bfloat16, refresh=ng.every(over="data"))
ng.kfac(1, layers, refresh=ng.staggered(20, over=(mesh, "data")), trust_radius=None)
ng.ekfac(1, layers, trust_radius=ng.PerExample(2e-5))
ng.kfac(1, layers, inverse=ng.LowRank(32), approximation=ng.Approximation("sua", group_size=32))
ng.ekfac(0.1, layers, basis="eigh", refresh=ng.every(over=("data", "model")))
ng.ngd(0.1, layers, inverse="eigh", damping=0.0)
ng.prong(0.1, layers, rank=64)
ng.in_coordinates(optax.adam(1e-3), layers, "whitening", samples=1000)
ng.adaptive_kfac(layers, loss_fn, rule=ng.bernacchia())
ng.adaptive_damping(lambda d: ng.kfac(0.1, layers, damping=d), ng.levenberg_marquardt(), loss_fn)
ng.scale_by_quadratic_model(loss_and_aux, learning_rate=0.1)
ng.clip_by_trust_radius(1e-3, loss_fn)
optax.inject_hyperparams(ng.kfac)(learning_rate=0.1, layers=layers)
ng.find_layers(loss_and_aux, params, x, blocks={"kernel": "full"})
ng.find_layers(lambda params, x: loss_fn(params, x, y), params, x)
ng.find_layers(nnx_loss, model, x).replace("*/bias", "frozen").replace(("kernel",), "diagonal")
ng.find_layers(loss_fn, jax.eval_shape(lambda: params), x, y)
fisher = "mc" if len(layers) else "exact"
loss, grads, statistics = ng.value_and_grad(loss_fn, layers, fisher=fisher)(params, x, y, rng=key)
(loss, aux), _, statistics = ng.value_and_grad(loss_and_aux, layers, has_aux=True)(params, x)
loss, grads, statistics = grad_fn(params, x, y, rng=jax.random.PRNGKey(0), opt_state=opt_state)
ng.accumulate(loss_fn, layers, samples=2)(params, x[None], y[None], rng=key)
examples: jax.Array = statistics.examples + statistics.layers["head",].A.shape[0]
total: ng.Loss = 0.5 * nll + 2 * nll - np.float32(1) * nll / jnp.asarray(2.0) + sum([nll, nll]) + 1
number: float = float((nll + jnp.sum(x)).value) + float(nll.value)
ng.Categorical(x).nll(np.zeros(8, int), where=np.ones(8, bool), weights=jnp.ones(8))
ng.Gaussian(x, variance=0.5, event_ndims=1).nll(0.0)
ng.Bernoulli(x, event_ndims=0).sample(key).sum()
trace: jax.Array = jnp.trace(ng.factors(opt_state)["head",].A) * ng.damping(opt_state)
F: jax.Array = ng.fisher(loss_fn, params, x, y, fisher="mc", rng=key)
blocks = {path: jnp.trace(F) for path, F in ng.fisher(loss_fn, params, x, y, layers=layers).items()}
ng.fisher_vector_product(loss_fn, params, x, y, damping=1e-3)(params)
ng.natural_gradient(loss_fn, params, x, y, gradient=params, damping=jnp.asarray(1.0))
ng.quadratic_forms(loss_fn, params, x, y, vectors=[params, params]).sum()
curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, kind="ekfac", rng=key)
head = ng.posterior.select(ng.posterior.from_state(opt_state, layers), "head", ("mid", "bias"))
ng.posterior.sample(head, params, key, examples=8, prior_precision=jnp.asarray(1.0))["kernel"]
ng.posterior.influence(curvature, loss_fn, params, (x, y), (x, y), 0.1, query_fn=scalar_loss).sum()
ng.TrainState.create(apply_fn=None, params=params, tx=ng.kfac(0.1, layers))
plots.__name__, ng.__version__.split(".")
"""

# A line, and what the checker says of it.
WRONG = {
    'ng.kfac("0.1", layers)': 'type "str"',
    "ng.kfac(0.1)": 'Missing positional argument "layers"',
    "ng.kfac(layers, 0.1)": 'type "Layers"',
    "ng.kfac(0.1, params)": 'expected "Layers"',
    "ng.kfac(0.1, layers, 1e-3)": "Too many positional arguments",
    'ng.kfac(0.1, layers, damping="big")': '"damping" to "kfac"',
    'ng.kfac(lambda step: "0.1", layers)': "Callable[[Any], str]",
    "ng.kfac(0.1, layers, momentun=0.9)": 'did you mean "momentum"',
    "ng.kfac(0.1, layers, inverse=3)": '"inverse" to "kfac"',
    "ng.LowRank(rank=0.5)": '"rank" to "LowRank"',
    "ng.kfac(0.1, layers, refresh=20)": '"refresh" to "kfac"',
    "ng.every(over=3)": '"over" to "every"',
    'ng.staggered(over=("data", mesh))': '"over" to "staggered"',
    'ng.Approximation("suaa")': '"Approximation"',
    "ng.kfac(0.1, layers, rank=32)": 'Unexpected keyword argument "rank"',
    "ng.kfac(0.1, layers, factor_dtype=3)": '"factor_dtype" to "kfac"',
    "ng.kfca(0.1, layers)": 'no attribute "kfca"',
    "ng.scale_by_kfac(0.1, layers)": 'expected "Layers"',
    "ng.ekfac(0.1, layers, basis=3)": '"basis" to "ekfac"',
    "ng.ngd(0.1, 0.1)": 'expected "Layers"',
    'ng.prong("a", layers)': 'type "str"',
    "ng.in_coordinates(optax.adam(1e-3), layers, 3)": 'expected "str"',
    "ng.adaptive_kfac(loss_fn, layers)": 'expected "Layers"',
    "ng.adaptive_kfac(layers, scalar_loss)": "Array]",
    'ng.levenberg_marquardt("a")': 'type "str"',
    'ng.clip_by_trust_radius("a", loss_fn)': 'type "str"',
    "ng.find_layers(loss_fn)": 'Missing positional argument "params"',
    "ng.find_layers(params, loss_fn, x, y)": "expected",
    "ng.find_layers(scalar_loss, params, x, y)": "Array]",
    'ng.find_layers(loss_fn, params, x, y, blocks=["head"])': '"blocks" to "find_layers"',
    "ng.value_and_grad(layers, loss_fn)": "No overload variant",
    "ng.value_and_grad(scalar_loss, layers)": "Array]",
    "ng.value_and_grad(loss_fn, layers, fisher=3)": "No overload variant",
    'ng.value_and_grad(loss_fn, layers, samples="1")': "No overload variant",
    "ng.accumulate(loss_fn, layers, fisher=3)": '"fisher" to "accumulate"',
    "grad_fn(params, x, y, rng=0)": '"rng" to "__call__"',
    "grad_fn(params, x, y, key=key)": "keyword argument",
    "loss, grads = grad_fn(params, x, y)": "Too many values to unpack",
    "grad_fn(params, x, y, rng=key)[2].number": '"Statistics" has no attribute',
    "ng.Categorical()": 'Missing positional argument "logits"',
    "ng.Categorical(10)": 'expected "Array"',
    "ng.Categorical(x).nll()": 'Missing positional argument "targets"',
    'ng.Categorical(x).nll("a")': 'type "str"',
    "ng.Categorical(x).nll(y, mask=y)": 'argument "mask"',
    'ng.Gaussian(x, variance="1")': '"variance" to "Gaussian"',
    "ng.Gaussian(x, event_ndims=0.5)": '"event_ndims" to "Gaussian"',
    "nll * nll": "operand types for *",
    'nll + "a"': "operand types for +",
    "jnp.log(nll)": 'type "Loss"',
    "nll.mean()": '"Loss" has no attribute',
    'layers["head"]': "Invalid index type",
    'layers.replace("head", 3)': 'expected "str"',
    'layers.replace(3, "full")': 'type "int"',
    'ng.factors(opt_state)["head"]': "Invalid index type",
    'ng.factors(opt_state)["head",].B': 'has no attribute "B"',
    "ng.damping(opt_state).value": '"Array" has no attribute',
    "ng.fisher(loss_fn, params, x, y, rng=3)": "No overload variant",
    "ng.fisher(loss_fn, params, x, y).items()": '"Array" has no attribute "items"',
    "ng.fisher_diagonal(scalar_loss, params, x, y)": "Array]",
    "ng.natural_gradient(loss_fn, params, x, y)": 'Missing named argument "gradient"',
    "ng.quadratic_forms(loss_fn, params, x, y)": 'Missing named argument "vectors"',
    "ng.rank_for(opt_state)": 'Missing positional argument "layers"',
    "ng.whiten(params, layers)": 'Missing positional argument "coordinates"',
    "ng.posterior.from_state(opt_state)": 'Missing positional argument "layers"',
    "ng.posterior.solve(params, params, 0.1)": 'expected "Curvature"',
    'ng.posterior.power(layers, params, "2")': 'type "str"',
    "ng.diagnostics.report(layers)": 'Missing positional argument "opt_state"',
}


def errors_in(files: dict[str, str], folder: Path) -> dict[tuple[str, int], str]:
    """What mypy reports, by file and line."""
    for name, code in files.items():
        (folder / name).write_text(code)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *FLAGS, f"--cache-dir={folder / 'cache'}", *files],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found: dict[tuple[str, int], str] = defaultdict(str)
    for name, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)", run.stdout, re.M):
        found[name, int(line)] += message
    return found


def test_a_type_checker_finds_mistakes_in_a_program_and_no_others(tmp_path: Path) -> None:
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    files = {
        "readme.py": example,
        "right.py": SETUP + RIGHT,
        "wrong.py": SETUP + "\n".join(WRONG),
    }
    found = errors_in(files, tmp_path)
    start = SETUP.count("\n") + 1
    told = {line: found.pop(("wrong.py", start + i), "") for i, line in enumerate(WRONG)}
    assert dict(found) == {}
    assert {line: told[line] for line, message in WRONG.items() if message not in told[line]} == {}
