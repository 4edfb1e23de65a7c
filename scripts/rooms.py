"""The rooms of the package and who imports whom, read off the code: ``python scripts/rooms.py``.

Prints the picture that stands in ``docs/architecture.md``; with ``--write`` puts it there, with ``--circles`` prints
files that import each other instead. Imports for type checking and inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rpcnb"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->\n"

# Each room imports only what stands before it.
ORDER = (
    "errors",
    "values",
    "events",
    "parts",
    "protocol",
    "transport",
    "runtime",
    "cells",
    "link",
    "client",
    "server",
    "farm",
    "command",
    "jupyter",
)


def module_of(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = ["rpcnb", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Return the package's modules and their files."""
    return {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """Return the room of ``rpcnb.protocol.codes``: ``protocol``; empty for the package itself."""
    return ([*module.split("."), ""])[1]


def imports(path: Path) -> Iterator[str]:
    """Yield the package's modules that a file imports anywhere."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "rpcnb")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rpcnb":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def graph() -> dict[str, set[str]]:
    """Return which modules each module imports."""
    return {module: set(imports(path)) - {module} for module, path in modules().items()}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            group = stack[place:]
            del stack[place:]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def room_arrows(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return which rooms each room imports."""
    found: dict[str, set[str]] = {room: set() for room in ORDER}
    for module, others in arrows.items():
        room = room_of(module)
        if room in found:
            found[room] |= {room_of(other) for other in others} & set(ORDER) - {room}
    return found


def picture() -> str:
    """Return the picture: every room, and an arrow to each room that it imports and does not reach by another."""
    rooms = room_arrows(graph())
    reach: dict[str, set[str]] = {}
    for room in ORDER:  # each imports earlier ones only
        reach[room] = rooms[room] | {far for near in rooms[room] for far in reach.get(near, ())}
    lines = ["```mermaid", "flowchart BT"]
    for room in ORDER:
        near = {other for other in rooms[room] if not any(other in reach[third] for third in rooms[room] - {other})}
        lines += [f"    {room} --> {other}" for other in sorted(near, key=ORDER.index)] or [f"    {room}"]
    lines += ["```", "", "| room | imports |", "|---|---|"]
    for room in ORDER:
        names = ", ".join(f"`{other}`" for other in sorted(rooms[room], key=ORDER.index))
        lines.append(f"| `{room}` | {names or 'nothing'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print or write the picture."""
    if "--circles" in sys.argv:
        arrows = graph()
        for group in circles(arrows):
            print(f"{len(group)} files import each other:")
            for module in group:
                print(f"  {module} -> {', '.join(sorted(arrows[module] & set(group)))}")
        return
    if "--write" in sys.argv:
        text = PAGE.read_text()
        before, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{picture()}{END}{rest.partition(END)[2]}")
        return
    print(picture(), end="")


if __name__ == "__main__":
    main()
