"""The site: it builds without a warning, and its reference has every public name once."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import natgrad_jax as ng
from natgrad_jax import plots

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def public_names() -> list[str]:
    found = [name for name in ng.__all__ if not isinstance(getattr(ng, name), ModuleType)]
    for name in ("diagnostics", "posterior"):
        found += [f"{name}.{own}" for own in getattr(ng, name).__all__]
    ours = (n for n, x in vars(plots).items() if getattr(x, "__module__", "") == plots.__name__)
    return found + [f"plots.{own}" for own in ours if not own.startswith("_")]


def test_every_public_name_is_in_the_reference_once() -> None:
    written = "\n".join(page.read_text() for page in DOCS.rglob("*.md"))
    told = re.findall(r"^\.\. auto\w+:: natgrad_jax\.([\w.]+)$", written, re.M)
    assert Counter(told) == Counter(public_names())


@pytest.mark.once
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(module)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html",
         "-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert "scale_by_kfac" in (tmp_path / "html/api/transformations.html").read_text()
