"""Makes bench/RESULTS.md and its chart from the JSON files that the other scripts have written.

    python bench/results.py                        # of bench/out and bench/figures
    python bench/results.py --figures DIR --to DIR

For each figure the newest file that has it counts. Trials (--dry-run, --quick, --peer-args, --data) never count. What no file has
is "not measured", and a target that was not met says so. The files that count are kept in bench/figures.
"""
import argparse
import json
from pathlib import Path

from harness import OUT, ConfigError, entry, number, say, table

HERE = Path(__file__).resolve().parent


def keep(files, kept, new):
    "Have what counts, and nothing else, in the folder of kept figures."
    from nanogpt_nb.config import write_whole
    kept.mkdir(exist_ok=True)
    names = {d["file"] for d in files}
    for name in names:
        if not (kept/name).exists(): write_whole(kept/name, (new/name).read_bytes())
    for path in kept.glob("*.json"):
        if path.name not in names: path.unlink()


def read(*folders) -> list[dict]:
    "The figures in some folders, newest first, without the trials."
    found = []
    for path in sorted({path.name: path for folder in folders for path in Path(folder).glob("*.json")}.values()):
        try: d = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e: say(f"{path} is passed over: it cannot be read ({e})"); continue
        if isinstance(d, dict) and "kind" in d and not any(d.get(k) for k in ("trial", "dry_run", "quick")): found.append(d | dict(file=path.name))
    return sorted(found, key=lambda d: d.get("date", ""), reverse=True)


def get(d, *keys):
    "A value in nested objects, or None."
    for k in keys:
        d = d.get(str(k)) if isinstance(d, dict) else None
    return d


class Figure:
    "What is promised, and where it is found."
    def __init__(self, group, name, target, met, find, form, kinds, where=lambda d: True, note=lambda d: "", needs="a CUDA GPU"):
        self.group, self.name, self.target, self.met, self.find, self.form, self.kinds, self.where, self.note, self.needs = group, name, target, met, find, form, kinds, where, note, needs

    def newest(self, files) -> dict|None: return next((d for d in files if d["kind"] in self.kinds and d["device"] == self.group and self.where(d) and self.find(d) is not None), None)

    def row(self, files) -> list[str]:
        d = self.newest(files)
        if d is None: return [self.name, self.target, f"not measured{': needs ' + self.needs if self.group == 'cuda' else ''}", "–", "–", "–"]
        v = self.find(d)
        return [self.name, self.target, self.form(v), "yes" if self.met(v, d) else "**no**", self.note(d), f"{d['date'][:10]} {d['file']}"]


times = lambda v: f"{v:.1f}×" if v else "missed"
loss = lambda v: f"{v:.4f}"
seconds = lambda v: f"{v:.2f} s" if v < float("inf") else "missed"
percent = lambda v: f"{v:.1%}"
at_least = lambda x: lambda v, d: v >= x
at_most = lambda x: lambda v, d: v <= x


def paired(d) -> str:
    "How a ratio of times came about."
    s = d["summary"]
    took = lambda x: "missed" if x is None else f"{x:.1f} s"
    one = lambda x: f"{took(x['median'])} ({took(x['min'])} to {took(x['max'])}, {x['n']} run{'s' * (x['n'] != 1)})"
    floor = [f"{k.removeprefix('seconds_')} {v:.2f} s" for k, v in s["floor"].items() if k.startswith("seconds_")]
    parts = [f"ours {one(s['ours'])}" + (f", {s['misses']} missed" if s["misses"] else ""), f"nanoGPT {one(s['peer'])}", f"median of paired ratios {number(s['median_of_paired_ratios'], '.1f')}"]
    if d.get("cold_ratio"): parts.append(f"cold: {d['cold_ratio']:.1f}×")
    return "; ".join(parts + ([f"floor of the steps: {', '.join(floor)}"] if floor else []))


def writing(d) -> str:
    f = d["sampling"]
    return f"{f['tokens']:,} characters; ours {number(get(f, 'ours_per_second', 1), ',.0f')}/s, as a batch of 16 {number(get(f, 'ours_per_second', 16), ',.0f')}/s, nanoGPT {number(f['peer_per_second'], ',.0f')}/s; whole processes {number(f['process_ratio'], '.1f')}×"


def utilisation(size): return lambda d: get(d, "sizes", size, "utilisation")
def about_utilisation(size): return lambda d: f"ceiling {get(d, 'sizes', size, 'ceiling') / 1e12:,.0f} TFLOP/s, {get(d, 'sizes', size, 'training'):,.0f} tokens/s"


