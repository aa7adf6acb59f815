"""LoRA directories as peft writes them come out as what peft merges; an adapter of something else is refused in one line."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from quantized_weights import gptq
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from headfold.export.bundle.inspection import inspect_path
from headfold.export.checkpoints.directories import hub
from headfold.export.checkpoints.directories.lora import product
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.runtime.errors import CheckpointError, HeadfoldError

ADAPTER = "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, directory: Path, **options: Any) -> dict[str, Tensor]:
    """Random numbers in every part of an adapter, saved by peft; the tensors after peft has merged them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(directory)
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), directory
    ).merge_and_unload()
    return dict(merged.state_dict())


@pytest.fixture
def base(toy_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_checkpoint, tmp_path / "base")
    return tmp_path / "base"


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 12, "target_modules": ATTENTION},
    "everything, rank-stabilized": {"r": 3, "lora_alpha": 8, "target_modules": EVERY, "use_rslora": True},
    "ranks and alphas by pattern": {
        "r": 4,
        "target_modules": EVERY,
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 3, "^model.layers.0.mlp.up_proj": 40},
    },
    "DoRA": {"r": 4, "lora_alpha": 12, "target_modules": EVERY, "use_dora": True},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "the head and norms in whole": {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
    "biases": {"r": 4, "target_modules": ATTENTION, "bias": "lora_only"},
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_merges_what_peft_merges(case, base, tmp_path, memory_checkpoint) -> None:
    if case == "biases":
        config = open_checkpoint(base).config
        shutil.rmtree(base)
        save_hf(base, memory_checkpoint(replace(config, qkv_bias=True, output_bias=True)), torch.float32)
    merged = make_adapter(base, tmp_path / "adapter", **CONFIGURATIONS[case])
    checkpoint, plain = open_checkpoint(tmp_path / "adapter"), open_checkpoint(base)
    assert set(checkpoint) == set(merged) == set(plain)
    touched = 0
    for name in checkpoint:
        ours = checkpoint.read(name)
        torch.testing.assert_close(ours, merged[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        touched += not torch.equal(ours, plain.read(name))
    assert touched == sum(not torch.equal(merged[name], plain.read(name)) for name in plain) > 0


def test_says_what_it_is_an_adapter_of(base, tmp_path) -> None:
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    facts = inspect_path(tmp_path / "adapter")
    assert facts["adapter"] == f"LoRA of rank 4 over {base}"
    assert facts["model_type"] == "llama"


def test_the_product_is_exact_whatever_the_order() -> None:
    random = torch.Generator().manual_seed(0)
    b, a = (
        torch.randn(shape, generator=random) * 1e3 ** torch.randn(shape, generator=random)
        for shape in ((40, 24), (24, 30))
    )
    sums = [[math.fsum(float(x) * float(y) for x, y in zip(row, column, strict=True)) for column in a.T] for row in b]
    right = torch.tensor(sums, dtype=torch.float64)
    ours = product(b, a)
    largest = b.abs().amax(1, keepdim=True) * a.abs().amax(0, keepdim=True)
    assert ((ours - right).abs() <= 24 * 2.0**-38 * largest).all()
    shuffled = torch.randperm(24, generator=random)
    assert torch.equal(ours, product(b[:, shuffled], a[shuffled]))
    pieces = torch.cat([product(row[None], a) for row in b])
    assert torch.equal(ours, pieces)


def test_of_a_quantized_base(base, tmp_path) -> None:
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    plain = open_checkpoint(tmp_path / "adapter").read(f"{name}.weight") - tensors[f"{name}.weight"]
    parts, floats = gptq(4, 16, False, 1, False)(tensors.pop(f"{name}.weight"))
    tensors |= {name + suffix: part for suffix, part in parts.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    configure(base, "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})
    checkpoint = open_checkpoint(tmp_path / "adapter")
    torch.testing.assert_close(checkpoint.read(f"{name}.weight"), floats + plain, rtol=1e-6, atol=1e-6)
    assert checkpoint.quantized(f"{name}.weight") is None


def test_the_base_is_found_beside_the_adapter_named_or_on_the_hub(base, tmp_path, monkeypatch) -> None:
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    right = open_checkpoint(tmp_path / "adapter").read("model.layers.0.self_attn.q_proj.weight")

    def same(**options: Any) -> bool:
        found = open_checkpoint(tmp_path / "adapter", **options)
        return torch.equal(found.read("model.layers.0.self_attn.q_proj.weight"), right)

    configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path="../base")
    assert same()
    configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path="nowhere/to/be/found")
    with pytest.raises(CheckpointError, match=r"its base nowhere/to/be/found is not there.*--base DIR"):
        same()
    assert same(base=base)
    configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path="org/toy", revision="abc")
    asked = []

    def fake(name: str, revision: str | None = None, **_: Any) -> str:
        asked.append((name, revision))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert same()
    assert asked == [("org/toy", "abc")]
    monkeypatch.setattr(hub, "shards_of", None)
    with pytest.raises(CheckpointError, match=r"is no adapter, and needs no base"):
        open_checkpoint(base, base)


def test_tokenizer_files_of_the_adapter_win(base, tmp_path) -> None:
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("its own")
    files = open_checkpoint(tmp_path / "adapter").tokenizer.files
    assert files["chat_template.jinja"] == b"its own"
    assert files["tokenizer.json"] == open_checkpoint(base).tokenizer.files["tokenizer.json"]


def configure(directory: Path, file: str, **changes: Any) -> None:
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    return lambda path: configure(path, "adapter_config.json", **changes)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def edit(path: Path) -> None:
        content = load_file(path / ADAPTER)
        change(content)
        save_file(content, path / ADAPTER, metadata={"format": "pt"})

    return edit


def to_pickle(path: Path) -> None:
    (path / ADAPTER).rename(path / "adapter_model.bin")


def base_is_an_adapter(path: Path) -> None:
    shutil.copytree(path, path.parent / "other")
    configure(path, "adapter_config.json", base_model_name_or_path="../other")


def smaller_base(path: Path) -> None:
    configure(path.parent / "base", "config.json", tie_word_embeddings=False)
    content = load_file(path.parent / "base" / "model.safetensors")
    content = {name: x for name, x in content.items() if "layers.1" not in name}
    save_file(content, path.parent / "base" / "model.safetensors", metadata={"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
BAD: dict[str, tuple[Change, str]] = {
    "a pickle": (to_pickle, "has only adapter_model.bin, and pickles are never loaded"),
    "no tensors": (lambda path: (path / ADAPTER).unlink(), "has no adapter_model.safetensors"),
    "damaged": (lambda path: (path / ADAPTER).write_bytes(b"\0" * 40), "adapter_model.safetensors: is damaged"),
    "another kind": (config(peft_type="IA3"), "is an adapter of type 'IA3'"),
    "rank 0": (config(r=0), "r is 0"),
    "biases of its own": (config(lora_bias=True), "lora_bias is True, which headfold does not merge"),
    "whole parameters": (config(target_parameters=["experts"]), "target_parameters is ['experts']"),
    "the base changed at first": (config(init_lora_weights="pissa"), "'pissa', which changes the base too"),
    "no pattern": (config(rank_pattern={"(": 3}), "'(' is no pattern"),
    "an endless pattern": (config(alpha_pattern={"(a+)+b": 3}), "is a pattern that can take for ever"),
    "no base": (config(base_model_name_or_path=None), "does not say what it is an adapter of"),
    "a base that is one too": (base_is_an_adapter, "is an adapter too"),
    "a base with fewer layers": (smaller_base, "it changes model.layers.1.self_attn"),
    "a base of another size": (
        tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 40)})),
        "instead of [4, 48]",
    ),
    "another rank": (config(r=8), "instead of [8, 48]"),
    "nothing": (tensors(lambda t: t.clear()), "has no tensors"),
    "half a pair": (tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), "self_attn.q_proj has no lora_B"),
    "DoRA without lengths": (config(use_dora=True), "has no lora_magnitude_vector"),
    "integers": (tensors(lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 48).int()})), "lora_A.weight is I32"),
    "another part": (tensors(lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(4)})), "is not one of LoRA's"),
    "a whole tensor of another size": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(4, 48)})),
        "its lm_head.weight is [4, 48], and that of its base [300, 48]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_one_line(case, base, tmp_path) -> None:
    change, message = BAD[case]
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=ATTENTION)
    change(tmp_path / "adapter")
    with pytest.raises(HeadfoldError) as caught:
        open_checkpoint(tmp_path / "adapter")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_tied_embedding_must_keep_it_tied(base, tmp_path) -> None:
    configure(base, "config.json", tie_word_embeddings=True)
    content = load_file(base / "model.safetensors")
    del content["lm_head.weight"]
    save_file(content, base / "model.safetensors", metadata={"format": "pt"})
    make_adapter(base, tmp_path / "adapter", r=4, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="in its base they are one tensor"):
        open_checkpoint(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / ADAPTER)
    for part in ("A", "B"):  # as peft writes it where it is told to keep them tied
        both = stored[f"base_model.model.model.embed_tokens.lora_embedding_{part}"]
        stored[f"base_model.model.lm_head.lora_{part}.weight"] = both.T.contiguous()
    save_file(stored, tmp_path / "adapter" / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="in its base they are one tensor"):
        open_checkpoint(tmp_path / "adapter")
    names = {name: f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
    saved = {name: torch.full((300, 48), 0.5) for name in names.values()}
    save_file(saved, tmp_path / "adapter" / ADAPTER, metadata={"format": "pt"})
    assert open_checkpoint(tmp_path / "adapter").read("model.embed_tokens.weight").eq(0.5).all()
    saved[names["lm_head"]] += 1
    save_file(saved, tmp_path / "adapter" / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="in its base they are one tensor"):
        open_checkpoint(tmp_path / "adapter")
