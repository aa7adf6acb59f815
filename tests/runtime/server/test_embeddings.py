"""POST /v1/embeddings by OpenAI's own client: what it gets is what the model's own `embed` gives."""

import numpy as np
import openai
import pytest
from serving import client_of, serving

from headfold.runtime import load
from headfold.runtime.server.settings import Limits, Settings

TEXTS = ["the quick brown fox", "the lazy dog sleeps on and on"]


@pytest.fixture(scope="module")
def model(make_toy):
    with load(make_toy(hidden_states=True).path, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def client(model, toy):
    with (
        load(toy.path, threads=1) as plain,
        serving({"toy": model, "plain": plain}, Settings(limits=Limits(body_bytes=5000))) as address,
    ):
        yield client_of(address)


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])  # the client asks for base64 by itself
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_they_are_the_models_own(encoding, pooling, client, model) -> None:
    ids = [model.encode(text).tolist() for text in TEXTS]
    for given in (TEXTS, ids):
        answer = client.embeddings.create(model="toy", input=given, extra_body={"pooling": pooling}, **encoding)
        wanted = model.embed(TEXTS, pooling=pooling, normalize=True)
        np.testing.assert_allclose([one.embedding for one in answer.data], wanted, atol=1e-6)
        assert [one.index for one in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    for one in (TEXTS[0], ids[0]):
        answer = client.embeddings.create(model="toy", input=one, dimensions=model.manifest.hidden_size)
        assert len(answer.data) == 1
        assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"model": "plain", "input": "x"}, 400, "--hidden-states"),
        ({"model": "toy", "input": "x", "dimensions": 3}, 422, "dimensions"),
        ({"model": "toy", "input": []}, 400, "empty"),
        ({"model": "toy", "input": [""]}, 400, "empty"),
        ({"model": "toy", "input": [1] * 65}, 400, "capacity of 64"),
        ({"model": "toy", "input": [10**6]}, 400, "not in the vocabulary"),
        ({"model": "toy", "input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"model": "toy", "input": "x" * 6000}, 413, "over 5000 bytes"),
        ({"model": "toy", "input": "x", "extra_body": {"pooling": "max"}}, 400, "pooling"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(asked, status, says, client) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(**asked)
    assert caught.value.status_code == status
    assert says in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]
