"""Runs notebooks from top to bottom and stores what their cells print and show, each in a folder that is thrown away.

    pip install nbclient ipykernel
    python experiments/notebooks/execute.py your_own_data colab export_and_compare

With DILFORMER_NOTEBOOKS=tiny in the environment they run in the small form of the tests, of which nothing is stored.
"""

import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat  # type: ignore[import-not-found]
from nbclient import NotebookClient  # type: ignore[import-not-found]
from PIL import Image  # comes with Matplotlib

FOLDER = Path(__file__).resolve().parent
WIDTH = 1000  # pixels of a stored picture, of 128 colours
# XLA's, on a machine that is busy with something else.
SLOW = re.compile(r"^E\d{4} .*slow_operation_alarm.*\n\s*\*+\n.*\n\*+\n+", re.MULTILINE)


def execute(path: Path) -> None:
    """Runs a notebook and, unless it is in its tiny form, stores its outputs in it."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": place}},
        )
        client.execute()
    if os.environ.get("DILFORMER_NOTEBOOKS") != "tiny":
        store(notebook, path, place)


def store(notebook: Any, path: Path, place: str = "") -> None:
    """Writes a notebook whose outputs are text and small pictures, and tell of no folder of this machine."""
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        outputs: list[Any] = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = smaller(data["image/png"])
                data["text/plain"] = data["text/plain"][:100]  # a result tells its volumes, which nobody reads
            elif "text/html" in data and output.output_type == "display_data":
                # A line of the progress, which rich prints as HTML.
                output = nbformat.v4.new_output("stream", name="stdout", text=data["text/plain"])
            if "text" in output:
                output.text = SLOW.sub("", output.text)
                last = outputs[-1] if outputs else {}
                if last.get("name") == output.name:
                    last.text += output.text
                    continue
                if not output.text:
                    continue
            outputs.append(output)
        if "outputs" in cell:
            cell.outputs = outputs
    text = nbformat.writes(notebook)
    for folder, name in ((place, "."), (str(FOLDER.parents[1]), "dilformer_jax"), (str(Path.home()), "~")):
        text = text.replace(folder, name) if folder else text
    path.write_text(text + "\n", encoding="utf-8")


def smaller(png: str) -> str:
    """A PNG in base64, on white, as wide as a page and of few colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    page.thumbnail((WIDTH, 10 * WIDTH))
    buffer = io.BytesIO()
    page.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        start = time.monotonic()
        execute(FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - start:.0f} s")
