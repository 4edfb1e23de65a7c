"""Run a notebook headless and print its cells with their text results.

Usage: python scripts/execute.py NOTEBOOK
"""

import sys

import nbformat
from nbclient import NotebookClient


def main() -> int:
    """Run it; return the exit code."""
    notebook = nbformat.read(sys.argv[1], as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=False).execute()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            print(f"\n{cell.source}\n")
            continue
        print("\n".join(f">>> {line}" for line in cell.source.splitlines()))
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            print(text.rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
