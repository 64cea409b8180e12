"Push: what goes and what stays, to a real sshd with the real rsync, cut, full, in the way, and without rsync."

import json
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from box import Box, argv, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.files import find_project, listing
from nanogpt_nb.remote.push import push
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.remote.there_tree import ASIDE, MARKER
from nanogpt_nb.remote.wire import rsync_here

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU=\n-----END OPENSSH PRIVATE KEY-----\n"
ODD = ["a b.py", "it's", '"q"', "n\nl", "-n", "--delete", "#x", ";y", "ünï ö", "日本", "*", "?", "[a]", "$HOME", "`id`", "\\", "~", " lead", "trail ", "tab\t", "deep/er/and er/x"]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m, Box(tmp_path_factory.mktemp("push")) as box:
        yield box.use(m)


@pytest.fixture
def host(box):
    with Host("gpu") as host:
        yield host
    box.wire.delay, box.wire.rate, box.wire.cut_after = 0, None, None


@pytest.fixture(autouse=True)
def way(request, monkeypatch):
    "How files go: by rsync, unless a test asks for the tar file in which a few small ones go."
    way = getattr(request, "param", "rsync")
    monkeypatch.setattr("nanogpt_nb.remote.push.SMALL", 0 if way == "rsync" else 512_000)
    return way


both_ways = pytest.mark.parametrize("way", ["rsync", "tar"], indirect=True)


@pytest.fixture
def project(tmp_path):
    return fill(tmp_path / f"project {tmp_path.name}", {"pyproject.toml": "", "net.py": "print()\n", "nbs/a.ipynb": "{}\n"})


