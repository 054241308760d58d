"""Physics-informed networks: K-FAC and EKFAC against Adam and L-BFGS, at equal seconds.

    python benchmarks/physics/pinn.py --seconds 40 --search 10
    python benchmarks/physics/pinn.py --problems burgers --dtype float64

The problems are in ``lib/pde.py``. All contenders start from the same parameters and see the same
fixed points (``--fresh``: new points each step, L-BFGS excepted). A contender with several settings
first tries each for ``--search`` seconds; the one with the lowest loss then has ``--seconds``, as
has everybody. Seconds are those of training alone: compiling is told apart, evaluating is not
counted. What is compared is the relative L2 error on points of a test grid: in the table, against
seconds in PREFIX.png, and with every other number in PREFIX.json.

================ =================================================================================
kfac, ekfac      at a fixed rate with momentum; the Fisher summed exactly (one number at each point)
…-rescaled       their direction; step size and momentum from the exact quadratic model
…-mc             the Fisher sampled
adam             its rate falls along a cosine of the seconds
lbfgs            ``optax.lbfgs``: memory 10, its line search; a step may take several gradients
================ =================================================================================
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib
from lib import pde, report
from lib.arguments import positive

import natgrad_jax as ng

Setting = dict[str, float]
Making = Callable[..., Any]  # layers, the loss, options: a transformation
# A problem and the fraction of points that statistics are measured on: what starts a state, of
# params and a setting, and the step, of params, opt_state, points, key, part and a setting.
Contender = Callable[[pde.Problem, float], tuple[Callable[..., Any], Callable[..., Any]]]
EVALUATIONS = 40  # points on a curve
HEADER = "problem   contender            error      loss   steps ms/step compile s  setting"


class Result(NamedTuple):
    """One contender on one problem: its curve, the first point being step 0."""

    problem: str
    contender: str
    setting: Setting
    searched: list[tuple[Setting, float, float]]  # loss and error of each short run
    compile_seconds: float
    steps: list[int]
    seconds: list[float]
    loss: list[float]  # at the fixed points
    error: list[float]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args, console = parse_arguments(argv), Console()
    results = []
    console.print(HEADER, soft_wrap=True)
    with jax.enable_x64(args.dtype == "float64"):
        for name, contender in itertools.product(args.problems, args.contenders):
            problem = pde.make_problem(name, args.width, args.points, args.dtype)
            results.append(run(problem, name, contender, args))
            console.print(line(results[-1]), highlight=False, soft_wrap=True)
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(results, figure)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings["command"] = shlex.join(["python", "benchmarks/physics/pinn.py", *argv])
    report.write_json(numbers, settings, results, [])
    report.tell_files(console, figure, numbers)


def natural(make: Making, fisher: str = "exact") -> Contender:
    """A setting's numbers are arguments of the step: all settings share one compiled program."""

    def contender(problem, fraction):
        layers = ng.find_layers(problem.loss_fn, problem.init(0), problem.points)
        grad_fn = ng.value_and_grad(problem.loss_fn, layers, fisher=fisher)

        def transformation(setting: Setting) -> Any:
            numbers = dict(setting)
            period = jnp.asarray(numbers.pop("period"), jnp.int32)  # of measuring and refreshing
            numbers |= {"statistics_period": period, "refresh_period": period}
            return make(layers, problem.loss_fn, statistics_fraction=fraction, **numbers)

        def step(params, opt_state, points, key, part, setting):
            loss, grads, statistics = grad_fn(params, points, rng=key, opt_state=opt_state)
            more = {"statistics": statistics, "grad": grads, "args": (points,)}
            updates, opt_state = transformation(setting).update(grads, opt_state, params, **more)
            return optax.apply_updates(params, updates), opt_state, loss

        return lambda params, setting: transformation(setting).init(params), step

    return contender


def at_rate(alias: Callable[..., Any], **how: str) -> Making:
    return lambda layers, _, learning_rate, **more: alias(learning_rate, layers, **how, **more)


def rescaled(scale: Callable[..., Any], **how: str) -> Making:
    def make(layers, loss_fn, damping, **more):
        model = ng.scale_by_quadratic_model(loss_fn, damping=damping)
        return optax.chain(scale(layers, damping, **how, **more), model)

    return make


def adam(problem: pde.Problem, _: float) -> Any:
    """``part``: of the seconds, how many have passed."""
    tx = optax.scale_by_adam()

    def step(params, opt_state, points, key, part, setting):
        loss, grads = jax.value_and_grad(lambda p: problem.loss_fn(p, points).value)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        rate = setting["learning_rate"] * (0.5 + 0.5 * jnp.cos(jnp.pi * part))
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), opt_state, loss

    return lambda params, setting: tx.init(params), step


def lbfgs(problem: pde.Problem, _: float) -> Any:
    tx = optax.lbfgs()

    def step(params, opt_state, points, key, part, setting):
        value_fn = lambda params: problem.loss_fn(params, points).value
        loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        more = {"value": loss, "grad": grads, "value_fn": value_fn}
        updates, opt_state = tx.update(grads, opt_state, params, **more)
        return optax.apply_updates(params, updates), opt_state, loss

    return lambda params, setting: tx.init(params), step


