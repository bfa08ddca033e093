"""Turns each script in ``examples/`` into a notebook in ``docs/notebooks/``.

So a script, its notebook and its page are one source. Cells start with ``# %%``, and
those of text with ``# %% [markdown]``.
"""

import pathlib

import jupytext
from sphinx.application import Sphinx

DOCS = pathlib.Path(__file__).parents[1]


def _write_notebooks(app: Sphinx) -> None:
    folder = DOCS / "notebooks"
    folder.mkdir(exist_ok=True)
    for script in sorted((DOCS.parent / "examples").glob("*.py")):
        notebook = jupytext.read(script, fmt="py:percent")
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # Random otherwise, and so never cached.
        text = jupytext.writes(notebook, fmt="ipynb")
        path = folder / f"{script.stem}.ipynb"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", _write_notebooks)
    return {"parallel_read_safe": True}
