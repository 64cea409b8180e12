"What a box, a file on it, or a careless pattern may not do to the laptop, and the laptop not to the box."

import base64
import json
import os
import shutil
import subprocess

import pytest
from box import make_key

from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.remote import address, code
from nanogpt_nb.remote.address import Address, add_host, find_address
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.files import listing
from nanogpt_nb.remote.keys import ChangedKey, UnknownKey, check_host, remember
from nanogpt_nb.remote.landing import Landing, note_remote
from nanogpt_nb.remote.there import Trouble
from nanogpt_nb.remote.there_tree import ASIDE, look, pack, settle
from nanogpt_nb.runs import Run

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\n-----END OPENSSH PRIVATE KEY-----\n"
needs_ssh = pytest.mark.skipif(not (shutil.which("ssh") and shutil.which("ssh-keygen")), reason="OpenSSH is not installed")


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder with an .ssh."
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# what a box sends


@pytest.mark.parametrize("data", [["/home/me/diary.txt"], [], None])
def test_a_box_does_not_say_which_texts_of_the_laptop_are_read(tmp_path, data):
    run = Run.create(NanoGPTConfig.preset("tiny").replace(data=("poem.txt",)), "one", tmp_path)
    note_remote(run, host="gpu", path="/far/one")
    about = json.loads((run.path / "config.json").read_text())
    theirs = json.dumps(about | dict(parameters=7, config=about["config"] | dict(data=data))).encode()
    for whole in (True, False):
        Landing(run).take_file("config.json", 0, theirs, whole, True)
        assert run.config.data == ("poem.txt",) and run.about["parameters"] == 7
    for odd in (b"[]", b"{}", b'{"config": 1}', b"{"):
        Landing(run).take_file("config.json", 0, odd, True, True)
        assert run.config.data == ("poem.txt",)


def test_a_config_with_the_same_texts_comes_byte_for_byte(tmp_path):
    run = Run.create(NanoGPTConfig.preset("tiny"), "one", tmp_path)
    note_remote(run, host="gpu", path="/far/one")
    theirs = json.dumps(json.loads((run.path / "config.json").read_text()) | dict(device="cuda")).encode()
    Landing(run).take_file("config.json", 0, theirs, True, True)
    assert (run.path / "config.json").read_bytes() == theirs


@pytest.mark.parametrize("path", ["--install-extension=evil", "relative/folder", ""])
def test_an_answer_is_no_option_of_the_editor(tmp_path, monkeypatch, path):
    program = tmp_path / "code"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("VSCODE_IPC_HOOK_CLI", raising=False)
    with pytest.raises(HostError, match="no absolute path"):
        code.start_vscode("gpu", path)
    assert not (tmp_path / "started").exists()
    assert code.start_vscode("gpu", "/data").started and (tmp_path / "started").exists()


# what a push does there

ME = dict(id="1", name="laptop", folder="/home/me/gpt")


def come(root, files, force=False, gone=()):
    "Settle a push of these files, as if they had come."
    fill(root / ASIDE, files)
    return settle(str(root), ME, pack({p: look(str(root / ASIDE / p)) for p in files}), gone=gone, force=force)


def test_a_file_that_no_push_put_there_is_not_replaced(tmp_path):
    root = tmp_path / "gpt"
    come(root, {"net.py": "1"})
    fill(root, {"notes.md": "made there", "same.md": "the same"})
    with pytest.raises(Trouble, match="notes.md.*no push put there.*--force"):
        come(root, {"notes.md": "of the laptop", "net.py": "2"})
    assert (root / "notes.md").read_text() == "made there" and (root / "net.py").read_text() == "1"
    assert come(root, {"same.md": "the same"})["missing"] == []
    assert come(root, {"notes.md": "of the laptop"}, force=True)["missing"] == []
    assert (root / "notes.md").read_text() == "of the laptop"


def test_a_link_that_no_push_put_there_is_not_replaced(tmp_path):
    root = tmp_path / "gpt"
    come(root, {"net.py": "1"})
    os.symlink(tmp_path / "disk", root / "thing")
    with pytest.raises(Trouble, match="thing.*no push put there"):
        come(root, {"thing": "x"})
    assert os.readlink(root / "thing") == str(tmp_path / "disk")


