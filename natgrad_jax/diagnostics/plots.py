"""Plots of curvature and training, legible in black and white; each takes and returns axes.

matplotlib is an optional extra, ``pip install 'natgrad-jax[plots]'``, and ``import natgrad_jax``
does not import this module: ``from natgrad_jax import plots``.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from natgrad_jax.utils import tree_paths

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
except ImportError as error:
    raise ImportError(
        "natgrad_jax.diagnostics.plots needs matplotlib, which is not installed: "
        "pip install 'natgrad-jax[plots]'."
    ) from error

# Distinguishable without colour: a line style and a marker each.
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"))
MARKS = 8  # markers on a line


def fisher(
    F: Any, ax: Axes | None = None, *, params: Any = None, decades: float = 4.0, title: str = ""
) -> Axes:
    """A Fisher, or any matrix over the parameters, as a heat map of ``|F| / max |F|``.

    Args:
      F: ``(P, P)``.
      ax: where to draw; a new figure if None.
      params: the parameters of F, in the order of ``jax.flatten_util.ravel_pytree``: the
        boundaries and names of their layers are drawn.
      decades: range of the logarithmic grey scale; smaller entries are white.
      title: the condition number is appended to it.

    Returns:
      The axes.

    >>> import numpy as np
    >>> from natgrad_jax import plots
    >>> ax = plots.fisher(np.diag([1.0, 2.0]))
    >>> ax.get_title()
    'condition number 2'
    """
    ax = _axes(ax)
    size = np.abs(np.asarray(F))
    scale = LogNorm(vmin=10.0**-decades, vmax=1.0)
    shown = np.maximum(size / max(size.max(), np.finfo(size.dtype).tiny), 10.0**-decades)
    image = ax.imshow(shown, cmap="gray_r", norm=scale, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="|F| / max |F|", shrink=0.8)
    condition = f"condition number {_condition(np.asarray(F)):.3g}"
    ax.set_title(f"{title}\n{condition}" if title else condition)
    if params is None:
        ax.set(xlabel="parameter", ylabel="parameter")
        return ax
    names, ends = _boundaries(params)
    for end in ends[:-1]:
        for line in (ax.axhline, ax.axvline):
            line(end - 0.5, color="black", linewidth=0.8, linestyle=":")
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise([0, *ends])]
    ax.set_xticks(middles, names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(middles, names)
    ax.set(xlabel="parameter, by layer", ylabel="parameter, by layer")
    return ax


def whitening(
    before: Any, after: Any, axes: Sequence[Axes] | None = None, **kwargs: Any
) -> tuple[Axes, Axes]:
    """Two Fishers side by side, before and after whitening, each on its own grey scale.

    Args:
      before, after: ``(P, P)`` each.
      axes: two of them; a new figure if None.
      **kwargs: passed to :func:`fisher`.

    Returns:
      The two axes.

    Source: Desjardins et al. 2015, figure 2.

    >>> import numpy as np
    >>> from natgrad_jax import plots
    >>> left, right = plots.whitening(np.diag([1.0, 9.0]), np.eye(2))
    >>> right.get_title()
    'after whitening\\ncondition number 1'
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")[1]
    left = fisher(before, axes[0], title="before whitening", **kwargs)
    return left, fisher(after, axes[1], title="after whitening", **kwargs)


def spectra(
    values: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    damping: float | None = None,
    unit: str = "nats per squared parameter",
) -> Axes:
    """Eigenvalues, the largest first, on a logarithmic scale.

    Args:
      values: from label to eigenvalues ``(n,)``, in any order; zeros up to rounding are not drawn.
      ax: where to draw; a new figure if None.
      damping: λ, for a line at its height.
      unit: of the eigenvalues; the default is a Fisher's, and wrong for single factors.

    Returns:
      The axes.

    >>> import numpy as np
    >>> from natgrad_jax import plots
    >>> plots.spectra({"F": np.array([1.0, 0.1, 0.0])}).get_xlabel()
    'index of the eigenvalue, the largest first'
    """
    ax = _axes(ax)
    curves = {}
    for label, x in values.items():
        x = np.sort(np.asarray(x).ravel())[::-1]
        x = x[x > len(x) * np.finfo(x.dtype).eps * x[0]]
        curves[label] = np.arange(1, len(x) + 1), x
    _lines(ax, curves)
    if damping is not None:
        ax.axhline(float(damping), color="0.5", linewidth=1, label=f"damping {float(damping):.3g}")
    ax.set(
        yscale="log",
        xlabel="index of the eigenvalue, the largest first",
        ylabel=f"eigenvalue ({unit})",
    )
    return _finished(ax)


