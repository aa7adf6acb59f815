"""What a conversion knows of a model's data: tokens, each layer's inputs, second moments of them, and what a conversion costs there.

One layer at a time: a layer's inputs are kept, its moments and its errors computed, then it hands its outputs to the next.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from headfold.export.checkpoints.base import Checkpoint
from headfold.export.conversion.heads import Moments
from headfold.export.data.token_data import tokenize
from headfold.export.model.decoder import Attention, Decoder, Layer, sequence_layout
from headfold.export.progress import Reporter
from headfold.plugins.torch_op import rms_norm, rotate
from headfold.runtime.errors import DataError

TOKENS, LENGTH = 8192, 256  # by default: tokens in all, and of each sequence
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # as shares of the mean energy of the heads' outputs; `refit` chooses
_TOGETHER = 2048  # tokens that go through a layer at a time


def calibration_tokens(
    checkpoint: Checkpoint,
    decoder: Decoder,
    data: Sequence[str] = (),
    count: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Tensor:
    """Token ids int64 [N, S] to calibrate on, about `count` of them.

    From `data`, sources as `tokenize` takes them, evenly spread windows. Without, the model writes its own text: sampled at
    temperature 1 from a random first token (Liu et al. 2023, arXiv 2305.17888, section 3.1), which needs no tokenizer and no
    network, and follows the distribution that the model was trained on.

    Raises:
        DataError: see `tokenize`; or less data than one sequence.
    """
    reporter = reporter or Reporter(quiet=True)
    length = min(length, decoder.capacity)
    rows = max(count // length, 1)
    if data:
        text = tokenize(data, checkpoint.tokenizer, checkpoint.config, reporter)
        if not text.windows(length):
            raise DataError(
                f"{len(text)} tokens are less than a sequence of {length} to calibrate on",
                where=", ".join(data),
                fix="Give more text, or a shorter --calibration-length.",
            )
        return text.spread(rows, length)[:, :-1]
    with reporter.step("write text to calibrate on", length) as advance:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(checkpoint.config.vocab_size, (rows, 1), generator=generator)  # [N, 1]
        cache = decoder.new_cache(rows, length)
        with torch.inference_mode():
            for step in range(1, length):
                seen = torch.ones(rows, step, dtype=torch.long)
                logits = decoder(tokens[:, -1:], seen, cache, last_only=True).logits[:, -1].float()  # [N, V]
                chosen = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens = torch.cat((tokens, chosen), 1)
                advance(1)
    return tokens


class LayerInputs:
    """What enters one layer on all calibration tokens: in the original model, and in the one whose earlier layers are converted.

    Set `converted` to the layer's new attention before asking for the next layer; without it the layer counts as unchanged.
    """

    def __init__(self, decoder: Decoder, index: int, hidden: Tensor, follower: Tensor) -> None:
        self._layer = cast(Layer, decoder.model.layers[index])
        self.index, self.converted, self._attention = index, self._layer.self_attn, self._layer.self_attn
        self._rope = (decoder.cos_cache.to(hidden.dtype), decoder.sin_cache.to(hidden.dtype))
        self._hidden, self._follower = hidden, follower  # [N, S, hidden]: residual streams

    @torch.inference_mode()
    def moments(self) -> Moments:
        """The statistics that `convert` takes, of the original model."""
        attention = self._attention
        a, biased = attention.attributes, attention.q_proj.bias is not None
        width = self._hidden.shape[2] + biased
        head_dim = attention.q_proj.out_features // a.num_heads
        inputs = torch.zeros(width, width, dtype=torch.float64)
        attended = torch.zeros(a.num_heads, width, width, dtype=torch.float64)
        queries = torch.zeros(a.num_heads, head_dim, head_dim, dtype=torch.float64)
        for rows in torch.split(self._hidden, _together(self._hidden)):
            x = self._layer.input_layernorm(rows)
            wide = torch.cat((x, torch.ones_like(x[..., :1])), 2) if biased else x  # [n, S, I]
            q, weights = attention_weights(attention, x, self._rope)  # [n, H, S, D], [n, H, S, S]
            inputs += _second_moment(wide.flatten(0, 1))
            for head in range(a.num_heads):
                attended[head] += _second_moment((weights[:, head] @ wide).flatten(0, 1))
                queries[head] += _second_moment(q[:, head].flatten(0, 1))
        count = self._hidden.shape[0] * self._hidden.shape[1]
        return Moments(inputs / count, attended / count, queries / count)

    @torch.inference_mode()
    def refit(self, converted: Attention) -> Tensor:
        """The output projection [hidden, H * D] that brings the converted residual stream closest to the original one.

        Linear least squares on what the converted heads put out where all earlier layers are converted, too. It makes good what the
        new attention weights and the earlier layers got wrong, and lets heads make good each other's errors; it changes
        nothing where there is no error. A ridge towards the present projection, chosen on every fourth sequence, which the choice
        does not fit, keeps it from learning the calibration tokens by heart.
        """
        projection = converted.o_proj
        sums = [_Normal(projection.in_features, projection.out_features) for _ in range(2)]  # to fit, to choose
        for number, (rows, follower) in enumerate(zip(self._hidden, self._follower, strict=True)):
            target = rows + self._attend(self._attention, rows[None])[0] - follower  # [S, hidden]
            with _without_projection(converted):
                features = self._attend(converted, follower[None])[0]  # [S, H * D]
            sums[number % 4 == 3].add(features, target - projection(features))
        fit, choice = sums
        scale = fit.gram.diagonal().mean()
        ridge = min(RIDGES, key=lambda share: choice.loss(fit.solution(share * scale)))
        if choice.loss(fit.solution(ridge * scale)) > 0:  # worse than leaving it
            return projection.weight.double()
        return projection.weight.double() + (fit + choice).solution(ridge * scale * len(self._hidden) / fit.parts).T

    @torch.inference_mode()
    def error(self) -> float:
        """Relative squared error of the converted attention's output on the original inputs, |new - old|^2 / |old|^2."""
        wrong, whole = 0.0, 0.0
        for rows in torch.split(self._hidden, _together(self._hidden)):
            old, new = (self._attend(a, rows).double() for a in (self._attention, self.converted))
            wrong, whole = wrong + (new - old).square().sum().item(), whole + old.square().sum().item()
        return wrong / whole if whole else 0.0

    @torch.inference_mode()
    def after(self) -> tuple[Tensor, Tensor]:
        """Both residual streams behind the layer, [N, S, hidden] each."""
        return self._through(self._attention, self._hidden), self._through(self.converted, self._follower)

    def _attend(self, attention: Attention, rows: Tensor) -> Tensor:
        ones = torch.ones(rows.shape[:2], dtype=torch.long)
        output: Tensor = attention(self._layer.input_layernorm(rows), sequence_layout(ones, ones), self._rope, None)[0]
        return output

    def _through(self, attention: Attention, hidden: Tensor) -> Tensor:
        parts = []
        for rows in torch.split(hidden, _together(hidden)):
            x = rows + self._attend(attention, rows)
            parts.append(x + self._layer.mlp(self._layer.post_attention_layernorm(x)))
        return torch.cat(parts)


