"""The manifest of a bundle: what it holds, what it computes, and the SHA-256 of every file. Checked before anything else is used.

`model.onnx` and its data, the tokenizer and the generation settings lie beside `manifest.json` in one directory. Where their bytes
come from does not matter: a file may be a link, as in the cache of a hub, for its SHA-256 decides.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from headfold.plugins.attention.kernel_contract import MANIFEST as KERNELS  # in the directory of a plugin's kernels
from headfold.plugins.attention.schema import Attention
from headfold.plugins.dtypes import DType, Quantized
from headfold.plugins.names import HIDDEN_STATES, PARTS, caches, is_cache_input, is_cache_output
from headfold.plugins.tensorrt_library import Flavour
from headfold.runtime.errors import BundleError
from headfold.runtime.files.json_file import MANIFEST_BYTES, read_object

FORMAT_VERSION = 1
ENGINES_VERSION = 2  # of a bundle with engines, which readers of version 1 refuse
QUANTIZED_VERSION = 3  # of a bundle with a quantized cache
ROADS_VERSION = (
    4  # of a bundle of a model that headfold has no table of, or whose layers have caches of different shapes
)
ROUNDED_VERSION = 5  # of a bundle with weights of four or eight bits
ROUNDED_INPUTS_VERSION = 6  # of a bundle with weights of the scheme w8a8
FLOAT8_VERSION = 7  # of a bundle with weights of the scheme fp8
FLOAT4_VERSION = 8  # of the scheme nvfp4
NEWEST_VERSION = FLOAT4_VERSION
MANIFEST = "manifest.json"
MODEL = "model.onnx"
RECORD = "weights.json"  # of rounded weights
PARITY = "parity.json"  # the report of the proof
CONFIG = "config.json"  # of a checkpoint: no bundle has one
_CHUNK = 1 << 22  # bytes hashed at a time
_HUB = frozenset(
    {".cache", ".git", ".gitattributes", ".gitignore", "README.md"}
)  # what a hub's download adds; never read
_FIX = "Export the bundle again."
_CHANGED = "The bundle was changed after its export: export it again, or copy it anew."
Road = Literal["headfold", "transformers", "module"]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or any(c in "\\:" or c < " " for c in name):
        raise ValueError("points outside the bundle")
    return name


BlockSize = Literal[32, 64, 128]  # powers of two, which TensorRT has, too
WeightsScheme = Literal["int8", "int4", "mixed", "w8a8", "fp8", "nvfp4"]
Size = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Nats = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
FileName = Annotated[str, AfterValidator(_inside)]  # relative to the bundle, with slashes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)  # strict: true is not 1


class FileEntry(_Strict):
    """One file of the bundle: size in bytes, and SHA-256 of its content."""

    size: int = Field(ge=0)
    sha256: Sha256


class TensorSpec(_Strict):
    """One graph input or output: a number is a fixed size, a name a dynamic one."""

    name: str
    dtype: str
    shape: list[int | str]


class QuantizationSpec(_Strict):
    """A quantized cache, with a scale for each head's keys and values; and what it costs on the text it was calibrated on."""

    dtype: Quantized
    calibration_tokens: int = Field(ge=1)
    kl: Nats  # mean KL of the next token's distribution, without || with quantization
    top1: Share  # of positions whose likeliest token is the same


class WeightsCost(_Strict):
    """What rounded weights cost on held-out text: ONNX Runtime, as `generate` runs it, against PyTorch without rounding."""

    tokens: int = Field(ge=1)
    kl: float  # mean KL of the next token's distribution, without || with rounding, nats
    kl_99: float  # its 99th percentile over the tokens
    top1: Share  # of positions whose likeliest token is the same
    perplexity_before: float  # of the text, without rounding and with it
    perplexity: float
    greedy_tokens: int  # length of the greedy answers compared
    greedy_agreement: float  # how many of their first tokens are the same, a mean over the answers


class WeightsSpec(_Strict):
    """Weights of four or eight bits in blocks along the input that share a scale; `weights.json` has each one's bits.

    Of w8a8 and fp8 these are embedding and head. The others have a scale for each output, and seven bits, where their products' inputs
    have eight; or are float8_e4m3fn, and inputs stay as they are. Of nvfp4 the others are numbers of float4_e2m1, doubled, in blocks
    of 16, whose scales are float8_e4m3fn times a power of two.
    """

    scheme: WeightsScheme
    block_size: BlockSize = 32  # of those that headfold rounded; smaller where it does not divide a row
    kept: int = Field(0, ge=0)  # how many are as the checkpoint had them quantized, in its own bits and blocks
    bits: float  # of their numbers on average; the scales are not counted
    # 4: the products round their inputs to eight bits; 1: some or all take them in float32
    accuracy_level: Literal[1, 4]
    max_kl: float  # most that they were allowed to cost, nats
    cost: WeightsCost | None  # None only while it is being measured


