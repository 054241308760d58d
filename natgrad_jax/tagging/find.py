"""Find the layers of a model: which of its parameters are which kind of layer."""

import warnings
from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from natgrad_jax.layers.collection import Layers, Leftover
from natgrad_jax.losses.terms import Loss, LossFn
from natgrad_jax.tagging.tagged import Tagged, tag
from natgrad_jax.tracing import model
from natgrad_jax.tracing.trace import trace
from natgrad_jax.utils.hyperparams import is_concrete
from natgrad_jax.utils.tree_paths import join


class UncoveredWarning(UserWarning):
    """Something has no curvature of its own.

    Parameters without a block, which fall to the diagonal of the Fisher; or a term of the loss that
    is scaled by zero. Silence it for parameters that are meant to, by
    ``blocks={"embedding": "diagonal"}`` in :func:`find_layers`, which chooses that block.

    >>> import natgrad_jax as ng
    >>> issubclass(ng.UncoveredWarning, UserWarning)
    True
    """


def find_layers(
    loss_fn: LossFn,
    params: PyTree,
    *args: Any,
    blocks: Mapping[Any, str] | None = None,
) -> Layers:
    """Find the layers of the model that ``loss_fn`` runs.

    A layer is a parameter together with the equations that are linear in it. ``loss_fn`` is traced
    abstractly (no arithmetic is done), and each parameter is followed through the trace to the
    products, convolutions, lookups, scales and shifts that use it, in whatever transforms they
    stand. Any function of any pytree will do: Linen, NNX, Equinox, Haiku, plain JAX. What has no
    layer gets the diagonal of the Fisher, and a warning that names each.

    Args:
      loss_fn: ``loss_fn(params, *args)`` returns an :class:`~natgrad_jax.Loss`, or
        ``(Loss, aux)``. For NNX the first argument is the model.
      params: any pytree of floating-point arrays or ``jax.ShapeDtypeStruct``, or an NNX model.
      *args: the other arguments, e.g. a batch; arrays or ``jax.ShapeDtypeStruct``.
      blocks: other blocks than the default ones, as by one :meth:`Layers.replace` after another; of
        two choices for a parameter the later holds: ``{"*": "diagonal", "head": "full"}``. Keys are
        paths, patterns or predicates ``(path, record) -> bool``:
        ``{lambda path, record: "head" in path: "full"}``.

    Returns:
      :class:`~natgrad_jax.Layers`: path → record. ``print`` it: it is the coverage table.

    Raises:
      TypeError: ``loss_fn`` does not return a Loss, or a parameter is not a floating-point array.
      ValueError: ``blocks`` names what is not there, or a block that cannot be had there.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p["head"]}, x)).nll(y)
    >>> print(ng.find_layers(loss_fn, {"head": params}, x, y))
    parameter    block  shape  factors          parameters   share  memory
    ───────────  ─────  ─────  ───────────────  ──────────  ──────  ──────
    head/kernel  dense  4×3    A 5², G 3²               12  80.0 %   136 B
    head/bias    dense  3      with the kernel           3  20.0 %
    1 layer covers 15 of 15 parameters (100.0 %); 0 left over. Factors take 136 B.
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function; got {type(loss_fn).__name__}. Write "
            "find_layers(loss_fn, params, batch)."
        )
    tree, rest = model.split(params)
    parameters = model.parameters_of(tree)
    if not parameters:
        raise ValueError(
            "params holds no parameters: an empty tree has no layers to find. Write "
            "find_layers(loss_fn, params, batch)."
        )
    tagged = tag(trace(loss_fn, tree, rest, args), parameters)
    layers = Layers(tagged.layers, _leftover(tagged), tagged.terms)
    for where, block in (blocks or {}).items():
        layers = layers.replace(where, block)
    _warn(layers, len(parameters), tagged.traced.loss)
    return layers


def _leftover(tagged: Tagged) -> tuple[Leftover, ...]:
    covered = {p.path for layer in tagged.layers.values() for p in layer.parameters}
    return tuple(
        Leftover(p, tagged.reasons[p.path])
        if p.size
        else Leftover(p, "it is empty", "gradient", True)
        for p in tagged.parameters
        if p.path not in covered
    )


def _warn(layers: Layers, total: int, loss: Loss) -> None:
    names = [f"{i} ({type(t.distribution).__name__})" for i, t in enumerate(loss.terms)]
    known = [is_concrete(t.scale) and float(t.scale) == 0 for t in loss.terms]
    zero = [name for name, is_zero in zip(names, known, strict=True) if is_zero]
    if zero:
        warnings.warn(
            f"terms of the loss are scaled by 0 and have no gradient and no Fisher: "
            f"{', '.join(zero)}. Leave them out; a scale that changes in training is an argument "
            "of loss_fn.",
            UncoveredWarning,
            stacklevel=3,
        )
    left = [x for x in layers.leftover if not x.chosen]
    if left:
        told = "; ".join(f"{join(x.path)} ({x.reason})" for x in left)
        warnings.warn(
            f"{len(left)} of {total} parameters have no block of their own and get the diagonal "
            f"of the Fisher: {told}. To choose that, and see no warning: "
            f'find_layers(…, blocks={{"{join(left[0].path)}": "diagonal"}}).',
            UncoveredWarning,
            stacklevel=3,
        )
