"""A box to connect to: a real sshd on loopback with a home of its own, and a proxy that delays, throttles, cuts and swallows.

    with Box(tmp_path) as box:
        box.use(monkeypatch)  # from here on, $HOME is a laptop's, whose ~/.ssh knows the box as `gpu`
        Host("gpu").run(["hostname"])
        box.wire.delay = 0.1  # seconds, each way
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if os.access(p, os.X_OK)), None)

try:
    import pwd

    USER = pwd.getpwuid(os.getuid()).pw_name
except ImportError:  # Windows, and why_no_box says so
    USER = ""


def why_no_box() -> str | None:
    "What is missing for a box on loopback; None where it can be had."
    missing = [name for name, there in dict(sshd=SSHD, **{n: shutil.which(n) for n in ("ssh", "ssh-keygen", "rsync", "git")}).items() if not there]
    if os.name != "posix":
        return "sshd needs a Unix"
    return f"not installed: {', '.join(missing)} (Debian, Ubuntu: apt-get install openssh-server openssh-client rsync git)" if missing else None


def free_port() -> int:
    "A port that nobody uses, below those that connections get: it stays free until somebody listens there."
    for port in iter(lambda: random.SystemRandom().randrange(10_000, 32_000), None):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def until(true, what: str, timeout: float = 120, every: float = 0.02):
    "What `true` gives, as soon as it is true."
    end = time.monotonic() + timeout
    while not (found := true()):
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(every)
    return found


class Wire:
    "A TCP proxy. `delay` in seconds each way and `rate` in bytes/s may change at any time; `cut` ends what is open; `black` swallows all, silently."

    def __init__(self, port: int):
        self.to, self.delay, self.rate, self.black, self.refuse = port, 0.0, None, False, False
        self.bytes, self.connections, self.pairs, self.cut_after = 0, 0, set(), None
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            try:
                if self.refuse:
                    raise OSError
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            for s in (near, far):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = (near, far)
            self.pairs.add(pair)
            for one, other in (pair, pair[::-1]):
                queue, ready = deque(), threading.Condition()
                threading.Thread(target=self._read, args=(one, queue, ready), daemon=True).start()
                threading.Thread(target=self._write, args=(pair, other, queue, ready), daemon=True).start()

    def _read(self, one, queue, ready):
        while True:
            try:
                data = one.recv(1 << 16)
            except OSError:
                data = b""
            with ready:
                while sum(len(d) for _, d in queue) > 1 << 22:
                    ready.wait(0.1)
                queue.append((time.monotonic() + self.delay, data))
                ready.notify_all()
            if not data:
                return

    def _write(self, pair, other, queue, ready):
        while True:
            with ready:
                while not queue:
                    ready.wait()
                due, data = queue.popleft()
                ready.notify_all()
            time.sleep(max(0, due - time.monotonic()))
            if self.black:
                continue
            try:
                if not data:
                    other.shutdown(socket.SHUT_WR)
                    return
                if self.rate:
                    time.sleep(len(data) / self.rate)
                self.bytes += len(data)
                if self.cut_after is not None and self.bytes >= self.cut_after:
                    self.cut_after = None
                    self._end(pair)
                    return
                other.sendall(data)
            except OSError:
                self._end(pair)
                return

    def _end(self, pair):
        self.pairs.discard(pair)
        for s in pair:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def cut(self) -> int:
        "End every connection; how many there were."
        pairs = list(self.pairs)
        for pair in pairs:
            self._end(pair)
        return len(pairs)

    def strike(self, kind: str, dice, refused: float, patience: float = 5) -> bool:
        "A fault of the line at random, `refused` for so many seconds; whether `kind` is one."
        if kind == "cut at a byte":
            self.cut_after = self.bytes + dice.randrange(60_000)
            with contextlib.suppress(AssertionError):
                until(lambda: self.cut_after is None, "the byte", patience)
            self.cut_after = None
        elif kind == "cut":
            self.cut()
        elif kind == "refused":
            self.refuse = True
            self.cut()
            time.sleep(refused)
            self.refuse = False
        elif kind == "swallowed":
            self.black = True
            time.sleep(dice.uniform(0, 25))
            self.black = False
        else:
            return False
        return True

    def close(self):
        self.server.close()
        self.cut()


class Box:
    "An sshd of our own at 127.0.0.1:`port`, behind a `wire`; its users' home is `home`, the laptop's is `laptop`."

    def __init__(self, folder: Path, name: str = "gpu", path: str | None = None, key: str = "ed25519", config: str = "", laptop: Path | None = None):
        self.name, self.folder, self.user = name, Path(folder) / f"box-{name}", USER
        self.home, self.laptop = self.folder / "home", laptop or Path(folder) / "laptop"
        self.ssh = self.laptop / ".ssh"
        for p in (self.home / ".ssh", self.ssh):
            p.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.key, self.host_key, self.port = self.ssh / f"id_{name}", self.folder / "host_key", free_port()
        make_key(self.key, key)
        make_key(self.host_key)
        self.authorized = self.home / ".ssh" / "authorized_keys"
        self.authorized.write_text(self.key.with_suffix(".pub").read_text())
        path = path or f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\nAuthorizedKeysFile {self.authorized}\nPidFile none\n"
            f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n"
            f"AllowTcpForwarding yes\nSubsystem sftp internal-sftp\nSetEnv HOME={self.home} PATH={path} OMP_NUM_THREADS=1 WANDB_MODE=disabled\n{config}"
        )
        self.process = self.wire = None

    def __enter__(self):
        self.start()
        self.wire = Wire(self.port)
        self.trust()
        with open(self.ssh / "config", "a") as f:
            f.write(f"Host {self.name}\n  HostName 127.0.0.1\n  Port {self.wire.port}\n  User {self.user}\n  IdentityFile {self.key}\n  IdentitiesOnly yes\n")
            f.write(f"  UserKnownHostsFile {self.ssh / 'known_hosts'}\n")
        return self

    def __exit__(self, *_):
        self.wire.close()
        self.stop()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def start(self):
        "Start sshd, on the same port each time."
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with open(self.folder / "sshd.log", "ab") as log:
            words = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(self._answers, f"sshd on port {self.port}, see {self.folder / 'sshd.log'}")

    def _answers(self):
        assert self.process.poll() is None, (self.folder / "sshd.log").read_text()[-500:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as s:
            return s.recv(4) == b"SSH-"

    def stop(self, sessions: bool = True):
        "End sshd; with `sessions`, the connections too, as when the machine goes away."
        ours = children(self.process.pid) if sessions else []
        self.process.kill()
        self.process.wait()
        for pid in ours:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def trust(self):
        "Write the box's host key into the laptop's known_hosts."
        kind, key = self.host_key.with_suffix(".pub").read_text().split()[:2]
        with open(self.ssh / "known_hosts", "a") as f:
            f.write(f"[127.0.0.1]:{self.wire.port} {kind} {key}\n")

    def use(self, monkeypatch):
        "Make this process a laptop's: its $HOME, and no agent."
        monkeypatch.setenv("HOME", str(self.laptop))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)
        return self

    def processes(self) -> list[int]:
        "The processes on the box: those whose HOME is the box's."
        mark, found = f"HOME={self.home}".encode(), []
        for p in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (p / "environ").read_bytes().split(b"\0"):
                    found.append(int(p.name))
        return found


def make_key(path: Path, kind: str = "ed25519", passphrase: str = ""):
    bits = ["-b", "2048"] if kind == "rsa" else []
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", kind, *bits, "-N", passphrase, "-C", "test", "-f", str(path)], check=True, stdin=subprocess.DEVNULL)


def contents(folder: Path):
    "The files below a folder, each with what is in it; what goes away meanwhile is passed over."
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            with contextlib.suppress(OSError):
                if path.is_file():
                    yield path, path.read_bytes()


def remove(folder: Path):
    "Remove a folder into which somebody may be writing."
    until(lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists(), f"the end of {folder}")


def argv(pid: int) -> bytes:
    "The command line of a process; nothing where it has ended."
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def children(pid: int) -> list[int]:
    "The descendants of a process, deepest last."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((p / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(p.name), *children(int(p.name))]
    return found


