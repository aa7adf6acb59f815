"""README's examples run as they stand there, and do what is said of them."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from random_transformers import random_model
from toy_tokenizer import toy_tokenizer
from transformers import AutoModelForCausalLM

from headfold.export.cli import main
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


@pytest.mark.slow
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


def test_a_lora_directory(place) -> None:
    random_model("qwen3", vocab_size=300).save_pretrained(place / "my-model")
    toy_tokenizer(300).save(str(place / "my-model" / "tokenizer.json"))
    base = AutoModelForCausalLM.from_pretrained(place / "my-model")
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(place / "my-lora")
    (line,) = (line for line in README.read_text().splitlines() if line.strip().startswith("headfold export ./my-lora"))
    result = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output
    plain = AutoModelForCausalLM.from_pretrained(place / "my-model")
    ids = torch.tensor([[5, 6, 7]])
    without = plain.generate(ids, max_new_tokens=8, min_new_tokens=8)[0, 3:].tolist()
    merged = PeftModel.from_pretrained(plain, place / "my-lora").merge_and_unload()
    expected = merged.generate(ids, max_new_tokens=8, min_new_tokens=8)[0, 3:].tolist()
    assert load("tuned").generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids == expected != without
