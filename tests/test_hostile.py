"What a box, a file or a name must not bring about: another job's end, files of ours written over, links that lead elsewhere."

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from box import Box, make_key, until, why_no_box

from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.remote import bring as bringing
from nanogpt_nb.remote import lab as labs
from nanogpt_nb.remote import there_folder, there_jobs, there_run, there_still
from nanogpt_nb.remote.address import Address, add_host, find_address
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.keys import NotLetIn, candidates, is_named, known, no_entry
from nanogpt_nb.remote.landing import Elsewhere, Landing, note_remote
from nanogpt_nb.remote.pull import pull
from nanogpt_nb.remote.there import Trouble
from nanogpt_nb.runs import Run, RunError


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A home folder with an empty .ssh."
    (tmp_path / "home/.ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


class TestJobs:
    def make(self, id, name=None, state="running"):
        folder = there_folder.jobs_folder() / id
        folder.mkdir()
        there_folder.write(folder / "job.json", dict(name=name, created=time.time(), command="true", secrets=[]))
        me = dict(pid=os.getpid(), boot=there_folder.boot(), birth=there_folder.birth(os.getpid()))
        there_folder.write(folder / "status.json", dict(state=state, runner=1, created=time.time(), **me))
        return folder

    @pytest.mark.parametrize(
        "ask", [there_jobs.stop, there_jobs.remove, there_jobs.status, lambda id: next(there_jobs.tail(id)), lambda id: next(there_jobs.watch(id))]
    )
    def test_one_that_was_removed_is_not_another_that_begins_alike(self, home, ask):
        other = self.make("exp-10", name="exp-1")
        for id in ("exp-1", "last", "", None, "../exp-10"):
            with pytest.raises(Trouble, match="no job"):
                ask(id)
        assert not (other / "stop.json").exists() and other.is_dir()
        assert there_jobs.status(word="exp-1")["id"] == "exp-10"

    def test_a_name_is_the_one_that_goes_on_and_never_one_of_two(self, home):
        self.make("a", "train")
        newer = self.make("b", "train", "finished")
        assert there_jobs.status(word="train")["id"] == "a"
        there_folder.write(newer / "status.json", dict(there_folder.read(newer / "status.json"), state="running"))
        with pytest.raises(Trouble, match="Several jobs can be meant by 'train'.*a, b"):
            there_jobs.status(word="train")
        for id in "ab":
            self.end(id)
        assert there_jobs.status(word="train")["id"] == "b"

    def end(self, id):
        path = there_folder.jobs_folder() / id / "status.json"
        there_folder.write(path, dict(there_folder.read(path), state="finished"))


class Hostile:
    "A box that answers with the run modules of this machine, but for what `says` has; there is no rsync."

    name, settings = "gpu", {}

    def __init__(self, path, **says):
        self.path, self.says = path, {"run.find": lambda name, **_: dict(found=[str(path)])} | says

    def verb(self, verb):
        module, _, name = verb.partition(".")
        return self.says.get(verb) or getattr(dict(run=there_run, still=there_still)[module], name)

    def call(self, verb, **args):
        return self.verb(verb)(**args)

    def stream(self, verb, **args):
        for one in self.verb(verb)(**args):
            yield one if isinstance(one, tuple) else (one, b"")

    def persist(self, once):
        return once()


@pytest.fixture
def far(home, tmp_path, monkeypatch):
    "A run on a box that is reached without rsync."
    monkeypatch.setattr(bringing, "rsync_here", lambda path: (None, "no rsync"))
    run = Run.create(NanoGPTConfig.preset("tiny"), "far", tmp_path / "there", state="finished")
    run.log("begins")
    run.save_checkpoint("last", lambda p: (p / "model").write_bytes(b"weights"), step=1)
    return run


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


class TestPull:
    @pytest.mark.parametrize(
        "name",
        ["remote.json", ".lock", "./remote.json", "Remote.JSON", "config.json", "last/model", "best/x", ".pull/x", "wandb/.bashrc", "sub/.x/y", ".", "../x", "/x", "", "a\0b"],
    )
    def test_other_files_are_none_of_ours(self, far, tmp_path, name):
        host = Hostile(far.path, **{"run.others": lambda run: dict(files={"wandb/a": [1, 2.0], name: [1, time.time() + 9]})})
        with pytest.raises(HostError, match="look who answers there"):
            pull("far", host, tmp_path / "runs", quiet=True)
        near = Run(tmp_path / "runs/far")
        assert (near.path / "config.json").read_bytes() == (far.path / "config.json").read_bytes() and not (near.path / "wandb").exists()
        assert near.remote["host"] == "gpu" and "evil" not in (near.path / "remote.json").read_text()

    def test_other_files_come(self, far, tmp_path):
        (far.path / "wandb").mkdir()
        (far.path / "wandb" / "a..b").write_text("x")
        assert pull("far", Hostile(far.path), tmp_path / "runs", quiet=True).checkpoint().name == "last"
        assert (tmp_path / "runs/far/wandb/a..b").read_text() == "x"

    @pytest.mark.parametrize("name", ["../up", "--rsh=x", "/abs", "a/b", ".hidden", "", "a b"])
    def test_a_name_stays_in_the_runs_folder(self, far, tmp_path, name):
        before = files(tmp_path)
        with pytest.raises(RunError, match="cannot name a run here.*--name"):
            pull("far", Hostile(far.path), tmp_path / "runs", name=name or "..", quiet=True)
        with pytest.raises(RunError, match="cannot name a run here.*--name"):
            pull(name and "x/" + name.replace("/", " "), Hostile(far.path), tmp_path / "runs", quiet=True)
        assert files(tmp_path) == before

    def test_a_run_that_is_here_is_found_by_name_and_by_path(self, far, tmp_path):
        host = Hostile(far.path)
        near = pull("far", host, tmp_path / "runs", quiet=True)
        assert pull("far", host, tmp_path / "runs", quiet=True) == pull(near.path, host, quiet=True) == near
        assert pull(near.path, host, tmp_path / "runs", name="other", quiet=True).name == "other"

    def test_paths_are_no_options_of_rsync(self, far, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(bringing, "rsynced", lambda host, args, progress=None: said.append(args) or False)
        monkeypatch.setattr("nanogpt_nb.remote.pull.rsynced", bringing.rsynced)
        (far.path / "extra").write_text("x")
        host = Hostile(far.path, **{"run.room": lambda run: dict(held=False, log=None, run=run), "still.digest": lambda path: dict(sha256=None)})
        host.says["still.receive"] = lambda payload, path, sha256: None
        near = pull("far", host, "runs", quiet=True)
        from nanogpt_nb.remote.pull import send

        send(Run("runs/far"), host, str(tmp_path / "again"))
        assert len(said) == 3 and all(args[-3] == "--" and (args[-1][0] == "/" or args[-2][0] == "/") for args in said)
        assert near.name == "far"

    def test_bytes_have_a_place(self, far, tmp_path):
        near = Landing(Run(tmp_path / "near"), "gpu")
        near.run.path.mkdir()
        (near.run.path / "log.txt").write_text("begins\n")
        for at in (-5, -1, None, "0"):
            with pytest.raises(HostError, match="look who answers there"):
                near.take(dict(file="log.txt", at=at, whole=False, last=True), b"xx")
        with pytest.raises(Elsewhere):
            near.take(dict(file="log.txt", at=8, whole=False, last=True), b"xx")
        assert (near.run.path / "log.txt").read_text() == "begins\n"

    @pytest.mark.parametrize("name", ["/dev/zero", "../x"])
    def test_the_list_of_a_checkpoint_names_its_own_files(self, far, tmp_path, name):
        told = json.loads((far.path / "last/checkpoint.json").read_text())
        told["files"][name] = dict(bytes=0, sha256="x")
        host = Hostile(far.path)

        def freeze(run, which, **more):
            still = there_still.freeze(run, which, **more)
            if still:
                Path(still["path"], "checkpoint.json").unlink()
                Path(still["path"], "checkpoint.json").write_text(json.dumps(told))
            return still

        host.says["still.freeze"] = freeze
        with pytest.raises(HostError, match="outside the run's folder"):
            pull("far", host, tmp_path / "runs", quiet=True)
        assert not (tmp_path / "runs/far/last").exists()

    def test_a_run_without_a_known_job_is_not_stopped_but_said(self, far, tmp_path):
        from nanogpt_nb.launch import stop

        run = Run.create(NanoGPTConfig.preset("tiny"), "one", tmp_path / "runs", state="running")
        note_remote(run, host="gpu", path="/there/one", seen=time.time())
        with pytest.raises(RunError, match="nanogpt job ls gpu.*nanogpt job stop gpu JOB"):
            stop("one", runs_dir=tmp_path / "runs")


class Port:
    url = "http://127.0.0.1:8888"


class TestLab:
    @pytest.mark.parametrize("base", ["@evil.example/", "//evil.example", ".evil.example", ":80@evil.example", "\\evil", "?x=", "#", None, "/", "a b/ü"])
    def test_the_link_leads_to_this_machine(self, base):
        from urllib.parse import urlsplit

        one = labs.Lab(Hostile, dict(root="/", token="5ec2&e7", base_url=base, job="lab_1"), Port)
        at = urlsplit(one.url)
        assert (at.netloc, at.query, at.fragment) == ("127.0.0.1:8888", "token=5ec2%26e7", "") and at.path.startswith("/") and at.path.endswith("/lab")
        assert base not in (None, "/") or at.path == "/lab"

    @pytest.mark.parametrize("port", ["8888", 22, 65536, None, -1, 8888.0, True])
    def test_the_port_is_one_that_a_user_can_have(self, port, monkeypatch):
        monkeypatch.setattr(labs, "forward", lambda *args: pytest.fail("a tunnel was made"))
        with pytest.raises(HostError, match="look who answers there"):
            labs._here(Hostile, dict(job="lab_1", root="/", port=port), None)

    @pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
    @pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP"])
    def test_the_page_with_the_token_goes_with_a_signal(self, sent, tmp_path):
        code = (
            "import threading, types\nfrom nanogpt_nb.remote import lab as labs\n"
            "one = types.SimpleNamespace(url='u', root='/', host=types.SimpleNamespace(name='gpu'), close=lambda: print('closed', flush=True))\n"
            "one.tunnel = types.SimpleNamespace(over=threading.Event())\n"
            "def lab(*args, **kw): print(labs.door('http://127.0.0.1/lab?token=5ec2'), flush=True); return one\n"
            "labs.lab = lab\n"
            "labs.lab_from_args(types.SimpleNamespace(stop=False, on='gpu', browser=True, path=None))\n"
        )
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ, TMPDIR=str(tmp_path)))
        page = Path(p.stdout.readline().strip())
        assert "5ec2" in page.read_text() and "Ctrl-C" in p.stdout.readline() + p.stdout.readline()
        p.send_signal(getattr(signal, sent))
        out = p.communicate(timeout=120)[0]
        assert p.returncode == 0 and "closed" in out and not page.exists()

    def test_the_page_goes_by_itself(self, monkeypatch):
        monkeypatch.setattr(labs, "PATIENCE", 0.05)
        page = labs.door("http://127.0.0.1/lab?token=5ec2")
        until(lambda: not page.exists(), "the end of the page")


