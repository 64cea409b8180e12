"Training: stopped, killed, gone on with, and what it says when it cannot go on."

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanogpt_nb.config import PRESETS, ConfigError, NanoGPTConfig
from nanogpt_nb.data import load_dataset
from nanogpt_nb.runs import Run, RunError
from nanogpt_nb.train import Trainer, TrainError, train

HERE = Path(__file__).parent
TINY = NanoGPTConfig.preset("tiny").replace(max_iters=40, eval_interval=20, eval_iters=2, dropout=0.1, sample_tokens=8)
RECIPES = {
    "lecture": TINY,
    "modern": TINY.replace(
        norm="rmsnorm", position="rope", mlp="relu2", bias=False, qk_norm=True, optimizer="muon", schedule="wsd", warmup_iters=5, grad_clip=1.0
    ),
    "nanogpt": TINY.replace(mlp="gelu", bias=False, tie_weights=True, schedule="cosine", gradient_accumulation_steps=2),
    "bfloat16": TINY.replace(dtype="bfloat16", mlp="swiglu"),
}


@pytest.fixture(autouse=True)
def one_thread():
    "Tiny models are quickest on one thread, and leave the other cores to other tests."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


CLOCK = ("seconds", "tokens_per_second", "utilisation")


def numbers(run: Run) -> list[dict]:
    "The metrics without the clock's."
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in run.metrics()]


def weights(run: Run) -> bytes:
    return (run.checkpoint() / "model.safetensors").read_bytes()


def state(run: Run):
    "The trainer's state, all tensors as bytes, without the clock."

    def plain(x):
        if torch.is_tensor(x):
            return x.numpy().tobytes()
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items() if k != "seconds"}
        return [plain(v) for v in x] if isinstance(x, list | tuple) else x

    return plain(torch.load(run.checkpoint() / "trainer.pt", weights_only=True))


def signal_at(monkeypatch, step: int, number=signal.SIGINT) -> None:
    "Send this process a signal in the middle of the step that leads to `step`."
    real = Trainer.train_step

    def train_step(self):
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_equals_never_stopped(recipe, number, runs_dir, monkeypatch):
    config = RECIPES[recipe]
    whole = train(config, name="whole", runs_dir=runs_dir, quiet=True)
    for at in (13, 20, 31):
        with monkeypatch.context() as m:
            signal_at(m, at, number)
            run = train(config, **(dict(name="parts", runs_dir=runs_dir) if at == 13 else dict(resume=run)), quiet=True)  # noqa: F821
        assert run.state == "stopped" and run.status["step"] == at and run.status["signal"] == number
    run = train(resume=run, quiet=True)
    assert run.state == "finished"
    assert numbers(run) == numbers(whole)
    assert weights(run) == weights(whole)
    assert state(run) == state(whole)


@pytest.mark.parametrize("left_out", ["nothing", "weights", "optimizers", "batches", "dropout", "step"])
def test_each_part_of_the_state_is_needed(left_out, tmp_path):
    "The equality above is a sharp test: without any one part, the weights come out different."
    config = RECIPES["modern"]
    data = load_dataset(config)

    def after_ten_more(trainer):
        for _ in range(10):
            trainer.train_step()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    one = Trainer(config, data)
    for _ in range(25):
        one.train_step()
    one.save(tmp_path)
    expected = after_ten_more(one)

    other = Trainer(config.replace(seed=7), data)
    fresh = other.state_dict()
    fresh_weights = {k: v.clone() for k, v in other.model.state_dict().items()}
    other.load(tmp_path)
    if left_out == "weights":
        other.model.load_state_dict(fresh_weights)
    elif left_out != "nothing":
        other.load_state_dict(other.state_dict() | {left_out: fresh[left_out]})
    assert torch.equal(after_ten_more(other), expected) == (left_out == "nothing")


def test_training_leaves_the_random_numbers_of_others_alone(runs_dir):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    train(TINY.replace(max_iters=2), name="a", runs_dir=runs_dir, quiet=True)
    assert torch.equal(torch.rand(4), expected)


