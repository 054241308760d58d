"""How Kronecker factors are simplified: the same options for every transformation."""

import dataclasses
from typing import Literal

from natgrad_jax.layers.limits import MAX_FACTOR

CONVOLUTIONS = ("kfc", "sua")
CHOICES = (
    ("convolution", CONVOLUTIONS),
    ("weight_sharing", ("expand", "reduce")),
    ("beyond", ("sketch", "diagonal")),
)
SIZES = (
    ("group_size", "the number of channels in a group", "one group"),
    ("max_size", "the most rows of one factor", "no limit"),
)


@dataclasses.dataclass(frozen=True)
class Approximation:
    """How Kronecker factors are simplified, and how positions enter them.

    Args:
      convolution: ``"kfc"``, the covariance of whole patches, or ``"sua"``, of channels alone:
        ``A ≈ I ⊗ C``, C averaged over the positions in a patch, the bias separate.
      group_size: channels in a group; correlations across groups (and with the bias) are dropped.
        None: whole factors. The last group is padded with zeros.
      weight_sharing: ``"expand"`` treats positions and calls as examples; ``"reduce"`` averages
        activations and sums gradients over them first.
      centred: under SUA, keep the channels' mean with C. Whitening needs this and sets it.
      max_size: most rows of one factor; beyond it, a factor of a convolution's patches is that of
        its channels (as under SUA), and any other is cut as ``beyond`` says. None: no limit. A
        vocabulary of 50,000 words has 10 GB of factor otherwise.
      beyond: a ``"sketch"`` that is never formed whole, ``[F Ω, diag F]`` for 127 columns Ω of
        signs (with the diagonal at most as many numbers a row as the other factor has rows, or
        ``max_size``): from it come the leading eigenpairs, no more than columns, and the mean of
        all other eigenvalues, also where ``inverse`` or ``basis`` is exact. Or the ``"diagonal"``
        alone, which :func:`~natgrad_jax.in_coordinates` needs and sets.

    Raises:
      ValueError: an unknown choice, or a size that is no whole number of at least 1.

    Source: Grosse & Martens 2016 (KFC); Laurent et al. 2018, section 2 (SUA, groups); Eschenhagen
    et al. 2023 (expand, reduce); Tropp et al. 2017, algorithm 3 (sketches).

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}), approximation=ng.Approximation("sua", group_size=32))
    """

    convolution: Literal["kfc", "sua"] = "kfc"
    group_size: int | None = None
    weight_sharing: Literal["expand", "reduce"] = "expand"
    centred: bool = False
    max_size: int | None = MAX_FACTOR
    beyond: Literal["sketch", "diagonal"] = "sketch"

    def __post_init__(self) -> None:
        for name, known in CHOICES:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
        for name, meaning, nothing in SIZES:
            size = getattr(self, name)
            whole = isinstance(size, int) and not isinstance(size, bool)
            if size is not None and (not whole or size < 1):
                raise ValueError(
                    f"{name}, {meaning}, must be a whole number of at least 1, or None for "
                    f"{nothing}; got {size!r}."
                )


# Nothing simplified.
WHOLE = Approximation()
