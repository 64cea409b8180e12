"Ports, GPUs, JupyterLab and VSCode of a box: a real sshd, a proxy that breaks, a stand-in for nvidia-smi that speaks its CSV."

import argparse
import contextlib
import http.server
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from box import USER, Box, argv, contents, free_port, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.code import code
from nanogpt_nb.remote.forward import forward
from nanogpt_nb.remote.gpus import GPUs, gpus, looks
from nanogpt_nb.remote.jobs import jobs
from nanogpt_nb.remote.lab import lab, lab_from_args, stop_lab
from nanogpt_nb.remote.ssh import Host

fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")

NVIDIA = "/usr/bin/nvidia-smi"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("reach")


@pytest.fixture(scope="module")
def machine(place):
    "One box for all tests, with a folder of its own at the head of its PATH."
    (place / "bin").mkdir()
    path = f"{place / 'bin'}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    with Box(place, path=path) as box:
        yield box


@pytest.fixture
def box(machine, monkeypatch):
    machine.wire.delay, machine.wire.black, machine.wire.refuse, machine.wire.cut_after = 0, False, False, None
    return machine.use(monkeypatch)


@pytest.fixture
def host(box):
    with Host(box.name) as host:
        yield host


class Server:
    "A server on the box that answers each connection by `serve(connection)`."

    def __init__(self, serve):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.serve, self.open = self.socket.getsockname()[1], serve, []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                one, _ = self.socket.accept()
            except OSError:
                return
            self.open.append(one)
            threading.Thread(target=self._go, args=(one,), daemon=True).start()

    def _go(self, one):
        try:
            self.serve(one)
        except OSError:
            pass
        finally:
            one.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for s in (self.socket, *self.open):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()


def everything(s: socket.socket) -> bytes:
    said = b""
    while data := s.recv(1 << 16):
        said += data
    return said


def echo(one):
    while data := one.recv(1 << 16):
        one.sendall(data)


def tail(one):
    "All of the question, and only then the answer."
    one.sendall(everything(one)[::-1])


# A port there, here


def test_bytes_go_both_ways_and_an_end_of_one_way_leaves_the_other(host):
    data = os.urandom(3_000_000)
    with Server(tail) as there, forward(host, there.port) as tunnel, socket.create_connection(("127.0.0.1", tunnel.port)) as s:
        threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
        assert everything(s) == data[::-1]


def test_many_connections_at_once_do_not_mix(host):
    answers = {}

    def ask(i, port):
        with socket.create_connection(("127.0.0.1", port)) as s:
            data = bytes([i]) * 200_000
            threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
            answers[i] = everything(s) == data

    with Server(echo) as there, forward(host, there.port) as tunnel:
        threads = [threading.Thread(target=ask, args=(i, tunnel.port)) for i in range(40)]
        [t.start() for t in threads]
        [t.join(180) for t in threads]
        assert answers == dict.fromkeys(range(40), True)
        until(lambda: not tunnel.open, "the tunnel to forget what has ended")


def test_only_this_machine_can_use_it(host):
    with Server(echo) as there, forward(host, there.port) as tunnel:
        assert tunnel.server.getsockname() == ("127.0.0.1", tunnel.port)
        assert tunnel.url == f"http://127.0.0.1:{tunnel.port}"