def fill(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def there(box, project) -> Path:
    return box.home / "nanogpt" / project.name


def tree(folder: Path, only=None) -> dict:
    "All that is below a folder, as it is: content, time and permissions, or a link's target."
    out = {}
    for p in sorted(folder.rglob("*")):
        name, at = str(p.relative_to(folder)), p.lstat()
        if stat.S_ISDIR(at.st_mode) or p.name == MARKER or (only is not None and name not in only):
            continue
        out[name] = os.readlink(p) if p.is_symlink() else (p.read_bytes(), at.st_mtime_ns, stat.S_IMODE(at.st_mode))
    return out


def nothing_aside(folder: Path) -> bool:
    return not [p for p in folder.rglob("*") if p.name == ASIDE or p.name.startswith(MARKER + ".")]


# What goes


def git(folder, *words):
    env = os.environ | {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, env=env)


@pytest.mark.parametrize("repository", [True, False])
def test_what_git_would_send_and_a_reason_for_the_rest(tmp_path, repository):
    files = {
        ".gitignore": "data/*\n!data/keep.txt\n*.log\n",
        "data/big.bin": "x",
        "data/keep.txt": "x",
        "sub/.gitignore": "!keep.log\n",
        "sub/keep.log": "x",
        "a.log": "x",
        "net.py": "x",
        ".env": "SECRET=1",
        ".env.local": "SECRET=1",
        "id_rsa": "x",
        "notes.txt": KEY,
        "cloud.json": json.dumps(dict(private_key=KEY)),
        "keys.py": 'MARK = b"-----BEGIN OPENSSH PRIVATE KEY-----"\n',
        "venv/pyvenv.cfg": "",
        "venv/bin/python": "",
        "runs/one/log.txt": "",
        "nbs/runs/two/log.txt": "",
        "pkg/runs/__init__.py": "",
        "pkg/__pycache__/x.pyc": "",
        "nbs/.ipynb_checkpoints/a-checkpoint.ipynb": "",
    }
    fill(tmp_path, files)
    if repository:
        git(tmp_path, "init", "-q")
        git(tmp_path, "add", "-f", "net.py", "a.log", ".env")
    found = listing(tmp_path)
    goes = {".gitignore", "data/keep.txt", "sub/.gitignore", "sub/keep.log", "net.py", "keys.py", "pkg/runs/__init__.py"}
    assert set(found.sent) == goes | ({"a.log"} if repository else set())
    for path in set(files) - set(found.sent):
        assert any(path == p or path.startswith(p) and p.endswith("/") for p in found.skipped), path
    assert found.skipped["data/big.bin"] == "ignored by git" and "secret" in found.skipped[".env"] and "private key" in found.skipped["notes.txt"]
    assert found.skipped["venv/"] == "an environment" and "private key" in found.skipped["cloud.json"]


def test_include_has_the_last_word_and_must_mean_something(tmp_path):
    fill(tmp_path, {".gitignore": "data/\n", "data/a.bin": "x", "data/b.txt": "x", ".env": "x", "runs/one/config.json": "{}", "net.py": "x"})
    assert set(listing(tmp_path, ["data/"]).sent) == {".gitignore", "net.py", "data/a.bin", "data/b.txt"}
    assert set(listing(tmp_path, ["*.bin", ".env", "runs/one"]).sent) == {".gitignore", "net.py", "data/a.bin", ".env", "runs/one/config.json"}
    with pytest.raises(ConfigError, match="nothing.bin"):
        listing(tmp_path, ["nothing.bin"])


def test_files_that_cannot_be_sent_and_files_that_are_gone(tmp_path):
    fill(tmp_path, {"net.py": "x", "gone.py": "x"})
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    (tmp_path / "gone.py").unlink()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as s:
        at = os.getcwd()
        os.chdir(tmp_path)
        s.bind("socket")
        os.chdir(at)
        assert set(listing(tmp_path).sent) == {"net.py"}


def test_a_repository_in_a_repository_and_a_project_in_an_ignored_corner(tmp_path):
    fill(tmp_path, {".gitignore": "corner/\n", "corner/net.py": "x", "inner/net.py": "x", "inner/.gitignore": "*.bin\n", "inner/x.bin": "x"})
    git(tmp_path, "init", "-q")
    git(tmp_path / "inner", "init", "-q")
    git(tmp_path / "inner", "add", ".")
    found = listing(tmp_path)
    assert set(found.sent) == {".gitignore", "inner/net.py", "inner/.gitignore"}
    assert found.skipped["corner/"] == found.skipped["inner/x.bin"] == "ignored by git"
    assert set(listing(tmp_path / "corner").sent) == {"net.py"}


def test_without_git_the_rules_hold_and_it_is_said(tmp_path, monkeypatch):
    fill(tmp_path, {".gitignore": "*.bin\n", "x.bin": "x", "net.py": "x", ".env": "x", "runs/a/log.txt": ""})
    monkeypatch.setenv("PATH", str(tmp_path))
    found = listing(tmp_path)
    assert set(found.sent) == {".gitignore", "x.bin", "net.py"} and "git is not installed" in found.notes[0]


def test_the_project_is_found_upwards(tmp_path):
    fill(tmp_path, {"p/settings.ini": "", "p/nbs/deep/x": "", "q/x": ""})
    assert find_project(tmp_path / "p/nbs/deep") == tmp_path / "p"
    assert find_project(tmp_path / "q") in (tmp_path / "q", *tmp_path.parents)
    with pytest.raises(ConfigError, match="not a folder"):
        push(tmp_path / "nowhere", "gpu")
    with pytest.raises(ConfigError, match="home folder"):
        push(Path.home(), "gpu")


# There is what is here


@both_ways
def test_odd_names_kinds_and_permissions_arrive_as_they_are(box, host, project):
    fill(project, {name: name for name in ODD} | {os.fsdecode(b"raw\xff"): "x", "ro": "x", "tool.sh": "#!/bin/sh\n", "empty": ""})
    (project / "ro").chmod(0o444)
    (project / "tool.sh").chmod(0o755)
    for name, target in {"link": "net.py", "dangling": "/nowhere/at all", "to folder": "nbs"}.items():
        os.symlink(target, project / name)
    done = push(project, host, quiet=True)
    assert tree(there(box, project)) == tree(project) and set(done.sent) == set(tree(project))
    assert nothing_aside(there(box, project)) and str(done) and done._repr_html_()
    assert not push(project, host, quiet=True).sent


@pytest.mark.parametrize("way", ["tar"], indirect=True)
def test_a_few_small_files_take_two_questions(box, host, project, monkeypatch):
    push(project, host, quiet=True)
    asked, call = [], Host.call
    monkeypatch.setattr(Host, "call", lambda self, verb, *args, **kw: asked.append(verb) or call(self, verb, *args, **kw))
    monkeypatch.setattr(Host, "open", lambda *_: pytest.fail("a channel of its own"))
    fill(project, {"net.py": "changed"})
    assert set(push(project, host, quiet=True).sent) == {"net.py"}
    assert asked == ["tree.tree", "tree.bring"] and tree(there(box, project)) == tree(project)


def test_an_unchanged_project_takes_one_question(box, host, project, monkeypatch):
    push(project, host, quiet=True)
    asked, call = [], Host.call
    monkeypatch.setattr(Host, "call", lambda self, verb, *args, **kw: asked.append(verb) or call(self, verb, *args, **kw))
    monkeypatch.setattr(Host, "open", lambda *_: pytest.fail("a channel of its own"))
    assert not push(project, host, quiet=True).sent
    assert asked == ["tree.tree"]


@both_ways
def test_only_what_changed_goes_even_within_a_second_and_at_the_same_size(box, host, project):
    push(project, host, quiet=True)
    at = (project / "net.py").stat()
    (project / "net.py").write_text("PRINT()\n")
    os.utime(project / "net.py", ns=(at.st_atime_ns, at.st_mtime_ns // 10**9 * 10**9 + (at.st_mtime_ns + 1) % 10**9))
    assert set(push(project, host, quiet=True).sent) == {"net.py"}
    (project / "nbs/a.ipynb").chmod(0o600)
    assert set(push(project, host, quiet=True).sent) == {"nbs/a.ipynb"}
    assert tree(there(box, project)) == tree(project)


def test_a_dry_run_tells_all_and_does_nothing(box, host, project):
    done = push(project, host, dry_run=True)
    assert set(done.sent) == set(tree(project)) and "would send" in str(done) and not there(box, project).exists()
    push(project, host, quiet=True)
    before = tree(there(box, project))
    (project / "net.py").unlink()
    assert push(project, host, dry_run=True).deleted == ["net.py"] and tree(there(box, project)) == before


@both_ways
def test_what_is_deleted_here_is_deleted_there_and_nothing_else(box, host, project):
    fill(project, {"old/deep/a.py": "x", "old/b.py": "x", "edited.py": "x", "data/text.txt": "x", "pkg/m.py": "x"})
    push(project, host, quiet=True)
    far = there(box, project)
    fill(far, {"runs/one/config.json": "{}", "mine.txt": "x", "edited.py": "changed there", ".venv/pyvenv.cfg": "", "pkg/__pycache__/m.cpython-311.pyc": "x"})
    shutil.rmtree(project / "old")
    shutil.rmtree(project / "pkg")
    (project / "edited.py").unlink()
    (project / ".gitignore").write_text("data/\n")
    done = push(project, host, quiet=True)
    assert set(done.deleted) == {"old/deep/a.py", "old/b.py", "pkg/m.py"} and done.kept == ["edited.py"]
    assert not (far / "old").exists() and not (far / "pkg").exists()
    assert (far / "edited.py").read_text() == "changed there" and (far / "data/text.txt").exists()
    assert (far / "runs/one/config.json").exists() and (far / "mine.txt").exists() and (far / ".venv/pyvenv.cfg").exists()
    assert not push(project, host, quiet=True).sent


def test_what_was_changed_there_is_replaced_and_told(box, host, project):
    push(project, host, quiet=True)
    (there(box, project) / "net.py").write_text("changed there")
    done = push(project, host, quiet=True)
    assert done.replaced == ["net.py"] and set(done.sent) == {"net.py"} and "changed there" in str(done)
    (there(box, project) / "net.py").unlink()
    assert set(push(project, host, quiet=True).sent) == {"net.py"}
    assert tree(there(box, project)) == tree(project)


def make(path: Path, kind: str):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "file":
        path.write_text("a file")
    elif kind == "folder":
        fill(path, {"in/side": "x", "x.py": "x"})
    elif kind == "link":
        os.symlink("net.py", path)
    else:
        os.symlink("nbs", path)


@pytest.mark.parametrize("way", [pytest.param("rsync", marks=pytest.mark.slow), "tar"], indirect=True)
def test_a_file_becomes_a_folder_a_folder_a_link_and_so_on(box, host, project):
    kinds = "file", "folder", "link", "link to a folder"
    for kind in [k for a in kinds for b in kinds if a != b for k in (a, b)]:
        make(project / "thing", kind)
        push(project, host, quiet=True)
        assert tree(there(box, project)) == tree(project), kind
    assert nothing_aside(there(box, project))


@pytest.mark.parametrize("mine, theirs", [("thing", "thing/precious"), ("thing/x", "thing")])
def test_what_no_push_put_there_is_not_swept_out_of_the_way(box, host, project, mine, theirs):
    push(project, host, quiet=True)
    fill(there(box, project), {theirs: "precious"})
    fill(project, {mine: "x"})
    (project / "net.py").write_text("changed")
    before = tree(there(box, project))
    with pytest.raises(HostError, match="thing"):
        push(project, host, quiet=True)
    assert {p: e for p, e in tree(there(box, project)).items() if not p.startswith(ASIDE)} == before
    (there(box, project) / theirs).unlink()
    push(project, host, quiet=True)
    assert tree(there(box, project)) == tree(project)


@both_ways
def test_a_folder_of_another_is_taken_only_by_force(box, host, project, tmp_path, monkeypatch):
    far = fill(there(box, project), {"theirs.txt": "x"})
    with pytest.raises(HostError, match="theirs.txt.*--force"):
        push(project, host, quiet=True)
    assert set(tree(far)) == {"theirs.txt"}
    push(project, host, quiet=True, force=True)
    assert tree(far, tree(project)) == tree(project) and (far / "theirs.txt").exists()
    other = fill(tmp_path / "elsewhere" / project.name, {"pyproject.toml": "other"})
    with pytest.raises(HostError, match="was pushed from.*--force"):
        push(other, host, quiet=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another laptop"))
    with pytest.raises(HostError, match="was pushed from"):
        push(project, host, quiet=True)
    done = push(other, host, quiet=True, force=True)
    assert set(tree(far)) == {"theirs.txt", "pyproject.toml"} and set(done.deleted) == {"net.py", "nbs/a.ipynb"}


def test_a_folder_with_nothing_but_runs_is_free(box, host, project):
    fill(there(box, project), {"runs/one/config.json": "{}"})
    push(project, host, quiet=True)
    assert tree(there(box, project), tree(project)) == tree(project)


def test_two_at_once_wait_for_each_other(box, host, project):
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: push(project, host, quiet=True), range(2)))
    assert sorted(bool(d.sent) for d in done) == [False, True] and tree(there(box, project)) == tree(project)


def test_a_path_of_ones_own(box, host, project):
    done = host.push(project, path="~/else where/it's", quiet=True)
    assert tree(box.home / "else where/it's") == tree(project) == tree(Path(done.path))


def test_a_shell_that_greets_is_no_harm(box, host, project):
    (box.home / ".bashrc").write_text("echo Welcome to the box; echo and to its noise >&2\n")
    try:
        push(project, host, quiet=True)
    finally:
        (box.home / ".bashrc").unlink()
    assert tree(there(box, project)) == tree(project)


# Without rsync


def fake_rsync(folder: Path, said: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rsync").write_text(f"#!/bin/sh\necho '{said}'\n")
    (folder / "rsync").chmod(0o755)
    return folder


def changes(project):
    "Odd names, kinds and permissions once more, and something to delete."
    fill(project, {name: name for name in ODD} | {os.fsdecode(b"raw\xff"): "x", "big": random.Random(0).randbytes(700_000), "empty": "", "x" * 200: "x"})
    (project / "big").chmod(0o444)
    os.symlink("/nowhere/at all", project / "link")
    (project / "net.py").unlink()


@pytest.mark.parametrize("said", ["openrsync: protocol version 29\nrsync version 2.6.9 compatible", "rsync  version 3.0.9  protocol version 30"])
def test_an_rsync_here_that_will_not_do_is_told_and_a_tar_file_goes(box, host, project, tmp_path, monkeypatch, said):
    push(project, host, quiet=True)
    changes(project)
    path = f"{fake_rsync(tmp_path / 'bin', said)}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    if rsync_here(path)[0]:
        pytest.skip("there is a real rsync in a place that is looked at, whatever the path")
    done = push(project, host, quiet=True)
    assert "tar" in done.notes[0] and "this machine" in done.notes[0]
    assert tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))
    assert not push(project, host, quiet=True).sent


@pytest.mark.parametrize("said", [None, "openrsync: protocol version 29"])
def test_no_rsync_there_is_told_and_a_tar_file_goes(tmp_path_factory, project, monkeypatch, said):
    folder = tmp_path_factory.mktemp("bare")
    bare = folder / "bin"
    bare.mkdir()
    for name in ("sh", "tar", "mkdir", "mv", "rm", "python3"):
        (bare / name).symlink_to(sys.executable if name == "python3" else shutil.which(name))
    if said:
        fake_rsync(bare, said)
    with Box(folder, path=str(bare)) as box, Host("gpu") as host:
        box.use(monkeypatch)
        push(project, host, quiet=True)
        changes(project)
        done = push(project, host, quiet=True)
        assert "tar" in done.notes[0] and "on gpu" in done.notes[0] and ("openrsync" in done.notes[0]) == bool(said)
        assert tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))
        assert not push(project, host, quiet=True).sent


