"""One client: ``python -m benchmarks.client_process KIND PORT``; reads cases as JSON lines, answers so."""

from __future__ import annotations

import json
import sys

from benchmarks.awaited_client import Awaited, AwaitedOnUvloop
from benchmarks.clients import Stock
from benchmarks.many_client import Many
from benchmarks.our_clients import Ours, OverWeb, ThroughProxy
from benchmarks.raw_client import Raw

KINDS = {
    "raw": Raw,
    "stock": Stock,
    "ours": Ours,
    "awaited": Awaited,
    "uvloop": AwaitedOnUvloop,
    "many": Many,
    "web": OverWeb,
    "proxy": ThroughProxy,
}


def main() -> None:
    """Serve cases until end of input."""
    client = KINDS[sys.argv[1]](int(sys.argv[2]))
    for line in sys.stdin:
        case, *args = json.loads(line)
        print(json.dumps(getattr(client, case)(*args)), flush=True)


if __name__ == "__main__":
    main()
