"""What `serve run` and a configuration file may say: the options of `headfold serve`, and how many replicas there are."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json
from ray.serve.config import AutoscalingConfig

from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import InputError
from headfold.runtime.scheduling.scheduler import KEEP_BYTES, SLOTS
from headfold.runtime.server.settings import KEY, WAITING, Limits, Settings

_LOADING = {"backend", "provider", "attention", "threads", "slots", "waiting", "keep_bytes", "draft", "prefill"}
_Directory = Annotated[Path, AfterValidator(Path.absolute)]  # the same on every node


def _parsed(value: Any) -> Any:
    """A command line has no mappings: there it is JSON."""
    return from_json(value) if isinstance(value, str) else value


def _key() -> SecretStr | None:
    """That of the environment."""
    return SecretStr(os.environ[KEY]) if KEY in os.environ else None


class Arguments(BaseModel):
    """All of it. Texts are read as what they are to be, as `serve run` gives nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: _Directory
    draft: _Directory | None = None  # a smaller bundle with the same tokenizer, whose guesses are checked
    prefill: _Directory | None = None  # a bundle of the same model that reads prompts faster
    name: str | None = None  # of the model; by default the directory's
    replicas: PositiveInt = 1
    autoscaling_config: Annotated[AutoscalingConfig | None, BeforeValidator(_parsed)] = None  # in place of replicas
    ingresses: PositiveInt = 1  # replicas of what takes the requests
    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    provider: Literal["cpu", "cuda"] = "cpu"  # of ONNX Runtime
    attention: Attention | None = None  # of TensorRT: which engine
    threads: PositiveInt = 1  # of each replica, which Ray reserves as many CPUs for
    slots: PositiveInt = SLOTS  # answers of a replica that are written together
    waiting: PositiveInt = WAITING  # answers that may wait beyond them
    keep_bytes: NonNegativeInt = KEEP_BYTES  # of a replica's cache, for prompts that begin alike
    reuse: bool = True  # of the cache among requests
    max_new_tokens: PositiveInt | None = Limits.new_tokens
    max_seconds: PositiveFloat = Limits.seconds
    max_body: PositiveInt = Limits.body_bytes
    drain_seconds: NonNegativeFloat = 60  # for answers on their way when a replica ends
    api_key: SecretStr | None = Field(default_factory=_key)  # what clients must send
    no_auth: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.model_fields_set
        if self.autoscaling_config is not None and "replicas" in given:
            raise ValueError("replicas and autoscaling_config contradict each other: give one of them")
        if self.backend == "tensorrt" and "provider" in given:
            raise ValueError("provider is of ONNX Runtime: leave it out, or backend=onnxruntime")
        if self.backend != "tensorrt" and self.attention is not None:
            raise ValueError("attention chooses a TensorRT engine: leave it out, or backend=tensorrt")
        if self.on_gpu and self.prefill is not None:
            raise ValueError("another bundle can read prompts only with ONNX Runtime on the CPU: leave prefill out")
        if not self.reuse and "keep_bytes" in given:
            raise ValueError("keep_bytes is of prompts that are kept: leave it out, or reuse=true")
        if self.api_key is not None and self.no_auth:
            raise ValueError("an API key and no_auth contradict each other: give one of them")
        if self.api_key is None and not self.no_auth:
            raise ValueError(f"others may reach a cluster: set {KEY}, which clients must send, or no_auth=true")
        return self

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Arguments":
        """These arguments. Raises InputError."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or None
            what = first["msg"].removeprefix("Value error, ")
            raise InputError(what, where=where, fix="The arguments are described in docs/serve.md.") from error

    @property
    def on_gpu(self) -> bool:
        """Whether each replica needs one."""
        return self.backend == "tensorrt" or self.provider == "cuda"

    @property
    def autoscaling(self) -> AutoscalingConfig | None:
        """By default a replica is added where those there are have more to do than their slots."""
        asked = self.autoscaling_config
        if asked is None or "target_ongoing_requests" in asked.model_fields_set:
            return asked
        return asked.model_copy(update={"target_ongoing_requests": float(self.slots)})

    @property
    def most_replicas(self) -> int:
        """That there can be."""
        return self.replicas if self.autoscaling_config is None else self.autoscaling_config.max_replicas

    @property
    def loading(self) -> dict[str, Any]:
        """What headfold.runtime.load is told."""
        return self.model_dump(include=_LOADING)

    @property
    def settings(self) -> Settings:
        """Of the application. A stream says nothing before its first token: until then another replica can answer."""
        return Settings(
            key=None if self.api_key is None else self.api_key.get_secret_value(),
            limits=Limits(body_bytes=self.max_body, new_tokens=self.max_new_tokens, seconds=self.max_seconds),
            reuse=self.reuse,
            announces=False,
        )
