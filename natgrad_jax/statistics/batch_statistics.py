"""What one backward pass measured: sums over the examples of a batch, which can be added."""

from typing import NamedTuple

import jax

from natgrad_jax.curvature.layer_sums import Sums
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path


@printed_short
class Statistics(NamedTuple):
    """Raw sums over examples; ``jax.tree.map(jnp.add, s1, s2)`` gives those of both batches.

    ``examples``: their number, weighted, ``()``; zero means that nothing was measured. ``sums``: by
    weight sharing, ``"expand"`` and ``"reduce"``, the sums of each layer by path; for layers with
    positions "reduce" is measured if a transformation needs it, or without ``opt_state``.
    ``leftover``: for each parameter with a diagonal block the squared sum of the examples'
    gradients, in the parameter's shape (None without a Fisher pass). ``moments``: for each layer
    ``Σₙ (Q_Aᵀ ∇K̄ₙ Q_G)²`` in the bases of ``opt_state``, if its transformation needs them.

    In a loss of several terms each counts its own examples, ``(terms,)``. What is computed from
    gradients then has a leading axis of terms for layers and parameters that more than one term
    depends on (``layer.terms``): their G is ``(terms, *stack, *blocks, outputs, outputs)``.

    >>> import jax, jax.numpy as jnp, natgrad_jax as ng
    >>> half = ng.Statistics(jnp.asarray(4.0), {"expand": {}, "reduce": {}}, {}, None)
    >>> float(jax.tree.map(jnp.add, half, half).examples)
    8.0
    """

    examples: jax.Array
    sums: dict[str, dict[Path, Sums]]
    leftover: dict[Path, jax.Array] | None
    moments: dict[Path, jax.Array] | None

    @property
    def layers(self) -> dict[Path, Sums]:
        """The sums by layer path, positions counted as examples (``"expand"``)."""
        return self.sums["expand"]

    @property
    def reduced(self) -> dict[Path, Sums]:
        """The sums by layer path, positions summed first (``"reduce"``)."""
        return self.sums["reduce"]
