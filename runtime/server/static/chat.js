"use strict";
// The chat page: one conversation, kept in memory alone, streamed from /v1/chat/completions. Text is shown as text, never as HTML.

const at = (id) => document.getElementById(id);
const conversation = []; // {role, content}
let running = null; // the AbortController of the answer that comes

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

async function problem(response) {
  const body = await response.json().catch(() => null);
  const text = body?.error?.message ?? `The server answers ${response.status}.`;
  if (response.status === 401) {
    at("settings").open = true;
    at("key").focus();
  }
  return new Error(response.status === 401 ? "The server asks for an API key: it goes into the settings." : text);
}

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (!response.ok) throw await problem(response);
  const chosen = at("model").value;
  at("model").replaceChildren(...(await response.json()).data.map(({ id }) => new Option(id, id, false, id === chosen)));
}

function show(role, text) {
  at("empty").hidden = true;
  const article = document.createElement("article");
  article.className = `message ${role}`;
  article.setAttribute("aria-label", role === "user" ? "You" : "Answer");
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  article.append(paragraph);
  at("log").append(article);
  at("log").scrollTop = at("log").scrollHeight;
  return { article, paragraph };
}

// Yields the JSON of each server-sent event, until [DONE].
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

function request() {
  const system = at("system").value.trim();
  const number = (id) => (at(id).value === "" ? {} : { [id === "most" ? "max_completion_tokens" : id]: Number(at(id).value) });
  return {
    model: at("model").value || undefined,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
    ...number("temperature"),
    ...number("most"),
  };
}

async function answer() {
  running = new AbortController();
  const { article, paragraph } = show("assistant", "");
  article.classList.add("waiting");
  at("log").setAttribute("aria-busy", "true"); // read out once it is complete
  at("send").textContent = "Stop";
  let text = "", usage = null, first = null, cut = false;
  try {
    const body = JSON.stringify(request());
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: running.signal });
    if (!response.ok) throw await problem(response);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      cut ||= choice?.finish_reason === "length";
      if (!choice?.delta.content) continue;
      first ??= performance.now();
      text += choice.delta.content;
      const log = at("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      paragraph.textContent = text;
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    article.classList.remove("waiting");
    at("log").removeAttribute("aria-busy");
    at("send").textContent = "Send";
    running = null;
  }
  if (usage) {
    const seconds = (performance.now() - first) / 1000, small = document.createElement("small");
    const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} a second` : "";
    small.textContent = `${usage.completion_tokens} tokens${rate}${cut ? "; cut off at the limit" : ""}`;
    article.append(small);
    at("log").scrollTop = at("log").scrollHeight;
  }
  if (text) conversation.push({ role: "assistant", content: text });
  else article.remove();
  return Boolean(text);
}

async function send(event) {
  event?.preventDefault();
  if (running) return running.abort();
  const text = at("text").value.trim();
  if (!text) return;
  fail("");
  conversation.push({ role: "user", content: text });
  const { article } = show("user", text);
  at("text").value = "";
  grow();
  if (!(await answer())) { // it was not answered: it is the reader's again
    conversation.pop();
    article.remove();
    if (!at("text").value) at("text").value = text;
  }
  if (document.activeElement !== at("key")) at("text").focus(); // where a key is asked for, the focus is there
}

function grow() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight + 2}px`;
}

at("form").addEventListener("submit", send);
at("text").addEventListener("input", grow);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !running) send(event);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("new").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  document.querySelectorAll(".message").forEach((one) => one.remove());
  at("empty").hidden = false;
  fail("");
  at("text").focus();
});
at("key").addEventListener("change", () => listModels().then(() => fail(""), (error) => fail(error.message)));
listModels().catch((error) => fail(error.message));
