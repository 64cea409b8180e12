"One line trains on another machine: the run there is the run here, whatever happens to the line in between."

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from box import Box, argv, contents, until, why_no_box

from nanogpt_nb import journey
from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.corpus import CorpusError, open_corpus
from nanogpt_nb.guard import GOING
from nanogpt_nb.history import runs
from nanogpt_nb.journey import Steps, attend, export_changed, program_of, texts_of, wait_there
from nanogpt_nb.launch import launch, stop, wait
from nanogpt_nb.remote.agent import Agent, HostError
from nanogpt_nb.remote.channel import Channel
from nanogpt_nb.remote.follower import is_followed
from nanogpt_nb.remote.ssh import Host
from nanogpt_nb.runs import Run, RunError
from nanogpt_nb.watch import watch

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
TIMES = {"seconds", "tokens_per_second", "utilisation"}
SHORT = NanoGPTConfig.preset("tiny").replace(max_iters=20, eval_interval=10, eval_iters=2, sample_tokens=8, device="cpu")
ENDLESS = SHORT.replace(max_iters=1_000_000)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def box(tmp_path_factory, patch):
    "A box that the laptop knows as gpu, and a project on the laptop that we are in."
    folder = tmp_path_factory.mktemp("journey")
    project = folder / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text("[project]\nname = 'poems'\n")
    (folder / "poem.txt").write_text("Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 300)
    with Box(folder) as box:
        box.use(patch)
        (box.ssh / "nanogpt_nb.conf").write_text(f"Host gpu\n  #nanogpt: python={sys.executable}\nHost twin\n  #nanogpt: python={sys.executable}\n")
        with open(box.ssh / "config", "a") as f:
            f.write((box.ssh / "config").read_text().replace("Host gpu", "Host twin"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("NANOGPT_NB_CACHE", str(folder / "cache"))
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.chdir(project)
        patch.setattr(Host, "_all", {})
        yield box
        for host in Host._all.values():
            host.close()


@pytest.fixture
def poem(box):
    return (str(box.folder.parent / "poem.txt"),)


@pytest.fixture(autouse=True)
def nothing_goes_on(box, request):
    "What still trains at the end of a test is ended."
    yield
    with contextlib.suppress(HostError):
        for job in Host.of("gpu").call("jobs.ls")["jobs"]:
            if job["state"] in ("queued", "running"):
                Host.of("gpu").call("jobs.stop", id=job["id"], grace=0)


def stepped(run: Run, step: int = 1) -> Run:
    "The run, when news of its first steps has come home."
    until(lambda: any(row["step"] >= step for row in run.metrics()), f"step {step} of {run.name}: {run.status}", 240)
    return run


def said_by(run: Run) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()]


def jobs(name: str) -> list[dict]:
    return [job for job in Host.of("gpu").call("jobs.ls")["jobs"] if job["name"] == name]


@pytest.fixture(scope="module")
def pair(box):
    "The same settings trained there and here."
    config = SHORT.replace(data=(str(box.folder.parent / "poem.txt"),))
    return wait(launch(config, "there", on="gpu", quiet=True), 120), wait(launch(config, "here"), 300)


class TestTheRun:
    def test_is_the_local_run_bit_for_bit(self, pair):
        there, here = pair
        assert there.state == here.state == "finished"
        assert len(said_by(here)) > 20 and said_by(there) == said_by(here)
        for which in ("last", "best"):
            assert (there.checkpoint(which) / "model.safetensors").read_bytes() == (here.checkpoint(which) / "model.safetensors").read_bytes()
        for name in ("samples.txt", "tokenizer.json"):
            assert (there.path / name).read_bytes() == (here.path / name).read_bytes()

    def test_says_the_same_of_itself_but_for_its_host(self, pair):
        there, here = (run.about for run in pair)
        differ = {k for k in there.keys() | here.keys() if there.get(k) != here.get(k)}
        assert differ <= {"created", "host"} and there["host"] == "gpu" and there["corpus"]["sha256"] == open_corpus(pair[1].config.data).sha256
        table = {row["name"]: row for row in runs("runs").to_dicts()}
        assert table["there"].keys() == table["here"].keys() and table["there"]["host"] == "gpu"
        assert table["there"]["val_loss"] == table["here"]["val_loss"]

    def test_was_told_where_its_text_lies(self, pair, box):
        sent = list((box.home / ".nanogpt_nb" / "texts").glob("*/poem.txt"))
        assert len(sent) == 1 and pair[0].config.data == pair[1].config.data

    def test_keeps_its_name_to_itself(self, pair):
        with pytest.raises(HostError, match="choose another name"):
            launch(pair[0].config.replace(max_iters=50), "there", "runs/elsewhere", on="gpu", quiet=True)
        assert not Path("runs/elsewhere/there").exists() and len(jobs("there")) == 1

    @pytest.mark.slow
    def test_goes_on_there_and_then_here(self, pair):
        there = pair[0]
        more = there.config.replace(max_iters=30)
        assert wait(launch(more, resume=there, on="gpu", quiet=True), 300).status["step"] == 30
        assert there.remote["home"] and there.checkpoint().name == "last"
        wait(launch(there.config.replace(max_iters=40), resume=there), 300)
        assert there.status["step"] == 40 and there.remote == {}
        wait(launch(there.config.replace(max_iters=50), resume=there, on="gpu", quiet=True), 300)
        assert there.status["step"] == 50 and said_by(there)[-1]["step"] == 50
        assert [r["step"] for r in there.estimates()] == [0, 10, 20, 30, 40, 50]

    @pytest.mark.slow
    def test_local_one_goes_on_there(self, pair):
        here = wait(launch(pair[1].config.replace(max_iters=30), resume=pair[1], on="gpu", quiet=True), 300)
        assert (here.state, here.status["step"], here.remote["host"]) == ("finished", 30, "gpu")
        with pytest.raises(RunError, match="has taken 30 steps already"):
            launch(resume=here, on="gpu", quiet=True)


class TestTelling:
    def test_what_the_push_has_to_say_and_who_is_on_the_gpu(self, pair, box, capsys, monkeypatch):
        first = Host.of("gpu").start(["sleep", "600"], queue="gpu")
        readme = Path("README.md")
        readme.write_text("Poems")
        run = launch(ENDLESS.replace(data=pair[0].config.data), "told", on="gpu")
        told = capsys.readouterr().out
        assert re.search(r"push +1 file \(\d+ B over the wire\) → gpu:~/nanogpt/project .* s\n", told) and "export" not in told
        assert f"gpu is busy with job {first.id}; --queue would wait for it." in told and "runs/told comes home while it trains" in told
        (box.home / "nanogpt/project/README.md").write_text("changed there")
        readme.write_text("Poems, old and new")
        queued = launch(ENDLESS.replace(data=pair[0].config.data), "behind", on="gpu", queue=True)
        told = capsys.readouterr().out
        assert "\n         replaced README.md: changed there since the last push\n" in told and jobs("behind")[0]["state"] == "queued"
        assert f"gpu is busy with job {first.id} and 1 more." in told and jobs("told")[0]["state"] == "running"
        for one in (queued, run):
            stop(one, wait=240)

    def test_that_notebooks_are_exported(self, tmp_path, monkeypatch, capsys):
        done = []
        monkeypatch.setattr("nanogpt_nb.remote.exporting.run_export", lambda program, project: done.append(project))
        (tmp_path / "nbs").mkdir()
        (tmp_path / "nbs" / "a.ipynb").write_text("{}")
        (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = poems\nnbs_path = nbs\n")
        for _ in range(2):
            export_changed(tmp_path, Steps())
        assert done == [tmp_path] and re.fullmatch(r"export +notebooks that have changed +\d+\.\d s\n", capsys.readouterr().out)


class TestInterrupt:
    def test_leaves_nothing_before_the_start(self, poem, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("nanogpt_nb.journey.texts_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            launch(SHORT.replace(data=poem), "hasty", on="gpu", quiet=True)
        assert not Path("runs/hasty").exists() and jobs("hasty") == [] and capsys.readouterr().out == ""

    @pytest.mark.parametrize("step", ["begin", "come_home"])
    def test_tells_how_to_look_when_the_job_may_have_begun(self, poem, monkeypatch, capsys, step):
        real, name = getattr(journey, step), f"hasty-{step}"

        def interrupted(*args):
            monkeypatch.undo()
            real(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(journey, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch(SHORT.replace(data=poem), name, on="gpu", quiet=True)
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and "begun on gpu" in told and f"watch {name} shows it" in told
        assert len(jobs(name)) == 1 and stop(Run(f"runs/{name}"), wait=240).state == "stopped"


def test_a_second_launch_of_an_unchanged_project_is_three_questions_on_one_channel(box, pair, monkeypatch):
    asked, opened = [], []
    call, channel = Agent.call_once, Channel.__init__
    monkeypatch.setattr(Agent, "call_once", lambda self, verb, args, payload=None: asked.append(verb) or call(self, verb, args, payload))
    monkeypatch.setattr(Channel, "__init__", lambda self, *args, **how: opened.append(args) or channel(self, *args, **how))
    Host.of("gpu").close()
    run = launch(ENDLESS.replace(data=pair[0].config.data), "twice", on="gpu", quiet=True)
    assert asked == ["tree.tree", "env.find", "launch.begin"] and len(opened) == 1
    stop(run, wait=240)
    assert run.state == "stopped" and run.remote["home"]


class TestStop:
    @pytest.mark.slow
    def test_writes_a_checkpoint_that_comes_home_and_goes_on(self, poem):
        run = stepped(launch(ENDLESS.replace(data=poem), "endless", on="gpu", quiet=True))
        assert run.state in GOING and not run.is_locked()
        with pytest.raises(RunError, match="on gpu"):
            launch(resume=run)
        with pytest.raises(RunError, match="on gpu"):
            launch(resume=run, on="gpu")
        stop(run, wait=240)
        at = run.status["step"]
        assert run.state == "stopped" and run.remote["home"] and json.loads((run.checkpoint() / "checkpoint.json").read_text())["step"] == at
        launch(resume=run, on="gpu", quiet=True)
        stepped(run, at + 5)
        assert run.estimates()[0]["step"] == 0
        stop(run, wait=240)

    def test_before_its_turn_has_come(self, box, poem, monkeypatch, capsys):
        monkeypatch.setenv("WANDB_API_KEY", TestSecrets.KEY)
        first = Host.of("gpu").start(["sleep", "600"], name="first")
        run = launch(ENDLESS.replace(data=poem), "early", on="gpu", after=first, send_wandb_key=True, quiet=True)
        assert run.state == "starting" and jobs("early")[0]["state"] == "queued"
        assert not [p for folder in (box.home, run.path) for p, data in contents(folder) if TestSecrets.KEY.encode() in data]
        assert stop(run, wait=240).state == "stopped" and run.metrics() == []
        assert attend(run) == 1 and "It was stopped before its turn came, so it never ran." in capsys.readouterr().out
        Host.of("gpu").call("jobs.stop", id=first.id, grace=0)

    @pytest.mark.slow
    def test_of_the_follower_is_no_end_of_the_run(self, poem):
        run = stepped(launch(ENDLESS.replace(data=poem), "followed", on="gpu", quiet=True))
        pid = until(lambda: follower_of(run), "the follower")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_followed(run), "the end of the follower")
        assert run.state in GOING and not wait_there(run, 0)
        seen = len(run.metrics())
        until(lambda: len(run.metrics()) > seen, "more news of the run")
        stop(run, wait=240)

    def test_is_not_there_any_more_and_whoever_looks_starts_it_again(self, poem, capsys):
        run = launch(SHORT.replace(data=poem), "looked", on="gpu", quiet=True)
        os.kill(until(lambda: follower_of(run), "the follower"), signal.SIGKILL)
        until(lambda: not is_followed(run), "the end of the follower")
        looking = threading.Thread(target=watch, args=(run,), daemon=True)
        looking.start()
        until(lambda: run.remote.get("home"), "the run", 240)
        looking.join(240)
        assert run.state == "finished" and "looked: finished" in capsys.readouterr().out


def follower_of(run: Run) -> int | None:
    "The process that follows a run."
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (p / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "nanogpt_nb.remote.follower" in words and str(run.path.resolve()) in words:
                return int(p.name)


class TestTrouble:
    def test_on_the_way_leaves_nothing_behind(self, box, poem, monkeypatch):
        box.wire.refuse = True
        Host.of("gpu").close()
        monkeypatch.setattr(Host.of("gpu"), "met", False)
        try:
            with pytest.raises(HostError, match="gpu"):
                launch(SHORT.replace(data=poem), "nowhere", on="gpu", quiet=True)
        finally:
            box.wire.refuse = False
        assert not Path("runs/nowhere").exists() and jobs("nowhere") == []

    def test_after_it_has_begun_does_not_forget_it(self, box, poem, monkeypatch, tmp_path):
        call, begun = Agent.call, []

        def lost(agent, verb, *args, **kwargs):
            told = call(agent, verb, *args, **kwargs)
            if verb == "launch.begin" and "id" in told and not begun:
                begun.append(told)
                raise HostError("Nobody is let in any more.")
            return told

        monkeypatch.setattr(Agent, "call", lost)
        with pytest.raises(HostError, match="let in any more.*is not known"):
            launch(SHORT.replace(data=poem), "unsure", on="gpu", runs_dir=tmp_path / "runs", quiet=True)
        run = Run(tmp_path / "runs" / "unsure")
        assert run.remote["job"] == begun[0]["id"] and wait(run, 240).state == "finished"

    def test_is_told_before_anything_is_asked(self, box, poem, tmp_path):
        with pytest.raises(CorpusError):
            launch(SHORT.replace(data=("no-such-text.txt",)), on="gpu")
        with pytest.raises(ConfigError, match="on="):
            launch(SHORT, queue=True)
        with pytest.raises(ConfigError, match="no job to wait for"):
            launch(SHORT.replace(data=poem), "waits", on="gpu", after=Run.create(SHORT, "local", tmp_path), quiet=True)
        with pytest.raises(HostError, match="no job 'nobody'"):
            launch(SHORT.replace(data=poem), "waits", on="gpu", after="nobody", quiet=True)
        assert not Path("runs/waits").exists() and not (box.home / "nanogpt/project/runs/waits").exists()
        with pytest.raises(ConfigError, match="no key"):
            launch(SHORT.replace(data=poem), on="gpu", send_wandb_key=True)

    @pytest.mark.slow
    def test_of_a_trainer_that_cannot_begin_comes_home(self, poem):
        run = launch(SHORT.replace(data=poem, device="cuda:7"), "no-gpu", on="gpu", quiet=True)
        wait(run, 300)
        assert run.state == "failed" and "cuda" in run.status["error"] and "cuda" in (run.path / "launch.log").read_text()

    @pytest.mark.slow
    def test_cuts_while_it_starts_make_neither_two_jobs_nor_none(self, box, poem):
        names = [f"cut-{i}" for i in range(3)]
        for i, name in enumerate(names):
            box.wire.cut_after = box.wire.bytes + 500 + 4_000 * i
            launch(SHORT.replace(data=poem), name, on="gpu", quiet=True)
        box.wire.cut_after = None
        for name in names:
            run = wait(Run(Path("runs") / name), 300)
            assert run.state == "finished" and len(jobs(name)) == 1 and said_by(run) == said_by(Run("runs/cut-0"))

    def test_a_silent_run_is_lost_and_no_local_process_is_asked(self, poem, tmp_path):
        run = Run.create(SHORT, "far", tmp_path, host="gpu")
        note = dict(host="gpu", path="~/nanogpt/project/runs/far", job="none", seen=0.0)
        (run.path / "remote.json").write_text(json.dumps(note))
        with run.lock(take=False):
            assert run.state == "lost"
        assert run.remote == note and run.state == "lost"


class TestSecrets:
    KEY = "0123456789abcdef0123456789abcdef01234567"

    @pytest.mark.slow
    def test_go_nowhere_unless_asked(self, box, poem, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", self.KEY)
        seen = {}
        for name, send in (("untold", False), ("told", True)):
            run = launch(ENDLESS.replace(data=poem), name, on="gpu", send_wandb_key=send, wandb="disabled", quiet=True)
            stepped(run)
            trainers = [p for p in box.processes() if b"nanogpt_nb.train" in argv(p) and name.encode() in argv(p)]
            assert trainers and not any(self.KEY.encode() in argv(p) for p in box.processes())
            seen[name] = any(self.KEY.encode() in Path(f"/proc/{p}/environ").read_bytes() for p in trainers)
            stop(run, wait=240)
        assert seen == {"untold": False, "told": True}
        for folder in (box.home, Path("runs").resolve()):
            files = list(contents(folder))
            assert len(files) > 10 and not [p for p, data in files if self.KEY.encode() in data]


TRAIN = "import sys; from nanogpt_nb.cli import main; sys.exit(main(['train', '--on', 'gpu', '--preset', 'tiny', '--device', 'cpu', *sys.argv[1:]]))"


class TestOnATerminal:
    def run_on_a_terminal(self, *words):
        "The command on a terminal of its own: the process, the terminal, and what it shows."
        ours, theirs = pty.openpty()
        process = subprocess.Popen([sys.executable, "-c", TRAIN, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | dict(TERM="xterm"))
        os.close(theirs)
        shown = []

        def read():
            with contextlib.suppress(OSError):
                while data := os.read(ours, 1 << 16):
                    shown.append(data)

        threading.Thread(target=read, daemon=True).start()
        return process, ours, lambda: re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode(errors="replace"))

    @pytest.mark.slow
    def test_ctrl_c_asks_and_the_run_goes_on_or_is_stopped(self, poem):
        process, terminal, shown = self.run_on_a_terminal("--name", "asked", "--max-iters", "1000000", "--eval-interval", "20", "--eval-iters", "2", "--data", *poem)
        run = Run("runs/asked")
        try:
            until(lambda: "follow" in shown() and any(r["step"] > 20 for r in run.metrics()), "the run on the terminal", 240)
            assert [word for word in ("connect", "push", "prepare", "start", "follow") if not re.search(rf"{word} .* \d+\.\d s", shown())] == []
            process.send_signal(signal.SIGINT)
            until(lambda: "d: leave it there" in shown(), "the question")
            os.write(terminal, b"d\n")
            assert process.wait(120) == 130 and "nanogpt" in shown() and "watch asked" in shown()
            assert run.state in GOING
        finally:
            process.kill()
            process.wait()
            os.close(terminal)
        done = subprocess.Popen([sys.executable, "-c", TRAIN.replace("'train', '--on', 'gpu', '--preset', 'tiny', '--device', 'cpu', ", ""), "stop", "asked"], stdout=subprocess.PIPE, text=True)
        assert "stopped at step" in done.communicate(timeout=300)[0] and run.state == "stopped"

    @pytest.mark.slow
    def test_without_one_ctrl_c_leaves_the_run_there(self, poem):
        process = subprocess.Popen([sys.executable, "-c", TRAIN, "--name", "alone", "--max-iters", "1000000", "--data", *poem], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        run = Run("runs/alone")
        until(lambda: run.path.exists() and run.metrics(), "the first estimate", 240)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=240)[0]
        assert process.returncode == 130 and "goes on on gpu" in out and run.state in GOING
        stop(run, wait=240)


@pytest.mark.slow
def test_a_sweep_has_a_trial_on_each_of_its_machines(poem, capfd):
    pytest.importorskip("optuna")
    from nanogpt_nb.sweep import sweep

    space = dict(learning_rate=[1e-2, 1e-3, 1e-4])
    found = sweep(space, SHORT.replace(data=poem), method="grid", name="lr", wandb="disabled", on=["gpu", "twin"], prune=False)
    rows = found.rows()
    assert [row["state"] for row in rows] == ["finished"] * 3 and {found.run(row["number"]).about["host"] for row in rows} == {"gpu", "twin"}
    assert rows[0]["val_loss"] == min(r["val_loss"] for r in found.best_run.estimates()) and "3 finished" in capfd.readouterr().out


@pytest.mark.slow
def test_a_sweep_goes_on_when_a_machine_drops_out_and_prunes_by_what_comes_home(box, poem):
    pytest.importorskip("optuna")
    from nanogpt_nb.sweep import sweep

    with open(box.ssh / "config", "a") as f:
        f.write("Host gone\n  HostName 127.0.0.1\n  Port 9\n")
    space, base = dict(learning_rate=[1e-2, 1e-3, 1e-8]), SHORT.replace(data=poem, max_iters=1000, eval_interval=50)
    found = sweep(space, base, trials=3, method="grid", name="rates", wandb="disabled", on=["gone", "gpu"])
    rows = found.rows()
    assert [row["state"] for row in rows] == ["finished", "finished", "pruned"]
    hopeless = found.run(rows[2]["number"])
    assert hopeless.state == "stopped" and hopeless.status["step"] < base.max_iters and hopeless.remote["home"]
    assert all(found.run(row["number"]).about["host"] == "gpu" for row in rows)


def test_the_program_goes_along_unless_the_project_has_it(tmp_path):
    import nanogpt_nb

    package = Path(nanogpt_nb.__file__).resolve().parent
    assert program_of(package.parent, "~/nanogpt/x") == ("~/nanogpt/x", {})
    path, files = program_of(tmp_path, "~/nanogpt/x")
    assert path.startswith("~/.nanogpt_nb/packages/") and files["nanogpt_nb/runs.py"] == package / "runs.py"


def test_texts_are_known_by_names_and_content(tmp_path):
    for name, text in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(text)
    paths = [texts_of(SHORT.replace(data=(str(tmp_path / name),)))[str(tmp_path / name)][0] for name in ("a.txt", "b.txt", "c.txt")]
    assert len(set(paths)) == 3 and paths[0] == texts_of(SHORT.replace(data=(str(tmp_path / "a.txt"),)))[str(tmp_path / "a.txt")][0]
