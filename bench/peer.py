"""karpathy/nanoGPT as it is, beside us: the same text, the same split, its own commands.

    python bench/peer.py --peer DIR cpu                      # its CPU command, once
    python bench/peer.py --peer DIR cpu --max_iters=20       # the same, with what follows it changed
    python bench/peer.py --peer DIR gpu                      # its GPU command

DIR is a checkout (git clone https://github.com/karpathy/nanoGPT). It is only read: the programs are copied to a temporary
folder, and run there on tokens that come from our text: the first nine tenths to train, the rest to validate, characters
numbered in their order. What is asserted there: both sides read the same numbers.

The clock is wall time, from the start of the process until it has exited. nanoGPT's own estimate is a mean over random
batches; for a fair comparison the checkpoint that it leaves is evaluated over the whole validation split, with its own
context length, by our code, after the clock has stopped.
"""
import argparse
import importlib.util
import pickle
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

from harness import clock, entry, evaluate, number, say

from nanogpt_nb.config import ConfigError, NanoGPTConfig, NanoGPTError, child_env

CONFIG = "config/train_shakespeare_char.py"
CPU = ("--device=cpu --compile=False --eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
       "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0").split()
COMMANDS = dict(cpu=["train.py", CONFIG, *CPU], gpu=["train.py", CONFIG])
CHECKPOINT = "out-shakespeare-char/ckpt.pt"
SEED, SEED_LINE = 1337, "torch.manual_seed(1337 + seed_offset)"                    # the one that its train.py has, and where
STEP = re.compile(r"step (\d+): train loss (\d+\.\d+|nan|inf), val loss (\d+\.\d+|nan|inf)")
ITER = re.compile(r"iter (\d+): loss (\d+\.\d+|nan|inf), time (\d+\.\d+)ms")


def read_output(lines) -> dict:
    "What nanoGPT's output says, of lines with their moments: its estimates (`points`) and its steps (`iters`)."
    points = [dict(wall=t, step=int(m[1]), train_loss=float(m[2]), loss=float(m[3])) for t, line in lines if (m := STEP.match(line))]
    iters = [dict(wall=t, step=int(m[1]), loss=float(m[2]), milliseconds=float(m[3])) for t, line in lines if (m := ITER.match(line))]
    return dict(points=points, iters=iters)


