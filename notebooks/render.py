"""Runs the notebook and writes it, with its outputs, as one HTML page: docs/fastmnist_colab.html.

    pip install '.[notebook]' && python notebooks/render.py [--output FILE]

It takes what FAST in its second cell asks for: some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).parent
NOTEBOOK = HERE / "fastmnist_colab.ipynb"


def execute(notebook: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """The notebook with its outputs, run from top to bottom in a folder that is gone afterwards."""
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(content, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "fastmnist_colab.html")
    options = parser.parse_args()
    exporter = HTMLExporter(embed_images=True)
    page, _ = exporter.from_notebook_node(execute())
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(page)
    print(f"{options.output}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
