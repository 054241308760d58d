"""What the compiler says of a training step: memory, operations and bytes, beside Adam's.

    python benchmarks/speed/program.py                # GPT-2 small, tied and untied; a bag of words
    python benchmarks/speed/program.py --models bag --optimizers kfac

No clock, and nothing is allocated or run: one step is traced with shapes alone, compiled for the
device that is here, and asked for its ``cost_analysis`` and ``memory_analysis``. All in float32.

Memory is that of the step at the optimizer's defaults, in multiples of the parameters' bytes.
Operations and bytes accessed are of three other programs, as ratios to Adam's: the same step with
the clock's numbers as constants and refreshes of all layers in one step, so that the compiler drops
what is not due. ``mean`` is computed of them at the default periods. Of XLA's way of counting:

- of a branch it takes the costlier side, so that the step at the defaults always measures and
  refreshes: hence the three programs, of which none has a branch (``branches`` in the JSON file);
- what skipping a branch costs is in none: zeros in place of statistics, and copies;
- a loop's body counts once, so that the three programs take all examples as one chunk; what loops
  are left refresh, and with their products counted as often as they run (by hand, on CPU) no number
  of operations grows by more than 0.4 %;
- LAPACK counts nothing: ``calls`` tells how many there are (SOAP's QR, EKFAC's 64 eigenvectors).

Writes PREFIX.json.
"""

import argparse
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng
from natgrad_jax.curvature import layer_sums
from natgrad_jax.statistics.spec import MEASURED
from natgrad_jax.transforms import soap
from natgrad_jax.transforms.common.refresh_schedule import PERIOD

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report
from lib.arguments import positive
from lib.large import GPT2
from lib.optimizers import Contender, first_order, natural
from lib.runners import Due
from lib.tasks import Transformer

WORDS, CLASSES = 60_000, 20
ORDINARY = Due(3, False)  # on steps 1, 2, 4 and 8 all is due
DUE = {"measuring": Due(3, True), "refreshing": Due(0, False)}  # step 0 is due for a refresh
WEIGHTS = ("weights", "moment_weights", "diagonal_weights")


class Method(NamedTuple):
    """An optimizer, how it becomes a contender, and how often what is due."""

    alias: Callable[..., Any]
    make: Callable[..., Any]
    periods: dict[str, int]


FISHER = {"measuring": MEASURED, "refreshing": PERIOD}
METHODS = {
    "kfac": Method(ng.kfac, natural, FISHER),
    "ekfac": Method(ng.ekfac, natural, FISHER),
    "soap": Method(ng.soap, first_order, {"refreshing": soap.USUAL.period}),
}


class Setting(NamedTuple):
    """A problem in shapes alone."""

    loss_fn: Callable[..., ng.Loss]
    params: Any
    batch: Any

    def contender(self, make: Callable[..., Any]) -> Contender:
        return make(0.1, self.loss_fn, self.params, self.batch)


def gpt2(tied: bool) -> Callable[[int, int], Setting]:
    def make(batch_size: int, blocks: int) -> Setting:
        ids = jax.ShapeDtypeStruct((batch_size, GPT2["window"]), jnp.int32)
        return setting(Transformer(blocks=blocks, tied=tied, **GPT2), ids, ids)

    return make


