"""A layer's call with fewer examples: what ``statistics_fraction`` measures."""

from typing import Any

import jax


class Thinned:
    """Any kind of call, of which every ``stride``-th example is seen."""

    def __init__(self, call: Any, stride: int):
        self.call, self.stride = call, stride

    def examples(self, x: jax.Array) -> jax.Array:
        return self.call.examples(x)[:: self.stride]

    def outputs(self, g: jax.Array) -> jax.Array:
        return self.call.outputs(g)[:: self.stride]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)
