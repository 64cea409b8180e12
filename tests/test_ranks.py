"Several processes that train one model: the same numbers as one, and one end for all."

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from box import free_port
from safetensors.torch import load

from nanogpt_nb.config import ConfigError, NanoGPTConfig
from nanogpt_nb.data import get_batch, load_dataset
from nanogpt_nb.gpt import GPT
from nanogpt_nb.guard import environment
from nanogpt_nb.optim import _products, make_optimizers, orthogonal, share_out
from nanogpt_nb.ranks import Ranks
from nanogpt_nb.runs import Run
from nanogpt_nb.train import Trainer, train

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")

TEXT = "".join("the cat sat on the mat and the dog ran after it, "[i * i % 40 :] + "\n" for i in range(200))
TINY = NanoGPTConfig.preset("tiny").replace(device="cpu", max_iters=20, eval_interval=10, eval_iters=2, dropout=0.0, sample_tokens=8)
RECIPES = {
    "lecture": TINY.replace(grad_clip=1.0, gradient_accumulation_steps=2),
    "modern": TINY.replace(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, optimizer="muon", tie_weights=True, eval_iters=0),
}
CLOCK = ("seconds", "tokens_per_second", "utilisation")

SCRIPT = """
import hashlib, json, os, signal, sys
from pathlib import Path
from nanogpt_nb import optim
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.loop import Loop
from nanogpt_nb.ranks import RankError
from nanogpt_nb.train import Trainer, train

other = os.fork()                                      # torch is imported once for both
rank, quietly, ended = 0 if other else 1, dict(quiet=True, wandb="disabled"), {}
here = dict(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
os.environ.update({k: str(v) for k, v in here.items()})
configs = {k: NanoGPTConfig.from_json(v) for k, v in json.loads(sys.argv[1]).items()}
step, go, newton_schulz, made = Trainer.train_step, Loop.go, optim.newton_schulz, []

def counted(x, *args):
    made.append([len(x), *x.shape[1:]])
    return newton_schulz(x, *args)

def noted(self):
    state = go(self)
    ended[f"{self.run.name}-{len(ended)}"] = [self.trainer.step, hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.trainer.model.parameters())).hexdigest()]
    return state

def at(number, what):
    "Do `what` on rank 1, in the middle of the step after `number`."
    def train_step(self):
        if rank == 1 and self.step == number: what()
        return step(self)
    Trainer.train_step = train_step

def memory_is_full(): raise MemoryError

Loop.go, optim.newton_schulz = noted, counted
for name, config in configs.items(): train(config, name=name, **quietly)
Path(f"made-{rank}.json").write_text(json.dumps(made))
dropout = configs["lecture"].replace(dropout=0.2)
train(dropout, name="dropout", **quietly)
at(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
train(dropout, name="parts", **quietly)
train(configs["modern"], name="for-one", **quietly)
at(-1, None)
train(resume="parts", **quietly)
train(resume="by-one", **quietly)
train(configs["modern"], name="to-and-fro", on_estimate=lambda row: row["step"] == 10, **quietly)
if rank == 0:                                          # alone for a while; the other waits
    met = os.environ.pop("RANK")
    train(configs["modern"].replace(max_iters=15), resume="to-and-fro", **quietly)
    os.environ["RANK"] = met
    ended.popitem()
train(configs["modern"], resume="to-and-fro", **quietly)
Path(f"ended-{rank}.json").write_text(json.dumps(ended))
at(15, memory_is_full)
try: train(configs["lecture"], name="full", **quietly)
except RankError as e: Path("error").write_text(str(e))
finally: other and os.waitpid(other, 0)
"""


STARTED = []


@pytest.fixture(autouse=True, scope="module")
def nothing_left_running():
    "Tests that fail leave no process behind."
    yield
    for process in STARTED:
        for pid in [*ranks_of(process), process.pid] if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)


