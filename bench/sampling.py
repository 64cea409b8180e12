"""How quickly is text written, beside nanoGPT's sample.py, which has no cache?

    python bench/sampling.py --peer DIR                    # the lecture's 10.8M model, 1,000 characters, on a CPU
    python bench/sampling.py --peer DIR --device cuda

Speed does not depend on what a model has learned: both sides take one step of training and are saved, at the same size
(6 layers, 6 heads, 384 wide, context 256), and write from that.

process   whole processes: `nanogpt sample` and `sample.py`, imports and model included, one text. The median of --times, in turn.
writing   characters a second without the start. nanoGPT: its sample.py for 1 and for --tokens characters, and the difference of
          the two medians. Ours: nanogpt_nb.sample.generate in a process that is warm, as one text and as a batch of 16.
"""
import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from harness import OUT, ROOT, NanoGPTError, Report, child_env, clock, entry, number, ratio, say, spread, table, train_ours
from peer import SEED, Peer, add_arguments

OURS = "-m nanogpt_nb.train --preset lecture --max-iters 1 --batch-size 1 --eval-iters 1 --sample-tokens 0 --wandb disabled"
PEER = "--compile=False --max_iters=1 --batch_size=1 --eval_interval=1 --eval_iters=1 --always_save_checkpoint=True".split()
BATCH = 16

WRITE = """
import json, sys, time, torch
from nanogpt_nb.sample import generate, load_model
run, device, (tokens, batch, times) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
model, tokenizer = load_model(run, "last", device, dtype="auto")
idx = torch.as_tensor(tokenizer.encode("\\n").astype("int64"), device=device).expand(batch, -1)
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
took = []
for _ in range(times + 1):
    began = time.perf_counter()
    new = generate(model, idx, tokens, temperature=0.8, top_k=200)
    wait(); took.append(time.perf_counter() - began)
assert new.shape == (batch, 1 + tokens), new.shape
print(json.dumps(dict(first=took[0], seconds=took[1:])))
"""


def ours_env(): return child_env(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


def write(run, device, tokens, batch, times, limit=None) -> dict:
    "Our writing in a warm process: characters a second of the whole batch."
    done = clock([sys.executable, "-c", WRITE, run, device, tokens, batch, times], env=ours_env(), limit=limit)
    if done.too_long: raise NanoGPTError("The time was up while we were writing; give more with --limit.")
    if done.code: raise NanoGPTError(f"Our sampling ended with exit status {done.code} ({done.last_words()}); try nanogpt sample by itself.")
    found = json.loads(done.lines[-1][1])
    return found | dict(tokens=tokens, batch=batch, per_second=tokens * batch / spread(found["seconds"])["median"])


def our_process(run, device, tokens, limit=None) -> float:
    "Seconds of `nanogpt sample` as a process."
    words = [sys.executable, "-m", "nanogpt_nb.cli", "sample", run, "--tokens", tokens, "--temperature", "0.8", "--top-k", "200", "--seed", SEED, "--checkpoint", "last", "--device", device]
    done = clock(words, env=ours_env(), limit=limit)
    if done.too_long: raise NanoGPTError("The time was up while nanogpt sample was writing; give more with --limit.")
    if done.code: raise NanoGPTError(f"nanogpt sample ended with exit status {done.code} ({done.last_words()}); try it by itself.")
    return done.seconds


def figures(tokens, run, processes, theirs, warm) -> dict:
    "Medians, speeds and ratios of what is known so far."
    p = {n: spread(v)["median"] for n, v in theirs.items()}
    slow = (tokens - 1) / (p[tokens] - p[1]) if p[tokens] and p[1] and p[tokens] > p[1] else None
    return dict(tokens=tokens, parameters=run["parameters"], ours_process=spread(processes), peer_process=spread(theirs[tokens]), peer_start=spread(theirs[1]), peer_per_second=slow,
                ours_per_second={b: w["per_second"] for b, w in warm.items()}, process_ratio=ratio(p[tokens], spread(processes)["median"]),
                writing_ratio={b: ratio(w["per_second"], slow) for b, w in warm.items()}, warm=warm)


def measure(peer, report, device="cpu", tokens=1000, times=3, ours=OURS, peer_args=(), more=(), tmp=None,
            left=lambda: None) -> dict: # the seconds that are left, if they are limited
    "Both sides; the figures, which are saved after each turn."
    processes, theirs = [], {1: [], tokens: []}
    with tempfile.TemporaryDirectory(prefix="nanogpt-bench-", dir=tmp) as folder:
        say("a model of ours to write with")
        run = train_ours(f"{ours} --device {device}", folder, "model", SEED, more, left())
        if peer: peer.train("gpu", [*PEER, *(["--device=cpu"] if device == "cpu" else []), *peer_args], evaluate_on=None, limit=left())
        say("writing in a warm process")
        warm = {b: write(run["run"], device, tokens, b, times, left()) for b in (1, BATCH)}
        report.save(sampling=figures(tokens, run, processes, theirs, warm))
        for i in range(times):
            say(f"turn {i + 1} of {times}")
            processes.append(our_process(run["run"], device, tokens, left()))
            for n in theirs if peer else (): theirs[n].append(whole(peer.sample(device, n, limit=left())))
            report.save(sampling=figures(tokens, run, processes, theirs, warm), processes=dict(ours=processes, peer=theirs), peer_notes=peer.notes if peer else [])
    return report.content["sampling"]


def whole(run) -> float:
    "The seconds of a process that was not ended by us."
    if run["too_long"]: raise NanoGPTError(f"nanoGPT's sample.py was ended after {run['process']:.0f} s, when the time was up; give more with --limit.")
    return run["process"]


def tell(f) -> str:
    "The table."
    rows = [["nanoGPT's sample.py", number(f["peer_process"]["median"]), number(f["peer_per_second"], ",.0f"), "1", "1"],
            ["ours", number(f["ours_process"]["median"]), number(f["ours_per_second"][1], ",.0f"), number(f["process_ratio"], ".1f"), number(f["writing_ratio"][1], ".1f")],
            [f"ours, a batch of {BATCH}", "–", number(f["ours_per_second"][BATCH], ",.0f"), "–", number(f["writing_ratio"][BATCH], ".1f")]]
    return table([f"{f['tokens']:,} characters, {f['parameters']:,} parameters", "process, s", "writing, characters/s", "ratio of processes", "ratio of writing"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--tokens", type=int, default=1000, help="characters to write")
    p.add_argument("--times", type=int, default=3, help="how often each process")
    p.add_argument("--ours", default=OURS, metavar="WORDS", help="our command that makes the model")
    p.add_argument("--out", default=OUT, type=Path, metavar="DIR", help="folder for the JSON file")
    add_arguments(p)
    a = p.parse_args()
    if a.tokens < 2 or a.times < 1: p.error("--tokens is at least 2, --times at least 1")
    peer = Peer(a.peer, tuple(a.data or ("tinyshakespeare",)), a.tmp) if a.peer else None
    try:
        report = Report(a.out, "sampling", a.device, trial=bool(a.peer_args or a.data or a.ours != OURS))
        found = measure(peer, report, a.device, a.tokens, a.times, a.ours, a.peer_args.split(), ("--data", *a.data) if a.data else (), a.tmp)
    finally:
        if peer: peer.close()
    print(tell(found))
    say(f"figures in {report.path}")


if __name__ == "__main__": entry(main)
