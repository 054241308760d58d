"""Natural Neural Networks, figure 3 c and d: a deep autoencoder, against updates and seconds.

    python benchmarks/paper_prong_autoencoder.py --data mnist --data-dir DIR

SGD, RMSprop, SGD with batch normalization, PRONG and PRONG+ on the same minibatches, each at the
best of the learning rates in RATES after a short search (training loss, seed 0), without momentum
as in the paper's section 4.2. The share of PRONG's reparametrization in its run time is measured in
the same run: its steps against those that neither measure nor refresh.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import race
import report
from autoencoder import ENCODERS, Problem, entropy, make_problem
from optimizers import first_order, natural
from rich.console import Console

import natgrad_jax as ng

EPSILON, REFRESH_PERIOD = 1e-2, 100


class Method(NamedTuple):
    """How to make a contender, the rates to search, and whether its network is normalized."""

    make: Any
    rates: tuple[float, ...]
    normalized: bool = False


def whitened(plus: bool = False, never: bool = False) -> Callable[..., Any]:
    """PRONG; ``never``: as it is between measurements and refreshes."""
    period = 10**6 if never else None

    def alias(learning_rate: float, layers: ng.Layers) -> Any:
        return ng.prong(
            learning_rate, layers, plus=plus, epsilon=EPSILON, momentum=None,
            refresh_period=period or REFRESH_PERIOD, statistics_period=period,
        )  # fmt: skip

    return natural(alias)


METHODS = {
    "sgd": Method(first_order(optax.sgd), (0.001, 0.003, 0.01)),
    "rmsprop": Method(first_order(optax.rmsprop), (1e-4, 3e-4, 1e-3)),
    "batch norm": Method(first_order(optax.sgd), (0.001, 0.003, 0.01, 0.03), normalized=True),
    "prong": Method(whitened(), (3e-4, 1e-3, 3e-3, 1e-2)),
    "prong+": Method(whitened(plus=True), (3e-4, 1e-3, 3e-3, 1e-2)),
}


class NormalizedAutoencoder(nn.Module):
    """The same network with batch normalization before each tanh, on the batch's statistics."""

    encoder: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        widths = self.encoder[1:] + self.encoder[-2::-1]
        code = len(self.encoder) - 2
        for i, width in enumerate(widths):
            x = nn.Dense(width)(x)
            if i not in (code, len(widths) - 1):
                x = jnp.tanh(nn.BatchNorm(use_running_average=False)(x))
        return x


class NormalizedProblem(NamedTuple):
    """A :class:`Problem` of that network."""

    model: nn.Module
    images: np.ndarray

    def init(self, seed: int) -> Any:
        return self.model.init(jax.random.key(seed), self.images[:2])["params"]

    def loss_fn(self, params: Any, batch: jax.Array) -> Any:
        logits = self.model.apply({"params": params}, batch, mutable=["batch_stats"])[0]
        return ng.Bernoulli(logits).nll(batch)


def problem_of(method: Method, plain: Problem) -> Any:
    if not method.normalized:
        return plain
    return NormalizedProblem(NormalizedAutoencoder(plain.model.encoder), plain.images)


def run(name: str, rate: float, problem: Any, updates: int, batch_size: int) -> report.Run:
    """One method at one rate: its curve and its times."""
    images = jnp.asarray(problem.images)
    make = METHODS[name].make if name in METHODS else whitened(never=True)
    compiled = race.compile_step(problem, images, make, rate, batch_size)
    evaluated = jnp.asarray(race.evaluated_images(problem))
    evaluate = partial(jax.jit(lambda p, x: problem.loss_fn(p, x).value), x=evaluated)
    order = race.minibatches(len(images), batch_size, updates, seed=0)
    curve = race.train(compiled, problem.init(0), images, order, 0, evaluate, lambda *_: None)
    return report.Run(name, 0, rate, compiled.seconds, *curve)


def best_rate(name: str, problem: Any, args: argparse.Namespace, console: Console) -> Any:
    """The rate of the lowest loss after a short run, and every loss that was seen."""
    losses = {}
    for rate in METHODS[name].rates:
        found = run(name, rate, problem, args.search, args.batch_size)
        losses[rate] = found.loss[-1]
        console.print(f"{name:>10} {rate:g}: {losses[rate]:.3f} after {found.steps[-1]} updates")
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    return min(finite, key=finite.__getitem__), losses


def share(problem: Any, rate: float, args: argparse.Namespace) -> float:
    """The part of PRONG's run time that statistics and refreshes take."""
    seconds = {}
    for name in ("prong", "between"):
        found = run(name, rate, problem, 2 * REFRESH_PERIOD, args.batch_size)
        seconds[name] = found.seconds[-1] - found.seconds[1]  # the first step refreshes in both
    return 1 - seconds["between"] / seconds["prong"]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    plain = make_problem(data.load_or_exit(args.data, args.data_dir))
    console = Console()
    searched, runs = {}, []
    for name, method in METHODS.items():
        problem = problem_of(method, plain)
        rate, searched[name] = best_rate(name, problem, args, console)
        runs.append(run(name, rate, problem, args.updates, args.batch_size))
        console.print(f"{name:>10} {rate:g}: {runs[-1].loss[-1]:.3f} after {args.updates} updates, "
                      f"{runs[-1].seconds[-1]:.1f} s")  # fmt: skip
    part = share(plain, runs[3].learning_rate, args)
    console.print(f"reparametrization and statistics: {part:.1%} of PRONG's run time")
    finish(runs, searched, part, entropy(race.evaluated_images(plain)), args, argv, console)


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
        "command": shlex.join(["python", "benchmarks/paper_prong_autoencoder.py", *argv]),
        "data": args.data, "encoder": ENCODERS[args.data], "updates": args.updates,
        "batch_size": args.batch_size, "epsilon": EPSILON, "refresh_period": REFRESH_PERIOD,
        "searched": {name: {str(r): loss for r, loss in losses.items()}
                     for name, losses in searched.items()},
        "search_updates": args.search, "reparametrization_share": part, "reference": reference,
        "entropy": floor,
    }  # fmt: skip
    report.write_json(numbers, settings, runs, rows)
    console.print(f"written: {figure} {numbers}", soft_wrap=True)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="digits")
    add("--data-dir", metavar="DIR", help="where the files of the data set are")
    add("--updates", type=race.positive, default=1500)
    add("--search", type=race.positive, default=200, help="updates of each rate in the search")
    add("--batch-size", type=race.positive, default=256)
    add("--output", type=Path, default=Path("paper-prong-autoencoder"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
