"Runs in processes of their own: they outlive who started them, they are stopped well, and their deaths are told."

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from lab import Browser, Lab, until, why_not

import nanogpt_nb
from nanogpt_nb.args import parse_train
from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.controls import Controls, controls, folder_link, wandb_link
from nanogpt_nb.corpus import CorpusError
from nanogpt_nb.guard import GOING, holder, words_for
from nanogpt_nb.guard import trains as trains_run
from nanogpt_nb.launch import launch, launch_from_args, stop, stop_from_args, wait
from nanogpt_nb.runs import Run, RunError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals that let a run end well")
ENDLESS = NanoGPTConfig.preset("tiny").replace(max_iters=1_000_000, eval_interval=20, eval_iters=2, sample_tokens=8)
SHORT = ENDLESS.replace(max_iters=20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def runs_dir(tmp_path):
    "A folder for runs; what still trains there at the end is killed."
    yield tmp_path / "runs"
    for path in (tmp_path / "runs").glob("*/config.json"):
        if pid := holder(Run(path.parent)):
            os.kill(pid, signal.SIGKILL)
            wait(Run(path.parent), 30)


def exists(pid: int) -> bool:
    "Whether there is such a process; a zombie is one."
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def trains(run: Run) -> Run:
    "The run, when it has taken its first steps."

    def stepped():
        assert run.state in (*GOING, "finished"), run.status
        return any(row["step"] > 0 for row in run.metrics())

    until(stepped, "the first steps of a run", 300)
    return run


def gone(pid: int):
    until(lambda: not exists(pid), f"the end of process {pid}")


def at_once(n: int, f) -> list:
    "What `f(i)` gave or raised, called from n threads at the same time."
    barrier, told = threading.Barrier(n), {}

    def one(i):
        barrier.wait()
        try:
            told[i] = f(i)
        except RunError as e:
            told[i] = e

    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(told.values())


# The process that starts a run, and what becomes of it


def test_a_run_outlives_its_starter_and_the_whole_group_of_it(runs_dir):
    "As when the kernel is killed, or the terminal is closed."
    code = f"""
        import sys
        from nanogpt_nb.config import NanoGPTConfig
        from nanogpt_nb.launch import launch
        run = launch(NanoGPTConfig.from_json({ENDLESS.to_json()!r}), "first", {str(runs_dir)!r})
        print("torch" in sys.modules, run.state, flush=True)
        sys.stdin.read()
    """
    code = "\n".join(line[8:] for line in code.split("\n"))
    env = os.environ | {"WANDB_API_KEY": "5ec2e7" * 7}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True) as starter:
        assert starter.stdout.readline().split() == ["False", "starting"]
        os.killpg(starter.pid, signal.SIGHUP)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(starter.pid, signal.SIGKILL)
    run = Run(runs_dir / "first")
    pid = run.status["pid"]
    assert pid != starter.pid
    trains(run)
    seen = len(run.metrics())
    until(lambda: len(run.metrics()) > seen, "more metrics")
    listed = subprocess.run(["ps", "axww", "-o", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    assert not [line for line in listed if "5ec2e7" in line]
    (guardian,) = [int(line.split()[0]) for line in listed if "nanogpt_nb.guard" in line and str(run.path) in line]
    os.kill(guardian, signal.SIGTERM)  # means the trainer
    assert wait(run, 300).state == "stopped" and run.checkpoint()
    gone(pid)
    gone(guardian)
    assert not [p for p in run.path.rglob("*") if p.is_file() and b"5ec2e7" in p.read_bytes()]


def test_stopped_whole_and_gone_on_with(runs_dir):
    run = trains(launch(ENDLESS, "first", runs_dir))
    pid = run.status["pid"]
    assert stop(run) == run and run.state == "stopped"
    gone(pid)
    at = run.status["step"]
    assert json.loads((run.checkpoint() / "checkpoint.json").read_text())["step"] == at > 0
    assert launch(resume=run, config=ENDLESS.replace(max_iters=at + 30)) == run
    assert wait(run, 300).state == "finished" and run.status["step"] == at + 30
    with pytest.raises(RunError, match="max_iters above"):
        launch(resume="first", runs_dir=runs_dir)
    with pytest.raises(RunError, match="nothing to stop"):
        stop(run)
    before = run.status
    launch(resume=run, config=ENDLESS.replace(n_embd=64))  # refused by the trainer
    until(lambda: run.state == "finished" and "n_embd" in run.status.get("error", ""), "a run as it was, and a reason")
    assert run.status | {"error": None} == before | {"error": None}


def test_stopped_before_the_first_step(runs_dir):
    run = launch(SHORT, "first", runs_dir)
    pid = run.status["pid"]
    assert stop(run).state == "stopped" and run.status.get("error") is None
    gone(pid)


# Deaths


def test_a_trainer_that_cannot_import_torch_says_so(runs_dir, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = wait(launch(SHORT, "first", runs_dir), 300)
    assert run.state == "failed" and "libcudnn is not here" in run.status["error"]


def test_killed_at_the_start_and_killed_at_work(runs_dir):
    starting, working = launch(SHORT, "starting", runs_dir), launch(ENDLESS, "working", runs_dir)
    os.kill(starting.status["pid"], signal.SIGKILL)
    assert wait(starting, 300).state == "failed" and "SIGKILL" in starting.status["error"]
    pid = trains(working).status["pid"]
    os.kill(pid, signal.SIGKILL)
    gone(pid)
    assert working.state == "killed"
    until(lambda: "SIGKILL" in working.status.get("error", ""), "a reason")
    with pytest.raises(RunError, match="killed.*nothing to stop"):
        stop(working)
    told = at_once(3, lambda i: launch(resume=working))  # of those who go on with it one does
    assert [type(o) for o in told].count(Run) == 1
    assert all("is being trained" in str(e) for e in told if isinstance(e, RunError))
    until(lambda: working.state == "running", "a run that goes on")
    with pytest.raises(RunError, match="is being trained"):
        launch(resume=working)
    assert stop(working).state == "stopped" and "error" not in working.status


def test_a_package_that_is_not_installed_launches_itself(runs_dir, tmp_path):
    copy = tmp_path / "check out"
    shutil.copytree(Path(nanogpt_nb.__file__).parent, copy / "nanogpt_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "nanogpt_nb" / "train.py").write_text("raise ImportError('this is the copy')")
    code = f"""
import sys
sys.path.insert(0, {str(copy)!r})
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.launch import launch, wait
print(wait(launch(NanoGPTConfig.from_json({SHORT.to_json()!r}), "first", {str(runs_dir)!r}), 300).status["error"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "this is the copy" in done.stdout, done.stderr


def test_what_is_wrong_is_said_at_once_or_in_the_status(runs_dir, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(CorpusError, match="no file"):
        launch(SHORT.replace(data=("absent.txt",)), runs_dir=runs_dir)
    with pytest.raises(ConfigError, match="wandb"):
        launch(SHORT, wandb="yes", runs_dir=runs_dir)
    with pytest.raises(ConfigError, match="NanoGPTConfig"):
        launch("tiny", runs_dir=runs_dir)
    with pytest.raises(RunError, match="cannot name"):
        launch(SHORT, "../up", runs_dir=runs_dir)
    assert not runs_dir.exists()
    run = wait(launch(SHORT.replace(data=(str(tmp_path / "short.txt"),)), "first", runs_dir), 300)
    assert run.state == "failed" and "too short" in run.status["error"]
    with pytest.raises(RunError, match="exists already"):
        launch(SHORT, "first", runs_dir)


def test_a_process_that_cannot_be_started(runs_dir, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RunError, match="cannot be started"):
        launch(SHORT, "first", runs_dir)
    assert Run(runs_dir / "first").state == "failed"


# Several at once


def test_launched_in_the_same_second(runs_dir):
    runs = at_once(3, lambda i: launch(SHORT, runs_dir=runs_dir))
    assert len({run.name for run in runs}) == 3
    with pytest.raises(RunError, match="Several runs"):
        stop(runs_dir=runs_dir)
    for run in runs:
        assert stop(run).state == "stopped"
    with pytest.raises(RunError, match="nothing to stop"):
        stop(runs_dir=runs_dir)


# The right process


@pytest.mark.parametrize("state", GOING)
@pytest.mark.parametrize("locked", [True, False])
def test_a_number_that_belongs_to_another_process_by_now(state, locked, runs_dir):
    run = Run.create(SHORT, "first", runs_dir)
    with subprocess.Popen(["sleep", "1000"]) as other:
        run.set_status(state, pid=other.pid)
        with run.lock() if locked else contextlib.nullcontext():
            assert holder(run) is None
            with pytest.raises(RunError, match="cannot be seen from here" if run.state in GOING else "nothing to stop"):
                stop(run)
            assert other.poll() is None
        other.kill()


def test_the_process_that_is_launching_is_no_trainer(runs_dir):
    run = Run.create(SHORT, "first", runs_dir, state="starting")
    with run.lock():
        assert run.status["pid"] == os.getpid() and run.state == "starting" and holder(run) is None


def test_a_run_of_another_machine(runs_dir):
    run = Run.create(SHORT, "first", runs_dir)
    run.set_status("running", host="elsewhere")
    with pytest.raises(RunError, match="on elsewhere"):
        stop(run)
    with pytest.raises(RunError, match="on elsewhere"):
        launch(resume=run)


def side(f, *args, **kwargs) -> tuple[threading.Thread, list]:
    "A thread that calls `f`, and a list that gets what came of it."
    told = []

    def call():
        try:
            told.append(f(*args, **kwargs))
        except RunError as e:
            told.append(e)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, told


def test_a_run_of_this_process_is_interrupted_in_the_main_thread(runs_dir):
    from nanogpt_nb.train import train

    run = Run(runs_dir / "first")
    thread, told = side(lambda: until(lambda: run.path.exists() and run.metrics(), "steps") and stop(run, 0))
    assert train(ENDLESS, name="first", runs_dir=runs_dir, quiet=True) == run and run.state == "stopped"
    thread.join(240)
    assert told == [run]


def test_a_run_of_this_process_in_a_side_thread_is_not_and_nobody_else_is(runs_dir):
    from nanogpt_nb.train import train

    enough, run, main = threading.Event(), Run(runs_dir / "first"), Run(runs_dir / "main")
    thread, ended = side(train, ENDLESS, name="first", runs_dir=runs_dir, quiet=True, on_estimate=lambda row: enough.is_set() and "enough")
    try:
        until(lambda: run.path.exists() and run.metrics(), "steps")
        with pytest.raises(RunError, match="thread of this process"):
            stop(run, 0)
        asked = []

        def ask(row):
            "Called while the main thread trains another run."
            asked.append(side(stop, run, 0))
            asked[-1][0].join(240)
            return "asked"

        train(ENDLESS, name="main", runs_dir=runs_dir, quiet=True, on_estimate=ask)
        assert main.status["reason"] == "asked" and main.status.get("signal") is None
        (error,) = asked[0][1]
        assert "thread of this process" in str(error) and run.state == "running"
    finally:
        enough.set()
        thread.join(240)
    assert ended == [run] and run.state == "stopped"


@pytest.mark.parametrize("module", ["nanogpt_nb.train", "nanogpt_nb.guard"])
def test_a_trainer_in_a_folder_with_a_space_is_known_by_ps_too(module, tmp_path, monkeypatch):
    run, other = Run.create(SHORT, "first", tmp_path / "a b"), Run.create(SHORT, "firs", tmp_path / "a b")
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-c", "input()", "-m", module, "--resume", str(run.path), "--wandb", "offline"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process, monkeypatch.context() as m:
        for _ in range(2):
            until(lambda: trains_run(process.pid, run, module), "a trainer that is known")
            assert not trains_run(process.pid, other, module) and not trains_run(process.pid, run, "nanogpt_nb.follow")
            m.setattr(Path, "read_bytes", no_proc)
        process.stdin.close()


def no_proc(path: Path) -> bytes:
    raise FileNotFoundError(path)  # as where there is no /proc


# Words


def test_changes_become_flags_and_back(tmp_path):
    (tmp_path / "a b.txt").write_text("text")
    new = SHORT.replace(
        max_iters=7, learning_rate=2.5e-4, compile=True, data=(str(tmp_path / "a b.txt"), "tinyshakespeare"), device="cpu", dropout=0.5
    )
    for was, now in ((SHORT, new), (new, SHORT)):
        args = parse_train(["--resume", "x", *words_for(was.diff(now))], "nanogpt launch")
        assert was.replace(**{k: getattr(args.config, k) for k in args.given}) == now


def test_in_a_terminal(runs_dir, capsys):
    assert launch_from_args(parse_train(["--preset", "tiny", "--name", "first", "--runs-dir", str(runs_dir)], "nanogpt launch")) == 0
    assert stop_from_args(SimpleNamespace(run=None, wait=60, runs_dir=runs_dir)) == 0
    said = capsys.readouterr().out
    assert "nanogpt stop first" in said and "stopped at step" in said
    assert launch_from_args(parse_train(["--resume", "first", "--max-iters", "10", "--runs-dir", str(runs_dir)], "nanogpt launch")) == 0
    assert "--max-iters\x0010\x00" in Path(f"/proc/{Run(runs_dir / 'first').status['pid']}/cmdline").read_text() or sys.platform != "linux"
    assert stop(runs_dir=runs_dir).state == "stopped"


# Controls


def test_without_a_notebook_there_are_no_controls(runs_dir):
    assert controls(Run.create(SHORT, "first", runs_dir)) is None


def test_the_commands_told_are_those_that_can_be_typed(tmp_path, monkeypatch, capsys):
    run = Run.create(SHORT, "first", tmp_path / "a b")
    monkeypatch.setattr("nanogpt_nb.launch.stop", lambda *_: run)
    monkeypatch.setattr("nanogpt_nb.launch.command", lambda: "there/nanogpt")
    assert stop_from_args(SimpleNamespace(run=None, wait=60, runs_dir=run.path.parent)) == 0
    assert f"there/nanogpt launch --resume first --runs-dir '{run.path.parent}'\n" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_says_when_it_can_write(runs_dir):
    run = Run.create(SHORT, "first", runs_dir, state="starting")
    about = SimpleNamespace(run=run, tokens=10, text=SimpleNamespace(value="", layout=SimpleNamespace()), sample=SimpleNamespace())
    about.no_checkpoint, said = lambda: Controls.no_checkpoint(about), []
    about.say = lambda text, alert=False: said.append((text, alert))
    Controls._write(about, "ROMEO:")
    run.set_status("stopped")
    Controls._write(about, "ROMEO:")
    (first, second) = said
    assert "wait for the first estimate" in first[0] and "launch(resume='first')" in second[0] and first[1] and second[1]


def test_links_are_safe_and_lead_to_the_folder(tmp_path):
    server = dict(root_dir=str(tmp_path), base_url="/user/me/")
    assert 'href="/user/me/lab/tree/runs/%22a%22%20%3Cb%3E"' in folder_link(tmp_path / "runs" / '"a" <b>', server)
    assert "<b>" not in folder_link(tmp_path / "runs" / '"a" <b>', server)
    assert folder_link(tmp_path.parent, server) == folder_link(tmp_path, {}) == wandb_link({"url": "javascript:alert()"}) == ""


CELLS = [
    """
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.controls import controls
from nanogpt_nb.launch import launch
run = launch(NanoGPTConfig.from_json(CONFIG), "first")""".replace("CONFIG", repr(ENDLESS.to_json())),
    "controls(run)",
    "from pathlib import Path\nPath('begun').touch()\nwhile not Path('enough').exists(): pass\nPath('over').touch()",
]


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_buttons_answer_while_the_kernel_is_free_and_while_it_is_busy(tmp_path):
    run = Run(tmp_path / "runs" / "first")
    with Lab(tmp_path) as lab, Browser() as browser, browser.tab(lab) as tab:
        notebook = tab.open(lab.write("controls.ipynb", CELLS))
        notebook.run(0, 1)
        trains(run)
        (run.path / "wandb.json").write_text('{"url": "https://wandb.ai/me/nanogpt/runs/1"}')
        written = lambda: notebook.cell(1).get_by_label("It writes").input_value()
        button = lambda name: notebook.cell(1).get_by_role("button", name=name)
        said = lambda words: until(lambda: words in notebook.text(1), f"{words} in {notebook.text(1)!r}")

        button("Sample now").click()
        until(lambda: len(written()) == 306, "a text")
        said("Written by the checkpoint of step")
        links = {name: notebook.cell(1).get_by_role("link", name=name) for name in ("Open folder", "Open W&B")}
        until(lambda: links["Open W&B"].count() == 1, "a link to W&B")
        assert links["Open W&B"].get_attribute("href") == "https://wandb.ai/me/nanogpt/runs/1"
        assert links["Open folder"].get_attribute("href") == "/lab/tree/runs/first"
        tab.shot("controls-light")

        notebook.save()
        tab.reload()  # the widgets are found again
        notebook = tab.open("controls.ipynb")
        notebook.start(2)
        until((tmp_path / "begun").exists, "a busy kernel")
        line, sizes, before = notebook.cell(1).get_by_label("Prompt"), set(), len(run.metrics())
        line.fill("JULIET:")
        line.press("Enter")
        until(
            lambda: written().startswith("JULIET:") and (sizes.add(len(written())) or len(written()) == 307),
            "a text while the kernel is busy",
            every=0.01,
        )
        assert len(sizes) > 1  # it came piece by piece
        until(lambda: len(run.metrics()) > before, "training that goes on")
        line.fill("Ω")
        button("Sample now").click()
        said("not among the 65 characters")
        tab.theme("dark")
        button("Stop").click()
        said("The run is stopped at step")
        assert run.state == "stopped" and button("Stop").is_disabled()
        tab.shot("controls-dark")
        assert not (tmp_path / "over").exists()
        (tmp_path / "enough").touch()
        until((tmp_path / "over").exists, "the end of the cell")
        assert tab.errors == []
    at = run.status["step"]
    assert json.loads((run.checkpoint() / "checkpoint.json").read_text())["step"] == at
    assert wait(launch(resume=run, config=ENDLESS.replace(max_iters=at + 5)), 300).state == "finished"
