"""Another bundle of the same model reads prompts: what it computes is what is decoded from. Bundles of other models are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner

from headfold.export.bundle.pipeline import CacheCalibration, ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.cli import main
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.export.quantization.rounding import WeightRounding
from headfold.plugins.attention.schema import SCALES
from headfold.plugins.names import scale_name
from headfold.runtime import InputError, load
from headfold.runtime.errors import BundleError
from headfold.runtime.files.graph_file import cache_scales
from headfold.runtime.manifest import MODEL, QuantizationSpec, read_manifest
from headfold.runtime.scheduling.reading import check_reader

PROMPT = [int(token) for token in np.random.default_rng(5).integers(0, 300, 24)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


def exported(checkpoint: Path, path: Path, **options: Any) -> Path:
    export_bundle(open_exportable(checkpoint), path, ExportOptions(verify=False, **options), Reporter(quiet=True))
    return path


@pytest.fixture(scope="module")
def fast(toy_checkpoint, tmp_path_factory) -> Path:
    """The toy's model with inputs that are rounded, too."""
    weights = WeightRounding(scheme="w8a8", max_kl=100.0)
    return exported(toy_checkpoint, tmp_path_factory.mktemp("fast") / "fast", weights=weights)


@pytest.fixture(scope="module")
def pair(toy, fast):
    with load(toy.path, threads=1, prefill=fast) as model:
        yield model


@pytest.fixture(scope="module")
def alone(toy, fast):
    with load(toy.path, threads=1) as own, load(fast, threads=1) as reader:
        yield own.backend, reader.backend


def test_the_prompt_is_the_reader_s_and_what_follows_the_bundle_s_own(pair, alone) -> None:
    (own, reader), ids, active = alone, np.array(PROMPT), np.ones(1, np.bool_)
    cache, expected = pair.backend.new_cache(1, 30), reader.new_cache(1, 30)
    first = pair.backend.prefill(cache, 0, ids)
    np.testing.assert_array_equal(first, reader.prefill(expected, 0, ids))
    for one, other in zip(cache.host.read(0, 24), expected.host.read(0, 24), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first, own.prefill(own.new_cache(1, 30), 0, ids))  # they do differ
    continued = own.new_cache(1, 30)
    continued.host.write(0, expected.host.read(0, 24))
    continued.lengths[0] = 24
    for token in (3, 7):
        step = pair.backend.decode(cache, np.array([token]), active).copy()
        np.testing.assert_array_equal(step, own.decode(continued, np.array([token]), active))


@pytest.fixture(scope="module")
def narrow(toy_checkpoint, tmp_path_factory) -> Path:
    """The toy's model with a cache of int8."""
    return exported(
        toy_checkpoint, tmp_path_factory.mktemp("narrow") / "narrow", cache=CacheCalibration("int8", tokens=256)
    )


def test_a_cache_of_int8_is_filled_from_one_of_floats(narrow, fast, toy) -> None:
    """In two parts: the second one's past is what the first left, rounded."""
    initializers = ir.load(narrow / MODEL).graph.initializers
    scales = [initializers[scale_name(0, part)].const_value.numpy()[:, None, None] for part in SCALES]
    with (
        load(narrow, threads=1, prefill=toy.path) as model,
        load(narrow, threads=1) as alone,
        load(toy.path, threads=1) as floats,
    ):
        (cache, its_own, wide) = caches = [one.backend.new_cache(2, 30) for one in (model, alone, floats)]
        for part in (PROMPT[:9], PROMPT[9:]):
            first, expected, _ = (
                one.backend.prefill(cache, 1, np.array(part))
                for one, cache in zip((model, alone, floats), caches, strict=True)
            )
        assert list(cache.lengths) == [0, 24]
        assert not any(part.any() for part in cache.host.read(0, 24))  # the other row
        found = cache.host.read(1, 24)
        for part, exact, scale in zip(found[:2], wide.host.read(1, 24)[:2], scales, strict=True):
            np.testing.assert_array_equal(part, np.clip(np.rint(exact / scale), -128, 127))  # of the first layer
        # Its own are rounded before they are seen
        for one, other in zip(found, its_own.host.read(1, 24), strict=True):
            assert one.dtype == np.int8
            assert np.abs(one.astype(int) - other).max() <= 3
        np.testing.assert_allclose(first, expected, atol=0.05)
        answers = [one.generate(PROMPT, **OPTIONS).token_ids for one in (model, alone)]
        assert answers[0] == answers[1]
    with load(narrow, threads=1, prefill=fast) as model:  # several at a time, and kept ones
        assert len(model.generate([PROMPT, PROMPT[:5]], reuse=True, **OPTIONS)) == 2
        assert model.generate([*PROMPT, 4], reuse=True, **OPTIONS).cached_tokens > 20


def test_scales_that_are_none_are_refused(narrow, toy, tmp_path) -> None:
    for change in (lambda x: x * np.nan, lambda x: x[:1], lambda x: -x):
        model = ir.load(narrow / MODEL)
        value = model.graph.initializers[scale_name(1, SCALES[0])]
        value.const_value = ir.tensor(change(value.const_value.numpy()))
        ir.save(model, tmp_path / MODEL)
        with pytest.raises(BundleError, match="no scale for each of 2 heads"):
            cache_scales(tmp_path / MODEL, [2] * toy.decoder.config.num_hidden_layers)


