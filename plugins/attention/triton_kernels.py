"""The kernels of headfold::GroupedQueryAttention in Triton: append, prefill and decode (one source), reduce; and how they compile.

Parameters in order, grids and tiles are those of `headfold.plugins.attention.kernel_contract`. The same source runs in Triton's
interpreter on a CPU (TRITON_INTERPRET=1 before Triton is imported) and compiles for a GPU that is not there.
Triton is imported only here.

Names in capitals are compile-time constants: HKV and G heads, D head size, DP its power of two, R rotated dimensions.
Sources: online softmax, Milakov and Gimelshein 2018 section 3; tiling, FlashAttention-2 (Dao 2023) algorithm 1; splitting the keys,
Flash-Decoding (Dao et al. 2023). Scores are kept in base 2, where the exponential is one instruction.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headfold.plugins.attention.kernel_contract import KernelName, KernelSpec, constants, parameters, tiles

_LOG2E = tl.constexpr(1.4426950408889634)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: no bit is left for a fraction, so adding it rounds half to even


@triton.jit
def rotated(x, valid, position, cos, sin, weight, epsilon, D, DP, R, INTERLEAVED, NORM):  # type: ignore[no-untyped-def]
    """Heads at the pointers `x` [rows], normed and rotated to `position` [rows]: float32 [rows, DP], zeros where not valid.

    The other half of each pair is loaded a second time (from L1) rather than shuffled between threads.
    """
    d = tl.arange(0, DP)
    turns = d < R
    if INTERLEAVED:
        first = d % 2 == 0
        other = tl.where(first, d + 1, d - 1)
        pair = d // 2
    else:
        first = d < R // 2
        other = tl.where(first, d + R // 2, d - R // 2)
        pair = tl.where(first, d, d - R // 2)
    a = tl.load(x[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    b = tl.load(x[:, None] + other[None, :], mask=valid[:, None] & turns[None, :], other=0.0).to(tl.float32)
    if NORM:
        inverse = 1.0 / tl.sqrt(tl.sum(a * a, 1) / D + epsilon)  # [rows]
        a = a * inverse[:, None] * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        b = b * inverse[:, None] * tl.load(weight + other, mask=turns, other=0.0).to(tl.float32)[None, :]
    angle = position[:, None] * (R // 2) + pair[None, :]
    c = tl.load(cos + angle, mask=valid[:, None] & turns[None, :], other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=valid[:, None] & turns[None, :], other=0.0).to(tl.float32)
    return a * c + tl.where(first[None, :], -b, b) * s


@triton.jit
def stored(x, scale, QUANTIZED, INTEGER, KIND):  # type: ignore[no-untyped-def]
    """float32 values as the cache has them."""
    if QUANTIZED:
        x = x / scale
        if INTEGER:
            x = (tl.minimum(tl.maximum(x, -128.0), 127.0) + _ROUND) - _ROUND
        else:
            x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # the largest e4m3fn
    return x.to(KIND)


@triton.jit
def append(  # type: ignore[no-untyped-def]
    key, value, present_key, present_value, past_lengths, cos, sin, k_norm_weight, key_scale, value_scale,
    new_tokens, capacity, epsilon,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write ROWS new tokens of a head behind the ones its cache has. What does not fit the capacity is not written."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    position = tl.load(past_lengths + batch).to(tl.int32) + token
    valid = (token < new_tokens) & (position < capacity)
    d = tl.arange(0, DP)
    cells = valid[:, None] & (d < D)[None, :]
    source = ((batch * new_tokens + token) * HKV + head) * D  # [ROWS]
    target = ((batch * HKV + head) * capacity + position)[:, None] * D + d[None, :]  # [ROWS, DP]
    k_scale = 1.0
    v_scale = 1.0
    if QUANTIZED:
        k_scale = tl.load(key_scale + head)
        v_scale = tl.load(value_scale + head)
    k = rotated(key + source, valid, position, cos, sin, k_norm_weight, epsilon, D, DP, R, INTERLEAVED, NORM)
    v = tl.load(value + source[:, None] + d[None, :], mask=cells, other=0.0).to(tl.float32)
    kind: tl.constexpr = present_key.dtype.element_ty
    tl.store(present_key + target, stored(k, k_scale, QUANTIZED, INTEGER, kind), mask=cells)
    tl.store(present_value + target, stored(v, v_scale, QUANTIZED, INTEGER, kind), mask=cells)


@triton.jit
def attention(  # type: ignore[no-untyped-def]
    query, present_key, present_value, past_lengths, cos, sin, q_norm_weight, key_scale, value_scale, output, lse,
    new_tokens, capacity, window, scale, epsilon,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """ROWS pairs of a new token and a query head of one group, over the keys they see; with SPLIT over a share of these keys.

    UPCAST multiplies in float32, which the interpreter needs for bfloat16.
    """
    kind: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    block = 0
    if not SPLIT:
        block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tokens see most, so they start first
    pair = block * ROWS + tl.arange(0, ROWS)
    token = pair // G
    row = (batch * new_tokens + token) * (HKV * G) + kv_head * G + pair % G  # of [B*S*Hq, D]
    past = tl.load(past_lengths + batch).to(tl.int32)
    position = past + token
    valid = (token < new_tokens) & (position < capacity)
    d = tl.arange(0, DP)
    q = rotated(query + row * D, valid, position, cos, sin, q_norm_weight, epsilon, D, DP, R, INTERLEAVED, NORM)
    q = q.to(kind)
    v_scale = 1.0
    if QUANTIZED:  # the scales are the head's, so they come out of both sums
        scale = scale * tl.load(key_scale + kv_head)
        v_scale = tl.load(value_scale + kv_head)

    # The keys from the first one that the first token sees to the last token itself
    nearest = tl.minimum((block * ROWS + ROWS - 1) // G, new_tokens - 1)
    end = tl.minimum(past + nearest + 1, capacity)
    begin = 0
    if window > 0:
        begin = tl.maximum(past + block * ROWS // G + 1 - window, 0) // KEYS * KEYS
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(0)), KEYS) * KEYS
        begin = begin + tl.program_id(0) * share
        end = tl.minimum(begin + share, end)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    cache = (batch * HKV + kv_head) * capacity * D
    for start in range(begin, end, KEYS):
        n = start + tl.arange(0, KEYS)
        cells = cache + n[:, None] * D + d[None, :]  # [KEYS, DP]
        there = (n < end)[:, None] & (d < D)[None, :]
        k = tl.load(present_key + cells, mask=there, other=0.0).to(kind)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS]
        if SOFTCAP > 0:
            x = tl.exp2(scores * (scale * (2 * _LOG2E / SOFTCAP)))
            scores = (1.0 - 2.0 / (1.0 + x)) * (SOFTCAP * _LOG2E)  # tanh
        else:
            scores = scores * (scale * _LOG2E)
        distance = position[:, None] - n[None, :]
        sees = (distance >= 0) & ((distance < window) | (window <= 0)) & (n < end)[None, :]
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(present_value + cells, mask=there, other=0.0).to(kind)
        sums = sums * shrink[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
        peak = higher

    result = sums * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    inside = (token < new_tokens)[:, None] & (d < D)[None, :]
    if SPLIT:
        part = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(output + part[:, None] * D + d[None, :], result, mask=inside)
        logarithm = tl.where(total == 0.0, float("-inf"), peak + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse + part, logarithm, mask=token < new_tokens)
    else:
        tl.store(output + row[:, None] * D + d[None, :], result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def reduce(  # type: ignore[no-untyped-def]
    partial, lse, output, splits,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, SOFTCAP: tl.constexpr, QUANTIZED: tl.constexpr, INTEGER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The mean of one row's splits, each weighted with its share of the softmax's sum."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    logarithms = tl.load(lse + row * splits + n, mask=n < splits, other=float("-inf"))
    peak = tl.max(logarithms, 0)
    weights = tl.exp2(logarithms - tl.where(peak == float("-inf"), 0.0, peak))  # [ROWS]
    cells = (row * splits + n)[:, None] * D + d[None, :]
    parts = tl.load(partial + cells, mask=(n < splits)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * D + d, result.to(output.dtype.element_ty), mask=d < D)


KERNELS = {"append": append, "prefill": attention, "decode": attention, "reduce": reduce}


@dataclass(frozen=True)
class Compiled:
    """A kernel's code for one architecture, and what its launch must know; `scratch_bytes` must be 0."""

    cubin: bytes
    ptx: str
    entry: str
    num_warps: int
    shared_bytes: int
    scratch_bytes: int
    registers: int
    stack_bytes: int


