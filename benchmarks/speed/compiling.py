"""Processor seconds to compile a step, as ratios to Adam's, over the depth of a transformer.

    python benchmarks/speed/compiling.py                       # 4 and 24 blocks, unrolled
    python benchmarks/speed/compiling.py --blocks 4 --optimizers adam kfac ekfac

The character transformer of ``benchmarks/lib/tasks.py`` (width 64, four heads), its blocks written
out, not scanned. Tracing, lowering and compiling a whole step, layers found before; processor
seconds, so that other programs count little. What only a first compilation costs is paid before.
Writes PREFIX.json.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib import report
from lib.arguments import positive
from lib.optimizers import OPTIMIZERS
from lib.tasks import WINDOW, Transformer

BATCH = 32


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse_arguments(argv)
    seconds_of("adam", 1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for blocks in args.blocks:
        own = {name: seconds_of(name, blocks) for name in ("adam", *args.optimizers)}
        base = own["adam"]["seconds"]
        found[str(blocks)] = {k: {**x, "ratio": x["seconds"] / base} for k, x in own.items()}
    console = Console()
    console.print(make_table(found))
    settings = {
        "command": shlex.join(["python", "benchmarks/speed/compiling.py", *argv]),
        "machine": report.describe_machine(),
        "versions": report.versions(),
    }
    path = args.output.with_name(args.output.name + ".json")
    path.write_text(json.dumps({**settings, "blocks": found}, indent=1) + "\n")
    report.tell_files(console, path)


def seconds_of(name: str, blocks: int) -> dict[str, float]:
    """Processor seconds of tracing, lowering and compiling, and the program's lines."""
    model, ids = Transformer(blocks=blocks), jnp.zeros((BATCH, WINDOW), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]

    def loss_fn(params: Any, ids: Any) -> ng.Loss:
        return ng.Categorical(model.apply({"params": params}, ids)).nll(ids)

    contender = OPTIMIZERS[name](0.1, loss_fn, params, ids)
    given = params, contender.init(params), ids, jax.random.key(0)
    begun = time.process_time()
    traced = jax.jit(contender.step, donate_argnums=(0, 1)).trace(*given)
    then = time.process_time()
    program = traced.lower().compile()
    now = time.process_time()
    lines = len(program.as_text().splitlines())
    return {"seconds": now - begun, "tracing": then - begun, "lines": lines}


def make_table(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table(title="compiling a step, processor seconds", box=None, padding=(0, 1, 0, 0))
    for name in ("blocks", "optimizer", "seconds", "ratio", "tracing", "lines"):
        table.add_column(name, justify="left" if name == "optimizer" else "right")
    for blocks, own in found.items():
        for name, x in own.items():
            numbers = f"{x['seconds']:.1f}", f"{x['ratio']:.2f}", f"{x['tracing']:.1f}"
            table.add_row(blocks, name, *numbers, f"{x['lines']:,.0f}")
    return table


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--blocks", nargs="+", type=positive, default=[4, 24])
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=["kfac"])
    add("--output", type=Path, default=Path(__file__).parents[1] / "results/compiling")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
