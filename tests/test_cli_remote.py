"The commands about other machines, as people type them, against a real sshd."

import subprocess
import sys
from pathlib import Path

import pytest
from box import Box, until, why_no_box

from nanogpt_nb.cli import main
from nanogpt_nb.runs import Run

pytestmark = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")


@pytest.fixture
def box(tmp_path, monkeypatch):
    "A box that nobody has heard of, and a project that we are in."
    with Box(tmp_path) as box:
        box.use(monkeypatch)
        (box.ssh / "config").unlink()
        (box.ssh / "known_hosts").unlink()
        project = tmp_path / "my project"
        project.mkdir()
        (project / "a.py").write_text("print('from the box')\n")
        (project / ".env").write_text("KEY=secret\n")
        subprocess.run(["git", "init", "-q", project], check=True)
        monkeypatch.chdir(project)
        yield box


@pytest.fixture
def say(capsys):
    "A command, typed: its exit code, and what is seen."

    def say(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as e:
            code = e.code
        told = capsys.readouterr()
        return code, told.out + told.err

    return say


@pytest.fixture
def gpu(box, say):
    "The box under the name gpu, trusted."
    assert say("host", "add", "gpu", f"{box.user}@127.0.0.1:{box.wire.port}", "--key", box.key, "--python", sys.executable)[0] == 0
    assert say("host", "trust", "gpu", "--yes")[0] == 0
    return box


def test_a_machine_gets_a_name_is_trusted_once_and_forgotten(box, say):
    assert say("host", "add", "gpu", f"{box.user}@127.0.0.1:{box.wire.port}", "--key", box.key)[0] == 0
    code, told = say("push", "gpu")
    assert code == 1 and "SHA256:" in told and "nanogpt host trust gpu" in told
    code, told = say("host", "trust", "gpu")  # nobody there to compare
    assert code == 2 and "--yes" in told and not (box.ssh / "known_hosts").exists()
    code, told = say("host", "trust", "gpu", "--yes")
    mark = subprocess.run(["ssh-keygen", "-lf", box.host_key], capture_output=True, text=True).stdout.split()[1]
    assert code == 0 and mark in told
    assert "known already" in say("host", "trust", "gpu")[1]
    assert "127.0.0.1" in say("host", "ls")[1]
    plain = subprocess.run(["ssh", "-F", box.ssh / "config", "-o", f"UserKnownHostsFile={box.ssh / 'known_hosts'}", "gpu", "echo $HOME"], capture_output=True, text=True)
    assert plain.stdout.strip() == str(box.home), plain.stderr
    assert say("host", "remove", "gpu")[0] == 0
    code, told = say("host", "remove", "gpu")
    assert code == 2 and "gpu" in told
    assert not (box.ssh / "nanogpt_nb.conf").exists()


def test_files_go_and_are_told_of(gpu, say):
    code, told = say("push", "gpu", "--dry-run")
    assert code == 0 and "a.py" in told and ".env" in told and not list(gpu.home.glob("nanogpt/*"))
    assert say("push", "gpu")[0] == 0
    assert [p.name for p in (gpu.home / "nanogpt" / "my project").glob("[!.]*")] == ["a.py"]
    code, told = say("push", "gpu")
    assert code == 0 and "nothing" in told
    Path("a.py").unlink()
    Path("b.py").touch()
    assert say("push", "gpu")[0] == 0
    assert [p.name for p in (gpu.home / "nanogpt" / "my project").glob("[!.]*")] == ["b.py"]


def test_jobs_from_the_first_word_to_the_last(gpu, say):
    assert say("job", "ls", "gpu")[0] == 0
    code, told = say("job", "logs", "gpu")
    assert code == 2 and "job start" in told
    code, told = say("job", "start", "gpu", "--name", "three", "--", "sh", "-c", "echo 'a b'; exit 3")
    assert code == 0 and "job logs gpu" in told
    assert say("job", "logs", "gpu", "-f") == (3, "a b\n")
    assert "failed (3)" in say("job", "ls", "gpu")[1]
    assert say("job", "start", "gpu", "--queue", "echo begun; exec sleep 1000")[0] == 0
    assert say("job", "start", "gpu", "--queue", "--name", "last", "echo $HOME")[0] == 0
    assert "queued" in say("job", "ls", "gpu")[1]
    code, told = say("job", "logs", "gpu", "three", "--lines", "1")
    assert (code, told) == (0, "a b\n")
    (running,) = [line.split()[0] for line in say("job", "ls", "gpu")[1].splitlines() if "running" in line]
    assert say("job", "stop", "gpu", running)[0] == 0
    assert say("job", "logs", "gpu", "last", "-f") == (0, f"{gpu.home}\n")
    code, told = say("job", "pull", "gpu", "last")
    assert code == 2 and "trains no run" in told
    assert say("job", "remove", "gpu", "three")[0] == 0 and "three" not in say("job", "ls", "gpu")[1]
    code, told = say("job", "stop", "gpu", "nonesuch")
    assert code != 0 and "nonesuch" in told and "job ls" in told


def test_a_run_there_and_home_again(gpu, say, tmp_path):
    tiny = ("--preset", "tiny", "--device", "cpu", "--wandb", "disabled")
    code, told = say("train", "--on", "gpu", *tiny, "--max-iters", "40", "--name", "first")
    assert code == 0 and "step    40" in told, told
    run = Run("runs/first")
    assert run.state == "finished" and run.about["host"] == "gpu" and run.checkpoint()
    assert "gpu" in next(line for line in say("runs")[1].splitlines() if line.startswith("first"))
    code, told = say("launch", "--on", "gpu", *tiny, "--max-iters", "100000", "--name", "second")
    assert code == 0 and "nanogpt watch second" in told and "all is there" in told
    second = Run("runs/second")
    until(lambda: second.metrics(), "rows that came home", 240)
    assert say("stop", "second")[0] == 0
    assert second.state == "stopped" and second.checkpoint_folders()
    assert say("pull", "second", "--runs-dir", "runs")[0] == 0
    code, told = say("pull", "first", "--on", "gpu", "--runs-dir", tmp_path / "elsewhere")
    assert code == 0 and "finished at step 40" in told
    assert Run(tmp_path / "elsewhere" / "first").metrics() == run.metrics()
    job = run.remote["job"]
    assert say("job", "pull", "gpu", job, "--runs-dir", tmp_path / "again")[0] == 0
    assert Run(tmp_path / "again" / "first").metrics() == run.metrics()


def test_what_is_about_elsewhere_needs_an_elsewhere(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("--queue", "--send-wandb-key"):
        code, told = say("train", "--preset", "tiny", flag)
        assert code == 2 and "--on HOST" in told
    code, told = say("pull")
    assert code == 2 and "--on HOST" in told
    assert not (tmp_path / "runs").exists()


def test_a_machine_that_is_not_there(say, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words in (["push", "me@nowhere.invalid"], ["job", "ls", "me@nowhere.invalid"], ["host", "gpus", "me@127.0.0.1:1"], ["doctor", "me@127.0.0.1:1"]):
        code, told = say(*words)
        assert code == 1 and "Traceback" not in told and words[-1].partition("@")[2].partition(":")[0] in told


def test_mistakes_are_told_as_sentences(say, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words, part in (
        (["host", "ad"], "host add"),
        (["host", "add", "-x", "a@b"], ""),
        (["host", "add", "two words", "a@b"], "two words"),
        (["host", "add", "gpu", "a@b", "--key", str(tmp_path / "none")], "none"),
        (["host", "add", "gpu", "a@b:99999"], "65535"),
        (["push"], "HOST"),
        (["job", "start", "gpu"], "COMMAND"),
    ):
        code, told = say(*words)
        assert code == 2 and part in told and "Traceback" not in told, (words, told)
    assert not (tmp_path / ".ssh" / "nanogpt_nb.conf").exists()


def test_the_tab_key_knows_what_comes_after_host(say):
    code, told = say("completion", "bash")
    assert not code and "trust" in told and "gpus" in told
    assert subprocess.run(["bash", "-n"], input=told, text=True, capture_output=True).returncode == 0
