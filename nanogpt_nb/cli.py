"""The command `nanogpt`: a thin face over the functions of the library.

Each command imports what it runs when it runs, so that `--help` and mistakes are told at once."""

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import tyro

from nanogpt_nb import __version__
from nanogpt_nb.args import SampleArgs, TrainArgs, end_at_once, exit_code, parse, parse_sample, parse_train, train_defaults
from nanogpt_nb.config import ConfigError

ABOUT = "From the bigram model to a full GPT: train on a text, write more of it. nanogpt --version tells the version."


@dataclass(frozen=True)
class RunsArgs:
    "List the runs, newest first, or compare some of them."

    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(default: list them all)")] = ()
    "runs to compare, by name or folder: the settings in which they differ, and their curves"
    sort: Literal["created", "name", "val_loss", "tokens_per_second", "parameters", "steps", "seconds"] = "created"
    "what to sort by: the newest, the lowest loss or the largest comes first"
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    "print JSON, for programs"
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
class CompletionArgs:
    """Print a script that completes commands and flags with the Tab key.

    - bash: nanogpt completion bash > ~/.local/share/bash-completion/completions/nanogpt

    - zsh: nanogpt completion zsh > ~/.zfunc/_nanogpt

    The folder has to be there (mkdir -p makes it), and zsh has to look there: in ~/.zshrc, before compinit,
    fpath+=(~/.zfunc). A new shell then knows the flags."""

    shell: tyro.conf.Positional[Literal["bash", "zsh"]]
    "shell to write for"


def train(args: TrainArgs) -> int:
    "Train, or go on with a run."
    with end_at_once():
        from nanogpt_nb.train import train_from_args
    return train_from_args(args)


def sample(args: SampleArgs) -> int:
    "Write text with a run's model."
    with end_at_once():
        from nanogpt_nb.sample import sample_from_args
    return sample_from_args(args)


def runs(args: RunsArgs) -> None:
    "Print the history, or the comparison of some runs."
    from nanogpt_nb.runs import compare, find_run, list_runs

    if args.compare:
        chosen = list(dict.fromkeys(find_run(name, args.runs_dir) for name in args.compare))
        if len(chosen) == 1:
            raise ConfigError(f"There is only {chosen[0].name} to compare; name two runs or more.")
        told = compare(chosen)
        return _print_json(told) if args.json else _print_comparison([run.name for run in chosen], **told)

    rows = sorted_rows([run.summary() for run in list_runs(args.runs_dir)], args.sort)
    if args.json:
        return _print_json(rows)
    if not rows:
        return print(f"There are no runs in {args.runs_dir} yet; nanogpt train makes one.")
    _print_runs(rows)


def data(args: DataArgs) -> None:
    "Prepare a corpus and describe it."
    from nanogpt_nb.corpus import cache_dir
    from nanogpt_nb.data import prepare

    made = prepare(args.data, tokenizer=args.tokenizer, bpe_vocab_size=args.bpe_vocab_size, encoding=args.encoding)
    corpus, tokens = made.corpus, len(made.train) + len(made.val)
    characters = tokens if args.tokenizer == "char" else sum(map(len, corpus.chunks()))
    told = {
        "text": ": ".join(filter(None, (corpus.name, corpus.note))),
        "files": ", ".join(map(str, corpus.files[:3])) + (f" and {len(corpus.files) - 3} more" if len(corpus.files) > 3 else ""),
        "sha256": corpus.sha256,
        "characters": f"{characters:,}",
        "vocabulary": f"{made.tokenizer.vocab_size:,} {'characters' if args.tokenizer == 'char' else 'byte pairs'}",
        "tokens": f"{tokens:,}: {len(made.train):,} to train on, {len(made.val):,} to validate on",
        "cache": str(cache_dir()),
    }
    for name, value in told.items():
        print(f"{name:<12}{value}")


def completion(args: CompletionArgs) -> None:
    "Print the completion script that is made from the flags."
    _parse_all(["--tyro-print-completion", args.shell])


class Command(NamedTuple):
    "A subcommand: the dataclass of its flags, what it does, and who reads its words."

    args: type
    run: Callable[[Any], int | None]
    parse: Callable[[list[str], str], Any] | None = None


COMMANDS = {
    "train": Command(TrainArgs, train, parse_train),
    "sample": Command(SampleArgs, sample, parse_sample),
    "runs": Command(RunsArgs, runs),
    "data": Command(DataArgs, data),
    "completion": Command(CompletionArgs, completion),
}


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command that `argv` names, those of this process by default, and return its exit code."
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int | None:
    if argv[:1] == ["--version"]:
        return print(f"nanogpt {__version__}")
    if not argv or argv[0].startswith("-"):
        return _parse_all(argv or ["--help"])
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"There is no command {name!r}{guess} The commands are {', '.join(COMMANDS)}.")
    command, prog = COMMANDS[name], f"nanogpt {name}"
    args = command.parse(rest, prog) if command.parse else parse(command.args, rest, prog)
    return command.run(args)


