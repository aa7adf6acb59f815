"""Vocabularies in GGUF files, split files and damaged ones; what the tokenizers should do is llama.cpp's and transformers' word."""

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.gguf.tokenizer import tokenizer_files
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.exportables.opening import open_exportable
from headfold.runtime.errors import CheckpointError
from tests.export.checkpoints.test_gguf import write

BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))] + [chr(256 + n) for n in range(68)]


def byte_level(pre: str, words: tuple[str, ...] = (), merges: tuple[str, ...] = (), **more: Any) -> Tokenizer:
    tokens = [*BYTES, *words, "<s>", "</s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }
    return Tokenizer.from_buffer(tokenizer_files(Path("m.gguf"), metadata, 64).files["tokenizer.json"])


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_begins_with_bos_and_takes_a_word_that_no_merge_builds(pre) -> None:
    tokenizer = byte_level(pre, words=("hello",))
    assert tokenizer.encode("hello").tokens == ["<s>", "hello"]
    assert byte_level(pre, words=("hello",), add_bos_token=False).encode("hello").tokens == ["hello"]


def test_others_merge_and_begin_with_what_they_begin_with() -> None:
    assert byte_level("qwen2", words=("he",), merges=("h e",)).encode("hey").tokens == ["he", "y"]
    assert byte_level("gpt-2", words=("hello",)).encode("hello").tokens == list("hello")


def test_a_merge_whose_product_is_no_token_merges_nothing() -> None:
    tokenizer = byte_level("gpt-2", words=("he",), merges=("h e", "l l", "he y"))
    assert tokenizer.encode("hell").tokens == ["he", "l", "l"]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "Hi 12345!", ["Hi", "Ġ", "123", "45", "!"]),
        ("deepseek-llm", "Hi 123, a\U0001d400\n", ["Hi", "Ġ", "123", ",", "Ġa", "ðĿĲĢ", "Ċ"]),
        ("deepseek-coder", "a  12\nb", ["a", "ĠĠ", "1", "2", "Ċ", "b"]),
        ("deepseek-v3", "ab 1234", ["ab", "Ġ", "123", "4"]),
        ("deepseek-r1-qwen", "ab 12", ["ab", "Ġ", "1", "2"]),
    ],
)
def test_text_is_cut_where_llama_cpp_cuts_it(pre, text, pieces) -> None:
    cut = byte_level(pre).pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


SPM = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "a", "b", "ab", "▁a", "▁ab", "c"]
SCORES = [0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -1.0, -13.0]


def sentencepiece() -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Tokenizer.from_buffer(tokenizer_files(Path("m.gguf"), metadata, 64).files["tokenizer.json"])


def test_sentencepiece_takes_the_best_piece_and_falls_back_on_bytes() -> None:
    tokenizer = sentencepiece()
    assert tokenizer.encode("ab ab").tokens == ["<s>", "▁ab", "▁ab"]
    assert tokenizer.encode("abc").tokens == ["<s>", "▁ab", "c"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é c").ids) == "ab é c"


def test_sentencepiece_is_the_tokenizer_that_transformers_converts_it_to() -> None:
    """LlamaConverter of transformers, spelled out: merges by score, bytes to fall back on, a space before the text."""
    known = {token: i for i, token in enumerate(SPM)}
    pairs = [
        (SCORES[known[piece]], piece[:cut], piece[cut:])
        for piece in SPM[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    merges = [(a, b) for _, a, b in sorted(pairs, key=lambda pair: -pair[0])]
    theirs = Tokenizer(models.BPE(vocab=known, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ours = sentencepiece()
    for text in ("ab", "a b  c", "xyz", "bab aab"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids


def small(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("which", [1, 2])
def test_all_parts_of_a_split_model_are_looked_for(which, tmp_path) -> None:
    path = tmp_path / f"m-0000{which}-of-00002.gguf"
    small(path)
    with pytest.raises(CheckpointError, match=rf"is one of 2 parts, and m-0000{3 - which}-of-00002\.gguf is missing"):
        open_checkpoint(path)


def in_parts(path: Path, checkpoint: MemoryCheckpoint) -> list[Path]:
    """As the gguf package splits files."""
    whole, folder = gguf.GGUFReader(write(path / "whole.gguf", checkpoint, "llama")), path / "parts"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=12)
    for name, field in whole.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_all_parts_of_a_split_model_are_read_whichever_is_named(which, config, memory_checkpoint, tmp_path) -> None:
    checkpoint = memory_checkpoint(config)
    parts = in_parts(tmp_path, checkpoint)
    assert len(parts) == 3
    read = open_checkpoint(parts[which])
    assert all(torch.equal(read.read(name), checkpoint.read(name)) for name in checkpoint)


@pytest.mark.parametrize("which", [0, 1])
def test_a_part_under_another_name_is_named_as_a_part(which, config, memory_checkpoint, tmp_path) -> None:
    path = in_parts(tmp_path, memory_checkpoint(config))[which].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf: is one of 3 parts \(its split\.count\)"):
        open_exportable(path)


def test_a_pointer_of_git_lfs_is_named(tmp_path) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"is a pointer of Git LFS.*git lfs pull"):
        open_exportable(tmp_path / "m.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


DAMAGED = {
    "an array of 10^9 in 49 bytes": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 10**9),
    "a text longer than the file": struct.pack("<QQ", 0, 1) + struct.pack("<Q", 10**12),
    "10^15 tensors": struct.pack("<QQ", 10**15, 0),
    "10^15 fields": struct.pack("<QQ", 0, 10**15),
    "an array of arrays": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 1),
    "a type nobody knows": struct.pack("<QQ", 0, 1) + text("a") + struct.pack("<I", 99),
    "a tensor of 10^6 dimensions": struct.pack("<QQ", 1, 0) + text("t") + struct.pack("<I", 10**6),
    "nothing": b"",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused_at_once(case, tmp_path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + DAMAGED[case])
    with pytest.raises(CheckpointError, match="is no GGUF file, or a damaged one"):
        open_checkpoint(path)


def test_text_that_is_no_utf8_is_refused(tmp_path) -> None:
    field = text("general.name") + struct.pack("<IQ", 8, 2) + b"\xff\xff"
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(CheckpointError, match="has metadata that makes no sense"):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_special_token_that_is_none_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.eos_token_id is 9999, and no token"):
        byte_level("gpt-2", eos_token_id=9999)


def test_generation_stops_at_the_end_of_a_turn_too(config, memory_checkpoint, tmp_path) -> None:
    path = write(tmp_path / "m.gguf", memory_checkpoint(config), "llama")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            value = field.contents()
            writer.add_key_value(name, value, field.types[0])
    for name, token in (("eos", 5), ("eot", 7)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "n.gguf").config.eos_token_id == (5, 7)
