"""Runs the notebook and writes it, with its outputs, as one HTML page that asks nobody: docs/fastmnist_colab.html.

    pip install '.[notebook]' && python notebooks/render.py [--output FILE]

It takes what FAST in its second cell asks for: some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

HERE = Path(__file__).parent
NOTEBOOK = HERE / "fastmnist_colab.ipynb"
# The usual page, without the scripts for formulas and diagrams, of which there are none.
TEMPLATE = """{%- extends 'index.html.j2' -%}
{%- block html_head_js_requirejs -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
BADGE = re.compile(r"\[!\[(.+?)\]\(.+?\)\]\((.+?)\)")
SERVED = "This output is a page to draw on, alive while the notebook runs; fastmnist demo shows the same."


def execute(notebook: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """The notebook with its outputs, run from top to bottom in a folder that is gone afterwards."""
    content = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(content, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    return content


def render(content: nbformat.NotebookNode) -> str:
    """The page: pictures are in it, the badge is a link, and what a server showed says that it did."""
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(r"[\1](\2)", cell.source)
            continue
        for at, output in enumerate(cell.outputs):
            if "http://127.0.0.1" in str(output.get("data", {}).get("text/html", "")):
                cell.outputs[at] = nbformat.v4.new_output("stream", text=SERVED)
    exporter = HTMLExporter(embed_images=True, raw_template=TEMPLATE)
    page, _ = exporter.from_notebook_node(content, {"metadata": {"name": NOTEBOOK.stem}})
    return str(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "fastmnist_colab.html")
    options = parser.parse_args()
    page = render(execute())
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(page)
    print(f"{options.output}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
