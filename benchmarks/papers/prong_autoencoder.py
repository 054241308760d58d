"""Natural Neural Networks, figure 3 c and d: a deep autoencoder, against updates and seconds.

    python benchmarks/papers/prong_autoencoder.py --data mnist --data-dir DIR

SGD, RMSprop, SGD with batch normalization, PRONG and PRONG+ on the same minibatches, each at the
best of its learning rates by a short search (training loss, seed 0; near ties in full), without
momentum as in the paper's section 4.2. PRONG follows the 64 leading directions of each layer's
inputs, and ε falls to its last value within 100 updates: directions that hardly vary at first would
be blown up while they change most. The share of the reparametrization in the run time is measured
at the default periods (statistics every 10 updates, T = 100), from the times of single steps.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import data, report, training
from lib.arguments import positive
from lib.autoencoder import ENCODERS, Problem, entropy, make_problem
from lib.optimizers import Contender, first_order

EPSILON = (3.0, 0.03, 100)  # first, last, and after how many updates
SETTINGS: dict[str, Any] = {"rank": 64, "decay": 0.8, "momentum": None}
PERIODS = {"refresh_period": 4, "statistics_period": 4}
CLOSE = 1.02  # rates whose loss is that near to the best of the search are trained in full
WHITENED_BY = 5000  # examples of the whitened initialization


class Method(NamedTuple):
    """From the training images to a contender's maker, the rates to search, and whether its network
    is normalized."""

    make: Callable[[jax.Array], Callable[..., Contender]]
    rates: tuple[float, ...]
    normalized: bool = False


def plain(alias: Callable[..., Any]) -> Callable[[jax.Array], Callable[..., Contender]]:
    return lambda images: first_order(alias)


def epsilon(step: Any) -> Any:
    first, last, steps = EPSILON
    return optax.exponential_decay(first, steps, last / first, end_value=last)(step)


def whitened(**periods: Any) -> Callable[..., Any]:
    """PRONG, whitened by many examples before the first step."""

    def make(images: jax.Array, rate: float, loss_fn: Any, params: Any, batch: Any) -> Contender:
        layers = ng.find_layers(loss_fn, params, batch)
        tx = ng.prong(rate, layers, epsilon=epsilon, **SETTINGS, **periods)
        grad_fn = ng.value_and_grad(loss_fn, layers)

        def step(params: Any, opt_state: Any, batch: Any, key: Any) -> Any:
            del key
            loss, grads, statistics = grad_fn(params, batch, opt_state=opt_state)
            updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
            return optax.apply_updates(params, updates), opt_state, loss

        @jax.jit
        def whiten(params: Any, opt_state: Any, examples: jax.Array) -> Any:
            _, grads, statistics = grad_fn(params, examples, opt_state=opt_state)
            nothing = jax.tree.map(jnp.zeros_like, grads)
            return tx.update(nothing, opt_state, params, statistics=statistics)[1]

        init = lambda params: whiten(params, tx.init(params), images[:WHITENED_BY])
        return Contender(init, step)

    return lambda images: partial(make, images)


METHODS = {
    "sgd": Method(plain(optax.sgd), (0.001, 0.003, 0.01)),
    "rmsprop": Method(plain(optax.rmsprop), (1e-4, 3e-4, 1e-3)),
    "batch norm": Method(plain(optax.sgd), (0.003, 0.01, 0.03), normalized=True),
    "prong": Method(whitened(**PERIODS), (0.01, 0.02, 0.03)),
    "prong+": Method(whitened(plus=True, refresh_period=4), (0.003, 0.01, 0.02)),
}


class TanhAutoencoder(nn.Module):
    """Dense layers, tanh but for the code and the last, normalized if asked."""

    encoder: tuple[int, ...]
    normalized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = self.encoder[1:] + self.encoder[-2::-1]
        code = len(self.encoder) - 2
        for i, width in enumerate(widths):
            x = nn.Dense(width)(x)
            if i in (code, len(widths) - 1):
                continue
            x = nn.BatchNorm(use_running_average=False)(x) if self.normalized else x
            x = nn.tanh(x)
        return x


class OwnProblem(NamedTuple):
    """A :class:`Problem` of that network."""

    model: nn.Module
    images: np.ndarray

    def init(self, seed: int) -> Any:
        return self.model.init(jax.random.key(seed), self.images[:2])["params"]

    def loss_fn(self, params: Any, batch: jax.Array) -> Any:
        logits = self.model.apply({"params": params}, batch, mutable=["batch_stats"])[0]
        return ng.Bernoulli(logits).nll(batch)


def problem_of(method: Method, common: Problem) -> OwnProblem:
    return OwnProblem(TanhAutoencoder(common.model.encoder, method.normalized), common.images)


def run(name: str, rate: float, problem: Any, updates: int, batch_size: int) -> report.Run:
    """One method at one rate: its curve and its times."""
    images = jnp.asarray(problem.images)
    make = METHODS[name].make(images)
    compiled = training.compile_step(problem, images, make, rate, batch_size)
    evaluated = jnp.asarray(training.evaluated_images(problem))
    evaluate = partial(jax.jit(lambda p, x: problem.loss_fn(p, x).value), x=evaluated)
    order = training.minibatches(len(images), batch_size, updates, seed=0)
    params = problem.init(0)
    begin = time.perf_counter()
    jax.block_until_ready(compiled.init(params))  # PRONG whitens: its time counts
    start = time.perf_counter() - begin
    steps, seconds, losses = training.train(
        compiled, params, images, order, 0, evaluate, lambda *_: None
    )
    seconds = [0.0, *(start + t for t in seconds[1:])]
    return report.Run(name, 0, rate, compiled.seconds, steps, seconds, losses)


def search(name: str, problem: Any, args: argparse.Namespace, console: Console) -> Any:
    """The rates within CLOSE of the lowest loss after a short run, and every loss that was seen."""
    losses = {}
    for rate in METHODS[name].rates:
        found = run(name, rate, problem, args.search, args.batch_size)
        losses[rate] = found.loss[-1]
        console.print(f"{name:>10} {rate:g}: {losses[rate]:.3f} after {found.steps[-1]} updates")
    least = min(loss for loss in losses.values() if np.isfinite(loss))
    return [rate for rate, loss in losses.items() if loss <= CLOSE * least], losses


def share(problem: Any, args: argparse.Namespace) -> float:
    """The part of PRONG's run time that statistics and refreshes take at the default periods.

    From the median times of ordinary steps, of those that measure and of those that refresh too.
    """
    images, T, period = jnp.asarray(problem.images), 100, 10
    compiled = training.compile_step(problem, images, whitened()(images), 1e-4, args.batch_size)
    params = problem.init(0)
    state, indices = compiled.init(params), jnp.arange(args.batch_size, dtype=jnp.int32)
    seconds: dict[str, list[float]] = {"refresh": [], "measure": [], "ordinary": []}
    for step in range(1, 3 * T + 1):  # the whitened initialization was step 0
        kind = "refresh" if step % T == 0 else "measure" if step % period == 0 else "ordinary"
        begin = time.perf_counter()
        params, state, loss = compiled.step(
            params, state, images, indices, jnp.int32(step), jax.random.key(0)
        )
        loss.block_until_ready()
        seconds[kind].append(time.perf_counter() - begin)
    refresh, measure, ordinary = (float(np.median(x)) for x in seconds.values())
    total = refresh + (T // period - 1) * measure + (T - T // period) * ordinary
    return 1 - T * ordinary / total


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    common = make_problem(data.load_or_exit(args.data, args.data_dir))
    console = Console()
    searched, runs = {}, []
    for name, method in METHODS.items():
        problem = problem_of(method, common)
        rates, searched[name] = search(name, problem, args, console)
        whole = [run(name, rate, problem, args.updates, args.batch_size) for rate in rates]
        runs.append(min(whole, key=lambda r: r.loss[-1] if r.finished else np.inf))
        console.print(f"{name:>10} {runs[-1].learning_rate:g}: {runs[-1].loss[-1]:.3f} after "
                      f"{args.updates} updates, {runs[-1].seconds[-1]:.1f} s")  # fmt: skip
    part = share(problem_of(METHODS["prong"], common), args)
    console.print(f"reparametrization and statistics: {part:.1%} of PRONG's run time")
    finish(runs, searched, part, entropy(training.evaluated_images(common)), args, argv, console)


def finish(
    runs: list[report.Run], searched: Any, part: float, floor: float, args: argparse.Namespace,
    argv: Sequence[str], console: Console,
) -> None:  # fmt: skip
    title = f"{args.data}: training loss of a deep autoencoder, nats per image"
    others = [r for r in runs if r.optimizer in ("sgd", "rmsprop", "batch norm") and r.finished]
    reference = min(others, key=lambda r: r.loss[-1]).optimizer
    rows = report.summarize(runs, reference)
    seconds = report.equal_seconds(runs)
    console.print(report.make_table(rows, title, args.updates, seconds, reference))
    figure, numbers = (args.output.with_name(args.output.name + s) for s in (".png", ".json"))
    figure.parent.mkdir(parents=True, exist_ok=True)
    report.plot(runs, title, floor, reference, figure)
    settings = {
        "command": shlex.join(["python", "benchmarks/papers/prong_autoencoder.py", *argv]),
        "data": args.data, "encoder": ENCODERS[args.data], "updates": args.updates,
        "batch_size": args.batch_size, "epsilon": EPSILON,
        "settings": SETTINGS | PERIODS, "whitened_by": WHITENED_BY,
        "searched": {name: {str(r): loss for r, loss in losses.items()}
                     for name, losses in searched.items()},
        "search_updates": args.search, "reparametrization_share": part, "reference": reference,
        "entropy": floor,
    }  # fmt: skip
    report.write_json(numbers, settings, runs, rows)
    report.tell_files(console, figure, numbers)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="digits")
    add("--data-dir", metavar="DIR", help="where the files of the data set are")
    add("--updates", type=positive, default=1500)
    add("--search", type=positive, default=200, help="updates of each rate in the search")
    add("--batch-size", type=positive, default=256)
    add("--output", type=Path, default=Path("paper-prong-autoencoder"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
