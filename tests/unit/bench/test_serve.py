"""The clients: what they count, and what they say of a server that fails."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from multiflora.bench.serve import Order, Server, _running, ask, first_tokens, load
from multiflora.errors import EnvironmentProblem


@contextmanager
def answering(pause=0.0):
    """A server that writes as many words as it is asked for, a pause before each but of those of the model "quick"."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"task": self.headers["X-Multiflora-Task"]})
            self.send_response(404 if body["model"] == "none" else 200)
            self.end_headers()
            if body["model"] == "none":
                self.wfile.write(b"no such model")
                return
            self._say({"choices": [{"text": ""}]})
            for k in range(body["max_tokens"]):
                time.sleep(0 if body["model"] == "quick" else pause)
                self._say({"choices": [{"text": f" w{k}"}]})
            self._say({"choices": [], "usage": {}})
            self.wfile.write(b"data: [DONE]\n\n")

        def _say(self, what):
            self.wfile.write(b"data: " + json.dumps(what).encode() + b"\n\n")
            self.wfile.flush()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address, asked
        finally:
            server.shutdown()
            thread.join()


def test_tokens_are_counted_as_they_come():
    seen = []
    with answering() as (address, asked):
        assert ask(address, Order("quick", "w1 w2", 3, task="2"), seen.append) == 3
    assert seen == [1, 2, 3]
    assert asked == [
        {"model": "quick", "prompt": "w1 w2", "max_tokens": 3, "temperature": 0, "stream": True, "task": "2"}
    ]


def test_a_load_is_all_of_its_orders():
    with answering() as (address, asked):
        phases, written = load(Server(address, psutil.Process()), [Order("quick", f"w{k}", 2) for k in range(7)], 3)
    assert written == 14
    assert {body["prompt"] for body in asked} == {f"w{k}" for k in range(7)}
    assert set(phases["answers"]) == {"wall", "cpu"}


def test_a_short_request_beside_a_long_answer_waits_for_its_tokens():
    with answering(pause=0.002) as (address, _):
        waited = first_tokens(address, Order("slow", "w1", 400), Order("slow", "w1", 1), 3)
        assert len(waited) == 3
        assert all(0 <= number < 100 for number in waited)
        with pytest.raises(EnvironmentProblem, match="of 1 tokens was over before"):
            first_tokens(address, Order("quick", "w1", 1), Order("slow", "w1", 50), 3)


def test_an_error_and_a_server_that_is_gone_are_told():
    with (
        answering() as (address, _),
        pytest.raises(EnvironmentProblem, match="status 404 to a request for none: no such"),
    ):
        ask(address, Order("none", "w1", 1))
    with pytest.raises(EnvironmentProblem, match="hung up"):
        ask(address, Order("quick", "w1", 1))


def test_a_server_that_does_not_start_says_why(tmp_path):
    words = ["-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(EnvironmentProblem, match="did not start: no such model"), _running(words, tmp_path / "log"):
        pass
