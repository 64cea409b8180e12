"A host over a real sshd: addresses as ssh reads them, keys, jumps, commands, and lines that break."

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from box import Box, free_port, make_key, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote.address import INCLUDE, add_host, entries, find_address, hosts, remove_host
from nanogpt_nb.remote.agent import Dropped, HostError
from nanogpt_nb.remote.channel import Kept, Lines, words
from nanogpt_nb.remote.keys import ChangedKey, NotLetIn, UnknownKey, fingerprint, known, trust
from nanogpt_nb.remote.line import CIPHERS, KEX, MACS, Unreachable
from nanogpt_nb.remote.ssh import CommandFailed, Host, TimedOut

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A box that all may use and none may break."
    with pytest.MonkeyPatch.context() as m, Box(tmp_path_factory.mktemp("shared")) as box:
        box.use(m)
        yield box


@pytest.fixture
def gpu(shared, monkeypatch):
    shared.use(monkeypatch)
    with Host("gpu") as host:
        yield host


@pytest.fixture
def box(tmp_path, monkeypatch):
    "A box of one's own."
    with Box(tmp_path) as box:
        yield box.use(monkeypatch)


def quick(times=(0.3, 2.0), patience=120):
    "A host that notices a dead line soon."
    host = Host("gpu")
    host.times, host.patience = times, patience
    return host


def alone(code: str, *words: str, **more) -> subprocess.Popen:
    "A Python of its own that runs `code`."
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), PYTHONUNBUFFERED="1")
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