# Faults


def test_a_host_that_does_not_answer_is_asked_once(box, project, monkeypatch):
    met, connect = [], Host.connect
    monkeypatch.setattr(Host, "connect", lambda self, *args: met.append(self.name) or connect(self, *args))
    box.wire.refuse = True
    try:
        with Host("gpu") as host, pytest.raises(HostError, match="gpu"):
            push(project, host, quiet=True)
    finally:
        box.wire.refuse = False
    assert met == ["gpu"]


def test_a_cut_transfer_goes_on_where_it_stopped(box, host, project):
    push(project, host, quiet=True)
    fill(project, {"big.bin": random.Random(1).randbytes(3_000_000)})
    box.wire.rate, box.wire.bytes, box.wire.cut_after = 4_000_000, 0, 2_000_000
    push(project, host, quiet=True)
    assert box.wire.cut_after is None and tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))
    assert box.wire.bytes < 5_000_000


@pytest.mark.slow
@both_ways
def test_a_network_that_swallows_everything_is_found_and_the_push_arrives(box, project, way):
    with Host("gpu") as host:
        host.times = 0.5, 2
        push(project, host, quiet=True)
        fill(project, {"big.bin": random.Random(1).randbytes(500_000)})
        box.wire.rate, box.wire.bytes = 400_000, 0
        thread = threading.Thread(target=push, args=(project, host), kwargs=dict(quiet=True))
        thread.start()
        until(lambda: box.wire.bytes > 200_000, "some of it to go")
        box.wire.black, line = True, host.connect()
        until(lambda: not line.is_active(), "the connection to be given up")
        box.wire.black = False
        box.wire.cut()
        thread.join(180)
        box.wire.rate = None
        assert not thread.is_alive() and tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))


