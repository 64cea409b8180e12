"""A lease in a simulated world: the real client, the real guard and the real renting over the rehearsed service, and every fault there is.

`play(plan)` runs one schedule and gives a Story: what was billed, what was lost, and what should never have happened.
"""

import contextlib
import math
import os
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from simclock import EPOCH, Machine, MachineClock, Sim, Spans, TrueClock, here
from simworld import CHECKPOINT, Box, Seen, Work

from nanogpt_nb.config import NanoGPTError
from nanogpt_nb.remote import (
    asking,
    guarding,
    lambda_cloud,
    lease_decide,
    lease_folder,
    lease_guard,
    lease_look,
    lease_state,
    money,
    order,
    rent,
)
from nanogpt_nb.remote.guarding import Guardian
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.lease_folder import Record
from nanogpt_nb.remote.lease_state import instance_name, whose
from nanogpt_nb.remote.money import MARGIN, Terms
from nanogpt_nb.remote.rehearsal_machine import Fault, NoAnswer
from nanogpt_nb.remote.rehearsed import Service

TRACED = {m.__file__ for m in (asking, lambda_cloud, lease_decide, lease_folder, lease_guard, lease_look, lease_state, money, order, rent)}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBzyOUnkX8yj1kFtE2IZQbFfNlFJbnCAN5Nn9bXUFvYi"
ENDED = ("terminated", "preempted")
SILENCE = 20.0  # seconds until the client takes silence for a time-out
PROMPT = 150.0  # seconds in which a guard that can reach the service has asked for what is due


@contextlib.contextmanager
def somewhere():
    "A folder in memory for the user's data, and no settings from outside."
    before = dict(os.environ)
    folder = tempfile.mkdtemp(prefix="nanogpt-sim-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    saved = order.new_host_key, order.pin, rent.forget, lease_guard.records, lease_folder.new_lease_id, guarding.key_for
    try:
        for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("LAMBDA_")]: del os.environ[name]
        os.environ.update(NANOGPT_NB_DATA=folder, NANOGPT_NB_NO_FSYNC="1")
        order.new_host_key, order.pin, rent.forget = lambda: ("private", KEY), lambda *_: None, lambda *_: None
        lease_guard.records = lambda **how: [] if here() and here().machine.name == "other" else saved[3](**how)
        lease_folder.new_lease_id, guarding.key_for = lambda: "270115-0800-gpu1", lambda record: "rehearsal"  # no key of whoever runs this
        yield Path(folder)
    finally:
        order.new_host_key, order.pin, rent.forget, lease_guard.records, lease_folder.new_lease_id, guarding.key_for = saved
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


class Rec(Record):
    "A record whose writer may be dead, and whose events wake who naps."

    world = None

    def note(self, kind, **facts):
        if here(): here().check()
        if self.world and self.world.sim.t in self.world.full: raise OSError(28, "No space left on device")
        event = super().note(kind, **facts)
        if self.world: self.world.noted(self, event)
        return event


