"""Which statistics a transformation needs next, readable from its state under jit.

A specification is static, but a state must consist of arrays that any checkpoint or optimizer
wrapper takes. So it is encoded in the keys of a dict without leaves,
``{"weight_sharing=reduce": ()}``, the field ``request`` of a state.
"""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

from natgrad_jax.curvature import damping_split
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.state.walk import plain, states

EncodedSpec = dict[str, tuple[()]]

MEASURED = 10  # steps from one measurement to the next, by default
ENOUGH = 128  # examples, by default, of the large batches of which a part is measured
STRIDES = (8, 4, 2)  # of which every k-th example is measured


class StatisticsSpec(NamedTuple):
    """``approximation`` of the factors; ``moments``: whether to measure squared gradients in the
    current bases too; ``inputs_only``: whether input factors suffice, which need no Fisher pass;
    ``stride``: k, to measure every k-th example; None: :func:`stride_for`. ``split``: how damping
    is divided between factors (for diagnostics; the backward pass does not need it).
    ``every_step``: whether each step is known to measure, so that no branch is needed."""

    approximation: Approximation = Approximation()
    moments: bool = False
    inputs_only: bool = False
    stride: int | None = 1
    split: str = damping_split.DEFAULT
    every_step: bool = False


FLAGS = ("moments", "inputs_only", "every_step")


def encode(spec: StatisticsSpec) -> EncodedSpec:
    """The specification as keys of a dict, without default values.

    >>> encode(StatisticsSpec(Approximation(group_size=32), moments=True))
    {'group_size=32': (), 'moments': ()}
    """
    own, usual = (asdict(r.approximation) | r._asdict() for r in (spec, StatisticsSpec()))
    named = (*asdict(Approximation()), "stride", "split")
    chosen = {f"{k}={own[k]}": () for k in named if own[k] != usual[k]}
    return chosen | {k: () for k in FLAGS if own[k]}


def decode(encoded: EncodedSpec) -> StatisticsSpec:
    """The inverse of :func:`encode`."""
    values: dict[str, Any] = dict(key.split("=") for key in encoded if "=" in key)
    for size in values.keys() & {"group_size", "max_size"}:
        values[size] = None if values[size] == "None" else int(values[size])
    if "centred" in values:
        values["centred"] = values["centred"] == "True"
    stride, split = values.pop("stride", "1"), values.pop("split", StatisticsSpec().split)
    stride = None if stride == "None" else int(stride)
    flags = {name: name in encoded for name in FLAGS}
    return StatisticsSpec(Approximation(**values), stride=stride, split=split, **flags)


def stride_of(fraction: Any, period: Any) -> int | None:
    """``statistics_fraction`` as a stride; raises ValueError for anything else.

    Without one, all examples are measured if every step measures, else :func:`stride_for`.
    """
    if fraction is None:
        return 1 if is_one(period) else None
    known = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not known or not 0 < fraction <= 1:
        raise ValueError(
            "statistics_fraction, the part of a batch that statistics are measured on, must be a "
            "number in (0, 1], known when the transformation is made; got "
            f"{fraction!r}. (Under optax.inject_hyperparams name it in static_args.)"
        )
    return max(round(1 / fraction), 1)


def is_one(period: Any) -> bool:
    """Whether a period is known to be a single step."""
    return isinstance(period, int | float) and period == 1


def stride_for(stride: int | None, examples: float, positions: float = 1) -> int:
    """k, to measure every k-th of the ``examples`` of a batch.

    ``stride``: that of a specification. By default :data:`ENOUGH` are measured, where there are
    more. Positions of one example are alike: t of them count as √t examples.

    >>> [stride_for(None, n) for n in (255, 256, 511, 512, 1023, 1024, 8192)]
    [1, 2, 2, 4, 4, 8, 8]
    >>> stride_for(None, 32, positions=63), stride_for(None, 32, positions=64)
    (1, 2)
    """
    if stride is not None:
        return stride
    return next((k for k in STRIDES if examples * math.sqrt(positions) >= k * ENOUGH), 1)


def specs(opt_state: Any) -> list[tuple[StatisticsSpec, Any]]:
    """The specifications in an optimizer state, each with the state that holds it."""
    found = states(plain(opt_state))
    return [(decode(s.request), s) for s in found if hasattr(s, "request")]
