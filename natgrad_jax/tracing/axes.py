"""What one operation's operands must give for one element of its result, axis by axis.

See :mod:`natgrad_jax.tracing.dependence`. An operation without a rule here needs the whole of its
operands.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Along(NamedTuple):
    """Element n along ``axis``, of which there are ``size``; ``inner``: how many neighbours on that
    axis belong to one element, where a reshape has merged axes."""

    axis: int
    size: int
    inner: int = 1


WHOLE = "whole"
OWN = "own"  # all of a value that belongs to one example alone, as inside a scan over examples
Demand = Along | str | None
Demands = Sequence[Demand]


def join(a: Demand, b: Demand) -> Demand:
    """What serves both."""
    if a is None or b is None or a == b:
        return a or b
    return WHOLE


# fmt: off
ELEMENTWISE = frozenset((
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "complex", "conj",
    "polygamma", "zeta", "log2", "one_minus_square", "bitcast_convert_type", "igamma_grad_a",
    "clz", "population_count", "shift_left", "shift_right_arithmetic", "shift_right_logical",
    "convert_element_type", "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igammac",
    "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt",
    "max", "mesh_cast", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or", "pcast",
    "pow", "pvary", "real", "reduce_precision", "regularized_incomplete_beta", "rem",
    "reshard", "round", "rsqrt", "select_n", "sharding_constraint", "sign", "sin", "sinh",
    "sqrt", "square", "sub", "tan", "tanh", "xor",
))
# fmt: on
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin",
)  # fmt: skip
SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-max", "scatter-min")
MATRICES = ("cholesky", "eigh", "lu", "qr", "svd", "triangular_solve")
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")

Rule = Callable[[Any, Along], Demands]


def through(equation: Any, outs: Demands) -> Demands:
    """The demands of an operation's operands from those of its results."""
    name = equation.primitive.name
    if name == "optimization_barrier":
        return outs
    demand = functools.reduce(join, outs)
    if demand == OWN:
        return [OWN] * len(equation.invars)
    if name in ELEMENTWISE:
        return [_same(v, equation, demand) for v in equation.invars]
    rule = RULES.get(name)
    if rule is None or not isinstance(demand, Along):
        return [WHOLE] * len(equation.invars)
    return rule(equation, demand)


def _same(operand: Any, equation: Any, demand: Demand) -> Demand:
    """Of an elementwise operation: its operands have its axes, some of length one, or none."""
    if not isinstance(demand, Along):
        return demand
    own, result = operand.aval.shape, equation.outvars[0].aval.shape
    same = len(own) == len(result) and own[demand.axis] == result[demand.axis]
    return demand if same else WHOLE


def _unless(axes: Sequence[int], demand: Along) -> list[Demand]:
    return [WHOLE if demand.axis in axes else demand]


def _transpose(equation: Any, demand: Along) -> Demands:
    return [demand._replace(axis=equation.params["permutation"][demand.axis])]


def _broadcast(equation: Any, demand: Along) -> Demands:
    dims, operand = equation.params["broadcast_dimensions"], equation.invars[0].aval
    if demand.axis not in dims:
        return [WHOLE] * len(equation.invars)
    axis = dims.index(demand.axis)
    kept = operand.shape[axis] == equation.outvars[0].aval.shape[demand.axis]
    return [demand._replace(axis=axis) if kept else WHOLE] + [WHOLE] * (len(equation.invars) - 1)


def _reshape(equation: Any, demand: Along) -> Demands:
    before, after = (v.aval.shape for v in (equation.invars[0], equation.outvars[0]))
    inner = demand.inner * math.prod(after[demand.axis + 1 :])  # neighbours in memory
    for axis, length in enumerate(before):
        behind = math.prod(before[axis + 1 :])
        own, left = divmod(inner, behind) if behind else (0, 1)
        if not left and own and length % (own * demand.size) == 0 and length >= own:
            return [Along(axis, demand.size, own)]
    return [WHOLE]


def _squeeze(equation: Any, demand: Along) -> Demands:
    ndim, gone = equation.invars[0].aval.ndim, equation.params["dimensions"]
    left = [a for a in range(ndim) if a not in gone]
    return [demand._replace(axis=left[demand.axis])]


def _reduce(equation: Any, demand: Along) -> Demands:
    ndim, gone = equation.invars[0].aval.ndim, equation.params["axes"]
    left = [a for a in range(ndim) if a not in gone]
    return [demand._replace(axis=left[demand.axis])] * len(equation.invars)


def _cumulative(equation: Any, demand: Along) -> Demands:
    return _unless([equation.params["axis"]], demand)


def _reverse(equation: Any, demand: Along) -> Demands:
    return _unless(equation.params["dimensions"], demand)


def _joined(equation: Any, demand: Along) -> Demands:
    axis = equation.params.get("dimension", equation.params.get("axis"))
    return _unless([axis], demand) * len(equation.invars)


def _stack(equation: Any, demand: Along) -> Demands:
    axis = equation.params["axis"]
    own = demand._replace(axis=demand.axis - (demand.axis > axis))
    return [WHOLE if demand.axis == axis else own] * len(equation.invars)


def _unstack(equation: Any, demand: Along) -> Demands:
    return [demand._replace(axis=demand.axis + (demand.axis >= equation.params["axis"]))]