def _parse_all(argv: list[str]) -> None:
    "Parse with every command in one parser, for what is about all of them: help, completion, a flag before the command."
    defaults = {"train": {"default": train_defaults()}}
    parsers = []
    for name, command in COMMANDS.items():
        about = command.args.__doc__.splitlines()[0]
        parsers.append(Annotated[command.args, tyro.conf.subcommand(name, description=about, **defaults.get(name, {}))])
    parse(Union[tuple(parsers)], argv, "nanogpt", description=ABOUT)  # noqa: UP007 (joined here, not written)


def sorted_rows(rows: list[dict], by: str) -> list[dict]:
    "`rows` with the newest, the lowest loss or the largest first, names from A to Z; those without a value come last."
    known = [row for row in rows if row.get(by) is not None]
    unknown = [row for row in rows if row.get(by) is None]
    return sorted(known, key=lambda row: row[by], reverse=by not in ("name", "val_loss")) + unknown


def _console():
    "A rich console that does not cut lines short where nobody looks at a terminal."
    from rich import console

    class Console(console.Console):
        def on_broken_pipe(self):
            raise BrokenPipeError  # exit_code knows what to do

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _table(*columns: str):
    from rich import box
    from rich.table import Table

    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _print_json(value) -> None:
    print(json.dumps(value, indent=2, default=str, allow_nan=False))


def _cell(name: str, value) -> str:
    "A value of a run's summary as the table shows it."
    if value is None:
        return "-"
    if name == "parameters":
        return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value:,}"
    if name == "val_loss":
        return f"{value:.4f}"
    if name == "created" and value:
        return f"{datetime.fromisoformat(value).astimezone():%Y-%m-%d %H:%M}"
    if name == "seconds":
        return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


NAMES = ("name", "created", "state", "host", "device", "parameters", "val_loss", "tokens_per_second", "steps", "seconds")
HEADS = dict(zip(NAMES, "name,created,state,host,device,params,val loss,tokens/s,steps,took".split(","), strict=True))
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "killed": "red", "lost": "red"}


def _print_runs(rows: list[dict]) -> None:
    "The runs as a table, without the columns that can best be missed where the terminal is too narrow for all."
    console, columns = _console(), list(NAMES)
    table = _runs_table(rows, columns)
    for least in ("seconds", "steps", "created", "host"):
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            break
        columns.remove(least)
        table = _runs_table(rows, columns)
    console.print(table)


def _runs_table(rows: list[dict], columns: list[str]):
    from rich.text import Text

    table = _table(*(HEADS[name] for name in columns))
    for name, column in zip(columns, table.columns, strict=True):
        column.no_wrap = True
        column.justify = "left" if name in NAMES[:5] else "right"
    for row in rows:
        table.add_row(*(Text(_cell(name, row.get(name)), COLOURS.get(row.get(name), "") if name == "state" else "") for name in columns))
    return table


def _print_comparison(names: list[str], settings: dict[str, list], curves: dict[str, list]) -> None:
    from rich.markup import escape

    console = _console()
    if settings:
        table = _table("setting", *map(escape, names))
        for field, values in settings.items():
            table.add_row(field, *(escape(str(value)) for value in values))
        console.print(table)
    else:
        console.print("The settings are the same.")
    if not any(curves.values()):
        return console.print("None of them has a validation loss yet.")
    if drawn := draw_curves(curves, colours=console.color_system is not None, width=console.width):
        print(drawn)
    else:
        _print_steps(console, curves)


def draw_curves(curves: dict[str, list[tuple[int, float]]], colours: bool, width: int) -> str | None:
    "The validation losses over the steps, as text `width` wide with a letter for each run; None where the terminal lacks the characters."
    import plotille

    figure = plotille.Figure()
    figure.width, figure.height = max(20, min(width, 100) - 25), 15
    figure.with_colors, figure.color_mode = colours, "names"
    figure.x_label, figure.y_label = "step", "val loss"
    figure.register_label_formatter(float, lambda value, chars, delta, left=False: f"{value:{'<' if left else '>'}{chars}.4g}")
    # Four colours that differ in brightness too; the letters tell the curves apart without any.
    for i, (name, points) in enumerate(curves.items()):
        if points:
            steps, losses = zip(*points, strict=True)
            colour = ("blue", "yellow", "magenta", "cyan")[i % 4] if colours else None
            figure.plot(steps, losses, lc=colour, label=name, marker=chr(ord("A") + i % 26))
    figure.set_x_limits(min_=0)
    drawn = figure.show(legend=True)
    try:
        drawn.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return None
    return drawn


def _print_steps(console, curves: dict[str, list[tuple[int, float]]]) -> None:
    "The validation losses as a table: a row for each step, a column for each run."
    losses = {name: dict(points) for name, points in curves.items()}
    table = _table("step", *losses)
    for step in sorted(set().union(*losses.values())):
        table.add_row(str(step), *(_cell("val_loss", run.get(step)) for run in losses.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