def race(
    curves: Mapping[str, Mapping[str, Any]],
    ax: Axes | None = None,
    *,
    against: str = "steps",
    floor: float = 0.0,
    unit: str = "nats per example",
) -> Axes:
    """Training loss against steps or seconds, one line per optimizer.

    Args:
      curves: from label to ``{"steps": …, "seconds": …, "loss": …}``, sequences of one length
        (``"seconds"`` only if they are drawn).
      ax: where to draw; a new figure if None.
      against: ``"steps"`` or ``"seconds"``.
      floor: the least loss that can be reached, subtracted from every loss.
      unit: of the loss.

    Returns:
      The axes.

    Raises:
      ValueError: another ``against``.

    >>> from natgrad_jax import plots
    >>> curve = {"steps": [0, 1, 2], "loss": [3.0, 2.0, 1.0]}
    >>> plots.race({"K-FAC": curve}).get_ylabel()
    'training loss (nats per example)'
    """
    labels = {"steps": "steps", "seconds": "training time (seconds)"}
    if against not in labels:
        raise ValueError(f'against must be "steps" or "seconds"; got {against!r}.')
    ax = _axes(ax)
    _lines(ax, {k: (c[against], np.asarray(c["loss"]) - floor) for k, c in curves.items()})
    above = f"training loss above {floor:.3g}" if floor else "training loss"
    ax.set(xlabel=labels[against], ylabel=f"{above} ({unit})", xlim=(0, None), yscale="log")
    return _finished(ax)


def damping(histories: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """The damping of every step, on a logarithmic scale.

    Args:
      histories: from label to λ by step, ``(steps,)``; NaN where there was none, as in the
        ``history`` of :class:`natgrad_jax.AdaptiveDampingState`.
      ax: where to draw; a new figure if None.

    Returns:
      The axes.

    >>> import numpy as np
    >>> from natgrad_jax import plots
    >>> plots.damping({"adaptive": np.array([1.0, 0.5, np.nan])}).get_xlabel()
    'steps'
    """
    ax = _axes(ax)
    own = {label: np.asarray(x, float) for label, x in histories.items()}
    _lines(ax, {k: (np.flatnonzero(x == x), x[x == x]) for k, x in own.items()})  # no NaN
    ax.set(xlabel="steps", ylabel="damping λ (nats per squared parameter)", yscale="log")
    return _finished(ax)


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _lines(ax: Axes, curves: Mapping[str, tuple[Any, Any]]) -> None:
    """One line per curve, with few markers, staggered between curves."""
    for i, (label, (x, y)) in enumerate(curves.items()):
        line, marker = STYLES[i % len(STYLES)]
        every = max(1, len(x) // MARKS)
        marks = (i * every // max(len(curves), 1), every)
        look: dict[str, Any] = {"linestyle": line, "marker": marker, "markevery": marks}
        look["fillstyle"] = ("full", "none")[i // len(STYLES) % 2]  # ten distinct curves
        own = np.asarray(x), np.asarray(y)
        ax.plot(*own, color=f"C{i}", label=label, markersize=4, **look)


def _finished(ax: Axes) -> Axes:
    ax.grid(which="major", color="0.85")
    ax.grid(which="minor", color="0.93", linewidth=0.5)
    ax.set_axisbelow(True)
    ax.legend()
    return ax


def _condition(F: np.ndarray) -> float:
    """Of the nonzero eigenvalues; in F's own precision, as JAX may be limited to 32 bits."""
    values = np.linalg.eigvalsh(F)
    kept = values[values > len(F) * np.finfo(F.dtype).eps * values[-1]]
    return float(values[-1] / kept[0]) if len(kept) else np.nan


def _boundaries(params: Any) -> tuple[list[str], list[int]]:
    """The layers of a parameter tree in its order, and the index at which each ends."""
    names: list[str] = []
    ends: list[int] = []
    for path, x in tree_paths.leaves(params).items():
        name, before = tree_paths.join(path[:-1]), ends[-1] if ends else 0
        if names and names[-1] == name:
            ends[-1] += int(np.size(x))
        else:
            names, ends = [*names, name], [*ends, before + int(np.size(x))]
    return names, ends
