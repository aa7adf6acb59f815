"""What was computed of a text serves a model that is loaded anew; files that are anything else are refused."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from token_engine import TokenEngine, answer_to, ask, tokens_of

from headfold.runtime import BusyError, CapacityError, HeadfoldError, InputError, load
from headfold.runtime.scheduling.scheduler import Scheduler
from headfold.runtime.scheduling.slots import Slots

SYSTEM = np.random.default_rng(3).integers(0, 300, 40)
OPTIONS = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def saved(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "system.safetensors"
    with load(toy.path, threads=1) as model:
        assert model.cache_state.save(path, SYSTEM) == 40
    return path


def test_a_loaded_prompt_is_not_computed_again(saved, toy) -> None:
    turn = [*SYSTEM, 7, 8, 9]
    with load(toy.path, threads=1) as model:
        assert model.cache_state.load(saved) == 40
        answer = model.generate(turn, reuse=True, **OPTIONS)
        assert answer.cached_tokens == 40
        assert answer.token_ids == toy.greedy(turn, 8)
        assert model.status().prompt_tokens == 3
        assert model.generate(turn, **OPTIONS).cached_tokens == 0
        assert model.generate([*SYSTEM[:30], 5, 6], reuse=True, **OPTIONS).cached_tokens == 30


def test_in_another_process(saved, toy) -> None:
    code = """
import json, sys
from headfold.runtime import load
model = load(sys.argv[1], threads=1)
model.cache_state.load(sys.argv[2])
answer = model.generate(json.loads(sys.argv[3]), reuse=True, max_new_tokens=4, ignore_eos=True)
print(json.dumps([answer.token_ids, answer.cached_tokens]))
"""
    turn = [*map(int, SYSTEM), 1, 2]
    command = [sys.executable, "-c", code, str(toy.path), str(saved), json.dumps(turn)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found == [toy.greedy(turn, 4), 40]


def test_the_file_is_what_the_model_computed(saved, toy) -> None:
    """Read by safetensors itself, against the decoder's own cache."""
    import torch

    tensors = load_file(saved)
    assert tensors["token_ids"].tolist() == SYSTEM.tolist()
    cache = toy.decoder.new_cache(1, 40)
    kept = toy.decoder(torch.from_numpy(SYSTEM)[None], torch.ones(1, 40, dtype=torch.long), cache).cache
    for layer, (keys, values) in enumerate(kept):
        np.testing.assert_allclose(tensors[f"past_key_values.{layer}.key"], keys[0], atol=1e-5)
        np.testing.assert_allclose(tensors[f"past_key_values.{layer}.value"], values[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "is damaged"),
        (lambda content: content + b"\0", "is damaged"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "SHA-256"),
        (lambda content: content.replace(b'"tokens":"40"', b'"tokens":"41"'), "is damaged"),
        (lambda content: content.replace(b'"tokens":"40"', b'"tokens":"-1"'), "has 0 tokens"),
        (lambda content: content.replace(b'"tokens":"40"', b'"tokens":"99"'), "has 99 tokens, and 64 fit"),
        (lambda content: re.sub(rb'"bundle":".{4}', b'"bundle":"zzzz', content), "is of another bundle"),
        (lambda content: content.replace(b'"shape":[40]', b'"shape":[04]'), "is no saved cache"),
        (lambda content: content.replace(b'"F32"', b'"F16"'), "is damaged"),
        (lambda content: b"", "is no saved cache"),
        (lambda content: b"\xff" * 100, "is no saved cache"),
        (lambda content: (1 << 62).to_bytes(8, "little") + b"[" * 5000, "is no saved cache"),
    ],
)
def test_files_that_are_something_else(change, message, saved, toy, tmp_path) -> None:
    path = tmp_path / "changed"
    path.write_bytes(change(saved.read_bytes()))
    with load(toy.path, threads=1) as model, pytest.raises(InputError, match=message) as caught:
        model.cache_state.load(path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_saved_or_loaded(saved, toy, make_toy, tmp_path) -> None:
    with load(make_toy(dtype="float16").path, threads=1) as other, pytest.raises(InputError, match="another bundle"):
        other.cache_state.load(saved)
    with load(toy.path, threads=1, keep_bytes=100) as model:
        for job, kind, message in (
            (lambda: model.cache_state.load(saved), CapacityError, "more than the 100 bytes"),
            (lambda: model.cache_state.load(tmp_path / "none"), InputError, "cannot be read"),
            (lambda: model.cache_state.save(tmp_path / "no" / "place", [1]), InputError, "cannot be written"),
            (lambda: model.cache_state.save(tmp_path / "x", []), InputError, "the prompt is empty"),
        ):
            with pytest.raises(HeadfoldError, match=message) as caught:
                job()
            assert type(caught.value) is kind
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_takes_a_free_slot_and_disturbs_nobody() -> None:
    engine = TokenEngine(rows=2)
    scheduler = Scheduler(engine)
    ids = np.arange(1, 30)
    scheduler.keep(ids, [ids[None, :, None]])
    engine.hold()
    answers = ask(scheduler, [9, 9], new=6)
    engine.waits.wait()
    engine.turn.release(1000)
    assert tokens_of(answers) == [answer_to([9, 9], 6)]
    again = ask(scheduler, [*ids, 3, 4], new=6, reuse=True)
    assert tokens_of(again) == [answer_to([*ids, 3, 4], 6)]
    assert again.requests[0].cached_tokens == 28
    slots = Slots(engine.new_cache(1, 50), 1 << 30)
    assert slots.place(answers.requests[0])
    with pytest.raises(BusyError, match="all slots are in use"):
        slots.keep(ids, [ids[None, :, None]])
    with pytest.raises(InputError, match="GPU's memory"):
        Scheduler(TokenEngine(host=False)).keep(ids, [])