@pytest.mark.parametrize("force", [False, True])
def test_what_lies_behind_a_link_is_not_written(tmp_path, force):
    root, disk = tmp_path / "gpt", tmp_path / "disk"
    come(root, {"net.py": "1"})
    fill(disk, {"x.json": "big data"})
    os.symlink(disk, root / "data")
    for name in ("data/x.json", "data/new.json", "data/deep/er.json"):
        with pytest.raises(Trouble, match="data is a link on the box"):
            come(root, {name: "{}"}, force)
        (root / ASIDE / name).unlink()
    assert sorted(os.listdir(disk)) == ["x.json"] and (disk / "x.json").read_text() == "big data"


def test_what_lies_behind_a_link_is_not_deleted(tmp_path):
    root, disk = tmp_path / "gpt", tmp_path / "disk"
    come(root, {"data/x.json": "{}"})
    os.rename(root / "data", disk)
    os.symlink(disk, root / "data")
    assert come(root, {}, gone=["data/x.json"])["kept"] == ["data/x.json"]
    assert (disk / "x.json").read_text() == "{}"


def test_a_pushed_link_gives_way_to_a_folder(tmp_path):
    root = tmp_path / "gpt"
    (root / ASIDE).mkdir(parents=True)
    os.symlink("elsewhere", root / ASIDE / "thing")
    settle(str(root), ME, pack({"thing": look(str(root / ASIDE / "thing"))}))
    assert come(root, {"thing/x.py": "x"}, gone=["thing"])["deleted"] == ["thing"]
    assert (root / "thing/x.py").read_text() == "x" and not (root / "elsewhere").exists()


# what goes into ssh's configuration


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x1b", "\0"])
def test_no_value_becomes_a_line_of_its_own(home, end):
    for more in (dict(path=f"~/p{end}ProxyCommand evil"), dict(python=f"/p{end}ProxyCommand evil"), dict(jump=f"a{end}ProxyCommand")):
        with pytest.raises(ConfigError):
            add_host("gpu", "me@192.0.2.7", **more)
    assert not address.ours().exists()


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_line_break_ends_a_line(home, end):
    (home / ".ssh/config").write_text(
        f"Host gpu\n  # a{end}ProxyCommand evil\n  # b{end}Host other\n  HostName 192.0.2.7\n", encoding="utf-8"
    )
    found = find_address("gpu")
    assert found.proxy_command is None and found.host == "192.0.2.7" and address.aliases() == ["gpu"]


# host keys


@pytest.fixture
def lab(tmp_path):
    "An address, with files of host keys of its own."
    return lambda port=22, **more: Address("lab", "lab.edu", port, known_hosts=(str(tmp_path / "known_hosts"),), **more)


def test_another_machine_behind_another_port_is_unknown_not_changed(tmp_path, lab):
    file = tmp_path / "known_hosts"
    file.write_text("lab.edu ssh-ed25519 a2V5\n")
    check_host(lab(2222), "ssh-ed25519", b"key")
    with pytest.raises(UnknownKey):
        check_host(lab(2222), "ssh-ed25519", b"other")
    remember(lab(2222), "ssh-ed25519", b"other")
    check_host(lab(2222), "ssh-ed25519", b"other")
    with pytest.raises(ChangedKey) as e:
        check_host(lab(2222), "ssh-ed25519", b"third")
    assert f"ssh-keygen -R '[lab.edu]:2222' -f {file}" in str(e.value)
    with pytest.raises(ChangedKey):
        check_host(lab(), "ssh-ed25519", b"other")
    file.write_text("@revoked lab.edu ssh-ed25519 b3RoZXI=\n")
    with pytest.raises(ChangedKey, match="revoked"):
        check_host(lab(2222), "ssh-ed25519", b"other")


def test_the_files_of_the_machine_count(home, tmp_path):
    for name in ("global one", "global2"):
        (tmp_path / name).write_text("@revoked * ssh-ed25519 b2xk\n")
        (tmp_path / "known_hosts").write_text("gpu ssh-ed25519 b2xk\n")
        (home / ".ssh/config").write_text(
            f'UserKnownHostsFile {tmp_path}/known_hosts\nHost gpu\n  GlobalKnownHostsFile {tmp_path}/none "{tmp_path}/{name}"\nHost free\n HostKeyAlias gpu\n'
        )
        with pytest.raises(ChangedKey, match="revoked"):
            check_host(find_address("gpu"), "ssh-ed25519", b"old")
        check_host(find_address("free"), "ssh-ed25519", b"old")
    assert find_address("free").global_hosts == ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


