"""The one walk over an optimizer state: this library's states in any chain or wrapper."""

from typing import Any

import jax
from flax import nnx

from natgrad_jax.state.clock import Clock


def states(opt_state: Any) -> list[Any]:
    """Every state of this library inside an optimizer state, however deep: those with a clock."""

    def is_ours(x: Any) -> bool:
        return isinstance(getattr(x, "clock", None), Clock)

    return [x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)]


def plain(opt_state: Any) -> Any:
    """The state with its arrays out of the variables that NNX optimizers wrap them in."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    unwrap = lambda x: x[...] if is_variable(x) else x
    return jax.tree.map(unwrap, opt_state, is_leaf=is_variable)