def layer_inputs(decoder: Decoder, tokens: Tensor) -> Iterator[LayerInputs]:
    """The inputs of each layer in turn, for int64 tokens [N, S] without padding."""
    with torch.inference_mode():
        hidden = follower = decoder.model.embed_tokens(tokens)  # [N, S, hidden]
    for index in range(decoder.config.num_hidden_layers):
        inputs = LayerInputs(decoder, index, hidden, follower)
        yield inputs
        hidden, follower = inputs.after()


def attention_weights(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The queries before RoPE, [n, H, S, D], and the softmax of the scores, [n, H, S, S], of normed inputs [n, S, hidden]."""
    a, (n, length, _) = attention.attributes, x.shape
    q = attention.q_proj(x).view(n, length, a.num_heads, -1).transpose(1, 2)
    k = attention.k_proj(x).view(n, length, a.kv_num_heads, -1).transpose(1, 2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q = rms_norm(q, attention.q_norm.weight, a.qk_norm_epsilon)
        k = rms_norm(k, attention.k_norm.weight, a.qk_norm_epsilon)
    cos, sin = (table[None, None, :length] for table in rope)  # [1, 1, S, R/2]
    keys = rotate(k, cos, sin, False).repeat_interleave(a.num_heads // a.kv_num_heads, 1)
    scores = rotate(q, cos, sin, False) @ keys.mT * a.scale  # [n, H, S, S]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & ((distance < a.local_window_size) | (a.local_window_size <= 0))
    return q, scores.masked_fill(~visible, float("-inf")).softmax(-1)


class _Normal:
    """The normal equations of a least-squares fit, in float64: features [N, F], and what is missing, [N, hidden]."""

    def __init__(self, features: int, outputs: int) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.missing = torch.zeros(features, outputs, dtype=torch.float64)
        self.parts = 0

    def add(self, features: Tensor, missing: Tensor) -> None:
        self.gram += _second_moment(features)
        self.missing += (features.T @ missing).double()
        self.parts += 1

    def __add__(self, other: "_Normal") -> "_Normal":
        result = _Normal(*self.missing.shape)
        result.gram, result.missing = self.gram + other.gram, self.missing + other.missing
        return result

    def solution(self, ridge: Tensor) -> Tensor:
        """[F, hidden]."""
        solution: Tensor = torch.linalg.solve(
            self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64), self.missing
        )
        return solution

    def loss(self, solution: Tensor) -> float:
        """The squared error of a solution, less that of zero."""
        return (((self.gram @ solution - 2 * self.missing) * solution).sum()).item()


def _second_moment(rows: Tensor) -> Tensor:
    """The sum of x x^T over rows [N, I]: each batch in the decoder's dtype, then float64."""
    return (rows.T @ rows).double()


def _together(hidden: Tensor) -> int:
    """How many sequences go through a layer at a time."""
    return max(_TOGETHER // hidden.shape[1], 1)


@contextmanager
def _without_projection(attention: Attention) -> Iterator[None]:
    projection, attention.o_proj = attention.o_proj, nn.Identity()  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.o_proj = projection
