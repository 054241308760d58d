"""The library is a house that can be found one's way in: its rooms, their sizes, its guide."""

import ast
import re
from pathlib import Path

import pytest

import natgrad_jax as ng

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "natgrad_jax"
FILES = sorted(HOUSE.rglob("*.py"))


def test_few_rooms_and_no_long_file() -> None:
    entries = [p for p in HOUSE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 16
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {path: n for path, n in lengths.items() if n > 300} == {}


def test_no_long_signature() -> None:
    def lines(node: ast.FunctionDef) -> int:
        return node.body[0].lineno - node.lineno

    found = {
        f"{p.relative_to(ROOT)}:{node.name}": lines(node)
        for p in FILES
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: n for name, n in found.items() if n > 12} == {}


def test_names_lead_to_one_thing() -> None:
    """No module has a public function's name, but for the file of the transformation itself."""
    rooms = {"diagnostics", "posterior"}  # public as they are
    for room in rooms:
        assert not {p.stem for p in (HOUSE / room).iterdir()} & {*getattr(ng, room).__all__}
    public = {*ng.__all__} - rooms
    shared = [p for p in HOUSE.rglob("*") if p.stem in public and p.suffix in ("", ".py")]
    assert {p.parent.name for p in shared} == {"transforms"}
    for path in shared:
        assert f"def {path.stem}(" in path.read_text()


def test_what_is_private_does_not_show() -> None:
    assert set(dir(ng)) == {*ng.__all__, "__version__", "plots"}
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", ng.__version__)


def test_ten_changes_touch_three_files_at_most() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    table = guide[guide.index("## Ten changes") :]
    rows = [row.split("|")[2] for row in re.findall(r"^\| an? .*\|$", table, re.MULTILINE)]
    assert len(rows) == 10
    for row in rows:
        named = re.findall(r"`([\w/<>]+\.py)`", row)
        assert 1 <= len(named) <= 3
        assert all("<" in path or (HOUSE / path).exists() for path in named), row
