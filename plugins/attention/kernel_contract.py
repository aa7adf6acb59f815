"""What the Triton kernels, their compiler and their launcher agree on: parameters in order, tiles, grids, workspace, kernels.json.

Plain data and pure functions; nothing here needs Triton, CUDA or a GPU. Shapes are named as in `headfold.plugins.attention.schema`;
G = Hq / Hkv is the number of query heads that share a key/value head.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headfold.plugins.dtypes import DTYPES, QUANTIZED, DType, Quantized

KernelName = Literal["append", "prefill", "decode", "reduce"]
Axis = Literal["new_tokens", "group_rows", "splits", "output_rows", "kv_heads", "batch", "one"]
MANIFEST = "kernels.json"
SCRATCH = ("global_scratch", "profile_scratch")  # pointers that Triton appends to every entry; null, for we use neither
_MAX_SPLITS = 32
_PROGRAMS = 256  # programs that fill a GPU: decode splits the keys until it has that many
_ATTENTION = (  # of prefill and decode; G consecutive heads of `query` share a key/value head
    ("query", "*dtype"),  # [B, S, Hq*D]
    ("present_key", "*cache"),  # [B, Hkv, C, D], with the new tokens in it
    ("present_value", "*cache"),
    ("past_lengths", "*int64"),  # [B]
    ("cos_cache", "*dtype"),  # [>= C, R/2]
    ("sin_cache", "*dtype"),
    ("q_norm_weight", "*dtype"),  # [D], or null
    ("key_scale", "*float32"),  # [Hkv]: real = stored * scale; null unless the cache is quantized
    ("value_scale", "*float32"),
    ("output", "*out"),  # prefill: [B, S, Hq*D]; decode: float32 [B*S*Hq, splits, D], a result per split of the keys
    ("lse", "*float32"),  # decode: [B*S*Hq, splits], log2 of each split's sum of 2^score; null in prefill
    ("new_tokens", "int32"),  # S
    ("capacity", "int32"),  # C
    ("window", "int32"),  # local_window_size
    ("scale", "float32"),
    ("epsilon", "float32"),  # qk_norm_epsilon
)
PARAMETERS: dict[KernelName, tuple[tuple[str, str], ...]] = {
    "append": (
        ("key", "*dtype"),  # [B, S, Hkv*D]
        ("value", "*dtype"),
        ("present_key", "*cache"),
        ("present_value", "*cache"),
        ("past_lengths", "*int64"),
        ("cos_cache", "*dtype"),
        ("sin_cache", "*dtype"),
        ("k_norm_weight", "*dtype"),  # [D], or null
        ("key_scale", "*float32"),
        ("value_scale", "*float32"),
        ("new_tokens", "int32"),
        ("capacity", "int32"),
        ("epsilon", "float32"),
    ),
    "prefill": _ATTENTION,
    "decode": _ATTENTION,
    "reduce": (
        ("partial", "*float32"),  # decode's output
        ("lse", "*float32"),
        ("output", "*dtype"),  # [B, S, Hq*D]
        ("splits", "int32"),
    ),
}
# The grid's three axes; an axis divided by the kernel's `tile` (rounded up) comes first.
GRIDS: dict[KernelName, tuple[Axis, Axis, Axis]] = {
    "append": ("new_tokens", "kv_heads", "batch"),
    "prefill": ("group_rows", "kv_heads", "batch"),
    "decode": ("splits", "kv_heads", "batch"),
    "reduce": ("output_rows", "one", "one"),
}

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KernelSpec(_Strict):
    """What a set of kernels is compiled for. Scale, window, epsilon and B, S, C are given when it is launched."""

    num_heads: int = Field(ge=1)
    kv_num_heads: int = Field(ge=1)
    head_dim: int = Field(ge=16, le=256)
    rotary_dim: int = Field(ge=2)
    rotary_interleaved: bool = False
    qk_norm: bool = False
    softcap: float = Field(default=0.0, ge=0)
    dtype: DType
    cache_dtype: DType | Quantized

    @model_validator(mode="after")
    def _consistent(self) -> "KernelSpec":
        if self.num_heads % self.kv_num_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by kv_num_heads {self.kv_num_heads}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim {self.rotary_dim} is odd or over head_dim {self.head_dim}")
        if self.head_dim * min(DTYPES[self.dtype].size, DTYPES[self.cache_dtype].size) % 16:
            raise ValueError(f"a head of {self.head_dim} {self.cache_dtype} is no multiple of 16 bytes")
        if not self.quantized and self.cache_dtype != self.dtype:
            raise ValueError(f"a {self.cache_dtype} cache of a {self.dtype} model")
        return self

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.kv_num_heads

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.cache_dtype in QUANTIZED

    @property
    def padded_dim(self) -> int:
        """The head size, rounded up to a power of two: Triton's blocks have no other sizes."""
        return _power_of_two(self.head_dim)


