"""The training loop: what a step computes, that a run resumes bit for bit, that it stops when it diverges, and several processes."""

import math
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from headfold.export.checkpoints.opening import open_checkpoint
from headfold.export.data.token_data import TokenData
from headfold.export.model.initialize import new_decoder
from headfold.export.training import loop as training
from headfold.export.training.evaluation import evaluate
from headfold.export.training.loop import train
from headfold.export.training.losses import objective
from headfold.export.training.options import TrainOptions
from headfold.export.training.state import checkpoints, latest, read_log
from headfold.runtime.errors import CheckpointError, DataError, InputError, TrainingError
from tests.export.conftest import TRAINED

OPTIONS = TrainOptions(steps=6, batch=4, sequence=16, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small spend their time waiting for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(toys) -> TokenData:
    return TokenData.from_ids(np.frombuffer((toys / "text.txt").read_bytes(), np.uint8))


def weights(decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in decoder.state_dict().items()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())


def test_losses_against_numpy():
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 2, 3, 11)).astype(np.float32)
    labels = generator.integers(0, 11, (2, 3))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    kl = (p * np.log(p / q)).sum(-1).mean()
    ce = -np.log(np.take_along_axis(q, labels[..., None], -1)).mean()
    tensors = torch.tensor(student), torch.tensor(labels), torch.tensor(teacher)
    for loss, expected in (("kl", kl), ("ce", ce), ("kl+ce", 0.7 * kl + 0.3 * ce)):
        assert objective(loss, *tensors, ce_weight=0.3).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_large_vocabulary_in_chunks_gives_the_same_loss_and_gradient(loss, monkeypatch):
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(3, 5, 7), torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    results = []
    for chunk in (1 << 26, 14):  # all at once; two tokens at a time, the last alone
        monkeypatch.setattr("headfold.export.training.losses._CHUNK", chunk)
        student = logits.clone().requires_grad_()
        value = objective(loss, student, labels, teacher)
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(results[0], results[1], atol=1e-7, rtol=1e-6)


