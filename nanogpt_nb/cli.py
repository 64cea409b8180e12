"""The command `nanogpt`: a thin face over the functions of the library.

Each command imports what it runs when it runs, so that `--help` and mistakes are told at once."""

import difflib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, Union

import tyro

from nanogpt_nb import __version__
from nanogpt_nb.args import LaunchArgs, SampleArgs, end_at_once, exit_code, parse, parse_sample, parse_train, train_defaults
from nanogpt_nb.cli_args import BenchArgs, CompletionArgs, DataArgs, ImportArgs, RunsArgs, StopArgs, SyncArgs, WatchArgs
from nanogpt_nb.cli_cloud import COMMANDS as CLOUD
from nanogpt_nb.cli_remote import COMMANDS as REMOTE
from nanogpt_nb.config import ConfigError
from nanogpt_nb.sweep import SweepArgs, parse_sweep, sweep_defaults

ABOUT = "From the bigram model to a full GPT: train on a text, write more of it. nanogpt --version tells the version."


parse_launch, launch_defaults = partial(parse_train, kind=LaunchArgs), partial(train_defaults, kind=LaunchArgs)


def train(args: LaunchArgs) -> int:
    "Train, or go on with a run, here or elsewhere."
    if args.on is not None:
        with end_at_once():
            from nanogpt_nb.journey import train_there_from_args
        return train_there_from_args(args)
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
    if args.json and args.csv:
        raise ConfigError("There are two formats, --json and --csv; give one of them.")
    listing, comparing = args.where or args.columns or args.sort != "created", args.x != "steps" or args.price_per_hour is not None
    if args.compare and listing:
        raise ConfigError("--compare takes runs by name; leave --where, --sort and --columns out, or list the runs with those first.")
    if comparing and not args.compare:
        raise ConfigError("--x and --price-per-hour are about the curves of a comparison; name its runs with --compare.")
    if args.compare:
        from nanogpt_nb.compare import compare

        told = compare(*args.compare, runs_dir=args.runs_dir, x=args.x, price_per_hour=args.price_per_hour)
        as_json = told.to_dict
    else:
        from nanogpt_nb.history import runs

        told = runs(args.runs_dir, args.sort, args.where, args.columns)
        as_json = told.to_dicts
    if args.json:
        return print(json.dumps(as_json(), indent=2, default=str, allow_nan=False))
    if args.csv:
        return print(told.to_csv(), end="")
    look = sys.stdout.isatty()
    print(told.text(shutil.get_terminal_size().columns if look else 200, colours=look and not os.environ.get("NO_COLOR")))


def sync(args: SyncArgs) -> int:
    "Send runs to Weights & Biases; 1 if one could not be sent."
    from nanogpt_nb.sync import sync

    if not (told := sync(args.runs, args.runs_dir, show=lambda one: print(one["said"], flush=True))):
        print(f"Weights & Biases has all runs in {args.runs_dir} that it was to be told of.")
    return int(any(one["state"] == "failed" for one in told))


def import_(args: ImportArgs) -> None:
    "Make a run folder from a .wandb file."
    from nanogpt_nb.sync import import_offline

    run = import_offline(args.file, args.runs_dir, args.name)
    print(f"run {run.path}: {run.summary()['steps']} steps, {run.state}")


def launch(args: LaunchArgs) -> int:
    "Train in a process that goes on when this one ends."
    with end_at_once():
        from nanogpt_nb.launch import launch_from_args
    return launch_from_args(args)


def stop(args: StopArgs) -> int:
    "Stop a run."
    from nanogpt_nb.launch import stop_from_args

    return stop_from_args(args)


def watch(args: WatchArgs) -> None:
    "Show a run until it has ended."
    if not 0 < args.every <= 3600:
        raise ConfigError(f"--every {args.every:g} is no time; give the seconds between two looks, for instance --every 1.")
    from nanogpt_nb.watch import watch

    watch(args.run, args.runs_dir, args.every)