def torchrun(*words, cwd, n=2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={n}", *words]
    STARTED.append(subprocess.Popen(command, cwd=cwd, env=environment(OMP_NUM_THREADS="1", WANDB_MODE="disabled"), text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    return STARTED[-1]


def until(true, seconds=300):
    "Wait until `true()` is, and give what it gave."
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def done(tmp_path_factory, one_thread, nothing_left_running):
    "A folder where two ranks have done what SCRIPT says, beside runs of one process."
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(TEXT)
    recipes = {name: config.replace(data=(str(folder / "text.txt"),)) for name, config in RECIPES.items()}
    for name, config in recipes.items():
        train(config, name=f"one-{name}", runs_dir=folder / "runs", quiet=True, wandb="disabled")
    stop = lambda row: row["step"] == 10
    by_one = train(recipes["modern"], name="by-one", runs_dir=folder / "runs", quiet=True, wandb="disabled", on_estimate=stop)
    assert by_one.state == "stopped"
    (folder / "script.py").write_text(SCRIPT)
    words = [sys.executable, "script.py", json.dumps({k: c.to_json() for k, c in recipes.items()}), str(free_port())]
    ended = subprocess.run(words, cwd=folder, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=600)
    assert (folder / "error").exists(), ended.stderr
    return folder


def run_of(done, name) -> Run:
    return Run(done / "runs" / name)


def numbers(run: Run) -> list[dict]:
    "The metrics without the clock's."
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in run.metrics()]


def weights(run: Run) -> bytes:
    return (run.checkpoint() / "model.safetensors").read_bytes()


def trainer_state(run: Run) -> dict:
    return torch.load(run.checkpoint() / "trainer.pt", weights_only=True)


def assert_close(run: Run, other: Run):
    "The same rows, but for the order in which numbers were added."
    assert len(run.metrics()) == len(other.metrics())
    for a, b in zip(numbers(run), numbers(other), strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) < 2e-3 if "loss" in k else a[k] == b[k] for k in a), (a, b)


def assert_close_weights(run: Run, other: Run):
    a, b = load(weights(run)), load(weights(other))
    assert a.keys() == b.keys() and all((a[k] - b[k]).norm() < 1e-2 * b[k].norm() for k in a)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_learn_what_one_process_learns(recipe, done):
    two, one = run_of(done, recipe), run_of(done, f"one-{recipe}")
    assert two.state == one.state == "finished"
    assert_close(two, one)
    assert two.about["device"] == f"2 × {one.about['device']}"
    assert two.config == one.config
    assert torch.equal(trainer_state(two)["batches"], trainer_state(one)["batches"])
    with pytest.raises(AssertionError):
        assert_close(two, run_of(done, "dropout"))


def test_all_ranks_end_on_the_same_weights_after_the_same_step(done):
    ends = [json.loads((done / f"ended-{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1] and len(ends[0]) == 9
    assert [step for step, _ in ends[0].values()] == [20, 20, 20, 7, 7, 20, 20, 10, 20]


def test_only_one_rank_writes(done):
    run = run_of(done, "modern")
    assert [r["step"] for r in run.estimates()] == [0, 10, 20]
    assert [step for step, _ in run.samples()] == [0, 10, 20] and (run.path / "samples.txt").read_text().count("--- step") == 3
    lines = [(r.path / "log.txt").read_text().count("\n") for r in (run, run_of(done, "one-modern"))]
    assert lines[0] == lines[1] > 5


def test_a_signal_to_one_rank_stops_all_and_going_on_equals_never_stopped(done):
    "With dropout, and to the last bit."
    whole, parts = run_of(done, "dropout"), run_of(done, "parts")
    assert parts.state == whole.state == "finished"
    assert "stopped at step 7 of 20" in (parts.path / "log.txt").read_text()
    assert numbers(parts) == numbers(whole) and weights(parts) == weights(whole)


def test_one_process_goes_on_where_two_stopped(done):
    run = run_of(done, "for-one")
    assert run.state == "stopped" and run.status["step"] == 7 == trainer_state(run)["step"] and run.status["signal"] == signal.SIGTERM
    train(resume=run, quiet=True, wandb="disabled")
    assert_close(run, run_of(done, "one-modern"))


def test_two_processes_go_on_where_one_stopped(done):
    run = run_of(done, "by-one")
    assert run.state == "finished" and run.about["device"].startswith("2 × ")
    assert_close(run, run_of(done, "one-modern"))


def test_a_run_with_muon_goes_from_two_to_one_to_two(done):
    run = run_of(done, "to-and-fro")
    assert run.state == "finished" and run.config.max_iters == 20
    assert numbers(run)[-1]["step"] == 20
    assert_close_weights(run, run_of(done, "one-modern"))


def test_two_ranks_with_muon_end_on_the_weights_of_one_process(done):
    two, one = run_of(done, "modern"), run_of(done, "one-modern")
    assert_close_weights(two, one)
    with pytest.raises(AssertionError):
        assert_close_weights(two, run_of(done, "one-lecture"))


def test_each_rank_makes_its_share_of_the_matrices_orthogonal(done):
    made = [json.loads((done / f"made-{rank}.json").read_text()) for rank in range(2)]
    config = RECIPES["modern"]
    blocks = GPT(config, 11).blocks
    matrices = [m.shape for p in blocks.parameters() if p.ndim == 2 for m in p.chunk(getattr(p, "parts", 1))]
    total = [sum(count for count, *_ in one) for one in made]
    assert sum(total) == config.max_iters * len(matrices) and all(total)
    work = [sum(count * _products(*shape) for count, *shape in one) for one in made]
    dearest = max(_products(*shape) for shape in matrices)
    assert max(work) - min(work) <= config.max_iters * dearest


SHARED = [([3, 1], [1, 5], 2), ([1], [1], 4), ([18, 6, 6, 6], [3, 3, 12, 12], 8), ([], [], 2)]


@pytest.mark.parametrize(("counts", "costs", "world"), SHARED)
def test_matrices_are_shared_out_whole_and_evenly(counts, costs, world):
    shares = share_out(counts, costs, world)
    assert len(shares) == world and [sum(s[i] for s in shares) for i in range(len(counts))] == counts
    loads = [sum(n * c for n, c in zip(s, costs, strict=True)) for s in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_sharing_out_changes_no_bit_whatever_the_number_of_ranks(one_thread):
    "Every rank's side of it, with a gather that knows what the others would send."
    torch.manual_seed(0)
    stacks = [torch.randn(6, 16, 16), torch.randn(2, 48, 16), torch.randn(1, 16, 64)]
    alone = orthogonal(stacks, 5, Ranks())
    for world in (2, 3, 16):
        sent, wanted = [], []
        for rank in range(world):
            ranks = Ranks(rank, world)
            ranks.gather = lambda x, sent=sent, world=world: sent.append(x) or torch.zeros(world, len(x))
            orthogonal(stacks, 5, ranks)
        for rank in range(world):
            ranks = Ranks(rank, world)
            ranks.gather = lambda x, sent=sent: torch.stack(sent)
            wanted.append(orthogonal(stacks, 5, ranks))
        assert all(torch.equal(a, b) for other in wanted for a, b in zip(wanted[0], other, strict=True))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(wanted[0], alone, strict=True))


def test_a_rank_that_fails_says_why_through_rank_0(done):
    run, error = run_of(done, "full"), (done / "error").read_text()
    assert run.state == "failed" and run.status["error"] == error
    assert re.fullmatch(r"Rank 1 of 2 failed: The memory is full .*; go on with nanogpt train --resume full, .*\.", error), error
    train(resume=run, quiet=True, wandb="disabled")
    assert_close(run, run_of(done, "one-lecture"))


def test_the_numbers_of_torchrun_change_nothing_for_one_process(tmp_path, monkeypatch, one_thread):
    config = RECIPES["lecture"].replace(dropout=0.1, max_iters=10, eval_interval=10)
    plain = train(config, name="plain", runs_dir=tmp_path, quiet=True, wandb="disabled")
    for key, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=1).items():
        monkeypatch.setenv(key, str(value))
    ranked = train(config, name="ranked", runs_dir=tmp_path, quiet=True, wandb="disabled")
    assert weights(plain) == weights(ranked) and numbers(plain) == numbers(ranked)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_process_that_is_alone_takes_the_steps_of_a_plain_loop(recipe, one_thread):
    "To the last bit, with dropout."
    c = RECIPES[recipe].replace(dropout=0.2)
    data, trainer = load_dataset(c), Trainer(c, load_dataset(c))
    losses = [trainer.train_step().item() for _ in range(10)]
    torch.manual_seed(c.seed)
    model, batches, plain = GPT(c, data.tokenizer.vocab_size), torch.Generator().manual_seed(c.seed), []
    optimizers = make_optimizers(model, c)
    for _ in range(10):
        total = 0.0
        for _ in range(c.gradient_accumulation_steps):
            loss = model(*get_batch(data.train, c.batch_size, c.block_size, generator=batches))[1] / c.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for o in optimizers:
            o.step()
            o.zero_grad()
        plain.append(total.item())
    assert plain == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_ranks_see_different_parts_and_drop_different_activations(one_thread):
    data, masks, seen = load_dataset(TINY), [], []
    for rank in range(2):
        trainer = Trainer(TINY.replace(dropout=0.5), data, ranks=Ranks(rank, 2))
        trainer.ranks.mean_gradients = lambda model, loss: loss
        trainer.forward = lambda x, y, forward=trainer.forward: seen.append(x) or forward(x, y)
        with torch.random.fork_rng():
            trainer.train_step()
            masks.append(torch.nn.functional.dropout(torch.ones(100)))
    assert [x.shape for x in seen] == [(TINY.batch_size // 2, TINY.block_size)] * 2
    assert not torch.equal(*seen) and not torch.equal(*masks)


@pytest.mark.parametrize(
    ("device", "batch_size", "said"),
    [("cpu", 15, "--batch-size 16"), ("cuda:0", 16, "--device cuda"), ("mps", 16, "--device cpu"), ("cuda", 16, "processes for")],
)
def test_what_cannot_be_shared_is_refused(device, batch_size, said):
    with pytest.raises(ConfigError, match=said):
        Ranks(1, 2, local=1, here=1000).place(torch.device(device), batch_size)


# The command, and processes that end before their time


ENDLESS = "-m nanogpt_nb.train --preset tiny --device cpu --name run --max-iters 1000000 --eval-interval 50".split()


def ranks_of(process) -> list[int]:
    "The processes that torchrun started, by rank."
    found = {}
    for p in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((p / "stat").read_text().rpartition(")")[2].split()[1])
            env = dict(line.partition("=")[::2] for line in (p / "environ").read_text().split("\0"))
            if parent == process.pid and "RANK" in env:
                found[int(env["RANK"])] = int(p.name)
        except OSError:
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_killed_many_times_at_random_it_ends_on_the_same_bits(tmp_path):
    done = subprocess.run([sys.executable, HERE / "faults_ranks.py", tmp_path / "run", "20", "1"], env=environment(OMP_NUM_THREADS="1"),
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(seen["kills"].values()) == 20 and seen["codes"] == [0] * 4 and seen["rows equal"] and seen["weights equal"], seen


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def endless(cwd) -> tuple[subprocess.Popen, Run, list[int]]:
    "A run of two ranks at work."
    process, run = torchrun(*ENDLESS, cwd=cwd), Run(cwd / "runs" / "run")
    until(lambda: process.poll() is not None or len(run.estimates()) >= 2)
    pids = ranks_of(process)
    assert process.poll() is None and len(pids) == 2, process.communicate()[0]
    return process, run, pids


def goes_on(run: Run):
    "One process takes ten more steps from the last checkpoint."
    done = torch.load(run.checkpoint() / "trainer.pt", weights_only=True)["step"]
    train(run.config.replace(max_iters=done + 10), resume=run, quiet=True, wandb="disabled")
    assert run.state == "finished" and run.status["step"] == done + 10


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@needs_proc
def test_a_rank_that_is_killed_ends_all_with_a_sentence(tmp_path, one_thread):
    process, run, pids = endless(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and not any(map(is_there, pids))
    (sentence,) = [line for line in said.splitlines() if line.startswith("nanogpt: ")]
    assert "ended without a word" in sentence and "train --resume run" in sentence
    assert run.state == "failed" and sentence == f"nanogpt: {run.status['error']}"
    goes_on(run)


@needs_proc
@pytest.mark.slow
def test_a_signal_to_torchrun_stops_all_ranks_with_a_checkpoint(tmp_path):
    process, run, pids = endless(tmp_path)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert run.state == "stopped" and run.status["step"] == trainer_state(run)["step"] and not any(map(is_there, pids))
    assert said.count("train --resume run") == 2, said  # the last line of the log, and what to type next


@needs_proc
@pytest.mark.slow
def test_ranks_stop_when_torchrun_is_killed(tmp_path):
    process, run, pids = endless(tmp_path)
    process.kill()
    process.wait()
    until(lambda: not any(map(is_there, pids)))
    assert run.state == "stopped" and run.status["step"] == trainer_state(run)["step"]


@needs_proc
@pytest.mark.slow
def test_rank_0_killed_leaves_a_run_to_go_on_with(tmp_path, one_thread):
    process, run, pids = endless(tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0 and not any(map(is_there, pids))
    assert run.state == "killed"
    goes_on(run)


@pytest.mark.slow
def test_what_is_typed_wrong_is_said_once_and_leaves_nothing(tmp_path):
    process = torchrun("-m", "nanogpt_nb.train", "--preset", "tiny", "--device", "cpu", "--batch-size", "15", cwd=tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert [line for line in said.splitlines() if line.startswith("nanogpt: ")] == [
        "nanogpt: batch_size=15 cannot be shared by 2 processes; give a multiple of 2: --batch-size 16."
    ]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_help_is_shown_once(tmp_path):
    said, _ = torchrun("-m", "nanogpt_nb.train", "--help", cwd=tmp_path).communicate(timeout=300)
    assert said.count("--batch-size") == 1
