"""The commands of `nanogpt cloud`: rent machines, look at them, give them back, and never forget one."""

import getpass
import sys
from pathlib import Path

from nanogpt_nb.checkpoints import command
from nanogpt_nb.cli_cloud_args import (
    CloudDownArgs,
    CloudExtendArgs,
    CloudGcArgs,
    CloudGuardArgs,
    CloudKeysArgs,
    CloudLedgerArgs,
    CloudLoginArgs,
    CloudLsArgs,
    CloudRehearsalArgs,
    CloudTypesArgs,
    CloudUpArgs,
)
from nanogpt_nb.config import ConfigError


def service(rehearsal: bool = False):
    "The account's service, or the rehearsal on this machine."
    if rehearsal:
        from nanogpt_nb.remote.rehearsal import start_rehearsal

        return start_rehearsal()
    from nanogpt_nb.remote.lambda_cloud import LambdaCloud

    return LambdaCloud()


def login(args: CloudLoginArgs) -> None:
    "Keep the account's key, once the service has taken it."
    from nanogpt_nb.remote.cloud_key import API_KEYS, checked, forget_key, save_key, where_key
    from nanogpt_nb.remote.lambda_cloud import LambdaCloud

    if args.forget:
        forget_key()
        left = "; the one in $LAMBDA_API_KEY is yours to unset" if where_key() == "environment" else ""
        return print(f"no key is kept on this machine any more{left}")
    if args.file is not None:
        try:
            key = sys.stdin.read() if str(args.file) == "-" else args.file.read_text()
        except (OSError, ValueError) as e:
            raise ConfigError(f"{args.file} cannot be read ({getattr(e, 'strerror', None) or 'it is not text'}); give a file with the key, or - for standard input.") from None
    elif sys.stdin.isatty():
        key = getpass.getpass(f"API key ({API_KEYS}), it is not shown: ")
    else:
        raise ConfigError("Nobody is here to type the key; give --file FILE, or --file - and the key on standard input.")
    key = checked(key, "The key")
    types = LambdaCloud(key=key).types()
    print(f"the service accepts it and rents out {len(types)} types of machine; it is kept in {save_key(key)}")
    print(f"next:          {command()} cloud types")


def types(args: CloudTypesArgs) -> None:
    "What there is, with prices."
    found = service(args.rehearsal).types()
    word = (args.gpu or "").lower()
    shown = type(found)(t for t in found if word in f"{t.name} {t.gpu} {t.description}".lower() and (t.regions or not args.free))
    if not shown:
        wanted = f" with {args.gpu!r} in its name" if word else ""
        raise ConfigError(f"No type{wanted}{' is free anywhere now' if args.free else ''}; {command()} cloud types lists all {len(found)}.")
    print(shown)
    first = next((t for t in shown if t.regions), None)
    if first:
        on = f"rehearsal:{first.name}" if args.rehearsal else f"lambda:{first.name}"
        print(f"\ntrain on one:  {command()} train --on {on} --budget 5\nor keep it:    {command()} cloud up {on.removeprefix('lambda:')} --budget 5")


def up(args: CloudUpArgs) -> None:
    "Rent one and let it stay until it idles or its limits are reached."
    from nanogpt_nb.remote.lease import lease

    limits = {k: getattr(args, k) for k in ("budget", "hours", "idle") if getattr(args, k) is not None}
    wanted = tuple(t.removeprefix("lambda:") for word in args.types for t in word.split(",") if t)
    key = args.key and str(args.key)
    made = lease(wanted, name=args.name, regions=args.region, key=key, file_systems=args.file_system, box_guard=args.box_guard, wait=args.wait, tries=args.tries, **limits)
    made.open()
    made.keep()
    print(f"train there:   {command()} train --on {made.name}\nlog in:        ssh {made.name}\nlook at it:    {command()} cloud ls\ngive it back:  {command()} cloud down {made.name}")


def ls(args: CloudLsArgs) -> None:
    "What runs, here and in the account."
    from nanogpt_nb.remote.ledger import running

    print(running(rehearsal=args.rehearsal))


