#!/usr/bin/env python3
"""Train the subject of the uptraining experiments: a small MHA SwiGLU decoder on real English, byte by byte, on the CPU.

Deterministic for a given number of threads; cached: a second call finds it finished. Writes a Hugging Face directory.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.data.token_data import TokenData
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.model.initialize import new_decoder
from headfold.export.progress import Reporter
from headfold.export.training.loop import train
from headfold.export.training.options import TrainOptions

sys.path.insert(0, str(Path(__file__).parent))
from corpus import corpus

ROOT = Path(__file__).resolve().parents[1]
SUBJECT, CORPUS = ROOT / "models" / "subject", ROOT / "models" / "corpus"
BATCH, STEPS, RATE, WARMUP = 16, 4000, 3e-3, 100
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


def tokens(path: Path) -> TokenData:
    """The text's tokens."""
    lines = path.read_text().splitlines(keepends=True)
    return TokenData.from_ids([i for line in tokenizer().encode_batch(lines) for i in line.ids])


def pretrain(steps: int) -> Decoder:
    text, held_out, about = corpus(CORPUS)
    data, validation = tokens(text), tokens(held_out)
    print(f"{about}: {len(data):,} tokens to train on, {len(validation):,} held out", flush=True)
    options = TrainOptions(
        steps=steps,
        batch=BATCH,
        sequence=CONTEXT,
        learning_rate=RATE,
        warmup=WARMUP / steps,
        evaluate_every=1000,
        evaluate_sequences=256,
        cpu=True,
    )
    result = train(new_decoder(CONFIG, seed=0), data, options, validation=validation, reporter=Reporter())
    for evaluation in result.evaluations:
        print(f"step {evaluation.step}: validation loss {evaluation.loss:.4f}", flush=True)
    return result.decoder


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
    decoder = pretrain(options.steps)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = MemoryCheckpoint(options.output, CONFIG, decoder.state_dict(), tokenizer_files())
    save_hf(options.output, checkpoint, torch.float32)
    print(f"wrote {options.output}: {sum(p.numel() for p in decoder.parameters()):,} parameters")


if __name__ == "__main__":
    main()
