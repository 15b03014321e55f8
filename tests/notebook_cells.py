"""Runs the code of a notebook, cell by cell, in the working folder: `python -W error notebook_cells.py FILE.ipynb`.

A Jupyter would need packages that the tests do without. What a cell ends with is drawn, as Jupyter would.
"""

import ast
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any


class Shown:
    """Stands for IPython.display's Image, of which the notebooks use a file's name alone."""

    def __init__(self, filename: Path | str, **_: Any) -> None:
        assert Path(filename).stat().st_size > 0


def sources(path: Path) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


def run(path: Path) -> dict[str, Any]:
    """What the cells have left behind."""
    display, whole = types.ModuleType("IPython.display"), types.ModuleType("IPython")
    # Which Matplotlib asks.
    whole.version_info, whole.get_ipython = (9, 0), lambda: None  # type: ignore[attr-defined]
    display.Image = Shown  # type: ignore[attr-defined]
    sys.modules |= {"IPython": whole, "IPython.display": display}
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources(path)):
        tree, last = ast.parse(source), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)  # type: ignore[attr-defined]
        exec(compile(tree, f"{path.name}, code cell {number}", "exec"), space)
        shown = eval(compile(last, f"{path.name}, code cell {number}", "eval"), space) if last else None
        if hasattr(shown, "_repr_png_"):
            assert shown._repr_png_().startswith(b"\x89PNG")
    return space


if __name__ == "__main__":
    # As in Jupyter. What a shell starts in the background ignores Ctrl-C, and so do its tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(Path(sys.argv[1]))
