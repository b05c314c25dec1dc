"""Run the notebooks of docs/notebooks again and keep what their cells show: python tools/notebooks.py [FILE ...]."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def executed(file: Path) -> Any:
    """The notebook with the outputs of today's code, run from its first cell in a kernel and a folder of its own."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            **QUIET,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False)
        client.resources = {"metadata": {"path": folder}}
        client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        if cell.cell_type == "code":
            # What goes to stderr (progress, logs, warnings of libraries) is of one machine and run.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main(files: list[str]) -> None:
    import nbformat

    for file in [Path(f).resolve() for f in files] or NOTEBOOKS:
        nbformat.write(executed(file), file)
        print(f"{file.name}: run, outputs kept")


if __name__ == "__main__":
    main(sys.argv[1:])
