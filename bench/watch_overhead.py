"""What does the live view cost a run that trains in the same notebook?

    python bench/watch_overhead.py                       # eight pairs of runs, about ten minutes on two cores
    python bench/watch_overhead.py --preset tiny --steps 3000 --pairs 4

The same training is run in a real notebook kernel in pairs, once quiet and once with the view, in turns
(quiet first, then view first). A pair gives two ratios. That of the seconds of training (as the run counts them)
is the one that matters, and is disturbed by other work on the machine. That of the processor time of the whole
call is disturbed less, and has the first picture and the last in it as well, which are drawn before and after
training. The thread of the view also counts its own processor time; its part of the seconds of training is what
is rationed. The target is a first ratio below 1.01 on a quiet machine, and below 1% for the thread.
"""
import argparse
import json
import os
import statistics
import tempfile

SETUP = """
import json, time
from nanogpt_nb.config import NanoGPTConfig
from nanogpt_nb.train import train
from nanogpt_nb.watch import Watching

spent, go = [], Watching._go
def counted(self):
    try: go(self)
    finally: spent.append(time.thread_time())
Watching._go = counted

def once(name, preset, steps, quiet):
    spent.clear()
    config = NanoGPTConfig.preset(preset)
    if steps: config = config.replace(max_iters=steps)
    cpu = time.process_time()
    run = train(config, name=name, quiet=quiet, wandb="disabled")
    return dict(cpu=time.process_time() - cpu, seconds=run.status["seconds"], thread=sum(spent), state=run.state)
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="cpu", help="settings of the runs")
    p.add_argument("--steps", type=int, default=150, help="steps of a run; 0: those of the preset")
    p.add_argument("--pairs", type=int, default=8, help="pairs of runs")
    a = p.parse_args()
    import nbformat
    from nbclient import NotebookClient
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        notebook = nbformat.v4.new_notebook()
        client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": folder}})

        def cell(source):
            notebook.cells.append(nbformat.v4.new_code_cell(source))
            return client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1).outputs

        def once(name, quiet):
            (said,) = [o for o in cell(f"print(json.dumps(once({name!r}, {a.preset!r}, {a.steps}, {quiet})))") if o["output_type"] == "stream" and o["name"] == "stdout"]
            told = json.loads(said["text"].splitlines()[-1])
            assert told["state"] == "finished", told
            return told

        with client.setup_kernel():
            cell(SETUP)
            once("warm-up", False)
            print("| pair | quiet, s | with view, s | ratio of training seconds | ratio of processor time, whole call | thread of the view |\n|---|---|---|---|---|---|")
            rows = []
            for i in range(a.pairs):
                told = {quiet: once(f"{i}-{quiet}", quiet) for quiet in ((True, False) if i % 2 == 0 else (False, True))}
                quiet, view = told[True], told[False]
                rows.append((view["seconds"] / quiet["seconds"], view["cpu"] / quiet["cpu"], view["thread"] / view["seconds"]))
                print(f"| {i + 1} | {quiet['seconds']:.1f} | {view['seconds']:.1f} | {rows[-1][0]:.3f} | {rows[-1][1]:.3f} | {rows[-1][2]:.2%} |", flush=True)
            seconds, cpu, thread = map(statistics.median, zip(*rows))
            print(f"| median | | | {seconds:.3f} | {cpu:.3f} | {thread:.2%} |")


if __name__ == "__main__": main()
