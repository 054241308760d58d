"""``docs/errors.md`` has every message that a user can meet, word for word, and no other."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "natgrad_jax"
PAGE = ROOT / "docs/errors.md"

# Messages that no call of a public function leads to, with the reason.
INTERNAL = {
    "a computation may yield problems only once": "how the library writes its own generators",
    "a split axis beyond its source": "an assertion about views of one array",
    "a layer's kind is one of …; got ….": "kinds are given by find_layers",
    "damping is split by …; got ….": "each transformation names its rule",
    "module … has no attribute …": "Python's own message",
}


def text(node: ast.expr, module: dict[str, ast.AST]) -> str:
    """The words of a message, ``…`` for each part that varies.

    A message may be made by ``CONSTANT.format(…)`` or by a function of the same file.
    """
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(x, module) for x in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left, module) + text(node.right, module)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inner = text(node.func.value, module)  # .format(…), .rstrip()
        return inner.replace("{}", "…")
    named = node.func if isinstance(node, ast.Call) else node
    found = module.get(named.id) if isinstance(named, ast.Name) else None
    if isinstance(found, ast.FunctionDef):
        returned = next(x for x in ast.walk(found) if isinstance(x, ast.Return))
        return text(returned.value, module)
    return text(found.value, module) if isinstance(found, ast.Assign) else "…"


def _message(node: ast.AST) -> ast.expr | None:
    """The text of an error, of a warning, or of a reason for no block: ``found.end(…, reason)``."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call) or not call.args:
        return None
    if isinstance(node, ast.Raise) or ast.unparse(call.func) == "warnings.warn":
        return call.args[0]
    name = getattr(call.func, "attr", "")
    if name == "add_note":
        return call.args[0]
    return call.args[1] if name in ("end", "lose") and len(call.args) == 2 else None


def messages() -> dict[str, str]:
    """Every message in the source, and the files that have it."""
    found: dict[str, str] = {}
    for path in sorted(HOUSE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        module: dict[str, ast.AST] = {}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                module[node.name] = node
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                module[node.targets[0].id] = node
        for node in filter(None, map(_message, ast.walk(tree))):
            told = re.sub("…+", "…", " ".join(text(node, module).split()))
            if re.search(r"[a-z]{3}", told):  # else it hands on another message
                found.setdefault(told, str(path.relative_to(ROOT)))
    return found


def test_the_page_has_the_messages_of_the_source() -> None:
    source = messages()
    assert len(source) > 150
    page = re.findall(r"^- `(.+)`\\$", PAGE.read_text(), re.MULTILINE)
    assert set(INTERNAL) <= set(source)
    expected = {told: path for told, path in source.items() if told not in INTERNAL}
    assert {told: path for told, path in expected.items() if told not in page} == {}
    assert set(page) - set(expected) == set()
    assert len(page) == len(set(page))


def test_each_message_is_explained() -> None:
    """Below a message, indented, stand its cause and what to do."""
    alone = re.findall(r"^- `(.+)`\\\n(?!  \S)", PAGE.read_text(), re.MULTILINE)
    assert alone == []
