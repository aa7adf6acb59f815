"""Scores against the decoder, and lm-eval's tasks item by item against its own transformers model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from headfold.export.cli import main
from headfold.runtime import CapacityError, InputError, Model, load
from headfold.runtime.measuring.scoring import perplexity

IDS = np.random.default_rng(0).integers(0, 300, 65)  # one more than the capacity: the last needs no room


def wanted(toy, ids) -> np.ndarray:
    """The oracle's log-probability of each token but the first."""
    scores = torch.log_softmax(torch.from_numpy(toy.logits(ids[:-1])).double(), -1).numpy()
    return scores[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("all_logits", [False, True])
@pytest.mark.parametrize("start", [1, 2, 40, 64])
def test_scores_are_the_decoders(all_logits, start, make_toy) -> None:
    toy = make_toy(all_logits)
    scores = load(toy.path, threads=1).score(IDS, start)
    np.testing.assert_allclose(scores.logprobs, wanted(toy, IDS)[start - 1 :], atol=1e-4)
    likeliest = toy.logits(IDS[:-1])[start - 1 :].argmax(1)
    assert scores.likeliest.tolist() == (likeliest == IDS[start:]).tolist()


def test_what_cannot_be_scored(toy) -> None:
    model = load(toy.path, threads=1)
    for ids, start, kind in (([1], 1, InputError), ([1, 2], 0, InputError), ([1, 2], 2, InputError)):
        with pytest.raises(kind, match="no token to score"):
            model.score(ids, start)
    with pytest.raises(CapacityError, match="65 tokens are 1 over"):
        model.score([*IDS, 1])
    with pytest.raises(InputError, match="no two tokens"):
        perplexity(model.score, [[5], []], 8)
    with pytest.raises(InputError, match="has none to predict"):
        perplexity(model.score, [[5, 6]], 1)


@pytest.mark.parametrize("most", [None, 1, 9, 20])
def test_every_token_but_a_documents_first_is_predicted_once(most, toy) -> None:
    documents = [IDS[:17], IDS[20:21], IDS[30:40]]
    windows = [IDS[0:8], IDS[7:15], IDS[14:17], IDS[30:38], IDS[37:40]]
    scores = np.concatenate([wanted(toy, window) for window in windows])[:most]
    found = perplexity(load(toy.path, threads=1).score, documents, 8, most)
    assert (found.documents, found.tokens) == (1 if most and most <= 16 else 2, len(scores))
    assert found.nats == pytest.approx(-scores.mean(), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-scores.mean()), rel=1e-5)


def test_the_command_tells_perplexity(toy, tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    lines = ["the lazy dog sleeps", "the quick brown fox"]
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    model = load(toy.path, threads=1)
    scores = np.concatenate([wanted(toy, np.array(model.encode(line))) for line in lines])
    result = CliRunner().invoke(main, ["score", str(toy.path), "--data", str(data), "--json"])
    found = json.loads(result.stdout)
    assert (found["documents"], found["tokens"], found["context"]) == (2, len(scores), 64)
    assert found["nats"] == pytest.approx(-scores.mean(), abs=1e-5)
    result = CliRunner().invoke(main, ["score", str(toy.path), "--data", str(data), "--tokens", "3"])
    assert "3 tokens of 1 documents" in result.stdout


# lm-eval


CHOICES = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
ROLLING = """
task: toy_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
UNTIL = """
task: toy_until
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "a {{question}}"
doc_to_target: "dog"
generation_kwargs: {until: ["x", "q"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": "the quick ", "choices": [" brown fox", "lazy dog", "fox"]},
    {"question": "", "choices": ["the", "a dog", "over"]},
    {"question": "the lazy dog sleeps on " * 9, "choices": ["the fox jumps", "it", "dog"]},  # over the capacity
    {"question": "jumps over", "choices": [" the lazy dog", "the", " on"]},
]


def samples(lm, directory: Path) -> dict[str, list]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(directory), include_defaults=False)
    results = simple_evaluate(
        lm, tasks=["toy_choice", "toy_rolling", "toy_until"], task_manager=tasks, bootstrap_iters=0, batch_size=1
    )
    return {
        name: [sample["resps"] for sample in sorted(found, key=lambda sample: sample["doc_id"])]
        for name, found in results["samples"].items()
    }


def test_lm_evals_tasks_give_what_they_give_with_transformers(toy, toy_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval")
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import headfold.runtime.measuring.lm_eval_model  # noqa: F401  # registers it

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in (("choice", CHOICES), ("rolling", ROLLING), ("until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    ours = get_model("headfold").create_from_arg_string(f"bundle={toy.path},threads=1", {"batch_size": 1})
    assert isinstance(ours.model, Model)
    model = AutoModelForCausalLM.from_pretrained(toy_checkpoint, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(toy_checkpoint), batch_size=1, device="cpu")
    found, expected = samples(ours, tmp_path), samples(theirs, tmp_path)
    assert found["toy_until"] == expected["toy_until"]
    count = 0
    for name in ("toy_choice", "toy_rolling"):
        for item, other in zip(found[name], expected[name], strict=True):
            for (one,), (two,) in zip(item, other, strict=True):
                score, likely = one if isinstance(one, tuple | list) else (one, None)
                wanted_score, wanted_likely = two if isinstance(two, tuple | list) else (two, None)
                assert score == pytest.approx(wanted_score, abs=1e-4)
                assert likely == wanted_likely
                count += 1
    assert count == 3 * 4 + 4
