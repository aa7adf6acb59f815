"""What OpenAI's clients send. A field that is not here is refused by name: nobody is left to think that it had an effect.

`top_k`, `min_p`, `repetition_penalty`, `ignore_eos` and `chat_template_kwargs` are not OpenAI's; others' servers have them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Stop = str | Annotated[list[str], Field(max_length=16)] | None
TokenIds = list[int]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Body):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generating(_Body):
    """What both kinds of requests share; see headfold.runtime.generate.Options for what the numbers may be."""

    model: Annotated[str | None, Field(description="May be left out where there is only one.")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(description="0 is greedy; by default the bundle's.")] = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop = None
    ignore_eos: bool | None = None
    user: Annotated[str | None, Field(description="For your own records: not used.")] = None


class CompletionRequest(Generating):
    """POST /v1/completions: text goes on."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None


def are_several(prompt: str | TokenIds | list[str] | list[TokenIds]) -> bool:
    """Whether it is a list of prompts; an empty one is a prompt that is refused."""
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)


class EmbeddingRequest(_Body):
    """POST /v1/embeddings: texts, or their tokens; `pooling` is not OpenAI's."""

    model: Annotated[str | None, Field(description="May be left out where there is only one.")] = None
    input: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=2048)]
        | Annotated[list[TokenIds], Field(max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Annotated[
        Literal["mean", "last"] | None, Field(description="Of all tokens (mean), or the last one's.")
    ] = None
    user: Annotated[str | None, Field(description="For your own records: not used.")] = None


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Function(_Body):
    """The function of a call."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: Function


class Message(BaseModel):
    """One message; what else it has goes to the chat template as it is, as `reasoning_content`."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class FunctionSchema(BaseModel):
    """A function that may be called; `parameters` is a JSON schema."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    """What may be called."""

    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(_Body):
    """Its name."""

    name: str


class NamedTool(_Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Body):
    """A JSON schema, which the answer follows whether `strict` or not."""

    name: str
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """What the answer follows; None if it is free."""
        own = self.json_schema.schema_ if self.json_schema is not None else None
        return None if self.type == "text" else own or {"type": "object"}


class ChatRequest(Generating):
    """POST /v1/chat/completions: a conversation goes on, by the bundle's chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