def test_a_port_that_is_taken_is_told_before_anything_is_connected(box):
    with Server(echo) as mine, pytest.raises(HostError, match=f"port {mine.port} of this machine is taken"):
        forward(Host("nobody-knows-this-host"), 8888, mine.port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_no_port_is_refused(host, port):
    with pytest.raises(ConfigError, match="is no port"):
        forward(host, port)


def test_a_host_that_cannot_be_reached_is_told_at_once_and_the_port_is_free_again(box):
    port = free_port()
    box.wire.refuse = True
    with Host(box.name) as host, pytest.raises(HostError):
        forward(host, 8888, port)
    socket.create_server(("127.0.0.1", port)).close()


def test_nobody_answering_there_ends_the_connection_here_and_is_remembered(host):
    with forward(host, free_port()) as tunnel:
        with socket.create_connection(("127.0.0.1", tunnel.port)) as s, pytest.raises(ConnectionResetError):
            s.recv(1)
        assert "Nothing answers" in str(tunnel.error)
        with pytest.raises(HostError, match=f"Nothing answers at 127.0.0.1:{tunnel.to[1]} on gpu"):
            tunnel.check()


def test_a_box_that_allows_no_tunnel_says_so(place, monkeypatch):
    with Box(place, "strict", config="") as box:
        box.stop()
        settings = box.folder / "sshd_config"
        settings.write_text(settings.read_text().replace("AllowTcpForwarding yes", "AllowTcpForwarding no"))
        box.start()
        box.use(monkeypatch)
        with Host("strict") as host, forward(host, 8888) as tunnel, pytest.raises(HostError, match="AllowTcpForwarding yes"):
            tunnel.check()


def test_closing_lets_go_of_the_port_and_ends_what_goes_through(host):
    with Server(echo) as there:
        tunnel = forward(host, there.port)
        s = socket.create_connection(("127.0.0.1", tunnel.port))
        s.sendall(b"a")
        assert s.recv(1) == b"a"
        tunnel.close()
        with s, pytest.raises(ConnectionResetError):
            s.recv(1)
        socket.create_server(("127.0.0.1", tunnel.port)).close()
        tunnel.close()


def test_a_reader_that_goes_away_ends_the_connection_there(host):
    ended = threading.Event()

    def pour(one):
        try:
            while True:
                one.sendall(b"x" * (1 << 16))
        except OSError:
            ended.set()

    with Server(pour) as there, forward(host, there.port) as tunnel:
        s = socket.create_connection(("127.0.0.1", tunnel.port))
        assert s.recv(1) == b"x"
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
        assert ended.wait(120)


def get(tunnel) -> bytes:
    return urllib.request.urlopen(tunnel.url, timeout=60).read()


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"loss 1.48")

    def log_message(self, *_):
        pass


@pytest.fixture
def page():
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web.server_port
    web.shutdown()
    web.server_close()


def test_a_cut_is_seen_as_a_cut_and_the_next_connection_goes_over_a_new_one(box, host, page):
    with Server(echo) as there, forward(host, there.port) as tunnel, forward(host, page) as pages:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", tunnel.port)) as s:
                s.sendall(b"half an ans")
                assert s.recv(1) == b"h"
                assert box.wire.cut() >= 1
                with pytest.raises(ConnectionResetError):
                    while s.recv(1 << 16):
                        pass
            assert get(pages) == b"loss 1.48"


def test_who_connects_while_the_box_is_away_waits_for_it(box, host, page):
    with forward(host, page) as tunnel:
        before = box.wire.connections
        box.stop()
        box.wire.cut()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(get(tunnel)))
        asking.start()
        until(lambda: box.wire.connections > before + 1, "two attempts to connect")
        box.start()
        asking.join(180)
        assert answers == [b"loss 1.48"]


@pytest.mark.slow
def test_a_wire_that_swallows_everything_ends_what_goes_through(box, host, page):
    with Server(echo) as there, forward(host, there.port) as tunnel, forward(host, page) as pages:
        with socket.create_connection(("127.0.0.1", tunnel.port)) as s:
            s.sendall(b"a")
            assert s.recv(1) == b"a"
            box.wire.black = True
            s.settimeout(60)
            with pytest.raises(ConnectionResetError):
                s.recv(1)
        box.wire.black = False
        box.wire.cut()
        assert get(pages) == b"loss 1.48"


# What the GPUs do

CARD = "0, GPU-5d1f, 550.54.15, 87, 41231, 81559, 512.31, 700.00, 61, NVIDIA H100 80GB HBM3"


def stand_in(place, cards="", apps="", code=0, before=""):
    "An nvidia-smi on the box that speaks the real one's CSV."
    script = place / "bin" / "nvidia-smi"
    script.with_suffix(".new").write_text(
        f"#!/bin/sh\n{before}\ncase $1 in --query-gpu=*) cat <<'EOF'\n{cards}\nEOF\nexit {code};; --query-compute-apps=*) cat <<'EOF'\n{apps}\nEOF\nesac\n"
    )
    script.with_suffix(".new").chmod(0o755)
    script.with_suffix(".new").rename(script)


