"""What the measuring scripts of this folder share: a clock around whole processes, medians, the machine, files of figures."""
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                                      # this checkout, installed or not

from nanogpt_nb.checkpoints import git_commit, versions
from nanogpt_nb.config import ConfigError, NanoGPTError, child_env
from nanogpt_nb.runs import Run

OUT = Path(__file__).resolve().parent/"out"
PATIENCE = 3                                                                       # seconds that an ended process has to go by itself


def say(text):
    "Progress, on standard error."
    print(text, file=sys.stderr, flush=True)


def entry(main):
    "Run `main`; an error that has a cure is one sentence and its exit code. SIGTERM ends what was started, as Ctrl-C does."
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try: sys.exit(main())
    except NanoGPTError as e:
        say(f"{Path(sys.argv[0]).name}: {e}")
        sys.exit(e.exit_code)
    except KeyboardInterrupt: sys.exit(130)


# ---- a process and its clock

@dataclass
class Finished:
    "A process that has come to its end."
    seconds: float                                                                 # of wall time, from its start until it had exited
    code: int                                                                      # its exit status
    lines: list = field(default_factory=list)                                      # (seconds since its start, line)
    too_long: bool = False                                                         # ended by us, at the limit

    def last_words(self) -> str:
        "Its last line that says something."
        return next((line.strip() for _, line in reversed(self.lines) if line.strip(" \u2500\u2501\u2502\u256d\u256e\u2570\u256f\t")), "it said nothing")


def end_group(p):
    "End a process and all that it started."
    for number in (signal.SIGTERM, signal.SIGKILL):
        try: os.killpg(p.pid, number)
        except (ProcessLookupError, PermissionError): break
        try: p.wait(PATIENCE)
        except subprocess.TimeoutExpired: pass
    p.wait()


def clock(words, cwd=None, env=None, limit=None, show=None) -> Finished:
    """Run a program to its end, in a process group of its own; each line that it prints is kept with its moment.

    The wait has no timeout, since one makes Python look for the end only every 50 ms: a timer ends the process at `limit`.
    """
    env, done = (child_env() if env is None else env) | {"PYTHONUNBUFFERED": "1"}, Finished(0., 0)
    began = time.perf_counter()
    p = subprocess.Popen(list(map(str, words)), cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, errors="replace", start_new_session=True)

    def read():
        for line in p.stdout:
            done.lines.append((time.perf_counter() - began, line.rstrip("\n")))
            if show: show(line.rstrip("\n"))

    def too_long():
        done.too_long = True
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    reader = threading.Thread(target=read, daemon=True)
    timer = threading.Timer(limit, too_long) if limit else None
    for t in filter(None, (reader, timer)): t.daemon = True; t.start()
    try:
        done.code = p.wait()
        done.seconds = time.perf_counter() - began
    except BaseException:
        end_group(p)
        raise
    finally:
        if timer: timer.cancel()
    reader.join(1)
    if reader.is_alive(): end_group(p); reader.join(1)                             # something that it started still holds the pipe
    done.lines[:] = [(min(t, done.seconds), line) for t, line in done.lines]       # our reading may lag behind its end
    return done


# ---- our side

ROW = re.compile(r"\s*(\d+)\s+\d+\.\d+\s+\d+\.\d+\s+[\d,]+\s+\d+:\d\d\b")          # step, losses, tokens/s, time: a row of the table


def command(words:str) -> list[str]:
    "The words of a command; this Python goes before -m and before a script."
    parts = shlex.split(words)
    if not parts: raise ConfigError("--ours '' names no command; give one, for instance --ours '-m nanogpt_nb.train --preset cpu'.")
    return [sys.executable, *parts] if parts[0].startswith("-") or parts[0].endswith(".py") else parts


def train_ours(words:str, runs_dir, name:str, seed:int, more=(), limit=None, env=None) -> dict:
    "Train by a command, as a process of its own, in runs_dir/name; what it took and what it reached."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [*command(words), "--seed", str(seed), "--name", name, "--runs-dir", str(runs_dir), *more]
    done = clock(line, env=child_env(PYTHONPATH=path) | (env or {}), limit=limit)
    run = Run(Path(runs_dir)/name)
    if (done.code or not (run.path/"config.json").exists()) and not done.too_long:
        raise NanoGPTError(f"Our command ended with exit status {done.code} ({done.last_words()}); try it by itself: {shlex.join(line)}.")
    points, counted = whole_split_points(run, done)
    config = run.about["config"] if (run.path/"config.json").exists() else {}
    return dict(seed=seed, process=done.seconds, too_long=done.too_long, points=points, known_by=counted, context=config.get("block_size"),
                config=config, parameters=run.about.get("parameters") if config else None, training=max((r.get("seconds", 0) for r in run.metrics()), default=None),
                run=str(run.path), rows=run.estimates())


def whole_split_points(run:Run, done:Finished) -> tuple[list, str]:
    """Each evaluation over the whole validation split: wall seconds since the start, step, tokens, loss; and how the moment is known.

    The moment is that in which the row stood on the terminal. Where a command shows no rows, it is the run's own
    `seconds` and all the time that the run did not count (imports, checkpoints, the end): later than it was, never earlier.
    """
    if not (run.path/"config.json").exists(): return [], "nothing"
    whole = run.about["config"].get("eval_iters") == 0
    rows = [r for r in run.metrics() if "val_loss_whole_split" in r or whole and "val_loss" in r]
    seen = {int(m[1]): t for t, line in done.lines if (m := ROW.match(line))}
    rest = done.seconds - max((r.get("seconds", 0.) for r in run.metrics()), default=0.)
    wall = lambda r: seen.get(r["step"], r.get("seconds", 0.) + rest)
    points = [dict(wall=wall(r), step=r["step"], tokens=r.get("tokens"), loss=r.get("val_loss_whole_split", r.get("val_loss"))) for r in rows]
    return points, "its row on the terminal" if all(r["step"] in seen for r in rows) else "the run's own seconds and all that it did not count"


