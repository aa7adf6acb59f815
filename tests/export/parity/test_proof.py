"""The proof is tested: faults of each kind are planted in each format and caught, and honest models are never refused.

A sample of both; all of it is `scripts/prove --all`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hub_cache import hub_snapshot
from proof_cases import (
    FAMILIES,
    FAULTS,
    FORMATS,
    QUIET,
    SMALL,
    Bundle,
    applies,
    caught,
    export,
    honest_model,
    prove,
    random_weights,
)

from headfold.export.bundle.pipeline import export_bundle
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.exportables.oracle import DecoderOracle, Past, QuantizedCache
from headfold.export.exportables.own import OwnModel
from headfold.export.exportables.transformers_road.transformers_oracle import oracle_of
from headfold.export.model.config import RopeConfig
from headfold.export.model.rope import rope_tables
from headfold.export.parity.exact.rotary import tables
from headfold.export.parity.exact.weights import prove_tables
from headfold.export.parity.verify import verify_bundle
from headfold.runtime.manifest import MODEL, read_manifest

SAMPLE = [  # each family and each format
    ("llama", "float32"),
    ("mistral", "float16"),
    ("qwen2", "bfloat16"),
    ("qwen3", "int8 cache"),
    ("headfold", "float32"),
]
Make = Callable[[str, str], Bundle]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A bundle of a family in a format, made once."""
    made: dict[tuple[str, str], Bundle] = {}

    def make(family: str, kind: str) -> Bundle:
        if (family, kind) not in made:
            directory, config = tmp_path_factory.mktemp("honest"), FAMILIES[family]
            made[family, kind] = export(directory, config, random_weights(config), FORMATS[kind])
        return made[family, kind]

    return make


@pytest.mark.parametrize(("family", "kind"), SAMPLE)
def test_an_honest_bundle_passes(family, kind, honest: Make) -> None:
    report = prove(honest(family, kind))
    assert report.passed, report.failure()
    assert report.first_bad_layer is None
    names = {check.name for check in report.checks}
    assert {"weights, bit for bit", "rotary tables, every position", "attributes", "decode, cache"} <= names
    assert {"each layer alone, a prompt", "each layer alone, at the end of the capacity"} <= names
    assert ("each layer alone, at a window's edge" in names) == bool(FAMILIES[family].sliding_layers)
    assert ("cache scales" in names) == (kind == "int8 cache")
    assert ("decode, in float16" in names) == (kind == "float16")
    theirs = find_spec("transformers") is not None and family != "headfold"
    assert ("of transformers" in report.oracle) == theirs


@pytest.mark.parametrize(("family", "kind"), [("llama", "float32"), ("mistral", "float16"), ("qwen3", "int8 cache")])
def test_a_bundle_of_links_into_a_hubs_cache_is_proven_too(family, kind, honest: Make, tmp_path) -> None:
    bundle = honest(family, kind)
    report = prove(replace(bundle, path=hub_snapshot(bundle.path, tmp_path)))
    assert report.passed, report.failure()


@pytest.mark.parametrize(
    ("family", "kind", "fault"), [(*case, fault) for case in SAMPLE for fault in FAULTS if applies(fault, *case)]
)
def test_a_planted_fault_is_caught(family, kind, fault, honest: Make, tmp_path) -> None:
    assert caught(honest(family, kind), FAULTS[fault], tmp_path / "planted") is not None


@pytest.mark.parametrize("seed", range(0, 60, 10))
def test_an_odd_but_honest_model_is_not_refused(seed, tmp_path) -> None:
    config, weights, options = honest_model(seed)
    report = prove(export(tmp_path, config, weights, options))
    assert report.passed, report.failure()


