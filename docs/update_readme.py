"""Write the README's map of files from the first lines of their docstrings: `make readme`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "| `compress_classifier.py` |", "| `schedules/` |"


def file_map() -> str:
    """One row a file of the library, in the order of the alphabet, files of the root first."""
    folders = [ROOT / "command_line", ROOT / "distiller"]
    paths = sorted(
        (path for folder in folders for path in folder.rglob("*.py")),
        key=lambda path: (len(path.parts), path),
    )
    rows = []
    for path in paths:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(docstring.split("\n\n")[0].split()).rstrip(".")
        rows.append(f"| `{path.relative_to(ROOT)}` | {first} |")
    return "\n".join(rows)


def updated(readme: str) -> str:
    """The README with its map as the files are now."""
    pattern = re.compile(rf"({re.escape(BEGIN)}[^\n]*\n).*?(?={re.escape(END)})", re.DOTALL)
    return pattern.sub(lambda match: f"{match.group(1)}{file_map()}\n", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