def test_looking_at_the_loss_changes_nothing(runs_dir):
    "However often the losses are estimated and text is written, the weights are the same."
    often, seldom = (train(TINY.replace(eval_interval=n), name=f"every-{n}", runs_dir=runs_dir, quiet=True) for n in (3, 40))
    assert weights(often) == weights(seldom)


def test_accumulated_batches_equal_one_large_batch(runs_dir):
    config = TINY.replace(dropout=0.0, max_iters=10, eval_interval=10)
    data = load_dataset(config)
    whole, parts = Trainer(config.replace(batch_size=32), data), Trainer(config.replace(batch_size=8, gradient_accumulation_steps=4), data)
    for _ in range(10):
        whole.train_step(), parts.train_step()
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    assert whole.tokens == parts.tokens


def kill_many(folder, kills):
    done = subprocess.run([sys.executable, HERE / "kill_many.py", folder, str(kills), "1"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_a_hundred_times_at_random(tmp_path):
    "One run, 100 times SIGKILL: its folder is whole each time, and it ends on the bits of a run that nobody killed."
    seen = kill_many(tmp_path / "run", 100)
    assert sum(seen["kills"].values()) == 100
    assert seen["kills"]["while writing a checkpoint"] > 5, seen
    assert seen["codes"] == [0, 0] and seen["rows equal"] and seen["weights equal"], seen


def start(*words, cwd, **kwargs) -> subprocess.Popen:
    "A real `python -m nanogpt_nb.train`."
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "nanogpt_nb.train", *words], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)  # fmt: skip


def wait_for(what, process, seconds=300):
    "Wait until `what` is true of a process that goes on."
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.01)


TINY_ENDLESS = NanoGPTConfig.preset("tiny").replace(eval_interval=50)
ENDLESS = ["--preset", "tiny", "--name", "run", "--max-iters", "1000000", "--eval-interval", "50"]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_the_command_with_a_checkpoint(number, code, tmp_path):
    run = Run(tmp_path / "runs" / "run")
    process = start(*ENDLESS, cwd=tmp_path)
    wait_for(lambda: len(run.estimates()) >= 2, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    assert run.state == "stopped" and run.status["step"] == torch.load(run.checkpoint() / "trainer.pt", weights_only=True)["step"]
    assert "train --resume run" in said and "Traceback" not in said


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_interrupted_while_the_text_is_read_there_is_no_run(number, code, tmp_path):
    os.mkfifo(tmp_path / "text")
    process = start("--data", "text", "--preset", "tiny", cwd=tmp_path)
    with open(tmp_path / "text", "w") as text:  # waits until the other side reads
        text.write("To be, or not to be\n")
        text.flush()
        for patience in (10, 60):  # a signal just before a read that waits is heard by Python after that read: a person presses again
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=patience)
                break
    assert process.returncode == code and "Traceback" not in said, said
    assert not (tmp_path / "runs").exists()


def test_a_terminal_shows_a_bar_and_a_table(tmp_path):
    "In a pseudo-terminal, as a person has it: the bar moves on one line, and the first Ctrl-C says what it does."
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    words = [sys.executable, "-m", "nanogpt_nb.train", *ENDLESS]
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    while said.count(b"steps") < 5 or b"   50  " not in said:
        said += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the terminal is gone when the process is
        while more := os.read(ours, 4096):
            said += more
    assert process.wait(timeout=240) == 130
    text = said.decode()
    assert "step  train loss  val loss" in text and "tokens/s" in text and "/1000000" in text
    assert "Stopping after this step" in text and "Traceback" not in text
    assert len(re.findall(r"[\r\n] +50  ", text)) == 1  # a row is written once, the bar around it


