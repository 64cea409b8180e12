"""What can be typed after the commands of `nanogpt` that are not in `args`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class RunsArgs:
    """List the runs, newest first, or compare some of them.

    nanogpt runs sync sends runs to Weights & Biases, and nanogpt runs import makes a run of its .wandb file: each has its own --help."""

    where: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CONDITION ...", help_behavior_hint="(default: all)")] = ()
    "runs to list, in quotes: 'val_loss<1.7, n_layer>=4', 'state=finished and name~muon'"
    sort: Annotated[str, tyro.conf.arg(metavar="COLUMN")] = "created"
    "what to sort by: a column, such as val_loss or name, or a setting; the newest, the lowest loss or the largest comes first"
    columns: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SETTING ...", help_behavior_hint="(default: none)")] = ()
    "settings to show as well, such as n_layer optimizer"
    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(default: list them all)")] = ()
    "runs to compare, by name or folder: the settings in which they differ, what came of it, their curves and texts"
    x: Literal["steps", "tokens", "seconds", "dollars"] = "steps"
    "what the curves of a comparison are drawn over"
    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="DOLLARS", help_behavior_hint="(default: what config.json tells)")] = None
    "what an hour cost, for runs whose config.json does not tell"
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    "print JSON, for programs"
    csv: tyro.conf.FlagCreatePairsOff[bool] = False
    "print CSV, with every setting; of a comparison, every row of metrics"
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class SyncArgs:
    "Send runs to Weights & Biases, each once. What it has already is not sent again."

    runs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(default: all that it lacks)")]] = ()
    "runs to send, by name or folder"
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class ImportArgs:
    "Make a run folder from an offline file of Weights & Biases, should only that be left."

    file: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FILE")]]
    "a .wandb file, or the folder that it is in"
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: its name there)")] = None
    "name of the run and of its folder"
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class WatchArgs:
    "Show a run while it trains. Ctrl-C ends the looking, not the run."

    run: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: the newest run)")]] = None
    "run to watch, by name or folder"
    every: float = 1.0
    "seconds between two looks"
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class StopArgs:
    "Have a run write a checkpoint and end, wherever it is trained."

    run: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: the one that is trained)")]] = None
    "run to stop, by name or folder"
    wait: float = 60.0
    "seconds to wait for its end; 0: not at all"
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs")
    "folder that holds the runs"


@dataclass(frozen=True)
class DataArgs:
    "Prepare a text for training, and say what is in it."

    data: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")]] = ("tinyshakespeare",)
    "tinyshakespeare, files, folders, or - for standard input"
    tokenizer: Literal["char", "bpe"] = "char"
    "characters, or byte pairs learned from the text"
    bpe_vocab_size: int = 512
    "size of the byte-pair vocabulary"
    encoding: str = "utf-8"
    "encoding of the text"


@dataclass(frozen=True)
class BenchArgs:
    "Measure how fast presets train and write here, and what part of the device's ceiling that is. Needs no text."

    presets: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PRESET ...", help_behavior_hint="(default: the one that suits the device)")]] = ()
    "presets to measure, in turns; gpt2 is one more, GPT-2's shape with 124M parameters"
    all: tyro.conf.FlagCreatePairsOff[bool] = False
    "measure every preset"
    device: str = "auto"
    "auto, cpu, cuda, cuda:N or mps"
    seconds: float = 2.0
    "seconds that each thing is measured, at least; the warm-up comes before"
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    "also sample N texts at once"
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: that of the preset)")] = None
    "sequences in a batch of training"
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    "print JSON, for programs"
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    "file to keep the figures in, as JSON"


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script that completes commands and flags with the Tab key.

    - bash: nanogpt completion bash > ~/.local/share/bash-completion/completions/nanogpt

    - zsh: nanogpt completion zsh > ~/.zfunc/_nanogpt

    The folder has to be there (mkdir -p makes it), and zsh has to look there: in ~/.zshrc, before compinit,
    fpath+=(~/.zfunc). A new shell then knows the flags."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    "shell to write for"
