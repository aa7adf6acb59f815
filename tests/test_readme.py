"""README's examples run as they stand there, and do what is said of them."""

import re
from pathlib import Path
from typing import Any

import pytest
from random_transformers import random_model
from toy_tokenizer import toy_tokenizer

from headfold.runtime import load

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def run(text: str) -> dict[str, Any]:
    """Execute the one example that has this text; what it defines."""
    (block,) = (block for block in BLOCKS if text in block)
    assert len(block.strip().splitlines()) <= 40
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, str(README), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(tmp_path)


def test_a_module_of_ones_own(place, capsys) -> None:
    (place / "my-tokenizer").mkdir()
    toy_tokenizer(300).save(str(place / "my-tokenizer" / "tokenizer.json"))
    run("class Model(nn.Module)")
    assert capsys.readouterr().out.endswith(" True\n")
    assert len(load("mine").generate("the lazy dog", max_new_tokens=5).token_ids) == 5


def test_a_model_in_memory(place) -> None:
    random_model("qwen3", vocab_size=300).save_pretrained(place / "my-model")
    toy_tokenizer(300).save(str(place / "my-model" / "tokenizer.json"))
    model = run("AutoModelForCausalLM")["model"]
    answer = load("tuned").generate([5, 6, 7], max_new_tokens=5, ignore_eos=True).token_ids
    ids = model.generate(
        model.dummy_inputs["input_ids"][:1, :0].new_tensor([[5, 6, 7]]), max_new_tokens=5, min_new_tokens=5
    )
    assert answer == ids[0, 3:].tolist()
