"""Every notebook runs from top to bottom in its fast setting, and is committed with outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.once
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATGRAD_FAST", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures into the notebook
    notebook = read(path)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises with the cell and its traceback
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert "Warning" not in "".join(o.text for o in outputs if o.get("name") == "stderr")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_small_and_executed(path: Path) -> None:
    notebook = read(path)
    assert path.stat().st_size < LARGEST
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert "**What you will see.**" in text[0] and text[-1].startswith("## What to try")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [o for cell in code for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
