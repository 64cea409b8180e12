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


def login(args: CloudLoginArgs) -> int | None:
    "Keep the account's key, once the service has taken it; 1 if one could not be deleted."
    from nanogpt_nb.remote.cloud_key import API_KEYS, checked, forget_key, save_key, where_key
    from nanogpt_nb.remote.lambda_cloud import LambdaCloud

    if args.forget:
        if stays := [place for place in forget_key() if place != "$LAMBDA_API_KEY"]:
            print(f"the key could not be deleted from {', '.join(stays)}; delete it there yourself", file=sys.stderr)
            return 1
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
    try:
        found = service(args.rehearsal).types()
    except ConfigError as e:
        raise ConfigError(f"{e} {command()} cloud types --rehearsal lists them without an account.") from None
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


def up(args: CloudUpArgs) -> int | None:
    "Rent one and let it stay until it idles or its limits are reached."
    from nanogpt_nb.remote.lease import lease
    from nanogpt_nb.remote.money import Terms

    limits = {k: getattr(args, k) for k in ("budget", "hours", "idle") if getattr(args, k) is not None}
    wanted = tuple(t.removeprefix("lambda:") for word in args.types for t in word.split(",") if t)
    if not wanted:
        raise ConfigError(f"name a type: {command()} cloud types lists them; {command()} cloud up rehearsal tries it here, and costs nothing.")
    key = args.key and str(args.key)
    try:
        Terms(alias=args.name)
    except ConfigError as e:
        raise ConfigError(str(e).replace("name=", "--name ", 1)) from None
    made = lease(wanted, name=args.name, regions=args.region, key=key, file_systems=args.file_system, box_guard=args.box_guard, wait=args.wait, tries=args.tries, **limits)
    made.open()
    made.keep()
    if not made.goes_on:
        return 1
    print(f"train there:   {command()} train --on {made.name}\nlog in:        ssh {made.name}\nlook at it:    {command()} cloud ls\ngive it back:  {command()} cloud down {made.name}")


def ls(args: CloudLsArgs) -> int:
    "What runs, here and in the account; 1 if there are leases that cannot be read."
    from nanogpt_nb.remote.ending import name_unreadable
    from nanogpt_nb.remote.standing import running

    print(running(rehearsal=args.rehearsal))
    return int(bool(name_unreadable()))


def down(args: CloudDownArgs) -> int:
    "Give machines back; 1 if one could not be."
    from nanogpt_nb.remote.ledger import down, to_end

    if args.all and args.names:
        raise ConfigError(f"There are names, {' '.join(args.names)}, and --all; give one of them.")
    wanted = to_end(args.names, args.all)
    from nanogpt_nb.remote.ending import name_unreadable

    lost = args.all and name_unreadable()
    if args.all and not wanted:
        print(f"No lease is open on this machine; {command()} cloud ls asks the account.")
        return int(bool(lost))
    if not args.yes:
        agreed([one.what() for one in wanted], now=args.now)
    return int(not all([down(one, now=args.now) for one in wanted]) or bool(lost))


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
    from nanogpt_nb.remote.lease_folder import records
    from nanogpt_nb.remote.ledger import the_open_one

    if not args.name and len(here := records(open=True)) > 1:
        raise ConfigError(f"Several leases are open, {', '.join(r.name for r in here)}; say which one: {command()} cloud extend {here[0].name} --budget 5 --hours 1.")
    wanted = args.name or the_open_one()
    if not args.budget and not args.hours:
        raise ConfigError(f"Nothing is put on top; give --budget DOLLARS, --hours HOURS, or both: {command()} cloud extend {args.name or wanted.name} --budget 5 --hours 1.")
    print(attach(wanted).extend(budget=args.budget or 0, hours=args.hours or 0))


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
    from nanogpt_nb.remote.ending import name_unreadable
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
    return int(bool(failed + name_unreadable()))


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
