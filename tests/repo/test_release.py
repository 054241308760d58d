"""A release: what the sdist and the wheel hold, and README's example trained from the wheel."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import natgrad_jax as ng

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
checkout_only = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not in an unpacked sdist")


def output(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def in_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@checkout_only
def test_the_sdist_holds_every_file_but_hidden_ones(built: tuple[Path, Path]) -> None:
    tracked = output("git", "ls-files").splitlines()
    shown = {path for path in tracked if not path.startswith(".")}
    assert {"LICENSE", "docs/index.md", "natgrad_jax/py.typed"} <= shown
    assert shown - in_sdist(built[0]) == set()


def test_the_wheel_holds_the_library_its_types_and_its_licence(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
        licence = f"natgrad_jax-{ng.__version__}.dist-info/licenses/LICENSE"
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    library = {name for name in names if ".dist-info/" not in name}
    assert library == {path for path in in_sdist(sdist) if path.startswith("natgrad_jax/")}
    assert "natgrad_jax/py.typed" in library


def add_needed(line: str, extra: str, found: set[tuple[str, str]]) -> None:
    """Adds the distribution and extras that a line of requirements asks for, and what they need."""
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
        return
    for chosen in {"", *requirement.extras}:
        if (requirement.name, chosen) not in found:
            found.add((requirement.name, chosen))
            for needed in metadata.requires(requirement.name) or []:
                add_needed(needed, chosen, found)


def environment(folder: Path, requirements: Iterable[str]) -> Path:
    """The Python of a new environment that has the requirements alone, as links to those here.

    To install them once more takes more than a minute and a package index.
    """
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    found: set[tuple[str, str]] = set()
    for line in requirements:
        add_needed(line, "", found)
    for name in {name for name, _ in found}:
        installed = metadata.distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():  # several distributions may share a folder
                (site / top).symlink_to(Path(str(installed.locate_file(top))))
    return folder / "bin/python"


REPORT = """
import importlib.util
assert importlib.util.find_spec("pytest") is None  # the environment has what is required alone
assert loss < 0.1
print("trained by", ng.__version__, "of", ng.__file__)
"""


def test_the_readmes_example_trains_from_the_wheel(
    built: tuple[Path, Path], tmp_path: Path
) -> None:
    """In an environment of what the wheel requires, and scikit-learn for the example's digits."""
    _, wheel = built
    python = environment(tmp_path / "venv", [*PROJECT["dependencies"], "scikit-learn"])
    pip = (sys.executable, "-m", "pip", "--python", python)
    output(*pip, "install", "-q", "--no-index", wheel)  # pip compares the requirements
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example + REPORT)
    printed = output(python, "-I", "-W", "error", tmp_path / "example.py", cwd=tmp_path)
    assert f"trained by {ng.__version__} of {tmp_path / 'venv'}" in printed


def test_versions_are_told_alike() -> None:
    """The oldest supported ones by pyproject, README and the site; releases by two files."""
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    (jax,) = (d.removeprefix("jax>=") for d in PROJECT["dependencies"] if d.startswith("jax>="))
    assert PROJECT["requires-python"] == f">={supported[0]}"
    for page in ("README.md", "docs/installation.md"):
        told = f"Python {supported[0]} or later, jax {jax} or later"
        assert told in (ROOT / page).read_text()
    released = re.findall(
        r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert f"\nversion: {released[0]}\n" in (ROOT / "CITATION.cff").read_text()
    assert ng.__version__ == released[0] or ng.__version__.endswith(".dev0")


@checkout_only
def test_ci_runs_on_the_oldest_and_the_newest_python() -> None:
    supported = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r"^ +(3\.\d+)$", workflow, re.M) == [supported[-1], supported[0]]