class Tiles(_Strict):
    """Block sizes of one kernel. `rows` are tokens (append), token-head pairs (prefill, decode) or splits (reduce)."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(spec: KernelSpec, kernel: KernelName, capability: int = 80) -> Tiles:
    """Sizes that fit every architecture's shared memory and registers.

    Without tensor cores, that is in float32 and on Turing (Triton has none of its instructions), products keep both operands in
    registers: there a tile is smaller and has more warps, or most of it would spill.
    """
    scalar = capability < 80 or spec.dtype == "float32"
    row_bytes = spec.padded_dim * DTYPES[spec.dtype].size
    side = min(32 if scalar else 64, max(16, (16 << 10) // row_bytes))  # of a square of queries and keys
    warps = 8 if scalar else 4
    match kernel:
        case "append":
            return Tiles(rows=16, keys=1, num_warps=4, num_stages=1)
        case "prefill":
            return Tiles(rows=side, keys=side, num_warps=warps, num_stages=2)
        case "decode":  # all the heads of a group, so that a key is read once; the same on every GPU, for `decodes`
            return Tiles(rows=max(16, _power_of_two(spec.group)), keys=side, num_warps=warps, num_stages=2)
        case "reduce":
            return Tiles(rows=_MAX_SPLITS, keys=1, num_warps=4, num_stages=1)


def constants(spec: KernelSpec, kernel: KernelName, capability: int = 80) -> dict[str, int | float | bool]:
    """The compile-time constants of a kernel, by their names in the source."""
    sizes = tiles(spec, kernel, capability)
    return {
        "HKV": spec.kv_num_heads,
        "G": spec.group,
        "D": spec.head_dim,
        "DP": spec.padded_dim,
        "R": spec.rotary_dim,
        "INTERLEAVED": spec.rotary_interleaved,
        "NORM": spec.qk_norm,
        "SOFTCAP": spec.softcap,
        "QUANTIZED": spec.quantized,
        "INTEGER": spec.cache_dtype == "int8",
        "ROWS": sizes.rows,
        "KEYS": sizes.keys,
        "SPLIT": kernel == "decode",
        "UPCAST": False,
    }


def decodes(spec: KernelSpec, new_tokens: int) -> bool:
    """Whether the split kernel takes it: every token-head pair of a group is in one tile. Else prefill does."""
    return new_tokens * spec.group <= tiles(spec, "decode").rows


def splits(spec: KernelSpec, batch: int, capacity: int) -> int:
    """In how many parts decode reads the keys. Only shapes decide, so that workspace and CUDA graphs stay what they are."""
    wanted = _ceil(_PROGRAMS, batch * spec.kv_num_heads)
    return max(1, min(wanted, _MAX_SPLITS, _ceil(capacity, tiles(spec, "decode").keys)))


def workspace_bytes(spec: KernelSpec, batch: int, new_tokens: int, capacity: int) -> int:
    """Bytes of scratch memory a launch of this shape needs: decode's partial results; prefill needs none."""
    if not decodes(spec, new_tokens):
        return 0
    rows = batch * new_tokens * spec.num_heads * splits(spec, batch, capacity)
    return _aligned(rows * spec.head_dim * 4) + _aligned(rows * 4)