def test_a_step_is_adamw_on_the_clipped_gradient(data):
    """Against torch's optimizer driven by hand; its matrices decay, norms do not."""
    decoder, mine = new_decoder(TRAINED, 0, 16), new_decoder(TRAINED, 0, 16)
    options = replace(OPTIONS, steps=3, clip=0.5, warmup=0.0)
    result = train(decoder, data, options)
    groups = [
        {"params": [p for p in mine.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in mine.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=False)
    for step, loss in enumerate(result.losses):
        rows = data.batch(0, step, 4, 16)
        value = F.cross_entropy(mine(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        assert loss == pytest.approx(value.item(), abs=1e-5)
        optimizer.zero_grad()
        value.backward()
        assert torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5) > 0.5
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        optimizer.step()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(decoder.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_schedule_warms_up_and_ends_where_asked():
    options = TrainOptions(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [options.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[55] == pytest.approx(0.6)  # halfway down the cosine
    assert rates[99] == pytest.approx(0.2, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[9:]))


def test_it_learns_from_text_and_from_a_teacher(data):
    options = replace(OPTIONS, steps=60, batch=8, sequence=32)
    training_data, held_out = data.split(0.1)
    taught = train(new_decoder(TRAINED, 0, 32), training_data, options, validation=held_out)
    assert taught.evaluations[0].loss == pytest.approx(math.log(257), abs=0.1)
    assert taught.evaluations[-1].loss < 2.5  # of letters; 5.5 at first
    assert taught.evaluations[-1].loss == pytest.approx(evaluate(taught.decoder, held_out, 32, 64), abs=1e-5)
    student = train(new_decoder(TRAINED, 1, 32), training_data, replace(options, loss="kl"), teacher=taught.decoder)
    assert student.losses[-1] < 0.5 * student.losses[0]


def test_accumulation_and_recomputed_activations_change_nothing_but_rounding(data):
    expected = train(new_decoder(TRAINED, 0, 16), data, OPTIONS)
    for other in (replace(OPTIONS, micro_batch=1), replace(OPTIONS, activation_checkpointing=True)):
        result = train(new_decoder(TRAINED, 0, 16), data, other)
        assert result.losses == pytest.approx(expected.losses, abs=1e-5)
        assert result.decoder(data.batch(0, 0, 1, 15)).logits.shape == (1, 16, 257)  # usable afterwards


def test_bfloat16_computes_in_it_and_keeps_weights_wide(data):
    expected = train(new_decoder(TRAINED, 0, 16), data, OPTIONS)
    result = train(new_decoder(TRAINED, 0, 16), data, replace(OPTIONS, bf16=True))
    assert result.losses != expected.losses
    assert result.losses == pytest.approx(expected.losses, abs=0.05)  # bfloat16's eps is 0.008
    assert {tensor.dtype for tensor in result.decoder.state_dict().values()} == {torch.float32}


def test_checkpoints_are_hugging_face_directories_and_only_some_are_kept(data, tmp_path):
    result = train(new_decoder(TRAINED, 0, 16), data, replace(OPTIONS, checkpoint_every=2), directory=tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000006"]
    checkpoint = open_checkpoint(latest(tmp_path / "run"))
    assert same({name: checkpoint.read(name) for name in checkpoint}, weights(result.decoder))
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["loss"] for line in lines] == result.losses
    assert lines[-1]["tokens"] == 6 * 4 * 16


def test_killed_ten_times_it_ends_bit_identical(data, tmp_path, monkeypatch):
    """kill -9 at random moments, also while a checkpoint is written."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the fork server's children
    context = multiprocessing.get_context("forkserver")  # it has torch imported, and never computed anything
    context.set_forkserver_preload(["headfold.export.training.loop", "torch._dynamo", "torch._inductor.config"])
    options = replace(OPTIONS, steps=40, checkpoint_every=2)

    def start(name: str) -> multiprocessing.Process:
        keywords = {"directory": tmp_path / name, "resume": True}
        process = context.Process(target=train, args=(new_decoder(TRAINED, 0, 16), data, options), kwargs=keywords)
        process.start()
        return process

    def steps() -> int:
        lines = read_log(tmp_path / "killed" / "log.jsonl")
        return lines[-1]["step"] if lines else 0

    whole = start("whole")
    generator = random.Random(0)
    for _ in range(10):
        process = start("killed")
        path = latest(tmp_path / "killed")
        target = (int(path.name[5:]) if path else 0) + generator.randint(1, 5)
        while steps() < target:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(generator.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start("killed")
    last.join()
    whole.join()
    assert (last.exitcode, whole.exitcode) == (0, 0)
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = (load_file(latest(tmp_path / name) / file) for name in ("whole", "killed"))
        assert same(first, second)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [(line["step"], line["loss"]) for line in logs[1]] == [(line["step"], line["loss"]) for line in logs[0]]
    assert not list((tmp_path / "killed").glob(".*"))  # what kills left half-written is gone


def poisoned(step: int, value: float):
    """The loss of one step is `value`."""
    original, calls = training.objective, [0]

    def replacement(*args):
        calls[0] += 1
        loss = original(*args)
        return loss * 0 + value if calls[0] == step else loss

    return replacement


@pytest.mark.parametrize(("value", "message"), [(math.nan, "the loss is nan"), (math.inf, "inf"), (30.0, "is a spike")])
def test_divergence_stops_with_the_last_good_checkpoint(data, tmp_path, monkeypatch, value, message):
    options = replace(OPTIONS, steps=14, checkpoint_every=5)
    monkeypatch.setattr(training, "objective", poisoned(12, value))
    with pytest.raises(TrainingError, match=message) as caught:
        train(new_decoder(TRAINED, 0, 16), data, options, directory=tmp_path / "run")
    assert caught.value.exit_code == 1
    assert "step 12: " in str(caught.value)
    assert "step-00000010" in str(caught.value)
    monkeypatch.undo()
    resumed = train(new_decoder(TRAINED, 0, 16), data, options, directory=tmp_path / "run", resume=True)
    assert same(weights(resumed.decoder), weights(train(new_decoder(TRAINED, 0, 16), data, options).decoder))


def test_a_run_resumes_only_with_what_it_began_with(data, tmp_path):
    train(new_decoder(TRAINED, 0, 16), data, OPTIONS, directory=tmp_path)
    changed = [
        (
            new_decoder(TRAINED, 0, 16),
            data,
            replace(OPTIONS, learning_rate=1e-4),
            "learning_rate was 0.003 and is 0.0001",
        ),
        (new_decoder(TRAINED, 0, 16), data.split(0.1)[0], OPTIONS, "data was"),
        (new_decoder(TRAINED, 1, 16), data, OPTIONS, "start was"),
    ]
    for decoder, other, options, message in changed:
        with pytest.raises(InputError, match=message):
            train(decoder, other, options, directory=tmp_path, resume=True)
    with pytest.raises(InputError, match="Go on with --resume"):
        train(new_decoder(TRAINED, 0, 16), data, OPTIONS, directory=tmp_path)
    finished = train(new_decoder(TRAINED, 0, 16), data, replace(OPTIONS, keep=5), directory=tmp_path, resume=True)
    assert finished.losses == []  # nothing was left to do


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, small_disk):
    decoder = new_decoder(TRAINED, 0, 16)
    directory = small_disk(800)  # KiB: one checkpoint, not two
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        train(decoder, data, replace(OPTIONS, checkpoint_every=2), directory=directory / "run")
    assert "step-00000002 is kept" in str(caught.value)
    assert [path.name for path in (directory / "run").iterdir() if path.is_dir()] == ["step-00000002"]
    open_checkpoint(latest(directory / "run"))


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    train(new_decoder(TRAINED, 0, 16), data, OPTIONS, directory=tmp_path)
    path = latest(tmp_path) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: is damaged"):
        train(new_decoder(TRAINED, 0, 16), data, replace(OPTIONS, keep=3), directory=tmp_path, resume=True)


def test_fewer_tokens_than_a_batch(data):
    few = TokenData.from_ids(data.ids[: 4 * 16])  # the last token has no next one
    with pytest.raises(DataError, match="64 tokens are less than one batch of 4 x 16"):
        train(new_decoder(TRAINED, 0, 16), few, OPTIONS)
    train(new_decoder(TRAINED, 0, 16), TokenData.from_ids(data.ids[: 4 * 16 + 1]), replace(OPTIONS, steps=2))
