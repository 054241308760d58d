"""A user's word for what an equation computes that cannot be followed."""

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree

# The name of the call under which the word stands in the traced loss.
MARK = "natgrad_jax_as_layer"


def as_layer(y: Array, function: Callable[..., Array], x: PyTree, *parameters: Array) -> Array:
    """``y``, which is ``function(x, *parameters)`` by an operation that cannot be looked into.

    The parameters of a layer inside a ``custom_vjp``, a Pallas kernel or a foreign call are not
    followed. Say beside it, in plain JAX, what it computes, and its layer is measured::

        y = fused_linear(x, kernel, bias)
        y = ng.as_layer(y, lambda x, kernel, bias: x @ kernel + bias, x, kernel, bias)

    Values and gradients are those of ``y`` alone: ``function`` is traced, and its arithmetic is
    dropped by the compiler.

    Args:
      y: the result, of the shape of ``function(x, *parameters)``.
      function: products, convolutions, lookups, scales and shifts of the parameters.
      x: its input, an array or a pytree of arrays.
      *parameters: the layer's parameters.

    Raises:
      ValueError: ``function`` returns another shape than that of ``y``.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> ng.as_layer(x @ kernel, lambda x, kernel: x @ kernel, x, kernel).shape
    (2, 4)
    """
    same = jax.eval_shape(function, x, *parameters)
    if same.shape != y.shape:
        raise ValueError(
            f"as_layer: y has shape {y.shape}, and function(x, *parameters) has {same.shape}. Give "
            "the function that computes y."
        )

    def natgrad_jax_as_layer(y: Array, x: PyTree, *parameters: Array) -> tuple[Array, Array]:
        return y, function(x, *parameters).astype(y.dtype)

    return jax.jit(natgrad_jax_as_layer)(y, x, *parameters)[0]