@pytest.fixture
def smi(place):
    yield lambda *args, **kwargs: stand_in(place, *args, **kwargs)
    (place / "bin" / "nvidia-smi").unlink(missing_ok=True)


def test_a_card_with_a_process_and_its_user(host, smi):
    p = subprocess.Popen(["sleep", "600"])
    try:
        smi(
            f"{CARD}\n1, GPU-77aa, 550.54.15, [N/A], 4, 81559, [N/A], [N/A], 28, NVIDIA H100 80GB HBM3",
            f"GPU-5d1f, {p.pid}, 40960, /usr/bin/sleep",
        )
        found = gpus(host)
    finally:
        p.kill()
        p.wait()
    assert [g["utilization"] for g in found] == [87, None]
    assert (found[0]["memory_used"], found[0]["power"], found[0]["temperature"]) == (41231, 512.31, 61)
    (process,) = found[0]["processes"]
    assert process == dict(pid=p.pid, user=USER, memory=40960, command="sleep")
    assert "gpu: 2 × NVIDIA H100 80GB HBM3, driver 550.54.15" in found.text()
    assert f"{USER} {p.pid} sleep (40.0 GiB)" in found.text() and "87 %" in found._repr_html_()


@pytest.mark.skipif(os.path.exists(NVIDIA), reason="this machine has an nvidia-smi")
def test_none_there_says_so(host):
    found = gpus(host)
    assert list(found) == [] and not found.broken
    assert found.text().startswith("gpu has no NVIDIA GPU: there is no nvidia-smi")


