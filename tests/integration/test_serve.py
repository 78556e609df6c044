"""The server as its clients see it: the official openai client, raw sockets, and a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2", reason="the HTTP client that openai brings")

import torch  # noqa: E402
from made_adapters import TASKS, adapted, save  # noqa: E402
from test_export_dense import tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import multiflora  # noqa: E402
from multiflora.serve.app import create_app  # noqa: E402
from multiflora.serve.limits import Limits  # noqa: E402
from multiflora.serve.models import load_served  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
PROMPTS = ["w1 w2 w3", "w40 w7", "w11 w12 w13 w14 w15 w9", "w30"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, a token-routed and a task-gated adapter, as folders."""
    folder = tmp_path_factory.mktemp("serve")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=4096, pad_token_id=0, **shape))
    base.generation_config.eos_token_id = 1
    with torch.no_grad():
        base.lm_head.weight[:2] = 0  # never the likeliest: greedy answers end by length, and hold no special tokens
    base.save_pretrained(folder / "base")
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder / "base")
    for name in ("rlora", "mtllora"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        save(adapted(name, model, target_modules=["q_proj", "up_proj", "down_proj"]), folder / name)
    return folder


def load(place):
    base = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    return load_served(base, "base", {name: place / name for name in ("rlora", "mtllora")})


@contextmanager
def running(place, **words):
    """A server on a free port of this machine; gives its address."""
    app = create_app(load(place), _tokenizer(place), ends=[1], hosts=["127.0.0.1"], **words)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        httpx.get(f"{address}/health", timeout=60)  # waits in the listener's queue until the server is up
        yield address
    finally:
        server.should_exit = True
        thread.join()


def _tokenizer(place):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "base")


@pytest.fixture(scope="module")
def server(place):
    with running(place, limits=Limits(max_tokens=3000, max_body=20_000)) as address:
        yield address


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def client_of(address, **words):
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key=words.pop("api_key", "none"), timeout=120, max_retries=0, **words
    )


@pytest.fixture(scope="module")
def expected(place):
    """What transformers' own greedy decoding says, by model, task and prompt."""
    models, words = load(place), _tokenizer(place)
    found = {}
    for name, task in (("base", None), ("rlora", None), ("mtllora", TASKS[0]), ("mtllora", TASKS[1])):
        for prompt in PROMPTS:
            ids = words(prompt, return_tensors="pt")
            with multiflora.task(models[name].model, task or 0):
                out = models[name].model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            found[name, task, prompt] = words.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(set(found.values())) > 10, "the models answer alike, so the tests would not tell them apart"
    return found


def ask(client, name, task, prompt, *, stream=False, chat=True, by_header=False, max_tokens=8):
    words = {"model": name, "max_tokens": max_tokens, "temperature": 0, "stream": stream}
    if task is not None:
        words |= {"extra_headers": {"X-Multiflora-Task": task}} if by_header else {"extra_body": {"task": task}}
    if chat:
        made = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **words)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in made if chunk.choices)
        return made.choices[0].message.content
    made = client.completions.create(prompt=prompt, **words)
    return "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text


def stripped(text):
    return text.strip()


