"""Properties of each kind of layer that do not depend on its sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """Static; the library uses these, and the kind's name is for people.

    ``has_receptive_field``: its inputs are patches, ``places × channels``. ``one_hot``: they are
    one-hot rows, so that A is diagonal. ``has_sides``: it has inputs and outputs, so that a
    Kronecker product is possible.
    """

    has_receptive_field: bool = False
    one_hot: bool = False
    has_sides: bool = True


KINDS = {
    "dense": Traits(),
    "conv": Traits(has_receptive_field=True),
    "embed": Traits(one_hot=True),
    "norm": Traits(has_sides=False),
    "bias": Traits(has_sides=False),
    "free": Traits(has_sides=False),
}


def traits_of(kind: str) -> Traits:
    """The traits of a kind; raises ValueError listing the known kinds.

    >>> traits_of("embed").one_hot
    True
    """
    if kind not in KINDS:
        raise ValueError(f"a layer's kind is one of {', '.join(map(repr, KINDS))}; got {kind!r}.")
    return KINDS[kind]