def down(args: CloudDownArgs) -> int:
    "Give machines back; 1 if one could not be."
    from nanogpt_nb.remote.ledger import down, to_end

    if args.all and args.names:
        raise ConfigError(f"There are names, {' '.join(args.names)}, and --all; give one of them.")
    wanted = to_end(args.names, args.all)
    if not args.yes:
        agreed([one.what() for one in wanted], now=args.now)
    return int(not all([down(one, now=args.now) for one in wanted]))


def agreed(what: list[str], now: bool = False) -> None:
    "Ask before something is ended; ConfigError where nobody answers, or the answer is no."
    said = "\n".join(f"  {line}" for line in what)
    if not sys.stdin.isatty():
        raise ConfigError("Nobody is here to ask; give --yes to end " + ", ".join(what) + ".")
    print(f"to be given back:\n{said}")
    home = "What has not come home is lost." if now else "What they trained comes home first."
    if input(f"{home} Give back? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("Nothing was ended; the lease goes on.")


def extend(args: CloudExtendArgs) -> None:
    "More money, more time."
    from nanogpt_nb.remote.lease import attach
    from nanogpt_nb.remote.ledger import the_open_one

    print(attach(args.name or the_open_one()).extend(budget=args.budget or 0, hours=args.hours or 0))


def keys(args: CloudKeysArgs) -> None:
    "The account's ssh keys."
    if args.add is not None and args.remove is not None:
        raise ConfigError("There are two things to do, --add and --remove; do one at a time.")
    cloud = service(args.rehearsal)
    if args.add is not None:
        from nanogpt_nb.remote.my_key import register_key

        name, private = register_key(cloud, str(Path(args.add).expanduser()))
        return print(f"{args.add} is registered as {name}" + (f"; its private half is {private}" if private else ""))
    found = cloud.ssh_keys()
    if args.remove is not None:
        one = [k for k in found if args.remove in (k.name, k.id)]
        if len(one) != 1:
            raise ConfigError(f"{args.remove!r} is {'the name of several keys' if one else 'no key'} of the account; {command()} cloud keys lists them with their ids.")
        cloud.delete_ssh_key(one[0].id)
        return print(f"{one[0].name} is out of the account; machines that have it already still let it in")
    print(found)


def gc(args: CloudGcArgs) -> int:
    "End what is past its lease; 1 if something could not be ended."
    from nanogpt_nb.remote.ledger import gc

    told = gc(service(args.rehearsal), dry_run=args.dry_run)
    print(told)
    return int(told.failed)


def guard(args: CloudGuardArgs) -> int:
    "Guardians for all open leases; 1 if one could not be started."
    from nanogpt_nb.config import NanoGPTError
    from nanogpt_nb.remote.guardian import start_guardian
    from nanogpt_nb.remote.lease_folder import records

    failed = 0
    for record in records(open=True):
        try:
            print(f"{record.name}: " + ("a guardian watches it now" if start_guardian(record) else "its guardian is at work"))
        except (NanoGPTError, OSError) as e:
            failed += 1
            print(f"{record.name}: {e}", file=sys.stderr)
    if not records(open=True):
        print("no lease is open on this machine")
    return int(bool(failed))


def ledger(args: CloudLedgerArgs) -> None:
    "All leases so far."
    from nanogpt_nb.remote.ledger import ledger

    told = ledger(rehearsals=args.rehearsal)
    print(told.to_csv() if args.csv else told, end="" if args.csv else "\n")


def rehearsal(args: CloudRehearsalArgs) -> None:
    "How the rehearsal stands, or its end."
    from nanogpt_nb.remote.rehearsal import rehearsal, stop_rehearsal

    if args.stop:
        return print("the rehearsal has ended, with all that it let out" if stop_rehearsal() else "no rehearsal runs on this machine")
    print(rehearsal())


COMMANDS = {
    "cloud login": (CloudLoginArgs, login),
    "cloud types": (CloudTypesArgs, types),
    "cloud up": (CloudUpArgs, up),
    "cloud ls": (CloudLsArgs, ls),
    "cloud extend": (CloudExtendArgs, extend),
    "cloud down": (CloudDownArgs, down),
    "cloud ledger": (CloudLedgerArgs, ledger),
    "cloud guard": (CloudGuardArgs, guard),
    "cloud gc": (CloudGcArgs, gc),
    "cloud keys": (CloudKeysArgs, keys),
    "cloud rehearsal": (CloudRehearsalArgs, rehearsal),
}