@pytest.mark.parametrize(
    "code, said, told",
    [
        (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54", "Driver/library version mismatch"),
        (
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.",
            "communicate with the NVIDIA driver",
        ),
        (
            15,
            "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU",
            "GPU is lost",
        ),
        (2, 'Field "power.limit" is not a valid field to query.', "not a valid field"),
        (1, "", r"nothing \(exit code 1\)"),
    ],
)
def test_a_broken_driver_is_told_in_its_own_words(host, smi, code, said, told):
    smi(said, code=code)
    found = gpus(host)
    assert found.broken and not found
    assert re.search(told, found.text())
    assert "nanogpt doctor gpu" in found.text()


def test_a_card_that_is_lost_is_told_beside_those_that_work(host, smi):
    smi(f"Unable to determine the device handle for GPU1: 0000:3B:00.0: Unknown Error\n{CARD}", code=15)
    found = gpus(host)
    assert len(found) == 1 and "Unknown Error" in found.text() and "Unknown Error" in found._repr_html_()


def test_a_driver_that_hangs_is_not_waited_for(host, smi):
    smi(before="exec sleep 600")
    found = GPUs(host.call("gpus.look", patience=0.2), "gpu")
    assert found.broken and "the driver hangs" in found.text()


def test_the_live_table_goes_on_after_the_connection_broke(box, host, smi):
    smi(CARD)
    stream = looks(host, 0.05)
    assert next(stream)[0]["utilization"] == 87
    for _ in range(3):
        box.wire.cut()
        smi(CARD.replace("87", "12"))
        until(lambda: next(stream)[0]["utilization"] == 12, "the new figure")
    stream.close()


LIVE = "from nanogpt_nb.remote.gpus import gpus; gpus('gpu', live=True, every=0.05)"


def rest(terminal):
    "What is still to be read from a terminal that nobody writes to any more."
    with contextlib.suppress(OSError):
        return os.read(terminal, 1 << 16).decode(errors="replace")
    return ""


def test_on_a_terminal_the_live_table_is_drawn_in_place_until_ctrl_c(host, smi):
    smi(CARD)
    near, far = os.openpty()
    fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    p = subprocess.Popen([sys.executable, "-c", LIVE], stdin=far, stdout=far, stderr=far, start_new_session=True)
    os.close(far)
    seen = bytearray()

    def shows(words):
        seen.extend(os.read(near, 1 << 16))
        return words in seen

    try:
        until(lambda: shows(b"87 %"), "the table")
        smi(CARD.replace(" 87,", " 12,"))
        until(lambda: shows(b"12 %"), "the next one")
        p.send_signal(signal.SIGINT)
        until(lambda: shows(b"\x1b[?25h"), "the cursor")
        ended = p.wait(120)
        assert ended == 0, seen[-4000:].decode(errors="replace") + rest(near)
    finally:
        p.kill()
        p.wait()
        os.close(near)


def test_live_into_a_pipe_is_one_table_after_another_until_nobody_reads(host, smi):
    smi(CARD)
    p = subprocess.Popen([sys.executable, "-c", LIVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [p.stdout.readline() for _ in range(8)]
    p.stdout.close()
    assert lines[0] == lines[4] and "NVIDIA H100" in lines[0] and "87 %" in lines[2]
    assert p.wait(120) == 0 and p.stderr.read() == ""
    p.stderr.close()


def test_names_from_there_are_escaped():
    odd = dict(
        index=0,
        name="<i>",
        driver="1",
        utilization=None,
        memory_used=None,
        memory_total=None,
        power=None,
        power_limit=None,
        temperature=None,
        alarms=[],
        processes=[],
    )
    html = GPUs(dict(gpus=[odd], time=0), "a<b")._repr_html_()
    assert "<i>" not in html and "a<b" not in html and "&lt;i&gt;" in html


# JupyterLab


@pytest.fixture(scope="module")
def there(machine):
    "The project's folder on the box."
    (machine.home / "nanogpt" / "lecture").mkdir(parents=True)
    return machine.home / "nanogpt" / "lecture"


@pytest.fixture
def labbed(host, there):
    "A host that has a JupyterLab in the Python of these tests; none runs afterwards."
    host.settings["python"] = sys.executable
    yield host
    stop_lab(host, grace=10)


def asked(made, path="api/kernels", data=None, token=True) -> object:
    headers = {"Authorization": f"token {made.token}"} if token else {}
    request = urllib.request.Request(f"{made.tunnel.url}{made.base}{path}", data=data, headers=headers)
    return json.load(urllib.request.urlopen(request, timeout=60))


def test_jupyterlab_from_start_to_stop(box, labbed, there):
    # four laptops ask at once, and get the same
    made, *others = found = together(4, lambda: lab(known(box), path="nanogpt/lecture", open_browser=False))
    assert len({(one.id, one.token) for one in found}) == 1
    assert [j.id for j in jobs(labbed)] == [made.id] and made.root == str(there)
    assert asked(made, "api/contents")["content"] == asked(others[0], "api/contents")["content"] == []

    # asked again, it is what is open already
    assert lab(made.host, path=str(there), open_browser=False) is made

    # the token is what lets one in
    with pytest.raises(urllib.error.HTTPError) as e:
        asked(made, token=False)
    assert e.value.code == 403
    assert urllib.request.urlopen(made.url, timeout=60).status == 200

    # and nobody else can read it
    assert made.token not in repr(made) + made._repr_html_()
    lists = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if readable(p)]
    assert len(lists) > 5 and not [words for words in lists if made.token.encode() in words]
    holding = [p for p, data in contents(box.home) if made.token.encode() in data]
    assert holding and [p for p in holding if p.stat().st_mode & 0o077 or ".nanogpt_nb" in p.parts] == []

    # a kernel goes on over a connection that breaks
    kernel = asked(made, data=b"{}")["id"]
    box.wire.cut()
    assert [k["id"] for k in asked(made)] == [kernel]

    # the end takes the kernels along
    until(lambda: kernels(box), "the kernel's process")
    assert stop_lab(labbed, "nanogpt/lecture", grace=20) == [str(there)]
    assert kernels(box) == [] and labbed.call("lab.labs")["labs"] == []
    for one in found:
        one.close()
        one.host.close()


def known(box) -> Host:
    "Another laptop's view of the box."
    host = Host(box.name)
    host.settings["python"] = sys.executable
    return host


def together(n: int, f) -> list:
    "What `f` gives in each of `n` threads."
    found = []

    def go():
        try:
            found.append(f())
        except Exception as e:
            found.append(e)

    threads = [threading.Thread(target=go) for _ in range(n)]
    [t.start() for t in threads]
    [t.join(300) for t in threads]
    assert [e for e in found if isinstance(e, Exception)] == [] and len(found) == n
    return found


def readable(path) -> bool:
    try:
        return path.read_bytes() is not None
    except OSError:
        return False


def kernels(box) -> list[int]:
    return [pid for pid in box.processes() if b"ipykernel" in argv(pid)]


def test_a_jupyterlab_that_does_not_start_says_why(labbed, there, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\ncase \"$*\" in *'jupyterlab --'*) echo 'No module named tornado' >&2; exit 1;; esac\nexec {sys.executable} \"$@\"\n"
    )
    python.chmod(0o755)
    labbed.settings["python"] = str(python)
    with pytest.raises(HostError, match=r"JupyterLab on gpu ended \(No module named tornado\); nanogpt job logs gpu lab_"):
        lab(labbed, path="nanogpt/lecture", open_browser=False)


SERVER = """
import http.server, json, os, sys
web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
folder = os.path.expanduser("~/.local/share/jupyter/runtime")
os.makedirs(folder, exist_ok=True)
info = dict(pid=os.getpid(), port=web.server_port, token=os.environ.get("TOKEN", os.environ["JUPYTER_TOKEN"]), base_url="/")
with open(os.path.join(folder, "jpserver-%d.json" % os.getpid()), "w") as f: json.dump(info, f)
web.serve_forever()
"""


@pytest.fixture
def quick(labbed, tmp_path):
    "A Python on the box whose JupyterLab starts quickly: it is a stand-in. `quick(shell)` sets what comes first."

    def make(shell=""):
        python = tmp_path / "python"
        (tmp_path / "server.py").write_text(SERVER)
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{shell}\nexec {sys.executable} {tmp_path}/server.py\n')
        python.chmod(0o755)
        labbed.settings["python"] = str(python)
        return labbed

    return make


def test_a_server_without_a_token_is_not_used(quick, there):
    host = quick("export TOKEN=")
    with pytest.raises(HostError, match="turn the token off"):
        lab(host, path="nanogpt/lecture", open_browser=False)
    assert until(lambda: not host.call("lab.labs")["labs"], "its end")


@pytest.mark.slow
def test_settings_that_turn_the_token_off_are_not_followed(box, labbed, there):
    config = box.home / ".jupyter" / "jupyter_server_config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps({"IdentityProvider": {"token": ""}}))
    try:
        with pytest.raises(HostError, match="turn the token off"):
            lab(labbed, path="nanogpt/lecture", open_browser=False)
    finally:
        config.unlink()
    assert until(lambda: not labbed.call("lab.labs")["labs"], "its end")


@pytest.mark.parametrize("after", [0, 500, 1000, 2000])
def test_a_cut_while_it_starts_leaves_one(box, quick, there, after):
    host = quick()
    host.connect()
    box.wire.cut_after = box.wire.bytes + after
    made = lab(host, path="nanogpt/lecture", open_browser=False)
    assert box.wire.cut_after is None
    assert [one["job"] for one in host.call("lab.labs")["labs"]] == [made.id]
    made.stop(grace=5)


def test_a_port_that_is_taken_here_is_no_hindrance(quick, there, monkeypatch):
    host = quick()
    made = lab(host, path="nanogpt/lecture", open_browser=False)
    other = known_as(made.host)
    monkeypatch.setattr("nanogpt_nb.remote.lab._open", {})  # another process
    with other, Server(echo) as taken:
        again = lab(other, path="nanogpt/lecture", open_browser=False)
        assert again.id == made.id and again.tunnel.port != made.tunnel.port
        with pytest.raises(HostError, match="is taken"):
            lab(other, path="nanogpt/lecture", open_browser=False, local_port=taken.port)
        again.close()
    made.stop(grace=5)


def known_as(host) -> Host:
    other = Host(host.name)
    other.settings.update(host.settings)
    return other


def test_the_browser_gets_the_token_by_a_file_and_not_by_its_command_line(box, quick, there, tmp_path, monkeypatch):
    said = tmp_path / "browser-said"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {said}.new; mv {said}.new {said}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setattr("webbrowser._tryorder", None)
    monkeypatch.setattr("webbrowser._browsers", {})
    made = lab(quick(), path="nanogpt/lecture")
    until(said.exists, "the browser")
    assert made.token not in said.read_text() and said.read_text().startswith("file://")
    page = Path(said.read_text().strip().removeprefix("file://"))
    assert made.url in page.read_text() and page.stat().st_mode & 0o077 == 0
    made.stop(grace=5)


def test_the_command_line_shows_the_link_and_lets_go_at_ctrl_c(box, quick, there, monkeypatch, capsys):
    host = Host.of(box.name)
    host.settings.update(quick().settings)
    args = argparse.Namespace(on=box.name, path="nanogpt/lecture", stop=False, browser=False)
    done = []
    serving = threading.Thread(target=lambda: done.append(lab_from_args(args)))
    serving.start()
    shown = []
    until(lambda: shown.append(capsys.readouterr().out) or "token=" in "".join(shown), "the link")
    made = lab(host, path="nanogpt/lecture", open_browser=False)
    assert made.url in "".join(shown)
    made.tunnel.close()
    serving.join(120)
    assert done == [0] and "nanogpt lab --on gpu --stop" in capsys.readouterr().out
    assert lab_from_args(argparse.Namespace(on=box.name, path=None, stop=True, browser=False)) == 0
    assert f"JupyterLab in {there} has ended" in capsys.readouterr().out
    host.close()


def test_an_environment_is_prepared_where_no_python_has_it(labbed, there, monkeypatch):
    asked_for = []
    monkeypatch.setattr(
        "nanogpt_nb.remote.prepare.prepare", lambda host, **how: asked_for.append(how) or argparse.Namespace(python="/usr/bin/false")
    )
    del labbed.settings["python"]
    with pytest.raises(HostError, match="prepared on gpu cannot import jupyterlab"):
        lab(labbed, path="nanogpt/lecture", open_browser=False)
    assert "jupyterlab" in asked_for[0]["extra"]
    labbed.settings["python"] = "/usr/bin/false"
    with pytest.raises(HostError, match="/usr/bin/false -m pip install jupyterlab"):
        lab(labbed, path="nanogpt/lecture", open_browser=False)


def test_a_project_that_was_not_sent_is_told(host, tmp_path):
    (tmp_path / "nobody").mkdir()
    (tmp_path / "nobody" / "pyproject.toml").touch()
    for f in (lambda: lab(host, tmp_path / "nobody"), lambda: code(host, tmp_path / "nobody")):
        with pytest.raises(HostError, match="no folder ~/nanogpt/nobody on gpu; send the project there with nanogpt push gpu"):
            f()


def test_a_folder_of_a_project_goes_where_push_sends_it(tmp_path, monkeypatch):
    from nanogpt_nb.remote.files import project_folder
    from nanogpt_nb.remote.lab import folder_there

    class Plain:
        name, settings = "gpu", {}

    (tmp_path / "whole/part").mkdir(parents=True)
    (tmp_path / "whole/pyproject.toml").touch()
    assert folder_there(Plain, tmp_path / "whole/part") == "~/nanogpt/part" and folder_there(Plain, tmp_path / "whole") == "~/nanogpt/whole"
    monkeypatch.chdir(tmp_path / "whole/part")
    assert folder_there(Plain) == "~/nanogpt/whole" and project_folder() == tmp_path / "whole"


# VSCode


def test_vscode_opens_the_project_there(host, there, tmp_path, monkeypatch):
    program = tmp_path / "code"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/said\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("VSCODE_IPC_HOOK_CLI", raising=False)
    opened = code(host, path="~/nanogpt/lecture")
    assert opened.started and (tmp_path / "said").read_text().split() == ["--remote", "ssh-remote+gpu", str(there)]
    assert opened.link == f"vscode://vscode-remote/ssh-remote+gpu{there}"


def test_vscode_needs_an_alias(box):
    with pytest.raises(HostError, match=f"nanogpt host add gpu {box.user}@127.0.0.1:{box.port}"):
        code(f"{box.user}@127.0.0.1:{box.port}")