def bag(batch_size: int, blocks: int) -> Setting:
    del blocks
    dense = [nn.Dense(512), nn.relu, nn.Dense(512), nn.relu, nn.Dense(CLASSES)]
    words = jax.ShapeDtypeStruct((batch_size, WORDS), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return setting(nn.Sequential(dense), words, labels)


# Each with its batch size
MODELS = {"gpt2-tied": (gpt2(True), 8), "gpt2-untied": (gpt2(False), 8), "bag": (bag, 128)}


def setting(model: nn.Module, inputs: Any, targets: Any) -> Setting:
    def loss_fn(params: Any, batch: Any) -> ng.Loss:
        return ng.Categorical(model.apply({"params": params}, batch[0])).nll(batch[1])

    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    return Setting(loss_fn, params, (inputs, targets))


def measure(own: Setting, name: str) -> dict[str, Any]:
    """All numbers of one optimizer, in bytes and operations."""
    if name == "adam":
        adam = own.contender(first_order(optax.adam))
        return {"state": size(state_of(own, adam)), "statistics": 0, **costs(own, adam, adam, {})}
    alias, make, periods = METHODS[name]
    contender = own.contender(make(alias))
    at_once = own.contender(make(lambda *args: alias(*args, refresh="every")))
    state = state_of(own, contender)
    measured = statistics_of(own, state) if make is natural else ()
    return {
        "state": size(state),
        "statistics": size(measured),
        **costs(own, contender, at_once, periods),
    }


def costs(
    own: Setting, contender: Contender, at_once: Contender, periods: dict[str, int]
) -> dict[str, Any]:
    """Of the step at the defaults its memory; of those where one thing is due what they do."""
    kinds = {"ordinary": ORDINARY} | {kind: DUE[kind] for kind in periods}
    with patch.object(layer_sums, "MAX_CHUNK_BYTES", sys.maxsize):
        steps = {kind: work(compile_step(own, at_once, due)) for kind, due in kinds.items()}
    mean = {
        key: steps["ordinary"][key]
        + sum((steps[k][key] - steps["ordinary"][key]) / n for k, n in periods.items())
        for key in ("operations", "bytes")
    }
    return {**memory(compile_step(own, contender)), "steps": {**steps, "mean": mean}}


def compile_step(own: Setting, contender: Contender, due: Due | None = None) -> Any:
    def step(params: Any, opt_state: Any, batch: Any, key: jax.Array) -> Any:
        return contender.step(params, opt_state if due is None else at(due, opt_state), batch, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    given = own.params, state_of(own, contender), own.batch, key
    return jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()


def at(due: Due, opt_state: Any) -> Any:
    """The state with constants for its clock and for the weight of what was measured before."""
    is_ours = lambda x: hasattr(x, "clock")

    def fixed(x: Any) -> Any:
        if not is_ours(x):
            return x
        ones = {n: jax.tree.map(jnp.ones_like, getattr(x, n)) for n in WEIGHTS if hasattr(x, n)}
        is_due = jnp.full_like(x.clock.statistics_due, due.statistics)
        clock = x.clock._replace(step=jnp.int32(due.step), statistics_due=is_due)
        return x._replace(clock=clock, **ones)

    return jax.tree.map(fixed, opt_state, is_leaf=is_ours)


def memory(program: Any) -> dict[str, int]:
    needs = program.memory_analysis()
    found = {
        "temporaries": needs.temp_size_in_bytes,
        "arguments": needs.argument_size_in_bytes,
        "results": needs.output_size_in_bytes,
    }
    return {**found, "memory": sum(found.values()) - needs.alias_size_in_bytes}


def work(program: Any) -> dict[str, Any]:
    counted, text = program.cost_analysis(), program.as_text()
    return {
        "operations": counted["flops"],
        "bytes": counted["bytes accessed"],
        "branches": text.count(" conditional("),
        "calls": Counter(re.findall(r'custom_call_target="(\w+)"', text)),
    }


def state_of(own: Setting, contender: Contender) -> Any:
    return jax.eval_shape(contender.init, own.params)


def statistics_of(own: Setting, state: Any) -> Any:
    grad_fn = ng.value_and_grad(own.loss_fn, ng.find_layers(own.loss_fn, own.params, own.batch))
    measured = lambda params, batch, key, state: grad_fn(params, batch, rng=key, opt_state=state)[2]
    return jax.eval_shape(measured, own.params, own.batch, jax.random.key(0), state)


def size(tree: Any) -> int:
    """Bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def in_parameters(found: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Sizes in multiples of the parameters' bytes."""
    return {k: x if k == "steps" else x / parameters for k, x in found.items()}


def make_tables(found: dict[str, Any]) -> list[Table]:
    columns = ("state", "statistics", "temporaries", "memory")
    kinds = ("ordinary", *DUE, "mean")
    place = jax.devices()[0].platform
    needs = table(f"memory, in multiples of the parameters; compiled for {place}", columns)
    does = table("operations / bytes accessed, in multiples of Adam's", kinds)
    for model, own in found.items():
        base = own["optimizers"]["adam"]["steps"]["mean"]
        for name, x in own["optimizers"].items():
            needs.add_row(model, name, *(f"{x[key]:.2f}" for key in columns))
            told = {
                kind: " / ".join(f"{step[key] / base[key]:.3f}" for key in ("operations", "bytes"))
                for kind, step in x["steps"].items()
            }
            does.add_row(model, name, *(told.get(kind, "") for kind in kinds))
    return [needs, does]


def table(title: str, columns: Sequence[str]) -> Table:
    made = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in ("model", "optimizer", *columns):
        made.add_column(name, justify="right" if name in columns else "left", no_wrap=True)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    console, found = Console(), {}
    for model in args.models:
        make, batch_size = MODELS[model]
        own = make(args.batch_size or batch_size, args.blocks)
        parameters = size(own.params)
        found[model] = {"parameters": parameters, "batch_size": args.batch_size or batch_size}
        found[model]["optimizers"] = {
            name: in_parameters(measure(own, name), parameters)
            for name in ("adam", *args.optimizers)
        }
    console.print(*make_tables(found))
    settings = {
        "command": shlex.join(["python", "benchmarks/speed/program.py", *argv]),
        "blocks": args.blocks,
        "machine": report.describe_machine(),
        "versions": report.versions(),
    }
    path = args.output.with_name(args.output.name + ".json")
    path.write_text(json.dumps({**settings, "models": found}, indent=1) + "\n")
    report.tell_files(console, path)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--optimizers", nargs="+", choices=METHODS, default=list(METHODS))
    add("--blocks", type=positive, default=12, metavar="N", help="of GPT-2 (default: 12)")
    add("--batch-size", type=positive, metavar="B", help="instead of each model's own")
    add("--output", type=Path, default=Path(__file__).parents[1] / "results/program")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