def sweep(args) -> int:  # SweepArgs
    "Search for better settings."
    with end_at_once():
        from nanogpt_nb.sweep import sweep_from_args
    return sweep_from_args(args)


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


def bench(args: BenchArgs) -> int:
    "Measure how fast this device trains and writes."
    with end_at_once():
        from nanogpt_nb.bench import bench_from_args
    return bench_from_args(args)


def completion(args: CompletionArgs) -> None:
    "Print the completion script that is made from the flags."
    _parse_all(["--tyro-print-completion", args.shell])


class Command(NamedTuple):
    "A subcommand: the dataclass of its flags, what it does, who reads its words, and the flags that it begins with."

    args: type
    run: Callable[[Any], int | None]
    parse: Callable[[list[str], str], Any] | None = None
    default: Callable[[], Any] | None = None
    about: str | None = None


COMMANDS = {
    "train": Command(LaunchArgs, train, parse_launch, launch_defaults),
    "launch": Command(LaunchArgs, launch, parse_launch, launch_defaults, "Train in a process of its own, which goes on when the terminal is closed."),
    "watch": Command(WatchArgs, watch),
    "stop": Command(StopArgs, stop),
    "sample": Command(SampleArgs, sample, parse_sample),
    "runs": Command(RunsArgs, runs),
    "runs sync": Command(SyncArgs, sync),
    "runs import": Command(ImportArgs, import_),
    "sweep": Command(SweepArgs, sweep, parse_sweep, sweep_defaults),
    "data": Command(DataArgs, data),
    "bench": Command(BenchArgs, bench),
    **{name: Command(*parts) for name, parts in REMOTE.items()},
    **{name: Command(*parts) for name, parts in CLOUD.items()},
    "completion": Command(CompletionArgs, completion),
}

GROUPS = {
    "host": "Machines to train on: give them names, trust them, look at their GPUs.",
    "job": "What runs on a machine, whoever started it and whatever became of the connection.",
    "cloud": "Machines to rent at Lambda Cloud, under a lease that gives them back.",
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
    words = 2 if " ".join(argv[:2]) in COMMANDS or argv[0] in GROUPS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if argv[0] in GROUPS and (len(argv) == 1 or argv[1].startswith("-")):
        return parse(_group(argv[0]), argv[1:] or ["--help"], f"nanogpt {argv[0]}", description=GROUPS[argv[0]])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"There is no command {name!r}{guess} The commands are {', '.join(COMMANDS)}.")
    command, about = COMMANDS[name], {"description": COMMANDS[name].about} if COMMANDS[name].about else {}
    read = command.parse or partial(parse, command.args)
    return command.run(read(rest, f"nanogpt {name}", **about))


def _subcommand(kind: type, name: str, about: str, **default) -> Any:
    "A type that tyro takes for the command `name`."
    return Annotated[kind, tyro.conf.subcommand(name, description=about, **default)]


def _group(group: str) -> Any:
    "The commands of two words that begin with `group`, as a type for tyro."
    inside = [(name.split()[1], c.args) for name, c in COMMANDS.items() if name.startswith(f"{group} ")]
    return Union[tuple(_subcommand(kind, name, kind.__doc__.splitlines()[0]) for name, kind in inside)]  # noqa: UP007 (joined here, not written)


def _parse_all(argv: list[str]) -> None:
    "Parse with every command in one parser, for what is about all of them: help, completion, a flag before the command."
    parsers = []
    for name, command in COMMANDS.items():
        if " " not in name:  # those of two words are told of by the first
            default = {"default": command.default()} if command.default else {}
            parsers.append(_subcommand(command.args, name, command.about or command.args.__doc__.splitlines()[0], **default))
    for name, about in GROUPS.items():
        parsers.append(_subcommand(make_dataclass(name, [("command", tyro.conf.OmitSubcommandPrefixes[_group(name)])]), name, about))
    parse(Union[tuple(parsers)], argv, "nanogpt", description=ABOUT)  # noqa: UP007


if __name__ == "__main__":
    sys.exit(main())
