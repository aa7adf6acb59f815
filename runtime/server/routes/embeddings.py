"""POST /v1/embeddings."""

import asyncio
import base64

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from headfold.runtime.errors import BusyError, DeadlineError
from headfold.runtime.scheduling.request import Ids
from headfold.runtime.server.protocol.refusals import unsupported
from headfold.runtime.server.protocol.requests import EmbeddingRequest, are_several
from headfold.runtime.server.protocol.responses import Embedding, EmbeddingList, EmbeddingUsage
from headfold.runtime.server.routes.answering import unless_gone
from headfold.runtime.server.served import Models, Served
from headfold.runtime.server.settings import Settings

_AT_ONCE = 16  # requests of a model; they take turns with all answers


async def embed(body: EmbeddingRequest, request: Request, models: Models, settings: Settings) -> EmbeddingList:
    """A vector for each text."""
    served = models.find(body.model)
    size = served.model.check_embeds()
    if body.dimensions not in (None, size):
        raise unsupported("dimensions", f"Embeddings of this model have {size} dimensions, and cannot be cut.")
    prompts = body.input if are_several(body.input) else [body.input]
    ids = await asyncio.to_thread(lambda: [served.model.encode(prompt) for prompt in prompts])
    if served.embedding >= _AT_ONCE:
        raise BusyError(f"{served.embedding} requests for embeddings are at work", fix="Try again later.")
    served.embedding += 1
    try:
        async with asyncio.timeout(settings.limits.seconds):
            vectors = await unless_gone(request, _vectors(served, ids, body))
    except TimeoutError as error:
        raise DeadlineError("the embeddings were not complete when their time was over", fix="Give less.") from error
    finally:
        served.embedding -= 1
    tokens = sum(map(len, ids))
    data = [Embedding(index=index, embedding=_told(vector, body)) for index, vector in enumerate(vectors)]
    return EmbeddingList(data=data, model=served.name, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens))


async def _vectors(served: Served, prompts: list[Ids], body: EmbeddingRequest) -> list[NDArray[np.float32]]:
    """One text after the other, so that nothing more is computed for who is gone."""
    pooling = body.pooling or "mean"
    return [await asyncio.to_thread(served.model.embed, ids, pooling=pooling, normalize=True) for ids in prompts]


def _told(vector: NDArray[np.float32], body: EmbeddingRequest) -> list[float] | str:
    """Numbers, or the base64 of them as float32, little-endian."""
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