class Wire(httpx.BaseTransport):
    "The way from one process to the service, with all that can happen to a request."

    def __init__(self, world: "Worlds", machine: Machine):
        self.world, self.machine = world, machine

    def handle_request(self, request):
        w, sim, m = self.world, self.world.sim, self.machine
        sim.pause(sim.random.uniform(0.01, 0.3))
        if sim.t in m.offline:
            w.trouble(here())
            raise httpx.ConnectError("no network", request=request)
        op = op_of(request.method, request.url.path)
        fault = w.wire_fault(op)
        kind = fault["kind"] if fault else ""
        if fault: w.trouble(here())
        if kind == "refused": raise httpx.ConnectError("refused", request=request)
        if kind == "lost":
            sim.pause(SILENCE)
            raise httpx.ReadTimeout("lost", request=request)
        if kind in ("502", "500"): return httpx.Response(int(kind), headers=w.date(), content=b"<html>bad gateway")
        if kind == "401": return httpx.Response(401, headers=w.date(), json=dict(error=dict(code="global/invalid-api-key", message="API key was invalid.")))
        if kind == "late":  # it arrives, but much later
            copy = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            sim.at(sim.t + fault["late"], lambda: w.arrive(op, copy))
            sim.pause(SILENCE)
            raise httpx.ReadTimeout("late", request=request)
        if kind == "429": return httpx.Response(429, headers=w.date(), json=dict(error=dict(code="global/too-many-requests", message="Too many.")))
        if kind == "429 wait": return httpx.Response(429, headers=w.date() | {"Retry-After": "7"}, json=dict(error=dict(code="global/too-many-requests", message="Too many.")))
        try: status, headers, content = w.ask(op, request)
        except NoAnswer as e:
            w.trouble(here())
            if str(e) == "timeout": sim.pause(SILENCE)
            raise (httpx.ReadTimeout if str(e) == "timeout" else httpx.RemoteProtocolError)(f"rehearsed {e}", request=request) from None
        asleep = m.asleep.inside(sim.t, sim.t + 0.5)
        if kind == "401 after": return httpx.Response(401, headers=w.date(), json=dict(error=dict(code="global/invalid-api-key", message="API key was invalid.")))
        sim.pause(sim.random.uniform(0.01, 0.3))
        if asleep or kind == "lost after":
            w.trouble(here())
            if not asleep: sim.pause(SILENCE)
            raise httpx.ReadTimeout("lost after", request=request)
        if kind == "502 after": return httpx.Response(502, headers=w.date(), content=b"<html>bad gateway")
        if kind == "garbage after" or kind == "garbage": return httpx.Response(200, headers=w.date(), content=b"<html>welcome to the hotel")
        return httpx.Response(status, headers=headers, content=content)


def op_of(method: str, path: str) -> str:
    if path.endswith("/launch"): return "launch"
    if path.endswith("/terminate"): return "terminate"
    if path.endswith("/instances"): return "list"
    return ("rename" if method == "POST" else "get") if "/instances/" in path else "other"


@dataclass
class Story:
    "What came of a schedule."

    wrong: list[str] = field(default_factory=list)  # what should never have happened
    billed: float = 0.0  # dollars
    budget: float = 0.0
    said: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    ended_by: str = ""
    runs: int = 0
    home: int = 0
    over: float = 0.0  # dollars billed above the budget
    killed: int = 0
    launched: int = 0


class SimOrder(rent.Order):
    "Renting as it is, with a box that is only thought of."

    def settle(self, id, type):
        w = rent.Watch(id, type, self.clock.monotonic())
        self.note("launched", id=id)
        one = self.until_active(w)
        self.note("address", id=id, ip=one.ip, port=22, user="ubuntu")
        for _ in range(self.world.sim.random.randint(1, 4)):
            self.clock.sleep(5)
            self.look(w)
        if self.world.is_sick(id): raise rent.BadBox("its GPU does not compute")
        self.note("ready", id=id)
        return id


