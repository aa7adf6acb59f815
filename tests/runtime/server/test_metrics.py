"""What Prometheus is told, after calls whose numbers are known."""

import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

CONVERSATION = [{"role": "user", "content": "hello there"}]


def metrics(client: openai.OpenAI) -> dict[tuple[str, ...], float]:
    """By name and labels' values but the model's."""
    address = str(client.base_url).removesuffix("v1/")
    with urllib.request.urlopen(f"{address}metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {
        (s.name, *(v for k, v in sorted(s.labels.items()) if k not in ("model", "le"))): s.value
        for s in samples
        if s.labels.get("le", "+Inf") == "+Inf"
    }


def test_they_count_what_happened(scripted) -> None:
    client, _ = scripted("one two", slots=2)
    before = metrics(client)
    assert before["headfold_answers_total", "cancelled"] == 0
    asked = {"model": "script", "messages": CONVERSATION}
    answer = client.chat.completions.create(**asked)
    again = client.chat.completions.create(**asked, n=2, max_tokens=2)
    stream = client.chat.completions.create(**asked, stream=True)
    list(stream)
    for wrong in ({"temperature": -1}, {"model": "other"}):
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**asked | wrong)
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    after, tokens, prompt = metrics(client), answer.usage.completion_tokens, answer.usage.prompt_tokens
    assert after["headfold_new_tokens_total",] == 2 * tokens + 4
    assert after["headfold_prompt_tokens_total",] + after["headfold_cached_tokens_total",] == 4 * prompt
    assert (
        after["headfold_cached_tokens_total",]
        >= 2 * (prompt - 2) + again.usage.prompt_tokens_details.cached_tokens - prompt
    )
    assert (after["headfold_slots",], after["headfold_live",], after["headfold_waiting",]) == (2, 0, 0)
    assert (after["headfold_answers_total", "stop"], after["headfold_answers_total", "length"]) == (2, 2)
    assert after["headfold_time_to_first_token_seconds_count",] == 4
    assert after["headfold_token_seconds_count",] == 2 * (tokens - 1) + 2
    route = "/v1/chat/completions"
    counts = {status: after["headfold_http_requests_total", route, status] for status in ("200", "400", "404")}
    assert counts == {"200": 3, "400": 1, "404": 1}
    assert after["headfold_http_requests_total", "none", "404"] == 1


def test_a_bug_of_ours_is_counted(scripted, monkeypatch) -> None:
    async def broken(*_: object) -> None:
        raise ArithmeticError("planted")

    monkeypatch.setattr("headfold.runtime.server.app.chat", broken)
    client, _ = scripted("one two")
    with pytest.raises(openai.InternalServerError, match="An internal error; the server's log has it"):
        client.chat.completions.create(model="script", messages=CONVERSATION)
    assert metrics(client)["headfold_http_requests_total", "/v1/chat/completions", "500"] == 1