def max_workspace_bytes(spec: KernelSpec, batch: int, new_tokens: int, capacity: int) -> int:
    """The most `workspace_bytes` of any launch with at most these sizes."""
    longest = min(new_tokens, tiles(spec, "decode").rows // spec.group)
    return max(workspace_bytes(spec, b, longest, capacity) for b in range(1, batch + 1))


def partial_bytes(spec: KernelSpec, batch: int, new_tokens: int, capacity: int) -> int:
    """Where in the workspace `lse` begins, behind the partial outputs."""
    return _aligned(batch * new_tokens * spec.num_heads * splits(spec, batch, capacity) * spec.head_dim * 4)


def grid(
    spec: KernelSpec, axes: tuple[Axis, Axis, Axis], tile: int, batch: int, new_tokens: int, capacity: int
) -> tuple[int, int, int]:
    """Programs along the three axes of a launch."""
    sizes: dict[Axis, int] = {
        "new_tokens": _ceil(new_tokens, tile),
        "group_rows": _ceil(new_tokens * spec.group, tile),
        "splits": splits(spec, batch, capacity),
        "output_rows": batch * new_tokens * spec.num_heads,
        "kv_heads": spec.kv_num_heads,
        "batch": batch,
        "one": 1,
    }
    return sizes[axes[0]], sizes[axes[1]], sizes[axes[2]]


def parameters(spec: KernelSpec, kernel: KernelName) -> list["Parameter"]:
    """A kernel's parameters in order, with Triton's types, without the two scratch pointers."""
    out = "float32" if kernel == "decode" else spec.dtype
    kinds = {"dtype": spec.dtype, "cache": spec.cache_dtype, "out": out}
    result = []
    for name, kind in PARAMETERS[kernel]:
        bare = kind.removeprefix("*")
        star = kind[: len(kind) - len(bare)]
        result.append(Parameter(name=name, type=star + DTYPES[kinds.get(bare, bare)].triton))
    return result


class Parameter(_Strict):
    """A parameter of a kernel: a pointer as `*fp16`, or a number as `i32`."""

    name: str
    type: str

    @property
    def size(self) -> int:
        """Bytes of the argument."""
        return 8 if self.type.startswith("*") else 4


class KernelEntry(_Strict):
    """One compiled kernel. The entry takes `parameters`, then the two null pointers of SCRATCH."""

    kernel: KernelName
    capability: int
    file: str
    sha256: Sha256
    entry: str
    parameters: list[Parameter]
    num_warps: int = Field(ge=1)
    shared_bytes: int = Field(ge=0)
    registers: int = Field(ge=0)
    stack_bytes: int = Field(ge=0)  # of a thread, in local memory: what did not fit the registers
    grid: tuple[Axis, Axis, Axis]
    tile: int = Field(ge=1)


class KernelManifest(_Strict):
    """kernels.json: a set of kernels for one spec and some capabilities."""

    format_version: Literal[1] = 1
    spec: KernelSpec
    triton: str
    source_sha256: Sha256  # of the kernels' source
    kernels: list[KernelEntry]

    @property
    def capabilities(self) -> list[int]:
        """Those it has kernels for."""
        return sorted({entry.capability for entry in self.kernels})


class KernelFileError(Exception):
    """A set of kernels that is incomplete, altered or of another format; the message is one line and says where."""


def read_kernels(directory: Path) -> KernelManifest:
    """Read and validate kernels.json. Raises KernelFileError; the kernels themselves are not looked at."""
    path = directory / MANIFEST
    if not path.is_file():
        raise KernelFileError(f"{path}: is missing")
    try:
        return KernelManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise KernelFileError(f"{path}: {field}: {first['msg']}") from error


def read_cubin(directory: Path, entry: KernelEntry) -> bytes:
    """A kernel's code. Raises KernelFileError if it is missing, or not what was compiled."""
    path = directory / entry.file
    if Path(entry.file).name != entry.file or path.is_symlink() or not path.is_file():
        raise KernelFileError(f"{path}: is missing, or no regular file")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise KernelFileError(f"{path}: does not have the SHA-256 of {MANIFEST}")
    return content


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _aligned(number: int) -> int:
    return _ceil(number, 256) * 256