class Worlds:
    "One schedule under way."

    def __init__(self, plan: dict, folder: Path):
        self.plan, self.folder = plan, folder
        self.sim = sim = Sim(plan["seed"], TRACED)
        self.story = Story(budget=plan["terms"]["budget"])
        self.laptop = Machine(sim, "laptop", **plan["laptop"])
        self.other = Machine(sim, "other", **plan["other"])
        self.nobody = Machine(sim, "nobody")
        self.service = Service(TrueClock(sim), boot=plan["boot"], ending=2.0, seed=plan["seed"])
        self.box = Box(sim, self.service, Spans(plan["outages"]), Spans(plan["used"]))
        self.wire_faults = [dict(f) for f in plan["wire"]]
        self.troubles: list[tuple[float, object]] = []  # when which process met with trouble
        self.taken: dict[str, tuple] = {}  # instance to the first accepted termination: time, process
        self.most, self.foreign, self.done, self.extensions = 0, {}, False, []
        self.guards, self.owner, self.record_path, self.keeps_until = [], None, None, 0.0
        self.lag = any(s["kind"] == "lag" for s in plan["service"]) or any(f["kind"] == "late" and f["late"] > 10 for f in plan["wire"])
        self.full = Spans(plan["full"])  # when the disk is full
        self.sick = set()

    # the service, and what must never be asked of it

    def date(self) -> dict:
        from email.utils import formatdate
        return {"Date": formatdate(self.sim.t, usegmt=True)}

    def trouble(self, process): self.troubles.append((self.sim.t, process))

    def wire_fault(self, op: str) -> "dict | None":
        now = self.sim.t - EPOCH
        for f in self.wire_faults:
            if f["op"] in (op, "any") and f["at"] <= now < f["at"] + f["lasts"] and f["times"] > 0:
                f["times"] -= 1
                self.sim.say(f"{here().name}: {op} meets {f['kind']}")
                return f

    def ask(self, op: str, request, late=False):
        "What the service answers; looks at what is asked of it."
        before = set(self.service.machines)
        body = request.read()
        self.box.reckon(self.laptop)
        if op == "terminate":
            import json
            for id in json.loads(body)["instance_ids"]: self.check_terminate(id)
        if op == "rename" and request.url.path.rsplit("/", 1)[1] in self.foreign: self.wrong("renamed an instance that is not ours")
        answer = self.service.handle(request.method, request.url.path, dict(request.headers), body)
        for id in set(self.service.machines) - before: self.sim.say(f"{here().name if here() else 'late'}: launched {id[:6]}")
        self.count()
        return answer

    def arrive(self, op, request):
        "A request that was on its way for long."
        with contextlib.suppress(NoAnswer): self.ask(op, request, late=True)

    def check_terminate(self, id: str):
        now, p = self.sim.t, here() or self.owner
        if id in self.foreign and not self.foreign[id](now): self.wrong(f"{p.name} ended an instance that is not ours")
        m = self.service.machines.get(id)
        if m is None or id in self.foreign or id in self.taken or m.ended is not None or any(f.kind == "keeps" for f in self.service.faults):
            if m is not None and m.ended is None: self.trouble(p)
            return
        self.taken[id] = now, p
        self.sim.say(f"{p.name} ends {id[:6]}")
        if self.record_path: self.check_results(id, p)

    def ours(self) -> list:
        return [m for id, m in self.service.machines.items() if id not in self.foreign]

    def count(self):
        self.service.tick(self.sim.t)
        alive = [m for m in self.ours() if m.ended is None and m.status in ("booting", "active", "unhealthy")]
        if len(alive) > max(1, self.most):
            self.most = len(alive)
            if not self.lag: self.wrong(f"{len(alive)} instances at once")

    def wrong(self, what: str):
        self.sim.say(f"WRONG: {what}")
        if what not in self.story.wrong: self.story.wrong.append(what)

    def is_sick(self, id: str) -> bool: return id in self.sick

    # results

    def check_results(self, id: str, p):
        "An instance is about to be gone: is a result lost that could have been saved?"
        now, record = self.sim.t, self.reader()
        s, grace = record.state, record.terms.grace * 60
        lost = [w for w in self.box.works if w.box == id and w.home_at is None and w.path in s.runs]
        if self.service.machines[id].status != "active": return  # such a box lets nobody in
        deaf = self.laptop.deaf | self.box.outages
        for w in lost:
            due = self.due()
            late = bool(due) and now >= min(due - MARGIN, s.until or math.inf) - 1  # what nobody saw is counted against us, so `until` may be the earlier one
            if late:
                room = s.stop_at and now - s.stop_at
                window = s.stop_at or now
                fit = self.fit_since(now)
                need = (CHECKPOINT if w.over > window else 0) + w.size + 150
                if fit <= window - 60 and not deaf.inside(window - 60, now) and room and need < room:
                    self.wrong(f"{w.path} is lost at the deadline, though there were {room:.0f} s for {w.size} s")
            elif p.machine.name != "laptop":  # it knows what the name says; an extension is in it as soon as a guard could tell the service
                if now < self.name_until(self.service.machines[id]) + lease_guard.AFTER: self.wrong(f"{p.name} ended a box with a result before its time")
                elif self.fit_since(now) < now - lease_guard.AFTER: self.wrong(f"{p.name} ended a box with a result, though a guard could have told that the lease goes on")
            elif now - EPOCH < grace or (now - grace) - deaf.inside(EPOCH, now - grace) < 0 or grace - deaf.inside(now - grace, now) > 45:
                self.wrong(f"{w.path} is lost {(due or now) - now:.0f} s before the deadline; it could be reached for {grace - deaf.inside(now - grace, now):.0f} s of the grace of {grace:.0f} s")

    def due(self) -> "float | None":
        "When the money or the time is spent, in truth: by the bill."
        s = self.reader().state
        left, ends = s.budget, []
        began = [m.began for m in self.ours() if m.began is not None]
        if not began: return None
        for m in sorted((m for m in self.ours() if m.began is not None), key=lambda m: m.began):
            cents = m.type["price_cents_per_hour"]
            most = math.floor(left * 6000 / cents + 1e-9) * 60  # whole minutes that are left
            if m.ended is not None: left -= money.cost(m.began, m.ended, cents)
            ends.append(m.began + most)
        return min(ends[-1], min(began) + s.hours * 3600)

    def fit_since(self, now: float) -> float:
        "Since when some guard on the laptop could act without trouble; `now` when none can."
        best = now
        for g in self.guards:
            if not g.alive: continue
            since = max([g.began, *(t for t, p in self.troubles if p is g), *(b for a, b in [*self.laptop.deaf.pairs, *g.stood] if a <= now)])
            best = min(best, max(since, g.began))
        return best

    def reader(self) -> Record:
        if here(): return Record(self.record_path, lambda: self.sim.t)  # a process may stand still with it in hand
        if getattr(self, "_reader", None) is None or self._reader.path != self.record_path: self._reader = Record(self.record_path, lambda: self.sim.t)
        return self._reader

    def noted(self, record, event):
        self.sim.rouse(self.laptop)
        p = here()
        self.sim.say(f"{p.name if p else '-'} notes " + " ".join(str(v)[:60] for k, v in event.items() if k not in ("time", "by")))
        if event["kind"] == "ended" and record.state.phase == "ended":
            self.service.tick(self.sim.t)
            alive = [m for m in self.ours() if m.ended is None and whose(m.name, {t["key"]: t["value"] for t in m.tags})]
            if alive and not self.lag: self.wrong(f"the lease has ended, and an instance is {alive[0].status}")

    # processes

    def cloud(self, machine: Machine) -> LambdaCloud:
        return LambdaCloud("rehearsal", "https://cloud.invalid/api/v1", Wire(self, machine), MachineClock(self.sim, machine))

    def record_for(self, cloud) -> Rec:
        record = Rec(self.record_path, cloud.time)
        record.world = self
        return record

    def work_owner(self):
        "A process that rents, trains, waits and gives back, as `with lease(...)` does."
        sim, plan = self.sim, self.plan
        cloud = self.cloud(self.laptop)
        while True:
            try: types = cloud.types(); break
            except NanoGPTError: sim.pause(30)
        while sim.t in self.full: sim.pause(30)
        terms = Terms(plan["type"], **plan["terms"], base_url=cloud.base_url, alias="gpu", owner=dict(pid=1, started="x", host="laptop"))
        terms.afford(next(t.cents for t in types if t.name == plan["type"]))
        record = Rec.create(terms, clock=cloud.time)
        self.record_path = record.path
        record.world = self
        self.noted(record, dict(kind="created"))
        if not plan["guardian"]["off"]: self.start_guardian()
        me = here()
        ticker = sim.start("ticker", self.laptop, lambda: self.work_ticker(record, cloud))
        me.with_it, ticker.with_it = [ticker], [me]
        self.guards.append(ticker)
        order = SimOrder(cloud, record.note, terms.types, "gpu", record.path, lambda cents: instance_name(record.id, cloud.time() + terms.boot * 60 + terms.longest(cents)),
                         say=lambda text: sim.say(f"owner: {text}"), keep=lambda: record.state.phase not in ("returning", "ended"),
                         until=cloud.clock.monotonic() + 300, limits=rent.Limits(boot=terms.boot * 60, every=plan["owner"]["every"]), ssh_key="laptop")
        order.world = self
        beside = Rec(record.path, cloud.time)  # for what is noted while the owner may stand still with the other one in hand
        beside.world = self
        try: id = order.until_rented(plan["owner"]["tries"])
        except (NanoGPTError, OSError) as e:
            sim.say(f"owner: {e}")
            while sim.t in self.full: sim.pause(30)
            if record.state.phase != "ended" and not record.state.asked_to_end: record.note("end", why=f"nothing was rented: {type(e).__name__}")
            while record.state.phase != "ended": sim.pause(10)
            return
        began = sim.t
        for i, r in enumerate(plan["runs"]):
            sim.at(began + r["after"], lambda r=r, i=i: self.begin_run(beside, id, r, i, me))
        for e in plan["extend"]: sim.at(EPOCH + e["at"], lambda e=e: me.alive and self.extend(beside, e))
        leaves = plan["owner"]["leaves"]
        if leaves is None: wait = math.inf
        elif leaves == "runs": wait = max([5, *(r["after"] for r in plan["runs"])]) + 1
        else: wait = max(0, EPOCH + leaves - sim.t)
        while record.state.phase not in ("returning", "ended") and sim.t < began + wait: sim.pause(min(60, max(1, began + wait - sim.t)))
        if leaves == "runs":
            while record.state.phase not in ("returning", "ended") and any(w.home_at is None for w in self.box.works): self.box.reckon(self.laptop); sim.pause(20)
        if plan["owner"]["left"]:  # Ctrl-C while it waits: the guardian goes on alone
            while sim.t in self.full: sim.pause(10)
            record.note("left")
            return ticker.kill()
        while sim.t in self.full: sim.pause(10)
        if record.state.phase not in ("returning", "ended"): record.note("end", why="its block ended")
        while record.state.phase != "ended": sim.pause(20)

    def begin_run(self, record, id, r, i, owner):
        "The owner starts a run on the box; its way home is begun by whoever follows it."
        if not owner.alive or not self.box.is_up(id) or self.sim.t in self.laptop.deaf or self.sim.t in self.box.outages: return
        if self.reader().state.phase != "ready": return
        if self.sim.t in self.full: return
        work = Work(f"/runs/{i}", id, self.sim.t, self.sim.t + r["takes"], r["size"])
        try: record.note("run", path=work.path)
        except NanoGPTError: return  # too late for a run
        self.box.works.append(work)

    def extend(self, record, e):
        if self.reader().state.phase in ("returning", "ended"): return
        with contextlib.suppress(NanoGPTError, OSError):
            record.extend(max(0.0, round(e["budget"] - self.plan["terms"]["budget"], 2)), max(0.0, round(e["hours"] - self.plan["terms"]["hours"], 2)))
            self.extensions.append(self.sim.t)

    def work_ticker(self, record, cloud):
        "The thread of the owner that does the guard's steps."
        world, pause = self.seen(True), 1
        while True:
            try: pause = lease_guard.step(record, cloud, world)
            except Exception as e:
                self.complain(e)
                pause = min(30, 2 * (pause or 1))
            if pause is None: return
            self.sim.nap(pause)

    def work_guardian(self):
        cloud = self.cloud(self.laptop)
        record = self.record_for(cloud)
        said = []
        guardian = Guardian(record, cloud, self.seen(False), Log(said, self), step=lease_guard.step)
        while (pause := guardian.turn()) is not None: self.sim.nap(pause)

    def seen(self, own): return Seen(self.sim, here, self.laptop, self.box, self.owner, own, self.story.said)

    def complain(self, e):
        if not isinstance(e, (NanoGPTError, OSError)): self.wrong(f"a step raised {type(e).__name__}: {e}")

    def start_guardian(self):
        if any(g.alive and g.name == "guardian" for g in self.guards) or not self.record_path: return
        if self.reader().state.phase == "ended": return
        self.guards.append(self.sim.start("guardian", self.laptop, self.work_guardian))

    def work_gc(self, machine, steps=False):
        "`nanogpt cloud gc`, on any machine: what is past its lease, until nothing is left of it."
        cloud = self.cloud(machine)
        for _ in range(6):
            try: found = lease_guard.gc_step(cloud)
            except NanoGPTError:
                self.sim.pause(20)
                continue
            self.check_gc(found)
            if steps and self.record_path:
                record, world = self.record_for(cloud), self.seen(False)
                while True:
                    try: pause = lease_guard.step(record, cloud, world)
                    except NanoGPTError: pause = 10
                    if pause is None or pause >= 25 and record.state.phase == "ready": break
                    self.sim.pause(pause)
            if not any(o["what"] == "ended" for o in found): return
            self.sim.pause(10)

    def check_gc(self, found):
        for o in found:
            if o["id"] in self.foreign and o["what"] == "ended" and not self.foreign[o["id"]](self.sim.t): self.wrong("gc ended an instance that is not ours")

    def work_box_guard(self):
        "The guardian on the box, as far as the others can notice it: it ends its own instance at its deadline."
        sim = self.sim
        while not self.record_path or self.reader().state.phase in ("asking", "booting", "active"):
            sim.pause(30)
            if sim.t > EPOCH + 4 * 3600: return
        while self.reader().state.phase not in ("ended",):
            s = self.reader().state
            if s.until and sim.t >= s.until + 60:
                cloud = self.cloud(self.nobody)
                for o in s.live:
                    with contextlib.suppress(NanoGPTError): cloud.terminate(o.id)
            sim.pause(30)

    def kill(self, k):
        "Kill a process, here and now or some lines later; or have it stand still at that line for a while."
        sim = self.sim
        group = [p for p in sim.processes if p.alive and p.name == k["who"]]
        for p in group[-1:]:
            if k.get("stall"):
                p.stall_in(max(1, k["lines"]), k["stall"])
                continue
            if k["lines"]: p.kill_in(k["lines"])
            else:
                sim.say(f"{p.name} killed")
                p.kill()
            if k["torn"] and self.record_path: self.tear()

    def tear(self):
        with open(self.record_path / "events.jsonl", "ab") as f: f.write(b'{"time": 18000')

    def restart(self, r):
        "The laptop is restarted: its processes are gone; the guardian is back when somebody logs in."
        self.sim.say("the laptop restarts")
        for p in self.sim.processes:
            if p.machine is self.laptop: p.kill()
        if r["comes_back"]: self.sim.at(self.sim.t + r["login"], self.start_guardian)

    def watch_guardian(self):
        "Somebody starts the guardian again, a while after its death."
        back = self.plan["guardian"]["back"]
        if back is None: return
        dead = [g for g in self.guards if g.name == "guardian" and g.died is not None]
        if dead and not any(g.alive and g.name == "guardian" for g in self.guards) and self.sim.t - dead[-1].died >= back: self.start_guardian()
        self.sim.at(self.sim.t + max(60, back / 4), self.watch_guardian) if not self.done else None

    # faults of the service, and strangers

    def strangers(self):
        s, sim = self.service, self.sim
        from nanogpt_nb.remote.rehearsal_machine import Machine as M
        r = random.Random(self.plan["seed"])
        never, later = (lambda now: False), EPOCH + 1800
        names = [("training", [], never), ("nanogpt", [], never), ("nanogpt-261123-0101-abcd-until-soon", [], never),
                 (f"nanogpt-261123-0101-abcd-until-{int(later)}", [], lambda now: now >= later + 300), ("mine", [dict(key="nanogpt-lease", value="261123-0101-abcd")], never)]
        for name, tags, may in r.sample(names, r.randint(1, 3)):
            id = s.new_id()
            m = M(id, name, s.types["gpu_1x_a10"], "us-east-1", dict(id="1", name="laptop", public_key=KEY), sim.t - 9000, tags=tags)
            m.become("active", sim.t - 8000)
            s.machines[id] = m
            self.foreign[id] = may

    def service_fault(self, f):
        s, n, r = self.service, f["times"], random.Random(self.plan["seed"])
        add = lambda *a, **k: s.faults.append(Fault(*a, **k))
        kind = f["kind"]
        self.sim.say(f"service: {kind}")
        if kind == "no capacity": add("launch", n, "capacity")
        if kind == "no take": add("terminate", n, "keeps")
        if kind == "unhealthy": add("launch", n, "unhealthy")
        if kind == "no boot": add("launch", n, "stuck")
        if kind == "vanish": add("launch", 1, f.get("how") or r.choice(["vanishes", "preempted", "sick"]), seconds=f.get("seconds") or r.uniform(0, 3000))
        if kind == "late address": add("launch", n, "late", seconds=r.uniform(5, 400))
        if kind == "lag": add("GET /instances", 10 * n, "lags", seconds=r.uniform(2, 40))
        if kind == "odd": add("GET /instances", 5 * n, r.choice(["fields", "status"]), value="contemplating")

    def play(self) -> Story:
        plan, sim, s = self.plan, self.sim, self.service
        s.keys["1"] = dict(id="1", name="laptop", public_key=KEY)
        self.strangers()
        hours = plan["terms"]["hours"] + sum(max(0, e["hours"] - plan["terms"]["hours"]) for e in plan["extend"])
        end = EPOCH + plan["boot"] * plan["owner"]["tries"] + hours * 3600
        last = max(end, *[b for _, b in self.full.pairs], *[EPOCH + t for t in (*plan["gc"], *(k["at"] for k in plan["kills"]))], *[b for m in (self.laptop,) for _, b in m.deaf.pairs], end) + 3600
        for f in plan["service"]:
            sim.at(EPOCH + f["at"] if f["kind"] in ("no take", "lag", "odd") else EPOCH, lambda f=f: self.service_fault(f))
        self.owner = sim.start("owner", self.laptop, self.work_owner)
        if plan["box_guard"]: sim.start("box guard", self.nobody, self.work_box_guard)
        for k in plan["kills"]: sim.at(EPOCH + k["at"], lambda k=k: self.kill(k))
        if plan["restart"]: sim.at(EPOCH + plan["restart"]["at"], lambda: self.restart(plan["restart"]))
        if plan["end"]: sim.at(EPOCH + plan["end"], self.ask_end)
        for i, t in enumerate(plan["gc"]):
            m = (self.other, self.laptop)[i % 2]
            sim.at(EPOCH + t, lambda m=m: sim.start("gc", m, lambda: self.work_gc(m, m is self.laptop)))
        self.watch_guardian()
        if plan["restart"]: last = max(last, EPOCH + plan["restart"]["at"] + plan["restart"]["login"] + 3600)
        sim.run(last)
        self.check_guarded(last)
        # the morning: whoever has the key runs gc elsewhere, then here
        s.faults.clear(); self.wire_faults.clear()
        before = {m.id: m.ended for m in self.ours()}
        last = max(last, *[self.name_until(m) + lease_guard.AFTER + 60 for m in self.ours()], last)
        sim.run(last)
        sim.start("gc", self.other, lambda: self.work_gc(self.other))
        sim.run(last + 600)
        s.tick(sim.t)
        for m in self.ours():
            if m.ended is None: self.wrong(f"gc left an instance that is {m.status} as {m.name}")
        self.full = Spans()
        self.laptop.asleep = self.laptop.offline = self.laptop.deaf = self.box.outages = Spans()
        sim.start("gc", self.laptop, lambda: self.work_gc(self.laptop, True))
        sim.run(last + 4000)
        self.done = True
        self.check_end(before)
        self.tell()
        sim.close()
        for p in sim.processes:
            if p.error: self.wrong(f"{p.name} failed: {type(p.error).__name__}: {p.error}")
        return self.story

    def ask_end(self):
        "`nanogpt cloud down`, in another terminal."
        if self.record_path and self.sim.t not in self.full and self.reader().state.phase not in ("returning", "ended"):
            record = Rec(self.record_path, lambda: self.sim.t)
            record.world = self
            record.note("end", why="asked")

    def name_until(self, m) -> float:
        said = whose(m.name, {t["key"]: t["value"] for t in m.tags})
        return said[1] if said else 0

    # what must hold at the end

    def check_guarded(self, now):
        "While a guard lives, no more is billed than the budget and the stated margin."
        self.service.tick(now)
        if not self.record_path: return
        due = self.due()
        for m in self.ours():
            if m.began is None or due is None: continue
            ended = now if m.ended is None else m.ended
            if m.status == "preempted" or ended <= due + 0.001: continue
            for g in self.guards:
                fit = self.fit_windows(g, due - MARGIN, min(ended, g.died or math.inf))
                allowed = [w for w in fit if w[1] - w[0] > (PROMPT if w[0] > due - MARGIN else MARGIN)]
                if allowed:
                    self.wrong(f"billed for {ended - due:.0f} s too long, though {g.name} could have ended it from {allowed[0][0] - EPOCH:.0f} to {allowed[0][1] - EPOCH:.0f}")
                    break
        self.check_unused(now)
        if any(g.alive and g.name == "guardian" for g in self.guards) and self.reader().state.phase != "ended":
            if self.fit_since(now) < now - 1500: self.wrong(f"the lease is still {self.reader().state.phase}, though a guard lives")

    def check_unused(self, now):
        "Nobody pays for a box that nobody needs: unused, or without the process that wanted it, it goes."
        terms, owner = self.reader().terms, self.owner
        for e in self.reader().events():
            if e["kind"] != "ready": continue
            m = self.service.machines[e["id"]]
            works = [w for w in self.box.works if w.box == m.id]
            last = max([e["time"], *(w.over for w in works), *(b for _, b in self.box.used.pairs)])
            slack = 400 + sum(w.size for w in works)
            if terms.idle: self.must_go(m, last, terms.idle * 60 + slack, now, "unused")
            if owner.died is not None: self.must_go(m, max(last, owner.died), slack, now, "without an owner")

    def must_go(self, m, since, most, now, why):
        until = since + most
        if until > now or (m.ended is not None and m.ended <= until): return
        deaf = self.laptop.deaf | self.box.outages | self.full
        for g in self.guards:
            if g.began > since or (g.died is not None and g.died < until) or deaf.inside(since, until): continue
            if any(since - 90 <= t <= until for t, p in self.troubles) or any(k.get("stall") for k in self.plan["kills"]): continue
            self.wrong(f"a box was {why} for {until - since:.0f} s, and {g.name} did not give it back")

    def fit_windows(self, g, a, b):
        "The spans of a..b in which the guard `g` could act."
        if b <= a: return []
        bad = [*self.laptop.deaf.pairs, *g.stood] + [(EPOCH, g.began)] + [(t, t + 90) for t, p in self.troubles if p is g]
        bad = (Spans((x - EPOCH, y - EPOCH) for x, y in bad if y > x)).pairs
        points, out = a, []
        for x, y in bad:
            if y <= points: continue
            if x > points: out.append((points, min(x, b)))
            points = max(points, y)
            if points >= b: break
        if points < b: out.append((points, b))
        return [w for w in out if w[1] > w[0]]

    def check_end(self, before):
        self.service.tick(self.sim.t)
        for m in self.ours():
            if m.ended is None: self.wrong(f"an instance is {m.status} at the very end")
        for id, may in self.foreign.items():
            if self.service.machines[id].ended is not None and not may(self.service.machines[id].ended): self.wrong("an instance that is not ours was ended")
        if not self.record_path: return
        s = self.reader().state
        if s.phase != "ended": self.wrong(f"the lease is {s.phase} at the very end")
        calm = not (self.plan["laptop"]["asleep"] or self.plan["laptop"]["offline"] or self.troubles or self.plan["full"] or self.plan["kills"] or self.plan["restart"])
        ready = next((e["time"] for e in self.reader().events() if e["kind"] == "ready"), math.inf)
        calm = calm and s.asked_at is not None and any(g.died is None or EPOCH + 1 < s.asked_at <= g.died + 1 for g in self.guards)
        if calm and s.by_clock and s.asked_at - ready > 900 and not any("spent. In" in text and EPOCH + t < s.asked_at for t, text in self.story.said):
            self.wrong("it ended by the clock, and nobody was warned")
        # one that was launched as its owner died, and that gc ended elsewhere before anybody here could look, is in no book here
        billed, known = sum(self.bill(m) for m in self.ours() if m.id in s.instances), s.spent(self.sim.t)
        if known < billed - 0.005 and not self.lag and not self.plan["full"]: self.wrong(f"the ledger knows of {known:.2f} dollars, and {billed:.2f} were billed")

    def bill(self, m) -> float:
        return 0.0 if m.began is None else money.cost(m.began, self.sim.t if m.ended is None else m.ended, m.type["price_cents_per_hour"])

    def tell(self):
        t = self.story
        t.billed, t.log = round(sum(self.bill(m) for m in self.ours()), 2), self.sim.log
        t.launched, t.killed = len(self.ours()), sum(p.doomed for p in self.sim.processes)
        t.runs, t.home = len(self.box.works), sum(w.home_at is not None for w in self.box.works)
        if self.record_path:
            t.events, t.ended_by, t.budget = self.reader().events(), self.reader().state.reason, self.reader().state.budget
        t.over = max(0.0, round(t.billed - t.budget, 2))


class Log:
    "What a guardian says of what goes wrong."

    secrets = {"rehearsal"}

    def __init__(self, said, world): self.said, self.world = said, world

    def __call__(self, text): self.said.append(text)

    def once(self, text):
        self.said.append(text)
        if text.startswith("Traceback"): self.world.wrong(f"a step raised {text.strip().splitlines()[-1]}")


def play(plan: dict) -> Story:
    "Run one schedule."
    with somewhere() as folder: return Worlds(plan, folder).play()
