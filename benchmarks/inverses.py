"""Ways to the inverse of a factor, by size: error and time, and where each wins.

    python benchmarks/inverses.py

A covariance F of n inputs with eigenvalues that fall like 1/i, damped by a hundredth of their mean.
``low rank`` keeps k = n/16 directions, warm-started; ``newton-schulz`` starts from the inverse of
1.02 F; ``woodbury`` absorbs a batch of 32 examples into a known inverse, ``sherman-morrison`` one
example. Errors are relative (Frobenius), against float64; times are medians over repetitions in
turn, float32, as ratios to Cholesky.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
from rich.console import Console
from rich.table import Table

from natgrad_jax.linalg.cholesky import damped_inverse
from natgrad_jax.linalg.low_rank import initial_subspace, low_rank_inverse, subspace
from natgrad_jax.linalg.newton_schulz import newton_schulz_inverse
from natgrad_jax.linalg.pseudo_inverse import pseudo_inverse
from natgrad_jax.linalg.woodbury import sherman_morrison, woodbury

SIZES = (128, 256, 512, 1024, 2048, 4096)
BATCH, DECAY, SHARE = 32, 0.95, 16


class Row(NamedTuple):
    """One way at one size."""

    size: int
    way: str
    seconds: float
    ratio: float
    error: float


def covariance(n: int) -> tuple[np.ndarray, float]:
    """F and its damping."""
    random = np.random.default_rng(n)
    Q = np.linalg.qr(random.normal(size=(n, n)))[0]
    values = n / np.arange(1, n + 1)
    return (Q * values) @ Q.T, float(values.mean() / 100)


def ways(n: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], np.ndarray]]:
    """From name to a compiled function, its arguments and what it should give."""
    F, damping = covariance(n)
    random = np.random.default_rng(1)
    U = random.normal(size=(n, BATCH)) / np.sqrt(BATCH)
    eye = np.eye(n)
    inverse = np.linalg.inv(F + damping * eye)
    after = lambda u: np.linalg.inv(DECAY * (F + damping * eye) + (1 - DECAY) * u @ u.T)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    start = initial_subspace((n,), max(n // SHARE, 1), jnp.float32)
    for _ in range(10):
        start = subspace(f32(F), start)[0]
    dense = lambda *args: low_rank_inverse(*args).as_matrix()
    lam, decay = f32(damping), f32(DECAY)
    last = f32(np.linalg.inv(1.02 * F + damping * eye))
    return {
        "cholesky": (damped_inverse, (f32(F), lam), inverse),
        "newton-schulz": (newton_schulz_inverse, (f32(F), lam, last), inverse),
        "eigh": (pseudo_inverse, (f32(F), lam), inverse),
        "low rank": (low_rank_inverse, (f32(F), lam, start), inverse),
        "low rank, dense": (dense, (f32(F), lam, start), inverse),
        "woodbury": (woodbury, (f32(inverse), f32(U), decay), after(U)),
        "sherman-morrison": (
            sherman_morrison,
            (f32(inverse), f32(U[:, 0]), decay),
            after(U[:, :1]),
        ),
    }


def measure(n: int, repetitions: int) -> list[Row]:
    compiled = {k: (jax.jit(f), args, want) for k, (f, args, want) in ways(n).items()}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    results: dict[str, Any] = {}
    for i in range(repetitions + 1):
        for name, (f, args, _) in compiled.items():
            begin = time.perf_counter()
            results[name] = jax.block_until_ready(f(*args))
            if i:  # the first compiles
                seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name, (_, _, want) in compiled.items():
        found = results[name]
        found = np.asarray(found.as_matrix() if hasattr(found, "as_matrix") else found, float)
        error = float(np.linalg.norm(found - want) / np.linalg.norm(want))
        median = float(np.median(seconds[name]))
        rows.append(Row(n, name, median, median / float(np.median(seconds["cholesky"])), error))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("inverses"))
    args = parser.parse_args(argv)
    rows = [row for n in args.sizes for row in measure(n, args.repetitions)]
    table = Table(title="inverses of a damped factor", box=None)
    for header in ("size", "way", "ms", "x cholesky", "relative error"):
        table.add_column(header, justify="left" if header == "way" else "right")
    for row in rows:
        table.add_row(str(row.size), row.way, f"{1e3 * row.seconds:.3g}", f"{row.ratio:.3g}",
                      f"{row.error:.1e}")  # fmt: skip
    console = Console()
    console.print(table)
    numbers = args.output.with_name(args.output.name + ".json")
    numbers.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/inverses.py", *argv])
    report.write_json(numbers, {"command": command}, [], rows)
    report.tell_files(console, numbers)


if __name__ == "__main__":
    main()