# The best few of small grids on poisson-2: damping 1e-6 to 1e-2, rate 0.03 to 0.3, momentum 0 and
# 0.9, decay 0 to 0.95, trust radius 1e-3 to 1, period 2 to 20.
DESCENT = {"period": 20, "learning_rate": 0.1, "momentum": 0.9, "decay": 0.0}
DAMPED = [DESCENT | {"damping": radius, "trust_radius": radius} for radius in (1e-3, 1e-2)]
RESCALED = [{"period": 20, "decay": 0.0, "damping": damping} for damping in (1e-4, 1e-3)]
KFAC, EKFAC = {"inverse": "eigh"}, {"basis": "eigh"}
CONTENDERS: dict[str, tuple[Contender, list[Setting]]] = {
    "kfac": (natural(at_rate(ng.kfac, **KFAC)), DAMPED),
    "ekfac": (natural(at_rate(ng.ekfac, **EKFAC)), DAMPED),
    "kfac-rescaled": (natural(rescaled(ng.scale_by_kfac, **KFAC)), RESCALED),
    "kfac-rescaled-mc": (natural(rescaled(ng.scale_by_kfac, **KFAC), "mc"), RESCALED),
    "ekfac-rescaled": (natural(rescaled(ng.scale_by_ekfac, **EKFAC)), RESCALED),
    "adam": (adam, [{"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)]),
    "lbfgs": (lbfgs, [{}]),
}


def run(problem: pde.Problem, name: str, contender: str, args: argparse.Namespace) -> Result:
    """Compiles, looks for the best setting, and trains with it from the start."""
    make, settings = CONTENDERS[contender]
    begun = time.perf_counter()
    params = problem.init(args.seed)
    init, step = make(problem, args.fraction)
    fresh, key = args.fresh and contender != "lbfgs", jax.random.key(args.seed + 1)

    def numbered(params, opt_state, points, i, part, setting):
        own = jax.random.fold_in(key, i)
        points = problem.sample(own) if fresh else points
        return step(params, opt_state, points, own, part, setting)

    inputs = (params, init(params, settings[0]), problem.points, 0, 0.0, settings[0])
    compiled = jax.jit(numbered).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))  # what only a first call costs is paid
    compile_seconds = time.perf_counter() - begun
    loss_and_error = jax.jit(lambda p, at: (problem.loss_fn(p, at).value, problem.error(p)))
    evaluate = lambda params: map(float, loss_and_error(params, problem.points))

    def train(setting: Setting, limit: float) -> list[tuple[int, float, float, float]]:
        """Steps, seconds, loss, error; it ends early where the loss is no longer finite."""
        state, steps, seconds = (params, init(params, setting)), 0, 0.0
        curve = [(0, 0.0, *evaluate(params))]
        for until in limit * np.linspace(0, 1, EVALUATIONS + 1)[1:] ** 2:  # early ones are close
            while seconds < until and steps < (args.steps or np.inf):
                start = time.perf_counter()
                part = min(1.0, seconds / limit)
                output = compiled(*state, problem.points, steps, part, setting)
                *state, _ = jax.block_until_ready(output)
                seconds += time.perf_counter() - start
                steps += 1
            if steps > curve[-1][0]:
                curve.append((steps, seconds, *evaluate(state[0])))
            if not np.isfinite(curve[-1][2]):
                break
        return curve

    several = settings if len(settings) > 1 else []
    searched = [(setting, *train(setting, args.search)[-1][2:]) for setting in several]
    losses = np.nan_to_num([loss for _, loss, _ in searched] or [0], nan=np.inf)
    best = settings[int(np.argmin(losses))]
    columns = map(list, zip(*train(best, args.seconds)))
    return Result(name, contender, best, searched, compile_seconds, *columns)


def line(r: Result) -> str:
    ends = f"{r.error[-1]:9.2e} {r.loss[-1]:9.2e} {r.steps[-1]:7}"
    pace, setting = 1e3 * r.seconds[-1] / r.steps[-1], [f"{k}={v:g}" for k, v in r.setting.items()]
    costs = f"{pace:8.3g}{r.compile_seconds:10.1f}"
    return f"{r.problem:10}{r.contender:17}{ends}{costs}  {' '.join(setting)}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Error against seconds, a panel for each problem; legible in black and white."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    problems = list(dict.fromkeys(r.problem for r in results))
    contenders = list(dict.fromkeys(r.contender for r in results))
    figure = Figure(figsize=(max(5, 3.4 * len(problems)), 4), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for r in results:
        axes, place = panels[problems.index(r.problem)], contenders.index(r.contender)
        line, marker = report.STYLES[place % len(report.STYLES)]
        look = {"linestyle": line, "marker": marker, "markevery": 8, "markersize": 4}
        axes.plot(r.seconds, r.error, color=f"C{place}", label=r.contender, **look)
    for axes, problem in zip(panels, problems):
        axes.set(title=problem, xlabel=report.LABELS["seconds"], yscale="log", xlim=(0, None))
        axes.grid(which="major", color="0.9")
    panels[0].set_ylabel("relative L2 error")
    panels[-1].legend()
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--problems", nargs="+", choices=pde.EQUATIONS, default=list(pde.EQUATIONS))
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--seconds", type=float, default=40.0, metavar="S", help="for each contender")
    add("--search", type=float, default=10.0, metavar="S", help="for each of its settings")
    add("--steps", type=positive, metavar="N", help="stop there if seconds are left")
    add("--width", type=positive, default=48, metavar="N", help="of three hidden layers")
    add("--points", type=positive, nargs=2, default=(900, 240), help="inside, on the boundary")
    add("--fraction", type=float, default=0.25, metavar="F", help="of points, for statistics")
    add("--fresh", action="store_true", help="new points each step")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--seed", type=int, default=0, metavar="S")
    add("--output", type=Path, default=Path("pinn"), metavar="PREFIX")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