def test_models_are_listed_with_their_base_and_tasks(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["base", "rlora", "mtllora"]
    assert models["mtllora"].tasks == TASKS
    assert models["base"].parent is None
    assert client.models.retrieve("rlora").parent == "base"
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'; served are base, rlora, mtllora"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_answers_are_those_of_greedy_decoding(stream, chat, client, expected):
    for number, ((name, task, prompt), wanted) in enumerate(expected.items()):
        found = ask(client, name, task, prompt, stream=stream, chat=chat, by_header=number % 2 == 0)
        assert stripped(found) == wanted, (name, task, prompt)


def test_usage_and_finish_are_told_in_whole_and_streamed_answers(client):
    words = {"model": "rlora", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**words)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 5, 8)
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**words, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_several_prompts_come_back_in_order(client, expected):
    made = client.completions.create(model="rlora", prompt=PROMPTS, max_tokens=8, temperature=0)
    assert [stripped(choice.text) for choice in made.choices] == [expected["rlora", None, p] for p in PROMPTS]
    ids = client.completions.create(model="rlora", prompt=[3, 4, 5], max_tokens=8, temperature=0)
    assert stripped(ids.choices[0].text) == expected["rlora", None, "w1 w2 w3"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_ends_before_a_stop(stream, client, expected):
    wanted = expected["rlora", None, PROMPTS[0]]
    stop = wanted.split()[3]
    words = {"model": "rlora", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "stop": ["never", f" {stop}"]}
    made = client.completions.create(**words, stream=stream)
    choices = [chunk.choices[0] for chunk in made] if stream else made.choices
    cut = wanted.index(f" {stop}")
    assert stripped("".join(choice.text for choice in choices)) == wanted[:cut]
    assert choices[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_a_small_top_p_is_greedy(client, expected):
    words = {"model": "rlora", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 1.5}
    texts = [client.completions.create(**words, seed=seed).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    greedy = client.completions.create(**words, top_p=1e-6).choices[0].text
    assert stripped(greedy) == expected["rlora", None, PROMPTS[0]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "mtllora"}, "needs to know the task; its tasks are sums, labels"),
        ({"model": "mtllora", "extra_body": {"task": "poems"}}, "has no task 'poems'; its tasks are sums, labels"),
        ({"model": "base", "extra_body": {"task": "sums"}}, "base has no task 'sums'; it has no tasks"),
        (
            {"model": "mtllora", "extra_body": {"task": "sums"}, "extra_headers": {"X-Multiflora-Task": "labels"}},
            "header X-Multiflora-Task says 'labels' and the field task 'sums'",
        ),
        ({"model": "base", "n": 2}, "n: Input should be less than or equal to 1"),
        ({"model": "base", "extra_body": {"guided_regex": "x"}}, "guided_regex: Extra inputs are not permitted"),
        ({"model": "base", "max_tokens": 3001}, "max_tokens is 3001; this server writes at most 3000"),
        ({"model": "base", "prompt": [1, 50]}, "Token 50 does not exist; ids go from 0 to 49"),
        ({"model": "base", "temperature": 3}, "temperature: Input should be less than or equal to 2"),
    ],
)
def test_what_cannot_be_met_is_refused_in_words(words, message, client):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        client.completions.create(**{"prompt": "w1", "max_tokens": 2} | words)


def test_malformed_requests_get_an_error_and_leave_the_server_healthy(server, client, expected):
    url, json_type = f"{server}/v1/chat/completions", {"Content-Type": "application/json"}
    for body in (b"{", b"", b"[]", b'{"model": "base"}', b'{"model": 3, "messages": []}', b"\xff\xfe", b"null"):
        answer = httpx.post(url, content=body, headers=json_type)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{server}/nothing").status_code == 404
    assert httpx.get(f"{server}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    assert stripped(ask(client, "rlora", None, PROMPTS[1])) == expected["rlora", None, PROMPTS[1]]


def test_oversized_prompts_are_refused_by_bytes_and_by_tokens(server, client):
    with pytest.raises(openai.BadRequestError, match=r"The prompt has 5000 tokens.*the model holds 4096") as found:
        client.completions.create(model="base", prompt=[3] * 5000, max_tokens=2)
    assert found.value.code == "context_length_exceeded"
    large = json.dumps({"model": "base", "prompt": "w1 " * 10_000}).encode()
    json_type = {"Content-Type": "application/json"}
    assert httpx.post(f"{server}/v1/completions", content=large, headers=json_type).status_code == 413
    # sent in chunks, without a length that could be looked at first
    parts = (large[start : start + 1000] for start in range(0, len(large), 1000))
    assert httpx.post(f"{server}/v1/completions", content=parts, headers=json_type).status_code == 413


def test_a_client_that_hangs_up_frees_the_server(server, client, expected):
    """Each answer would take minutes; were it finished for nobody, the next request would wait that long."""
    body = {"model": "rlora", "prompt": PROMPTS[0], "max_tokens": 3000, "temperature": 0}
    with httpx.stream("POST", f"{server}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
        next(answer.iter_lines())
    host, port = server.removeprefix("http://").split(":")
    sent = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for half in (sent, sent[:20]):  # one hangs up while it waits, one while it still sends
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + half)
    assert stripped(ask(client, "rlora", None, PROMPTS[1])) == expected["rlora", None, PROMPTS[1]]
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}


