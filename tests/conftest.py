"""Shared fixtures: small random models as checkpoints in memory and on disk, a toy tokenizer, and where the real model is."""

import functools
import gc
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it while it is imported, and transformers' experts import it
with suppress(ImportError):
    import headfold.plugins.attention.triton_kernels  # noqa: F401  before anybody else does
del os.environ["TRITON_INTERPRET"]  # for processes that compile

import onnxscript._framework_apis.torch_2_5 as torchlib
import pytest
import torch
from tokenizers import Tokenizer
from toy_tokenizer import toy_tokenizer

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.checkpoints.base import MemoryCheckpoint, TokenizerFiles
from headfold.export.checkpoints.hf_writer import save_hf
from headfold.export.checkpoints.opening import load_decoder, open_checkpoint
from headfold.export.exportables.opening import open_exportable
from headfold.export.model.config import ModelConfig
from headfold.export.model.decoder import Decoder
from headfold.export.progress import Reporter
from headfold.runtime.manifest import Manifest

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
# They are always the same, and each export asks for them: 0.3 s
torchlib.get_torchlib_ops = functools.cache(torchlib.get_torchlib_ops)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What was imported stays: an export collects garbage several times, and looking at all that would take it a second."""
    gc.collect()
    gc.freeze()


CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    eos_token_id=(0,),
)


@pytest.fixture
def config() -> ModelConfig:
    return CONFIG


def random_checkpoint(config: ModelConfig, tokenizer: TokenizerFiles | None = None) -> MemoryCheckpoint:
    torch.manual_seed(0)
    decoder = Decoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return MemoryCheckpoint(Path("memory"), config, decoder.state_dict(), tokenizer or TokenizerFiles())


@pytest.fixture
def memory_checkpoint() -> Callable[[ModelConfig], MemoryCheckpoint]:
    """Makes a checkpoint of random weights, the same ones every time, large enough that every layer matters."""
    return random_checkpoint


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOY = replace(CONFIG, vocab_size=300, num_hidden_layers=2)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return toy_tokenizer(TOY.vocab_size)


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face directory: a random model of two layers, a tokenizer and a chat template. Not to be changed: copy it."""
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": CHATML.encode(),
        "generation_config.json": b'{"eos_token_id": 0}',
    }
    path = tmp_path_factory.mktemp("checkpoint") / "toy"
    save_hf(path, random_checkpoint(TOY, TokenizerFiles(files)), torch.float32)
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; scripts/test fetches it."""
    default = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("HEADFOLD_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"{path} is missing: scripts/test fetches it, or set HEADFOLD_SMOLLM2")
    return path


@dataclass
class TensorRTToy:
    """A bundle of random weights in 16 bits, and the decoder whose weights it has, rounded alike."""

    bundle: Path
    decoder: Decoder
    manifest: Manifest


TENSORRT_CAPACITY = 40
TENSORRT_TOYS = {  # between them: grouped heads, a window in one layer, q/k norms, biases, both norms, two activations
    "float16": {"sliding_window": 5, "sliding_layers": (1,), "qk_norm": True},
    "bfloat16": {
        "norm": "layer_norm",
        "qkv_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="session")
def tensorrt_toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TensorRTToy]:
    """Exports a small bundle of a dtype, once; whoever changes it copies it first."""
    made: dict[str, TensorRTToy] = {}

    def make(dtype: str) -> TensorRTToy:
        if dtype in made:
            return made[dtype]
        own = {"model_type": "headfold", "num_hidden_layers": 2}
        directory = tmp_path_factory.mktemp("tensorrt")
        save_hf(directory / "hf", random_checkpoint(replace(CONFIG, **own, **TENSORRT_TOYS[dtype])), torch.float32)
        options = ExportOptions(dtype=dtype, capacity=TENSORRT_CAPACITY, all_logits=True, verify=False)
        result = export_bundle(open_exportable(directory / "hf"), directory / "bundle", options, Reporter(quiet=True))
        decoder = load_decoder(open_checkpoint(directory / "hf"), getattr(torch, dtype), TENSORRT_CAPACITY).float()
        made[dtype] = TensorRTToy(directory / "bundle", decoder, result.manifest)
        return made[dtype]

    return make
