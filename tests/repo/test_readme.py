"""The README's examples are what a newcomer copies: they must run as they stand."""

import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

README = Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme_trains() -> None:
    code, *others = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model of the example is wholly covered
        exec(compile(code, str(README), "exec"), scope)
    assert float(scope["loss"]) < 0.1
    assert scope["layers"].uncovered == ()
    (after,) = (code for code in others if "ng.posterior" in code)
    exec(compile(after, str(README), "exec"), scope)
    right = scope["predicted"].argmax(-1) == scope["batch"]["label"]
    assert right.mean() > 0.95 and scope["best"] < 10
    assert scope["influence"][0] < 0  # the query is the first example: it helps itself


def test_the_example_of_a_differentiated_network_is_covered() -> None:
    _, code, after, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, str(README), "exec"), scope)
    assert scope["layers"].uncovered == () and len(scope["layers"]) == 3
    assert all(float(sums.A.trace()) > 0 for sums in scope["statistics"].layers.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(after, str(README), "exec"), scope)  # any loss: tests/whole/test_any_loss.py
    moved = jax.tree.map(jnp.add, scope["params"], scope["updates"])
    assert scope["loss_fn"](moved, scope["points"]).value < 0.5 * scope["loss"]
