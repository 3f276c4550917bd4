"""The examples of the documentation run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "page", ["attention.md", "checkpoints.md", "evaluation.md", "plan.md", "training/merge.md"]
)
def test_python_examples(page: str) -> None:
    """All in one, top to bottom: later ones use the names of earlier ones."""
    examples = re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