def compile_kernel(spec: KernelSpec, kernel: KernelName, capability: int) -> Compiled:
    """Compile one kernel; no driver and no GPU are needed. Pointers must be aligned to 16 bytes when it is launched.

    The code depends on nothing but this source, the arguments and Triton's version, if TRITON_DISABLE_LINE_INFO is set.
    """
    function, types, fixed = KERNELS[kernel], parameters(spec, kernel), constants(spec, kernel, capability)
    given = zip(function.arg_names, types, strict=False)
    signature = {name: parameter.type for name, parameter in given} | dict.fromkeys(fixed, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(types) if p.type.startswith("*")}
    sizes = tiles(spec, kernel, capability)
    result = triton.compile(
        ASTSource(function, signature, fixed, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": sizes.num_warps, "num_stages": sizes.num_stages, "enable_fp_fusion": True},
    )
    facts, cubin = result.metadata, result.asm["cubin"]
    registers, stack = _resources(cubin)
    return Compiled(
        cubin=cubin,
        ptx=result.asm["ptx"],
        entry=facts.name,
        num_warps=facts.num_warps,
        shared_bytes=facts.shared,
        scratch_bytes=facts.global_scratch_size + facts.profile_scratch_size,
        registers=registers,
        stack_bytes=stack,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread, as cuobjdump, which comes with Triton, reads them off the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])
