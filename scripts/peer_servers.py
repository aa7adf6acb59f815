"""Other engines' servers, which `bench_serve --peers` starts: llama.cpp's own, as the package xllamacpp brings it in a wheel.

The others have none to measure. onnxruntime-genai's package is a library: its `Engine` batches requests, and nothing answers HTTP
(microsoft/onnxruntime-genai#313 asks for it). Nor does OpenVINO GenAI's; OpenVINO Model Server is no Python package. llama-cpp-python
is on PyPI as source only, and its server answers one after the other.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_peers import PEERS

ABSENT = {
    "onnxruntime-genai": "its package is a library, without a server",
    "OpenVINO GenAI": "its package is a library, without a server; OpenVINO Model Server is not on PyPI",
    "llama-cpp-python": "is on PyPI as source only; llama.cpp's own server is measured",
}
CONTEXT = 4096  # tokens of each slot
_KEEP = 1024  # MiB of prompts that are kept, as headfold's default


@contextmanager
def llama_cpp(gguf: Path, threads: str, slots: int) -> Iterator[str]:
    """The address of one that answers with this file, until the end."""
    command = [PEERS, __file__, gguf, threads, str(slots)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if re.fullmatch(r"http://\S+\n", line) is None:
                raise SystemExit(f"llama.cpp's server did not start; see: {' '.join(map(str, command))}")
            yield line.strip()
        finally:
            process.kill()


def main(gguf: str, threads: int, slots: int) -> None:
    """In the peers' environment: serve, and tell the address, until nobody listens any more."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_parallel, parameters.n_ctx = gguf, slots, slots * CONTEXT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.cache_ram_mib = _KEEP
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