class TestAddress:
    CONFIGS = {
        "plain": ("Host gpu\n  HostName 192.0.2.7\n  Port 2222\n  User ubuntu\n  IdentityFile ~/.ssh/a\n  IdentityFile ~/.ssh/b\n", "gpu"),
        "unknown": ("Host gpu\n  HostName 192.0.2.7\n", "elsewhere.example.org"),
        "first wins": ("Host gpu\n  Port 1\nHost *\n  Port 2\n  User star\n", "gpu"),
        "negated": ("Host *.edu !mail.edu\n  User ed\nHost *\n  User other\n", "mail.edu"),
        "equals": ("Host=gpu\n  HostName = 192.0.2.7\n  Port=2200\n", "gpu"),
        "tokens": ("Host gpu\n  HostName %h.example.org\n  IdentityFile %d/keys/%r\n  User me\n", "gpu"),
        "match": ("Match host gpu\n  Port 7\nMatch all\n  Port 8\n", "gpu"),
        "match user": ("Host gpu\n  User ubuntu\nMatch user ubuntu\n  Port 9\n", "gpu"),
        "include": ("Include {d}/one\nUser after\n", "gpu"),
        "include in a section": ("Host lab\n  Include {d}/one\nHost gpu\n  Port 5\n", "gpu"),
        "include in its section": ("Host gpu\n  Include {d}/two\n  User late\nHost *\n  User star\n", "gpu"),
        "include of many": ("Include {d}/o* {d}/t*\nHost *\n  User star\n", "gpu"),
        "quotes": ('Host gpu\n  IdentityFile "~/.ssh/with space"\n', "gpu"),
        "alias of a key": ("Host gpu\n  HostKeyAlias box\n  UserKnownHostsFile ~/.ssh/one ~/.ssh/two\n", "gpu"),
    }

    @pytest.mark.parametrize("name", CONFIGS)
    def test_as_ssh_reads_it(self, name, tmp_path, monkeypatch):
        text, host = self.CONFIGS[name]
        ssh = Path.home() / ".ssh"  # where ssh -G, which asks the password file, takes ~ to be
        folder = tmp_path / ".ssh"
        folder.mkdir(mode=0o700)
        (folder / "one").write_text("Host gpu\n  Port 3\nHost other\n  User wrong\n")
        (folder / "two").write_text("Port 4\n")
        (folder / "config").write_text(text.format(d=folder))
        said = subprocess.run(["ssh", "-G", "-F", str(folder / "config"), host], capture_output=True, text=True, check=True).stdout
        ssh_says = {}
        for line in said.splitlines():
            key, _, value = line.partition(" ")
            ssh_says.setdefault(key, []).append(os.path.expanduser(value))
        monkeypatch.setenv("HOME", str(tmp_path))
        a = find_address(host)
        assert [a.host, str(a.port), a.user] == [ssh_says[k][0] for k in ("hostname", "port", "user")]
        here = [f.replace(str(tmp_path), str(ssh.parent)) for f in a.identity_files]
        if "IdentityFile" in text:
            assert here == [f.replace("%d", str(ssh.parent)).replace("%r", "me") for f in ssh_says["identityfile"]]
        if "HostKeyAlias" in text:
            assert a.key_name == ssh_says["hostkeyalias"][0]
            assert [f.replace(str(tmp_path), str(ssh.parent)) for f in a.known_hosts] == [os.path.expanduser(f) for f in " ".join(ssh_says["userknownhostsfile"]).split()]

    def test_what_the_system_sets_for_all_is_not_told_of(self, tmp_path, monkeypatch):
        system = tmp_path / "ssh_config"
        system.write_text("Host *\n  GSSAPIAuthentication yes\n  HashKnownHosts yes\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr("nanogpt_nb.remote.address.Path", lambda p: system if p == "/etc/ssh/ssh_config" else Path(p))
        monkeypatch.setattr("nanogpt_nb.remote.address.Path.home", Path.home, raising=False)
        a = find_address("gpu")
        assert a.hash_known_hosts and a.ignored == ()
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh/config").write_text("Host gpu\n  AddressFamily inet\n")
        assert find_address("gpu").ignored == ("AddressFamily",)

    def test_a_host_notices_a_new_address(self, shared, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        add_host("new", "a@192.0.2.1")
        host = Host.of("new")
        assert host.address.host == "192.0.2.1" and not host.settings
        add_host("new", f"{shared.user}@127.0.0.1", port=shared.wire.port, key=str(shared.key), path="~/w")
        assert host.address.host == "127.0.0.1" and Host.of("new").settings == {"path": "~/w"}
        trust("new")
        with host:
            host.run("true")
            add_host("new", "a@192.0.2.2")
            assert host.address.host == "127.0.0.1"  # as long as it is connected
        assert host.address.host == "192.0.2.2" and not host.settings

    @pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b", "a;b", "me@", "gpu:0", "gpu:ssh", "gpu:70000", "$(x)", "`x`", "a\nb", "-x@gpu", "a/b", "*"])
    def test_what_is_no_host(self, name, shared, monkeypatch):
        shared.use(monkeypatch)
        with pytest.raises(ConfigError):
            find_address(name)

    @pytest.mark.parametrize("text, word", [("Host gpu\n  ProxyJump a\nHost a\n  ProxyJump gpu\n", "circle"), ("Include config\n", "over and over"), ("Host gpu\n  Port\n", "mend")])
    def test_a_configuration_that_cannot_be(self, text, word, tmp_path, monkeypatch):
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "config").write_text(text)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(ConfigError, match=word):
            find_address("gpu")

    def test_hops(self, tmp_path, monkeypatch):
        (tmp_path / ".ssh").mkdir()
        (tmp_path / ".ssh" / "config").write_text("Host gpu\n  ProxyJump b,me@c:7\nHost b\n  ProxyJump a\nHost c\n  ProxyJump z\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert [(h.host, h.port) for h in find_address("gpu").proxy_jump] == [("a", 22), ("b", 22), ("c", 7)]


class TestOwnFile:
    TEXTS = [b"", b"Host lab\n  User me\n", b"# only a comment", b"Host lab\r\n\tUser me\r\n\r\n", "# Zürich\nHost lab\n".encode(), b"\xff\xfe not utf-8\n#\n"]

    @pytest.fixture
    def ssh(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".ssh").mkdir(mode=0o700)
        return tmp_path / ".ssh"

    @pytest.mark.parametrize("text", TEXTS)
    def test_the_users_bytes_stay(self, text, ssh):
        text = text.replace(b"\xff\xfe not utf-8", b"# \xff\xfe not utf-8")
        if text:
            (ssh / "config").write_bytes(text)
            (ssh / "config").chmod(0o640)
        for name in ("gpu", "other"):
            add_host(name, "ubuntu@192.0.2.7", port=2200)
            assert (ssh / "config").read_bytes() == INCLUDE + text
        remove_host("gpu")
        assert (ssh / "config").read_bytes() == INCLUDE + text and list(entries()) == ["other"]
        remove_host("other")
        assert sorted(p.name for p in ssh.iterdir() if p.name[0] != ".") == (["config"] if text else [])
        assert not text or (ssh / "config").read_bytes() == text and (ssh / "config").stat().st_mode & 0o777 == 0o640

    def test_ssh_reads_what_we_wrote(self, ssh):
        make_key(ssh / "a key")
        a = add_host("gpu", "ubuntu@192.0.2.7:2200", key=str(ssh / "a key"), jump="gate,me@inner:7", python="~/env/bin/python", path="~/a project")
        said = subprocess.run(["ssh", "-G", "-F", str(ssh / "nanogpt_nb.conf"), "gpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        assert {"hostname 192.0.2.7", "user ubuntu", "port 2200", f"identityfile {ssh / 'a key'}", "identitiesonly yes", "proxyjump gate,me@inner:7"} <= set(said)
        assert a.settings == dict(python="~/env/bin/python", path="~/a project") and find_address("gpu") == a
        assert [h.name for h in hosts()] == ["gpu"] and "192.0.2.7" in repr(hosts()) and "192.0.2.7" in hosts()._repr_html_()

    def test_a_link_stays_a_link(self, ssh, tmp_path):
        (tmp_path / "dotfiles").write_text("Host lab\n")
        (ssh / "config").symlink_to(tmp_path / "dotfiles")
        add_host("gpu", "192.0.2.7")
        assert (ssh / "config").is_symlink() and (tmp_path / "dotfiles").read_bytes() == INCLUDE + b"Host lab\n"

    @pytest.mark.parametrize(
        "name, more, word",
        [
            ("a b", {}, "letters"),
            ("*", {}, "letters"),
            ("gpu", dict(address="me@"), "not the name"),
            ("gpu", dict(port=0), "65535"),
            ("gpu", dict(path="a\n  ProxyCommand evil"), "line break"),
            ("gpu", dict(jump="a;b"), "not the name"),
            ("gpu", dict(key="/nowhere/key"), "cannot be read"),
            ("lab", {}, "already"),
        ],
    )
    def test_what_is_refused(self, name, more, word, ssh):
        (ssh / "config").write_text("Host lab\n")
        with pytest.raises(ConfigError, match=word):
            add_host(name, **dict(address="ubuntu@192.0.2.7") | more)
        assert (ssh / "config").read_text() == "Host lab\n" and not (ssh / "nanogpt_nb.conf").exists()

    def test_keys_that_ssh_would_not_use(self, ssh):
        make_key(ssh / "key")
        for file, word in (("key.pub", "public half"), ("config", "not a private key"), ("key", "chmod 600")):
            (ssh / "config").touch(mode=0o600)
            (ssh / "key").chmod(0o644)
            with pytest.raises(ConfigError, match=word):
                add_host("gpu", "192.0.2.7", key=str(ssh / file))

    def test_removing_what_is_not_there(self, ssh):
        with pytest.raises(ConfigError, match="no entry"):
            remove_host("gpu")

    def test_many_at_once(self, ssh):
        code = "import sys\nfrom nanogpt_nb.remote.address import add_host\nfor n in range(4): add_host(f'h{sys.argv[1]}-{n}', '192.0.2.7')"
        for p in [alone(code, str(n)) for n in range(3)]:
            assert p.communicate() == ("", "")
        assert len(entries()) == 12 and (ssh / "config").read_bytes() == INCLUDE


class TestHostKeys:
    def test_unknown_then_trusted(self, box):
        (box.ssh / "known_hosts").unlink()
        shown = subprocess.run(["ssh-keygen", "-lf", str(box.host_key)], capture_output=True, text=True, check=True).stdout.split()[1]
        with pytest.raises(UnknownKey, match=re.escape(shown)) as e:
            Host("gpu").run("true")
        assert "nanogpt host trust gpu" in str(e.value)
        with pytest.raises(HostError, match="not trusted"):
            trust("gpu", yes=lambda said: False)
        asked = []
        trust("gpu", yes=lambda said: asked.append(said) or True)
        assert shown in asked[0] and trust("gpu") == []
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"
        assert subprocess.run(["ssh-keygen", "-F", f"[127.0.0.1]:{box.wire.port}", "-f", str(box.ssh / "known_hosts")], capture_output=True).returncode == 0

    def test_changed_is_refused_with_both_fingerprints(self, box):
        old = subprocess.run(["ssh-keygen", "-lf", str(box.host_key)], capture_output=True, text=True, check=True).stdout.split()[1]
        box.stop()
        make_key(box.host_key)
        box.start()
        new = subprocess.run(["ssh-keygen", "-lf", str(box.host_key)], capture_output=True, text=True, check=True).stdout.split()[1]
        for what in (lambda: Host("gpu").run("true"), lambda: trust("gpu")):
            with pytest.raises(ChangedKey) as e:
                what()
            assert old in str(e.value) and new in str(e.value) and "ssh-keygen -R" in str(e.value)

    def test_hashed_names_stay_hashed(self, box):
        file = box.ssh / "known_hosts"
        subprocess.run(["ssh-keygen", "-H", "-f", str(file)], check=True, capture_output=True)
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"
        other = find_address("gpu")
        assert known(other) and not known(replace(other, host="192.0.2.1"))
        file.write_text(file.read_text().replace("|1|", "|1|x"))
        trust("gpu")
        lines = file.read_text().splitlines()
        assert len(lines) == 2 and lines[1].startswith("|1|")
        assert subprocess.run(["ssh-keygen", "-F", f"[127.0.0.1]:{box.wire.port}", "-f", str(file)], capture_output=True).returncode == 0

    def test_a_file_without_a_last_line_break(self, box):
        file = box.ssh / "known_hosts"
        with open(box.ssh / "config", "a") as f:
            f.write("  HashKnownHosts no\n")
        file.write_text("other.example.org ssh-ed25519 AAAA")
        trust("gpu")
        assert [line.split()[0] for line in file.read_text().splitlines()] == ["other.example.org", f"[127.0.0.1]:{box.wire.port}"]

    def test_a_revoked_key(self, box):
        kind, key = box.host_key.with_suffix(".pub").read_text().split()[:2]
        with open(box.ssh / "known_hosts", "a") as f:
            f.write(f"@revoked * {kind} {key}\n")
        with pytest.raises(ChangedKey, match="revoked"):
            Host("gpu").run("true")

    def test_the_kind_that_is_known_is_asked_for(self, tmp_path, monkeypatch):
        make_key(tmp_path / "rsa", "rsa")
        with Box(tmp_path, config=f"HostKey {tmp_path / 'rsa'}\n") as box:
            box.use(monkeypatch)
            kind, key = (tmp_path / "rsa.pub").read_text().split()[:2]
            (box.ssh / "known_hosts").write_text(f"[127.0.0.1]:{box.wire.port} {kind} {key}\n")
            with Host("gpu") as host:
                assert host.run("echo in").out == "in\n" and host.connect().host_key_type == "rsa-sha2-512"


class TestKeys:
    @pytest.fixture
    def agent(self, monkeypatch, tmp_path_factory):
        socket = tmp_path_factory.mktemp("a") / "agent"
        p = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        until(lambda: subprocess.run(["ssh-add", "-l"], capture_output=True).returncode == 1, "an agent that answers that it has no keys")
        yield lambda key: subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)
        p.kill()
        p.wait()

    @pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
    def test_kinds_of_keys(self, kind, tmp_path, monkeypatch):
        with Box(tmp_path, key=kind) as box:
            box.use(monkeypatch)
            with Host("gpu") as host:
                assert host.run("echo in").out == "in\n"

    def test_the_agents_key(self, box, agent):
        agent(box.key)
        box.key.unlink()
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"

    def test_a_passphrase_is_for_the_agent(self, box, agent):
        subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(box.key)], check=True)
        with pytest.raises(NotLetIn, match=f"ssh-add {re.escape(str(box.key))}"):
            Host("gpu").run("true")
        subprocess.run(["ssh-keygen", "-q", "-p", "-P", "secret", "-N", "", "-f", str(box.key)], check=True)
        agent(box.key)
        subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(box.key)], check=True)
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"

    def test_the_wrong_key(self, box):
        make_key(box.key)
        with pytest.raises(NotLetIn, match=re.escape(str(box.key))) as e:
            Host("gpu").run("true")
        assert "ssh-copy-id gpu" in str(e.value)

    def test_no_key(self, box):
        box.key.unlink()
        with pytest.raises(NotLetIn, match="no key"):
            Host("gpu").run("true")

    def test_a_broken_key(self, box):
        box.key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nrubbish\n-----END OPENSSH PRIVATE KEY-----\n")
        with pytest.raises(NotLetIn, match=re.escape(str(box.key))):
            Host("gpu").run("true")

    def test_too_many_keys(self, box, agent, tmp_path):
        for n in range(8):
            make_key(tmp_path / f"k{n}")
            agent(tmp_path / f"k{n}")
        config = (box.ssh / "config").read_text()
        (box.ssh / "config").write_text(config.replace("  IdentitiesOnly yes\n", "").replace(str(box.key), str(tmp_path / "absent")))
        with pytest.raises(NotLetIn, match="IdentitiesOnly"):
            Host("gpu").run("true")
        (box.ssh / "config").write_text(config)
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"

    def test_a_server_that_takes_no_keys(self, tmp_path, monkeypatch):
        with Box(tmp_path, config="") as box:
            box.use(monkeypatch)
            file = box.folder / "sshd_config"
            box.stop()
            file.write_text(file.read_text().replace("PasswordAuthentication no", "PasswordAuthentication yes\nPubkeyAuthentication no"))
            box.start()
            with pytest.raises(NotLetIn, match="no keys"):
                Host("gpu").run("true")


