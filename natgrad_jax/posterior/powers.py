"""Powers of the damped curvature, applied to trees like the parameters."""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from natgrad_jax.curvature.eigenbases import scaled
from natgrad_jax.layers.gradients import map_layers
from natgrad_jax.posterior.record import Curvature, covered_leaves
from natgrad_jax.utils import tree_paths
from natgrad_jax.utils.hyperparams import check_not_negative
from natgrad_jax.utils.tree_paths import Path


def power(
    curvature: Curvature,
    tree: PyTree,
    exponent: float,
    damping: float | Float[Array, ""] = 0.0,
) -> PyTree:
    """``(F + λ I)ᵖ v``, block by block: any power of the damped Fisher.

    Of a layer's matrix ``V``, with S the eigenvalues of its F::

        Q_A [(S + λ)ᵖ ∘ (Q_Aᵀ V Q_G)] Q_Gᵀ

    λ is added to F itself, not divided between factors. ``p = −1`` is :func:`solve`, ``p = 1`` the
    product with the damped Fisher, ``p = −½`` the root that :func:`sample` uses. Where a basis has
    the leading eigenvectors alone, all directions orthogonal to them have their mean eigenvalue.

    Args:
      curvature: from :func:`from_state` or :func:`from_data`.
      tree: v, a tree like the parameters (for an NNX model, like ``nnx.state(model, nnx.Param)``).
      exponent: p.
      damping: λ ≥ 0, in the units of the Fisher (loss per parameter squared). Negative powers of an
        F without full rank need λ > 0: results are infinite or NaN otherwise.

    Returns:
      A tree like ``tree``, in its dtypes; zero for parameters without a block.

    Raises:
      ValueError: a negative damping; parameters that are missing or have other shapes.

    Source: George et al. 2018, section 3.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> v = {"kernel": jnp.arange(12.0).reshape(4, 3)}
    >>> root = ng.posterior.power(curvature, v, 0.5, damping=0.1)
    >>> whole = ng.posterior.power(curvature, v, 1, damping=0.1)
    >>> again = ng.posterior.power(curvature, root, 0.5, damping=0.1)
    >>> bool(jnp.allclose(again["kernel"], whole["kernel"], atol=1e-4))
    True
    """
    check_not_negative(damping=damping)
    own = covered_leaves(curvature, tree)
    layers = curvature.layers

    def raised(S: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.power(S + jnp.asarray(damping, S.dtype), exponent)

    def of_layer(path: Path, x: Float[Array, "..."]) -> Float[Array, "..."]:
        gains = raised(curvature.eigenvalues[path])
        return scaled(layers[path], curvature.bases[path], gains, x)

    mapped = map_layers(tree, layers, of_layer)
    new = {p: jnp.zeros_like(x) for p, x in tree_paths.leaves(tree).items() if p not in own}
    for path, diagonal in curvature.diagonal.items():
        new[path] = (raised(diagonal) * own[path]).astype(own[path].dtype)
    return tree_paths.replace(mapped, new)


def solve(curvature: Curvature, tree: PyTree, damping: float | Float[Array, ""]) -> PyTree:
    """``(F + λ I)⁻¹ v``, block by block; of a gradient, the natural gradient.

    As :func:`power` with ``p = −1``.

    Args:
      curvature: from :func:`from_state` or :func:`from_data`.
      tree: v, a tree like the parameters (for an NNX model, like ``nnx.state(model, nnx.Param)``).
      damping: λ ≥ 0, in the units of the Fisher (loss per parameter squared).

    Returns:
      A tree like ``tree``, in its dtypes; zero for parameters without a block.

    Raises:
      ValueError: as :func:`power`.

    Source: George et al. 2018, section 3.

    >>> import jax.numpy as jnp, natgrad_jax as ng
    >>> params, x, y = {"kernel": jnp.ones((4, 3))}, jnp.eye(4), jnp.arange(4) % 3
    >>> loss_fn = lambda p, x, y: ng.Categorical(x @ p["kernel"]).nll(y)
    >>> layers = ng.find_layers(loss_fn, params, x, y)
    >>> curvature = ng.posterior.from_data(loss_fn, params, [(x, y)], layers, fisher="exact")
    >>> ng.posterior.solve(curvature, params, damping=0.1)["kernel"].shape
    (4, 3)
    """
    return power(curvature, tree, -1, damping)
