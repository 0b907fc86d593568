"""The API as `accept` measures it.

`python -m tests.bench.api_server PORT LANES BATCH_MAX` serves it with POST /noop.
"""

from __future__ import annotations

import os
import sys

from app.api.application import create_app
from app.web.frame import AsgiApplication
from app.web.serving import serve

SHAPE = "BENCH_LANES_AND_BATCH"


def benchmark_app() -> AsgiApplication:
    """The product's application, its lanes as they were asked for."""
    lanes, batch_max = os.environ[SHAPE].split()
    return create_app(connections=int(lanes), batch_max=int(batch_max), benchmark=True)


if __name__ == "__main__":
    os.environ[SHAPE] = f"{sys.argv[2]} {sys.argv[3]}"
    serve("tests.bench.api_server:benchmark_app", host="127.0.0.1", port=int(sys.argv[1]))
