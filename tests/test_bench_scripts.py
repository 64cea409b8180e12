"The measuring scripts: what they time, how they pair, what they count as missed, and that the peer learns from our tokens."

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import evaluate  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
import loss_at_time  # noqa: E402
import peer as peers  # noqa: E402
import results  # noqa: E402
import sampling  # noqa: E402
import time_to_loss  # noqa: E402

sys.path.remove(str(BENCH))

from nanogpt_nb.config import ConfigError, NanoGPTConfig, NanoGPTError  # noqa: E402
from nanogpt_nb.data import load_dataset  # noqa: E402

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 40

TRAIN = '''
import json, os, subprocess, sys, time
seed = 1337
seed_offset = 0
class torch: manual_seed = staticmethod(lambda s: globals().update(seed=s))
torch.manual_seed(1337 + seed_offset)
if "--fail" in sys.argv: sys.exit("ValueError: no such luck")
if "--children" in sys.argv:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pids", "w").write(f"{os.getpid()} {child.pid}")
    print("step 0: train loss 4.2000, val loss 4.1000")
    time.sleep(600)
print("Overriding config with " + sys.argv[1])
print("step 0: train loss 4.2221, val loss 4.2306")
print("iter 0: loss 4.2144, time 950.11ms, mfu -100.00%")
print("step 250: train loss 2.0100, val loss 1.8700")
print("iter 250: loss 2.0011, time 14.50ms, mfu 0.25%")
print(f"step 500: train loss 1.8000, val loss {1.8 + (seed - 1337) / 100:.4f}")
os.makedirs("out-shakespeare-char", exist_ok=True)
json.dump(dict(seed=seed, words=sys.argv[1:]), open("seen.json", "w"))
'''
MODEL = '''
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
'''
OURS = '''
import argparse, json, pathlib, sys, time
p = argparse.ArgumentParser()
for flag in ("--seed", "--max-iters", "--eval-interval"): p.add_argument(flag, type=int, default=20)
for flag in ("--name", "--runs-dir", "--data"): p.add_argument(flag)
p.add_argument("--loss", type=float, default=1.5)
p.add_argument("--eval-iters", type=int, default=0)
p.add_argument("--silent", action="store_true")
p.add_argument("--worse-with-seed", type=float, default=0.)
a = p.parse_args()
run = pathlib.Path(a.runs_dir)/a.name
run.mkdir(parents=True)
config = dict(n_layer=1, n_embd=8, num_heads=1, block_size=16, batch_size=4, mlp="relu", eval_iters=a.eval_iters, max_iters=a.max_iters)
(run/"config.json").write_text(json.dumps(dict(config=config, parameters=1234)))
for i, step in enumerate((0, a.max_iters // 2, a.max_iters)):
    loss = (4.2, 2.2, a.loss + a.worse_with_seed * (a.seed - 1337))[i]
    row = dict(step=step, train_loss=loss, val_loss=loss, tokens=step * 64, seconds=0.01 * (i + 1))
    with open(run/"metrics.jsonl", "a") as f: f.write(json.dumps(row) + "\\n")
    if not a.silent: print(f"{step:5}  {loss:10.4f}  {loss:8.4f}  {1234:8,}  {0:4}:{0:02}  words / more")
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def checkout(tmp_path):
    "A folder that looks like nanoGPT and speaks its output format."
    home = tmp_path / "nanoGPT"
    (home / "config").mkdir(parents=True)
    (home / "data" / "shakespeare_char").mkdir(parents=True)
    (home / "data" / "shakespeare_char" / "prepare.py").write_text("raise SystemExit('nobody prepares here')")
    for name, content in {"train.py": TRAIN, "model.py": MODEL, "sample.py": "import tiktoken\nprint('words')\n", "configurator.py": "", peers.CONFIG: "eval_iters = 200\n"}.items():
        (home / name).write_text(content)
    return home


@pytest.fixture
def peer(checkout, text):
    with peers.Peer(checkout, (text,)) as p:
        yield p


@pytest.fixture
def ours(tmp_path):
    (tmp_path / "ours.py").write_text(OURS)
    return str(tmp_path / "ours.py")


def snapshot(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def main(module, *words):
    "Run a script's main in this process; what it prints."
    before = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    try:
        return module.main()
    finally:
        sys.argv = before


# ---- a process and its clock


def test_clock_keeps_lines_moments_and_the_exit_status():
    done = harness.clock([sys.executable, "-c", "import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)"])
    assert (done.code, [line for _, line in done.lines]) == (3, ["a", "b"])
    moments = [t for t, _ in done.lines]
    assert 0 < moments[0] <= moments[1] <= done.seconds and not done.too_long


def test_clock_ends_what_runs_too_long():
    done = harness.clock([sys.executable, "-c", "import time; time.sleep(600)"], limit=0.3)
    assert done.too_long and done.code == -signal.SIGKILL


def test_clock_does_not_wait_for_what_a_program_leaves_behind(tmp_path):
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); open(sys.argv[1], 'w').write(str(p.pid))"
    done = harness.clock([sys.executable, "-c", code, tmp_path / "pid"])
    assert done.code == 0
    assert gone(int((tmp_path / "pid").read_text()))


def gone(pid):
    "Whether a process has ended, waiting for that."
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def started():
    "Start a program; it is ended after the test, if it has not by itself."
    going = []
    yield lambda *words: going.append(subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)) or going[-1]
    for p in going:
        p.kill()
        p.stderr.close()
        p.wait()


HEAR = "import signal, sys; sys.path.insert(0, sys.argv.pop(1)); signal.signal(signal.SIGINT, signal.default_int_handler); "
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


@on_linux
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_the_whole_group(checkout, tmp_path, started, number, code):
    code_ = HEAR + "import harness; harness.entry(lambda: harness.clock([sys.executable, sys.argv[1], '--children'], cwd=sys.argv[2], show=harness.say))"
    p = started(sys.executable, "-c", code_, BENCH, checkout / "train.py", tmp_path)
    assert any("step 0" in line for line in p.stderr)
    pids = [int(n) for n in (tmp_path / "pids").read_text().split()]
    p.send_signal(number)
    assert p.wait(60) == code
    assert len(pids) == 2 and all(map(gone, pids))


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_the_peer_and_its_copy(checkout, text, tmp_path, started, number, code):
    code_ = HEAR + "import harness, time_to_loss as t; t.turns = lambda *_: [('peer', 0)]; t.ceilings = lambda *_: {}; harness.entry(t.main)"
    p = started(sys.executable, "-c", code_, BENCH, "--peer", checkout, "--peer-args=--children", "--data", text, "--out", tmp_path / "out", "--tmp", tmp_path)
    assert any("step 0" in line for line in p.stderr)
    pids = [int(n) for n in next(tmp_path.glob("nanogpt-peer-*/pids")).read_text().split()]
    p.send_signal(number)
    assert p.wait(60) == code
    assert len(pids) == 2 and all(map(gone, pids))
    assert not list(tmp_path.glob("nanogpt-peer-*"))


# ---- the peer


def test_the_peer_gets_our_tokens_in_nanogpts_format(peer, text):
    import numpy as np

    d, folder = load_dataset(NanoGPTConfig(data=(text,))), peer.path / "data" / "shakespeare_char"
    train, val = (np.fromfile(folder / f"{split}.bin", dtype=np.uint16) for split in ("train", "val"))
    assert train.tolist() == d.train.tolist() and val.tolist() == d.val.tolist()
    meta = pickle.loads((folder / "meta.pkl").read_bytes())
    chars = sorted(set(TEXT))
    assert meta == dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
    n = len(TEXT)  # what its prepare.py does
    assert train.tolist() == [meta["stoi"][c] for c in TEXT[: int(n * 0.9)]] and val.tolist() == [meta["stoi"][c] for c in TEXT[int(n * 0.9) :]]


def test_other_tokens_are_noticed(peer):
    file = peer.data / "val.bin"
    file.write_bytes(file.read_bytes()[2:] + b"\0\0")
    with pytest.raises(AssertionError, match="other tokens"):
        peer.check_data()


def test_the_checkout_stays_as_it_is_and_the_copy_goes(checkout, text):
    before = snapshot(checkout)
    with peers.Peer(checkout, (text,)) as p:
        p.train("cpu", seed=1340)
        where = p.path
        assert (where / "seen.json").exists()
    assert snapshot(checkout) == before and not where.exists()


def test_what_is_not_a_checkout_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "peer.py", "--peer", tmp_path, "cpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "is not a checkout of karpathy/nanoGPT" in done.stderr and len(done.stderr.splitlines()) == 1


def test_its_output_is_read():
    lines = [(0.5, "step 0: train loss 4.2874, val loss 4.2823"), (0.6, "iter 0: loss 4.2649, time 34.50ms, mfu -100.00%"), (0.7, "saving checkpoint to out"), (9.0, "step 250: train loss nan, val loss nan")]
    found = peers.read_output(lines)
    assert found["points"][0] == dict(wall=0.5, step=0, train_loss=4.2874, loss=4.2823)
    assert found["iters"] == [dict(wall=0.6, step=0, loss=4.2649, milliseconds=34.5)]
    assert found["points"][1]["loss"] != found["points"][1]["loss"]


def test_its_run_and_its_published_commands(peer):
    run = peer.train("cpu", ["--max_iters=7"], target=1.88)
    assert [p["loss"] for p in run["points"]] == [4.2306, 1.87, 1.8]
    assert (run["estimate"], run["best_estimate"]) == (1.8, 1.8)
    assert run["estimate_reached"] == run["points"][1]["wall"] < run["process"]
    assert "no checkpoint" in run["whole_split"]["error"] and "no checkpoint" in run["protocol"]
    seen = json.loads((peer.path / "seen.json").read_text())
    issued = "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
    assert seen == dict(seed=1337, words=[*issued.split(), "--max_iters=7"])
    peer.train("gpu")
    assert json.loads((peer.path / "seen.json").read_text())["words"] == ["config/train_shakespeare_char.py"]


def test_its_seed_is_changed_in_the_copy_alone(peer, checkout):
    assert peer.train("cpu", seed=1340)["estimate"] == 1.83
    assert peer.train("cpu")["estimate"] == 1.8
    assert (peer.path / "train.py").read_text() == (checkout / "train.py").read_text()
    (checkout / "train.py").write_text("print('another one')")
    with pytest.raises(ConfigError, match="--peer-seeds"):
        peer.seeded(1338)


def test_a_peer_that_fails_says_why(peer):
    with pytest.raises(NanoGPTError, match="exit status 1 .*no such luck"):
        peer.train("cpu", ["--fail"])


def test_sample_py_runs_without_tiktoken(peer):
    import importlib.util

    run = peer.sample("cpu", 50)
    assert run["process"] > 0 and "--max_new_tokens=50" in run["command"] and "--device=cpu --dtype=float32" in run["command"]
    assert bool(peer.notes) == (importlib.util.find_spec("tiktoken") is None) == (peer.path / "tiktoken.py").exists()


def test_its_checkpoint_is_evaluated_over_the_whole_split(peer, monkeypatch):
    d, T = peer.dataset, 16
    V, N = d.tokenizer.vocab_size, len(d.val)
    torch.manual_seed(0)
    weight = torch.randn(V, V)
    (peer.path / "out-shakespeare-char").mkdir()
    buffer = io.BytesIO()
    torch.save(dict(model={"_orig_mod.table.weight": weight}, model_args=dict(vocab_size=V, block_size=T), iter_num=500, best_val_loss=torch.tensor(1.0), config=dict(eval_iters=20, batch_size=12, max_iters=500, n_layer=1, n_embd=8)), buffer)
    (peer.path / peers.CHECKPOINT).write_bytes(buffer.getvalue())
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    whole = evaluate.of_peer(peer.path, peers.CHECKPOINT)
    monkeypatch.delitem(sys.modules, "model")
    table = weight.double().log_softmax(-1)
    mean = -sum(table[a, b] for a, b in zip(d.val[:-1], d.val[1:])) / (N - 1)  # a bigram: the context does not matter
    assert whole["loss"] == pytest.approx(mean.item(), abs=1e-5)
    assert (whole["tokens"], whole["context"], whole["step"]) == (N - 1, T, 500)
    assert "20 random batches of 12x16 tokens" in peers.protocol(whole) and f"{N - 1:,} tokens, context 16" in peers.protocol(whole)
    assert time_to_loss.peer_flops(dict(whole_split=whole)) == dict(tokens=500 * 12 * 16, flops=500 * 12 * 16 * harness.flops_per_token(1, 8, T, V))


# ---- time to a loss


def test_seconds_until_the_target_was_known(ours, tmp_path):
    run = time_to_loss.one_of_ours(ours, 1337, "a", tmp_path / "runs", 2.5, check=False)
    assert run["reached"] and run["loss"] == 2.2 and run["final"] == 1.5 and run["tokens"] == 640
    assert 0 < run["known"] <= run["process"] and run["known_by"] == "its row on the terminal"
    assert run["flops"] == 640 * harness.flops_per_token(1, 8, 16, 65)
    quiet = time_to_loss.one_of_ours(ours + " --silent", 1337, "b", tmp_path / "runs", 2.5, check=False)
    assert quiet["known"] == pytest.approx(0.02 + quiet["process"] - 0.03) and "did not count" in quiet["known_by"]


def test_an_estimate_from_samples_is_no_evaluation_of_the_split(ours, tmp_path):
    run = time_to_loss.one_of_ours(ours + " --eval-iters 20", 1337, "a", tmp_path / "runs", 2.5, check=False)
    assert not run["reached"] and run["points"] == [] and "--eval-iters 0" in run["why"]


def test_a_command_of_ours_that_fails_says_why(ours, tmp_path):
    with pytest.raises(NanoGPTError, match="exit status 2 .*unrecognized arguments: --lss"):
        harness.train_ours(ours + " --lss 3", tmp_path / "runs", "a", 1337)
    with pytest.raises(ConfigError, match="names no command"):
        harness.command(" ")


def test_they_take_turns():
    assert time_to_loss.turns(2, 2, 0) == [("ours", 0), ("peer", 0), ("peer", 1), ("ours", 1)]
    assert time_to_loss.turns(2, 2, 1) == [("peer", 0), ("ours", 0), ("ours", 1), ("peer", 1)]
    for seeds, peer_seeds in ((5, 1), (1, 3), (3, 0)):
        order = time_to_loss.turns(seeds, peer_seeds, 0)
        assert sorted(order) == sorted([("ours", i) for i in range(seeds)] + [("peer", i) for i in range(peer_seeds)])


def a_run(order, process, reached=True, **more):
    return dict(round=0, order=order, process=process, reached=reached, known=process - 1, training=process / 2, final=1.7, flops=6e11) | more


def a_peer(order, process, whole=1.9):
    return dict(round=0, order=order, process=process, whole_split=dict(loss=whole))


def test_medians_and_ratios():
    runs, theirs = [a_run(0, 10.0), a_run(3, 20.0), a_run(4, 40.0)], [a_peer(1, 100.0), a_peer(5, 160.0)]
    s = time_to_loss.summary(runs, theirs, 1.88, dict(float32=1.5e11, bfloat16=4e11))
    assert s["ours"] == dict(median=20.0, min=10.0, max=40.0, n=3, missed=0) and s["peer"]["median"] == 130.0
    assert s["ratio_of_medians"] == 6.5
    assert s["paired_ratios"] == [10.0, 5.0, 4.0] and s["median_of_paired_ratios"] == 5.0
    assert s["floor"]["seconds_float32"] == pytest.approx(4.0) and s["floor"]["seconds_bfloat16"] == pytest.approx(1.5)


def test_a_miss_is_larger_than_every_time_and_never_left_out():
    runs, theirs = [a_run(0, 10.0), a_run(1, 5.0, reached=False), a_run(2, 20.0)], [a_peer(3, 100.0)]
    s = time_to_loss.summary(runs, theirs, 1.88, {})
    assert s["misses"] == 1 and s["ours"] == dict(median=20.0, min=10.0, max=None, n=3, missed=1)
    assert s["paired_ratios"] == [10.0, 0.0, 5.0] and s["median_of_paired_ratios"] == 5.0
    s = time_to_loss.summary([a_run(0, 10.0, reached=False)], theirs, 1.88, {})
    assert s["ours"]["median"] is None and s["ratio_of_medians"] is None


def test_the_whole_script(checkout, ours, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time_to_loss, "ceilings", lambda *_: dict(float32=1e11, bfloat16=2e11, fake=True))
    words = ["--peer", checkout, "--seeds", 2, "--rounds", 2, "--target", 1.6, "--no-check", "--data", text, "--out", tmp_path / "out", "--ours"]
    assert main(time_to_loss, *words, f"{ours} --worse-with-seed 0.2") == 1  # the second seed misses
    out = capsys.readouterr().out
    saved = json.loads(next((tmp_path / "out").glob("time_to_loss-cpu-*.json")).read_text())
    assert [r["seed"] for r in saved["runs"]] == [1337, 1338, 1337, 1338] and len(saved["peer"]) == 2
    assert saved["summary"]["misses"] == 2 and "2 missed" in out
    assert [("missed, " in line) for line in out.splitlines() if line.startswith("| ours")] == [False, True, False, True]
    assert saved["trial"] is True and {"cpu", "cores", "gpu"} <= saved["machine"].keys() and {"python", "torch", "commit"} <= saved["versions"].keys()
    assert str(tmp_path) not in saved["command"].replace(text, "").replace(ours, "")


# ---- loss at a time


def test_steps_are_chosen_from_the_calibration():
    before, each = loss_at_time.line_through((20, 6.0), (80, 12.0))
    assert (before, each) == (pytest.approx(4.0), pytest.approx(0.1))
    steps = loss_at_time.steps_for(104.0, before, each, 0.0)
    assert steps == 1000 and before + each * loss_at_time.steps_for(104.0, before, each, 0.04) <= 104.0 * 0.96
    with pytest.raises(NanoGPTError, match="is too short"):
        loss_at_time.steps_for(4.05, before, each, 0.0)
    with pytest.raises(NanoGPTError, match="makes no sense"):
        loss_at_time.line_through((20, 6.0), (80, 5.0))


def test_a_run_that_took_longer_counts_with_what_it_had_in_time():
    points = [dict(wall=w, step=s, loss=x) for w, s, x in ((2.0, 0, 4.2), (6.0, 50, 2.0), (9.9, 100, 1.5))]
    run = dict(points=points, process=11.0, too_long=False)
    assert loss_at_time.judge(run, 12.0) == run | dict(fitted=True, loss=1.5, at_step=100)
    assert loss_at_time.judge(run, 9.0) == run | dict(fitted=False, loss=2.0, at_step=50)
    assert loss_at_time.judge(run, 1.0)["loss"] is None


def test_loss_at_time_as_a_script(checkout, ours, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loss_at_time, "line_through", lambda *_: (1.0, 0.5))
    main(loss_at_time, "--seconds", 60, "--margin", 0, "--seeds", 2, "--data", text, "--out", tmp_path / "out", "--ours", ours)
    saved = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert loss_at_time.lasting(118, 2) == ["--max-iters", "118", "--eval-interval", "59"] and loss_at_time.lasting(5, 2)[-1] == "3"
    assert saved["steps"] == 118 and [r["config"]["max_iters"] for r in saved["runs"]] == [118, 118]
    assert saved["summary"] == dict(loss=dict(median=1.5, min=1.5, max=1.5, n=2, missed=0), overran=0)
    assert "loss after 60.0 s: median 1.5000" in capsys.readouterr().out


# ---- sampling


def test_speeds_of_writing_come_from_differences_and_medians(peer, tmp_path, monkeypatch):
    def warm(words, env, limit):
        assert words[3:] == ["a run", "cpu", 101, words[6], 2]
        return harness.Finished(9.0, 0, [(9.0, json.dumps(dict(first=3.0, seconds=[0.5, 0.5] if words[6] == 1 else [2.0, 2.0])))])

    monkeypatch.setattr(sampling, "train_ours", lambda *_: dict(run="a run", parameters=10))
    monkeypatch.setattr(sampling, "our_process", lambda *_: 4.0)
    monkeypatch.setattr(sampling, "clock", warm)
    monkeypatch.setattr(peer, "sample", lambda device, n, limit: dict(process={1: 2.0, 101: 12.0}[n], too_long=False))
    found = sampling.measure(peer, harness.Report(tmp_path / "out", "sampling", "cpu"), "cpu", 101, 2)
    assert found["peer_per_second"] == 10.0 and found["process_ratio"] == 3.0
    assert found["ours_per_second"] == {1: 202.0, 16: 808.0} and found["writing_ratio"] == {1: pytest.approx(20.2), 16: pytest.approx(80.8)}
    assert "| ours " in sampling.tell(found)
    words = json.loads((peer.path / "seen.json").read_text())["words"]
    assert {"--max_iters=1", "--always_save_checkpoint=True", "--device=cpu"} <= set(words)


# ---- what needs a GPU


def test_without_a_gpu_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs|measures a CUDA GPU.*--dry-run") as e:
        main(gpu, "--out", tmp_path)
    assert e.value.exit_code == 2 and not list(tmp_path.glob("*.json"))


def tried(gpu_out):
    return {d["kind"]: d for d in (json.loads(f.read_text()) for f in gpu_out.glob("*.json"))}


def test_the_parts_that_train_in_a_dry_run(checkout, ours, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.Part, "ours", lambda self, words: ours)
    monkeypatch.setattr(gpu, "evaluate", lambda *_, **__: dict(loss=1.51))
    monkeypatch.setattr(time_to_loss, "evaluate", lambda *_, **__: dict(loss=1.51))
    assert main(gpu, "--dry-run", "--part", "time", "best", "lecture", "--peer", checkout, "--data", text, "--out", tmp_path / "out", "--seeds", 2) == 0
    found = tried(tmp_path / "out")
    assert set(found) == {"gpu-time", "gpu-best", "gpu-lecture"} and all(d["dry_run"] and not d["errors"] for d in found.values())
    assert found["gpu-time"]["cold"]["peer"]["estimate"] == 1.8 and found["gpu-time"]["cold_ratio"] > 0
    assert found["gpu-time"]["summary"]["ours"]["n"] == 2 and found["gpu-time"]["summary"]["floor"]["ceiling"]["fake"]
    assert found["gpu-best"]["summary"] | dict(best=None) == dict(mean=1.5, deviation=0.0, n=2, best=None, parameters=1234, context=16, mean_of_last=1.5)
    assert [row[2] for row in found["gpu-lecture"]["summary"]["curve"]] == [4.2, 2.2, 1.5]
    assert "ratio of medians" in capsys.readouterr().out


def test_a_part_that_fails_says_why_and_the_others_go_on(ours, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.Part, "ours", lambda self, words: ours + (" --lss 3" if self.name == "best" else ""))
    assert main(gpu, "--dry-run", "--part", "best", "lecture", "--data", text, "--out", tmp_path / "out") == 1
    found = tried(tmp_path / "out")
    assert "unrecognized arguments" in found["gpu-best"]["errors"][0] and not found["gpu-lecture"]["errors"]
    assert "lecture: 1.5000 at step 20" in capsys.readouterr().out


def test_a_peer_that_does_not_compile_goes_on_without(peer, tmp_path):
    class A:
        dry_run, quick, seeds, out, data, peer_args = False, True, 1, tmp_path, None, ""

    class Picky:
        def train(self, which, extra, seed, left, env, device, target):
            if "--compile=False" not in extra:
                raise NanoGPTError("inductor is not at home")
            return extra[:]

    part, extra = gpu.Part("time", A, Picky(), 60), []
    assert gpu._peer(part, extra, 1337, {}, 1.47) == ["--compile=False"] == extra
    assert "inductor is not at home" in part.report.content["errors"][0]


@pytest.mark.slow
def test_all_parts_for_real_in_a_dry_run(text, tmp_path):
    words = [sys.executable, BENCH / "gpu.py", "--dry-run", "--data", text, "--out", tmp_path / "out", "--tmp", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = tried(tmp_path / "out")
    assert set(found) == {f"gpu-{name}" for name in gpu.PARTS}
    assert found["gpu-best"]["runs"][0]["checked"]["loss"] == pytest.approx(found["gpu-best"]["runs"][0]["best"], abs=1e-3)
    assert all(size["utilisation"] > 0 for size in found["gpu-mfu"]["sizes"].values()) and found["gpu-sampling"]["sampling"]["ours_per_second"]["16"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_ceiling_of_a_gpu():
    found = harness.ceilings("cuda")
    assert found["bfloat16"] > found["float32"] > 1e12


def test_the_ceiling_of_this_machine(monkeypatch, capsys):
    import nanogpt_nb.ceiling

    def here(words, env, limit):
        exec(words[-1], {})
        return harness.Finished(1.0, 0, [(1.0, line) for line in capsys.readouterr().out.splitlines()])

    true = nanogpt_nb.ceiling.ceiling
    monkeypatch.setattr(nanogpt_nb.ceiling, "ceiling", lambda device, dtype: true(device, dtype, seconds=0.02, size=64))
    monkeypatch.setattr(harness, "clock", here)
    found = harness.ceilings("cpu")
    assert found.keys() == {"float32", "bfloat16"} and min(found.values()) > 1e6
    assert harness.ceilings("cpu", fake=5.0) == dict(float32=5.0, bfloat16=5.0, fake=True)


def test_operations_are_those_that_nanogpt_bench_counts():
    from nanogpt_nb.ceiling import flops_per_token
    from nanogpt_nb.gpt import GPT

    for mlp in ("relu", "swiglu"):
        c = NanoGPTConfig.preset("tiny").replace(mlp=mlp, n_embd=40, bias=True, tie_weights=mlp == "relu")
        assert harness.flops_per_token(c.n_layer, c.n_embd, c.block_size, 65, c.mlp) == flops_per_token(GPT(c, 65))


# ---- tables


def put(folder, name, kind, device, date, **more):
    about = dict(kind=kind, device=device, date=date, command="python bench/x.py", machine=dict(cpu="a processor", cores=2, gpu=[], system="Linux", load=0.1), versions=dict(python="3", torch="2", commit="abc"))
    (folder / f"{name}.json").write_text(json.dumps(about | more))


def timed(median, process):
    runs = [a_run(0, process, context=64, points=[dict(wall=1.0, step=0, loss=4.0), dict(wall=process, step=9, loss=1.7)])]
    theirs = [a_peer(1, 100.0) | dict(points=[dict(wall=90.0, step=9, loss=1.8)], command="python train.py", protocol="its own estimate", estimate=1.8)]
    return dict(target=median, runs=runs, peer=theirs, summary=time_to_loss.summary(runs, theirs, median, dict(float32=1.5e11)))


def test_results_say_what_was_met_what_not_and_what_is_missing(tmp_path, capsys):
    put(tmp_path, "old", "time_to_loss", "cpu", "2030-01-01T00:00:00", **timed(1.88, 50.0))
    put(tmp_path, "new", "time_to_loss", "cpu", "2030-02-01T00:00:00", **timed(1.88, 8.0))
    put(tmp_path, "trial", "time_to_loss", "cpu", "2030-03-01T00:00:00", trial=True, **timed(1.88, 1.0))
    put(tmp_path, "minute", "time_to_loss", "cpu", "2030-01-01T00:00:00", **timed(1.62, 80.0))
    sampling = dict(tokens=1000, peer_per_second=10.0, ours_per_second={"1": 150.0, "16": 300.0}, writing_ratio={"1": 15.0, "16": 30.0}, process_ratio=7.0)
    put(tmp_path, "sampling", "sampling", "cpu", "2030-01-01T00:00:00", sampling=sampling)
    put(tmp_path, "mfu", "gpu-mfu", "cuda", "2030-01-01T00:00:00", sizes={"10.8M": dict(utilisation=0.55, ceiling=7e14, training=5e6)})
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "to").mkdir()
    main(results, "--figures", tmp_path, "--to", tmp_path / "to")
    capsys.readouterr()
    assert sorted(p.stem for p in (tmp_path / "to" / "figures").iterdir()) == ["mfu", "minute", "new", "sampling"]
    told = (tmp_path / "to" / "RESULTS.md").read_text()
    (tmp_path / "empty").mkdir()
    main(results, "--figures", tmp_path / "empty", "--to", tmp_path / "to")  # what was kept still counts
    capsys.readouterr()
    assert (tmp_path / "to" / "RESULTS.md").read_text() == told
    rows = {cells[1]: cells[2:] for line in (tmp_path / "to" / "RESULTS.md").read_text().splitlines() if line.startswith("| ") for cells in [[c.strip() for c in line.split("|")]]}
    at = lambda name: next(cells for key, cells in rows.items() if key.startswith(name))
    assert at("time to 1.88")[1:3] == ["12.5×", "yes"] and at("time to 1.88")[4] == "2030-02-01 new.json"
    assert at("`nanogpt train`: its time")[1:3] == ["80.00 s", "**no**"]
    assert at("sampling, 10.8M, a batch")[1:3] == ["30.0×", "**no**"]
    assert at("loss over the whole split in")[1] == "not measured"
    assert at("model FLOPs utilisation at 10.8M")[1:3] == ["55.0%", "yes"]
    assert at("model FLOPs utilisation at 124M")[1] == at("the lecture's own run")[1] == "not measured: needs a CUDA GPU"
    assert (tmp_path / "to" / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_a_target_that_was_missed_is_told_as_missed(tmp_path):
    found = timed(1.88, 8.0)
    found["runs"][0]["reached"] = False
    put(tmp_path, "a", "time_to_loss", "cpu", "2030-01-01T00:00:00", **found | dict(summary=time_to_loss.summary(found["runs"], found["peer"], 1.88, {})))
    row = next(f for f in results.FIGURES if f.name.startswith("time to 1.88")).row(results.read(tmp_path))
    assert row[2:4] == ["missed", "**no**"] and "1 missed" in row[4]


def test_help_teaches():
    done = subprocess.run([sys.executable, results.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--figures DIR" in done.stdout and "python bench/results.py" in done.stdout
    assert all(f"python bench/{module.__name__}.py" in module.__doc__ for module in (time_to_loss, loss_at_time, gpu, peers, evaluate, sampling))
