"""The models of `scripts/bench.py --peers`, made once: SmolLM2; SmolLM2 after some steps of training, whose weights lie on no grid any
more; a random llama of a billion parameters with its vocabulary; or the subject of the uptraining experiments, whose 512 positions are
enough for its costs alone.
"""

import pydoc_data.topics
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from bench_peers import EXPORTS, PAIRS, genai_builder
from corpus import corpus
from numpy.typing import NDArray

from headfold.export.checkpoints.base import Checkpoint, MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.model.config import ModelConfig
from headfold.export.model.initialize import new_decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))
from gguf_of_decoder import gguf_name, interleave
from gguf_of_transformers import add_sizes

ROOT = Path(__file__).resolve().parents[1]
HEADFOLD = str(Path(sys.executable).parent / "headfold")
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SUBJECTS = ("smollm2", "smollm2-trained", "random-1b", "subject")
STEPS, ROWS, LENGTH = 300, 2, 64  # of the training: enough that every weight has moved
CONTENDERS = {f"headfold {name}": "headfold" for name in (*EXPORTS, *PAIRS)} | {
    "onnxruntime-genai int4": "onnxruntime-genai",
    "llama.cpp Q4_0": "llama.cpp",
    "llama.cpp Q8_0": "llama.cpp",
    "OpenVINO GenAI Q4_0": "openvino",
}


def models(folder: Path, subject: str, wanted: Collection[str]) -> dict[str, list[Path]]:
    """Those of CONTENDERS that are wanted, each its model, and behind it one that reads prompts; what is there already is kept.

    Of the random one no mixed ones are made, for in it no weight is worth more than another, and four bits are the nearest numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "hf"
    if not source.exists():
        save_source(source, subject)
    exports = [name for name in EXPORTS if subject != "random-1b" or "mixed" not in name]
    paths = {f"headfold {name}": [folder / name] for name in exports}
    paths |= {
        f"headfold {name}": [folder / own, folder / reader] for name, (reader, own) in PAIRS.items() if own in exports
    }
    paths["onnxruntime-genai int4"] = [folder / "genai"]
    if subject != "subject":  # GGUF files have SmolLM2's vocabulary
        paths |= {f"llama.cpp {kind}": [folder / f"{kind}.gguf"] for kind in ("Q4_0", "Q8_0")}
        paths["OpenVINO GenAI Q4_0"] = [folder / "Q4_0.gguf"]
    paths = {name: own for name, own in paths.items() if name in wanted}
    for path in (path for own in paths.values() for path in own):
        if not path.exists():
            _make(path, source, subject)
    return paths


def _make(path: Path, source: Path, subject: str) -> None:
    """What its name says, of the model in `source`."""
    if path.suffix == ".gguf":
        write_gguf(path, open_checkpoint(source), gguf.GGMLQuantizationType[path.stem])
    elif path.name == "genai":
        _run(genai_builder(source, path, path.parent / "cache", "int4"))
    else:
        _run(_export(source, path.parent, path.name, subject))


def save_source(path: Path, subject: str) -> None:
    """A Hugging Face directory, in 16 bits if it is the random model's."""
    if subject == "subject":
        _run([sys.executable, str(ROOT / "scripts" / "train_subject.py"), "--output", str(path)])
        return
    original = open_checkpoint(SMOLLM2)
    if subject == "smollm2":
        save_hf(path, original, torch.float32)
        return
    if subject == "smollm2-trained":
        train, validation, _ = corpus(path.parent / "corpus")
        short = path.parent / "validation.txt"
        short.write_text(validation.read_text()[:2500])  # nobody looks at it
        save_hf(path.parent / "original", original, torch.float32)
        command = [
            HEADFOLD,
            "uptrain",
            str(path.parent / "original"),
            "-o",
            str(path),
            "--data",
            str(train),
            "--validation",
            str(short),
        ]
        command += ["--tokens", str(STEPS * ROWS * LENGTH), "--batch", str(ROWS), "--sequence", str(LENGTH)]
        _run([*command, "--loss", "ce", "--cpu"])
        return
    config = ModelConfig(
        model_type="llama",
        vocab_size=original.config.vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=original.config.bos_token_id,
        eos_token_id=original.config.eos_token_id,
        tie_word_embeddings=True,
    )
    tensors = new_decoder(config, seed=0, capacity=1).state_dict()
    save_hf(path, MemoryCheckpoint(path, config, tensors, original.tokenizer), torch.bfloat16)


def _export(source: Path, folder: Path, name: str, subject: str) -> list[str]:
    command = [
        HEADFOLD,
        "export",
        str(source),
        "-o",
        str(folder / name),
        "--quiet",
        "--no-verify",
        "--capacity",
        "512" if subject == "subject" else "4096",
    ]
    if not EXPORTS[name]:
        return command
    command += [*EXPORTS[name], "--max-kl", "1000"]
    if subject != "random-1b":
        return command
    text = folder / "text.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()))
    return [*command, "--data", str(text), *(("--rounding", "nearest") if "int4" in name else ())]


def write_gguf(path: Path, checkpoint: Checkpoint, kind: gguf.GGMLQuantizationType) -> None:
    """A GGUF file of a llama with SmolLM2's vocabulary; embedding, which is the head, in Q8_0."""
    config, reader = checkpoint.config, gguf.GGUFReader(SMOLLM2)
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    for field in reader.fields.values():  # of the vocabulary; what says how large the model is follows
        if field.name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_vocab_size(config.vocab_size)
    add_sizes(writer, config)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    for name, values in _tensors(checkpoint):
        wanted = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else kind
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".partial").rename(path)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """By their names in GGUF, where rotation turns neighbours: rows of queries and keys are in that order."""
    config = checkpoint.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in checkpoint:
        values = checkpoint.read(name).float().numpy()
        reordered = heads.get(name.split(".")[-2])
        yield gguf_name(name), interleave(values, reordered) if reordered is not None else values


def _run(command: list[str]) -> None:
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed; its error is above")