class CacheSpec(_Strict):
    """The KV cache. Per layer two tensors [batch, num_key_value_heads, capacity, head_dim]; capacity is in tokens.

    A list has a number for each layer, a number is that of all layers.
    """

    layout: Literal["batch, num_key_value_heads, capacity, head_dim"] = "batch, num_key_value_heads, capacity, head_dim"
    num_hidden_layers: int = Field(ge=1)
    num_key_value_heads: Size | list[Size]
    head_dim: Size | list[Size]
    capacity: int = Field(ge=1)  # the most tokens (prompt and answer) a sequence may have
    quantization: QuantizationSpec | None = None

    @model_validator(mode="after")
    def _one_for_each_layer(self) -> "CacheSpec":
        for name, value in (("num_key_value_heads", self.num_key_value_heads), ("head_dim", self.head_dim)):
            if isinstance(value, list) and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(value)} numbers for {self.num_hidden_layers} layers")
        return self

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Per layer the number of key/value heads, and their size."""
        heads, sizes = (
            value if isinstance(value, list) else [value] * self.num_hidden_layers
            for value in (self.num_key_value_heads, self.head_dim)
        )
        return list(zip(heads, sizes, strict=True))

    @property
    def tensors(self) -> dict[tuple[str, str], tuple[int, int]]:
        """The same by names, a graph's cache input and its output; layer by layer, keys first."""
        names = caches(self.num_hidden_layers).items()
        return dict(zip(names, (shape for shape in self.shapes for _ in PARTS), strict=True))


def cache_spec(
    shapes: Sequence[tuple[int, int]], capacity: int, quantization: QuantizationSpec | None = None
) -> CacheSpec:
    """The spec of a cache whose layers have these numbers of heads, and sizes of them."""
    heads, sizes = zip(*shapes, strict=True)
    return CacheSpec(
        num_hidden_layers=len(shapes),
        num_key_value_heads=heads[0] if len(set(heads)) == 1 else list(heads),
        head_dim=sizes[0] if len(set(sizes)) == 1 else list(sizes),
        capacity=capacity,
        quantization=quantization,
    )


class ShapeRange(_Strict):
    """The shapes one input may have in one profile."""

    min: list[int]
    opt: list[int]  # what the engine is tuned for
    max: list[int]


class EngineProfile(_Strict):
    """One optimization profile of an engine; its number is its place in the list."""

    name: Literal["prefill", "decode"]
    shapes: dict[str, ShapeRange]  # by input


class PluginEntry(_Strict):
    """The plugin that an engine calls, and the kernels it launches."""

    name: str
    version: str
    namespace: str
    kernels: FileName  # directory of kernels.json
    kernels_sha256: Sha256  # of kernels.json, which has the SHA-256 of every kernel


class EngineEntry(_Strict):
    """One TensorRT engine of the bundle."""

    file: FileName
    flavour: Flavour
    version: str  # of TensorRT: an engine runs on exactly the version that built it
    attention: Attention
    dtype: DType
    compute_capabilities: list[int]  # 86 for 8.6
    max_batch: int = Field(ge=1)
    max_input: int = Field(ge=1)  # new tokens of one prefill step, padding included
    capacity: int = Field(ge=1)  # positions of its caches
    weight_streaming: bool
    profiles: list[EngineProfile]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    aliases: dict[str, str]  # output: the input whose address it must be given
    plugin: PluginEntry | None
    layers: dict[str, int]  # TensorRT layers that the attention ops became, over the whole model
    tools: dict[str, str]  # package and version that made it


class Manifest(_Strict):
    """Everything a user of the bundle must know before opening its graph."""

    format_version: int = Field(ge=1, le=NEWEST_VERSION)
    headfold_version: str
    source: str  # name of the checkpoint's file or directory, without its path
    road: Road = "headfold"  # who made the model of its weights
    config: dict[
        str, Any
    ]  # as JSON: ModelConfig of headfold.export.model.config, on other roads Facts of headfold.export.exportables
    vocab_size: int = Field(ge=1)
    parameters: int = Field(ge=1)
    dtype: DType  # of the weights, the logits, and the cache unless that is quantized
    logits: Literal["last", "all"]  # of each row's last token, or of every new token
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    cache: CacheSpec
    files: dict[FileName, FileEntry]  # every file but the manifest itself
    tools: dict[str, str]  # package and version that made it
    parity: dict[str, Any] | None  # summary of parity.json; None if the export was told not to verify
    engines: list[EngineEntry] = []
    weights: WeightsSpec | None = None  # of four or eight bits; None for all in `dtype`

    @property
    def hidden_size(self) -> int | None:
        """Of the output `hidden_states`, what the head is given of every token; None where there is none."""
        found = (spec.shape[-1] for spec in self.outputs if spec.name == HIDDEN_STATES and spec.shape)
        return next((size for size in found if isinstance(size, int)), None)

    @property
    def cache_dtype(self) -> str:
        """What the cache holds: `dtype`, or a narrower one."""
        return self.cache.quantization.dtype if self.cache.quantization is not None else self.dtype


