"""The tokenizer of the toys, of the tests and of the fuzzer."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]


def toy_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level, all 256 bytes are tokens, and some words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and the lazy dog sleeps on"] * 4, trainer
    )
    return tokenizer