def test_many_mixed_requests_lose_none(server, client, expected):
    keys = list(expected)

    def one(number):
        if number % 20 == 7:
            return httpx.post(f"{server}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        key = keys[number % len(keys)]
        return ask(client, *key, stream=number % 3 == 0, chat=number % 2 == 0, by_header=number % 5 == 0)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(64)))
    for number, answer in enumerate(found):
        if number % 20 == 7:
            assert answer.status_code == 400
        else:
            assert stripped(answer) == expected[keys[number % len(keys)]], number


def test_a_short_request_does_not_wait_for_a_long_answer(server, client, expected):
    with client.completions.create(
        model="mtllora", prompt=PROMPTS[0], max_tokens=3000, stream=True, temperature=0, extra_body={"task": TASKS[0]}
    ) as long:
        next(iter(long))
        assert stripped(ask(client, "rlora", None, PROMPTS[1])) == expected["rlora", None, PROMPTS[1]]
        running = re.search(r"^multiflora:num_requests_running (\d+)$", httpx.get(f"{server}/metrics").text, re.M)
        assert running[1] == "1"  # the long one goes on


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_probabilities_are_those_of_the_model(stream, client, place, expected):
    words = {"model": "rlora", "max_tokens": 8, "temperature": 0, "stream": stream}
    made = client.chat.completions.create(
        messages=[{"role": "user", "content": PROMPTS[0]}], logprobs=True, top_logprobs=3, **words
    )
    choices = [c.choices[0] for c in made] if stream else made.choices
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    served, tokens = load(place)["rlora"].model, _tokenizer(place)
    ids = tokens(f"{PROMPTS[0]} {expected['rlora', None, PROMPTS[0]]}", return_tensors="pt").input_ids
    with torch.no_grad():
        right = served(ids).logits.log_softmax(-1)[0, ids.shape[1] - 9 : -1]
    assert [token.logprob for token in told] == pytest.approx(right.max(-1).values.tolist(), abs=1e-4)
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in told)
    made = client.completions.create(prompt=PROMPTS[0], logprobs=2, **words)
    choices = [c.choices[0] for c in made] if stream else made.choices
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    assert [p for part in parts for p in part.token_logprobs] == pytest.approx([t.logprob for t in told], abs=1e-4)
    assert all(len(top) == 2 for part in parts for top in part.top_logprobs)
    offsets = [place for part in parts for place in part.text_offset]
    assert offsets == sorted(set(offsets))


def test_hundreds_that_hang_up_disturb_nobody(server, client, expected):
    """Every second client goes after the first piece; the others get their answers, and all room is free again."""
    keys = list(expected)

    def one(number):
        name, task, prompt = key = keys[number % len(keys)]
        if number % 2:
            return stripped(ask(client, *key, stream=number % 3 == 0)) == expected[key]
        words = {"extra_body": {"task": task}} if task else {}
        with client.completions.create(
            model=name, prompt=prompt, max_tokens=3000, stream=True, temperature=0, **words
        ) as gone:
            next(iter(gone))
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(200)))
    ask(client, *keys[0])  # those that are gone are let go of at the next token
    text = httpx.get(f"{server}/metrics").text
    assert "multiflora:num_requests_waiting 0\n" in text
    assert int(re.search(r'finished_reason="cancelled"} (\d+)', text)[1]) >= 90
    assert 'finished_reason="failed"} 0' in text


