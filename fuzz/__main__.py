"""``python -m fuzz TARGET``: see ``fuzz/README.md``."""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from fuzz import TARGETS
from fuzz.mutator import mutations

__all__ = ["corpus_of", "main", "run_seeded"]

_HERE = Path(__file__).parent
_OUT = Path("out/fuzz")


def corpus_of(target: str) -> list[bytes]:
    """Return the committed inputs of a target."""
    return [path.read_bytes() for path in sorted((_HERE / "corpus" / target).iterdir())]


def run_seeded(target: str, seed: int, more: Callable[[int], bool]) -> int:
    """Run mutated inputs while ``more(how many there were)``; what broke a promise is kept, and raised.

    Returns:
        How many inputs there were.
    """
    one_input: Callable[[bytes], None] = importlib.import_module(f"fuzz.{target}").one_input
    inputs = mutations(corpus_of(target), seed)
    for count in itertools.count():
        if not more(count):
            return count
        data = next(inputs)
        try:
            one_input(data)
        except BaseException:
            _OUT.mkdir(parents=True, exist_ok=True)
            (_OUT / f"{target}.finding").write_bytes(data)
            raise
    raise AssertionError("count ends")


def _run_atheris(target: str, seconds: float, seed: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["rpcnb"]):
        module = importlib.import_module(f"fuzz.{target}")
    found = _OUT / target
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds:g}", f"-seed={seed}", "-timeout=20", "-rss_limit_mb=1024", "-max_len=8192"]
    prefix = f"-artifact_prefix={_OUT}/{target}-"
    corpora = [str(found), str(_HERE / "corpus" / target)]
    atheris.Setup([sys.argv[0], *options, prefix, "-print_final_stats=1", *corpora], module.one_input)
    atheris.Fuzz()


def main() -> None:
    """Fuzz one target, or try one input."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs the package atheris")
    parser.add_argument("--memory", action="store_true", help="with --atheris: look at memory too, at half the speed")
    parser.add_argument("--input", type=Path, help="try this file alone")
    options = parser.parse_args()
    logging.disable()  # what is refused is logged, a thousand times a second
    if options.memory or not options.atheris:
        tracemalloc.start()
    if options.input is not None:
        importlib.import_module(f"fuzz.{options.target}").one_input(options.input.read_bytes())
        print("no promise is broken")
        return
    if options.atheris:
        _run_atheris(options.target, options.seconds, options.seed)
        return
    start = time.monotonic()
    count = run_seeded(options.target, options.seed, lambda _: time.monotonic() - start < options.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = time.monotonic() - start
    print(f"{options.target}: {count} inputs in {spent:.0f} s, {count / spent:.0f}/s, peak {peak:.0f} MiB, no finding")


if __name__ == "__main__":
    main()
