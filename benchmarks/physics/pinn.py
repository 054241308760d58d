"""Physics-informed networks: natural gradients against Adam and L-BFGS, at equal seconds.

    python benchmarks/physics/pinn.py --seconds 40 --search 10 --fresh --dtype float64
    python benchmarks/physics/pinn.py --problems burgers --contenders exact-ngd adam

The problems are in ``lib/pde.py``. All contenders start from the same parameters and see the same
fixed points (``--fresh``: new points each step, L-BFGS excepted). A contender with several settings
first tries each for ``--search`` seconds, at the first seed; the one with the lowest loss then has
``--seconds``, as has everybody. Seconds are those of training alone: compiling is told apart,
evaluating is not counted. What is compared is the relative L2 error on points of a test grid: in
the table, against seconds in PREFIX.png, and with every other number in PREFIX.json.

================ =================================================================================
kfac, ekfac      at a fixed rate with momentum; the Fisher summed exactly (one number at each point)
…-rescaled       their direction; step size and momentum from the exact quadratic model
…-mc             the Fisher sampled
exact-ngd        the exact natural gradient of all parameters, in sample space; the rate 1, halved
                 until the loss falls
spring           the same with momentum, at a fixed rate
adam             its rate falls along a cosine of the seconds
lbfgs            ``optax.lbfgs``: memory 10, its line search; a step may take several gradients
================ =================================================================================
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib
from lib import pde, report
from lib.arguments import positive
from physics.contenders import CONTENDERS, Setting

EVALUATIONS = 40  # points on a curve
HEADER = "problem   contender            error      loss   steps ms/step compile s  setting"


class Result(NamedTuple):
    """One contender on one problem, one seed: its curve, the first point being step 0."""

    problem: str
    contender: str
    seed: int
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
            for result in run(problem, name, contender, args):
                results.append(result)
                console.print(line(result), highlight=False, soft_wrap=True)
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    plot(results, figure)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings["command"] = shlex.join(["python", "benchmarks/physics/pinn.py", *argv])
    report.write_json(numbers, settings, results, [])
    report.tell_files(console, figure, numbers)


def run(
    problem: pde.Problem, name: str, contender: str, args: argparse.Namespace
) -> Iterator[Result]:
    """Compiles, looks for the best setting, and trains with it from each seed's start."""
    make, settings = CONTENDERS[contender]
    begun = time.perf_counter()
    init, step = make(problem, args.fraction)
    fresh = args.fresh and contender != "lbfgs"

    def numbered(params, opt_state, points, key, i, part, setting):
        own = jax.random.fold_in(key, i)
        points = problem.sample(own) if fresh else points
        return step(params, opt_state, points, own, part, setting)

    def start(seed: int, setting: Setting) -> tuple[Any, Any]:
        params = problem.init(seed)
        return params, init(params, setting)

    inputs = (*start(0, settings[0]), problem.points, jax.random.key(0), 0, 0.0, settings[0])
    compiled = jax.jit(numbered).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))  # what only a first call costs is paid
    compile_seconds = time.perf_counter() - begun
    loss_and_error = jax.jit(lambda p, at: (problem.loss_fn(p, at).value, problem.error(p)))
    evaluate = lambda params: map(float, loss_and_error(params, problem.points))

    def train(seed: int, setting: Setting, limit: float) -> list[tuple[int, float, float, float]]:
        """Steps, seconds, loss, error; it ends early where the loss is no longer finite."""
        state, key, steps, seconds = start(seed, setting), jax.random.key(seed + 1), 0, 0.0
        curve = [(0, 0.0, *evaluate(state[0]))]
        for until in limit * np.linspace(0, 1, EVALUATIONS + 1)[1:] ** 2:  # early ones are close
            while seconds < until and steps < (args.steps or np.inf):
                begun = time.perf_counter()
                part = min(1.0, seconds / limit)
                output = compiled(*state, problem.points, key, steps, part, setting)
                *state, _ = jax.block_until_ready(output)
                seconds += time.perf_counter() - begun
                steps += 1
            if steps > curve[-1][0]:
                curve.append((steps, seconds, *evaluate(state[0])))
            if not np.isfinite(curve[-1][2]):
                break
        return curve

    several = settings if len(settings) > 1 else []
    searched = [(s, *train(args.seeds[0], s, args.search)[-1][2:]) for s in several]
    losses = np.nan_to_num([loss for _, loss, _ in searched] or [0], nan=np.inf)
    best = settings[int(np.argmin(losses))]
    for seed in args.seeds:
        columns = map(list, zip(*train(seed, best, args.seconds)))
        yield Result(name, contender, seed, best, searched, compile_seconds, *columns)


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
        label = r.contender if r.seed == results[0].seed else None  # once for all seeds
        axes.plot(r.seconds, r.error, color=f"C{place}", label=label, **look)
    for axes, problem in zip(panels, problems):
        axes.set(title=problem, xlabel=report.LABELS["seconds"], xscale="log", yscale="log")
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
    add("--fresh", action="store_true", help="new points each step, L-BFGS excepted")
    add("--dtype", choices=("float32", "float64"), default="float32")
    add("--seeds", type=int, nargs="+", default=[0], metavar="S")
    add("--output", type=Path, default=Path("pinn"), metavar="PREFIX")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
