"""The Triton kernels in Triton's interpreter, on the CPU, against the numpy reference.

The interpreter computes float16 products in float32, as tensor cores do; its bfloat16 arithmetic is wrong, so bfloat16 is multiplied
in float32 (UPCAST).
"""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
from attention_problem import Problem as BaseProblem
from attention_problem import spec
from fake_cuda import FakeCuda, write_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from headfold.plugins.attention import kernel_contract as contract
from headfold.plugins.attention import triton_kernels  # imported to interpret, in tests/conftest.py
from headfold.plugins.attention.cuda_launch import Kernels
from headfold.plugins.attention.schema import Attributes
from headfold.runtime.device import Device

triton.knobs.runtime.interpret = True  # for what it imports later

KERNELS = {
    "append": triton_kernels.append,
    "prefill": triton_kernels.attention,
    "decode": triton_kernels.attention,
    "reduce": triton_kernels.reduce,
}


class Problem(BaseProblem):
    """A call of the op that the interpreter runs."""

    def run(self, poison: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Launch the kernels as the launcher does: by the contract's parameters, grids and constants."""
        s, a, batch = self.spec, self.attributes, len(self.past)
        tensors = self.tensors(poison)
        rows = batch * self.new * s.num_heads
        splits = contract.splits(s, batch, self.capacity)
        output = torch.full((batch, self.new, s.num_heads * s.head_dim), float("nan"), dtype=tensors["query"].dtype)
        partial = torch.full((rows, splits, s.head_dim), float("nan"))
        values = tensors | {
            "present_key": tensors["past_key"],
            "present_value": tensors["past_value"],
            "new_tokens": self.new,
            "capacity": self.capacity,
            "window": a.local_window_size,
            "scale": a.scale,
            "epsilon": a.qk_norm_epsilon,
            "lse": torch.full((rows, splits), float("nan")),
            "partial": partial,
            "splits": splits,
        }
        split = contract.decodes(s, self.new)
        for kernel in ("append", "decode", "reduce") if split else ("append", "prefill"):
            values["output"] = partial if kernel == "decode" else output
            arguments = [values.get(name, 0) for name, _ in contract.PARAMETERS[kernel]]
            sizes = contract.tiles(s, kernel)
            grid = contract.grid(s, contract.GRIDS[kernel], sizes.rows, batch, self.new, self.capacity)
            constants = contract.constants(s, kernel) | {"UPCAST": s.dtype == "bfloat16"}
            KERNELS[kernel][grid](*arguments, **constants)
        return tuple(
            x.numpy() if x.dtype == torch.int8 else x.float().numpy()
            for x in (output, tensors["past_key"], tensors["past_value"])
        )

    def check(self) -> None:
        self.compare(self.run())


DTYPES = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*i8": torch.int8,
    "*i64": torch.int64,
}


class InterpretingCuda(FakeCuda):
    """The fake driver, whose kernels do run: in the interpreter, on the fake's memory, with the arguments it was passed."""

    def _do(self, work):
        if self.launches and not self.capturing and work.__qualname__.startswith("FakeCuda.cuLaunchKernel"):
            self.interpret(self.launches[-1])
        return super()._do(work)

    def interpret(self, launch) -> None:
        spec, arguments = self.manifest.spec, []
        for parameter in contract.parameters(spec, launch.kernel):
            value = launch.arguments[parameter.name]
            if parameter.type in DTYPES and value:
                begin = max(start for start in self.allocations if start <= value)
                memory = memoryview(self.contents[begin])[value - begin :]
                value = torch.frombuffer(memory, dtype=DTYPES[parameter.type])
            arguments.append(value)
        constants = contract.constants(spec, launch.kernel) | {"UPCAST": spec.dtype == "bfloat16"}
        KERNELS[launch.kernel][launch.grid](*arguments, **constants)


@pytest.mark.parametrize("new", [1, 9])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"cache_dtype": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_the_launcher_gives_the_kernels_what_they_take(options, new, tmp_path) -> None:
    """Past the contract: through the launcher, its workspace and a driver's memory, to the reference's numbers."""
    s = spec((8, 2), 32, **{"dtype": "float16"} | options)
    manifest = write_kernels(tmp_path, s, capabilities=(86,))
    cuda = InterpretingCuda(manifest, batch=3)
    problem = BaseProblem(s, [70, 0, 13], new, 96, window=50)
    problem.compare(problem.launch(Device(cuda), Kernels(tmp_path, 86, cuda)))
    assert [launch.kernel for launch in cuda.launches] == (
        ["append", "decode", "reduce"] if new == 1 else ["append", "prefill"]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, dtype: str) -> None:
    s = spec((3, 1), head_dim, dtype)
    Problem(s, past=[3, 17], new=1, capacity=24).check()
    Problem(s, past=[0, 5], new=19, capacity=24).check()


@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 1), (8, 2), (8, 1), (32, 1)], ids=lambda heads: f"{heads[0]}q{heads[1]}kv"
)
def test_group_sizes(heads: tuple[int, int]) -> None:
    Problem(spec(heads, 16), past=[30, 2], new=1, capacity=40).check()
    Problem(spec(heads, 16), past=[30, 0], new=5, capacity=40).check()