is_target = lambda x: lambda d: abs((d.get("target") or get(d, "summary", "target") or 0) - x) < 1e-9
TIMES, SAMPLING = ("time_to_loss", "gpu-time"), ("sampling", "gpu-sampling")
def median_of(key):
    "The median of a summary; infinite where it was missed."
    def find(d):
        s = get(d, "summary", key) or {}
        return float("inf") if s.get("n") and s.get("median") is None else s.get("median")
    return find


ratio_of_medians = lambda d: 0. if median_of("ours")(d) == float("inf") else get(d, "summary", "ratio_of_medians")
over = lambda d: ", context {}".format(d["runs"][0]["context"]) if d.get("runs") else ""
FIGURES = [
    Figure("cpu", "time to 1.88, whole process, beside nanoGPT's CPU command", "10× (aim 15×)", at_least(10), ratio_of_medians, times, TIMES, is_target(1.88), paired),
    Figure("cpu", "loss over the whole split in nanoGPT's own time", "1.55 or lower", at_most(1.55), lambda d: get(d, "summary", "loss", "median"), loss, ("loss_at_time",),
           note=lambda d: f"{d['seconds']:.0f} s, {d['steps']} steps, {d['summary']['loss']['n']} seed(s) from {number(d['summary']['loss']['min'], '.4f')} to {number(d['summary']['loss']['max'], '.4f')}, {d['summary']['overran']} took longer{over(d)}"
                + (f"; nanoGPT {number(get(d['peer'][0], 'whole_split', 'loss'), '.4f')} (own estimate {number(d['peer'][0]['estimate'], '.4f')})" if d.get("peer") else "")),
    Figure("cpu", "`nanogpt train`: its time, as a whole process", "about a minute (75 s)", at_most(75), median_of("ours"), seconds, TIMES, is_target(1.62), lambda d: f"to a loss of 1.62 or lower; {d['summary']['ours']['n']} seeds"),
    Figure("cpu", "`nanogpt train`: its last loss", "1.62 or lower", at_most(1.62), lambda d: get(d, "summary", "final", "median"), loss, TIMES, is_target(1.62), lambda d: f"whole split{over(d)}, {d['summary']['misses']} missed"),
    Figure("cpu", "sampling, 10.8M, one text, beside nanoGPT's sample.py", "10×", at_least(10), lambda d: get(d, "sampling", "writing_ratio", 1), times, SAMPLING, note=writing),
    Figure("cpu", "sampling, 10.8M, a batch of 16", "40×", at_least(40), lambda d: get(d, "sampling", "writing_ratio", 16), times, SAMPLING, note=writing),
    Figure("cuda", "time to 1.4697, whole process, beside nanoGPT's GPU command", "20×", at_least(20), ratio_of_medians, times, TIMES, is_target(1.4697), paired),
    Figure("cuda", "time to 1.4697, training alone", "under 6 s", lambda v, d: v < 6, median_of("training"), seconds, TIMES, is_target(1.4697), lambda d: f"steps and evaluations, without imports and checkpoints; {d['summary']['misses']} missed"),
    Figure("cuda", "best loss over the whole split, mean of 5 seeds, 10.8M or fewer", "1.38 or lower", lambda v, d: v <= 1.38 and d["summary"]["n"] >= 5 and d["summary"]["parameters"] < 10.85e6, lambda d: get(d, "summary", "mean"), loss, ("gpu-best",),
           note=lambda d: f"{d['summary']['n']} seeds, deviation {number(d['summary']['deviation'], '.4f')}, {d['summary']['parameters']:,} parameters, context {d['summary']['context']}; the lowest of each run's evaluations, of the last {number(d['summary']['mean_of_last'], '.4f')}"),
    Figure("cuda", "model FLOPs utilisation at 10.8M", "50%", at_least(0.5), utilisation("10.8M"), percent, ("gpu-mfu",), note=about_utilisation("10.8M")),
    Figure("cuda", "model FLOPs utilisation at 124M, context 1024", "60%", at_least(0.6), utilisation("124M"), percent, ("gpu-mfu",), note=about_utilisation("124M")),
    Figure("cuda", "the lecture's own run", "1.48", at_most(1.485), lambda d: get(d, "summary", "lowest"), loss, ("gpu-lecture",),
           note=lambda d: f"lowest of its own estimates ({d['summary']['eval_iters']} random batches), last {number(d['summary']['val_loss'], '.4f')}, whole split {number(d['summary']['whole_split'], '.4f')}, {d['summary']['process']:.0f} s as a process"),
    Figure("cuda", "sampling, 10.8M, one text, beside nanoGPT's sample.py", "20×", at_least(20), lambda d: get(d, "sampling", "writing_ratio", 1), times, SAMPLING, note=writing),
]
TITLES = dict(cpu="On a CPU", cuda="On a GPU")


def used(files) -> list[dict]:
    "The files whose figures are in the tables."
    return list({d["file"]: d for f in FIGURES if (d := f.newest(files))}.values())