def _tile(equation: Any, demand: Along) -> Demands:
    repeats = equation.params["reps"]
    alone = len(repeats) == equation.invars[0].aval.ndim and repeats[demand.axis] == 1
    return [demand if alone else WHOLE]


def _slice(equation: Any, demand: Along) -> Demands:
    """A slice, static or not, a padding, or an update: whole along the axis, or no longer so."""
    shape = lambda v: v.aval.shape
    first, out, axis = equation.invars[0], equation.outvars[0], demand.axis
    kept = len(shape(first)) == len(shape(out)) and shape(first)[axis] == shape(out)[axis]
    if equation.primitive.name == "pad":
        kept &= equation.params["padding_config"][axis] == (0, 0, 0)
    if equation.primitive.name == "slice":
        kept &= (equation.params["strides"] or (1,) * len(shape(out)))[axis] == 1
    if equation.primitive.name != "dynamic_update_slice":
        return [demand if kept else WHOLE] + [WHOLE] * (len(equation.invars) - 1)
    kept &= shape(equation.invars[1])[axis] == shape(out)[axis]
    both = [demand if kept else WHOLE] * 2
    return both + [WHOLE] * (len(equation.invars) - 2)


def _top_k(equation: Any, demand: Along) -> Demands:
    return _unless([equation.params.get("axis", equation.invars[0].aval.ndim - 1)], demand)


def _fft(equation: Any, demand: Along) -> Demands:
    ndim = equation.invars[0].aval.ndim
    return _unless(range(ndim - len(equation.params["fft_lengths"]), ndim), demand)


def _matrices(equation: Any, demand: Along) -> Demands:
    """Linear algebra on the last two axes."""
    batch = [v.aval.ndim - 2 for v in equation.invars]
    return [demand if demand.axis < n else WHOLE for n in batch]


def _dot(equation: Any, demand: Along) -> Demands:
    (contracted, batched) = equation.params["dimension_numbers"]
    batch, axis = len(batched[0]), demand.axis
    if axis < batch:
        return [demand._replace(axis=dims[axis]) for dims in batched]
    axis -= batch
    found: list[Demand] = []
    for operand, gone, both in zip(equation.invars, contracted, batched, strict=True):
        free = [a for a in range(operand.aval.ndim) if a not in (*gone, *both)]
        found.append(demand._replace(axis=free[axis]) if 0 <= axis < len(free) else WHOLE)
        axis -= len(free)
    return found


def _conv(equation: Any, demand: Along) -> Demands:
    numbers, params = equation.params["dimension_numbers"], equation.params
    if demand.axis != numbers.out_spec[0] or params["batch_group_count"] != 1:
        return [WHOLE, WHOLE]
    return [demand._replace(axis=numbers.lhs_spec[0]), WHOLE]


def _window(equation: Any, demand: Along) -> Demands:
    params, axis = equation.params, demand.axis
    alone = params["window_dimensions"][axis] == params["window_strides"][axis] == 1
    alone &= tuple(params["padding"][axis]) == (0, 0) and params["base_dilation"][axis] == 1
    return [demand if alone else WHOLE] * len(equation.invars)


def _gather(equation: Any, demand: Along) -> Demands:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    operand = equation.invars[0].aval
    if demand.axis in numbers.offset_dims:
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [a for a in range(operand.ndim) if a not in gone]
        axis = kept[numbers.offset_dims.index(demand.axis)]
        full = sizes[axis] == operand.shape[axis]
        return [demand._replace(axis=axis) if full else WHOLE, WHOLE]
    others = [a for a in range(equation.outvars[0].aval.ndim) if a not in numbers.offset_dims]
    axis = others.index(demand.axis)
    along = demand._replace(axis=axis)
    if axis not in numbers.start_indices_batching_dims:
        return [WHOLE, along]
    at = numbers.start_indices_batching_dims.index(axis)
    return [demand._replace(axis=numbers.operand_batching_dims[at]), along]


def _scatter(equation: Any, demand: Along) -> Demands:
    numbers, operand = equation.params["dimension_numbers"], equation.invars[0].aval
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [a for a in range(operand.ndim) if a not in gone]
    if demand.axis in numbers.operand_batching_dims:
        at = numbers.operand_batching_dims.index(demand.axis)
        axis = numbers.scatter_indices_batching_dims[at]
        others = [a for a in range(equation.invars[2].aval.ndim)
                  if a not in numbers.update_window_dims]  # fmt: skip
        return [demand, demand._replace(axis=axis), demand._replace(axis=others[axis])]
    if demand.axis not in kept:
        return [WHOLE] * 3
    axis = numbers.update_window_dims[kept.index(demand.axis)]
    full = equation.invars[2].aval.shape[axis] == operand.shape[demand.axis]
    return [demand, WHOLE, demand._replace(axis=axis)] if full else [WHOLE] * 3


RULES: dict[str, Rule] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "rev": _reverse,
    "concatenate": _joined,
    "split": _joined,
    "sort": _joined,
    "top_k": _top_k,
    "fft": _fft,
    **dict.fromkeys(MATRICES, _matrices),
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice", "pad"), _slice),
    **dict.fromkeys(SCATTERS, _scatter),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(CUMULATIVE, _cumulative),
}
