"""Models that cannot become a bundle, by either road: one line that names what and where, exit code 2, and nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from own_modules import Attending, Plain, heads, joined
from random_transformers import random_model, save_random
from safetensors.torch import load_file, save_file
from torch import nn

from headfold.export import ExportOptions, ModuleFacts, export_module
from headfold.export.bundle.pipeline import export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.plugins.torch import attention
from headfold.runtime.errors import HeadfoldError

OPTIONS, FACTS = ExportOptions(decode_steps=2, verify=False), ModuleFacts(max_position_embeddings=64)
Maker = Callable[[Path], Path | nn.Module]


def made(model: str, config: str, **fields: Any) -> Maker:
    """A directory of a class of transformers, tiny."""

    def make(place: Path) -> Path:
        getattr(transformers, model)(getattr(transformers, config)(**SIZES | fields)).save_pretrained(place)
        return place

    return make


def config(**fields: Any) -> Maker:
    """A directory of a good model whose config.json is changed; None takes a field out."""

    def make(place: Path) -> Path:
        file = save_random("arcee", place) / "config.json"
        content = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return place

    return make


def weights(change: Callable[[dict[str, torch.Tensor]], object], **fields: Any) -> Maker:
    """A directory of a good model whose weights are changed."""

    def make(place: Path) -> Path:
        file = save_random("arcee", place, **fields) / "model.safetensors"
        content = load_file(file)
        change(content)
        save_file(content, file, metadata={"format": "pt"})
        return place

    return make


SIZES = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
VISION = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": None}
LATENT |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 3}
MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
THETA = {"rope_type": "default"}
UP, EMBEDDING = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
DIRECTORIES: dict[str, tuple[Maker, str]] = {
    "a state beside the cache": (made("MambaForCausalLM", "MambaConfig", state_size=8), "mamba has a state beside"),
    "latent attention": (
        made("DeepseekV3ForCausalLM", "DeepseekV3Config", **LATENT, v_head_dim=16),
        "DeepseekV3Attention: attends to other keys and values than it caches",
    ),
    "values of another size": (
        made("DeepseekV3ForCausalLM", "DeepseekV3Config", **LATENT, v_head_dim=12),
        "DeepseekV3Attention: has values of size 12 and keys of size 16",
    ),
    "ALiBi": (made("BloomForCausalLM", "BloomConfig", n_head=3), "bloom attends by code of its own"),
    "ALiBi, and it fails": (made("MptForCausalLM", "MptConfig", **MPT), "mpt attends by code of its own"),
    "ALiBi, by its configuration": (
        made("FalconForCausalLM", "FalconConfig", alibi=True),
        "falcon attends by code of its own",
    ),
    "both directions": (made("BertForMaskedLM", "BertConfig"), "BertSelfAttention: attends in both directions"),
    "an encoder": (made("T5ForConditionalGeneration", "T5Config", d_kv=16, d_ff=64), "t5 has an encoder"),
    "images": (made("ViTModel", "ViTConfig", **VISION), "vit is no causal language model in transformers"),
    "images and text": (
        made(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            vision_config=VISION | {"model_type": "clip_vision_model"},
            text_config=SIZES | {"model_type": "llama"},
        ),
        "llava is no causal language model in transformers. Save its language model alone",
    ),
    "a classifier": (
        made("GemmaForSequenceClassification", "GemmaConfig", head_dim=16, num_key_value_heads=3),
        "unexpected tensors: score.weight. They are of a GemmaForSequenceClassification",
    ),
    "remote code": (
        config(model_type="new", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        "the model is code of its own, beside its weights. Give --trust-remote-code",
    ),
    "no model_type": (config(model_type=None), "model_type is missing"),
    "an unknown model_type": (config(model_type="llamax"), "cannot read its configuration"),
    "a base without an end": (config(rope_parameters=THETA | {"rope_theta": float("inf")}), "rope_theta is inf"),
    "a base that float32 has not": (config(rope_parameters=THETA | {"rope_theta": 1e39}), "rope_theta is 1e+39"),
    "an epsilon that float32 has not": (config(rms_norm_eps=1e39), "config.json: rms_norm_eps is 1e+39"),
    "an epsilon that is no number": (config(rms_norm_eps=float("nan")), "config.json: rms_norm_eps is nan"),
    "an epsilon that transformers spells": (config(rms_norm_eps={"__float__": "NaN"}), "rms_norm_eps is nan"),
    "a million layer types": (config(layer_types=["full_attention"] * 10**6), "layer_types has 1,000,000 items"),
    "positions that no table has": (config(max_position_embeddings=10**18), "max_position_embeddings is 1000000000"),
    "an impossible size": (config(num_attention_heads=0), "cannot read its configuration: ZeroDivisionError"),
    "a missing tensor": (weights(lambda t: t.pop(UP)), f"missing tensors: {UP}"),
    "an extra tensor": (weights(lambda t: t.update(extra=torch.ones(2))), "unexpected tensors: extra"),
    "a wrong shape": (weights(lambda t: t.update({UP: t[UP][:8].clone()})), f"mismatched tensors: {UP}"),
    "integers for weights": (
        weights(lambda t: t.update({UP: t[UP].int()})),
        f"tensor {UP} is of int32, and no float",
    ),
    "an unknown activation": (config(hidden_act="zork"), "no arcee can be made of its configuration: KeyError: 'zork'"),
    "more positions than there are": (config(max_position_embeddings=10**15), "max_position_embeddings is 1000000"),
    "a table of RoPE that nobody has": (
        config(rope_parameters={"rope_type": "zork"}),
        "no arcee can be made of its configuration: KeyError: 'zork'",
    ),
    "a RoPE of the text's length": (
        config(rope_parameters=THETA | {"rope_type": "dynamic", "factor": 2.0}),
        "its RoPE (dynamic) depends on the length of the text. headfold exports RoPE that does not",
    ),
    "another head than the embedding that it is": (
        weights(lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}), tie_word_embeddings=True),
        "lm_head.weight differs from the embedding, though tie_word_embeddings is true. Set tie_word_embeddings",
    ),
    "NaN": (weights(lambda t: t[UP].fill_(float("nan"))), f"tensor {UP} holds NaN or infinity"),
}


def attends(**methods: Any) -> Maker:
    """A module whose attention does something else."""
    return lambda _: Plain(type("Attending", (Attending,), methods))


def module(change: Callable[[Plain], object] = lambda _: None, **methods: Any) -> Maker:
    """A module that is changed, or some of its methods."""

    def make(_: Path) -> nn.Module:
        made = type("Plain", (Plain,), methods)()
        change(made)
        return made

    return make


def by_hand(self, q, k, v, cache, layer):
    return (q @ k.transpose(2, 3)).tril().softmax(-1) @ v


def not_in_the_last(self, q, k, v, cache, layer):
    return (
        attention(q, k, v, cache, layer)
        if layer == 0
        else F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
    )


def many_values(self, x, cache, layer):
    return self.o(
        joined(attention(heads(self.q(x)), heads(self.kv(x))[:, :1], heads(self.kv(x), 8)[:, :1], cache, layer))
    )


class Torchs(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(32, 2, batch_first=True)

    def forward(self, x, cache, layer):
        return super().forward(x, x, x)[0]


def by_value(self, input_ids, positions, cache=None):
    return Plain.forward(self, input_ids, positions, cache) * (1 if input_ids.sum() > 9 else 2)


def by_token(self, input_ids, positions, cache=None):
    logits = Plain.forward(self, input_ids, positions, cache)
    return torch.stack([logits[:, token] for token in range(input_ids.shape[1])], 1)


class PeftModel(nn.Module):
    pass


MODULES: dict[str, tuple[Maker, str]] = {
    "torch's attention": (lambda _: Plain(Torchs), "Plain.layers.0.attending: attends without headfold's op"),
    "attention by hand": (attends(attend=by_hand), "Plain.layers.0.attending: attends without headfold's op"),
    "the op in some layers": (attends(attend=not_in_the_last), "Plain.layers.1.attending: attends without"),
    "no attention": (attends(attend=lambda *x: x[1]), "Plain: never attends through headfold's op"),
    "one layer's cache for all": (
        attends(attend=lambda self, q, k, v, cache, _: attention(q, k, v, cache, 0)),
        "Plain.layers.1.attending: attends in layer 0 again",
    ),
    "numbers with gaps": (
        attends(attend=lambda self, q, k, v, cache, layer: attention(q, k, v, cache, 2 * layer)),
        "Plain: attends in layers [0, 2]",
    ),
    "values of a size of their own": (
        attends(forward=many_values),
        "Plain.layers.0.attending: does not run: attention takes",
    ),
    "a choice by value": (module(forward=by_value), "Plain: decides by values that it computes"),
    "a loop over tokens": (module(forward=by_token), "Plain: torch cannot export it as one graph"),
    "a tensor that is no buffer": (
        attends(
            attend=lambda self, q, k, v, cache, layer: attention(q * torch.ones(16, device="cpu"), k, v, cache, layer)
        ),
        "Plain.layers.0.attending: has tensors that are neither parameters nor buffers",
    ),
    "numbers in its code": (
        attends(attend=lambda self, q, k, v, cache, layer: attention(q * torch.tensor(0.5), k, v, cache, layer)),
        "Plain.layers.0.attending: makes a tensor of numbers while it runs",
    ),
    "another forward": (module(forward=lambda self, input_ids: input_ids), "Plain: does not run"),
    "no logits": (module(forward=lambda self, i, p, c: (Plain.forward(self, i, p, c),)), "makes tuple"),
    "a classifier of ones own": (
        module(forward=lambda self, i, p, c: Plain.forward(self, i, p, c)[:, -1]),
        "Plain: of 1 x 31 tokens it makes [1, 60]",
    ),
    "a parameter that nothing reads": (
        module(lambda m: setattr(m, "spare", nn.Linear(3, 3))),
        "Plain: its forward pass reads nothing of spare.weight, spare.bias",
    ),
    "integers": (
        module(lambda m: setattr(m, "step", nn.Parameter(torch.ones(1, dtype=torch.int8), False))),
        "Plain.step: is of int8",
    ),
    "weights without values": (module(lambda m: m.to("meta")), "Plain.embedding.weight: has no values"),
    "NaN in a module": (module(lambda m: m.head.bias.data.fill_(float("nan"))), "Plain: tensor head.bias holds NaN"),
    "an adapter that is not merged": (lambda _: PeftModel(), "PeftModel: has an adapter that is not merged"),
    "a head of another kind": (
        lambda _: transformers.AutoModelForSequenceClassification.from_config(random_model("arcee").config),
        "ArceeForSequenceClassification is no plain causal language model of its configuration: lm_head.weight",
    ),
    "an epsilon that is no number, in memory": (
        lambda _: random_model("arcee", rms_norm_eps=float("nan")),
        "rms_norm_eps is nan",
    ),
}


def check(export: Callable[[Path], object], message: str, place: Path) -> None:
    place.mkdir()
    with pytest.raises(HeadfoldError) as caught:
        export(place / "bundle")
    line = str(caught.value)
    assert message in line
    assert caught.value.exit_code == 2
    assert caught.value.fix is not None
    assert line.endswith(".")
    assert "\n" not in line
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("case", [*DIRECTORIES, *MODULES])
def test_a_line_says_what_and_nothing_is_left(case, tmp_path) -> None:
    make, message = (DIRECTORIES | MODULES)[case]
    model = make(tmp_path / "model")

    def export(output: Path) -> None:
        if isinstance(model, Path):
            export_bundle(open_exportable(model), output, OPTIONS, Reporter(quiet=True))
        else:
            facts = None if isinstance(model, transformers.PreTrainedModel) else FACTS
            export_module(model, output, facts, options=OPTIONS)

    check(export, message, tmp_path / "out")


def test_a_machine_without_transformers(tmp_path, monkeypatch) -> None:
    model = save_random("arcee", tmp_path / "model")
    monkeypatch.setattr("headfold.export.exportables.opening.find_spec", lambda _: None)
    check(lambda _: open_exportable(model), "transformers is not installed. Install it: pip install", tmp_path / "out")


def test_facts_are_asked_for_where_they_are_needed(tmp_path) -> None:
    check(lambda out: export_module(Plain(), out), "Plain: does not tell how many tokens", tmp_path / "a")
    check(lambda out: export_module(random_model("arcee"), out, FACTS), "has its facts. Give no facts", tmp_path / "b")
    check(lambda out: export_module(Plain(), out, FACTS, tokenizer=tmp_path), "has no tokenizer.json", tmp_path / "c")
    check(lambda out: export_module(Plain(), out, {}), "facts: is a dict. Give ModuleFacts(...).", tmp_path / "d")
    check(lambda out: export_module(Plain(), out, FACTS, options={}), "options: is a dict. Give Export", tmp_path / "e")
    for name, value in (("max_position_embeddings", 64.0), ("max_position_embeddings", 10**12), ("eos_token_id", 5)):
        with pytest.raises(HeadfoldError, match=f"ModuleFacts.{name}: is {value}"):
            ModuleFacts(**{"max_position_embeddings": 64, name: value})
    facts = ModuleFacts(max_position_embeddings=64, eos_token_id=(99999,))
    check(lambda out: export_module(Plain(), out, facts), "its facts name token 99999", tmp_path / "g")
