"""The README's example is what a newcomer copies: it must run as it stands."""

import re
import warnings
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def test_the_example_of_the_readme_trains() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model of the example is wholly covered
        exec(compile(code, str(README), "exec"), scope)
    assert float(scope["loss"]) < 0.1
    assert scope["layers"].uncovered == ()