class TestJumps:
    @pytest.fixture
    def three(self, tmp_path, monkeypatch):
        "gpu over inner over gate."
        with Box(tmp_path, "gate") as gate, Box(tmp_path, "inner", laptop=gate.laptop) as inner, Box(tmp_path, "gpu", laptop=gate.laptop) as gpu:
            gpu.use(monkeypatch)
            with open(gpu.ssh / "config", "a") as f:
                f.write("Host gpu\n  ProxyJump inner\nHost inner\n  ProxyJump gate\n")
            yield gate, inner, gpu

    def test_two_hops(self, three):
        with Host("gpu") as host:
            assert host.run("echo $HOME").out.strip() == str(three[2].home)
            assert [b.wire.connections for b in three] == [1, 1, 1]
            data = os.urandom(1 << 20).hex()
            assert host.run("cat", input=data).out == data

    def test_trust_on_the_way(self, three):
        (three[0].ssh / "known_hosts").unlink()
        with pytest.raises(UnknownKey, match="gate"):
            Host("gpu").run("true")
        assert [said.split()[0] for said in trust("gpu")] == ["gate", "inner", "gpu"]
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"

    def test_a_hop_that_breaks(self, three):
        host = quick()
        with host:
            assert host.call("there.hello")["home"] == str(three[2].home)
            three[0].wire.cut()
            assert host.call("there.hello")["home"] == str(three[2].home)

    def test_a_hop_that_forwards_nothing(self, three):
        gate = three[0]
        file = gate.folder / "sshd_config"
        gate.stop()
        file.write_text(file.read_text().replace("AllowTcpForwarding yes", "AllowTcpForwarding no"))
        gate.start()
        with pytest.raises(HostError, match="AllowTcpForwarding"):
            Host("gpu").run("true")

    def test_a_machine_behind_that_is_down(self, three):
        three[2].stop()
        with pytest.raises(Unreachable, match="gpu"):
            Host("gpu").connect(tries=1)
        nobody = replace(find_address("gpu"), port=free_port())
        with pytest.raises(Unreachable, match="in between cannot reach gpu"):
            Host(nobody).connect(tries=1)

    def test_proxy_command(self, box):
        config = (box.ssh / "config").read_text().replace("HostName 127.0.0.1", "HostName nowhere.invalid\n  HostKeyAlias box")
        relay = "import socket,sys,threading,os; s=socket.create_connection(('127.0.0.1',%d)); c=lambda r,w:[w(d) for d in iter(r,b'')]; threading.Thread(target=c,args=(lambda:os.read(0,9999),s.sendall),daemon=True).start(); c(lambda:s.recv(9999),lambda d:os.write(1,d))"
        (box.ssh / "config").write_text(config + f"  ProxyCommand {sys.executable} -c {shlex.quote(relay % box.wire.port)}\n")
        (box.ssh / "known_hosts").write_text("box " + " ".join(box.host_key.with_suffix(".pub").read_text().split()[:2]) + "\n")
        with Host("gpu") as host:
            assert host.run("echo in").out == "in\n"


