"""Which loss over the whole validation split does a whole process of ours reach in the peer's own time?

    python bench/loss_at_time.py --peer DIR                # the time is that of nanoGPT's CPU command, measured now
    python bench/loss_at_time.py --seconds 112 --seeds 3   # or given

Two short runs say what a process takes before its first step and what a step takes; from that comes --max-iters for a run
that fills the time, less --margin. Each of these runs evaluates equally often, --evaluations times after step 0, so that what
an evaluation costs is in the first number. The schedule of the learning rate ends with the run, so the loss that counts is the last
one. A run that took longer than the time all the same is reported as such, with the loss of the last evaluation inside it.
nanoGPT's loss is its own estimate, and beside it that of its checkpoint over the whole split (see bench/time_to_loss.py).
"""
import argparse
import tempfile
from pathlib import Path

from harness import OUT, NanoGPTError, Report, entry, number, say, spread, table, train_ours
from peer import SEED, Peer, add_arguments

OURS = dict(cpu="-m nanogpt_nb.cli train --preset cpu --device cpu --wandb disabled", cuda="-m nanogpt_nb.cli train --preset modern --device cuda --wandb disabled")
STEPS = dict(cpu=(20, 80), cuda=(100, 500))                                        # of the two short runs


def line_through(first, second) -> tuple[float, float]:
    "Seconds before the first step and seconds a step, from two (steps, seconds)."
    (n, s), (m, t) = first, second
    each = (t - s) / (m - n)
    if each <= 0: raise NanoGPTError(f"The calibration makes no sense: {m} steps took {t:.1f} s and {n} steps {s:.1f} s; let this machine be quiet, or give more steps with --calibrate.")
    return max(0., s - n * each), each


def steps_for(seconds:float, before:float, each:float, margin:float) -> int:
    "The steps that fill `seconds`, less a margin."
    steps = int((seconds * (1 - margin) - before) / each)
    if steps < 1: raise NanoGPTError(f"{seconds:g} s is too short: {before:.1f} s pass before the first step, and a step takes {each:.2f} s; give more --seconds.")
    return steps


def lasting(steps:int, evaluations:int) -> list[str]:
    "Flags for a run of so many steps that evaluates so often, besides at step 0."
    return ["--max-iters", str(steps), "--eval-interval", str(-(-steps // evaluations))]


def calibrate(words, folder, counts, evaluations, more=()) -> dict:
    "Two short runs as whole processes."
    took = [train_ours(words, folder, f"calibration-{n}", SEED, [*more, *lasting(n, evaluations)])["process"] for n in counts]
    before, each = line_through(*zip(counts, took))
    say(f"calibration: {before:.1f} s before the first step, {each * 1e3:.1f} ms a step")
    return dict(steps=list(counts), seconds=took, before=before, each=each)


def judge(run:dict, seconds:float) -> dict:
    "Whether the process fitted into the time, and the loss that counts."
    inside = [p for p in run["points"] if p["wall"] <= seconds]
    fitted = run["process"] <= seconds and not run["too_long"]
    point = (run["points"] if fitted else inside)[-1:]
    return run | dict(fitted=fitted, loss=point[0]["loss"] if point else None, at_step=point[0]["step"] if point else None)


def tell(seconds, runs, theirs, cal) -> str:
    "The table."
    rows = [[f"ours, seed {r['seed']}", r["config"].get("max_iters", "–"), number(r["process"]), "yes" if r["fitted"] else "NO: the loss is that of the last evaluation inside the time", number(r["loss"], ".4f"), r["context"]] for r in runs]
    rows += [[f"nanoGPT, seed {p['seed']}", "–", number(p["process"]), "it is the time", f"{number(p['whole_split'].get('loss'), '.4f')} (own estimate {number(p['estimate'], '.4f')})", p["whole_split"].get("context", "–")] for p in theirs]
    s = spread(r["loss"] for r in runs)
    lines = [table(["run", "steps", "process, s", "inside the time", "loss over the whole split", "context"], rows), "",
             f"loss after {seconds:.1f} s: median {number(s['median'], '.4f')}, from {number(s['min'], '.4f')} to {number(s['max'], '.4f')} ({s['n']} run(s))",
             f"calibration: {cal['steps'][0]} steps in {cal['seconds'][0]:.1f} s, {cal['steps'][1]} in {cal['seconds'][1]:.1f} s"]
    return "\n".join(lines + (["nanoGPT, " + theirs[0]["protocol"]] if theirs else []))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ours", default=None, metavar="WORDS", help=f"our command; --max-iters, --eval-interval, --seed, --name and --runs-dir are added to it ({OURS['cpu']})")
    p.add_argument("--seconds", type=float, default=None, help="the time, if it is not to be measured with --peer")
    p.add_argument("--device", choices=OURS, default="cpu")
    p.add_argument("--seeds", type=int, default=3, help="runs of ours")
    p.add_argument("--calibrate", type=int, nargs=2, default=None, metavar=("FEW", "MORE"), help="steps of the two short runs (20 80 on a CPU)")
    p.add_argument("--evaluations", type=int, default=2, help="over the whole split in each run, besides that at step 0; a run that takes too long counts with the last one inside the time")
    p.add_argument("--margin", type=float, default=0.04, help="part of the time to leave free")
    p.add_argument("--out", default=OUT, type=Path, metavar="DIR", help="folder for the JSON file")
    add_arguments(p)
    a = p.parse_args()
    if (a.seconds is None) == (a.peer is None): p.error("say the time with --seconds, or let it be measured with --peer")
    counts = a.calibrate or STEPS[a.device]
    if not 1 <= a.evaluations <= counts[0] < counts[1]: p.error("--calibrate takes two numbers of steps, few and more, and few is at least --evaluations, which is at least 1")
    words, theirs, runs, more = a.ours or OURS[a.device], [], [], ["--data", *a.data] if a.data else []
    report = Report(a.out, "loss_at_time", a.device, ours=words, trial=bool(a.peer_args or a.data))
    if a.peer:
        with Peer(a.peer, tuple(a.data or ("tinyshakespeare",)), a.tmp) as peer:
            theirs = [peer.train("cpu" if a.device == "cpu" else "gpu", a.peer_args.split(), evaluate_on=a.device)]
    seconds = a.seconds or theirs[0]["process"]
    say(f"the time is {seconds:.1f} s")
    with tempfile.TemporaryDirectory(prefix="nanogpt-bench-", dir=a.tmp) as folder:
        cal = calibrate(words, folder, counts, a.evaluations, more)
        steps = steps_for(seconds, cal["before"], cal["each"], a.margin)
        for seed in range(SEED, SEED + a.seeds):
            run = judge(train_ours(words, folder, f"seed-{seed}", seed, [*more, *lasting(steps, a.evaluations)]), seconds)
            say(f"ours, seed {seed}: {steps} steps, {run['process']:.1f} s, {number(run['loss'], '.4f')}" + ("" if run["fitted"] else ", longer than the time"))
            runs.append(run)
            report.save(seconds=seconds, steps=steps, calibration=cal, runs=runs, peer=theirs, summary=dict(loss=spread(r["loss"] for r in runs), overran=sum(not r["fitted"] for r in runs)))
    print(tell(seconds, runs, theirs, cal))
    say(f"figures in {report.path}")


if __name__ == "__main__": entry(main)
