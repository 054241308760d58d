"""Logging: what the curvature does during a run, on a live line, in a CSV file and in TensorBoard.

An autoencoder of scikit-learn's digits is trained by K-FAC. Every few steps
``ng.diagnostics.report(…).scalars()`` gives a flat dict of numbers, which any logger takes: the KL
divergence of a step, the effective rank of each factor, how far factors have drifted since they
were last inverted, what was rejected. Here they are a row of a CSV file, scalars of TensorBoard
where tensorboardX or torch is installed, and in part the line that the progress bar shows.

    python examples/tensorboard_and_csv.py          # half a minute on one core
    python examples/tensorboard_and_csv.py --fast   # fewer steps, as the tests do
    tensorboard --logdir tensorboard_and_csv
"""

import argparse
import csv
import importlib
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng

WIDTHS, BATCH, EVERY = (128, 64, 16, 64, 128), 300, 10  # a report EVERY so many steps


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in WIDTHS:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(64)(x)


model = Autoencoder()


def loss_fn(params, images):
    return ng.Bernoulli(model.apply({"params": params}, images)).nll(images)


def tensorboard(folder):
    """A writer with ``add_scalar(name, value, step)``, or None where no package has one."""
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        try:
            return importlib.import_module(name).SummaryWriter(str(folder))
        except ImportError:
            continue
    return None


def write_csv(path, rows):
    """One row a report. The names are the same in all reports of a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def train(images, steps, writer):
    """The numbers of each report; the last report itself."""
    params = model.init(jax.random.key(0), images)["params"]
    layers = ng.find_layers(loss_fn, params, images[:BATCH])
    tx = ng.kfac(0.1, layers)
    opt_state, grad_fn, rows = tx.init(params), ng.value_and_grad(loss_fn, layers), []

    @jax.jit
    def step(params, opt_state, key):
        keys = jax.random.split(key)
        batch = jax.random.choice(keys[0], images, (BATCH,))
        loss, grads, statistics = grad_fn(params, batch, rng=keys[1], opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state, loss, updates

    with Progress() as progress:  # in notebooks too
        line = progress.add_task("", total=steps)
        for i in range(1, steps + 1):
            params, opt_state, loss, updates = step(params, opt_state, jax.random.key(i))
            if i % EVERY == 0:
                report = ng.diagnostics.report(layers, opt_state, updates=updates)
                row = {"step": i, "loss": float(loss)} | report.scalars()
                rows.append(row)
                if writer is not None:
                    for name, value in row.items():
                        writer.add_scalar(name, value, i)
                told = "loss {loss:.2f}  KL {kfac/kl:.1e}  rejected {kfac/rejected}"
                progress.update(line, description=told.format_map(row))
            progress.advance(line)
    return rows, report


def plot(path, rows, paths):
    """Loss and KL of a step; rank and drift of each layer's factors."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels, steps = figure.subplots(2, 2, sharex=True), [row["step"] for row in rows]
    column = lambda name: [row[name] for row in rows]
    panels[0, 0].plot(steps, column("loss"))
    panels[0, 0].set(ylabel="loss, nats per image")
    panels[0, 1].semilogy(steps, column("kfac/kl"))
    panels[0, 1].set(ylabel="KL of a step, nats")
    for panel, name, label in (
        (panels[1, 0], "rank_A", "effective rank of A"),
        (panels[1, 1], "drift_G", "drift of G, 0 after a refresh"),
    ):
        for layer in paths:
            panel.plot(steps, column(f"kfac/{layer}/{name}"), label=layer)
        panel.set(xlabel="step", ylabel=label)
    panels[1, 1].legend(fontsize="x-small", ncols=2)
    panels[0, 0].set_xscale("log")  # shared by all four
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer steps")
    parser.add_argument("--output", type=Path, default=Path("tensorboard_and_csv.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    images = jnp.asarray(load_digits().data / 16)
    writer = tensorboard(args.output.with_suffix(""))
    rows, report = train(images, 100 if args.fast else 1000, writer)
    if writer is not None:
        writer.close()
    write_csv(args.output.with_suffix(".csv"), rows)
    paths = [row.removeprefix("kfac/") for row in report.order]
    plot(args.output, rows, paths)

    table = Table("", "first report", "last report", title=f"of {len(rows[0])} numbers a report")
    for name in ("step", "loss", "kfac/kl", "kfac/update_norm", "kfac/rejected"):
        table.add_row(name, *(f"{row[name]:.4g}" for row in (rows[0], rows[-1])))
    console = Console()
    console.print(table)
    print(report)
    told = "no TensorBoard: install tensorboardX" if writer is None else args.output.with_suffix("")
    console.print(f"all numbers: {args.output.with_suffix('.csv')}; {told}")
    return {"first": rows[0]["loss"], "last": rows[-1]["loss"], "reports": len(rows)}


if __name__ == "__main__":
    main()