class TestRun:
    def test_streams_and_codes(self, gpu):
        r = gpu.run("echo out; echo err >&2; exit 3", check=False)
        assert (r.code, r.out, r.err) == (3, "out\n", "err\n")
        with pytest.raises(CommandFailed, match="exit code 3: oh no"):
            gpu.run("echo oh no >&2; exit 3")
        assert gpu.run("kill -9 $$", check=False).code == -signal.SIGKILL
        assert gpu.run("exec sh -c 'kill -HUP $$'", check=False).code == -signal.SIGHUP

    ODD = ["a b", "$HOME", "`id`", "'", '"', "\\", "it's", "", "~", "*", "-n", "--", "a=b", "if", "two\nlines", "tab\t", "Zürich 日本", "!x", "#", "{a,b}", "%d", "\\'", ">f", "&", "é\udcff"]

    def test_arguments_as_they_are(self, gpu):
        show = "import sys, os; sys.stdout.buffer.write(b'\\0'.join(os.fsencode(a) for a in sys.argv[1:]))"
        r = gpu.run([sys.executable, "-c", show, *self.ODD[:-1]])
        assert r.out.split("\0") == self.ODD[:-1]
        assert gpu.run([sys.executable, "-c", "import sys; print(ascii(sys.argv[1]))", self.ODD[-1]]).out.strip() == ascii(self.ODD[-1])

    def test_a_program_with_an_odd_name(self, gpu, shared):
        program = shared.home / "a=b $x"
        program.write_text("#!/bin/sh\necho ran \"$1\"\n")
        program.chmod(0o755)
        assert gpu.run([program, "it's"]).out == "ran it's\n"

    @pytest.mark.parametrize("shell", ["dash", "bash", "zsh", "fish", "sh"])
    def test_shells_agree(self, shell):
        if not shutil.which(shell):
            pytest.skip(f"no {shell}")
        odd = [w for w in self.ODD[:-1] if "\\" not in w or shell != "fish"]
        show = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
        out = subprocess.run([shell, "-c", words([sys.executable, "-c", show, *odd])], capture_output=True, text=True).stdout
        assert out.split("\0") == odd

    def test_folder_and_variables(self, gpu, shared):
        (shared.home / "my project").mkdir(exist_ok=True)
        r = gpu.run('pwd; echo "$A"', cwd="~/my project", env=dict(A="b 'c' $HOME"))
        assert r.out == f"{shared.home / 'my project'}\nb 'c' $HOME\n"
        with pytest.raises(CommandFailed, match="nowhere"):
            gpu.run("true", cwd="/nowhere")
        with pytest.raises(ConfigError):
            gpu.run("true", env={"A;B": "c"})

    @pytest.mark.parametrize("command", [[], "a\0b", "x" * 130_000])
    def test_what_is_no_command(self, gpu, command):
        with pytest.raises(ConfigError):
            gpu.run(command)

    def test_input(self, gpu):
        data = os.urandom(4 << 20)
        said = gpu.run([sys.executable, "-c", "import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"], input=data).out
        assert said.strip() == hashlib.sha256(data).hexdigest()
        assert gpu.run("head -c 3", input="abc" * 10_000_000).out == "abc"  # it stops reading
        assert gpu.run("cat").out == ""

    def test_lines_come_as_they_are_said(self, gpu, shared):
        go, seen = shared.home / "go", []

        def on_line(line):
            seen.append(line)
            go.touch()  # the second line is said only when the first was heard

        r = gpu.run(f"echo one; while [ ! -e {go} ]; do sleep 0.01; done; printf 'Zürich\\r\\nlast'", on_line=on_line, timeout=120)
        assert seen == ["one", "Zürich", "last"] and r.out == "one\nZürich\r\nlast"

    def test_characters_across_packets(self, gpu):
        code = "import os, time\nfor b in 'Zürich 日本 🙂\\n'.encode(): os.write(1, bytes([b])); time.sleep(0.002)"
        seen = []
        assert gpu.run([sys.executable, "-c", code], on_line=seen.append).out == "Zürich 日本 🙂\n"
        assert seen == ["Zürich 日本 🙂"]
        assert gpu.run("printf 'a\\377b'").out == "a\ufffdb"

    def test_an_end_in_time(self, gpu, shared):
        before = set(shared.processes())
        with pytest.raises(TimedOut, match="0.3 s"):
            gpu.run("echo $$; sleep 1000 & sleep 1000", timeout=0.3)
        until(lambda: not sleeping(shared, before), "the end of the command there")

    def test_an_end_by_whoever_listens(self, gpu, shared):
        before = set(shared.processes())

        def on_line(line):
            raise KeyError(line)

        with pytest.raises(KeyError):
            gpu.run("echo one; exec sleep 1000", on_line=on_line)
        until(lambda: not sleeping(shared, before), "the end of the command there")
        assert gpu.run("echo still here").out == "still here\n"

    def test_a_command_that_is_given_up_before_it_was_heard_of_is_ended_all_the_same(self, shared, monkeypatch):
        shared.use(monkeypatch)
        host = Host("gpu")
        host.run("true")
        mark, shared.wire.delay = "987654", 0.3
        try:
            with pytest.raises(TimedOut):
                host.run(["sleep", mark], timeout=1.05)  # it begins there after 0.9 s, and that is heard after 1.2 s
        finally:
            shared.wire.delay = 0
            host.close()
        until(lambda: not [pid for pid in shared.processes() if mark in command(pid)], "the end of the command there")

    def test_ctrl_c(self, shared, monkeypatch):
        shared.use(monkeypatch)
        p = alone("from nanogpt_nb.remote.ssh import Host\nHost('gpu').run('echo ready; exec sleep 1000', on_line=print)")
        assert p.stdout.readline() == "ready\n"
        before = until(lambda: sleeping(shared, ()), "the command there")
        p.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in p.communicate(timeout=120)[1]
        until(lambda: not set(before) & set(shared.processes()), "the end of the command there")

    def test_100_mb_in_bounded_memory(self, shared, monkeypatch):
        shared.use(monkeypatch)
        code = """import resource
from nanogpt_nb.remote.ssh import Host
host, n = Host('gpu'), 0
host.run('echo')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def count(line):
    global n
    n += 1
r = host.run("yes 0123456789012345678901234567890123456789012345678 | head -n 2000000", on_line=count)
print(n, len(r.out), 'left out' in r.out, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
host.close()"""
        out, err = alone(code).communicate(timeout=300)
        n, kept, cut, grown = out.split()
        assert (n, cut, err) == ("2000000", "True", "") and int(kept) < 9e6 and int(grown) < 100

    def test_many_at_once(self, gpu):
        said = {}
        work = [threading.Thread(target=lambda n=n: said.update({n: gpu.run(f"echo {n}; sleep 0.2").out})) for n in range(24)]
        for t in work:
            t.start()
        for t in work:
            t.join()
        assert said == {n: f"{n}\n" for n in range(24)}

    def test_a_fork(self, gpu):
        gpu.run("true")
        read, write = os.pipe()
        with contextlib.closing(gpu.open("sleep 0.5; echo parent")) as channel:
            if not os.fork():
                with contextlib.suppress(BaseException):
                    os.write(write, gpu.run("echo child").out.encode())
                os._exit(0)
            assert os.read(read, 99) == b"child\n" and channel.read() == b"parent\n"
        os.wait()
        assert gpu.run("echo on").out == "on\n"