@both_ways
@pytest.mark.parametrize("where", [3_000, 100_000])
def test_the_connection_is_cut_and_the_push_arrives(box, host, project, where):
    push(project, host, quiet=True)
    fill(project, {f"m{i}.py": random.Random(i).randbytes(30_000) for i in range(10)})
    (project / "net.py").unlink()
    box.wire.bytes, box.wire.cut_after = 0, where
    push(project, host, quiet=True)
    assert box.wire.cut_after is None and tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))


def test_a_killed_push_leaves_the_last_good_copy_and_the_next_one_finishes(box, host, project):
    push(project, host, quiet=True)
    before = tree(there(box, project))
    fill(project, {"net.py": "new", "big.bin": random.Random(1).randbytes(3_000_000), "passing.py": "x"})
    box.wire.rate, box.wire.bytes = 1_000_000, 0
    code = "import sys; from nanogpt_nb.remote.push import push; push(sys.argv[1], 'gpu', quiet=True)"
    with subprocess.Popen([sys.executable, "-c", code, str(project)], start_new_session=True) as p:
        until(lambda: box.wire.bytes > 1_000_000, "a megabyte to go")
        os.killpg(p.pid, signal.SIGKILL)
    assert tree(there(box, project), before) == before
    box.wire.rate = None
    (project / "passing.py").unlink()
    until(lambda: not any(b"--server" in argv(pid) for pid in box.processes()), "the rsync there to end")
    push(project, host, quiet=True)
    assert tree(there(box, project)) == tree(project) and nothing_aside(there(box, project))


