"""Micro-batches: a large batch's loss, gradients and statistics in the memory of a small one."""

from typing import Any

import jax
import jax.numpy as jnp

from natgrad_jax.layers.collection import Layers
from natgrad_jax.losses.terms import LossFn, as_loss
from natgrad_jax.statistics.fisher_rows import stacked
from natgrad_jax.statistics.grad import GradFn, of_one_part, value_and_grad
from natgrad_jax.statistics.sample_space import wants_pieces
from natgrad_jax.tracing import model
from natgrad_jax.tracing.convolutions import for_control_flow
from natgrad_jax.utils.precision import at_least_float32
from natgrad_jax.utils.sharding import AxisName


def accumulate(
    loss_fn: LossFn,
    layers: Layers | None = None,
    *,
    fisher: str = "mc",
    samples: int = 1,
    has_aux: bool = False,
    axis_name: AxisName = None,
) -> GradFn[Any]:
    """:func:`value_and_grad` of a large batch, one micro-batch after another.

    With k micro-batches, and term t of the loss over ``N_ti`` examples of micro-batch i (weighted;
    masks may make the numbers differ)::

        loss = Σᵢ Σₜ (N_ti / Σⱼ N_tj) loss_ti,    statistics = Σᵢ statisticsᵢ

    A ``lax.scan`` over the leading axis of every array in ``args`` adds gradients (in at least
    float32) and statistics. The results are those of :func:`value_and_grad` for the k
    micro-batches concatenated, up to rounding: labels are sampled by the example's index in the
    large batch. The exceptions mix examples: batch normalization, and the squared sums that give
    leftover diagonals, free parameters and the moments of layers called several times; these
    estimate the same quantity, here from k samples instead of one. ``statistics_fraction`` takes
    every k-th example of each micro-batch.

    Without layers the rows of :func:`exact_ngd` are stacked, and each micro-batch's are computed
    alone. Arguments, results and errors are those of :func:`value_and_grad`, except for these.

    Returns:
      ``grad_fn(params, *args, rng=None, opt_state=None)``. Every array in ``args`` is
      ``(k, *shape in a micro-batch)``; split a key for dropout into k. ``aux`` is that of each
      micro-batch, stacked. The state of an NNX model passes from one micro-batch to the next. Under
      jit, shard a batch along its second axis: ``PartitionSpec(None, "data")``.

    Raises:
      ValueError: arrays in ``args`` with different leading axes, or none.

    Source: Ba et al. 2016 (sums over workers; here one after another).

    >>> import flax.linen as nn, jax, jax.numpy as jnp, natgrad_jax as ng
    >>> model, x, y = nn.Dense(3), jnp.ones((8, 4)), jnp.zeros(8, jnp.int32)
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> loss_fn = lambda p, x, y: ng.Categorical(model.apply({"params": p}, x)).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> grad_fn = ng.accumulate(loss_fn, layers)
    >>> micro_batches = x.reshape(4, 2, 4), y.reshape(4, 2)
    >>> loss, grads, statistics = grad_fn(params, *micro_batches, rng=jax.random.key(1))
    >>> float(statistics.examples)
    8.0
    """
    options: dict[str, Any] = {"fisher": fisher, "samples": samples}
    options |= {"has_aux": has_aux, "axis_name": axis_name}
    value_and_grad(loss_fn, layers, **options)  # checks them

    def grad_fn(
        params: Any, *args: Any, rng: Any = None, opt_state: Any = None, loss_scale: Any = None
    ) -> Any:
        number = _number(args)
        if layers is None and wants_pieces(opt_state):
            raise ValueError(
                "whole_jacobian=False needs the whole batch at once: K has products between the "
                "examples of different micro-batches. Keep J whole, or do not accumulate."
            )
        tree, rest = model.split(params)

        def count(args: Any) -> list[jax.Array]:
            out, _ = model.run(loss_fn, tree, rest, args)
            return [term.count for term in as_loss(out, has_aux).terms]

        # only sums of masks: the compiler drops the model, none of whose results are used
        examples = [counts.sum(0) for counts in jax.lax.map(count, args)]

        def one(rest: Any, index: jax.Array, args: Any) -> Any:
            def part(params: Any, *args: Any) -> Any:
                out: Any = loss_fn(params, *args)
                loss = as_loss(out, has_aux).as_part(index, number, examples)
                return (loss, out[1]) if has_aux else loss

            own = model.merge(tree, rest)
            grad_fn = of_one_part(number, part, layers, **options)
            extra = {"rng": rng, "opt_state": opt_state, "loss_scale": loss_scale}
            loss, grads, statistics = grad_fn(own, *args, **extra)
            value, aux = loss if has_aux else (loss, None)
            sums, rows = (None, statistics) if layers is None else (statistics, None)
            return model.split(own)[1], (value, grads, sums), (rows, aux)

        def body(carry: Any, micro_batch: Any) -> Any:
            rest, total = carry
            rest, found, others = for_control_flow(lambda: one(rest, *micro_batch))[0]()
            return (rest, jax.tree.map(jnp.add, total, found)), others

        micro_batches = (jnp.arange(number), args)
        shapes = jax.eval_shape(one, rest, *jax.tree.map(lambda x: x[0], micro_batches))[1]
        (rest, total), (rows, aux) = jax.lax.scan(body, (rest, _zeros(shapes)), micro_batches)
        model.propagate(params, None if rest is None else rest[1])
        value, grads, statistics = jax.tree.map(lambda x, s: x.astype(s.dtype), total, shapes)
        if rows is not None:
            statistics = stacked(rows)
        return ((value, aux) if has_aux else value), grads, statistics

    return grad_fn


def _zeros(shapes: Any) -> Any:
    """Zeros in at least float32, for sums over many micro-batches."""
    wide = lambda s: jnp.zeros(s.shape, at_least_float32(s.dtype))
    return jax.tree.map(wide, shapes)


def _number(args: Any) -> int:
    """The number of micro-batches."""
    shapes = [jnp.shape(x) if hasattr(x, "shape") else () for x in jax.tree.leaves(args)]
    if not shapes or len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(
            "accumulate scans over the leading axis, the micro-batches, of every array that "
            f"grad_fn gets after params; got shapes {shapes}. Write x.reshape(k, -1, *x.shape[1:]) "
            "for k micro-batches, and put into loss_fn itself what they all share."
        )
    return shapes[0][0]