def test_a_terminal_that_goes_away_costs_nothing(tmp_path):
    "The window is closed in mid-run, with nohup: the run goes on, and stops in order when it is asked to."
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["nohup", sys.executable, "-m", "nanogpt_nb.train", *ENDLESS]
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    run = Run(tmp_path / "runs" / "run")
    wait_for(lambda: len(run.estimates()) >= 2, process)
    os.close(ours)
    there = len(run.estimates())
    wait_for(lambda: len(run.estimates()) >= there + 2, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=240)
    assert run.state == "stopped" and "error" not in run.status


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">&-", ">&- 2>&-", "| head -1"])
def test_an_output_that_cannot_be_written_costs_no_run(where, tmp_path):
    words = f"{sys.executable} -m nanogpt_nb.train --preset tiny --max-iters 20 --eval-interval 10 --name a {where}"
    done = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr, done.stderr
    run = Run(tmp_path / "runs" / "a")
    assert run.state == "finished" and len(run.estimates()) == 3


def test_a_run_folder_that_goes_away_is_said(tmp_path):
    run = Run(tmp_path / "runs" / "run")
    process = start(*ENDLESS, cwd=tmp_path)
    wait_for(lambda: len(run.estimates()) >= 2, process)
    run.path.rename(tmp_path / "runs" / "elsewhere")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 2 and "moved or deleted" in said and "Traceback" not in said, said
    assert train(TINY_ENDLESS.replace(max_iters=Run(tmp_path / "runs" / "elsewhere").estimates()[-1]["step"] + 50),
                 resume=tmp_path / "runs" / "elsewhere", quiet=True).state == "finished"  # fmt: skip


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"step": 3}', '{"files": []}', '{"files": {"model.safetensors": 3}}', "[" * 100000])
def test_a_checkpoint_without_its_list_is_damaged_not_absent(damage, runs_dir):
    run = train(TINY.replace(max_iters=4, eval_interval=2), name="a", runs_dir=runs_dir, quiet=True)
    (run.path / "last" / "checkpoint.json").unlink()
    (run.path / "last" / "checkpoint.json").write_text(damage)
    before = {p: p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()}
    with pytest.raises(RunError, match="damaged"):
        train(TINY.replace(max_iters=8), resume=run, quiet=True)
    assert {p: p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()} == before
    assert run.state == "finished"


def test_a_resume_with_another_vocabulary_changes_nothing(tmp_path, runs_dir):
    text = tmp_path / "t.txt"
    text.write_text("Où est le café? À côté de la forêt.\n" * 60, encoding="utf-8")
    config = TINY.replace(max_iters=4, data=(str(text),))
    run = train(config, name="a", runs_dir=runs_dir, quiet=True)
    kept = {n: (run.path / n).read_bytes() for n in ("config.json", "tokenizer.json")}
    with pytest.raises(RunError, match="encoding='latin-1'"):
        train(run.config.replace(max_iters=8, encoding="latin-1"), resume=run, quiet=True)
    tokenizer = json.loads(kept["tokenizer.json"])
    tokenizer["chars"] = "".join(reversed(tokenizer["chars"]))
    (run.path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RunError, match="another vocabulary"):
        train(run.config.replace(max_iters=8), resume=run, quiet=True)
    assert (run.path / "config.json").read_bytes() == kept["config.json"]


def test_sampling_beside_training_never_sees_half_a_checkpoint(tmp_path):
    from nanogpt_nb.sample import load_model

    run = Run(tmp_path / "runs" / "run")
    process = start(*ENDLESS[:-1], "1", "--eval-iters", "1", cwd=tmp_path)
    try:
        wait_for(lambda: run.checkpoint_folders("best"), process)
        for _ in range(150):
            load_model(run, "last"), load_model(run, "best")
    finally:
        process.kill()
        process.communicate()


def test_a_memory_that_is_too_small_is_said(runs_dir):
    with pytest.raises(TrainError, match="--batch-size"):
        train(TINY.replace(batch_size=10**9, eval_interval=1), name="a", runs_dir=runs_dir, quiet=True)


def test_what_is_no_configuration_is_said(runs_dir):
    for wrong in ({}, "cpu", 3):
        with pytest.raises(ConfigError, match="not a NanoGPTConfig"):
            train(wrong, runs_dir=runs_dir)


