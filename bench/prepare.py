"""How long, and in how much memory, is a large text prepared?

    python bench/prepare.py                 # 2 GB for characters, 0.2 GB for byte pairs
    python bench/prepare.py --gb 0.2

A text of the size asked for is written to a temporary folder (--tmp), prepared in a process of its
own, and deleted. The table has the first preparation, and the second, which finds everything in the cache.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time, torch
from nanogpt_nb.data import get_batch, prepare
def memory(which):
    "Peak (VmHWM) or present (VmRSS) resident memory of this process in MB, on Linux."
    return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith(which))
before = memory("VmHWM")
t = time.perf_counter()
d = prepare((sys.argv[1],), tokenizer=sys.argv[2], block_size=256)
seconds = time.perf_counter() - t
peak, now = memory("VmHWM"), memory("VmRSS")
for _ in range(100): get_batch(d.train, 64, 256)
print(json.dumps(dict(seconds=seconds, before=before, peak=peak, batches=memory("VmRSS") - now, tokens=len(d.train) + len(d.val), vocab=d.tokenizer.vocab_size)))
"""


def write_text(path, size):
    "Write about `size` bytes of text: Shakespeare over and over, with accents and an emoji now and then."
    from nanogpt_nb.corpus import tiny_shakespeare
    text = tiny_shakespeare().text() + "\nOù est la scène? 🎭\n"
    block = text.encode() * 8
    with open(path, "wb") as f:
        while f.tell() < size: f.write(block[:size - f.tell()] if size - f.tell() < len(block) else block)
    while True:                                         # do not end in the middle of a character
        with open(path, "rb+") as f:
            f.seek(-4, os.SEEK_END); tail = f.read()
            try: tail.decode(errors="strict"); return
            except UnicodeDecodeError: f.seek(-1, os.SEEK_END); f.truncate()


def measure(path, tokenizer, cache):
    "Prepare `path` in a process of its own; its figures."
    env = os.environ | {"NANOGPT_NB_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), tokenizer], env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gb", type=float, default=2.0, help="size of the text for characters in GB")
    p.add_argument("--bpe-gb", type=float, default=None, help="size of the text for byte pairs in GB; a tenth of --gb unless said")
    p.add_argument("--tmp", default=None, help="folder for the text and the tokens, about 5 times --gb")
    a = p.parse_args()
    sizes = {"char": a.gb, "bpe": a.gb / 10 if a.bpe_gb is None else a.bpe_gb}
    print("| tokenizer | text, MB | time | seconds | MB/s | tokens | vocabulary | peak memory, MB | of it imports, MB | 100 batches add, MB |")
    print("|" + "---|" * 10)
    with tempfile.TemporaryDirectory(dir=a.tmp) as tmp:
        for tokenizer, gb in sizes.items():
            if not gb: continue
            path = Path(tmp)/f"{tokenizer}.txt"
            write_text(path, int(gb * 1e9))
            mb = path.stat().st_size / 1e6
            for which in ("first", "again"):
                d = measure(path, tokenizer, Path(tmp)/"cache")
                print(f"| {tokenizer} | {mb:,.0f} | {which} | {d['seconds']:.1f} | {mb / d['seconds']:,.0f} | {d['tokens']:,} | {d['vocab']} | {d['peak']:.0f} | {d['before']:.0f} | {d['batches']:.0f} |", flush=True)
            path.unlink()


if __name__ == "__main__": main()
