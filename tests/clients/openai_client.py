"""The official client: chat, streams, completions with log-probabilities, models, errors.

    openai_client.py PROGRAM      starts `PROGRAM serve` on the demo model, with a key, and ends it
"""

import pathlib
import subprocess
import sys
import threading

import openai

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEY = "sk-test"
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]


def start(program):
    command = [program, "serve", str(ROOT / "demo/model"), "--listen", "127.0.0.1:0", "--tp", "2",
               "--served-model-name", "demo", "--api-key", KEY]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, server.kill)
    watchdog.start()
    for line in server.stdout:
        if line.startswith("serving on "):
            watchdog.cancel()
            return server, line.split()[2]
    raise SystemExit("the server did not become ready")


def chat(client):
    whole = client.chat.completions.create(model="demo", messages=STORY, temperature=0.7, seed=3, max_tokens=120)
    text = whole.choices[0].message.content
    assert "fox" in text, text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="demo", messages=STORY, temperature=0.7, seed=3, max_tokens=120, stream=True,
        stream_options={"include_usage": True})
    pieces, usage, reasons = [], None, []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
    assert "".join(pieces) == text, "a stream says something else than a whole answer"
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
    scored = client.chat.completions.create(
        model="demo", messages=STORY, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3, n=2)
    assert len(scored.choices) == 2
    for choice in scored.choices:
        assert len(choice.logprobs.content) == 5
        for token in choice.logprobs.content:
            assert token.logprob == token.top_logprobs[0].logprob and len(token.top_logprobs) == 3


def completions(client):
    reply = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=12, temperature=0, logprobs=4,
                                      echo=True)
    choice = reply.choices[0]
    assert choice.text.startswith("Once upon a time")
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.token_logprobs[1] < 0
    assert "".join(choice.logprobs.tokens) == choice.text
    batch = client.completions.create(model="demo", prompt=["One", "Two"], max_tokens=4, temperature=0)
    assert [c.index for c in batch.choices] == [0, 1]
    stopped = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=60, temperature=0, stop=["."])
    assert "." not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop"


def models(client):
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def errors(client, address):
    def refused(kind, call):
        try:
            call()
        except kind as error:
            return error
        raise AssertionError(f"{kind.__name__} was expected")

    ask = client.chat.completions.create
    refused(openai.NotFoundError, lambda: ask(model="other", messages=STORY))
    error = refused(openai.BadRequestError, lambda: ask(model="demo", messages=STORY, temperature=-1))
    assert error.param == "temperature", error
    refused(openai.BadRequestError, lambda: ask(model="demo", messages=STORY, max_tokens=10**9))
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="sk-wrong", max_retries=0)
    refused(openai.AuthenticationError, lambda: stranger.models.list())


def main():
    server, address = start(sys.argv[1])
    try:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)
        passed = 0
        for check in (chat, completions, models):
            check(client)
            passed += 1
        errors(client, address)
        passed += 1
        print(f"openai {openai.__version__}: {passed} passed, 0 failed")
    finally:
        server.terminate()
        assert server.wait(20) == 0, "the server did not end cleanly"


main()