def test_the_first_wrong_layer_is_named(honest: Make, tmp_path) -> None:
    """Each layer is fed with what the oracle hands on, so those behind a wrong one are right."""
    report = caught(honest("llama", "float32"), FAULTS["mask off by one"], tmp_path / "planted")
    assert report is not None
    assert report.endswith(f"first bad layer {SMALL.num_hidden_layers - 1}")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_we_misread_is_seen_by_transformers(family, honest: Make, tmp_path) -> None:
    """A checkpoint of which we believe another RoPE, when exporting and when verifying: our own decoder would agree."""
    config = FAMILIES[family]
    checkpoint = open_checkpoint(honest(family, "float32").source)
    checkpoint.config = replace(config, rope=replace(config.rope, rope_theta=2 * config.rope.rope_theta))
    export_bundle(OwnModel(checkpoint), tmp_path / "misread", FORMATS["float32"], QUIET)
    manifest = read_manifest(tmp_path / "misread")
    report = verify_bundle(tmp_path / "misread", OwnModel(checkpoint), manifest, 4, QUIET)
    assert {check.name for check in report.checks if not check.passed} >= {"prefill", "decode"}
    assert report.first_bad_layer == 0


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "nonsense", ["float16"]])
def test_a_dtype_that_no_weight_has_is_not_asked_of_transformers(dtype, honest: Make, tmp_path) -> None:
    shutil.copytree(honest("llama", "float32").source, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": dtype}))
    oracle = oracle_of(open_checkpoint(tmp_path / "source"), torch.float32)
    assert (oracle is not None) == (dtype in ("int8", "float8_e4m3fn"))  # of the others it makes no configuration


@pytest.mark.parametrize("name", ["cos_cache", "sin_cache"])
def test_the_table_that_is_damaged_is_named(name, honest: Make) -> None:
    model, config = ir.load(honest("llama", "float32").path / MODEL), FAMILIES["llama"]
    value = model.graph.initializers[name]
    table = value.const_value.numpy().copy()
    table[3, 1] = np.nan
    value.const_value = ir.tensor(table)
    check = prove_tables(model, config, len(table), torch.float32)
    assert not check.passed
    assert check.worst == f"{name} at position 3"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_oracles_agree_after_any_past(family, stored, honest: Make) -> None:
    """Transformers' model and our decoder: whole, after a past beyond the window, with a quantized cache, and layer by layer."""
    config = FAMILIES[family]
    checkpoint = open_checkpoint(honest(family, "float32").source)
    ours, theirs = DecoderOracle(load_decoder(checkpoint, stored).float()), oracle_of(checkpoint, stored)
    assert theirs is not None
    heads, size = config.num_key_value_heads, config.head_dim
    codes = [tuple(torch.randint(-127, 128, (heads, 110, size)).float() for _ in range(2)) for _ in range(2)]
    scales = [(torch.rand(heads) / 40, torch.rand(heads) / 40) for _ in range(2)]
    cache = QuantizedCache("int8", scales)
    tokens = np.arange(3, 9)
    given = [np.random.default_rng(i).normal(size=(6, config.hidden_size)).astype(np.float32) for i in range(2)]
    for past, stored_as, handed in (
        (None, None, None),
        (Past([(k / 40, v / 40) for k, v in codes]), None, None),
        (Past(codes), cache, given),
    ):
        right, answer = (oracle.answer(tokens, past, handed, stored_as) for oracle in (ours, theirs))
        np.testing.assert_allclose(answer.logits, right.logits, atol=2e-4 * np.abs(right.logits).max())
        for x, y in zip(answer.hidden_states, right.hidden_states, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max())
        for layer, expected in zip(answer.cache, right.cache, strict=True):
            for x, y in zip(layer, expected, strict=True):
                assert np.abs(x - y).max() <= (1 if stored_as is not None else 1e-4 * np.abs(y).max())


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(rope_theta=5e6, partial_rotary_factor=0.5),
        RopeConfig(rope_type="linear", factor=4.0),
        RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=64),
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            truncate=False,
            mscale=0.7,
            mscale_all_dim=1.0,
        ),
    ],
    ids=str,
)
def test_rotary_tables_by_the_papers(rope) -> None:
    """Float32 tables are within the limit at all of 9,000 positions, and those of theta x 1.001 are not."""
    config = replace(SMALL, head_dim=64, rope=rope)
    wrong = replace(config, rope=replace(rope, rope_theta=1.001 * rope.rope_theta))
    cos, sin = (table.double().numpy() for table in rope_tables(config, 9000))
    bad = rope_tables(wrong, 9000)[0].double().numpy()
    seen = False
    for begin, right_cos, right_sin, unsure in tables(rope, config.rotary_dim, 9000):
        end = begin + len(right_cos)
        assert (np.abs(cos[begin:end] - right_cos) <= unsure).all()
        assert (np.abs(sin[begin:end] - right_sin) <= unsure).all()
        seen |= bool((np.abs(bad[begin:end] - right_cos) > 100 * unsure).any())
    assert seen
