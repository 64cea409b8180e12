"""How long, as a whole process, until the loss over the whole validation split is at a target?

    python bench/time_to_loss.py --peer DIR                          # 5 seeds of ours, in turn with nanoGPT's CPU command
    python bench/time_to_loss.py --seeds 3 --target 1.62 --ours "-m nanogpt_nb.cli train --preset cpu --wandb disabled"
    python bench/time_to_loss.py --device cuda --peer DIR            # the target is 1.4697, the commands are those for a GPU

ours      wall seconds from the start of the process until it has exited: imports, text, training, our own evaluations over
          the whole validation split, checkpoints. It counts if the run's own evaluation was at or below the target at some
          step; a run that never was is a miss, and a miss is larger than every time.
known     wall seconds from the start until the first such evaluation stood on the terminal.
training  the run's own seconds: its steps and its evaluations, without imports and checkpoints.
nanoGPT   wall seconds of its whole process, whatever loss it ends with; beside it the moment at which its own estimate (a
          mean over random batches) first was at or below the target, and the loss of its checkpoint over the whole split,
          with its own context length, by our code, after the clock has stopped.
paired    each run of ours is compared with the peer's run next to it; the two sides take turns at going first.
checked   the best checkpoint of ours is evaluated again in float32 after the clock has stopped (--no-check: not).
floor     operations of the steps up to the target (6 for each number in a matrix and token, and attention), over what a large
          matrix product does a second on this device just before: no run of that many tokens can be quicker. Evaluation and
          the optimiser come on top.

The table goes to standard output, the figures to a JSON file in --out. The exit status is 1 where a run missed the target.
"""
import argparse
import tempfile
import time
from pathlib import Path

from harness import OUT, NanoGPTError, Report, ceilings, entry, evaluate, first_at, flops_per_token, number, ratio, say, spread, table, train_ours
from peer import SEED, Peer, add_arguments

OURS = dict(cpu="-m nanogpt_nb.cli train --preset speedrun-cpu --device cpu --wandb disabled",
            cuda="-m nanogpt_nb.cli train --preset speedrun-gpu --device cuda --wandb disabled")
TARGET = dict(cpu=1.88, cuda=1.4697)
VOCABULARY = 65


def one_of_ours(words, seed, name, runs, target, check=True, device="cpu", more=(), limit=None, env=None) -> dict:
    "A run of ours, and when it reached the target."
    run = train_ours(words, runs, name, seed, more, limit, env)
    at = first_at(run["points"], target)
    c = run["config"]
    if run["too_long"]: at = None                                                  # it was ended by us: no whole process
    run |= dict(reached=at is not None, known=at and at["wall"], loss=at and at["loss"], final=run["points"][-1]["loss"] if run["points"] else None, tokens=at and at["tokens"])
    if at and at["tokens"] and c: run["flops"] = at["tokens"] * flops_per_token(**{k: c[k] for k in ("n_layer", "n_embd", "block_size", "mlp")}, vocab_size=VOCABULARY)
    if check and run["points"]: run["checked"] = evaluate(run["run"], "--device", device, limit=limit or 300)
    if not run["points"]: run["why"] = "it made no evaluation over the whole validation split (--eval-iters 0 makes them)"
    said = "took longer than the limit" if run["too_long"] else f"{run['process']:.1f} s, " + (f"{at['loss']:.4f} known after {at['wall']:.1f} s" if at else f"missed {target:g} ({run.get('why') or number(run['final'], '.4f')})")
    say(f"ours, seed {seed}: {said}")
    return run


def turns(seeds:int, peer_seeds:int, number_of_round:int) -> list:
    "Who runs when in a round: ('ours' or 'peer', which), in turn, the first changing from round to round."
    order = []
    for i in range(max(seeds, peer_seeds)):
        pair = [("ours", i)] * (i < seeds) + [("peer", i)] * (i < peer_seeds)
        order += pair if (i + number_of_round) % 2 == 0 else pair[::-1]
    return order


