"""The GPUs that headfold knows, by compute capability (86 for 8.6): the one list of them. Plain data."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """What one compute capability has."""

    shared_kib: int  # the most shared memory of a block (CUDA programming guide, technical specifications per compute capability)
    rtx: bool  # whether TensorRT-RTX 1.7 builds for it; full TensorRT builds for the GPU it runs on


GPUS = {  # in the order of the bits in an engine file's header
    75: Gpu(64, rtx=True),
    80: Gpu(163, rtx=True),
    86: Gpu(99, rtx=True),
    87: Gpu(163, rtx=False),
    89: Gpu(99, rtx=True),
    90: Gpu(227, rtx=False),
    100: Gpu(227, rtx=False),
    120: Gpu(99, rtx=True),
    121: Gpu(99, rtx=True),
}
RTX_CAPABILITIES = tuple(capability for capability, gpu in GPUS.items() if gpu.rtx)
BFLOAT16_SINCE = 80  # Turing has no bfloat16 arithmetic
RTX_FLOAT32_SINCE = RTX_INT4_SINCE = 80  # TensorRT-RTX 1.7 has no products of these for Turing
FLOAT8_SINCE = 89  # Ada is the first that converts from and to e4m3fn
FLOAT4_SINCE = 100  # Blackwell is the first with e2m1
