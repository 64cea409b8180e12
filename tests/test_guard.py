"The guard of the money: pure decisions over a folder, against the rehearsed service, by a clock that jumps as it likes."

import json
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openapi import odd

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote import lease_decide, lease_folder, lease_guard, lease_look, lease_state
from nanogpt_nb.remote.agent import HostError
from nanogpt_nb.remote.cloud import CloudError
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.lease_folder import Record, records
from nanogpt_nb.remote.lease_guard import gc_step, step
from nanogpt_nb.remote.lease_state import fold, instance_name, new_lease_id, tags_of, whose
from nanogpt_nb.remote.money import MARGIN, Terms, cost, dollars, minutes, what_it_will_cost
from nanogpt_nb.remote.order import Limits
from nanogpt_nb.remote.rehearsal_machine import Fault
from nanogpt_nb.remote.rehearsed import Service, transport

START = 1_800_000_000.0  # seconds since 1970
TYPE, CENTS = "gpu_1x_a10", 129
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJtpx1F3Qo0aC5pS1Qg0lKq8bqW9YB3sJ8P4sG1nR0dT test"


class Clock:
    "A true time that only moves when told to, and a wall clock that may be wrong."

    simulated = True

    def __init__(self, wrong=0.0):
        self.t, self.wrong = START, wrong

    def time(self): return self.t + self.wrong
    def monotonic(self): return self.t - START + 500
    def sleep(self, seconds): self.t += max(0.0, seconds)


class Truth:
    "The clock of the service."

    simulated = True

    def __init__(self, clock): self.clock = clock
    def time(self): return self.clock.t
    def sleep(self, seconds): self.clock.sleep(seconds)


class World:
    "A box with runs, as a guard sees it."

    own = False

    def __init__(self, bench):
        self.bench, self.said, self.done = bench, [], []
        self.works, self.idle_since, self.alive, self.reachable, self.way = {}, None, True, True, 20.0

    def train(self, path, ends):
        "A run that ends at `ends` seconds from the start."
        self.works[path] = dict(ends=START + ends, home=None)
        self.bench.record.note("run", path=path)

    def runs(self, record):
        t = self.bench.clock.t
        return [dict(path=p, state="going" if t < w["ends"] else "ended", home=w["home"] is not None and t >= w["home"], reachable=self.reachable) for p, w in self.works.items()]

    def stop_runs(self, record):
        self.done.append("stop")
        if self.reachable:
            for w in self.works.values(): w["ends"] = min(w["ends"], self.bench.clock.t + 10)

    def bring_home(self, record):
        self.done.append("bring")
        if self.reachable:
            for w in self.works.values():
                if w["home"] is None and self.bench.clock.t >= w["ends"]: w["home"] = self.bench.clock.t + self.way

    def idle(self, record): return None if self.idle_since is None or not self.reachable else self.bench.clock.t - self.idle_since
    def owner_alive(self, record): return self.alive
    def say(self, text): self.said.append(text)
    def forget(self, record): self.done.append("forget")


class Broken:
    "A world of which nothing can be learned."

    own = False

    def __getattr__(self, name):
        def raises(*args): raise RuntimeError(name)
        return raises


class Bench:
    "A service, an account, a lease and a guard, with one time."

    def __init__(self, wrong=0.0, **terms):
        self.clock = Clock(wrong)
        self.service = Service(clock=Truth(self.clock), boot=200, ending=30)
        self.cloud = self.new_cloud()
        self.cloud.add_ssh_key("mine", PUBLIC)
        self.record = Record.create(Terms(TYPE, **dict(budget=5, hours=3, owner=dict(pid=1)) | terms), self.cloud.time)
        self.world = World(self)

    def new_cloud(self): return LambdaCloud("rehearsal", "http://127.0.0.1:1/api/v1", transport(self.service), self.clock)

    @property
    def state(self): return self.record.state

    def launch(self, name=None):
        name = name or instance_name(self.record.id, self.clock.t + 12_000)
        return self.cloud.launch(TYPE, self.free(), "mine", name, tags=tags_of(self.record.id, self.clock.t + 12_000))

    def free(self): return next(t for t in self.cloud.types() if t.name == TYPE).regions[0].name

    def rent(self):
        "What the one who rents does, until the box is ready."
        self.record.note("ready", id=(id := self.boot()))
        return id

    def boot(self):
        "What the one who rents does, until the box is active."
        name = instance_name(self.record.id, self.clock.t + 12_000)
        self.record.note("asking", name=name, type=TYPE, region="us-east-1", cents=CENTS)
        self.record.note("launched", id=(id := self.launch(name)), name=name)
        self.run(lambda: self.state.phase == "active")
        return id

    def run(self, over=lambda: False, most=100_000.0):
        "Guard until `over`, or the end of the lease; the seconds that went by."
        began = self.clock.t
        while not over() and (pause := step(self.record, self.cloud, self.world)) is not None:
            assert 1 <= pause <= 30
            self.clock.sleep(pause)
            assert self.clock.t - began < most, self.record.events()[-5:]
        return self.clock.t - began

    def bill(self): return self.service.spent(self.clock.t)

    def alive(self): return [m for m in self.service.machines.values() if m.status not in ("terminated", "preempted")]

    def kinds(self): return [e["kind"] for e in self.record.events()]


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NANOGPT_NB_NO_FSYNC", "1")
    return tmp_path / "data"


