"""A process that compiles kernels: a job per line of standard input, its answer per line of standard output, both JSON.

A process of its own, because Triton reads its settings from the environment when it is imported, and a crash of its compiler must not
take ours along. Used by `kernels.py` only.
"""

import base64
import json
import sys
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Compile one kernel; what goes wrong is an answer too."""
    from headfold.export.engine.kernels import check_signature
    from headfold.plugins.attention.kernel_contract import KernelSpec, parameters
    from headfold.plugins.attention.triton_kernels import compile_kernel

    spec, kernel = KernelSpec.model_validate(job["spec"]), job["kernel"]
    try:
        compiled = compile_kernel(spec, kernel, job["capability"])
        check_signature(compiled.ptx, compiled.entry, parameters(spec, kernel))
    except Exception as error:  # of Triton, of ptxas, or of ours: whoever gave the job tells the user
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[-400:]}
    facts = {key: value for key, value in vars(compiled).items() if key not in ("cubin", "ptx")}
    return {"cubin": base64.b64encode(compiled.cubin).decode(), "facts": facts}


def main() -> None:
    """Answer until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
