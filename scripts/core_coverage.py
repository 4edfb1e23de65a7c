"""Fail unless the core layers are covered to the last branch.

Usage: python scripts/core_coverage.py out/coverage.json
"""

import json
import sys

CORE = (
    "rpcnb/errors.py",
    "rpcnb/values.py",
    "rpcnb/events.py",
    "rpcnb/parts.py",
    "rpcnb/protocol/",
    "rpcnb/runtime/",
    "rpcnb/cells/",
    "rpcnb/farm/messages.py",
    "rpcnb/farm/pairing.py",
    "rpcnb/farm/tracking.py",
)


def main() -> int:
    """Print what is not covered; return the exit code."""
    with open(sys.argv[1]) as file:
        files = json.load(file)["files"]
    bad = 0
    for path, found in sorted(files.items()):
        name = path.replace("\\", "/")
        if not name.startswith(CORE):
            continue
        lines, branches = found["missing_lines"], found.get("missing_branches", [])
        if lines or branches:
            bad += 1
            print(f"{name}: lines {lines}, branches {branches}")
    print(f"core layers: {bad} files with gaps" if bad else "core layers: all branches covered")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