class TestTheWayOfALease:
    def test_when_the_owner_leaves_the_box_is_given_back_once_its_run_is_home(self):
        b = Bench()
        b.rent()
        b.world.train("one", 900)
        b.record.note("left")
        b.run()
        assert b.state.phase == "ended" and not b.alive()
        assert b.world.works["one"]["home"] and "stop" not in b.world.done and b.state.home == ["one"]
        assert b.state.reason == "its runs have ended" and b.clock.t - START < 1100

    def test_what_the_guard_reckons_is_the_bill_or_a_little_more(self):
        b = Bench()
        b.rent()
        b.clock.sleep(1000)
        b.record.note("end", why="asked")
        b.run()
        assert b.bill() <= b.state.spent(b.clock.t) <= b.bill() + 3 * CENTS / 6000

    def test_an_end_that_is_asked_for_stops_the_runs_first_and_brings_them_home(self):
        b = Bench()
        id = b.rent()
        b.world.train("one", 50_000)
        b.record.note("end", why="asked")
        b.run()
        assert b.world.done.index("stop") < b.world.done.index("bring") and b.world.works["one"]["home"]
        asked = [t for t, line, _ in b.service.asked if line == "POST /instance-operations/terminate"]
        assert asked and asked[0] >= b.world.works["one"]["home"] and b.service.machines[id].status == "terminated"

    def test_the_budget_ends_it_and_the_result_comes_home_before(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.world.train("one", 50_000)
        b.run()
        assert b.world.works["one"]["home"] and b.state.reason == "the budget of $1.00"
        assert 0.8 < b.bill() <= 1

    def test_the_hours_end_it(self):
        b = Bench(budget=100, hours=1)
        b.rent()
        b.world.train("one", 50_000)
        b.run()
        assert b.state.reason == "the limit of 1 hour" and b.bill() <= cost(0, 3600, CENTS)

    def test_a_run_that_does_not_stop_does_not_stop_the_money(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.world.train("one", 50_000)
        b.world.stop_runs = b.world.bring_home = lambda record: 1 / 0
        b.run()
        assert b.state.phase == "ended" and b.bill() <= 1 and "Not wholly home: one" in b.world.said[-1]

    def test_nothing_that_the_world_does_keeps_the_guard_from_the_money(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.world.train("one", 50_000)
        b.world = Broken()
        b.run()
        assert b.state.phase == "ended" and not b.alive() and b.bill() <= 1

    def test_an_idle_box_is_given_back(self):
        b = Bench(idle=20)
        b.rent()
        b.world.idle_since = b.clock.t
        took = b.run()
        assert 1200 <= took < 1350 and "nothing was done" in b.state.reason

    def test_a_run_is_not_idle_and_idle_0_is_never(self):
        for terms, ends in (dict(idle=20), 4000), (dict(idle=0), 1):
            b = Bench(**terms)
            b.rent()
            b.world.train("one", ends)
            b.world.idle_since = b.clock.t
            b.run(lambda b=b: b.clock.t > START + 3900)
            assert b.state.phase == "ready"

    def test_a_dead_owner_leaves_nothing_behind(self):
        b = Bench()
        b.rent()
        b.world.alive = False
        assert b.run() < 120 and b.state.phase == "ended" and not b.alive()

    def test_a_box_in_use_outlives_the_process_that_rented_it(self):
        b = Bench()
        b.rent()
        b.world.alive, b.world.idle_since = False, b.clock.t + 1000
        b.run(lambda: b.clock.t > START + 1100)
        assert b.state.phase == "ready"
        assert b.run() < 400 and not b.alive()

    def test_a_lease_without_an_owner_is_kept_until_it_idles(self):
        b = Bench(owner=None)
        b.rent()
        b.world.alive, b.world.idle_since = False, b.clock.t
        assert 1200 <= b.run() < 1350

    def test_an_extension_in_time_takes_the_end_by_the_clock_back(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.world.train("one", 3200)
        b.run(lambda: b.state.asked_to_end)
        b.record.extend(budget=2)
        assert b.state.phase == "ready"
        b.record.note("left")
        b.run()
        assert b.world.works["one"]["home"] and b.state.budget == 3

    def test_the_name_tells_everybody_until_when(self):
        b = Bench(budget=2, hours=9)
        id = b.rent()
        b.run(lambda: b.clock.t > START + 400)
        assert abs(whose(b.service.machines[id].name)[1] - b.state.until) < 2
        b.record.extend(budget=2)
        b.run(lambda: b.clock.t > START + 500)
        assert abs(whose(b.service.machines[id].name)[1] - b.state.until) < 2

    def test_warnings_come_once_and_in_their_order(self):
        b = Bench(budget=2, hours=9)
        b.rent()
        b.world.train("one", 50_000)
        b.run(lambda: b.state.asked_to_end)
        said = [s for s in b.world.said if "spent. In" in s]
        left = [int(re.search(r"In (\d+) min", s)[1]) for s in said]
        assert len(said) == 3 and left == sorted(left, reverse=True) and left[1] in (9, 10) and left[2] in (4, 5)
        assert all("nanogpt cloud extend" in s for s in said)


def cut_off(**terms) -> Bench:
    "A box whose run has ended, that is to be given back, and that cannot be reached."
    b = Bench(**terms)
    b.rent()
    b.world.train("one", 300)
    b.clock.sleep(300)
    b.world.reachable = False
    b.record.note("end", why="asked")
    return b


class TestOutOfReach:
    def test_it_is_kept_for_the_grace_and_then_the_money_wins(self):
        b = cut_off(grace=5)
        took = b.run()
        assert 300 <= took < 400 and not b.alive() and "could not be reached for 5 minutes" in "".join(b.world.said)

    def test_what_comes_back_within_the_grace_is_brought_home(self):
        b = Bench(grace=5)
        b.rent()
        b.world.train("one", 300)
        b.world.reachable = False
        b.record.note("end", why="asked")
        b.run(lambda: b.clock.t > START + 450)
        b.world.reachable = True
        b.run()
        assert b.world.works["one"]["home"] and b.state.phase == "ended"

    def test_the_grace_is_counted_in_looks_not_in_hours_asleep(self):
        b = cut_off(budget=50, hours=12, grace=5)
        b.run(lambda: b.clock.t > START + 600)
        b.clock.sleep(4 * 3600)  # the laptop's lid
        step(b.record, b.cloud, b.world)
        b.clock.sleep(30)
        b.world.reachable = True
        b.run()
        assert b.world.works["one"]["home"]

    def test_no_network_at_all_is_no_word_about_the_box(self):
        b = cut_off(budget=50, hours=12, grace=5)
        b.service.faults = [Fault(".", None, "refused")]
        b.run(lambda: b.clock.t > START + 4000)
        b.world.reachable, b.service.faults = True, []
        b.run()
        assert b.world.works["one"]["home"]

    def test_the_grace_never_goes_past_the_end_of_the_money(self):
        b = cut_off(budget=1, hours=9, grace=600)
        b.run()
        assert b.bill() <= 1 and not b.alive()


class TestTheServiceInTrouble:
    def test_terminate_is_asked_for_until_it_takes(self):
        b = Bench()
        b.rent()
        b.service.faults = [Fault("terminate", 4, "keeps"), Fault("terminate", 3, "before", status=502)]
        b.record.note("end", why="asked")
        b.run()
        asked = [line for _, line, _ in b.service.asked if "terminate" in line]
        assert b.state.phase == "ended" and not b.alive() and len(asked) >= 8

    def test_it_is_over_when_the_service_says_so_and_not_before(self):
        b = Bench()
        b.rent()
        b.service.faults = [Fault("GET", None, "before", status=500)]
        b.record.note("end", why="asked")
        b.run(lambda: b.clock.t > START + 3000)
        assert b.state.phase == "returning" and not b.alive()  # it is gone, and nobody has said so
        b.service.faults = []
        b.run()
        assert b.state.phase == "ended"

    @pytest.mark.parametrize("made", [True, False])
    def test_a_launch_of_a_dead_owner_is_looked_up_and_given_back(self, made):
        b = Bench()
        b.record.note("asking", name="x", type=TYPE, region="us-east-1", cents=CENTS)
        if made: b.launch()
        b.world.alive = False
        took = b.run()
        assert b.state.phase == "ended" and not b.alive() and len(b.state.instances) == made and took < 400

    def test_a_launch_that_shows_late_is_found(self):
        b = Bench()
        b.record.note("asking", name="x", type=TYPE, region="us-east-1", cents=CENTS)
        b.launch()
        b.service.faults = [Fault("GET /instances", None, "lags", seconds=60)]
        b.world.alive = False
        b.run()
        assert len(b.state.instances) == 1 and not b.alive()

    def test_a_refusal_in_doubt_is_looked_after_too(self):
        b = Bench()
        b.record.note("asking", name="x", type=TYPE, region="us-east-1", cents=CENTS)
        b.launch()
        b.record.note("refused", name="x", doubt=True)
        b.service.faults = [Fault("GET /instances", None, "lags", seconds=60)]
        b.record.note("end", why="there was none to have")
        b.run()
        assert len(b.state.instances) == 1 and not b.alive()

    def test_one_more_than_was_asked_for_is_given_back_and_the_other_kept(self):
        b = Bench()
        id = b.rent()
        b.launch()
        b.run(lambda: b.clock.t > START + 600)
        assert b.state.phase == "ready" and [m.id for m in b.alive()] == [id] and b.state.current == id

    def test_an_instance_that_vanishes_ends_the_lease(self):
        b = Bench()
        b.service.faults = [Fault("launch", 1, "vanishes", seconds=300)]
        b.rent()
        b.run()
        assert b.state.phase == "ended" and "not by us" in b.state.reason

    @pytest.mark.parametrize("times, ends", [(2, False), (None, True)])
    def test_unhealthy_for_a_moment_is_not_the_end_of_a_run(self, times, ends):
        b = Bench()
        b.rent()
        b.world.train("one", 50_000)
        b.service.faults = [Fault("GET /instances", times, "status", value="unhealthy")]
        b.run(lambda: b.clock.t > START + 900)
        assert b.state.asked_to_end == ends and ("unhealthy" in b.state.reason) == ends and bool(b.world.works["one"]["home"]) == ends

    def test_one_that_somebody_else_ends_is_noticed(self):
        b = Bench()
        id = b.rent()
        b.cloud.terminate(id)
        b.run()
        assert b.state.phase == "ended" and "not by us" in b.state.reason

    def test_a_boot_that_never_ends_does(self):
        b = Bench(boot=30)
        b.service.faults = [Fault("launch", 1, "stuck")]
        b.record.note("asking", name="x", type=TYPE, cents=CENTS)
        b.record.note("launched", id=b.launch())
        b.run(lambda: not b.alive(), most=2700)
        assert "not ready" in b.state.instances[next(iter(b.state.instances))].giving

    def test_statuses_nobody_knows_are_on_the_bill(self):
        b = Bench()
        b.rent()
        b.service.faults = [Fault("GET /instances", None, "status", value="hibernating")]
        b.run(lambda: b.clock.t > START + 600)
        assert b.state.phase == "ready" and b.state.instances[b.state.current].status == "hibernating"
        assert b.state.spent(b.clock.t) >= b.bill()

    def test_a_key_that_is_taken_away_is_said_and_not_all_the_time(self):
        b = Bench()
        b.rent()
        b.service.key = "another"
        b.run(lambda: b.clock.t > START + 3000)
        said = [s for s in b.world.said if "as soon as the service answers" in s]
        assert 1 <= len(said) <= 6 and "rehearsal" not in said[0].replace("the rehearsal", "").replace("The rehearsal", "")


    @pytest.mark.parametrize("launched", [True, False])
    def test_the_key_of_another_account_ends_nothing_here(self, launched):
        b = Bench(budget=50, hours=12)
        name = instance_name(b.record.id, b.clock.t + 12_000)
        if launched: b.rent()
        else:
            b.record.note("asking", name=name, type=TYPE, cents=CENTS)
            b.launch(name)
        mine, stranger = (b.cloud, b.record), Service(clock=Truth(b.clock))
        stranger.key = "another"
        b.cloud = LambdaCloud("another", "http://127.0.0.1:1/api/v1", transport(stranger), b.clock)
        b.record, b.world.alive = Record(b.record.path, b.cloud.time), launched
        b.run(lambda: b.clock.t > START + 4000)
        assert b.state.phase != "ended" and len(b.alive()) == 1 and any("account of this key" in s for s in b.world.said)
        (b.cloud, b.record), b.world.alive = mine, False
        b.run()
        assert b.state.phase == "ended" and not b.alive()

    @odd("answer", "the type of its instances cannot be read")
    @pytest.mark.parametrize("kind", [None, {}, {"name": ""}])
    def test_an_instance_without_a_readable_type_is_ours_all_the_same(self, kind, monkeypatch):
        b = Bench()
        b.record.note("asking", name="x", type=TYPE, cents=CENTS)
        b.launch()
        told = b.service.describe
        monkeypatch.setattr(b.service, "describe", lambda *args, **more: told(*args, **more) | dict(instance_type=kind))
        b.world.alive = False
        b.run()
        assert b.state.phase == "ended" and not b.alive() and gc_step(b.cloud)[0]["type"] == "?"

    def test_what_nobody_expects_of_the_service_does_not_stop_the_money(self, monkeypatch):
        b = Bench(budget=1, hours=9)
        b.rent()
        def raises(): raise RecursionError("too deep")
        monkeypatch.setattr(b.cloud, "instances", raises)
        b.run(lambda: not b.alive())
        assert b.bill() <= 1 and any("cannot be understood" in s for s in b.world.said)

    def test_a_list_that_does_not_show_a_living_box_ends_nothing(self):
        b = Bench()
        id = b.rent()
        b.run(lambda: b.clock.t > START + 300)
        b.service.faults = [Fault("GET /instances", 40, "before", status=404)]
        b.run(lambda: b.clock.t > START + 600)
        b.service.faults = []
        b.run(lambda: b.clock.t > START + 800)
        assert b.state.phase == "ready" and b.state.current == id

    def test_a_termination_that_is_refused_is_said(self):
        b = Bench()
        b.rent()
        b.service.faults = [Fault("terminate", 3, "before", status=403)]
        b.record.note("end", why="asked")
        b.run()
        assert len([s for s in b.world.said if "could not be terminated" in s]) == 1 and b.state.phase == "ended"

    def test_the_one_who_rented_hears_what_the_guardian_has_said_already(self):
        b, own = Bench(budget=2, hours=9), None
        b.rent()
        b.world.train("one", 50_000)
        own, record = World(b), Record(b.record.path, b.cloud.time)
        own.own, own.works = True, b.world.works
        while not b.state.asked_to_end:
            for r, w in (b.record, b.world), (record, own): step(r, b.cloud, w)
            b.clock.sleep(15)
        for w in b.world, own: assert len([s for s in w.said if "spent. In" in s]) == 3

    def test_a_guard_leaves_the_one_who_rents_its_time(self):
        longest = Limits()
        assert Terms().boot * 60 + lease_decide.LATE > longest.boot_of_8 + longest.ssh + longest.compute + 2 * longest.every

    def test_runs_that_are_home_are_not_waited_out(self):
        b = Bench()
        b.rent()
        b.world.train("one", 300)
        b.run(lambda: b.world.works["one"]["home"] and b.clock.t > b.world.works["one"]["home"])
        b.world.alive, b.world.idle_since = False, b.clock.t - 20
        step(b.record, b.cloud, b.world)
        assert b.state.box is None and "its runs have ended" in b.state.reason


class TestClocks:
    def test_who_asks_no_service_reckons_with_its_clock(self):
        b = Bench(wrong=-7200.0)
        b.cloud.types()
        b.record.note("warned", at="half")
        assert b.record.events()[-1]["ahead"] == 7200 and abs(Record(b.record.path).now() - time.time() - 7200) < 60

    @pytest.mark.parametrize("wrong", [-86_400.0, 7_200.0, 86_400 * 400.0])
    def test_a_wrong_wall_clock_changes_nothing(self, wrong):
        b = Bench(budget=1, hours=9, wrong=wrong)
        b.rent()
        b.world.train("one", 50_000)
        b.run()
        assert b.world.works["one"]["home"] and 0.8 < b.bill() <= 1

    def test_before_the_first_answer_nothing_is_decided_by_the_clock(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.world.train("one", 50_000)
        b.clock.wrong = 86_400.0
        b.cloud, faults = b.new_cloud(), [Fault("GET", None, "refused")]
        b.service.faults = faults
        step(b.record, b.cloud, b.world)
        assert b.state.phase == "ready" and len(b.alive()) == 1 and not b.world.done

    def test_the_first_thing_after_a_night_asleep_is_to_give_back(self):
        b = Bench(budget=5, hours=3)
        b.rent()
        b.world.train("one", 50_000)
        b.clock.sleep(9 * 3600)
        before = len(b.service.asked)
        step(b.record, b.cloud, b.world)
        assert "terminate" in b.service.asked[before][1]
        b.run()
        assert b.state.phase == "ended"

    def test_what_is_not_known_is_counted_against_us(self):
        b = Bench(budget=5, hours=3)
        b.record.note("asking", name="x", type=TYPE, cents=CENTS)
        b.record.note("launched", id=b.launch())
        step(b.record, b.cloud, b.world)
        b.clock.sleep(2 * 3600)
        step(b.record, b.cloud, b.world)
        id, = b.state.instances
        assert b.state.began < b.service.machines[id].began and b.state.spent(b.clock.t) >= b.bill() > 2


LINES = {m.__file__ for m in (lease_decide, lease_folder, lease_guard, lease_look, lease_state)}


class Killed(BaseException): pass


def killed_at(n, f):
    "Run `f` in a thread that dies at the n-th line of the modules of the lease; whether it did, and what it raised."
    left, came = [n], []

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in LINES: return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0: raise Killed
        return trace

    def work():
        sys.settrace(trace)
        try: f()
        except BaseException as e: came.append(e)
        finally: sys.settrace(None)

    t = threading.Thread(target=work)
    t.start()
    t.join()
    return came[0] if came else None


def course(b):
    "A lease from its beginning to its end, with everything in it."
    b.rent()
    b.world.train("one", 700)
    b.record.note("left")
    b.run()


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_line_the_next_guard_goes_on(seed):
    rng, deaths = random.Random(seed), 0
    for _ in range(6):
        b, kills = Bench(budget=1, hours=9), 0
        died = killed_at(rng.randrange(1, 20_000), lambda b=b: course(b))
        while died:
            assert isinstance(died, Killed), died
            kills, deaths = kills + 1, deaths + 1
            b.record, b.cloud, b.world.alive = Record(b.record.path, b.cloud.time), b.new_cloud(), False
            b.clock.sleep(rng.choice([1, 30, 200]))
            died = killed_at(rng.randrange(1, 5_000) if kills < 5 else 10**9, b.run)
        assert b.state.phase == "ended" and not b.alive() and b.bill() <= 1
        assert sum(1 for m in b.service.machines.values()) <= 1
        assert all(w["home"] for w in b.world.works.values())
    assert deaths >= 6


class TestTheFolder:
    def test_a_torn_line_costs_only_itself(self):
        r = Record.create(Terms(TYPE))
        for cut in range(1, 27, 5):
            with open(r.path / "events.jsonl", "ab") as f: f.write(json.dumps(dict(time=1, kind="left")).encode()[:cut])
            r.note("warned", at=str(cut))
        assert [e["kind"] for e in Record(r.path).events()] == ["created"] + ["warned"] * 6 and not r.state.left

    def test_a_torn_line_that_is_being_written_is_read_when_it_is_whole(self):
        r = Record.create(Terms(TYPE))
        line = json.dumps(dict(time=1, kind="left")).encode() + b"\n"
        for part in (line[:9], line[9:]):
            assert not r.state.left
            with open(r.path / "events.jsonl", "ab") as f: f.write(part)
        assert r.state.left

    def test_several_processes_write_and_nothing_is_lost(self):
        r = Record.create(Terms(TYPE))
        code = "import sys; from nanogpt_nb.remote.lease_folder import Record\nr = Record(sys.argv[1])\nfor n in range(200): r.note('run', path=f'{sys.argv[2]}/{n}')"
        writers = [subprocess.Popen([sys.executable, "-c", code, str(r.path), str(n)]) for n in range(4)]
        assert [w.wait() for w in writers] == [0] * 4 and len(set(r.state.runs)) == 800

    def test_a_full_disk_does_not_keep_the_guard_from_giving_back(self):
        b = Bench(budget=1, hours=9)
        b.rent()
        b.clock.sleep(20_000)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            with pytest.raises(OSError): b.record.note("left")
            for _ in range(3): step(b.record, b.cloud, b.world); b.clock.sleep(20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert not b.alive()
        b.run()
        assert b.state.phase == "ended"

    def test_a_full_disk_does_not_keep_a_box_that_nobody_needs(self):
        b = Bench()
        b.rent()
        b.world.alive = False
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            for _ in range(4): step(b.record, b.cloud, b.world); b.clock.sleep(20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert not b.alive()

    def test_only_one_has_the_lock_of_all_processes(self):
        r = Record.create(Terms(TYPE))
        code = "import sys; from nanogpt_nb.remote.lease_folder import Record\nwith Record(sys.argv[1]).lock('home') as mine: print(mine)"
        ask = lambda: subprocess.run([sys.executable, "-c", code, str(r.path)], capture_output=True, text=True, check=True).stdout.strip()
        with r.lock("home") as mine: assert mine and ask() == "False"
        assert ask() == "True"

    def test_folders_that_are_no_leases_are_passed_over(self, data):
        r = Record.create(Terms(TYPE, alias="gpu"))
        for name in ("notes", new_lease_id()): (data / "leases" / name).mkdir()
        broken = data / "leases" / new_lease_id()
        broken.mkdir()
        (broken / "lease.json").write_text("{")
        assert records() == [r] and Record.find("gpu") == r
        with pytest.raises(HostError, match="nanogpt cloud gc"): Record(broken).terms  # noqa: B018
        with pytest.raises(ConfigError, match="nanogpt cloud ledger"): Record.find("other")

    def test_an_open_lease_is_found_before_an_old_one_of_its_name(self):
        mine = []
        for _ in range(3): mine.append(Record.create(Terms(TYPE, alias="gpu")))
        newest = max(mine, key=lambda r: r.id)
        newest.note("end", why="asked")
        newest.note("ended")
        assert Record.find("gpu") != newest and newest in records(open=False) and len(records(open=True)) == 2

    def test_nothing_is_asked_for_on_a_lease_that_is_over(self):
        r = Record.create(Terms(TYPE))
        r.note("end", why="asked")
        with pytest.raises(HostError, match="is over"): r.note("asking", name="x", cents=1)

    def test_what_is_left_must_pay_for_another_box(self):
        b = Bench(budget=1, hours=9)
        id = b.rent()
        b.clock.sleep(2400)
        b.record.note("gone", id=id)
        with pytest.raises(HostError, match="does not pay for another box"): b.record.note("asking", name="x", cents=CENTS)
        b.record.extend(budget=1)
        b.record.note("asking", name="x", cents=CENTS)
        assert b.state.ask["name"] == "x"

    def test_a_box_that_boots_when_the_hours_are_over_is_given_back(self):
        b = Bench(hours=0.4)
        first = b.boot()
        b.record.note("giving_back", id=first, why="it does not compute")
        b.run(lambda: b.state.instances[first].ended)
        billed, b.service.boot = b.bill(), 3000
        name = instance_name(b.record.id, b.clock.t + 1440)
        b.record.note("asking", name=name, type=TYPE, region="us-east-1", cents=CENTS)
        b.record.note("launched", id=(second := b.launch(name)), name=name)
        b.run()
        assert not b.alive() and b.bill() == billed and b.state.instances[second].ended < b.state.began + 0.4 * 3600
        assert "0.4 hours" in b.state.reason

    def test_a_box_that_a_guard_gave_back_as_it_came_up_ends_the_lease(self):
        b = Bench()
        name = instance_name(b.record.id, b.clock.t + 12_000)
        b.record.note("asking", name=name, type=TYPE, region="us-east-1", cents=CENTS)
        b.record.note("launched", id=(id := b.launch(name)), name=name)
        b.record.note("giving_back", id=id, why="it was not ready in time")
        b.record.note("ready", id=id)
        b.run(most=600)
        assert b.state.phase == "ended" and not b.alive() and b.state.reason == "it was not ready in time"

    def test_a_run_that_comes_too_late_is_not_begun(self):
        b = Bench(hours=0.4)
        b.rent()
        b.record.note("run", path="early")
        b.clock.t = b.state.stop_at
        with pytest.raises(HostError, match="kept for bringing results home"): b.record.note("run", path="late")
        b.record.extend(hours=1)
        b.record.note("run", path="late")
        b.record.note("end", why="asked")
        with pytest.raises(HostError, match="is over"): b.record.note("run", path="never")
        assert b.state.runs == ["early", "late"]

    def test_an_extension_of_what_a_person_gives_back_is_refused(self):
        b = Bench()
        b.rent()
        b.record.note("end", why="asked")
        with pytest.raises(HostError, match="being given back"): b.record.extend(budget=5)
        assert b.state.budget == 5

    def test_a_few_letters_find_one_or_none(self):
        mine = [Record.create(Terms(TYPE)) for _ in range(2)]
        for word in ("2", "26", "", mine[0].id[:5]):
            with pytest.raises(ConfigError): Record.find(word)
        assert Record.find(mine[0].id[-5:]) == mine[0] and Record.find(mine[1].id) == mine[1]
        with pytest.raises(ConfigError, match=mine[1].id): Record.find(mine[0].id[:6])

    @pytest.mark.parametrize("empty", [lambda f: f.write_bytes(b""), lambda f: f.unlink()])
    def test_events_that_somebody_empties_are_written_again(self, empty):
        b = Bench()
        b.rent()
        other, kinds = Record(b.record.path), b.kinds()
        assert other.state.phase == "ready"
        empty(b.record.path / "events.jsonl")
        other.note("warned", at="half")
        assert b.state.phase == other.state.phase == Record(b.record.path).state.phase == "ready" and b.kinds() == [*kinds, "warned"]

    def test_the_terms_are_taken_from_the_first_event(self):
        r = Record.create(Terms(TYPE, budget=3))
        (r.path / "lease.json").write_text("{")
        assert Record(r.path).terms == r.terms and (r.path / "lease.json").stat().st_size > 9

    def test_a_number_that_is_none_is_no_event(self):
        r = Record.create(Terms(TYPE))
        with open(r.path / "events.jsonl", "a") as f: f.write('{"time": 1, "kind": "extended", "budget": 1e400}\n{"time": 1, "kind": "extended", "hours": NaN}\n')
        assert r.state.budget == 10 and r.state.hours == 4

    def test_the_folder_is_for_its_owner_alone(self):
        r = Record.create(Terms(TYPE))
        assert r.path.stat().st_mode & 0o077 == 0


json_values = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=True) | st.integers() | st.text(max_size=5), lambda o: st.lists(o, max_size=2) | st.dictionaries(st.text(max_size=3), o, max_size=2), max_leaves=4)
some_events = st.lists(st.fixed_dictionaries(dict(time=st.floats(0, 1e6), kind=st.sampled_from(sorted(lease_state._KINDS)) | st.text(max_size=5)),
                                             optional={k: st.sampled_from(["a", "b"]) | json_values for k in "id name status cents why path at budget hours owner clock doubt extra".split()}), max_size=25)


class TestThePureParts:
    @given(some_events)
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    def test_whatever_the_file_holds_there_is_a_state_and_a_decision(self, events):
        s = fold(Terms(TYPE), events)
        assert s.phase in ("asking", "booting", "active", "ready", "returning", "ended")
        for f in lease_guard.Facts(), lease_guard.Facts([dict(path="r", state="going", home=False)], alive=False):
            do, why = lease_guard.decide(s, Terms(TYPE), 1e6, f)
            assert do in ("wait", "end", "end by clock", "stop", "bring", "give back", "forget the ask", "close") and isinstance(why, str)

    @given(budget=st.floats(0.01, 1000), hours=st.floats(0.05, 300), cents=st.integers(1, 5000), earlier=st.floats(0, 100_000))
    def test_until_keeps_to_budget_and_hours(self, budget, hours, cents, earlier):
        old = lease_state.Box("a", 0, cents=cents, off=0, on=True, ended=earlier)
        s = fold(Terms(TYPE, budget=budget, hours=hours), [])
        s.instances = dict(a=old, b=lease_state.Box("b", 0, cents=cents, off=earlier, on=True))
        if s.until > earlier:
            assert s.spent(s.until + MARGIN) <= budget + 2 * cents / 6000 + 1e-6
            assert s.until + MARGIN <= hours * 3600 + 1e-6

    @given(st.floats(0, 1e6), st.floats(0, 1e6))
    def test_a_started_minute_is_a_whole_one(self, a, b):
        n = minutes(min(a, b), max(a, b))
        assert n >= 1 and 60 * n >= abs(a - b) - 1e-3 and 60 * (n - 1) <= max(abs(a - b), 0) + 1e-3

    @given(st.text(max_size=70), st.dictionaries(st.sampled_from(["nanogpt-lease", "nanogpt-until"]) | st.text(max_size=5), st.text(max_size=20)))
    def test_what_is_not_exactly_our_name_is_not_ours(self, name, tags):
        found = whose(name, tags)
        assert found is None or name == instance_name(*found) or tags_of(*found).items() <= tags.items()

    @given(st.integers(1_600_000_000, 4_000_000_000))
    def test_our_name_is(self, until):
        id = new_lease_id()
        assert whose(instance_name(id, until)) == (id, until) == whose("renamed", tags_of(id, until)) and len(instance_name(id, until)) <= 64

    @pytest.mark.parametrize("field, value", [("budget", 0), ("budget", -1), ("budget", float("nan")), ("budget", "5"), ("budget", True), ("hours", 0), ("hours", 1000), ("idle", -1),
                                              ("types", 5), ("types", ("",)), ("regions", (" a",)), ("alias", "a b"), ("alias", "-oProxyCommand=x"), ("owner", 5)])
    def test_terms_that_cannot_be_are_refused_by_name(self, field, value):
        with pytest.raises(ConfigError, match=field.replace("alias", "name")): Terms(**dict(types=TYPE) | {field: value})

    def test_what_it_costs_is_said(self):
        assert "$2.58 at most" in what_it_will_cost(Terms(TYPE, budget=5, hours=2), CENTS) and dollars(0) == "$0.00"
        with pytest.raises(ConfigError, match=r"at least \$4.66"): Terms("gpu_8x_b200_sxm6", budget=4).afford(3992)


class TestTheOnesThatNobodyGuards:
    def test_gc_ends_what_is_due_and_touches_nothing_else(self):
        b = Bench()
        for name in ("colleague", "nanogpt-training", instance_name("251231-2359-abcd", b.clock.t - 700), instance_name("251231-2358-abcd", b.clock.t - 500), instance_name("251231-2357-abcd", b.clock.t + 500)):
            b.cloud.launch(TYPE, b.free(), "mine", name)
        tagged = b.cloud.launch(TYPE, b.free(), "mine", "renamed by hand", tags=tags_of("251231-2356-abcd", b.clock.t - 700))
        due = gc_step(b.cloud, act=False)
        assert [o["what"] for o in due] == ["unknown", "unknown", "due", "in time", "in time", "renamed"] and len(b.alive()) == 6
        gc_step(b.cloud)
        b.clock.sleep(60)
        assert len([o for o in gc_step(b.cloud) if o["what"] == "gone"]) == 1 and len(b.alive()) == 5 and b.service.machines[tagged].status != "terminated"  # somebody keeps it

    def test_gc_leaves_an_open_lease_of_this_machine_to_its_guard(self):
        b = Bench()
        b.rent()
        b.clock.sleep(50_000)
        assert [o["what"] for o in gc_step(b.cloud)] == ["guarded"] and len(b.alive()) == 1

    def test_gc_ends_what_turns_up_under_a_lease_that_has_ended(self):
        b = Bench()
        b.record.note("end", why="asked")
        b.run()
        b.launch()
        assert [o["what"] for o in gc_step(b.cloud)] == ["ended"]

    def test_a_termination_that_fails_is_told_and_the_others_go_on(self):
        b = Bench()
        for n in range(3): b.cloud.launch(TYPE, b.free(), "mine", instance_name(f"251231-235{n}-abcd", b.clock.t - 9999))
        b.service.faults = [Fault("terminate", 1, "before", status=403)]
        what = [o["what"] for o in gc_step(b.cloud)]
        assert what[0].startswith("due, but: ") and what[1:] == ["ended", "ended"]

    def test_an_account_that_cannot_be_asked_says_so(self):
        b = Bench()
        b.service.key = "another"
        with pytest.raises(CloudError): gc_step(b.cloud)
