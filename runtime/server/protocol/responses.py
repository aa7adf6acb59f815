"""What OpenAI's clients get. A chunk of a stream has the same fields, with `delta` in the place of `message`."""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class CachedTokens(BaseModel):
    """Of a prompt: what did not have to be computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Called(BaseModel):
    """A function and its arguments, which are JSON as text."""

    name: str
    arguments: str


class Call(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Likely(BaseModel):
    """A token that could have come. `bytes` is null where the tokenizer does not tell them."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(Likely):
    """The token that came, and the likeliest."""

    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    """Of each token of an answer."""

    content: list[TokenLogprobs]
    refusal: None = None


class AnswerMessage(BaseModel):
    """An answer; `content` is null where it has calls and no text."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | None = None


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Of each token of a text, side by side."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the `n` texts of one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """How prompts go on."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(BaseModel):
    """A text's vector, of the length 1: numbers, or float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """All of them, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["headfold"] = "headfold"
    max_model_len: int  # tokens of a prompt and its answer together; not OpenAI's


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorFacts(BaseModel):
    """What is wrong, in OpenAI's terms."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is none."""

    error: ErrorFacts


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "draining"]


JsonObject = dict[str, Any]
