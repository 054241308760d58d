"""Influence: which training digits help or harm a prediction, and which of them have wrong labels.

A tenth of the training labels is wrong. To first order, leaving a training example out changes a
loss by its influence, a product of two gradients with the inverse Fisher (EKFAC) in between.
Summed over clean held-out digits it ranks the training digits, and those that harm most are shown
to be the mislabelled ones. For one digit that the network takes for another, the examples that
pull the prediction up and down are shown.

    python examples/influence.py          # half a minute on one core
    python examples/influence.py --fast   # fewer steps, as the tests do
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import natgrad_jax as ng

TRAINED, WRONG, SHOWN, DAMPING = 1000, 100, 6, 1e-3

model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(32), nn.tanh, nn.Dense(10)])
logits = lambda params, images: model.apply({"params": params}, images)


def loss_fn(params, images, labels):
    return ng.Categorical(logits(params, images)).nll(labels)


def digits():
    """Training digits, which of their labels are wrong, and clean held-out ones."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    images, labels = images[order] / 16, labels[order]
    wrong = np.zeros(TRAINED, bool)
    wrong[rng.choice(TRAINED, WRONG, replace=False)] = True
    given = labels[:TRAINED].copy()
    given[wrong] = (given[wrong] + rng.integers(1, 10, WRONG)) % 10
    to_jax = lambda *arrays: tuple(map(jnp.asarray, arrays))
    return to_jax(images[:TRAINED], given), wrong, to_jax(images[TRAINED:], labels[TRAINED:])


def train(data, steps):
    params = model.init(jax.random.key(0), data[0])["params"]
    layers = ng.find_layers(loss_fn, params, *data)
    tx = ng.kfac(0.1, layers, weight_decay=0.01)
    grad_fn, opt_state = ng.value_and_grad(loss_fn, layers), tx.init(params)

    @jax.jit
    def step(params, opt_state, key):
        keys = jax.random.split(key)
        batch = jax.tree.map(lambda x: jax.random.choice(keys[0], x, (250,)), data)
        _, grads, statistics = grad_fn(params, *batch, rng=keys[1], opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state

    for i in track(range(steps), "training"):
        params, opt_state = step(params, opt_state, jax.random.key(i))
    return params, layers


def found(ranking, wrong, examined):
    """Share of the wrong labels among the first ones of a ranking."""
    return float(wrong[ranking[:examined]].sum() / wrong.sum())


def plot(path, rankings, wrong, query, data, influences, told):
    """How many wrong labels a look at the first ones finds; the helpful and harmful digits."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    axes = left.subplots()
    for (name, ranking), style in zip(rankings.items(), ("-", "--", ":")):
        axes.plot(np.arange(1, TRAINED + 1), np.cumsum(wrong[ranking]), style, label=name)
    axes.set(xlabel="training digits looked at", ylabel=f"wrong labels found, of {WRONG}")
    axes.legend()
    order = np.argsort(influences)
    panels = right.subplots(3, SHOWN)
    panels[0, 0].text(10, 4, told, va="center").set_in_layout(False)
    show = lambda panel, image: panel.imshow(image.reshape(8, 8), cmap="gray_r")
    for panel in panels.ravel():
        panel.axis("off")
    show(panels[0, 0], query)
    for row, name, chosen in ((1, "helpful", order[:SHOWN]), (2, "harmful", order[::-1][:SHOWN])):
        for panel, i in zip(panels[row], chosen):
            show(panel, data[0][i])
            panel.set_title(f"{data[1][i]}", color="C3" if wrong[i] else "k", fontsize="medium")
        panels[row, 0].text(-4, 4, name, rotation=90, va="center")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="fewer steps")
    parser.add_argument("--output", type=Path, default=Path("influence.png"))
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    data, wrong, clean = digits()
    params, layers = train(data, 60 if args.fast else 120)
    curvature = ng.posterior.from_data(
        loss_fn, params, [data], layers, kind="ekfac", fisher="exact"
    )
    influence = jax.jit(
        lambda query: ng.posterior.influence(curvature, loss_fn, params, query, data, DAMPING)
    )
    on_clean = np.asarray(influence(clean))
    one_by_one = jax.vmap(lambda *one: loss_fn(params, *jax.tree.map(lambda x: x[None], one)).value)
    rankings = {
        "influence, harmful first": np.argsort(-on_clean),
        "loss, largest first": np.argsort(-np.asarray(one_by_one(*data))),
        "at random": np.random.default_rng(1).permutation(TRAINED),
    }
    predicted = np.asarray(logits(params, clean[0])).argmax(-1)
    accuracy = float((predicted == clean[1]).mean())
    results, table = {"accuracy": accuracy}, Table("looked at", "wrong labels found")
    for name, ranking in rankings.items():
        results[name.split(",")[0]] = found(ranking, wrong, WRONG)
        table.add_row(f"the first {WRONG}, {name}", f"{found(ranking, wrong, WRONG):.0%}")
    Console().print(table, f"accuracy on clean digits {accuracy:.1%}")

    query = int(np.asarray(one_by_one(*clean)).argmax())  # the digit that the network is worst at
    one = jax.tree.map(lambda x: x[query : query + 1], clean)
    told = f"a {clean[1][query]}, taken for a {predicted[query]}\n(red: labels that are wrong)"
    plot(args.output, rankings, wrong, one[0], data, np.asarray(influence(one)), told)
    return results


if __name__ == "__main__":
    main()