def summary(runs, theirs, target, ceiling) -> dict:
    "Medians and ratios. A run pairs with the peer's run of its round that was nearest to it in order."
    for run in runs:
        same = [p for p in theirs if p["round"] == run["round"]] or theirs
        run["pair"] = min(same, key=lambda p: abs(p["order"] - run["order"]))["process"] if same else None
    of = lambda key: spread(r[key] if r["reached"] else None for r in runs)
    found = dict(target=target, ours=of("process"), known=of("known"), training=of("training"), peer=spread(p["process"] for p in theirs),
                 misses=sum(not r["reached"] for r in runs), final=spread(r["final"] for r in runs))
    found["ratio_of_medians"] = ratio(found["peer"]["median"], found["ours"]["median"])
    found["paired_ratios"] = [(ratio(r["pair"], r["process"]) if r["reached"] else 0.) for r in runs if r["pair"]]
    found["median_of_paired_ratios"] = spread(found["paired_ratios"])["median"]
    found["peer_whole_split"] = spread(p["whole_split"].get("loss") for p in theirs)
    flops = spread(r["flops"] for r in runs if r.get("flops"))["median"]
    found["floor"] = dict(flops=flops, **{f"seconds_{k}": flops / v for k, v in ceiling.items() if k in ("float32", "bfloat16") and flops}, ceiling=ceiling)
    return found


def tell(found, runs, theirs) -> str:
    "The tables."
    c = found["floor"]["ceiling"]
    rows = [[f"ours, seed {r['seed']}", number(r["process"]) if r["reached"] else f"missed, {number(r['process'])}", number(r["known"]), number(r["training"]), number(r["loss"], ".4f"), number(r["final"], ".4f"),
             number((r.get("checked") or {}).get("loss"), ".4f"), r["context"], number(r["tokens"], ","), number(r.get("flops"), ".2e"),
             number(ratio(r.get("flops"), c.get("float32"))), number(ratio(r.get("flops"), c.get("bfloat16"))), number(ratio(r["pair"], r["process"]) if r["reached"] else None, ".1f")] for r in runs]
    rows += [[f"nanoGPT, seed {p['seed']}", number(p["process"]), number(p["estimate_reached"]), "–", "–", number(p["estimate"], ".4f") + " (own)", number(p["whole_split"].get("loss"), ".4f"), p["whole_split"].get("context", "–"),
              number(p.get("tokens"), ","), number(p.get("flops"), ".2e"), number(ratio(p.get("flops"), c.get("float32"))), number(ratio(p.get("flops"), c.get("bfloat16"))), "1"] for p in theirs]
    head = ["run", "process, s", "known, s", "training, s", "loss then", "last loss", "checked", "context", "tokens", "FLOPs", "floor fp32, s", "floor bf16, s", "ratio"]
    took = lambda x: "missed" if x is None else f"{x:.2f} s"
    side = lambda name, s: f"{name}: median {took(s['median'])}, from {took(s['min'])} to {took(s['max'])} ({s['n']} run{'s' * (s['n'] != 1)})"
    lines = [table(head, rows), "", side(f"ours, whole process to {found['target']:g}", found["ours"]) + (f", {found['misses']} missed" if found["misses"] else "")]
    if theirs:
        if runs and (theirs[0]["whole_split"].get("context") or runs[0]["context"]) != runs[0]["context"]: lines.append("the two sides have different contexts: their losses do not compare")
        lines += [side("nanoGPT, whole process", found["peer"]), f"ratio of medians {number(found['ratio_of_medians'], '.1f', 'none: missed')}, median of paired ratios {number(found['median_of_paired_ratios'], '.1f')}",
                  "nanoGPT, " + theirs[0]["protocol"]]
    if runs: lines.append(f"ours: every evaluation over the whole validation split, context {runs[0]['context']}, the moment known by {runs[0]['known_by']}")
    if "float32" in c: lines.append(f"ceiling: {c['float32'] / 1e9:,.0f} GFLOP/s in float32, {c.get('bfloat16', 0) / 1e9:,.0f} in bfloat16" + (" (not measured: a stand-in)" if c.get("fake") else ""))
    else: lines.append(c.get("error") or c.get("float32_error") or "")
    return "\n".join(lines)


def peer_flops(run):
    "Tokens and operations of nanoGPT's run, where its checkpoint says enough."
    w = run["whole_split"]
    if not all(k in w for k in ("max_iters", "batch_size", "context", "n_layer", "n_embd", "vocab_size")): return {}
    tokens = w["max_iters"] * w["batch_size"] * w["context"]
    return dict(tokens=tokens, flops=tokens * flops_per_token(w["n_layer"], w["n_embd"], w["context"], w["vocab_size"]))