class TestKeys:
    @pytest.mark.parametrize("name", ['a"b', "a\x1bb", "a\nb", "a\x7fb", "${HOME}"])
    def test_a_key_that_the_configuration_cannot_name_is_refused(self, home, name):
        key = home / name
        key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
        key.chmod(0o600)
        with pytest.raises(ConfigError, match="cannot stand in ssh's configuration"):
            add_host("gpu", "192.0.2.7", key=str(key))
        assert not (home / ".ssh/nanogpt_nb.conf").exists()

    @pytest.mark.parametrize("who", ["a\x1b[2Jb@gpu", "a\0b@gpu", "gp\x7fu", "a\u2028b@gpu", "a@g\x9bpu"])
    def test_a_user_has_no_control_characters(self, home, who):
        with pytest.raises(ConfigError, match="not the name of a host"):
            add_host("gpu", who)

    def test_a_setting_has_no_line_of_its_own(self, home):
        for end in ("\n", "\x0b", "\x0c", "\x85", "\u2028"):
            with pytest.raises(ConfigError, match="line break"):
                add_host("gpu", "192.0.2.7", path=f"x{end}ProxyCommand evil")

    def test_percent_signs_of_a_key_are_ours_and_ssh_s(self, home):
        key = home / "100%d %%h"
        key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----")
        key.chmod(0o600)
        assert add_host("gpu", "192.0.2.7", key=str(key)).identity_files == (str(key),)
        assert find_address("gpu").identity_files == (str(key),)
        if shutil.which("ssh"):
            said = subprocess.run(["ssh", "-F", str(home / ".ssh/nanogpt_nb.conf"), "-G", "gpu"], capture_output=True, text=True)
            assert said.returncode == 0 and f"identityfile {str(key).replace('%', '%%')}" in said.stdout

    def test_a_line_with_a_strange_hash_is_nobody_s(self, home):
        assert not is_named("|1|QUJD|é", "gpu")
        file = home / ".ssh/known_hosts"
        file.write_text(f"|1|QUJD|é ssh-ed25519 AAAA\ngpu ssh-ed25519 {base64.b64encode(b'key').decode()}\n", encoding="utf-8")
        assert [k[2] for k in known(Address("gpu", "gpu", known_hosts=(str(file),)))] == [b"key"]

    @pytest.mark.skipif(not shutil.which("ssh-keygen") or os.name != "posix", reason="needs ssh-keygen")
    def test_a_key_that_others_may_read_is_left_out(self, home):
        key, shut = home / "key", []
        make_key(key)
        address = Address("gpu", "gpu", identity_files=(str(key),))
        assert [what for what, _ in candidates(address, shut)] == [str(key)] and not shut
        key.chmod(0o644)
        assert not list(candidates(address, shut))
        with pytest.raises(NotLetIn, match=f"may be read by others.*chmod 600 {shlex.quote(str(key))}"):
            raise no_entry(address, [], shut, "")


@pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
def test_on_a_real_box(tmp_path, monkeypatch):
    "The same with a connection: a job that was removed, and a run whose name is an option."
    from nanogpt_nb.remote.jobs import Job, start
    from nanogpt_nb.remote.ssh import Host

    with Box(tmp_path) as box, Host(box.use(monkeypatch).name) as host:
        monkeypatch.chdir(tmp_path)
        one, other = (start(host, ["sleep", "60"], name="exp", id=id) for id in ("exp-1", "exp-10"))
        one.stop(0)
        one.remove()
        with pytest.raises(HostError, match="no job 'exp-1'"):
            Job(host, "exp-1").stop(0)
        assert other.state == "running" and other.stop(0)["state"] == "stopped"
        run = Run.create(NanoGPTConfig.preset("tiny"), "far", box.home / "nanogpt/p/runs", state="finished")
        (run.path / "extra").write_text("x")
        shutil.copytree(run.path, evil := run.path.with_name("--rsh=touch pwned"))
        with pytest.raises(RunError, match="cannot name a run here"):
            pull(evil.name, host, ".", quiet=True)
        assert (pull(evil.name, host, ".", name="tame", quiet=True).path / "extra").read_text() == "x"
        assert not (tmp_path / "pwned").exists()
