"""Money and results under a simulated clock: random schedules of faults, and the H100 that was left overnight."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sim import EPOCH, play
from simplan import TYPES, plan, quiet, shrink, smaller

from nanogpt_nb.remote import lease_guard, lease_state, order
from nanogpt_nb.remote.cloud import NotLaunched
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.lease_guard import AFTER
from nanogpt_nb.remote.money import Terms, cost

EVENING, NIGHT = 1800, 12 * 3600  # seconds from the beginning: when the notebook dies, and how long nobody looks
PRICE = TYPES["gpu_1x_h100_pcie"]


def dies(who="owner", at=EVENING, **more) -> dict:
    return dict(who=who, at=at, lines=0, torn=False) | more


def shut(until=EVENING + NIGHT) -> dict:
    "The laptop, with its lid shut from the evening on."
    return dict(wrong=0, jumps=[], asleep=[(EVENING + 5, until)], offline=[], counts_sleep=True)


def gone(story) -> float:
    "When the last instance was known to be gone, in seconds from the beginning."
    return max(e["time"] for e in story.events if e["kind"] in ("gone", "ended")) - EPOCH


def test_a_quiet_evening():
    s = play(quiet(owner=dict(leaves="runs", tries=3, every=5, left=False)))
    assert s.wrong == [] and (s.runs, s.home, s.launched) == (1, 1, 1)
    assert s.ended_by == "its block ended" and cost(0, 3660, PRICE) <= s.billed < s.budget


def test_the_h100_left_overnight():
    "The notebook dies in the evening. Who is left decides what the night costs."
    night = cost(0, NIGHT, PRICE)

    guarded = play(quiet(kills=[dies()]))  # the guardian lives: the run ends, comes home, and the box goes
    assert guarded.wrong == [] and guarded.home == 1 and guarded.billed <= guarded.budget and "gone" in guarded.ended_by
    assert guarded.billed < night / 4

    long = play(quiet(kills=[dies()], runs=[dict(after=60, takes=NIGHT, size=20)]))  # a run that would take all night is stopped in time
    assert long.wrong == [] and long.home == 1 and long.billed <= long.budget and "budget" in long.ended_by

    alone = play(quiet(kills=[dies(), dies("guardian", EVENING + 1)], gc=[EVENING + 6 * 3600]))  # nobody lives: whoever runs gc ends it
    assert alone.wrong == [] and alone.billed > alone.budget
    assert any("gc ends" in line for line in alone.log) and alone.billed <= cost(0, EVENING + 6 * 3600 + 60, PRICE)

    lid = play(quiet(kills=[dies()], laptop=shut()))  # the laptop is shut with the guardian on it: it acts when the lid is opened
    assert lid.wrong == [] and lid.billed > lid.budget and gone(lid) < EVENING + NIGHT + 120

    elsewhere = play(quiet(kills=[dies()], laptop=shut(), gc=[n * 1800 for n in range(1, 16)]))  # gc runs hourly on another machine, which has no folder of the lease
    assert elsewhere.wrong == [] and any("gc ends" in line for line in elsewhere.log)
    assert elsewhere.billed <= cost(0, elsewhere.budget / PRICE * 360_000 + AFTER + 3600 + 60, PRICE) < lid.billed

    boxed = play(quiet(kills=[dies()], laptop=shut(), box_guard=True))  # the guardian on the box needs no laptop
    assert boxed.wrong == [] and boxed.billed <= boxed.budget and any("box guard ends" in line for line in boxed.log)


def test_the_same_night_is_told_the_same_twice():
    first, second = play(plan(11)), play(plan(11))
    assert (first.log, first.billed) == (second.log, second.billed)


def test_two_guards_whose_clocks_are_a_moment_apart_count_one_grace():
    looks = [dict(time=t, kind="unreachable") for t in (100.0, 124.3, 124.1, 150.0, 149.6)]
    assert lease_state.fold(Terms("gpu_1x_a10"), looks).out == (100.0, 150.0)


def test_a_box_that_falls_ill_is_kept_for_the_grace_and_no_longer():
    s = play(quiet(seed=5, terms=dict(budget=9, hours=3, idle=20, grace=15, keep=6, boot=30), service=[dict(kind="vanish", how="sick", seconds=600, times=1, at=0)]))  # two guards, each with its own reckoning of the time
    ends = next(e["time"] for e in s.events if e["kind"] == "end") - EPOCH
    assert s.wrong == [] and "unhealthy" in s.ended_by and gone(s) - ends < 60 * 15 + 120


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.integers(0, 10**9))
def test_schedules(seed):
    s = play(plan(seed))
    assert s.wrong == [], (plan(seed), s.log[-80:])


@pytest.mark.slow
def test_many_schedules():
    wrong = {seed: s.wrong for seed in range(50_000, 50_600) if (s := play(plan(seed))).wrong}
    assert wrong == {}


# A guard with one fault in it is found out: else the schedules above would prove nothing.


def found(schedules, word: str) -> bool:
    return any(word in w for p in schedules for w in play(p).wrong)


def test_a_guard_that_asks_only_once_is_found_out(monkeypatch):
    asked, ask = set(), lease_guard.ask_for_the_end
    monkeypatch.setattr(lease_guard, "ask_for_the_end", lambda record, cloud, box, why: None if box.id in asked else (asked.add(box.id), ask(record, cloud, box, why)))
    assert found([quiet(kills=[dies()], service=[dict(kind="no take", times=1, at=0)])], "though a guard lives")


def test_a_guard_that_does_not_mind_the_clock_is_found_out(monkeypatch):
    monkeypatch.setattr(lease_state.money, "until", lambda state: None)
    assert found([quiet(runs=[dict(after=60, takes=NIGHT, size=20)])], "too long")


def test_a_guard_that_does_not_mind_the_results_is_found_out(monkeypatch):
    monkeypatch.setattr(lease_guard.Facts, "done", True)
    assert found([quiet(owner=dict(leaves=1200, tries=1, every=5, left=False))], "is lost")


def test_a_client_that_does_not_look_is_found_out(monkeypatch):
    def lost(self, *args): raise NotLaunched("never looked")
    monkeypatch.setattr(LambdaCloud, "_look_for", lost)
    monkeypatch.setattr(order.Order, "late", lambda self, name: None)
    assert found([quiet(wire=[dict(op="launch", kind="502 after", at=0, times=1, lasts=60, late=0)])], "at once")


def test_a_failing_schedule_is_made_smaller():
    busy = next(p for seed in range(100) if len((p := plan(seed))["wire"]) > 1 and p["runs"])
    small = shrink(busy, lambda p: bool(p["runs"]))
    assert len(small["runs"]) == 1 and small["wire"] == small["kills"] == small["service"] == small["gc"] == []
    assert all(not p["runs"] for p in smaller(small) if len(p["runs"]) != 1)