def machine(d) -> str:
    m, v = d["machine"], d["versions"]
    commit = v.get("commit") or "unknown"                                          # + at its end: with changes
    return "; ".join([f"{m['cpu']}, {m['cores']} cores" + (f", load {m['load']:g} before" if m.get("load") is not None else ""), *m.get("gpu", []), m["system"], f"Python {v.get('python')}, torch {v.get('torch')}, nanogpt_nb {v.get('nanogpt_nb')}, commit {commit[:12]}{'+' * commit.endswith('+')}"])


def protocols(d) -> list[str]:
    "What a file's figures mean."
    lines = [f"`{d['command']}`", machine(d)]
    if d.get("ours"): lines.append(f"ours: `{d['ours']}`")
    if d.get("peer") and isinstance(d["peer"], list): lines += [f"nanoGPT: `{d['peer'][0]['command']}`, {d['peer'][0]['protocol']}", *d["peer"][0].get("notes", [])]
    lines += [d[k] for k in ("unfinished", "peer_unfinished") if d.get(k)] + list(d.get("errors", []))
    return lines


def write_up(files, chart=None) -> str:
    "The text of RESULTS.md."
    parts = ["# Results", "Figures of the scripts in this folder, made by `python bench/results.py` from their files. Ratios are against karpathy/nanoGPT, run in turn on the same machine, text and split. "
             "A time is that of a whole process, imports and evaluations included; a loss is over the whole validation split (the last tenth of tiny Shakespeare), each character but the first predicted once in windows of the context length that is named. The settings of our presets were chosen by this same loss; nanoGPT's are its own."]
    for group, title in TITLES.items():
        parts += [f"## {title}", table(["figure", "target", "measured", "met", "how", "of"], [f.row(files) for f in FIGURES if f.group == group])]
    if chart: parts.append(f"![Loss against wall seconds, ours and nanoGPT's, of each process from its start]({chart})")
    parts.append("## Protocol and machines" if used(files) else "Nothing is measured yet.")
    for d in used(files): parts.append(f"**{d['file']}**, {d['date']}\n\n" + "\n".join(f"- {line}" for line in protocols(d)))
    return "\n\n".join(parts) + "\n"


def draw(files, path) -> bool:
    "Loss against wall seconds, a panel a device; whether there was something to draw."
    shown = [d for group in TITLES if (d := next((f for f in files if f["kind"] in TIMES and f["device"] == group and f.get("runs") and f.get("peer")), None))]
    if not shown: return False
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        from matplotlib.ticker import LogLocator
    except ImportError as e: say(f"no chart: {e}; pip install matplotlib"); return False
    figure, panels = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 3.4), squeeze=False, layout="constrained")
    for ax, d in zip(panels[0], shown):
        alone = next((f["runs"] for f in files if f["kind"] in TIMES and f["device"] == d["device"] and f.get("runs") and not f.get("peer")), [])
        for side, colour, name in ((d["peer"], "#777777", "nanoGPT (its own estimate)"), (d["runs"], "#0072B2", "ours (whole split)"), (alone, "#009E73", "ours, nanogpt train")):
            for i, run in enumerate(side): ax.plot([p["wall"] for p in run["points"]], [p["loss"] for p in run["points"]], ".-", color=colour, lw=1.2, ms=4, label=f"{name}, {len(side)} run{'s' * (len(side) > 1)}" if not i else None)
        ax.axhline(d["target"], color="#D55E00", lw=1, ls="--", label=f"target {d['target']:g}")
        ax.set_xscale("log"); ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5))); ax.xaxis.set_major_formatter("{x:g}"); ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("seconds since the process began (log)"); ax.set_ylabel("validation loss, nats")
        ax.set_title(TITLES[d["device"]], fontsize=10, loc="left"); ax.grid(alpha=0.25, which="both"); ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--figures", default=None, type=Path, metavar="DIR", help="folder with new JSON files (bench/out, where there is one)")
    p.add_argument("--to", default=HERE, type=Path, metavar="DIR", help="folder for RESULTS.md and results.png (bench)")
    a = p.parse_args()
    if not a.to.is_dir(): raise ConfigError(f"--to {a.to} is not a folder; make it, or give another.")
    kept, new = a.to/"figures", a.figures or OUT
    if not new.is_dir() and (a.figures or not kept.is_dir()): raise ConfigError(f"There are no figures in {new}; measure some, for instance with python bench/time_to_loss.py --peer DIR.")
    files = read(kept, new)
    keep(used(files), kept, new)
    chart = "results.png" if draw(files, a.to/"results.png") else None
    text = write_up(files, chart)
    (a.to/"RESULTS.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__": entry(main)