def whole_runs(run, report) -> list:
    "The peer's run, unless it was ended by us: then there is no whole process to compare with, and that is said."
    if run["too_long"]: report.save(peer_unfinished=f"nanoGPT was ended after {run['process']:.0f} s, when the time was up"); say(report.content["peer_unfinished"]); return []
    say(f"nanoGPT: {run['process']:.1f} s, whole split {number(run['whole_split'].get('loss'), '.4f')}")
    return [run | peer_flops(run)]


def compare(ours:str, peer, report:Report, target:float, device="cpu", seeds=5, peer_seeds=1, rounds=1, check=True, peer_args=(), ceiling=None, more=(), deadline=None, tmp=None, env=None,
            train_peer=None, # called with a seed and the seconds left, instead of the peer's train
            on_error=None) -> dict: # called with what failed and why; None: the error is raised
    "Run both sides in turn; the summary. `deadline`: a moment (time.monotonic) after which nothing new begins and what runs is ended."
    ceiling = ceilings(device) if ceiling is None else ceiling
    train_peer = train_peer or (lambda seed, left: peer.train(which, peer_args, seed, left, env, device, target))
    runs, theirs, left, which = [], [], lambda: None if deadline is None else deadline - time.monotonic(), "cpu" if device == "cpu" else "gpu"
    found = summary(runs, theirs, target, ceiling)
    order = [(r, *turn) for r in range(rounds) for turn in turns(seeds, peer_seeds if peer else 0, r)]
    with tempfile.TemporaryDirectory(prefix="nanogpt-bench-", dir=tmp) as folder:
        for k, (r, side, i) in enumerate(order):
            if deadline is not None and left() < 5:
                report.save(unfinished=f"the time was up before {len(order) - k} of {len(order)} runs"); say(report.content["unfinished"])
                break
            about = dict(round=r, order=k)
            try:
                if side == "ours": runs.append(one_of_ours(ours, SEED + i, f"round-{r}-seed-{SEED + i}", folder, target, check, device, more, left(), env) | about)
                else: theirs += whole_runs(train_peer(SEED + i, left()) | about, report)
            except NanoGPTError as e:
                if on_error is None: raise
                on_error(f"{side}, seed {SEED + i}", e)
            found = summary(runs, theirs, target, ceiling)
            report.save(summary=found, runs=runs, peer=theirs, peer_notes=peer.notes if peer else [])
    report.save(summary=found, runs=runs, peer=theirs)
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ours", default=None, metavar="WORDS", help=f"our command; --seed, --name and --runs-dir are added to it ({OURS['cpu']})")
    p.add_argument("--target", type=float, default=None, help="loss over the whole validation split (1.88 on a CPU, 1.4697 on a GPU)")
    p.add_argument("--device", choices=OURS, default="cpu", help="which commands, and what the ceiling is measured on")
    p.add_argument("--seeds", type=int, default=5, help="runs of ours in a round, each with a seed of its own")
    p.add_argument("--peer-seeds", type=int, default=1, help="runs of the peer in a round; the first has its own seed, the others differ from it in that one line of its train.py")
    p.add_argument("--rounds", type=int, default=1, help="how often all that")
    p.add_argument("--no-check", dest="check", action="store_false", help="do not evaluate our checkpoints again")
    p.add_argument("--label", default=None, help="what this measures, kept in the JSON file")
    p.add_argument("--out", default=OUT, type=Path, metavar="DIR", help="folder for the JSON file")
    add_arguments(p)
    a = p.parse_args()
    if min(a.seeds, a.rounds) < 1 or a.peer_seeds < 1: p.error("--seeds, --peer-seeds and --rounds are at least 1")
    target, words = a.target if a.target is not None else TARGET[a.device], a.ours or OURS[a.device]
    more = ("--data", *a.data) if a.data else ()
    peer = Peer(a.peer, tuple(a.data or ("tinyshakespeare",)), a.tmp) if a.peer else None
    try:
        report = Report(a.out, "time_to_loss", a.device, target=target, ours=words, label=a.label, trial=bool(a.peer_args or a.data))
        found = compare(words, peer, report, target, a.device, a.seeds, a.peer_seeds, a.rounds, a.check, a.peer_args.split(), None, more, tmp=a.tmp)
    finally:
        if peer: peer.close()
    print(tell(found, report.content["runs"], report.content["peer"]))
    say(f"figures in {report.path}")
    return 0 if not found["misses"] else 1


if __name__ == "__main__": entry(main)
