"What the tests of corpus, tokenizer and data share."

import contextlib
import http.server
import os
import subprocess
import sys
import threading

import pytest

from nanogpt_nb import shakespeare
from nanogpt_nb.corpus import tiny_shakespeare

NO_PIP = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder."
    monkeypatch.setenv("NANOGPT_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def plays():
    "Tiny Shakespeare (whichever edition this machine can have), from the user's own cache."
    return tiny_shakespeare(progress=False)


class Server:
    "A web server on this machine that answers every request by `answer`, and counts the requests."

    def __init__(self, answer):
        self.requests = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests += 1
                answer(self)

            def log_message(self, *args): pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/input.txt"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()


def send(body, promise=None, status=200):
    "An answer with `body`, whose header promises `promise` bytes."
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if promise is None else promise))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = True
    return answer


@pytest.fixture
def serve(monkeypatch):
    "serve(answer): a server that stands in for tiny Shakespeare's address."
    servers = []
    for k in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(answer):
        servers.append(Server(answer))
        monkeypatch.setattr(shakespeare, "SHAKESPEARE_URL", servers[-1].url)
        return servers[-1]
    yield start
    for s in servers: s.close()


@pytest.fixture
def refused(monkeypatch):
    "An address where nobody listens."
    s = Server(send(b""))
    s.close()
    monkeypatch.setattr(shakespeare, "SHAKESPEARE_URL", s.url)


def python(code, *args, env=None, **kw):
    "Start Python on `code`, in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def finish(process, timeout=300):
    "The output of a process that must end well."
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


@contextlib.contextmanager
def one_sentence(error, *words):
    "The block must raise `error`, exit_code 2, as one line that has `words`."
    with pytest.raises(error) as caught: yield caught
    said = str(caught.value)
    assert "\n" not in said.strip() and said.rstrip().endswith((".", ")"))
    for w in words: assert str(w) in said
    assert caught.value.exit_code == 2