def test_threads_of_neither_wait_where_the_other_s_compute(pair) -> None:
    for session in (pair.session, pair.backend._reader.session):
        assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_logits_of_all_tokens_are_the_bundle_s_own(pair, alone) -> None:
    own, ids = alone[0], np.array(PROMPT[:5])
    found, expected = (
        backend.prefill(backend.new_cache(1, 8), 0, ids, all_logits=True) for backend in (pair.backend, own)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_reader_that_computes_the_same_changes_no_answer(toy, make_toy) -> None:
    """Prompts one after the other, several at a time, kept ones, and checked guesses; against the decoder without a cache."""
    with load(make_toy(all_logits=True).path, threads=1, prefill=toy.path) as model:
        prompts = [PROMPT, PROMPT[:3], [*PROMPT, 9, 8]]
        answers = model.generate(prompts, reuse=True, speculate=True, **OPTIONS)
        assert [answer.token_ids for answer in answers] == [toy.greedy(ids, 8) for ids in prompts]
        assert model.generate([*PROMPT, 4], reuse=True, **OPTIONS).cached_tokens > 20


def test_what_a_pair_has_saved_is_the_pair_s(pair, toy, tmp_path) -> None:
    path = tmp_path / "prompt.safetensors"
    pair.cache_state.save(path, PROMPT)
    pair.cache_state.load(path)
    with load(toy.path, threads=1) as model:
        with pytest.raises(InputError, match="is of another bundle"):
            model.cache_state.load(path)
        model.cache_state.save(path, PROMPT)
    with pytest.raises(InputError, match="is of another bundle"):
        pair.cache_state.load(path)


def test_other_weights_are_refused(toy, toy_checkpoint, tmp_path) -> None:
    given = open_checkpoint(toy_checkpoint)
    tensors = {name: given.read(name) for name in given.shapes()}
    name = next(name for name in tensors if name.endswith("v_proj.weight"))
    tensors[name] = tensors[name].flip(0)
    save_hf(tmp_path / "other", MemoryCheckpoint(tmp_path, given.config, tensors), torch.float32)
    reader = exported(tmp_path / "other", tmp_path / "reader")
    with pytest.raises(InputError, match="reader: computes other keys and values: its weights are of another model"):
        load(toy.path, threads=1, prefill=reader)


QUANTIZATION = QuantizationSpec(dtype="int8", calibration_tokens=1, kl=0.0, top1=1.0)


@pytest.mark.parametrize(
    ("changes", "of_cache", "what"),
    [
        (
            {"config": {"norm_eps": 0.5}},
            {},
            "reader: its norm_eps is 0.5, that of bundle 1e-06: it is of another model",
        ),
        ({"dtype": "float16"}, {}, "reader: its dtype is float16"),
        ({"vocab_size": 7}, {}, "reader: its vocab_size is 7"),
        ({"road": "transformers"}, {}, "reader: its road is transformers"),
        ({}, {"head_dim": 8}, "reader: its head_dim is 8"),
        ({}, {"capacity": 32}, "reader: has a capacity of 32 tokens, less than the 64 of bundle"),
        ({}, {"quantization": QUANTIZATION}, "reader: reads prompts into a quantized cache, whose scales are its own"),
    ],
)
def test_what_manifests_tell(changes, of_cache, what, toy) -> None:
    own = read_manifest(toy.path)
    changes = {name: own.config | value if name == "config" else value for name, value in changes.items()}
    other = own.model_copy(update={"cache": own.cache.model_copy(update=of_cache), **changes})
    check_reader(Path("bundle"), own, Path("reader"), own)
    with pytest.raises(InputError, match=what) as error:
        check_reader(Path("bundle"), own, Path("reader"), other)
    assert error.value.exit_code == 2
    if "quantization" in of_cache:
        check_reader(Path("bundle"), other, Path("reader"), own)


@pytest.mark.parametrize("engine", [{"provider": "cuda"}, {"backend": "tensorrt"}])
def test_only_on_cpus(engine, toy) -> None:
    with pytest.raises(InputError, match="only with ONNX Runtime on the CPU"):
        load(toy.path, prefill=toy.path, **engine)


def test_on_the_command_line(toy, make_toy) -> None:
    same = make_toy(all_logits=True).path
    words = ["the quick", "-n", "8", "--threads", "1"]
    plain, read = (
        CliRunner().invoke(main, ["generate", str(toy.path), *words, *more]) for more in ([], ["--prefill", str(same)])
    )
    assert (read.exit_code, read.stdout) == (0, plain.stdout)
    talk = CliRunner().invoke(main, ["chat", str(toy.path), "--prefill", str(same), *words[1:]], input="the fox\n")
    assert talk.exit_code == 0
    refused = CliRunner().invoke(main, ["generate", str(toy.path), "--prefill", "/nowhere", *words])
    assert refused.exit_code == 2
    assert "/nowhere: no such bundle directory" in refused.stderr