def read_manifest(bundle: Path) -> Manifest:
    """Read and validate a bundle's manifest; the files it lists are not looked at.

    Raises:
        BundleError: no such bundle, not JSON, a newer format, a field that is missing or wrong, or fields that contradict each other.
    """
    path = bundle / MANIFEST
    if not path.exists() and (bundle.is_file() or (bundle / CONFIG).exists()):
        fix = f"Export it first: `headfold export {bundle} -o BUNDLE`."
        raise BundleError("is a checkpoint, not a bundle", where=bundle, fix=fix)
    if not bundle.is_dir():
        raise BundleError(
            "no such bundle directory", where=bundle, fix="Make one: `headfold export CHECKPOINT -o BUNDLE`."
        )
    if not path.is_file():
        raise BundleError("has no manifest.json", where=bundle, fix="Only a finished export has one: export again.")
    content = read_object(path, MANIFEST_BYTES, BundleError, _FIX)
    version = content.get("format_version")
    if isinstance(version, int) and version > NEWEST_VERSION:
        raise BundleError(
            f"has format version {version}, this headfold reads up to {NEWEST_VERSION}",
            where=path,
            fix="Upgrade headfold, or export the bundle with this version.",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise BundleError(f"{field}: {first['msg']}", where=path, fix=_FIX) from error
    if contradiction := _contradiction(manifest):
        raise BundleError(contradiction, where=path, fix=_FIX)
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """Whether what is run is not among the files, whose SHA-256 is known, or the cache has not two tensors for each layer."""
    plugins = [engine.plugin for engine in manifest.engines if engine.plugin is not None]
    run = [MODEL, *(engine.file for engine in manifest.engines), *(f"{plugin.kernels}/{KERNELS}" for plugin in plugins)]
    if missing := [name for name in run if name not in manifest.files]:
        return f"{missing[0]} is not among its files"
    for plugin in plugins:
        if manifest.files[f"{plugin.kernels}/{KERNELS}"].sha256 != plugin.kernels_sha256:
            return f"the kernels of {plugin.kernels} have another SHA-256 among its files than in their engine"
    for specs, of_cache in ((manifest.inputs, is_cache_input), (manifest.outputs, is_cache_output)):
        if sum(of_cache(spec.name) for spec in specs) != 2 * manifest.cache.num_hidden_layers:
            return f"its cache has no two tensors for each of {manifest.cache.num_hidden_layers} layers"
    if any(spec.name == HIDDEN_STATES for spec in manifest.outputs) and not (manifest.hidden_size or 0) > 0:
        return f"the output {HIDDEN_STATES} has no size"
    return None


def check_files(bundle: Path, manifest: Manifest, digest: Callable[[Path], str] | None = None) -> None:
    """Compare every listed file with its size and SHA-256, and refuse files that are not listed, but for those of a hub.

    `digest` gives a file's SHA-256; by default its content is hashed.

    Raises:
        BundleError: a file is missing, altered, or not listed.
    """
    check_sizes(bundle, manifest)
    for name, entry in manifest.files.items():
        if (digest or sha256)(bundle / name) != entry.sha256:
            raise BundleError("does not have the SHA-256 of the manifest", where=bundle / name, fix=_CHANGED)


def check_sizes(bundle: Path, manifest: Manifest) -> None:
    """What `check_files` does at once, whatever the bundle's size: all but the hashes. Raises BundleError."""
    for name, entry in manifest.files.items():
        path = bundle / name
        if not path.is_file():
            raise BundleError("is missing, or no regular file", where=path, fix=_CHANGED)
        size = path.stat().st_size
        if size != entry.size:
            raise BundleError(f"has {size} bytes, not the {entry.size} of the manifest", where=path, fix=_CHANGED)
    for path in bundle.rglob("*"):
        relative = path.relative_to(bundle)
        if relative.parts[0] in _HUB or (path.is_dir() and not path.is_symlink()):
            continue
        if relative.as_posix() not in (MANIFEST, *manifest.files):
            raise BundleError("is not listed in the manifest", where=path, fix="Remove it, or export the bundle again.")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