def test_a_request_larger_than_the_cache_is_refused_and_one_that_fills_it_waits(place, expected):
    with running(place, limits=Limits(max_cache=40, max_tokens=30)) as address:
        client = client_of(address)
        with pytest.raises(openai.BadRequestError, match=r"20 tokens.*may have 25, but this server holds 40") as found:
            client.completions.create(model="base", prompt=[3] * 20, max_tokens=25)
        assert found.value.code == "context_length_exceeded"
        with ThreadPoolExecutor(4) as pool:
            made = list(
                pool.map(
                    lambda _: client.completions.create(model="base", prompt=[3] * 10, max_tokens=30, temperature=0),
                    "abcd",
                )
            )
        assert [m.usage.completion_tokens for m in made] == [30] * 4


def test_a_server_that_stops_under_load_answers_everybody(place):
    with ThreadPoolExecutor(12) as pool:
        with running(place, limits=Limits(max_tokens=3000, max_batch=4)) as address:
            client = client_of(address)
            started = client.completions.create(model="base", prompt="w1", max_tokens=3000, stream=True, temperature=0)
            next(iter(started))

            def one(_):
                try:
                    return (
                        client.completions.create(model="rlora", prompt="w2", max_tokens=3000, temperature=0)
                        .choices[0]
                        .finish_reason
                    )
                except openai.APIError as error:
                    return type(error)

            asked = [pool.submit(one, number) for number in range(12)]
        assert all(future.result() is not None for future in asked)  # an answer or an error, and nobody hangs
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            list(started)


def test_a_key_is_asked_for_and_a_full_queue_says_so(place):
    limits = Limits(max_queue=1, max_batch=1, max_tokens=3000)
    with running(place, limits=limits, api_key="secret") as address:
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            client_of(address, api_key="guess").models.list()
        client = client_of(address, api_key="secret")
        assert client.models.list().data
        words = {"model": "base", "prompt": "w1", "max_tokens": 3000, "stream": True, "temperature": 0}
        first = client.completions.create(**words)
        next(iter(first))  # it runs
        waiting = ThreadPoolExecutor(1)
        second = waiting.submit(client.completions.create, **words)
        second.result()  # its headers have come: it waits
        with pytest.raises(openai.RateLimitError, match="Too many requests are waiting") as found:
            client.completions.create(**words)
        assert found.value.response.headers["retry-after"] == "1"
        first.close()
        second.result().close()


def test_the_command_serves_and_stops_when_told(place, expected):
    words = [sys.executable, "-m", "multiflora", "serve", str(place / "base"), f"mine={place / 'rlora'}", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_env()) as process:
        line = process.stdout.readline()
        address = re.fullmatch(r"Serving base, mine on (http://127\.0\.0\.1:\d+)/v1 \(Ctrl-C stops\)\n", line)
        try:
            assert address, line + process.stderr.read()
            found = ask(client_of(address[1]), "mine", None, PROMPTS[2])
        finally:
            process.send_signal(signal.SIGTERM)
            rest, log = process.communicate(timeout=60)
    assert stripped(found) == expected["rlora", None, PROMPTS[2]]
    assert rest == ""
    assert "Application shutdown complete" in log
    assert "Traceback" not in log


def test_a_taken_port_and_a_missing_adapter_are_told_in_one_paragraph(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            ([str(place / "base"), "--port", port], f"Cannot listen on 127.0.0.1 port {port}"),
            ([str(place / "base"), str(place), "--port", "0"], "holds no adapter: adapter_config.json is missing"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "multiflora", "serve", *words],
                capture_output=True,
                text=True,
                env=_env(),
                check=False,
            )
            assert done.returncode == 2
            assert message in done.stderr
            assert "Traceback" not in done.stderr


def _env():
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
