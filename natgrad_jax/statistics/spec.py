"""What a transformation asks of the next backward pass, readable from its state under jit.

A request is static, and a state must be made of arrays that any checkpoint or optimizer wrapper
takes: so it is spelled in the keys of a dict without leaves, ``{"weight_sharing=reduce": ()}``.
"""

from typing import Any, NamedTuple

from natgrad_jax.curvature import damping_split
from natgrad_jax.layers.approximation import Approximation
from natgrad_jax.state.walk import plain, states

Spelled = dict[str, tuple[()]]

ENOUGH = 256  # examples to measure, where no fraction is given: all of fewer than twice as many


class Request(NamedTuple):
    """``approximation`` of the factors; ``moments``: whether squares in the current bases too;
    ``inputs_only``: whether input factors alone, for which no Fisher pass is needed; ``stride``: of
    the examples that are measured, None for :func:`usual_stride` of their number. ``split``: how
    damping is divided between factors, which the backward pass need not know, and diagnostics
    ask."""

    approximation: Approximation = Approximation()
    moments: bool = False
    inputs_only: bool = False
    stride: int | None = 1
    split: str = damping_split.DEFAULT


def spell(request: Request) -> Spelled:
    """The request as keys of a dict; what is default is not spelled.

    >>> spell(Request(Approximation(group_size=32), moments=True))
    {'group_size=32': (), 'moments': ()}
    """
    own, usual = (r.approximation._asdict() | r._asdict() for r in (request, Request()))
    named = (*Approximation._fields, "stride", "split")
    chosen = {f"{k}={own[k]}": () for k in named if own[k] != usual[k]}
    return chosen | {k: () for k in ("moments", "inputs_only") if own[k]}


def parse(spelled: Spelled) -> Request:
    """The inverse of :func:`spell`."""
    values: dict[str, Any] = dict(key.split("=") for key in spelled if "=" in key)
    if "group_size" in values:
        values["group_size"] = int(values["group_size"])
    if "centred" in values:
        values["centred"] = values["centred"] == "True"
    stride, split = values.pop("stride", "1"), values.pop("split", Request().split)
    stride = None if stride == "None" else int(stride)
    flags = ("moments" in spelled, "inputs_only" in spelled)
    return Request(Approximation(**values), *flags, stride, split)


def stride_of(fraction: Any, period: Any) -> int | None:
    """``statistics_fraction`` as a stride; raises ValueError where it is none.

    Without one all examples count where every step measures, else :func:`usual_stride` decides.
    """
    if fraction is None:
        return 1 if isinstance(period, int | float) and period == 1 else None
    known = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not known or not 0 < fraction <= 1:
        raise ValueError(
            "statistics_fraction is the part of a batch that statistics are measured on, a number "
            f"in (0, 1], known when the transformation is made; got {fraction!r}. (Under "
            "optax.inject_hyperparams name it in static_args.)"
        )
    return max(round(1 / fraction), 1)


def usual_stride(examples: int) -> int:
    """2 where a half are as many examples as the factors need, else 1."""
    return 2 if examples >= 2 * ENOUGH else 1


def requests(opt_state: Any) -> list[tuple[Request, Any]]:
    """The requests in an optimizer state, each with the state that makes it."""
    found = states(plain(opt_state))
    return [(parse(s.request), s) for s in found if hasattr(s, "request")]