def first_at(points:list, target:float):
    "The first point at or below the target, or None."
    return next((p for p in points if p["loss"] <= target), None)


def evaluate(*words, cwd=None, limit=300) -> dict:
    "What bench/evaluate.py says of a checkpoint, in a process of its own, after the clocks have stopped."
    done = clock([sys.executable, Path(__file__).with_name("evaluate.py"), *words], cwd=cwd, limit=limit)
    try: return json.loads(done.lines[-1][1])
    except (IndexError, ValueError): return dict(error=f"The checkpoint was not evaluated again ({done.last_words()}).")


# ---- arithmetic

def spread(values) -> dict:
    "Median, minimum, maximum and number; a value of None (missed) is larger than every number."
    v = sorted(float("inf") if x is None else x for x in values)
    if not v: return dict(median=None, min=None, max=None, n=0)
    known = lambda x: x if x < float("inf") else None
    return dict(median=known(statistics.median(v)), min=known(v[0]), max=known(v[-1]), n=len(v), missed=sum(x == float("inf") for x in v))


def ratio(theirs, ours):
    "How many times longer theirs takes; None where a side has no number."
    return theirs / ours if theirs and ours else None


def flops_per_token(n_layer, n_embd, block_size, vocab_size, mlp="relu", **_) -> int:
    "Operations of one training step for a token: 6 for each number in a matrix (tables are looked up, not multiplied), and attention, 12 L C T."
    C, hidden = n_embd, 8 * -(-8 * n_embd // 24) if mlp == "swiglu" else 4 * n_embd
    matrices = n_layer * (4 * C * C + (3 if mlp == "swiglu" else 2) * C * hidden) + vocab_size * C
    return 6 * matrices + 12 * n_layer * C * block_size


CEILING = """
import json, torch
from nanogpt_nb.ceiling import ceiling
said = {}
for dtype in ("float32", "bfloat16"):
    try: said[dtype] = ceiling(%r, getattr(torch, dtype))
    except Exception as e: said[dtype + "_error"] = (str(e) or repr(e)).splitlines()[0]
print(json.dumps(said))
"""


def ceilings(device="cpu", fake=None, limit=120) -> dict:
    "Operations a second of a large matrix product on this device, now, in float32 and bfloat16; `fake` stands in for both."
    if fake: return dict(float32=fake, bfloat16=fake, fake=True)
    say(f"measuring the ceiling of {device}: large matrix products")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = clock([sys.executable, "-c", CEILING % device], env=child_env(PYTHONPATH=path), limit=limit)
    try: return json.loads(done.lines[-1][1])
    except (IndexError, ValueError): return dict(error=f"The ceiling was not measured ({done.last_words()}).")


# ---- the machine, and files

def machine() -> dict:
    "What the figures were measured on."
    try: model = next(line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): model = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(cpu=model, cores=cores, gpu=gpus(), system=platform.platform(), load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
                threads=os.environ.get("OMP_NUM_THREADS"))


def gpus() -> list[str]:
    "The names of the GPUs with their drivers, without importing torch."
    if not shutil.which("nvidia-smi"): return []
    done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if not done.returncode else []


def typed() -> str:
    "The command that was typed, without this machine's folders."
    words = ["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    for i, word in enumerate(words[1:], 1):
        flag, is_one, _ = word.partition("=")
        if words[i-1] in FOLDERS: words[i] = "DIR"
        elif is_one and flag in FOLDERS: words[i] = f"{flag}=DIR"
    return shlex.join(words)


FOLDERS = ("--peer", "--out", "--tmp")


class Report:
    "A JSON file of figures that is written again after each of them, so that an end at any moment loses nothing."
    def __init__(self, out, kind:str, device:str, **about):
        now = datetime.now(timezone.utc)
        self.path = Path(out)/f"{kind}-{device}-{now:%Y%m%d-%H%M%S}.json"
        for i in range(1, 1000):
            if not self.path.exists(): break
            self.path = Path(out)/f"{kind}-{device}-{now:%Y%m%d-%H%M%S}-{i}.json"
        self.content = dict(kind=kind, device=device, date=now.isoformat(timespec="seconds"), machine=machine(), versions=versions() | dict(commit=git_commit()),
                            command=typed(), **about)
        load, cores = self.content["machine"]["load"], self.content["machine"]["cores"]
        if load and load > 0.5 * cores: say(f"this machine is at work on something else (load {load:g} on {cores} cores): times will be too long, ratios rough")
        self.save()

    def save(self, **more):
        from nanogpt_nb.config import write_whole
        self.content |= more
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(self.content, indent=1, default=str))
        except OSError as e: raise ConfigError(f"The figures cannot be written to {self.path.parent} ({e.strerror or e}); give another folder with --out.") from None


def table(head:list, rows:list) -> str:
    "A Markdown table with columns that line up."
    rows = [[str(c) for c in r] for r in (head, *rows)]
    width = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, width)) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def number(x, form=".2f", otherwise="–") -> str:
    "A figure for a table."
    return otherwise if x is None else format(x, form)