SIDE = contract.tiles(spec((2, 1), 16), "prefill").keys


@pytest.mark.parametrize("window", [-1, 1, SIDE])
@pytest.mark.parametrize("length", [1, 2, SIDE - 1, SIDE, SIDE + 1, 2 * SIDE + 1])
def test_lengths_around_the_tiles_edges(length: int, window: int) -> None:
    s = spec((2, 1), 16)
    capacity = length + 2
    Problem(s, past=[length - 1, 0], new=1, capacity=capacity, window=window).check()  # decode
    Problem(s, past=[0], new=length, capacity=capacity, window=window).check()  # a prompt
    if length > SIDE:
        Problem(s, past=[length - 20, 3], new=20, capacity=capacity, window=window).check()  # a later chunk


@pytest.mark.parametrize("new", [1, 12])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"qk_norm": True},
        {"rotary_interleaved": True},
        {"rotary_dim": 16},
        {"rotary_dim": 16, "rotary_interleaved": True, "qk_norm": True, "softcap": 2.0},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(options: dict, new: int) -> None:
    Problem(spec((4, 2), 32, **options), past=[9, 0], new=new, capacity=24, window=6).check()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("new", [1, 9])
def test_int8_cache(new: int, dtype: str) -> None:
    Problem(spec((6, 2), 32, dtype, cache_dtype="int8"), past=[0, 21, 5], new=new, capacity=40).check()


@pytest.mark.parametrize("new", [1, 9])
def test_float8_cache(new: int) -> None:
    """The interpreter loses the carry into the exponent when it rounds to float8, so new keys and values need no rounding here."""
    problem = Problem(spec((6, 2), 32, "float16", cache_dtype="float8_e4m3fn"), past=[0, 21, 5], new=new, capacity=40)
    feeds = problem.feeds
    feeds["cos_cache"][:], feeds["sin_cache"][:] = 1, 0
    feeds["key_scale"][:], feeds["value_scale"][:] = (0.5, 2), (4, 1)
    for name in ("key", "value"):
        exact = feeds[name].reshape(3, new, 2, 32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        feeds[name] = (exact * feeds[f"{name}_scale"][:, None]).reshape(feeds[name].shape)
    problem.check()


def test_int8_cache_holds_what_is_over_its_range() -> None:
    problem = Problem(spec((2, 1), 16, cache_dtype="int8"), past=[3], new=1, capacity=8)
    problem.feeds["value"][:] = 1e4
    problem.feeds["value"][..., 0] = -1e4
    assert problem.run()[2][0, 0, 3].tolist() == [-128] + [127] * 15


def test_many_splits_of_which_most_are_empty() -> None:
    s = spec((2, 1), 16)
    assert contract.splits(s, 1, 64 * 40) == 32
    Problem(s, past=[70], new=1, capacity=64 * 40).check()


def test_what_does_not_fit_the_capacity_is_not_written() -> None:
    """A row without room must not write into the next row's cache."""
    problem = Problem(spec((2, 1), 16), past=[8, 2], new=1, capacity=8)
    output, key, _ = problem.run(poison=False)
    assert np.isfinite(output).all()
    before = problem.feeds["past_key"]
    assert (key[0] == before[0]).all()
    assert [n for n in range(8) if (key[1, 0, n] != before[1, 0, n]).any()] == [2]


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    head_dim = draw(st.sampled_from([16, 32, 48]))
    kv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 5]))
    dtype = draw(st.sampled_from(["float32", "float16"]))
    past = draw(st.lists(st.integers(0, 75), min_size=1, max_size=3))
    new = draw(st.integers(1, 24))
    s = spec(
        (kv * group, kv),
        head_dim,
        dtype,
        rotary_dim=draw(st.sampled_from([2, 8, head_dim])),
        rotary_interleaved=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        cache_dtype=draw(st.sampled_from([dtype, "int8"])),
    )
    capacity = max(past) + new + draw(st.integers(0, 9))
    window = draw(st.sampled_from([-1, 1, 5, 40]))
    Problem(s, past, new, capacity, window, seed=draw(st.integers(0, 9))).check()


@pytest.mark.parametrize("plant", ["window off by one", "softcap dropped", "wrong RoPE pairs", "upper-left mask"])
def test_the_comparison_would_notice(plant: str) -> None:
    """The same problem, run with one thing wrong, is far off."""
    s = spec((4, 2), 32, softcap=2.0, rotary_interleaved=True)
    problem = Problem(s, past=[9, 0], new=5, capacity=16, window=4)
    expected = problem.reference()[0]
    match plant:
        case "window off by one":
            problem.attributes = Attributes(4, 2, 32**-0.5, 5, 2.0, 1, 1e-3)
        case "softcap dropped":
            problem.spec = s.model_copy(update={"softcap": 0.0})
        case "wrong RoPE pairs":
            problem.spec = s.model_copy(update={"rotary_interleaved": False})
        case "upper-left mask":
            problem.past = [0, 0]
            problem.feeds["past_lengths"] = np.zeros(2, np.int64)
    assert np.abs(problem.run()[0] - expected).max() > 0.05