def command(pid) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def sleeping(box, before):
    return [p for p in box.processes() if p not in before and command(p)[:1] == ["sleep"]]


class TestBreaks:
    def test_a_cut_is_told_or_mended(self, box):
        with quick() as host:
            channel = host.open("echo one; sleep 100")
            assert channel.read() == b"one\n"
            box.wire.cut()
            with pytest.raises(Dropped):
                channel.read()
            with pytest.raises(Dropped):
                channel.code()
            assert host.call("there.hello")["home"] == str(box.home)
            box.wire.cut()
            assert host.run("echo again").out == "again\n"

    def test_a_cut_while_a_command_runs(self, box):
        with quick() as host:
            with pytest.raises(Dropped, match="may have been done"):
                host.run("echo one; sleep 100", on_line=lambda line: box.wire.cut())

    def test_a_cut_at_any_byte_of_a_connection(self, box):
        with Host("gpu") as host:
            host.call("there.hello")
        whole = box.wire.bytes
        for part in range(1, 8):
            box.wire.cut_after = box.wire.bytes + whole * part // 8
            with quick() as host:
                assert host.call("there.hello")["home"] == str(box.home)

    def test_persist(self, box):
        with quick() as host:
            calls = []

            def once():
                calls.append(1)
                channel = host.open("echo done; sleep 100" if len(calls) < 3 else "echo done")
                assert channel.read() == b"done\n"
                if len(calls) < 3:
                    box.wire.cut()
                return channel.code()

            assert host.persist(once) == 0 and len(calls) == 3

    def test_the_machine_restarts(self, box):
        with quick(patience=60) as host:
            host.call("there.hello")
            box.stop()
            threading.Timer(1, box.start).start()
            assert host.call("there.hello")["home"] == str(box.home)

    @pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
    def test_a_line_that_ends_just_when_a_command_begins(self, box, error, monkeypatch):
        "Its calls fail a moment before it says that it has ended."
        with quick() as host:
            line = host.connect()

            def ends(**how):
                threading.Timer(0.1, line.close).start()
                raise error

            monkeypatch.setattr(line, "open_session", ends)
            assert host.run("echo on").out == "on\n" and host.connect() is not line

    def test_patience_ends(self, box):
        with quick(patience=1) as host:
            host.call("there.hello")
            box.stop()
            with pytest.raises(Unreachable, match="127.0.0.1"):
                host.call("there.hello")

    def test_what_was_never_there(self, box):
        with pytest.raises(Unreachable, match="nothing listens at port"):
            Host(f"127.0.0.1:{free_port()}").call("there.hello")
        with pytest.raises(Unreachable, match="knows no"):
            Host("nowhere.invalid").connect(tries=1)

    def test_a_server_that_is_no_sshd(self, box, tmp_path):
        import socket

        with socket.create_server(("127.0.0.1", 0)) as s:
            threading.Thread(target=lambda: s.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n" * 200), daemon=True).start()
            with pytest.raises(Unreachable, match="sshd"):
                Host(f"127.0.0.1:{s.getsockname()[1]}").connect(tries=1)

    def test_black_hole_while_reading(self, box):
        with quick() as host:
            channel = host.open("sleep 100")
            box.wire.black = True
            with pytest.raises(Dropped):
                channel.read()
            box.wire.black = False
            assert host.run("echo back").out == "back\n"

    def test_black_hole_while_writing(self, box):
        with quick() as host:
            channel = host.open("cat > /dev/null")
            box.wire.black = True
            with pytest.raises(Dropped):
                channel.write(b"x" * (64 << 20))

    def test_black_hole_while_connecting(self, box):
        box.wire.black = True
        address = replace(find_address("gpu"), connect_timeout=1)
        with pytest.raises(Unreachable):
            Host(address).connect(tries=1)

    def test_a_silent_command_is_no_dead_line(self, box):
        with quick(times=(0.3, 2.5)) as host:
            assert host.run("sleep 3.5; echo done").out == "done\n"

    def test_a_slow_line(self, box):
        with quick(times=(0.3, 20)) as host:
            host.call("there.hello")
            box.wire.delay = 0.1
            data = os.urandom(1 << 20).hex()
            assert host.run("cat", input=data).out == data

    def test_nothing_is_printed(self, box):
        p = alone("from nanogpt_nb.remote.ssh import Host\nh = Host('gpu')\nh.open('sleep 100')\nprint('on')\ninput()\ntry: h.run('echo a')\nexcept Exception as e: print(type(e).__name__)\nh.close()", stdin=subprocess.PIPE)
        assert p.stdout.readline() == "on\n"
        box.wire.cut()
        out, err = p.communicate("\n", timeout=120)
        assert err == "" and p.returncode == 0


class TestAlgorithms:
    WEAK = re.compile("cbc|3des|md5|sha1|group1-|ssh-rsa|ssh-dss|arcfour")

    def test_what_is_offered(self, gpu):
        line = gpu.connect()
        offered = [*line.preferred_ciphers, *line.preferred_macs, *line.preferred_kex, *line.preferred_keys, *line.preferred_pubkeys]
        assert set(line.preferred_kex) <= set(KEX) and len(offered) > 20 and not [a for a in offered if self.WEAK.search(a)]
        assert line.local_cipher in CIPHERS and line.remote_mac in (*MACS, line.remote_cipher)

    @pytest.mark.parametrize("config", ["Ciphers aes128-cbc,3des-cbc", "Ciphers aes128-ctr\nMACs hmac-sha1,hmac-md5", "KexAlgorithms diffie-hellman-group14-sha1"])
    def test_a_weak_server_is_refused(self, config, tmp_path, monkeypatch):
        with Box(tmp_path, config=config + "\n") as box:
            box.use(monkeypatch)
            with pytest.raises(HostError, match="too weak"):
                Host("gpu").connect(tries=1)

    @pytest.mark.parametrize("cipher", [CIPHERS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CIPHERS[1:])])
    def test_every_cipher_works(self, cipher, tmp_path, monkeypatch):
        with Box(tmp_path, config=f"Ciphers {cipher}\n") as box:
            box.use(monkeypatch)
            with Host("gpu") as host:
                data = os.urandom(200_000).hex()
                assert host.run("cat", input=data).out == data and host.connect().local_cipher == cipher