@pytest.fixture
def small_disk(box):
    "A file system of 2 MB with 60 inodes, on the box."
    disk = box.home / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=60", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only: mount -t tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
    disk.rmdir()


def test_a_disk_too_small_is_told_before_anything_goes(box, host, project, small_disk):
    push(project, host, path="~/disk/p", quiet=True)
    before = tree(small_disk / "p")
    fill(project, {"big.bin": bytes(3_000_000), "net.py": "new"})
    box.wire.bytes = 0
    with pytest.raises(HostError, match=r"\d MB free.*make room"):
        push(project, host, path="~/disk/p", quiet=True)
    assert tree(small_disk / "p") == before


@both_ways
def test_a_disk_that_fills_up_leaves_the_last_good_copy(box, host, project, small_disk):
    push(project, host, path="~/disk/p", quiet=True)
    before = tree(small_disk / "p")
    fill(project, {"net.py": "new"} | {f"m{i}.py": "x" for i in range(80)})
    with pytest.raises(HostError, match="disk there is full.*make room"):
        push(project, host, path="~/disk/p", quiet=True)
    assert tree(small_disk / "p") == before and nothing_aside(small_disk)
    for i in range(70):
        (project / f"m{i}.py").unlink()
    push(project, host, path="~/disk/p", quiet=True)
    assert tree(small_disk / "p") == tree(project) and nothing_aside(small_disk)


