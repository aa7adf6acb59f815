#!/usr/bin/env python3
"""Train the subject of the uptraining experiments: a small MHA SwiGLU decoder on real English, byte by byte, on the CPU.

Deterministic for a given number of threads; cached: a second call finds it finished. Writes a Hugging Face directory.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf import save_hf
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parent))
from corpus import corpus

ROOT = Path(__file__).resolve().parents[1]
SUBJECT, CORPUS = ROOT / "models" / "subject", ROOT / "models" / "corpus"
BATCH, STEPS, RATE, WARMUP, END = 16, 4000, 3e-3, 100, 0.1
CONTEXT = 128
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=257,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=512,
    norm_eps=1e-5,
    bos_token_id=256,
    eos_token_id=(256,),
)
END_OF_TEXT = "<|endoftext|>"


def tokenizer() -> Tokenizer:
    """One token per byte, and the end of a text."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    result = Tokenizer(models.BPE(vocab=letters, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return result


def tokenizer_files() -> TokenizerFiles:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    files = {"tokenizer.json": tokenizer().to_str(), "tokenizer_config.json": json.dumps(settings, indent=2)}
    return TokenizerFiles({name: text.encode() for name, text in files.items()})


def tokens(path: Path) -> torch.Tensor:
    """The text's tokens, int64 [N]."""
    lines = path.read_text().splitlines(keepends=True)
    return torch.tensor([i for line in tokenizer().encode_batch(lines) for i in line.ids])


def batch(data: torch.Tensor, generator: torch.Generator, size: int, length: int = CONTEXT) -> torch.Tensor:
    """Random windows, int64 [size, length + 1]."""
    starts = torch.randint(len(data) - length - 1, (size, 1), generator=generator)
    return data[starts + torch.arange(length + 1)]


def cross_entropy(decoder: Decoder, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(decoder(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(decoder: Decoder, data: torch.Tensor) -> float:
    """Mean loss in nats over the same 256 windows every time."""
    generator = torch.Generator().manual_seed(123)
    return sum(cross_entropy(decoder, batch(data, generator, 64)).item() for _ in range(4)) / 4


def schedule(step: int, steps: int, warmup: int, end: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `end`."""
    if step < warmup:
        return (step + 1) / warmup
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def initialised(config: ModelConfig) -> Decoder:
    """Weights of standard deviation 0.02, those that write to the residual stream smaller (Radford et al. 2019)."""
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, 0, 0.02 / (math.sqrt(2 * config.num_hidden_layers) if residual else 1))
    return decoder


def train(steps: int, log: int = 200) -> Decoder:
    text, held_out, about = corpus(CORPUS)
    data, validation = tokens(text), tokens(held_out)
    print(f"{about}: {len(data):,} tokens to train on, {len(validation):,} held out", flush=True)
    torch.manual_seed(0)
    decoder, generator, start = initialised(CONFIG), torch.Generator().manual_seed(1), time.time()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule(step, steps, WARMUP, END)
        loss = cross_entropy(decoder, batch(data, generator, BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % log == 0 or step + 1 == steps:
            held = evaluate(decoder, validation) if (step + 1) % (5 * log) == 0 or step + 1 == steps else math.nan
            line = (
                f"step {step + 1}/{steps}: loss {loss.item():.4f}, validation {held:.4f}, {time.time() - start:.0f} s"
            )
            print(line, flush=True)
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=SUBJECT)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.output.exists():
        print(f"{options.output} is there already")
        return
    decoder = train(options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = MemoryCheckpoint(options.output, CONFIG, decoder.state_dict(), tokenizer_files())
    save_hf(options.output, checkpoint, torch.float32)
    print(f"wrote {options.output}: {sum(p.numel() for p in decoder.parameters()):,} parameters")


if __name__ == "__main__":
    main()