def test_killed_for_real_and_resumed_from_the_command_line(tmp_path):
    run = Run(tmp_path / "runs" / "run")
    process = start(*ENDLESS, cwd=tmp_path)
    wait_for(lambda: len(run.estimates()) >= 3, process)  # so the second's checkpoint is there
    assert run.state == "running"
    process.kill()
    process.wait()
    assert run.state == "killed"
    again = start("--resume", "run", "--max-iters", str(run.estimates()[-1]["step"] + 60), cwd=tmp_path)
    said, _ = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert run.state == "finished" and "going on from step" in said
    steps = [r["step"] for r in run.estimates()]
    assert steps == sorted(set(steps))


def test_the_second_trainer_of_a_run_is_refused(tmp_path):
    run = Run(tmp_path / "runs" / "run")
    process = start(*ENDLESS, cwd=tmp_path)
    try:
        wait_for(lambda: run.checkpoint_folders(), process)
        with pytest.raises(RunError, match=f"being trained by process {process.pid}"):
            train(resume=run, quiet=True)
        other = start("--resume", "run", cwd=tmp_path)
        said, _ = other.communicate(timeout=240)
        assert other.returncode == 2 and "being trained" in said and "Traceback" not in said
        assert run.state == "running"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(n_layer=3), ["n_layer=3"]),
        (dict(learning_rate=0.1, dropout=0.3), ["learning_rate=0.1", "dropout=0.3"]),
        (dict(seed=2), ["seed=2"]),
        (dict(batch_size=4), ["batch_size=4"]),
        (dict(tokenizer="bpe"), ["tokenizer='bpe'"]),
    ],
)
def test_a_resume_that_does_not_fit_is_refused(changes, named, runs_dir):
    run = train(TINY.replace(max_iters=2), name="a", runs_dir=runs_dir, quiet=True)
    before = {p: p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()}
    with pytest.raises(RunError) as e:
        train(TINY.replace(max_iters=4, **changes), resume=run, quiet=True)
    assert all(n in str(e.value) for n in named)
    assert {p: p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()} == before


def test_a_finished_run_has_nothing_to_go_on_with(runs_dir):
    run = train(TINY.replace(max_iters=2), name="a", runs_dir=runs_dir, quiet=True)
    with pytest.raises(RunError, match="taken 2 steps already"):
        train(resume=run)
    with pytest.raises(RunError, match="taken 2 steps already"):
        train(TINY.replace(max_iters=1), resume=run)
    assert train(TINY.replace(max_iters=4), resume=run, quiet=True).status["step"] == 4


def test_an_estimate_where_the_run_was_stopped_is_part_of_its_checkpoint(runs_dir, monkeypatch):
    with monkeypatch.context() as m:
        signal_at(m, 13)
        run = train(TINY, name="a", runs_dir=runs_dir, quiet=True)
    with monkeypatch.context() as m:
        signal_at(m, 14)
        train(TINY.replace(eval_interval=13), resume=run, quiet=True)
    assert [r["step"] for r in run.estimates()] == [0, 13]
    for which in ("last", "best"):
        assert torch.load(run.checkpoint(which) / "trainer.pt", weights_only=True)["evaluated"] == 13
    assert json.loads((run.checkpoint("best") / "checkpoint.json").read_text())["val_loss"] == run.estimates()[-1]["val_loss"]


def test_a_text_that_changed_is_noticed(tmp_path, runs_dir):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 50)
    run = train(TINY.replace(max_iters=2, data=(str(text),)), name="a", runs_dir=runs_dir, quiet=True)
    text.write_text("Whether tis nobler in the mind to suffer\n" * 50)
    with pytest.raises(RunError, match="has changed since"):
        train(TINY.replace(max_iters=4, data=(str(text),)), resume=run, quiet=True)