class Peer:
    "A temporary working copy of a nanoGPT checkout, with our text in it: `with Peer(dir) as peer`."
    def __init__(self, checkout, data=("tinyshakespeare",), tmp=None):
        self.checkout, self.notes = Path(checkout), []
        missing = next((f for f in ("train.py", "model.py", "sample.py", "configurator.py", CONFIG) if not (self.checkout/f).is_file()), None)
        if missing: raise ConfigError(f"--peer {checkout} is not a checkout of karpathy/nanoGPT (there is no {missing} in it); make one with git clone https://github.com/karpathy/nanoGPT, and give its folder.")
        from nanogpt_nb.data import load_dataset
        self.dataset = load_dataset(NanoGPTConfig(data=data))
        self.tmp = tempfile.TemporaryDirectory(prefix="nanogpt-peer-", dir=tmp)
        self.path = Path(self.tmp.name)
        try:
            self.copy()
            self.write_data()
            self.check_data()
        except BaseException:
            self.close()
            raise

    def __enter__(self): return self
    def __exit__(self, *_): self.close()
    def close(self): self.tmp.cleanup()

    def copy(self):
        "Copy the programs; a module that its sample.py imports and does not use here is put there, empty, where it is not installed."
        for file in self.checkout.glob("*.py"): shutil.copy(file, self.path)
        shutil.copytree(self.checkout/"config", self.path/"config")
        if importlib.util.find_spec("tiktoken") is None and not (self.path/"tiktoken.py").exists():
            (self.path/"tiktoken.py").write_text('"Stands in for a package that sample.py imports and does not use for characters."\n')
            self.notes.append("tiktoken is not installed: an empty module stands in for it in the working copy (sample.py imports it, and does not use it for characters)")

    def write_data(self):
        "The tokens as its data/shakespeare_char/prepare.py would write them."
        import numpy as np
        self.data = self.path/"data"/"shakespeare_char"
        self.data.mkdir(parents=True)
        for split in ("train", "val"): np.asarray(getattr(self.dataset, split)).astype(np.uint16).tofile(self.data/f"{split}.bin")
        chars = self.dataset.tokenizer.chars
        meta = dict(vocab_size=len(chars), itos=dict(enumerate(chars)), stoi={c: i for i, c in enumerate(chars)})
        (self.data/"meta.pkl").write_bytes(pickle.dumps(meta))

    def check_data(self):
        "Both sides learn from the same tokens, and mean the same characters by them."
        import numpy as np
        d, meta = self.dataset, pickle.loads((self.data/"meta.pkl").read_bytes())
        read = {split: np.fromfile(self.data/f"{split}.bin", dtype=np.uint16) for split in ("train", "val")}
        assert all((read[split] == np.asarray(getattr(d, split))).all() for split in read), "the peer would read other tokens than we do"
        text = d.corpus.text()
        assert len(read["train"]) == int(0.9 * len(text)) and len(read["train"]) + len(read["val"]) == len(text), "the splits differ"
        assert "".join(meta["itos"][int(i)] for i in read["val"][:1000]) == text[len(read["train"]):][:1000], "the tokens mean other characters"
        assert list(meta["stoi"]) == sorted(meta["stoi"]) and meta["vocab_size"] == len(meta["stoi"]), "the characters are not in their order"

    def seeded(self, seed:int):
        "Let its train.py begin with this seed; its own is 1337, and then nothing is changed."
        text = (self.checkout/"train.py").read_text(encoding="utf-8")
        if seed != SEED:
            if SEED_LINE not in text: raise ConfigError(f"The peer's seed cannot be set to {seed} (its train.py has no line {SEED_LINE}); leave out --peer-seeds.")
            text = text.replace(SEED_LINE, SEED_LINE.replace(str(SEED), str(seed)))
        (self.path/"train.py").write_text(text, encoding="utf-8")

    def train(self, which="cpu", extra=(), seed=SEED, limit=None, env=None, evaluate_on="cpu", target=None) -> dict:
        "Run its command for `which`, cpu or gpu; what it took and what it reached. `evaluate_on`: the device for its checkpoint afterwards, or None."
        self.seeded(seed)
        shutil.rmtree((self.path/CHECKPOINT).parent, ignore_errors=True)
        words = [*COMMANDS[which], *extra]
        say(f"nanoGPT: {shlex.join(words)}" + (f" with seed {seed}" if seed != SEED else ""))
        done = self.run(words, limit, env)
        if done.code and not done.too_long: raise NanoGPTError(f"nanoGPT ended with exit status {done.code} ({done.last_words()}); try it by itself in its folder: python {shlex.join(words)}.")
        found = read_output(done.lines)
        whole = dict(error="Its checkpoint was not evaluated.") if not evaluate_on else dict(error="It left no checkpoint to evaluate.")
        if evaluate_on and (self.path/CHECKPOINT).exists(): whole = evaluate("--peer", self.path, "--checkpoint", CHECKPOINT, "--device", evaluate_on)
        best = min((p["loss"] for p in found["points"]), default=None)
        at = next((p["wall"] for p in found["points"] if target is not None and p["loss"] <= target), None)
        return dict(command="python " + shlex.join(words), seed=seed, process=done.seconds, too_long=done.too_long, points=found["points"], iters=found["iters"][::10],
                    estimate=found["points"][-1]["loss"] if found["points"] else None, best_estimate=best, estimate_reached=at, whole_split=whole, protocol=protocol(whole), notes=self.notes)

    def sample(self, device="cpu", tokens=1000, extra=(), limit=None) -> dict:
        "Run its sample.py for one text of so many characters, from the checkpoint that `train` left."
        words = ["sample.py", f"--out_dir={Path(CHECKPOINT).parent}", "--num_samples=1", f"--max_new_tokens={tokens}", *(["--device=cpu", "--dtype=float32"] if device == "cpu" else []), *extra]
        done = self.run(words, limit, None)
        if done.code and not done.too_long: raise NanoGPTError(f"nanoGPT's sample.py ended with exit status {done.code} ({done.last_words()}); try it by itself in its folder: python {shlex.join(words)}.")
        return dict(command="python " + shlex.join(words), process=done.seconds, too_long=done.too_long, tokens=tokens, notes=self.notes)

    def run(self, words, limit, env):
        return clock([sys.executable, *words], cwd=self.path, env=child_env() | (env or {}), limit=limit, show=show)


def show(line):
    "Its estimates and what goes wrong, as they come."
    if STEP.match(line) or "Error" in line: say(textwrap.shorten(f"nanoGPT: {line}", 140))


def protocol(whole) -> str:
    "How its losses were measured, in words."
    known = all(k in whole for k in ("eval_iters", "batch_size", "context"))
    own = f"{whole['eval_iters']} random batches of {whole['batch_size']}x{whole['context']} tokens" if known else "random batches, as many as its command says"
    again = (f"its best checkpoint (by that estimate) over the whole validation split, {whole['tokens']:,} tokens, context {whole['context']}, float32, by our code after the clock had stopped"
             if "loss" in whole else whole.get("error", ""))
    return f"its own estimate: {own}; whole split: {again}"


def add_arguments(p):
    "The flags that all scripts with a peer have."
    p.add_argument("--peer", metavar="DIR", help="checkout of karpathy/nanoGPT to measure beside us; it is only read")
    p.add_argument("--peer-args", default="", metavar="WORDS", help="more for the peer's command, for a trial: --peer-args=--max_iters=20")
    p.add_argument("--data", nargs="+", default=None, metavar="TEXT", help="another text for both sides, for a trial (tinyshakespeare)")
    p.add_argument("--tmp", default=None, help="folder for temporary files")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peer", metavar="DIR", required=True, help="checkout of karpathy/nanoGPT; it is only read")
    p.add_argument("which", choices=COMMANDS, help="its command for a CPU, or for a GPU")
    a, extra = p.parse_known_args()
    with Peer(a.peer) as peer:
        for note in peer.notes: say(note)
        found = peer.train(a.which, extra, evaluate_on="cuda" if a.which == "gpu" else "cpu")
    print(f"{found['process']:.1f} s as a whole process; its own estimate {number(found['estimate'], '.4f')}, whole split {number(found['whole_split'].get('loss'), '.4f')}")
    print(found["protocol"])


if __name__ == "__main__": entry(main)
