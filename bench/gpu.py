"""All figures that need a CUDA GPU, by one command.

    python bench/gpu.py --peer DIR                           # all five parts: about 27 minutes at most
    python bench/gpu.py --peer DIR --part time               # one call of less than 10 minutes for each of these three
    python bench/gpu.py --peer DIR --part best
    python bench/gpu.py --peer DIR --part mfu lecture sampling
    python bench/gpu.py --quick --peer DIR                   # fewer runs: to see whether all of it works
    python bench/gpu.py --dry-run                            # the same ways on a CPU, with a tiny model and a made-up ceiling

time      to a loss of 1.4697 over the whole validation split, context 256, beside nanoGPT's GPU command: 5 seeds, whole
          processes (see bench/time_to_loss.py). Cold (nothing compiled before, an empty cache for each side) and warm apart.
best      the lowest loss over the whole validation split, 5 seeds: mean, deviation, parameters; each checkpoint evaluated
          again in float32.
mfu       model FLOPs utilisation at 10.8M and 124M parameters (GPT-2's shape, context 1024), against the ceiling measured
          just before in the same process.
lecture   the lecture's own run, NanoGPTConfig(): its curve, its loss as it estimates it, and over the whole split.
sampling  characters a second at 10.8M parameters, one text, beside nanoGPT's sample.py (see bench/sampling.py).

DIR is a checkout of karpathy/nanoGPT; without --peer its columns stay empty. Each part has a time limit: when it is up, what
runs is ended and what is known is kept. A part that fails says why, and the others go on. Figures go to JSON files in --out
after each run; python bench/results.py makes tables of them. The text (tiny Shakespeare) is downloaded at the first run;
without a network, set NANOGPT_NB_CACHE to a folder in which it lies as tinyshakespeare.txt.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import sampling
import time_to_loss
from harness import OUT, ROOT, ConfigError, NanoGPTError, Report, ceilings, child_env, clock, entry, evaluate, number, ratio, say, spread, table, train_ours
from peer import SEED, Peer, add_arguments

TIME = time_to_loss.OURS["cuda"]
BEST = "-m nanogpt_nb.cli train --preset best-gpu --device cuda --wandb disabled"
LECTURE = "-m nanogpt_nb.train --preset lecture --device cuda --wandb disabled"
SIZES = {"10.8M": ("modern", 0), "124M": ("gpt2", 0), "10.8M, the lecture's": ("lecture", 0)}   # preset of nanogpt bench, and its batch size; 0: the preset's
MEASURED = dict(parameters=",", batch_size=",", block_size=",", training=",.0f", forward=",.0f", utilisation=".1%", forward_utilisation=".1%", memory=",.0f")
LIMITS = dict(time=540, best=540, mfu=150, lecture=240, sampling=150)              # seconds
TRY = dict(time="--max-iters 4 --eval-interval 2", best="--max-iters 4 --eval-interval 2", lecture="--max-iters 4 --eval-interval 2")
TRY_PEER = "--max_iters=2 --eval_interval=1 --eval_iters=1 --n_layer=1 --n_head=1 --n_embd=8 --block_size=16 --batch_size=2".split()
FAKE = 1e12                                                                        # operations a second, with --dry-run

MFU = """
import json, sys
from nanogpt_nb.bench import bench
name, device, seconds, batch_size = sys.argv[1:]
told = bench(name, device=device, seconds=float(seconds), batch_size=int(batch_size) or None, progress=False)
print(json.dumps(dict(told[0], notes=list(told.notes))))
"""


class Part:
    "What a part may use: the time that is left, the peer, where figures go."
    def __init__(self, name, a, peer, seconds):
        self.name, self.a, self.peer, self.deadline = name, a, peer, time.monotonic() + seconds
        self.device = "cpu" if a.dry_run else "cuda"
        self.more = ("--data", *a.data) if a.data else ()
        self.peer_args = [*a.peer_args.split(), *(TRY_PEER if a.dry_run else [])]
        self.seeds = min(a.seeds, 2) if a.quick or a.dry_run else a.seeds
        self.report = Report(a.out, f"gpu-{name}", self.device, dry_run=a.dry_run, quick=a.quick, trial=bool(a.peer_args or a.data), errors=[])

    def left(self): return max(1., self.deadline - time.monotonic())
    def up(self): return self.deadline - time.monotonic() < 10

    def ours(self, words):
        "Our command; with --dry-run, of a tiny model on the CPU."
        if not self.a.dry_run: return words
        return f"-m nanogpt_nb.train --preset tiny --device cpu --wandb disabled --sample-tokens 0 --eval-iters 0 {TRY[self.name]}"

    def fails(self, what, e):
        "Keep why something was not measured."
        self.report.content["errors"].append(f"{what}: {e}")
        self.report.save()
        say(f"{what}: {e}")

    def caches(self, folder):
        "Variables that put all that is compiled into `folder`."
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
        return {name: str(Path(folder)/name.lower()) for name in names}


def time_part(p:Part) -> str:
    "Cold, one of each side; then warm, several seeds in turn."
    words, target, cold = p.ours(p.a.ours or TIME), 4.3 if p.a.dry_run else p.a.target, {}
    ceiling = ceilings(p.device, FAKE if p.a.dry_run else None)
    with tempfile.TemporaryDirectory(prefix="nanogpt-caches-", dir=p.a.tmp) as folder:
        mine, theirs, extra = p.caches(Path(folder)/"ours"), p.caches(Path(folder)/"nanoGPT"), list(p.peer_args)
        train_peer = lambda seed, left: _peer(p, extra, seed, theirs, target)
        p.report.save(target=target, ours=words)
        try:
            run = time_to_loss.one_of_ours(words, SEED, "cold", Path(folder)/"runs", target, False, p.device, p.more, p.left(), mine)
            cold["ours"] = {k: run[k] for k in ("process", "known", "training", "reached", "loss", "final", "points", "too_long")}
        except NanoGPTError as e: p.fails("ours, cold", e)
        if p.peer and not p.a.quick:
            try: cold["peer"] = {k: v for k, v in train_peer(SEED, p.left()).items() if k in ("process", "estimate", "whole_split", "command", "points", "too_long")}
            except NanoGPTError as e: p.fails("nanoGPT, cold", e)
        c = {k: v["process"] for k, v in cold.items() if not v["too_long"] and v.get("reached", True)}
        p.report.save(cold=cold, cold_ratio=ratio(c.get("peer"), c.get("ours")))
        found = time_to_loss.compare(words, p.peer, p.report, target, p.device, p.seeds, 1, 1, True, (), ceiling, p.more, p.deadline, p.a.tmp, mine, train_peer, p.fails)
    return time_to_loss.tell(found, p.report.content["runs"], p.report.content["peer"]) + f"\ncold, whole processes: ours {number(c.get('ours'))} s, nanoGPT {number(c.get('peer'))} s, ratio {number(p.report.content['cold_ratio'], '.1f')}"


def _peer(p, extra, seed, env, target):
    "nanoGPT's command; without torch.compile, from then on, where that does not work on this machine, and that is said."
    which = "gpu" if p.device == "cuda" else "cpu"
    try: return p.peer.train(which, extra, seed, p.left(), env, p.device, target)
    except NanoGPTError as e:
        if which == "cpu" or "--compile=False" in extra: raise
        p.fails("nanoGPT, with torch.compile as its command has it, so from now on with --compile=False", e)
        extra.append("--compile=False")
        return p.peer.train(which, extra, seed, p.left(), env, p.device, target)


def best_part(p:Part) -> str:
    "Several seeds of the recipe for the lowest loss."
    runs = []
    with tempfile.TemporaryDirectory(prefix="nanogpt-bench-", dir=p.a.tmp) as folder:
        for seed in range(SEED, SEED + p.seeds):
            if p.up(): p.fails(f"seeds from {seed}", "the time was up"); break
            try: run = train_ours(p.ours(p.a.best or BEST), folder, f"seed-{seed}", seed, p.more, p.left())
            except NanoGPTError as e: p.fails(f"seed {seed}", e); break
            losses = [q["loss"] for q in run["points"]]
            run |= dict(best=min(losses, default=None), last=losses[-1] if losses and not run["too_long"] else None)
            if losses: run["checked"] = evaluate(run["run"], "--device", p.device, limit=p.left())
            runs.append(run)
            say(f"seed {seed}: best {number(run['best'], '.4f')}, last {number(run['last'], '.4f')}, {run['process']:.1f} s")
            known = [r["best"] for r in runs if r["best"] is not None]
            p.report.save(runs=runs, ours=p.ours(p.a.best or BEST), summary=dict(
                mean=statistics.mean(known) if known else None, deviation=statistics.stdev(known) if len(known) > 1 else None, n=len(known), best=spread(known), parameters=run["parameters"], context=run["context"],
                mean_of_last=statistics.mean([r["last"] for r in runs]) if all(r["last"] is not None for r in runs) else None))
    rows = [[r["seed"], number(r["best"], ".4f"), number(r["last"], ".4f"), number(r.get("checked", {}).get("loss"), ".4f"), r["context"], number(r["parameters"], ","), number(r["process"])] for r in runs]
    s = p.report.content.get("summary", {})
    return table(["seed", "lowest loss", "last loss", "checked in float32", "context", "parameters", "process, s"], rows) + (
        f"\nmean of {s.get('n', 0)} seeds {number(s.get('mean'), '.4f')}, deviation {number(s.get('deviation'), '.4f')}; of the last evaluations {number(s.get('mean_of_last'), '.4f')}; whole validation split")


def mfu_part(p:Part) -> str:
    "Utilisation by nanogpt bench, each size in a process of its own."
    found, env = {}, child_env(PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    for name, (preset, batch_size) in SIZES.items():
        if p.a.dry_run: preset, batch_size = "tiny", 2
        say(f"utilisation at {name}")
        done = clock([sys.executable, "-c", MFU, preset, p.device, 0.05 if p.a.dry_run else 3, batch_size], env=env, limit=p.left())
        try: found[name] = json.loads(done.lines[-1][1])
        except (IndexError, ValueError): p.fails(f"utilisation at {name}", "the time was up" if done.too_long else done.last_words())
        if p.a.dry_run and name in found: found[name] |= dict(ceiling=FAKE, utilisation=found[name]["flops_per_second"] / FAKE, forward_utilisation=None)
        p.report.save(sizes=found)
    rows = [[name, *(number(f.get(k), form) for k, form in MEASURED.items()), number(f.get("ceiling", 0) / 1e12, ".1f"), f.get("dtype"), f.get("captured")] for name, f in found.items()]
    return table(["size", *(k.replace("_", " ") for k in MEASURED), "ceiling, TFLOP/s", "matrix products in", "step captured"], rows)


def lecture_part(p:Part) -> str:
    "The lecture's run and its curve."
    with tempfile.TemporaryDirectory(prefix="nanogpt-bench-", dir=p.a.tmp) as folder:
        run = train_ours(p.ours(LECTURE), folder, "lecture", SEED, p.more, p.left())
    if run["too_long"]: raise NanoGPTError("The lecture's run was ended when the time was up; give it more with --limit, or a part of its own.")
    last, lowest = run["rows"][-1], min(r["val_loss"] for r in run["rows"])
    whole = last.get("val_loss_whole_split", last["val_loss"] if run["config"].get("eval_iters") == 0 else None)
    p.report.save(run=run, summary=dict(steps=last["step"], val_loss=last["val_loss"], train_loss=last["train_loss"], lowest=lowest, whole_split=whole, process=run["process"], training=run["training"],
                                        eval_iters=run["config"].get("eval_iters"), curve=[[r["step"], r["train_loss"], r["val_loss"]] for r in run["rows"]]))
    return table(["step", "train loss", "val loss", "seconds"], [[r["step"], number(r["train_loss"], ".4f"), number(r["val_loss"], ".4f"), number(r["seconds"], ".1f")] for r in run["rows"]]) + (
        f"\nlecture: {number(last['val_loss'], '.4f')} at step {last['step']} (lowest {number(lowest, '.4f')}, whole split {number(whole, '.4f')}), {run['process']:.0f} s as a process")


def sampling_part(p:Part) -> str:
    "Writing, beside sample.py."
    ours, peer_args, tokens = sampling.OURS, p.peer_args, 2000
    if p.a.dry_run: ours, tokens = "-m nanogpt_nb.train --preset tiny --max-iters 1 --eval-iters 1 --sample-tokens 0 --wandb disabled", 24
    found = sampling.measure(p.peer, p.report, p.device, tokens, 1 if p.a.quick or p.a.dry_run else 3, ours, [w for w in peer_args if "iters" not in w and "interval" not in w], p.more, p.a.tmp, p.left)
    return sampling.tell(found)


PARTS = dict(time=time_part, best=best_part, mfu=mfu_part, lecture=lecture_part, sampling=sampling_part)


def check_gpu(a):
    "A sentence where there is no GPU to measure."
    import torch
    if a.dry_run or torch.cuda.is_available(): return
    raise ConfigError(f"bench/gpu.py measures a CUDA GPU, and torch {torch.__version__} finds none here; run it on a machine that has one, or see all of it go with --dry-run.")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"], help="what to measure (all)")
    p.add_argument("--quick", action="store_true", help="2 seeds, no cold run of nanoGPT, each process once")
    p.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model and a made-up ceiling: tries the harness, measures nothing")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--target", type=float, default=time_to_loss.TARGET["cuda"], help="loss over the whole validation split, for the part time")
    p.add_argument("--ours", default=None, metavar="WORDS", help=f"our command for the part time ({TIME})")
    p.add_argument("--best", default=None, metavar="WORDS", help=f"our command for the part best ({BEST})")
    p.add_argument("--limit", type=float, default=None, metavar="SECONDS", help="for all parts of this call together; shared out among them (" + ", ".join(f"{k} {v}" for k, v in LIMITS.items()) + ")")
    p.add_argument("--out", default=OUT, type=Path, metavar="DIR", help="folder for the JSON files")
    add_arguments(p)
    a = p.parse_args()
    if a.seeds < 1: p.error("--seeds is at least 1")
    check_gpu(a)
    asked = list(PARTS) if "all" in a.part else [name for name in PARTS if name in a.part]
    share = a.limit / sum(LIMITS[name] for name in asked) if a.limit else 1.
    peer = Peer(a.peer, tuple(a.data or ("tinyshakespeare",)), a.tmp) if a.peer else None
    failed = 0
    try:
        for name in asked:
            say(f"--- {name}, {LIMITS[name] * share:.0f} s at most")
            part = Part(name, a, peer, LIMITS[name] * share)
            try: print(f"\n{name}\n\n{PARTS[name](part)}\n", flush=True)
            except (NanoGPTError, LookupError, ValueError, TypeError, OSError) as e: part.fails(name, f"not measured ({(str(e) or repr(e)).splitlines()[0]})")
            failed += bool(part.report.content["errors"])
            say(f"figures in {part.report.path}")
    finally:
        if peer: peer.close()
    return 1 if failed else 0


if __name__ == "__main__": entry(main)