@both_ways
def test_a_file_that_grows_while_it_is_sent_comes_with_the_next_push(box, host, project, monkeypatch):
    from nanogpt_nb.remote.push import Push

    send = Push.send
    monkeypatch.setattr(Push, "send", lambda self, *args: (fill(project, {"net.py": "more and more"}), (project / "nbs/a.ipynb").unlink(), send(self, *args))[2])
    done = push(project, host, quiet=True)
    assert "push again" in done.notes[-1] and "net.py" in done.notes[-1] and "a.ipynb" in done.notes[-1]
    monkeypatch.undo()
    box.use(monkeypatch)
    push(project, host, quiet=True)
    assert tree(there(box, project)) == tree(project)


# Notebooks first

NOTEBOOK = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}


def notebook(*sources: str) -> str:
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, outputs=[], execution_count=None, source=s) for i, s in enumerate(sources)]
    return json.dumps(NOTEBOOK | dict(cells=cells))


@pytest.fixture
def nbdev_project(tmp_path):
    pytest.importorskip("nbdev")
    ini = "[DEFAULT]\nrepo = gpt\nlib_name = gpt\nversion = 0.1\nlib_path = gpt\nnbs_path = nbs\nrecursive = True\nuser = me\ndescription = x\nauthor = me\nauthor_email = x@example.com\nlicense = apache2\nmin_python = 3.10\n"
    toml = '[project]\nname = "gpt"\n\n[tool.nbdev]\nlib_path = "gpt"\nnbs_path = "nbs"\n'
    first = notebook("#| default_exp net", "#| export\nx = 1")
    return fill(tmp_path / f"gpt {tmp_path.name}", {"settings.ini": ini, "pyproject.toml": toml, "gpt/__init__.py": '__version__ = "0.1"\n', "nbs/00_net.ipynb": first})


def test_changed_notebooks_are_exported_first_and_unchanged_ones_are_not(box, host, nbdev_project, monkeypatch):
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, *args, **kw: ran.append(Path(words[0]).name) or run(words, *args, **kw))
    push(nbdev_project, host, quiet=True)
    assert "x = 1" in (there(box, nbdev_project) / "gpt/net.py").read_text() and ran.count("nbdev_export") == 1
    assert not push(nbdev_project, host, quiet=True).sent and ran.count("nbdev_export") == 1
    fill(nbdev_project, {"nbs/00_net.ipynb": "not a notebook"})
    before = tree(there(box, nbdev_project))
    with pytest.raises(HostError, match="cannot be exported.*nbdev_export"):
        push(nbdev_project, host, quiet=True)
    assert tree(there(box, nbdev_project)) == before


def test_without_nbdev_the_modules_go_as_they_are_and_it_is_said(box, host, nbdev_project, monkeypatch):
    monkeypatch.setattr("nanogpt_nb.remote.exporting.shutil.which", lambda *_, **__: None)
    assert "nbdev is not installed" in push(nbdev_project, host, quiet=True).notes[0]
