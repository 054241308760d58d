"""What a layer of each kind is, whatever its sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """Static; the rest of the library asks these, and the kind's name is for people.

    ``has_receptive_field``: its inputs are patches, ``places × channels``. ``one_hot``: they are
    one-hot rows, so that A is diagonal. ``has_sides``: it has inputs and outputs, of which a
    Kronecker product is made. ``tapped``: its calls are seen.
    """

    has_receptive_field: bool = False
    one_hot: bool = False
    has_sides: bool = True
    tapped: bool = True


_CONVOLUTION = Traits(has_receptive_field=True)

KINDS = {
    "dense": Traits(),
    "einsum": Traits(),
    "conv": _CONVOLUTION,
    "conv transpose": _CONVOLUTION,
    "conv local": _CONVOLUTION,
    "embed": Traits(one_hot=True),
    "norm": Traits(has_sides=False),
    "free": Traits(has_sides=False, tapped=False),
}


def traits_of(kind: str) -> Traits:
    """Those of a kind; raises ValueError with what there is.

    >>> traits_of("embed").one_hot
    True
    """
    if kind not in KINDS:
        raise ValueError(f"a layer's kind is one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
    return KINDS[kind]