@needs_ssh
def test_revoked_keys_are_looked_up(home, tmp_path, lab):
    make_key(tmp_path / "k")
    kind, text = (tmp_path / "k.pub").read_text().split()[:2]
    blob, gone = base64.b64decode(text), tmp_path / "revoked"
    (tmp_path / "known_hosts").write_text(f"lab.edu {kind} {text}\n")
    (home / ".ssh/config").write_text(
        f"Host gpu\n  RevokedHostKeys {gone}\nHost tilde\n RevokedHostKeys ~/%h\nHost none\n RevokedHostKeys none\n"
    )
    assert [find_address(n).revoked for n in ("gpu", "tilde", "none", "other")] == [(str(gone),), (str(home / "tilde"),), (), ()]
    with pytest.raises(HostError, match="cannot be read"):
        check_host(lab(revoked=(str(gone),)), kind, blob)
    gone.write_text(f"# {kind} {text}\n{kind} AAAA other\n")
    check_host(lab(revoked=(str(gone),)), kind, blob)
    gone.write_text(f"# stolen\n  {kind} {text} me@lab\n")
    with pytest.raises(ChangedKey, match="revoked:2 has as revoked"):
        check_host(lab(revoked=(str(gone),)), kind, blob)
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(gone), str(tmp_path / "k.pub")], check=True)
    with pytest.raises(HostError, match="ssh-keygen -k"):
        check_host(lab(revoked=(str(gone),)), kind, blob)


# what goes from here

SECRETS = ["id_rsa", "sub/id_rsa.bak", "id_ed25519_work", "netrc", ".NETRC", "prod.env", ".Env", "Server.PEM", ".ssh/config", ".SSH/known"]


def test_secrets_stay_by_name_and_by_content(tmp_path):
    fill(tmp_path, dict.fromkeys(SECRETS, "x") | {"id_rsa.pub": "x", "net.py": "x", "environment.py": "x"})
    fill(tmp_path, {"big.txt": "#" * 700_000 + "\n" + KEY, "words.py": 'MARK = "-----BEGIN PRIVATE KEY-----"\n'})
    assert set(listing(tmp_path).sent) == {"id_rsa.pub", "net.py", "environment.py", "words.py"}


@pytest.fixture
def project(tmp_path):
    fill(tmp_path, dict.fromkeys(SECRETS, "x") | {"notes.txt": KEY, "net.py": "x", "data/a.bin": "x", ".gitignore": "data/\n"})
    fill(tmp_path, {".git/config": "token", ".git/hooks/a.bin": "x", "venv/pyvenv.cfg": "", "venv/lib/a.bin": "x"})
    return tmp_path


@pytest.mark.parametrize("pattern", ["*", "*.*", "./*", "**"])
def test_a_wildcard_sends_no_secret(project, pattern):
    found = listing(project, [pattern])
    assert "data/a.bin" in found.sent or pattern == "*.*"
    assert not {*SECRETS, "notes.txt"} & found.sent.keys() and not any(p.startswith((".git/", "venv/")) for p in found.sent)
    assert "whole path" in found.skipped["notes.txt"]


def test_a_wildcard_does_not_reach_into_git_and_environments(project):
    assert {p for p in listing(project, ["*.bin", "config"] + [".ssh/config"]).sent if "/" in p} == {"data/a.bin", ".ssh/config"}
    assert "venv/lib/a.bin" in listing(project, ["venv/lib"]).sent and "venv/lib/a.bin" in listing(project, ["venv/"]).sent


@pytest.mark.parametrize("path", [*SECRETS, "notes.txt", ".git/config"])
def test_a_whole_path_sends_a_secret(project, path):
    assert path in listing(project, [path]).sent and path in listing(project, ["./" + path]).sent
    assert path not in listing(project, ["net.py"]).sent


@pytest.mark.parametrize("pattern", ["id_rsa.ba*", ".git", ".git/*", ".git/hooks", "*.[Pp][Ee][Mm]", ".ssh"])
def test_a_pattern_for_secrets_alone_is_an_error(project, pattern):
    with pytest.raises(ConfigError, match="whole path"):
        listing(project, [pattern])
