"""The examples of README and the site are what a newcomer copies: they must run as they stand."""

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = {
    str(page.relative_to(ROOT)): re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for page in PAGES
}
AFTER_README = "<!-- starts with the scope of README's first block -->"
Scope = dict[str, Any]
KEY = jax.random.key(0)


def run(page: str, blocks: list[str], scope: Scope) -> Scope:
    """A page's blocks share one scope, and warn of nothing: their models are wholly covered."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            exec(compile(block, page, "exec"), scope)
    return scope


@functools.cache
def readme() -> Scope:
    return run("README.md", BLOCKS["README.md"][:1], {})


def trains(scope: Scope) -> None:
    assert float(scope["loss"]) < 0.1
    assert scope["layers"].uncovered == ()


def predicts(scope: Scope) -> None:
    right = scope["predicted"].argmax(-1) == scope["batch"]["label"]
    assert right.mean() > 0.95 and scope["best"] < 10
    assert scope["influence"][0] < 0  # the query is the first example: it helps itself


def solves(scope: Scope) -> None:
    assert scope["layers"].uncovered == () and len(scope["layers"]) == 3
    assert scope["kfac_losses"][-1] < 0.5 * scope["kfac_losses"][0]
    assert scope["exact_losses"][-1] < 0.01 * scope["exact_losses"][0]


def learns_in_each_framework(scope: Scope) -> None:
    for name in ("linen", "nnx", "equinox", "state"):
        losses = scope[f"{name}_losses"]
        assert losses[-1] < losses[0]


def freezes(scope: Scope) -> None:
    assert scope["chain_losses"][-1] < 0.5 * scope["chain_losses"][0]
    still, moved = scope["updates"]["Conv_0"]["kernel"], scope["updates"]["Dense_0"]["kernel"]
    assert not still.any() and moved.any()
    measured = {path for path, sums in scope["statistics"].layers.items() if sums.A.any()}
    assert measured == {("Dense_0",)}


def every_division_gives_the_same(scope: Scope) -> None:
    np.testing.assert_allclose(scope["same_loss"], scope["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(scope["same_grads"]), jax.tree.leaves(scope["grads"])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert scope["same_statistics"].examples == scope["statistics"].examples
    for loss in (scope["mapped_loss"], scope["hosts_loss"]):
        np.testing.assert_allclose(loss, scope["loss"], rtol=1e-5)
    later, _, _ = scope["mapped"](scope["new_params"], scope["new_state"], *scope["batch"], KEY)
    assert scope["loss_fn"](later, *scope["batch"]).value < scope["loss"]


def reports(scope: Scope) -> None:
    assert scope["scalars"] and all(np.ndim(x) == 0 for x in scope["scalars"].values())


def resumes_where_it_stopped(scope: Scope) -> None:
    params, opt_state = scope["start"], scope["tx"].init(scope["start"])
    for i in range(6):
        key = jax.random.key(i)
        params, opt_state, _ = scope["step"](params, opt_state, scope["batch"], key)
    expected = {"params": params, "opt_state": opt_state}
    for a, b in zip(jax.tree.leaves(scope["resumed"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def masks(scope: Scope) -> None:
    assert scope["statistics"].examples == 3 and len(scope["layers"]) == 2
    assert list(scope["head_alone"]) == [("head",)]


def takes_the_option(scope: Scope) -> None:
    np.testing.assert_allclose(scope["loss"], np.log(3), rtol=1e-6)  # logits are equal
    assert not scope["layers"].uncovered and scope["statistics"].examples == 8


# What a page's blocks leave behind. The losses of losses.md train in tests/whole/test_any_loss.py.
CHECKS: dict[str, Callable[[Scope], None]] = {
    "README.md": trains,
    "docs/checkpoints.md": resumes_where_it_stopped,
    "docs/devices.md": every_division_gives_the_same,
    "docs/diagnosing.md": reports,
    "docs/differential_equations.md": solves,
    "docs/frameworks.md": learns_in_each_framework,
    "docs/installation.md": takes_the_option,
    "docs/layers.md": masks,
    "docs/losses.md": lambda scope: None,
    "docs/posterior.md": predicts,
    "docs/training.md": freezes,
}


def test_every_page_with_code_is_checked() -> None:
    assert {page for page, blocks in BLOCKS.items() if blocks} == set(CHECKS)


@pytest.mark.parametrize("page", CHECKS)
def test_the_code_of_a_page_runs(page: str) -> None:
    after = page == "README.md" or AFTER_README in (ROOT / page).read_text()
    scope = dict(readme()) if after else {}
    CHECKS[page](run(page, BLOCKS[page][page == "README.md" :], scope))


def test_a_differentiated_network_is_measured() -> None:
    scope = run("docs", BLOCKS["docs/differential_equations.md"][:1], {})
    assert all(float(sums.A.trace()) > 0 for sums in scope["statistics"].layers.values())


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