class TestModule:
    def test_import_is_instant(self):
        code = "import time, sys\nt = time.process_time()\nimport nanogpt_nb.remote.ssh\nprint(time.process_time() - t)\nprint([m for m in ('torch', 'numpy', 'paramiko', 'IPython', 'rich') if m in sys.modules])"
        said = [alone(code).communicate()[0].splitlines() for _ in range(3)]
        assert min(float(s[0]) for s in said) < 0.5 and said[0][1] == "[]"

    def test_kept_and_lines(self):
        data = "".join(f"{n} Zürich\n" for n in range(5000)).encode()
        kept, seen = Kept(most=1000), []
        lines = Lines(seen.append)
        for i in range(0, len(data), 7):
            kept.add(data[i : i + 7])
            lines.add(data[i : i + 7])
        assert seen == data.decode().splitlines()
        text = kept.text()
        head, tail = re.split(r"\n\[… [\d,]+ bytes left out …\]\n", text)
        assert data.decode().startswith(head) and data.decode().endswith(tail) and len(text) < 1200
        endless = []
        lines = Lines(endless.append, most=100)
        for _ in range(100):
            lines.add(b"x" * 99)
        lines.add(b"", final=True)
        assert "".join(endless) == "x" * 9900 and max(map(len, endless)) < 300

    def test_fingerprint_as_ssh_shows_it(self, tmp_path):
        import base64

        make_key(tmp_path / "k")
        said = subprocess.run(["ssh-keygen", "-lf", str(tmp_path / "k")], capture_output=True, text=True, check=True).stdout
        assert fingerprint(base64.b64decode((tmp_path / "k.pub").read_text().split()[1])) in said
