"""The loss over the whole validation split of what a run has saved: one of ours, or one of nanoGPT's.

    python bench/evaluate.py runs/NAME                                       # ours
    python bench/evaluate.py --peer WORKING_COPY --checkpoint out/ckpt.pt    # nanoGPT's, with its own model.py

Every character of the split but the first is predicted once, in windows of the model's own context length, in float32.
Both sides are measured by the same function, nanogpt_nb.bigram.evaluate, after their clocks have stopped. One line of JSON.
"""
import argparse
import json
import sys
from pathlib import Path

from harness import entry

ROWS = 1 << 14                                                                     # tokens in a batch, about


def of_run(folder, device="cpu", checkpoint="best") -> dict:
    "The loss of a run folder's checkpoint."
    from nanogpt_nb.bigram import evaluate
    from nanogpt_nb.data import load_dataset
    from nanogpt_nb.runs import Run
    from nanogpt_nb.sample import load_model
    run = Run(Path(folder))
    model, _ = load_model(run, checkpoint, device)
    val, T = load_dataset(run.config, progress=False).val, run.config.block_size
    return dict(loss=evaluate(model, val, T, max(1, ROWS // T), device), context=T, tokens=len(val) - 1, parameters=model.num_parameters(), checkpoint=checkpoint)


def of_peer(copy, checkpoint, device="cpu") -> dict:
    "The loss of nanoGPT's checkpoint, read with weights_only, in the model that its own model.py makes."
    import numpy as np
    import torch

    from nanogpt_nb.bigram import evaluate
    copy = Path(copy).resolve()
    sys.path.insert(0, str(copy))
    from model import GPT, GPTConfig
    saved = torch.load(copy/checkpoint, map_location=device, weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in saved["model"].items()})
    val = torch.from_numpy(np.fromfile(copy/"data"/"shakespeare_char"/"val.bin", dtype=np.uint16).astype(np.int64))
    T, c = saved["model_args"]["block_size"], saved.get("config", {})
    about = {k: c[k] for k in ("eval_iters", "batch_size", "max_iters", "n_layer", "n_head", "n_embd") if k in c}
    return dict(loss=evaluate(model.to(device), val, T, max(1, ROWS // T), device), context=T, tokens=len(val) - 1, step=saved.get("iter_num"),
                vocab_size=saved["model_args"].get("vocab_size"), **about)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="?", help="run folder of ours")
    p.add_argument("--peer", metavar="DIR", help="working copy of nanoGPT, as bench/peer.py makes one")
    p.add_argument("--checkpoint", default=None, help="of ours: best or last (best); of nanoGPT: the file in its folder (out-shakespeare-char/ckpt.pt)")
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    if (a.run is None) == (a.peer is None): p.error("give a run folder, or --peer")
    print(json.dumps(of_run(a.run, a.device, a.checkpoint or "best") if a.run else of_peer(a.peer, a.checkpoint or "out-shakespeare-char/ckpt.pt", a.device)))


if __name__ == "__main__": entry(main)
