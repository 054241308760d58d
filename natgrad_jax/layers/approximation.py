"""Which Kronecker approximation: chosen by one keyword each, the same for every transformation."""

from typing import Any, NamedTuple

CONVOLUTIONS = ("kfc", "sua")
WEIGHT_SHARINGS = ("expand", "reduce")


class Approximation(NamedTuple):
    """How Kronecker factors are simplified and how positions enter them.

    ``convolution``: ``"kfc"`` keeps all of a patch's covariance (Grosse & Martens 2016); ``"sua"``
    takes its places as uncorrelated, ``A ≈ I ⊗ C`` with the channel covariance C (Laurent et al.
    2018, section 2.1). ``group_size``: channels in a group; correlations across groups are dropped
    (section 2.2); None for one group. ``weight_sharing``: ``"expand"`` treats positions as
    examples; ``"reduce"`` averages activations and sums gradients over them first (Eschenhagen et
    al. 2023). ``centred``: under SUA the channels' mean is kept beside C, for whitening.
    """

    convolution: str = "kfc"
    group_size: int | None = None
    weight_sharing: str = "expand"
    centred: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """The choices that a user has, as transformations take them."""
        return {key: value for key, value in self._asdict().items() if key != "centred"}


# Nothing simplified.
WHOLE = Approximation()


def approximation(convolution: str, group_size: Any, weight_sharing: str) -> Approximation:
    """The checked choice; raises ValueError with the values there are."""
    for name, value, known in (
        ("convolution", convolution, CONVOLUTIONS),
        ("weight_sharing", weight_sharing, WEIGHT_SHARINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}; got {value!r}.")
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size is not None and (not whole or group_size < 1):
        raise ValueError(
            "group_size is how many channels are in a group: a whole number, at least 1, or None "
            f"for one group; got {group_size!r}. (Under optax.inject_hyperparams name it in "
            "static_args.)"
        )
    return Approximation(convolution, group_size, weight_sharing)
