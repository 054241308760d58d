"""What is public is explained: a summary, its arguments, its errors, its source, and an example.

The examples themselves run as doctests, in pytest's own collection.
"""

import ast
import inspect
import textwrap
from types import ModuleType
from typing import Any

import natgrad_jax as ng

# Names that have no mathematics, or no paper's.
NO_SOURCE = {
    "ExactNGDState",
    "Rows",
    "AdaptiveDampingState", "Bernoulli", "Categorical", "Cholesky", "DampingRule", "Distribution",
    "EKFACState",
    "Eigh", "Gaussian",
    "InCoordinatesState", "KFACState", "Layer", "Layers", "Loss", "QuadraticModelState",
    "SOAPState", "ShampooState", "Statistics", "TrainState", "UncoveredWarning", "bases", "damping",
    "factors", "find_layers",
    "as_layer", "every", "from_distribution", "staggered",
    "whitening_variables",
}  # fmt: skip
NO_EXAMPLE = {"KFACState"}


def _public() -> dict[str, Any]:
    """Every function and class of the library's public list, and of the modules in it."""
    found = {}
    for name in ng.__all__:
        x = getattr(ng, name)
        if not isinstance(x, ModuleType):
            found[name] = x
            continue
        for own, y in vars(x).items():
            ours = getattr(y, "__module__", "").startswith(x.__name__)
            if ours and not own.startswith("_"):
                found[f"{name}.{own}"] = y
    return found


PUBLIC = _public()
FUNCTIONS = {name: x for name, x in PUBLIC.items() if inspect.isfunction(x)}
CLASSES = {name: x for name, x in PUBLIC.items() if inspect.isclass(x)}


def doc_of(x: Any) -> str:
    return inspect.cleandoc(x.__doc__ or "")


def methods(x: Any) -> dict[str, Any]:
    """The public methods and properties that a class of this library defines itself."""
    functions = {n: getattr(m, "fget", m) for n, m in vars(x).items() if n[0] != "_"}
    return {n: f for n, f in functions.items()
            if inspect.isfunction(f) and f.__module__ == x.__module__}  # fmt: skip


def raises(x: Any) -> bool:
    """Whether its own code raises, or calls one of the library's checks."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(x)))
    calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [getattr(f, "id", getattr(f, "attr", "")) for f in calls]
    checks = any(n.startswith("check_") or n == "needed" for n in names)
    return checks or any(isinstance(n, ast.Raise) for n in ast.walk(tree))


def test_the_public_list_is_what_the_package_imports() -> None:
    public = {name for name, x in vars(ng).items()
              if not name.startswith("_") and not isinstance(x, ModuleType)}  # fmt: skip
    assert public == {n for n in ng.__all__ if not isinstance(getattr(ng, n), ModuleType)}


def test_the_first_line_is_a_sentence() -> None:
    def good(x: Any) -> bool:
        first, *rest = doc_of(x).splitlines() or [""]
        return first.endswith(".") and (not rest or rest[0] == "")

    assert [name for name, x in PUBLIC.items() if not good(x)] == []


def test_there_is_an_example() -> None:
    assert {name for name, x in PUBLIC.items() if ">>> " not in doc_of(x)} == NO_EXAMPLE


# How a docstring sends to another function for its arguments.
OTHERS = ("are those of", "Raises: as", "As for")


def test_every_argument_is_told() -> None:
    missing = {}
    for name, x in FUNCTIONS.items():
        doc, parameters = doc_of(x), inspect.signature(inspect.unwrap(x)).parameters
        if not any(f"{start} :func:" in " ".join(doc.split()) for start in OTHERS):
            missing[name] = [p for p in parameters if p not in doc]
            missing[name] += ["Args:"] * (bool(parameters) and "Args:" not in doc)
    assert {name: left for name, left in missing.items() if left} == {}


def test_every_field_of_a_state_is_told() -> None:
    """There, or in the class that its docstring names for the rest."""
    fields = {name: x._fields for name, x in CLASSES.items() if hasattr(x, "_fields")}
    missing = {
        name: [f for f in own if f not in doc_of(CLASSES[name]) and f != "clock"]
        for name, own in fields.items()
        if "other fields" not in doc_of(CLASSES[name])
    }
    assert {name: left for name, left in missing.items() if left} == {}


def test_errors_are_told() -> None:
    told = lambda doc: "Raises" in doc or "errors are those" in doc
    assert [name for name, x in FUNCTIONS.items() if raises(x) and not told(doc_of(x))] == []


def test_mathematics_has_a_source() -> None:
    sourced = {name for name, x in PUBLIC.items() if "Source: " in doc_of(x)}
    assert {n for n in PUBLIC if not n.startswith("diagnostics.")} - sourced == NO_SOURCE


def test_methods_have_a_docstring() -> None:
    """Their own or an inherited one; but for the fields of a layer, whose names say it."""
    silent = {
        f"{name}.{n}"
        for name, x in CLASSES.items()
        for n in methods(x)
        if not inspect.getdoc(getattr(x, n))
    }
    assert {n for n in silent if not n.startswith("Layer.")} == set()
