"""How long does the history of many runs take?

    python bench/history.py                 # 1,000 runs with 300 rows of metrics each
    python bench/history.py --runs 5000 --old

Run folders as training leaves them are written to a temporary folder (--tmp, or kept in --keep) and listed by the
process `nanogpt runs`, from its start to its end. The table has the best and the median of --times, the least time on a
processor (all that counts where others use the machine), and how often `nanogpt --version` fits into the best.
--old: status.json without the figures, so that every metrics.jsonl has to be read.
"""
import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.history import runs

STATES = ["finished"] * 12 + ["stopped"] * 3 + ["failed"] * 2 + ["running", "killed", "starting"]


def make_runs(folder, count, rows=300, seed=0, old=False):
    "Write `count` runs with `rows` rows of metrics to `folder`: one in fifteen an estimate, the rest progress."
    r = random.Random(seed)
    for i in range(count):
        config = NanoGPTConfig.preset(r.choice(["cpu", "modern", "nanogpt", "ladder"])).replace(
            learning_rate=float(f"{10 ** r.uniform(-4, -1.5):.2g}"), n_layer=r.choice([2, 4, 6, 8]), seed=r.randrange(100))
        c, state, gpu = config, r.choice(STATES), r.random() < 0.4
        created = f"2026-{1 + i // 28 % 12:02}-{1 + i % 28:02}T{r.randrange(24):02}:{r.randrange(60):02}:{r.randrange(60):02}+00:00"
        about = dict(config=json.loads(config.to_json()), created=created, host=r.choice(["laptop", "desk", "192-222-50-1"]),
                     device="NVIDIA H100 PCIe" if gpu else "cpu, 2 threads", parameters=12 * c.n_layer * c.n_embd ** 2 + 130 * c.n_embd, git_commit=f"{r.getrandbits(160):040x}",
                     versions=dict(python="3.11.7", nanogpt_nb="0.1.0", torch="2.9.1", numpy="2.4.0"), corpus=dict(name="tinyshakespeare", sha256="86c4e6aa9db7c042", note=""))
        if r.random() < 0.3: about["group"] = r.choice(["rates", "widths"])
        if gpu: about["price_per_hour"] = 2.49
        run = Path(folder)/f"{r.choice(['adamw', 'muon', 'wide', 'deep', 'baseline'])}-{i:04}"
        run.mkdir(parents=True)
        (run/"config.json").write_text(json.dumps(about, indent=2))
        done, floor, speed = r.uniform(0.3, 1) if state != "finished" else 1, r.uniform(1.4, 2.2), r.uniform(2e4, 4e5) * (3 if gpu else 0.2)
        lines, best = [], math.inf
        for k in range(rows):
            step = round(c.max_iters * done * k / max(1, rows - 1))
            tokens = step * c.batch_size * c.block_size
            loss = floor + 2.7 * math.exp(-6 * step / c.max_iters) + r.gauss(0, 0.02)
            row = dict(step=step, tokens=tokens, seconds=tokens / speed, learning_rate=c.learning_rate, tokens_per_second=speed * r.uniform(0.95, 1.05), utilisation=r.uniform(0.8, 1))
            row |= dict(train_loss=loss - 0.1, val_loss=loss) if k % 15 == 0 or k == rows - 1 else dict(loss=loss)
            best = min(best, row.get("val_loss", math.inf))
            lines.append(json.dumps(row))
        (run/"metrics.jsonl").write_text("\n".join(lines) + "\n")
        said = "running" if state == "killed" else state
        figures = {} if old else dict(val_loss=best, tokens_per_second=speed, seconds=row["seconds"])
        status = dict(state=said, pid=1 << 22, host=about["host"], heartbeat=time.time() - 10 * (state == "running"), step=row["step"]) | figures
        (run/"status.json").write_text(json.dumps(status, indent=2))
        (run/"samples.txt").write_text(f"--- step {row['step']}\nROMEO:\nI will not sing of {run.name}.\n")


def measure(words, times):
    "Seconds that the process `nanogpt WORDS` takes, by the clock and on a processor, `times` times."
    def once():
        start, before = time.perf_counter(), sum(os.times()[2:4])
        subprocess.run([sys.executable, "-m", "nanogpt_nb.cli", *map(str, words)], stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start, sum(os.times()[2:4]) - before
    once()
    return zip(*(once() for _ in range(times)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=1000)
    p.add_argument("--rows", type=int, default=300, help="rows of metrics a run")
    p.add_argument("--times", type=int, default=7)
    p.add_argument("--old", action="store_true", help="runs whose status.json has no figures")
    p.add_argument("--tmp", default=None, help="folder for the runs")
    p.add_argument("--keep", default=None, help="folder to write the runs to and leave there")
    a = p.parse_args()
    os.environ.setdefault("COLUMNS", "200")
    with tempfile.TemporaryDirectory(dir=a.tmp) as tmp:
        folder = Path(a.keep or tmp)/"runs"
        if not folder.exists(): make_runs(folder, a.runs, a.rows, old=a.old)
        size, start = sum(f.stat().st_size for f in folder.rglob("*")), min(next(measure(["--version"], a.times)))
        print(f"{a.runs:,} runs, {a.rows} rows each, {size / 1e6:.0f} MB; nanogpt --version takes {start:.2f} s\n")
        print("| nanogpt runs | best, s | median, s | processor, s | times --version |\n|---|---|---|---|---|")
        for words in ([], ["--where", "val_loss<1.7, name~muon"], ["--sort", "val_loss", "--columns", "n_layer"], ["--json"], ["--csv"]):
            took, cpu = measure(["runs", "--runs-dir", folder, *words], a.times)
            print(f"| {' '.join(words)} | {min(took):.2f} | {statistics.median(took):.2f} | {min(cpu):.2f} | {min(took) / start:.1f} |", flush=True)
        start = time.perf_counter()
        table = runs(folder)
        listed, html = time.perf_counter() - start, table._repr_html_()
        print(f"\nIn a notebook: {listed:.2f} s to read, {time.perf_counter() - start - listed:.2f} s to show, {len(html) / 1000:.0f} kB of HTML.")


if __name__ == "__main__": main()
