"""Four simulated devices, quick compiles (almost all of the suite's time is compiling), and
pictures without a display."""

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # in notebooks and scripts too
if jax.__version_info__[:2] == (0, 10):  # half of a compile; later versions have no such flag
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    )
# the usual thresholds take a twentieth of the time: programs are many objects
gc.set_threshold(200_000, 20, 100)
collect_ignore = ["tables"]  # imported by the tests; as tests they would be imported once more
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)

# scripts, whose coverage would take them a fifth longer
NOT_MEASURED = {Path(__file__).with_name(x) for x in ("benchmarks", "examples")}
finished = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not NOT_MEASURED.isdisjoint(item.path.parents):
            item.add_marker("no_cover")


def pytest_runtest_teardown() -> None:
    """Each compiled program holds six of the 65,530 memory maps that Linux lets a process have."""
    if next(finished) % 100 == 0:
        jax.clear_caches()


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield
