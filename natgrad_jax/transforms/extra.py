"""Extra arguments of ``update`` that a transformation cannot do without."""

from typing import Any

# How each of them is had.
HOW = {
    "params": "params",
    "args": "args=(batch,)",
    "grad": "grad=grads",
    "value": "value=loss",
    "value_fn": "value_fn=lambda params: loss_fn(params, batch).value",
}


def needed(name: str, **given: Any) -> None:
    """Raise where one of ``given`` is None, with the call to write."""
    missing = [key for key, value in given.items() if value is None]
    if missing:
        call = ", ".join(HOW[key] for key in given if key != "params")
        raise ValueError(
            f"{name} needs {', '.join(missing)}: write tx.update(grads, opt_state, params, "
            f"statistics=statistics, {call})."
        )
