"""Character transformer: a small causal transformer of text that ships with Python.

The text is that of Python's ``help()``, ``pydoc_data.topics``. K-FAC finds attention's projections,
embeddings and normalizations by itself: the first table shows the block of each. Adam is trained
beside it, and at the end K-FAC's model writes a little.

    python examples/character_transformer.py         # a minute on two cores
    python examples/character_transformer.py --fast  # a few steps, as the tests do
"""

import argparse
import time
from collections.abc import Sequence
from pydoc_data.topics import topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import natgrad_jax as ng

WIDTH, WINDOW, BATCH, KEY = 64, 32, 32, jax.random.key(0)
ADAM = 3e-3  # of 1e-3, 3e-3, 1e-2 and 2e-2, the lowest validation loss at the end
COLUMNS = ("steps", "seconds", "training loss", "validation loss")


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        places = nn.Embed(WINDOW, WIDTH)(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape))
        h, mask = nn.Embed(128, WIDTH)(x) + places, nn.make_causal_mask(x)
        for _ in range(2):
            h += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h), mask=mask)
            h += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(h))))
        return nn.Dense(128)(nn.LayerNorm()(h))


model = Transformer()


def loss_fn(params, windows):
    logits = model.apply({"params": params}, windows[:, :-1])
    return ng.Categorical(logits).nll(windows[:, 1:])  # the mean over all characters


def windows(codes, count, random):
    starts = random.integers(len(codes) - WINDOW - 1, size=(count, 1))
    return jnp.asarray(codes[starts + np.arange(WINDOW + 1)])


def kfac(params, batch):
    """The optimizer's state, and a step."""
    layers = ng.find_layers(loss_fn, params, batch)
    print(layers)
    tx, grad_fn = ng.kfac(0.1, layers), ng.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(params, opt_state, batch, key):
        _, grads, statistics = grad_fn(params, batch, rng=key, opt_state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, statistics=statistics)
        return optax.apply_updates(params, updates), opt_state

    return tx.init(params), step


def adam(params, batch):
    tx, grad_fn = optax.adam(ADAM), jax.grad(lambda *args: loss_fn(*args).value)

    @jax.jit
    def step(params, opt_state, batch, key):
        updates, opt_state = tx.update(grad_fn(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx.init(params), step


def train(optimizer, steps, codes, held_out):
    """Parameters, and a row of ``COLUMNS`` every few steps; compiling is not in the seconds."""
    random, seconds, rows = np.random.default_rng(0), 0.0, []
    parts = [windows(codes, 256, random), windows(held_out, 256, random)]
    params = jax.jit(model.init)(KEY, parts[0][:2, :-1])["params"]
    evaluate = jax.jit(lambda params, windows: loss_fn(params, windows).value)
    opt_state, step = optimizer(params, parts[0][:BATCH])
    jax.block_until_ready(step(params, opt_state, parts[0][:BATCH], KEY))  # compiles
    for i in track(range(steps + 1), optimizer.__name__):
        if i % (steps // 20) == 0:
            rows.append((i, seconds, *(evaluate(params, part) for part in parts)))
        batch, key = windows(codes, BATCH, random), jax.random.fold_in(KEY, i)
        begin = time.perf_counter()
        params, opt_state = jax.block_until_ready(step(params, opt_state, batch, key))
        seconds += time.perf_counter() - begin
    return params, np.asarray(rows, float)


def write(params, window, count):
    """Character after character, each drawn from the model's prediction at temperature 0.8."""
    predict = jax.jit(lambda window: model.apply({"params": params}, window[None])[0, -1])
    text = list(window)
    for i in range(count):
        logits = predict(jnp.asarray(text[-WINDOW:])) / 0.8
        text.append(int(jax.random.categorical(jax.random.fold_in(KEY, i), logits)))
    return bytes(int(code) for code in text).decode("ascii")


def show(curves, path):
    """The picture, the table, and the table's numbers."""
    figure, table = Figure((9, 3.6), dpi=80, layout="constrained"), Table("", *COLUMNS)
    for ax, column in zip(figure.subplots(1, 2, sharey=True), (0, 1)):
        for color, (name, rows) in zip(("C0", "C1"), curves.items()):
            ax.plot(rows[:, column], rows[:, 2], color, label=f"{name}, training")
            ax.plot(rows[:, column], rows[:, 3], color + "--", label=f"{name}, validation")
        ax.set(xlabel=COLUMNS[column], ylabel="loss (nats per character)")
    figure.axes[1].legend()
    figure.savefig(path)
    for name, rows in curves.items():
        table.add_row(name, *(f"{x:.4g}" for x in rows[-1]))
    rich.print(table)
    return {f"{name} {c}": x for name, rows in curves.items() for c, x in zip(COLUMNS, rows[-1])}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps")
    parser.add_argument("--output", default="character_transformer.png", help="the picture")
    args, _ = parser.parse_known_args(argv)  # a notebook has arguments of its own
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    held_out, codes = np.split(np.frombuffer(text, np.uint8).astype(np.int32), [20_000])
    parts = (40 if args.fast else 240), codes, held_out
    (params, first), (_, second) = train(kfac, *parts), train(adam, *parts)
    numbers = show({"K-FAC": first, "Adam": second}, args.output)
    print(write(params, held_out[:WINDOW], 10 if args.fast else 300))
    return numbers


if __name__ == "__main__":
    main()
