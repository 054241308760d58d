"""Extra arguments of ``update`` that a transformation cannot do without."""

from typing import Any

import jax
import optax

# How each of them is had.
HOW = {
    "params": "params",
    "args": "args=(batch,)",
    "grad": "grad=grads",
    "value": "value=loss",
    "value_fn": "value_fn=lambda params: loss_fn(params, batch).value",
}


def needed(name: str, **given: Any) -> None:
    """Raise where one of ``given`` is None, with the call to write, or where parameters are masked
    out, on which no loss can be computed."""
    missing = [key for key, value in given.items() if value is None]
    if missing:
        call = ", ".join(HOW[key] for key in given if key != "params")
        raise ValueError(
            f"{name} needs {', '.join(missing)}: write tx.update(grads, opt_state, params, "
            f"statistics=statistics, {call})."
        )
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(given["params"], is_leaf=is_masked))):
        raise ValueError(
            f"{name} needs all parameters, to run loss_fn on them; some are masked out. Keep it "
            "out of optax.masked and optax.partition, and mask what stands before or inside it: "
            "optax.chain(optax.masked(ng.scale_by_kfac(layers), mask), …), or "
            "make=lambda damping: optax.masked(ng.kfac(0.1, layers, damping=damping), mask)."
        )
