"""Scalars by name as a table in plain text: a block per transformation, a row per layer."""

from typing import Any

# In the order of display; other names come last.
MEASURES = (
    "step", "damping", "level", "ratio", "learning_rate", "momentum", "predicted",
    "update_norm", "gradient_norm", "decrease", "kl",
    *(f"{name}_{side}" for name in ("scale", "rank", "damping", "drift", "variance", "condition")
      for side in ("A", "G")),
    "drift_mean", "kfac_error", "condition", "rejected", "refused",
)  # fmt: skip


def table(scalars: dict[str, Any]) -> str:
    """``{"kfac/step": 3, "kfac/Dense_0/kl": 0.1, …}`` as aligned columns, ``·`` for none."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in scalars.items():
        name, measure = key.rsplit("/", 1)
        rows.setdefault(name, {})[measure] = value
    lines = []
    for name in [name for name in rows if "/" not in name]:
        own = [f"{_words(key)} {_number(rows[name][key])}" for key in _ordered(rows[name])]
        lines += ["  ".join([name, *own])]
        lines += _aligned({
            row.removeprefix(f"{name}/"): values
            for row, values in rows.items()
            if row.startswith(f"{name}/")
        })  # fmt: skip
    return "\n".join(lines)


def _aligned(rows: dict[str, dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    columns = _ordered({key for values in rows.values() for key in values})
    cells = [["layer", *map(_words, columns)]]
    for name, values in rows.items():
        cells += [[name, *(_number(values[c]) if c in values else "·" for c in columns)]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    aligned = [[row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
               for row in cells]  # fmt: skip
    return ["  ".join(row).rstrip() for row in aligned]


def _ordered(names: Any) -> list[str]:
    place = {name: i for i, name in enumerate(MEASURES)}
    return sorted(names, key=lambda name: (place.get(name, len(place)), name))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
