"""A layer's call with fewer examples, for ``statistics_fraction``."""

from typing import Any

import jax

from natgrad_jax.layers.layer_call import LayerCall, Wrapped


class Thinned(Wrapped):
    """Any kind of call, with every ``stride``-th example only."""

    def __init__(self, call: LayerCall, stride: int):
        super().__init__(call)
        self.stride = stride

    def examples(self, x: Any) -> jax.Array:
        return self.call.examples(x)[:: self.stride]

    def outputs(self, g: jax.Array) -> jax.Array:
        return self.call.outputs(g)[:: self.stride]
