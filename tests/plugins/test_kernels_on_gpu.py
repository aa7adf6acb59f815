"""The compiled kernels on a GPU, through the launcher, against the numpy reference. Skipped where there is none."""

from pathlib import Path

import pytest
from attention_problem import Problem, spec

from headfold.export.engine.kernels import compile_spec
from headfold.plugins.attention.cuda_launch import Kernels
from headfold.plugins.attention.kernel_contract import KernelSpec
from headfold.plugins.gpus import FLOAT8_SINCE, GPUS
from headfold.runtime.device import Device
from headfold.runtime.errors import ProviderError

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Device:
    try:
        device = Device()
    except ProviderError as error:
        pytest.skip(f"no GPU: {error.what}")
    if device.capability not in GPUS:
        pytest.skip(f"there are no kernels for compute capability {device.capability}")
    return device


def check(gpu: Device, tmp_path: Path, s: KernelSpec, past: list[int], new: int, capacity: int, **options) -> None:
    compile_spec(s, (gpu.capability,), tmp_path)
    problem = Problem(s, past, new, capacity, **options)
    problem.compare(problem.launch(gpu, Kernels(tmp_path, driver=gpu.driver)))


@pytest.mark.parametrize("new", [1, 200], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim, dtype, new, gpu, tmp_path) -> None:
    check(gpu, tmp_path, spec((6, 2), head_dim, dtype), [0, 131, 40], new, 512)


@pytest.mark.parametrize("new", [1, 70])
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 2), (32, 8), (32, 1)])
def test_group_sizes(heads, new, gpu, tmp_path) -> None:
    check(gpu, tmp_path, spec(heads, 64, "float16"), [300, 2], new, 512)


@pytest.mark.parametrize("new", [1, 65])
@pytest.mark.parametrize("window", [-1, 1, 64, 100])
def test_windows(window, new, gpu, tmp_path) -> None:
    check(gpu, tmp_path, spec((4, 2), 64, "float16"), [63, 64, 129], new, 256, window=window)


@pytest.mark.parametrize("new", [1, 40])
def test_options(new, gpu, tmp_path) -> None:
    options = {"rotary_dim": 32, "rotary_interleaved": True, "qk_norm": True, "softcap": 2.0}
    check(gpu, tmp_path, spec((4, 2), 64, "float16", **options), [90, 0], new, 256, window=60)


@pytest.mark.parametrize("new", [1, 40])
def test_int8_cache(new, gpu, tmp_path) -> None:
    check(gpu, tmp_path, spec((6, 2), 64, "float16", cache_dtype="int8"), [0, 121], new, 256)


@pytest.mark.parametrize("new", [1, 40])
def test_float8_cache(new, gpu, tmp_path) -> None:
    if gpu.capability < FLOAT8_SINCE:
        pytest.skip(f"compute capability {gpu.capability} has no float8_e4m3fn")
    check(gpu, tmp_path, spec((6, 2), 64, "float16", cache_dtype="float8_e4m3fn"), [0, 121], new, 256)


@pytest.mark.parametrize("new", [1, 40])
def test_captured_in_a_graph(new, gpu, tmp_path) -> None:
    problem = Problem(spec((6, 2), 64, "float16"), [30, 100], new, 256)
    compile_spec(problem.spec, (gpu.capability,), tmp_path)
    problem.compare(problem.launch(gpu, Kernels(tmp_path, driver=gpu.driver), captured=True))
