"""What guessing tokens (`generate(…, speculate=True)`) saves and costs, on SmolLM2 in float32 with all logits: from the text so far,
and where that says nothing by a draft, if one is asked for: SmolLM2 in its file's own four bits.

Each prompt is answered with and without, in turns; ratios are medians of neighbours in time. Then 50 prompts are answered both ways,
and greedy tokens that differ are told, with the difference of the two best logits there: near-ties fall as kernels round.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from http_client import smollm2_int4

ARTICLE = """The harbour of the old town was built in the twelfth century, when merchants from the north brought salt, timber and \
furs to the coast. For two hundred years it was the largest port in the region, and the families who owned its \
warehouses were richer than the duke. In 1411 a storm broke the northern wall, and the sea took forty ships in one \
night. The town rebuilt the wall with stone from the abandoned castle on the hill, but the trade had moved to the new \
harbour at the mouth of the river. Fishermen used the old basin until 1890, when the railway company filled it with \
gravel. Last year the city council voted to dig it out again. The work will cost nine million, and it will take three \
years. Visitors will be able to walk along the medieval wall, and small boats will moor where the merchants once \
unloaded their salt."""
CODE = '''def read_rows(path, separator=","):
    """Read a table from a file."""
    rows = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            fields = line.split(separator)
            rows.append([field.strip() for field in fields])
    return rows


def write_rows(path, rows, separator=","):
    """Write a table to a file."""
    with open(path, "w") as file:
        for row in rows:
            file.write(separator.join(str(field) for field in row))
            file.write("\\n")


def column_sums(rows):
    """Add up the numbers of each column."""
    sums = [0.0] * len(rows[0])
    for row in rows:
        for index, field in enumerate(row):
            sums[index] += float(field)
    return sums
'''
_SHORT = 48  # tokens of the answers that are compared
PROMPTS = {  # kind: prompt, and whether guesses can help
    "summarising": f"Shorten this text. Keep its words.\n\n{ARTICLE}",
    "code editing": f"Rename `rows` to `table` in this Python code, change nothing else, and print all of it:\n\n```python\n{CODE}```",
    "a story": "Write a story about a lighthouse keeper who finds a letter.",
    "a list": "Name twenty different animals and say in a few words what each of them eats.",
}
SUBJECTS = ("the moon", "bread", "a violin", "rivers", "old maps", "honey bees", "glass", "winter", "a bicycle", "tea")
QUESTIONS = (
    "What is {}?",
    "Write a poem about {}.",
    "Tell me three facts about {}.",
    "Why do people like {}?",
    "Explain {} to a child.",
)
FIFTY = [question.format(subject) for question in QUESTIONS for subject in SUBJECTS]


def speculation(work: Path, gguf: Path, rounds: int, new: int, threads: int, drafted: bool) -> dict[str, Any]:
    """Measure, print, and return the figures. `drafted`: a draft guesses, too."""
    from headfold.runtime import load

    bundle = work / "smollm2-all-logits"
    if not bundle.exists():
        work.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "headfold"), "export", str(gguf), "-o", str(bundle)]
        subprocess.run([*command, "--all-logits", "--no-verify", "-q"], check=True)
    figures: dict[str, Any] = {"threads": threads, "new": new, "drafted": drafted}
    with load(bundle, threads=threads, draft=smollm2_int4() if drafted else None) as model:

        def ask(text: str, most: int, speculate: bool) -> tuple[list[int], float]:
            """The answer, and the seconds from its first token to its last."""
            message = [{"role": "user", "content": text}]
            stream = model.generate(
                message, stream=True, max_new_tokens=most, temperature=0, ignore_eos=True, speculate=speculate
            )
            tokens = [next(stream).token_id]
            begin = time.perf_counter()
            tokens += [delta.token_id for delta in stream]
            return tokens, time.perf_counter() - begin

        who = "the text so far, else SmolLM2 int4," if drafted else "the text so far"
        print(f"{threads} threads, {new} new tokens, medians of {rounds} rounds; {who} guesses")
        print(f"{'':16}{'plain tok/s':>13}{'guessing':>11}{'ratio':>8}{'tokens per step':>18}")
        for kind, text in PROMPTS.items():
            plain, guessing = [], []
            for number in range(rounds + 1):
                for speculate in (False, True) if number % 2 else (True, False):
                    before = model.status()
                    _, seconds = ask(text, new, speculate)
                    if speculate:
                        after = model.status()
                    if number:
                        (guessing if speculate else plain).append(seconds)
                    if speculate:
                        per_step = (new - 1) / (after.steps - before.steps)
            ratio = statistics.median(one / other for one, other in zip(plain, guessing, strict=True))
            rates = [(new - 1) / statistics.median(seconds) for seconds in (plain, guessing)]
            print(f"{kind:16}{rates[0]:13.1f}{rates[1]:11.1f}{ratio:8.2f}{per_step:18.2f}", flush=True)
            figures[kind] = {"plain": rates[0], "guessing": rates[1], "ratio": ratio, "tokens_per_step": per_step}
        same, ties = 0, []
        for text in FIFTY:
            (one, _), (other, _) = ask(text, _SHORT, False), ask(text, _SHORT, True)
            if one == other:
                same += 1
                continue
            place = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            ids = [*model.encode([{"role": "user", "content": text}]).tolist(), *one[:place]]
            second, first = np.sort(model.logits(ids)[-1])[-2:]
            ties.append({"prompt": text, "token": place, "difference": float(first - second)})
        print(
            f"{same} of {len(FIFTY)} prompts have the same {_SHORT} greedy tokens; others differ first at near-ties: {ties}"
        )
        figures["same"], figures["ties"] = same, ties
    return figures
