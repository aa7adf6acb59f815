"""The main job on the real model: SmolLM2-135M-Instruct, exported once with parity, in every engine that can run it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.graph.bodies import use_standard_body
from headfold.runtime import load

pytestmark = pytest.mark.real
PEERS = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
PROMPTS = ["What is the capital of France?", "Write a haiku about the sea.", "Explain grouped-query attention."]
TOLERANCE = 1e-4  # float32 logits that reach 29: 30 eps


@pytest.fixture(scope="module")
def exported(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("smollm2") / "bundle"
    program = Path(sys.executable).parent / "headfold"
    command = [program, "export", smollm2, "-o", path, "--json", "--decode-steps", "8"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return path, json.loads(result.stdout)


@pytest.fixture
def peers() -> Path:
    if not PEERS.is_file():
        pytest.skip(f"{PEERS} is missing: scripts/test makes it")
    return PEERS


def test_parity_is_within_tolerance(exported) -> None:
    path, content = exported
    report = json.loads((path / "parity.json").read_text())
    assert report["passed"] is True
    assert content["manifest"]["parity"]["top1_agreement"] == 1.0
    prefill, decode = (next(c for c in report["checks"] if c["name"] == name) for name in ("prefill", "decode"))
    assert max(prefill["max_error"], decode["max_error"]) < TOLERANCE
    assert content["peak_bytes"] < 1.5 * content["weight_bytes"]


def test_the_checker_accepts_it(exported) -> None:
    onnx.checker.check_model(exported[0] / "model.onnx", full_check=True)


def test_the_standard_body_gives_the_same_logits(exported, smollm2) -> None:
    path, _ = exported
    model = ir.load(path / "model.onnx")
    config = open_checkpoint(smollm2).config
    use_standard_body(model)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path))
    ids = np.array([load(path, check=False).tokenizer.encode("The gate decides what passes through.").ids])
    shape = (1, config.num_key_value_heads, 32, config.head_dim)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {value.name: np.zeros(shape, np.float32) for value in model.graph.inputs[2:]}
    logits = [
        ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(["logits"], feeds)[0]
        for graph in (ir.to_proto(model).SerializeToString(), str(path / "model.onnx"))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=TOLERANCE)


def test_greedy_answers_are_torchs(exported, smollm2) -> None:
    model = load(exported[0])
    ids = model.tokenizer.encode(model.chat_prompt([{"role": "user", "content": PROMPTS[0]}])).ids
    answer = model.generate(ids, max_new_tokens=8)
    decoder = load_decoder(open_checkpoint(smollm2))
    tokens = list(ids)
    for _ in range(len(answer.token_ids)):
        tokens.append(int(decoder(torch.tensor([tokens]), last_only=True).logits[0, -1].argmax()))
    assert answer.token_ids == tokens[len(ids) :]
    assert "Paris" in answer.text


GENAI = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
answers = []
for ids in json.loads(sys.argv[2]):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 64)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    answers.append(generator.get_sequence(0).tolist()[len(ids):])
print(json.dumps(answers))
"""


def test_onnxruntime_genai_gives_the_same_tokens(exported, peers) -> None:
    model = load(exported[0])
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [model.generate(conversation, max_new_tokens=64) for conversation in conversations]
    ids = [model.tokenizer.encode(model.chat_prompt(conversation)).ids for conversation in conversations]
    command = [peers, "-c", GENAI, exported[0], json.dumps(ids)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for answer, tokens in zip(answers, json.loads(result.stdout.splitlines()[-1]), strict=True):
        ours = answer.token_ids
        if answer.finish_reason == "stop":  # we give the token that ended it, too
            assert ours.pop() in model.eos_token_ids
        assert ours == tokens
    assert any(len(answer.token_ids) == 64 for answer in answers)


WITHOUT_TORCH = """
import importlib.util, json, sys
assert importlib.util.find_spec("torch") is None
from headfold.runtime import load
model = load(sys.argv[1])
print(json.dumps(model.generate([{"role": "user", "content": sys.argv[2]}], max_new_tokens=16).token_ids))
"""


def test_the_runtime_works_where_torch_is_not_installed(exported, peers) -> None:
    result = subprocess.run(
        [peers, "-c", WITHOUT_TORCH, exported[0], PROMPTS[0]], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    here = load(exported[0]).generate([{"role": "user", "content": PROMPTS[0]}], max_new_tokens=16)
    assert json.loads(result.stdout) == here.token_ids
