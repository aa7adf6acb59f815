"""The eleven kinds of input: how one is made of a seed, and how headfold's commands would use it."""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzzing.gguf_files import gguf_file
from fuzzing.mutations import damaged_bytes, damaged_json
from fuzzing.subjects import Subjects
from fuzzing.templates import template
from headfold.export.bundle.inspection import inspect_path, render
from headfold.export.exportables.opening import open_exportable
from headfold.runtime import load
from headfold.runtime.generate import Model
from headfold.runtime.manifest import read_manifest
from headfold.runtime.session import OrtSession
from headfold.runtime.text import Text

Files = Mapping[str, bytes]  # what is to be written over a valid directory
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "The quick brown fox"}]},
    {"role": "assistant", "content": "jumps", "reasoning": "over"},
    {"role": "user", "content": "the lazy dog"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
_CONFIG_FIELDS = """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act rope_parameters rope_scaling
    rope_theta partial_rotary_factor original_max_position_embeddings attention_bias mlp_bias sliding_window
    use_sliding_window max_window_layers layer_types tie_word_embeddings bos_token_id eos_token_id
    pad_token_id quantization_config pretraining_tp auto_map text_config torch_dtype dtype sub_configs
    id2label num_labels rope_type type factor beta_fast beta_slow truncate mscale attention_factor
    low_freq_factor
""".split()
_MODEL_TYPES = """
    mistral qwen2 qwen3 headfold gemma2 phi3 gpt2 mixtral bert mamba llama4 nothing
""".split()
_METHODS = ("awq", "compressed-tensors", "fp8", "mxfp4", "bitsandbytes")
_QUANTIZATION_FIELDS = """
    quant_method bits group_size desc_act sym checkpoint_format dynamic version format config_groups weights num_bits
    strategy type block_structure sparsity_config transform_config weight_block_size fmt pack_dtype
""".split()
_ADAPTER_FIELDS = """
    peft_type base_model_name_or_path revision r lora_alpha use_rslora use_dora fan_in_fan_out rank_pattern alpha_pattern
    init_lora_weights bias modules_to_save lora_bias target_parameters layer_replication trainable_token_indices
""".split()
_SCALINGS = ("linear", "yarn", "llama3", "dynamic", "longrope", "default", "proportional")
_GENERATION_FIELDS = """
    eos_token_id bos_token_id pad_token_id do_sample temperature top_k top_p min_p repetition_penalty
    max_new_tokens max_length min_length min_new_tokens stop_strings suppress_tokens begin_suppress_tokens
    bad_words_ids no_repeat_ngram_size num_beams forced_eos_token_id sequence_bias watermarking_config
""".split()
_TOKENIZER_FIELDS = """
    truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model vocab merges dropout
    unk_token byte_fallback fuse_unk ignore_merges end_of_word_suffix continuing_subword_prefix pattern
    pretokenizers normalizers content id special max_input_chars_per_word type
""".split()
_SETTINGS_FIELDS = """
    chat_template bos_token eos_token unk_token pad_token additional_special_tokens extra_special_tokens
    content added_tokens_decoder tokenizer_class model_max_length auto_map name template
""".split()
_MANIFEST_FIELDS = """
    format_version headfold_version source road config vocab_size parameters dtype logits inputs outputs cache
    files tools parity engines num_key_value_heads head_dim capacity quantization shape layers
""".split()
_TENSOR_NAMES = """
    lm_head.weight model.norm.bias model.layers.0.self_attn.rotary_emb.inv_freq v_head.weight x model.layers.7.mlp.up_proj.weight
    model.layers.0.mlp.up_proj.qweight transformer.wte.weight
""".split()


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        make: draws the files.
        subject: the name of the valid directory that they are written over; None for a file that is opened by itself.
        uses: what commands do with the path; each is tried, whatever came of the one before.
    """

    make: Callable[[Random, Subjects], Files]
    subject: str | None
    uses: tuple[Callable[[Path], None], ...]


def _header(rng: Random, subjects: Subjects) -> Files:
    return _header_of(rng, subjects.checkpoint / "model.safetensors")


def _header_of(rng: Random, path: Path) -> Files:
    name, data = path.name, path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.3:
        return {name: damaged_bytes(rng, data[: 8 + size]) + data[8 + size :]}
    if rng.random() < 0.4:
        header = json.dumps(_other_tensors(rng, json.loads(data[8 : 8 + size]))).encode()
        return {name: struct.pack("<Q", len(header)) + header + data[8 + size :]}
    header = damaged_json(
        rng, json.loads(data[8 : 8 + size]), ("dtype", "shape", "data_offsets", "__metadata__", "lm_head.weight")
    )
    said = (
        len(header)
        if rng.random() < 0.9
        else rng.choice((0, 1, size, len(header) - 1, len(header) + 8, 2**40, 2**64 - 1))
    )
    return {name: struct.pack("<Q", said) + header + data[8 + size :]}


def _other_tensors(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header that is in order, of tensors that are not."""
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        tensor = header[rng.choice(names)]
        match rng.randrange(5):
            case 0:
                tensor["dtype"] = rng.choice(("I32", "U32", "F32"))  # of as many bytes
            case 1:
                shape = tensor["shape"]
                tensor["shape"] = rng.choice(
                    (shape[::-1], [1, *shape], [*shape, 1], [math.prod(shape)], [1] * 70 + shape)
                )
            case 2:
                other = header[rng.choice(names)]
                tensor["shape"], other["shape"] = other["shape"], tensor["shape"]
                tensor["data_offsets"], other["data_offsets"] = other["data_offsets"], tensor["data_offsets"]
            case 3:
                header[rng.choice(_TENSOR_NAMES)] = {
                    "dtype": rng.choice(("F32", "BOOL")),
                    "shape": [0],
                    "data_offsets": [0, 0],
                }
            case _:
                renamed = rng.choice(names)
                header[rng.choice((*_TENSOR_NAMES, renamed.removeprefix("model.")))] = header.pop(renamed)
                names.remove(renamed)
    return header


def _index(rng: Random, subjects: Subjects) -> Files:
    name = "model.safetensors.index.json"
    content = json.loads((subjects.shards / name).read_bytes())
    return {name: damaged_json(rng, content, ("weight_map", "metadata", "lm_head.weight", "model.embed_tokens.weight"))}


def _config(rng: Random, subjects: Subjects) -> Files:
    content = json.loads((subjects.checkpoint / "config.json").read_bytes())
    if rng.random() < 0.3:
        content["model_type"] = rng.choice(_MODEL_TYPES)
    if rng.random() < 0.3:
        content["rope_scaling"] = {
            "rope_type": rng.choice(_SCALINGS),
            "factor": rng.choice((2.0, 0.5, 0, -1.0, 1e308, None, "x")),
        }
    for name in rng.sample(_CONFIG_FIELDS, rng.choice((0, 0, 1, 3))):
        content.pop(name, None)
    return {"config.json": damaged_json(rng, content, _CONFIG_FIELDS)}


def _quantized(rng: Random, subjects: Subjects) -> Files:
    if rng.random() < 0.5:
        return _header_of(rng, subjects.quantized / "model.safetensors")
    content = json.loads((subjects.quantized / "config.json").read_bytes())
    if rng.random() < 0.3:
        content["quantization_config"]["quant_method"] = rng.choice(_METHODS)
    settings = damaged_json(rng, content.pop("quantization_config"), _QUANTIZATION_FIELDS)
    return {"config.json": json.dumps(content)[:-1].encode() + b', "quantization_config": ' + settings + b"}"}


def _adapter(rng: Random, subjects: Subjects) -> Files:
    if rng.random() < 0.5:
        return _header_of(rng, subjects.adapter / "adapter_model.safetensors")
    name = "adapter_config.json"
    return {name: damaged_json(rng, json.loads((subjects.adapter / name).read_bytes()), _ADAPTER_FIELDS)}


def _gguf(rng: Random, subjects: Subjects) -> Files:
    metadata = dict(subjects.metadata)
    if rng.random() < 0.3:
        metadata["tokenizer.ggml.model"] = "llama"  # a vocabulary of SentencePiece has scores instead of merges
        metadata["tokenizer.ggml.scores"] = [float(-i) for i in range(len(metadata["tokenizer.ggml.tokens"]))]
        del metadata["tokenizer.ggml.merges"]
    return {"model.gguf": gguf_file(rng, metadata, subjects.tensors)}


def _json_of(name: str, fields: Sequence[str]) -> Callable[[Random, Subjects], Files]:
    def make(rng: Random, subjects: Subjects) -> Files:
        return {name: damaged_json(rng, json.loads((subjects.bundle / name).read_bytes()), fields)}

    return make


def _special(rng: Random, subjects: Subjects) -> Files:
    if rng.random() < 0.3:
        return _json_of("special_tokens_map.json", _SETTINGS_FIELDS)(rng, subjects)
    return _json_of("generation_config.json", _GENERATION_FIELDS)(rng, subjects)


def _template(rng: Random, _: Subjects) -> Files:
    return {"chat_template.jinja": template(rng).encode(errors="surrogatepass")}


def _inspect(path: Path) -> None:
    """As `headfold inspect`."""
    render(inspect_path(path))


def _weights(path: Path) -> None:
    """As an export reads a checkpoint."""
    source = open_exportable(path)
    source.master(torch.float32, 64, all_logits=False)
    tensors = source.tensors(torch.float32)
    for name in tensors.shapes():
        tensors.read(name)


def _run(bundle: Path) -> None:
    """As `headfold generate` with token ids; every file is checked."""
    load(bundle, threads=1).generate([5, 6, 7], max_new_tokens=2)


def _complete(bundle: Path) -> None:
    """As `headfold generate`, in a bundle whose manifest says that its files are so."""
    _model(bundle).generate("The quick brown fox", max_new_tokens=2, seed=0)


def _chat(bundle: Path) -> None:
    """As `headfold chat`, and with all that a template may be given."""
    model = _model(bundle)
    model.generate(MESSAGES, max_new_tokens=2, seed=0, tools=TOOLS, template_variables={"enable_thinking": False})


def _model(bundle: Path) -> Model:
    return Model(Text(bundle), read_manifest(bundle), _session(bundle))


@lru_cache(maxsize=1)
def _session(bundle: Path) -> OrtSession:
    """The graph is no input here, and is loaded once."""
    return OrtSession(bundle, read_manifest(bundle), threads=1)


_CHECKPOINT, _BUNDLE = (_inspect, _weights), (_complete, _chat)
KINDS: dict[str, Kind] = {
    "safetensors": Kind(_header, "checkpoint", _CHECKPOINT),
    "index": Kind(_index, "shards", _CHECKPOINT),
    "config": Kind(_config, "checkpoint", _CHECKPOINT),
    "quantized": Kind(_quantized, "quantized", _CHECKPOINT),
    "adapter": Kind(_adapter, "adapter", _CHECKPOINT),
    "gguf": Kind(_gguf, None, _CHECKPOINT),
    "manifest": Kind(_json_of("manifest.json", _MANIFEST_FIELDS), "bundle", (_inspect, _run)),
    "tokenizer": Kind(_json_of("tokenizer.json", _TOKENIZER_FIELDS), "bundle", _BUNDLE),
    "tokenizer_config": Kind(_json_of("tokenizer_config.json", _SETTINGS_FIELDS), "bundle", _BUNDLE),
    "generation": Kind(_special, "bundle", _BUNDLE),
    "template": Kind(_template, "bundle", _BUNDLE),
}