@pytest.mark.parametrize("cause", [dict(learning_rate=1e8), dict(optimizer="muon", muon_learning_rate=1e9)])
def test_a_loss_that_is_not_finite_fails_the_run_and_keeps_the_checkpoint(cause, runs_dir):
    with pytest.raises(TrainError, match="too high"):
        train(TINY.replace(max_iters=200, eval_interval=100, **cause), name="wild", runs_dir=runs_dir, quiet=True)
    run = Run(runs_dir / "wild")
    assert run.state == "failed" and "too high" in run.status["error"]
    kept = torch.load(run.checkpoint() / "trainer.pt", weights_only=True)
    assert kept["step"] == 0 and all(r["val_loss"] < 10 for r in run.estimates())


@pytest.mark.parametrize("changes", [dict(checkpoint_interval=1), dict(eval_interval=1, eval_iters=0)])
def test_weights_that_are_lost_never_take_the_place_of_a_checkpoint(changes, runs_dir):
    with pytest.raises(TrainError, match="too high"):
        train(TINY.replace(learning_rate=1e38, **changes), name="lost", runs_dir=runs_dir, quiet=True)
    folder = Run(runs_dir / "lost").checkpoint()
    from safetensors.torch import load_file

    assert all(w.isfinite().all() for w in load_file(folder / "model.safetensors").values())
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 0


