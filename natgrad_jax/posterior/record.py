"""The curvature of a trained model: an eigenbasis and eigenvalues for each layer."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array, Float, PyTree

from natgrad_jax.curvature.factor_averages import FactorsLike
from natgrad_jax.layers.collection import Layers, names
from natgrad_jax.layers.layer import Parameter
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.short_repr import printed_short
from natgrad_jax.utils.tree_paths import Path, join


@printed_short
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Curvature:
    """The Fisher F of a model, block by block, as eigenvectors and eigenvalues; a pytree.

    For each layer ``F = (Q_A ⊗ Q_G) diag(S) (Q_A ⊗ Q_G)ᵀ``, with ``S = d_A d_Gᵀ`` (K-FAC) or the
    second moments ``E[(Q_Aᵀ ∇K̄ₙ Q_G)²]`` (EKFAC). Nothing is damped. F is the Fisher of the loss as
    it is differentiated: a mean over examples, summed over the loss's terms with their scales, in
    units of the loss per parameter squared. Made by :func:`from_state` or :func:`from_data`.

    Parameters without a block here (frozen, with the plain gradient as their block, masked out in
    the optimizer, not chosen in :func:`select`) count as constants: there every result is zero, and
    samples stay where they are.

    ``layers``: which parameters form which block; static, so that functions under ``jit`` can take
    the record. ``bases``: by layer path the eigenvectors in columns, all or the leading ones.
    ``eigenvalues``: S by layer path, ``(*stack, *blocks, rows, columns)``, and for leading
    eigenvectors their number and one more, the mean of all others. ``diagonal``: by parameter path
    the diagonal of F where nothing else is known, in the parameter's shape.

    Source: George et al. 2018, section 3; Martens & Grosse 2015, section 3.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> curvature.eigenvalues[()].shape, curvature.bases[()].A.shape
    ((4, 3), (4, 4))
    """

    layers: Layers = field(metadata={"static": True})
    bases: dict[Path, FactorsLike]
    eigenvalues: dict[Path, Float[Array, "..."]]
    diagonal: dict[Path, Float[Array, "..."]]


def covered(layers: Layers) -> dict[Path, Parameter]:
    """The parameters whose curvature is known, by path."""
    own = [p for layer in layers.values() for p in layer.parameters]
    return {p.path: p for p in (*own, *layers.diagonals)}


def covered_leaves(curvature: Curvature, tree: PyTree) -> dict[Path, Float[Array, "..."]]:
    """The leaves of the covered parameters; raises ValueError if one is missing or has another
    shape."""
    given = tree_paths.leaves(tree)
    known = covered(curvature.layers)
    for path, parameter in known.items():
        came = tuple(given[path].shape) if path in given else "no such parameter"
        if came != parameter.shape:
            raise ValueError(
                f"the curvature has {join(path)} of shape {parameter.shape}; the tree has {came}. "
                "Pass a tree like the parameters that the curvature was measured at, or choose "
                'the layers that it has: ng.posterior.select(curvature, "encoder/head").'
            )
    return {path: given[path] for path in known}


def select(curvature: Curvature, *where: Path | str) -> Curvature:
    """The curvature of some layers; all other parameters then count as constants.

    So a posterior is one over the last layer alone, or over any others.

    Args:
      curvature: from :func:`from_state` or :func:`from_data`.
      *where: paths, ``"encoder/head"`` or ``("encoder", "head")``, for all at or below them, or
        patterns of whole paths, ``"*/head"``, as for :meth:`natgrad_jax.Layers.replace`.

    Returns:
      A :class:`Curvature` whose blocks are those chosen.

    Raises:
      ValueError: nothing there, or a part of a layer, whose block spans all its parameters.

    Source: Kristiadi et al. 2020 (a posterior over the last layer).

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 2))}, jnp.eye(4)
    >>> loss_fn = lambda p, x: ng.Gaussian(jnp.tanh(x @ p["a"]) @ p["b"]).nll(x[:, :2])
    >>> layers = ng.find_layers(loss_fn, params, x)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x,)], layers, fisher="exact")
    >>> list(ng.posterior.select(curvature, "b").layers)
    [('b',)]
    """
    layers = curvature.layers
    parameters = covered(layers)
    chosen: set[Path] = set()
    for each in where:
        hits = {path for path in parameters if names(each, path)}
        hits |= {p.path for x in layers.values() if names(each, x.path) for p in x.parameters}
        if not hits:
            known = ", ".join(map(join, [*layers, *curvature.diagonal]))
            raise ValueError(f"the curvature has nothing at {each!r}; it has {known}.")
        chosen |= hits
    kept = []
    for path, layer in layers.items():
        own = {p.path for p in layer.parameters}
        if own <= chosen:
            kept.append(path)
        elif own & chosen:
            part = ", ".join(sorted(map(join, own & chosen)))
            raise ValueError(
                f"{part} is a part of layer {join(path)}, whose block spans all its parameters: "
                f'name the layer, "{join(path)}".'
            )
    diagonal = {path: x for path, x in curvature.diagonal.items() if path in chosen}
    bases = {path: curvature.bases[path] for path in kept}
    eigenvalues = {path: curvature.eigenvalues[path] for path in kept}
    return Curvature(layers.within(kept, diagonal), bases, eigenvalues, diagonal)