def test_killed_between_last_and_best_the_best_catches_up(runs_dir, monkeypatch):
    real, calls = Run.link_checkpoint, []

    def link(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise SystemExit("killed here")
        return real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(Run, "link_checkpoint", link)
        with pytest.raises(SystemExit):
            train(TINY, name="a", runs_dir=runs_dir, quiet=True)
    run = Run(runs_dir / "a")
    step = lambda which: json.loads((run.checkpoint(which) / "checkpoint.json").read_text())["step"]  # noqa: E731
    assert (step("last"), step("best")) == (20, 0)
    run = train(TINY.replace(max_iters=21, eval_interval=40), resume=run, quiet=True)
    best = min(run.estimates(), key=lambda r: r["val_loss"])["step"]
    assert step("best") == best > 0


def test_large_splits_are_estimated_over_their_beginning(monkeypatch):
    import nanogpt_nb.trainer
    from nanogpt_nb.bigram import evaluate

    t = Trainer(TINY.replace(eval_iters=0), load_dataset(TINY))
    monkeypatch.setattr(nanogpt_nb.trainer, "EVAL_TOKENS", 500)
    assert abs(t.estimate()["val"] - evaluate(t.model, t.dataset.val[:500], TINY.block_size)) < 1e-5
    assert t.estimate()["val"] != evaluate(t.model, t.dataset.val, TINY.block_size)


def test_broken_weights_are_never_saved(runs_dir, monkeypatch):
    "A loss that is finite on the batch and not on the estimate leaves the last good checkpoint."
    real = Trainer.train_step

    def train_step(self):
        loss = real(self)
        if self.step == 40:
            self.model.lm_head.weight.data[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(TrainError):
        train(TINY, name="broken", runs_dir=runs_dir, quiet=True)
    run = Run(runs_dir / "broken")
    assert torch.load(run.checkpoint() / "trainer.pt", weights_only=True)["step"] == 20


def small_disk(folder: Path, megabytes: float):
    "Mount a file system of that size; the command's error where this system does not let us."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", folder], capture_output=True, text=True)
    return done.stderr if done.returncode else None


BIG = TINY.replace(n_embd=128, n_layer=2, max_iters=100, eval_interval=10, checkpoint_interval=1)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    if error := small_disk(disk, 16):
        pytest.skip(f"mounting a small tmpfs is not allowed here: {error.strip()}")
    try:
        with open(disk / "filler", "wb") as filler:

            def fill(leave: int):
                while shutil.disk_usage(disk).free > leave:
                    filler.write(bytes(4096))
                    filler.flush()

            run = train(BIG.replace(max_iters=3), name="a", runs_dir=disk, quiet=True)
            fill(leave=1 << 20)
            with pytest.raises(RunError, match="No space left on device.*make room"):
                train(BIG, resume=run, quiet=True)
        assert torch.load(run.checkpoint() / "trainer.pt", weights_only=True)["step"] == 3
        assert run.state == "failed" and "No space left" in run.status["error"]
        (disk / "filler").unlink()
        assert train(BIG.replace(max_iters=8), resume=run, quiet=True).state == "finished"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_that_may_not_grow_keeps_the_last_checkpoint(tmp_path):
    "The same without a disk of its own: the system refuses to write a file past a size."
    run = train(BIG.replace(max_iters=3), name="a", runs_dir=tmp_path, quiet=True)
    size = (run.checkpoint() / "trainer.pt").stat().st_size
    words = [sys.executable, "-m", "nanogpt_nb.train", "--resume", "a", "--runs-dir", ".", "--max-iters", "20"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))  # noqa: E731
    done = subprocess.run(words, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert torch.load(run.checkpoint() / "trainer.pt", weights_only=True)["step"] == 3
    assert train(BIG.replace(max_iters=5), resume=run, quiet=True).state == "finished"


def test_a_checkpoint_cannot_run_code(runs_dir, tmp_path):
    "A trainer.pt that is a pickle with a command in it is refused, with its hash made to fit."
    import hashlib
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/sprung",))

    run = train(TINY.replace(max_iters=2), name="a", runs_dir=runs_dir, quiet=True)
    evil = pickle.dumps(Trap(), protocol=2)
    (run.path / "last" / "trainer.pt").write_bytes(evil)
    with pytest.raises(RunError, match="damaged"):
        train(TINY.replace(max_iters=4), resume=run, quiet=True)
    about = json.loads((run.path / "last" / "checkpoint.json").read_text())
    about["files"]["trainer.pt"] = dict(bytes=len(evil), sha256=hashlib.sha256(evil).hexdigest())
    (run.path / "last" / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="cannot be read"):
        train(TINY.replace(max_iters=4), resume=run, quiet=True)
    assert not (tmp_path / "sprung").exists()


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    env = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "nanogpt_nb.train", "--preset", "tiny", "--max-iters", "2", "--name", "a", "--compile"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.compile does not work here" in done.stdout


@pytest.mark.slow
def test_compiled_training_is_the_same_within_rounding(runs_dir):
    config = TINY.replace(dropout=0.0)
    plain, compiled = (train(config.replace(compile=c), name=f"compile-{c}", runs_dir=runs_dir, quiet=True) for c in (False, True))
    assert "does not work" not in (compiled.path / "log.txt").read_text()
    for a, b in zip(plain.estimates(), compiled.estimates(), strict=True):
        assert abs(a["val_loss"] - b["val_loss"]) < 1e-3
    from nanogpt_nb.sample import load_model

    assert not any("_orig_mod" in k for k in load_model(compiled)[0].state_dict())


@pytest.mark.slow
def test_the_cpu_preset_reaches_its_loss_in_its_memory(tmp_path):
    words = [sys.executable, "-m", "nanogpt_nb.train", "--preset", "cpu", "--name", "a"]
    measure = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", measure, *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    code, kilobytes = map(int, done.stdout.split()[-2:])
    assert code == 0 and kilobytes < 1.5e6
    assert Run(tmp_path / "runs" / "a").estimates()[-1]["val_loss"] < 1.75


def test_script_notebook_command_and_module_give_the_same_numbers(tmp_path):
    config = TINY.replace(max_iters=20, eval_interval=10)
    (tmp_path / "config.json").write_text(config.to_json())
    code = (
        "import pathlib, torch\nfrom nanogpt_nb.config import NanoGPTConfig\nfrom nanogpt_nb.train import train\n"
        "config = NanoGPTConfig.from_json(pathlib.Path('config.json').read_text())\n"
        "run = train(config, name='{name}', quiet=True)\n"
    )
    flags = "--preset tiny --max-iters 20 --eval-interval 10 --eval-iters 2 --dropout 0.1 --sample-tokens 8 --name".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "script.py").write_text(code.format(name="script"))
    commands = [
        [sys.executable, "script.py"],
        [sys.executable, "-m", "nanogpt_nb.train", *flags, "module"],
        [Path(sys.executable).parent / "nanogpt", "train", *flags, "command"],
    ]
    for command in commands:
        subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)

    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import torch; torch.set_num_threads(1)\n" + code.format(name="notebook"))])
    NotebookClient(notebook, timeout=600, startup_timeout=240, iopub_timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()

    runs = [Run(tmp_path / "runs" / name) for name in ("script", "module", "command", "notebook")]
    assert all(numbers(run) == numbers(runs[0]) and weights(run) == weights(runs[0]) for run in runs)
    assert len(runs[0].estimates()) == 3


@pytest.mark.parametrize(
    "text, error", [("", "is empty"), ("aaaaaaaaaaaa" * 100, "one distinct character"), ("to be", "too short for block_size")]
)
def test_a_text_that_cannot_be_learned_from_leaves_no_run(text, error, tmp_path, runs_dir):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(Exception, match=error) as e:
        train(TINY.replace(data=(str(tmp_path / "t.txt"),)), runs_dir=runs_dir, quiet=True)
    assert e.value.exit_code == 2 and not runs_dir.exists()


def test_a_gpu_that_is_not_there_is_said(runs_dir):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU that torch can use")
    with pytest.raises(ConfigError, match="finds no GPU"):
        train(TINY.replace(device="cuda"), runs_dir=runs_dir)
    assert not runs_dir.exists()


def test_a_new_trainer_begins_at_the_loss_of_knowing_nothing():
    import math

    data = load_dataset(TINY)
    for name in PRESETS:
        config = NanoGPTConfig.preset(name).replace(eval_iters=1, batch_size=4, dropout=0.0)
        assert abs(Trainer(config, data).estimate()["val"] - math.log(65)) < 0.05, name


# What others read while it trains


def test_between_estimates_the_losses_of_batches_are_written(runs_dir):
    run = train(TINY, name="run", runs_dir=runs_dir, quiet=True)
    between = [r for r in run.metrics() if "loss" in r]
    assert [r["step"] for r in between] == list(range(1, 41)) and not any("val_loss" in r for r in between)
    assert all(0 < r["utilisation"] <= 1 and r["tokens_per_second"] > 0 for r in between)
    assert [r["tokens"] for r in between] == [r["step"] * TINY.batch_size * TINY.block_size for r in between]
    seconds = [r["seconds"] for r in run.metrics()]
    assert seconds == sorted(seconds)


def test_the_status_has_the_figures_of_the_run(runs_dir):
    run = train(TINY, name="run", runs_dir=runs_dir, quiet=True)
    rows = run.estimates()
    status, told = run.status, run.summary()
    assert status["val_loss"] == min(r["val_loss"] for r in rows) and status["seconds"] == rows[-1]["seconds"]
    assert status["tokens_per_second"] == rows[-1]["tokens_per_second"] > 0
    (run.path / "metrics.jsonl").rename(runs_dir / "metrics.jsonl")
    assert run.summary() == told  # read from the status
    (runs_dir / "metrics.jsonl").rename(run.path / "metrics.jsonl")
    (run.path / "status.json").write_text(json.dumps({"state": "finished"}))
    assert run.summary() == told  # read from the metrics


def test_whoever_sees_an_estimate_may_end_the_run(runs_dir):
    seen = []
    run = train(TINY, name="run", runs_dir=runs_dir, quiet=True, on_estimate=lambda row: seen.append(row) or (row["step"] == 20 and "hopeless"))
    assert run.state == "stopped" and run.status["reason"] == "hopeless" and run.status["step"] == 20
    assert seen == run.estimates() and "hopeless" in (run.path / "log.txt").read_text()
    assert train(resume=run, quiet=True).state == "finished"
    assert numbers(run) == numbers(train(TINY, name="whole", runs_dir=runs_dir, quiet=True))


def test_an_estimate_that_the_checkpoint_does_not_know_is_made_again(runs_dir):
    "Killed after the row and before its checkpoint, at a step that has an older checkpoint already."
    run = train(TINY.replace(eval_interval=40), name="run", runs_dir=runs_dir, quiet=True, on_estimate=lambda row: "enough")
    whole = train(TINY, name="whole", runs_dir=runs_dir, quiet=True)
    with pytest.MonkeyPatch.context() as m:
        signal_at(m, 20)
        train(TINY.replace(eval_interval=40), resume=run, quiet=True)
    run.append(dict(step=20, train_loss=9.0, val_loss=9.0))
    train(TINY, resume=run, quiet=True)
    assert [r for r in numbers(run) if "val_loss" in r] == [r for r in numbers(whole) if "val_loss" in r]


def test_a_run_made_for_another_process_is_trained_there(runs_dir, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    config = TINY.replace(data=("text.txt",))
    run = Run.create(config, "made", runs_dir, state="starting", group="family")
    assert run.state == "starting"
    process = start("--resume", "made", cwd=tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert run.state == "finished" and run.about["corpus"]["name"] and run.about["group"] == "family"
    assert Path(run.config.data[0]).is_absolute()


def test_a_run_made_for_another_process_that_cannot_begin_says_why(runs_dir, tmp_path):
    run = Run.create(TINY.replace(data=("missing.txt",)), "made", runs_dir, state="starting")
    process = start("--resume", "made", cwd=tmp_path)
    said, _ = process.communicate(timeout=240)
    assert process.returncode and "missing.txt" in said and "Traceback" not in said
    assert run.state == "failed" and "missing.txt" in run.status["error"]


def test_a_starting_run_whose_process_is_gone_is_not_waited_for(runs_dir):
    run = Run.create(TINY, "made", runs_dir, state="starting")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.set_status("starting", pid=gone.pid)
    assert run.state == "killed"


@pytest.mark.parametrize("mode", ["on", "", None])
def test_a_tracking_mode_that_there_is_not(mode, runs_dir):
    with pytest.raises(ConfigError, match="online, offline, disabled"):
        train(TINY, runs_dir=runs_dir, wandb=mode)
    assert not runs_dir.exists()


def test_a_history_without_weights_is_not_written_over(runs_dir):
    "Imported, or with its checkpoints deleted: going on would begin at the beginning."
    run = train(TINY, name="run", runs_dir=runs_dir, quiet=True)
    for which in ("last", "best"):
        shutil.rmtree(run.path / which)
    before = (run.path / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="no checkpoint to go on from"):
        train(TINY.replace(max_iters=80), resume=run)
    assert (run.path / "metrics.jsonl").read_bytes() == before and run.state == "finished"


def test_a_run_stopped_before_it_learned_by_its_own_account_speaks_as_it_is(runs_dir, monkeypatch):
    "Its best checkpoint is the untrained one, of step 0."
    with monkeypatch.context() as m:
        signal_at(m, 13)
        run = train(TINY, name="run", runs_dir=runs_dir, quiet=True)
    from nanogpt_nb.sample import load_model

    last = Trainer(TINY, load_dataset(TINY))
    last.load(run.checkpoint())
    assert torch.equal(load_model(run)[0].lm_head.weight, last.model.lm_head.weight)
    assert "nanogpt train --resume run" in (run.path / "log.txt").read_text()


def test_a_run_folder_that_was_deleted_in_part_is_not_trained_on(runs_dir, monkeypatch):
    "Deleted while files were still written into it: they come again, and config.json does not."
    monkeypatch.setattr("nanogpt_nb.loop.BEAT", 0)
    real = Trainer.train_step

    def train_step(self):
        if self.step == 10:
            (runs_dir / "run" / "config.json").unlink()
        return real(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(RunError, match="moved or deleted"):
        train(TINY, name="run", runs_dir=runs_dir, quiet=True)


def test_a_run_that_was_moved_after_its_end_is_no_failure(runs_dir, capsys):
    from nanogpt_nb.train import last_words

    run = train(TINY, name="run", runs_dir=runs_dir, quiet=True)
    run.path.rename(runs_dir / "elsewhere")
    assert last_words(run) == 0 and "not there any more" in capsys.readouterr().out
