"""The client of Lambda Cloud, against the rehearsal's service in this process with a clock that does not wait, and against real servers where sockets matter."""

import contextlib
import email.utils
import json
import logging
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import openapi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote import cloud as things
from nanogpt_nb.remote.asking import LAMBDA, Pace, checked_url
from nanogpt_nb.remote.cloud import Clock, CloudError, Instance, InstanceTypes, NotLaunched, NotThere, TooFast, Unreachable, Unsure
from nanogpt_nb.remote.cloud_key import find_key, forget_key, save_key, where_key
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.rehearsal_machine import Fault
from nanogpt_nb.remote.rehearsed import Service, transport

KEY = "secret_nanogpt_5ec2e7a1b0"
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T laptop"


class Quick(Clock):
    "A clock whose sleeps take no time; `wall` is what this machine believes."

    simulated = True

    def __init__(self):
        self.now, self.wall, self.slept = 1_795_395_600.0, 1_795_395_600.0, []

    def time(self):
        return self.now  # the service's

    def monotonic(self):
        return self.now - 1_795_000_000

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


class Wrong(Quick):
    "The same clock, seen from a machine whose wall clock is a year behind."

    def time(self):
        return self.now - 365 * 86400


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    for name in ("LAMBDA_API_KEY", "LAMBDA_API_KEY_FILE", "LAMBDA_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")


def pair(**options) -> tuple[LambdaCloud, Service]:
    clock = Quick()
    service = Service(clock, key=KEY, **options)
    return LambdaCloud(KEY, transport=transport(service), clock=clock), service


def free(cloud):
    type = next(t for t in cloud.types() if t.regions)
    return type, type.regions[0]


def ready(**options):
    cloud, service = pair(**options)
    cloud.add_ssh_key("laptop", PUBLIC)
    return cloud, service, *free(cloud)


def lines(service, word):
    return [line for _, line, _ in service.asked if word in line]


def scripted(*answers, clock=None):
    "A cloud that gives these answers, one after the other; the last one for good."
    left = list(answers)

    def answer(request):
        given = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(given, Exception):
            raise given
        return httpx.Response(
            given[0],
            headers=dict(given[2]) if len(given) > 2 else {},
            content=given[1] if isinstance(given[1], (bytes, str)) else json.dumps(given[1]).encode(),
        )

    return LambdaCloud(KEY, base_url=LAMBDA, transport=httpx.MockTransport(answer), clock=clock or Quick())


# What is sent and what comes back


def test_every_question_and_answer_is_as_the_service_describes_it():
    openapi.SEEN.clear()
    cloud, service, type, region = ready()
    for ask in (cloud.regions, cloud.images, cloud.file_systems, cloud.ssh_keys, cloud.instances):
        assert isinstance(ask(), list)
    image = cloud.images()[0]
    id = cloud.launch(
        type, region, "laptop", "gpu", user_data="#cloud-config\n", tags={"nanogpt-lease": "1123-a"}, image=image, hostname="gpu"
    )
    cloud.clock.sleep(60)
    one = cloud.instance(id)
    assert (one.status, one.type.name, one.region.name, one.ssh_keys, one.tags) == (
        "active",
        type.name,
        region.name,
        ("laptop",),
        {"nanogpt-lease": "1123-a"},
    )
    assert cloud.rename(id, "other").name == "other"
    assert cloud.restart(id).id == cloud.terminate(id).id == id
    cloud.clock.sleep(30)
    assert cloud.instance(id).status == "terminated"
    for key in cloud.ssh_keys():
        cloud.delete_ssh_key(key.id)
    cloud.delete_ssh_key("gone")
    assert cloud.ssh_keys() == []
    with pytest.raises(NotThere):
        cloud.instance("0" * 32)
    assert openapi.SEEN["answer"] == len(service.asked) > 15 and openapi.SEEN["request"] == 2 * len(service.asked)  # at either end


@pytest.mark.skipif(openapi.OPENAPI is None, reason="the description of the service is not here")
def test_the_check_finds_what_does_not_fit():
    openapi.check_answer("GET", "/instances", 200, {"data": []})
    for wrong in ({"data": {}}, {"data": [{"id": 1}]}, {"instances": []}):
        with pytest.raises(AssertionError):
            openapi.check_answer("GET", "/instances", 200, wrong)
    for method, path, body in (
        ("POST", "/instance-operations/launch", {"region_name": "x"}),
        ("POST", "/instance-operations/terminate", {}),
        ("PUT", "/instances", None),
        ("GET", "/tickets", None),
    ):
        with pytest.raises((AssertionError, KeyError)):
            openapi.check_request(method, path, body)


WATCHED = """
import contextlib, pytest
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.rehearsed import Fault, Service, transport
from openapi import odd

service = Service(boot=0)
cloud = LambdaCloud("rehearsal", "http://127.0.0.1:1/api/v1", transport(service))
wish = dict(region_name="us-west-1", instance_type_name="gpu_1x_a10", ssh_key_names=["mine"], name="gpu")

def test_good():
    cloud.add_ssh_key("mine", "%s")
    assert cloud.ask("POST", "/instance-operations/launch", wish) and cloud.types()

@pytest.mark.parametrize("body", [wish | dict(gpus=8), wish | dict(name=8), dict(name="gpu"), wish | dict(ssh_key_names=[])])
def test_wrong_question(body):
    with contextlib.suppress(Exception): cloud.ask("POST", "/instance-operations/launch", body)

def test_wrong_question_that_is_lost():
    service.faults = [Fault(".", 1, "refused")]
    with contextlib.suppress(Exception): cloud.ask("PUT", "/instances", waits=())

def test_wrong_answer(monkeypatch):
    monkeypatch.setattr(service, "describe", lambda m, status=None: dict(id=m.id))
    with contextlib.suppress(Exception): cloud.instances()

def test_wrong_on_purpose():
    with odd("request", "what does it say to that?"), contextlib.suppress(Exception): cloud.ask("PUT", "/instances", waits=())

@pytest.mark.parametrize("kind", ["garbage", "status", "fields"])
def test_answer_that_is_wrong_on_purpose(kind):
    service.faults = [Fault("GET", 1, kind)]
    with contextlib.suppress(Exception): cloud.instances()
"""


@pytest.mark.parametrize("described", [True, False])
def test_what_is_not_as_described_fails_the_test_that_did_it(tmp_path, described):
    if described and not openapi.OPENAPI:
        pytest.skip("the description of the service is not here")
    here = Path(openapi.__file__).parent
    shutil.copy(here / "conftest.py", tmp_path)
    (tmp_path / "test_watched.py").write_text(WATCHED % PUBLIC)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env |= dict(PYTHONPATH=str(here), NANOGPT_NB_OPENAPI=str(openapi.FILE if described else tmp_path / "none"))
    words = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_watched.py"]
    told = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    bad = re.findall(r"^ERROR test_watched.py::test_(\w+)", told.stdout, re.M)
    assert bad == ["wrong_question"] * 4 + ["wrong_question_that_is_lost", "wrong_answer"] and "11 passed, 6 errors" in told.stdout, told.stdout
    assert "has no field gpus" in told.stdout


def test_without_the_description_the_models_check(monkeypatch):
    monkeypatch.setattr(openapi, "OPENAPI", None)
    test_every_question_and_answer_is_as_the_service_describes_it()
    for path, wrong in (
        ("/instances", {"data": [{"id": "a"}]}),
        ("/instance-operations/launch", {"data": {"instance_ids": []}}),
        ("/regions", {"error": {}}),
    ):
        with pytest.raises((AssertionError, ValueError)):
            openapi.check_answer("POST" if "launch" in path else "GET", path, 200, wrong)


def test_what_nobody_has_heard_of_is_taken_as_it_is():
    told = dict(
        id="a",
        status="napping",
        region=dict(name="mars-1", description="", gravity=0.38),
        instance_type=dict(name="tpu", price_cents_per_hour=12.5),
        mood="good",
        tags=None,
    )
    one = Instance.from_json(told)
    assert (one.status, one.region.name, one.type.dollars, one.tags, one.more) == ("napping", "mars-1", 0.125, {}, {"mood": "good"})
    assert "napping" in repr(things.Instances([one])) and "mars-1" in things.Instances([one])._repr_html_()
    cloud = scripted((200, dict(data=[told, {"no": "id"}, 7, None])))
    assert [i.id for i in cloud.instances()] == ["a"]


@pytest.mark.parametrize("price", [None, -1, "12", True, float("nan"), float("inf")])
def test_a_price_that_is_none_is_not_known(price):
    (one,) = InstanceTypes.from_json(dict(a=dict(instance_type=dict(name="a", price_cents_per_hour=price))))
    assert one.cents is None and one.dollars is None and "?" in repr(InstanceTypes([one]))


def test_tables_show_nothing_that_moves_the_cursor_or_is_html():
    table = things.Instances([Instance("a", "\x1b[2J<script>alert(1)</script>\u202egpu\n\n", "active")])
    assert "\x1b" not in repr(table) and "\u202e" not in repr(table) and len(repr(table).splitlines()) == 2
    assert "<script" not in table._repr_html_()
    assert repr(things.Instances()) == "no instances"


def test_a_jupyter_token_is_nowhere():
    cloud, service, type, region = ready()
    id = cloud.launch(type, region, "laptop", "gpu")
    cloud.clock.sleep(60)
    raw = json.loads(service.handle("GET", "/instances", {"Authorization": f"Bearer {KEY}"})[2])["data"][0]
    one = cloud.instance(id)
    assert raw["jupyter_token"] and raw["jupyter_token"] in raw["jupyter_url"]
    assert raw["jupyter_token"] not in repr(one) + repr(vars(one)) + repr(pickle.dumps(one)) + repr(cloud.instances()) + repr(vars(cloud))


# Refusals

CODES = [
    (401, "global/invalid-api-key", things.BadKey, "nanogpt cloud login"),
    (403, "global/account-inactive", things.Inactive, "account"),
    (403, "global/invalid-address", things.Inactive, "billing address"),
    (403, "global/forbidden", CloudError, "key"),
    (400, "global/quota-exceeded", things.OverQuota, "nanogpt cloud ls"),
    (400, "instance-operations/launch/insufficient-capacity", things.NoCapacity, "nanogpt cloud up --wait"),
    (400, "instance-operations/launch/file-system-in-wrong-region", things.BadRequest, "region"),
    (400, "global/invalid-parameters", things.BadRequest, "check"),
    (400, "global/duplicate", things.Conflict, "name"),
    (404, "global/object-does-not-exist", NotThere, "nanogpt cloud"),
    (409, "global/conflict", things.Conflict, "nanogpt cloud ls"),
    (418, "global/teapot", things.BadRequest, "check"),
    (500, "global/internal-error", Unreachable, "later"),
    (400, "provider/internal-unavailable", Unreachable, "later"),
    (302, "", CloudError, "LAMBDA_API_URL"),
]


@pytest.mark.parametrize("status, code, cls, todo", CODES, ids=[c[1] or str(c[0]) for c in CODES])
def test_a_refusal_is_one_sentence_with_all_that_matters(status, code, cls, todo):
    error = dict(code=code, message=f"First thing. Second\nthing with {KEY}.", suggestion="Do this. Then that.", request_id="f00")
    with pytest.raises(CloudError) as e:
        scripted((status, dict(error=error))).regions()
    said = str(e.value)
    assert type(e.value) is cls and (e.value.code, e.value.status, e.value.request_id) == (code, status, "f00")
    assert said.count(". ") == 0 and said.endswith(".") and "\n" not in said and KEY not in said
    for part in ("Lambda Cloud", "the list of regions", "First thing; Second thing", code or "HTTP 302", "f00", "Do this; Then that", todo):
        assert part in said


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b"{}", b'{"error": 7}', b'{"error": {"code": 7}}', b"\xff\xfe", b"[" * 100_000]
)
@pytest.mark.parametrize("status", [200, 204, 301, 403, 502])
def test_an_answer_in_any_form_is_a_sentence(status, body):
    with pytest.raises(CloudError) as e:
        scripted((status, body)).instances()
    assert "<" not in str(e.value) and "\n" not in str(e.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
    "id name status region instance_type instance_ids terminated_instances tags key value specs price_cents_per_hour regions_with_capacity_available ip data error code message".split()), inner, max_size=5), max_leaves=12)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=JSON, what=st.sampled_from("types regions images ssh_keys file_systems instances instance terminate restart launch".split()))
def test_whatever_the_service_says_there_is_a_thing_or_a_sentence(data, what):
    cloud = scripted((200, json.dumps(dict(data=data))))
    words = dict(instance=["a"], terminate=["a"], restart=["a"], launch=["gpu", "us-west-1", "laptop", "gpu"]).get(what, [])
    try:
        repr(getattr(cloud, what)(*words))
    except CloudError as e:
        assert "\n" not in str(e)


def test_where_there_is_no_capacity_the_regions_that_have_some_are_named():
    cloud, service, type, region = ready()
    elsewhere = next(r for r in cloud.regions() if r not in type.regions)
    with pytest.raises(things.NoCapacity) as e:
        cloud.launch(type, elsewhere, "laptop", "gpu")
    assert (
        e.value.regions == tuple(r.name for r in type.regions) and region.name in str(e.value) and "insufficient-capacity" in str(e.value)
    )


# Patience


@pytest.mark.parametrize(
    "bad",
    [
        (500, ""),
        (502, "<html>"),
        (429, ""),
        (200, "{"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        httpx.ConnectError("none"),
    ],
    ids=str,
)
def test_what_is_safe_is_asked_again_with_longer_waits(bad):
    cloud = scripted(bad, bad, bad, (200, dict(data=[])))
    assert cloud.regions() == [] and cloud.clock.slept == [1, 2, 4]
    with pytest.raises(TooFast if isinstance(bad, tuple) and bad[0] == 429 else Unreachable):
        scripted(bad).regions()


def test_retry_after_is_kept_as_seconds_and_as_a_date():
    cloud = scripted((429, "", {"Retry-After": "17"}), (200, dict(data=[])))
    assert cloud.regions() == [] and cloud.clock.slept == [17]
    date = lambda at: email.utils.formatdate(at, usegmt=True)  # noqa: E731
    cloud = scripted(
        (429, dict(error={}), {"Retry-After": date(1_000_000_030), "Date": date(1_000_000_000)}), (200, dict(data=[])), clock=Wrong()
    )
    assert cloud.regions() == [] and cloud.clock.slept == [30]
    cloud = scripted((429, "", {"Retry-After": "3600"}), (200, dict(data=[])))
    with pytest.raises(TooFast) as e:
        cloud.regions()
    assert e.value.retry_after == 3600 and cloud.clock.slept == []


def test_what_is_no_question_of_time_is_asked_once():
    asked = []
    cloud = LambdaCloud(
        KEY,
        base_url=LAMBDA,
        clock=Quick(),
        transport=httpx.MockTransport(lambda r: asked.append(r) or httpx.Response(400, json=dict(error=dict(code="x", message="y")))),
    )
    with pytest.raises(things.BadRequest):
        cloud.regions()
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["timeout_before", "timeout_after", "dropped", "garbage", "before", "after"])
def test_a_termination_is_asked_for_until_it_is_heard(kind):
    cloud, service, type, region = ready()
    id = cloud.launch(type, region, "laptop", "gpu")
    service.faults.append(Fault("terminate", 2, kind, status=502))
    assert cloud.terminate(id).status in ("terminating", "terminated") and len(lines(service, "terminate")) == 3


def test_a_restart_whose_answer_is_lost_is_not_repeated():
    cloud, service, type, region = ready()
    id = cloud.launch(type, region, "laptop", "gpu")
    cloud.clock.sleep(60)
    service.faults.append(Fault("restart", 1, "timeout_after"))
    with pytest.raises(Unsure):
        cloud.restart(id)
    assert len(lines(service, "restart")) == 1


# A launch, and never two


@pytest.mark.parametrize("kind", ["timeout_after", "dropped", "garbage", "after"])
def test_a_launch_whose_answer_is_lost_finds_its_instance(kind):
    cloud, service, type, region = ready()
    service.faults += [Fault("launch", 1, kind, status=502), Fault("GET /instances", 2, "before", status=500)]
    id = cloud.launch(type, region, "laptop", "gpu")
    assert list(service.instances) == [id] and len(lines(service, "launch")) == 1


@pytest.mark.parametrize("kind", ["timeout_before", "dropped_before", "before"])
def test_a_launch_that_made_nothing_says_so_after_a_long_look(kind):
    cloud, service, type, region = ready()
    service.faults.append(Fault("launch", 1, kind))
    with pytest.raises(NotLaunched):
        cloud.launch(type, region, "laptop", "gpu")
    assert not service.instances and len(lines(service, "launch")) == 1 and sum(cloud.clock.slept) >= 15


def test_a_launch_whose_instance_shows_late_is_found():
    cloud, service, type, region = ready()
    service.faults += [Fault("launch", 1, "after", status=502), Fault("GET /instances", 4, "lags", seconds=3600)]
    id = cloud.launch(type, region, "laptop", "gpu")
    assert list(service.instances) == [id]


def test_a_launch_that_nobody_can_look_for_is_unsure():
    cloud, service, type, region = ready()
    service.faults += [Fault("launch", 1, "after", status=502), Fault("GET /instances", None, "timeout_before")]
    with pytest.raises(Unsure) as e:
        cloud.launch(type, region, "laptop", "gpu")
    assert "gpu" in str(e.value) and "nanogpt cloud ls" in str(e.value) and len(service.instances) == 1


def test_an_instance_of_the_same_name_from_before_is_not_taken_for_the_new_one():
    cloud, service, type, region = ready()
    old = cloud.launch(type, region, "laptop", "gpu")
    service.faults.append(Fault("launch", 1, "before"))
    with pytest.raises(NotLaunched):
        cloud.launch(type, region, "laptop", "gpu")
    service.faults.append(Fault("launch", 1, "after"))
    assert cloud.launch(type, region, "laptop", "gpu") != old


@pytest.mark.parametrize("kind", ["429", "refused"])
def test_a_launch_that_was_not_let_in_is_put_again(kind):
    cloud, service, type, region = ready()
    service.faults.append(Fault("launch", 2, kind, retry_after="13" if kind == "429" else None))
    id = cloud.launch(type, region, "laptop", "gpu")
    assert list(service.instances) == [id] and len(lines(service, "launch")) == 3
    service.faults.append(Fault("launch", None, kind))
    with pytest.raises(TooFast if kind == "429" else NotLaunched):
        cloud.launch(type, region, "laptop", "other")
    assert list(service.instances) == [id]


KINDS = "timeout_before timeout_after dropped dropped_before refused 429 before after garbage".split()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["launch", "GET /instances$", "."]),
            st.integers(1, 8),
            st.sampled_from(KINDS),
            st.sampled_from([500, 502, 503]),
            st.integers(0, 3),
        ),
        max_size=6,
    )
)
def test_whatever_goes_wrong_a_launch_makes_one_instance_and_knows_it(faults):
    cloud, service, type, region = ready()
    service.faults += [Fault(match, times, kind, status=status, skip=skip) for match, times, kind, status, skip in faults]
    outcome, id = "made", None
    try:
        id = cloud.launch(type, region, "laptop", "gpu")
    except Unsure:
        outcome = "unsure"
    except CloudError:
        outcome = "none"
    made = list(service.instances)
    assert len(made) <= 1
    if outcome != "unsure":
        assert made == ([id] if outcome == "made" else [])


@pytest.mark.parametrize(
    "wrong",
    [
        dict(name=""),
        dict(name="x" * 65),
        dict(tags={"Key": "v"}),
        dict(tags={"key": "v" * 129}),
        dict(hostname="-a"),
        dict(hostname="A"),
        dict(user_data="é" * 500_001),
    ],
    ids=lambda o: next(iter(o)),
)
def test_a_launch_that_cannot_be_is_not_asked_for(wrong):
    cloud, service, type, region = ready()
    asked = len(service.asked)
    with pytest.raises(ConfigError):
        cloud.launch(type, region, "laptop", **(dict(name="gpu") | wrong))
    assert len(service.asked) == asked


@pytest.mark.parametrize("line", ["", "ssh-ed25519", "-----BEGIN OPENSSH PRIVATE KEY-----\nabc def\n"])
def test_only_a_public_key_is_registered(line):
    cloud, service = pair()
    with pytest.raises(ConfigError):
        cloud.add_ssh_key("laptop", line)
    assert not service.asked


# Time


def test_the_time_is_the_service_s_whatever_this_machine_believes():
    service = Service(Quick(), key=KEY)
    cloud = LambdaCloud(KEY, transport=transport(service), clock=Wrong())
    assert not cloud.heard
    cloud.clock.now = service.clock.now
    cloud.regions()
    assert cloud.heard and abs(cloud.time() - service.clock.now) <= 1
    before = cloud.time()
    for _ in range(50):
        cloud.clock.sleep(0.37)
        service.clock.now = cloud.clock.now
        cloud.regions()
        assert before <= cloud.time() and abs(cloud.time() - service.clock.now) <= 1
        before = cloud.time()
    cloud.clock.sleep(8 * 3600)  # the lid was shut
    assert abs(cloud.time() - service.clock.now - 8 * 3600) <= 1


def test_a_date_of_somebody_on_the_way_does_not_count():
    cloud = scripted((502, "<html>", {"Date": "Fri, 01 Jan 2038 00:00:00 GMT"}), (200, dict(data=[]), {"Date": "nonsense"}))
    assert cloud.regions() == [] and not cloud.heard


# The pace, over processes

TURNS = """
import sys, json
from nanogpt_nb.remote.asking import Pace
from nanogpt_nb.remote.cloud import Clock
clock = Clock(); pace = Pace(clock)
print(json.dumps([(pace.turn("ask"), pace.own["ask"])[1] for _ in range(15)]))
"""


def test_processes_take_turns():
    many = [subprocess.Popen([sys.executable, "-c", TURNS], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    turns = sorted(t for p in many for t in json.loads(p.communicate(timeout=240)[0]))
    assert len(turns) == 45 and min(b - a for a, b in zip(turns, turns[1:])) > 1


def test_a_file_of_turns_that_is_torn_or_from_before_a_restart_or_not_to_be_written(tmp_path):
    clock = Quick()
    for text in ("", "{", "[]", '{"ask": "x"}', json.dumps(dict(ask=clock.monotonic() + 1e7)), "\x00\x00"):
        (tmp_path / "pace").write_text(text)
        pace = Pace(clock, tmp_path / "pace")
        assert pace.turn("ask") == 0 < pace.turn("ask") < 2
    (tmp_path / "file").touch()
    pace = Pace(clock, tmp_path / "file" / "pace")
    assert pace.turn("launch") == 0 < pace.turn("launch")


def test_turns_of_before_a_restart_do_not_count_and_a_long_wait_is_said(tmp_path):
    clock, said = Quick(), []
    pace = Pace(clock, tmp_path / "pace")
    assert [pace.turn("launch") for _ in range(2)] == [0, 12.5]
    again = Pace(clock, tmp_path / "pace")
    again.say = said.append
    again.wait("launch")
    assert clock.slept == [25] and "25 s" in said[0]
    after = Pace(clock, tmp_path / "pace")
    after.boot = "another"
    assert after.turn("launch") == 0
    (tmp_path / "pace").write_text(json.dumps(dict(launch=clock.monotonic() + 1000, boot=pace.boot)))
    assert Pace(clock, tmp_path / "pace").turn("launch") == 0


def test_a_client_of_the_network_keeps_the_pace_and_a_rehearsal_does_not():
    real = LambdaCloud(KEY, transport=httpx.MockTransport(lambda r: httpx.Response(200, json=dict(data=[]))))
    assert real.pace.path.is_relative_to(os.environ["NANOGPT_NB_DATA"]) and LambdaCloud(KEY, "http://127.0.0.1:1/api/v1").pace is not None
    real.regions()
    assert Pace(Clock()).turn("ask") > 0


# Whom the key goes to


class Server(ThreadingHTTPServer):
    "A real server that notes what comes, and answers with `answer(path)` -> status, headers, body."

    daemon_threads = True

    def __init__(self, answer):
        came = self.came = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                came.append((self.path, self.headers.get("Authorization")))
                status, headers, body = answer(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


def test_an_answer_whose_header_drips_in_ends(monkeypatch):
    gone, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def drip():
        with listener.accept()[0] as line, contextlib.suppress(OSError):
            line.recv(65536)
            line.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not gone.wait(0.05):
                line.sendall(b"a")
        gone.set()

    threading.Thread(target=drip, daemon=True).start()
    cloud = LambdaCloud(KEY, f"http://127.0.0.1:{listener.getsockname()[1]}")
    cloud.longest, cloud.waits = 0.5, ()
    with listener, pytest.raises(Unreachable, match="no end") as e:
        cloud.regions()
    assert e.value.sent and gone.wait(120)  # the line was closed, too


def test_nothing_of_the_service_moves_the_cursor_bears_a_secret_or_leads_elsewhere():
    told = dict(
        id="a",
        name="\x1b[2Jgpu",
        status="act\x1b]0;x\x07ive",
        region=dict(name="us\x1b[31m"),
        link=f"https://x/?token={KEY}",
        list=[f"x?api_key={KEY}"],
    )
    cloud = scripted((200, dict(data=[told, told | dict(id=".."), told | dict(id="a/b")])))
    (one,) = cloud.instances()
    shown = repr(one) + repr(vars(one)) + str(one.region)
    assert "\\x1b" not in shown and "\x1b" not in shown and KEY not in shown and "more" not in repr(one)
    for ask in (cloud.instance, cloud.terminate, cloud.restart, cloud.delete_ssh_key):
        with pytest.raises(ConfigError):
            ask("..")


@pytest.mark.parametrize("depth", [900, 3000, 100_000])
def test_what_is_nested_without_end_is_a_sentence(depth):
    with pytest.raises((Unreachable, CloudError)):
        scripted((200, b'{"data":' + b"[" * depth + b"]" * depth + b"}")).types()


def test_a_redirect_is_not_followed():
    with (
        Server(lambda path: (200, {}, b'{"data": []}')) as other,
        Server(lambda path: (307, {"Location": f"{other.url}/regions"}, b"")) as server,
    ):
        with pytest.raises(CloudError) as e:
            LambdaCloud(KEY, server.url).regions()
        assert e.value.status == 307 and server.came == [("/regions", f"Bearer {KEY}")] and other.came == []


def test_a_proxy_of_the_environment_does_not_see_a_rehearsal(monkeypatch):
    with (
        Server(lambda path: (200, {}, b'{"data": []}')) as proxy,
        Server(lambda path: (200, {}, b'{"data": [{"name": "here"}]}')) as server,
    ):
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert [r.name for r in LambdaCloud(KEY, server.url).regions()] == ["here"] and proxy.came == []


def certificate(folder):
    "A certificate for 127.0.0.1 that nobody vouches for."
    from datetime import datetime, timedelta, timezone
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.now(timezone.utc)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - timedelta(1))
        .not_valid_after(now + timedelta(1))
    )
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=True).sign(
        key, hashes.SHA256()
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.pem").write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return folder / "server.pem"


def test_a_server_that_nobody_vouches_for_does_not_get_the_key(tmp_path):
    made = certificate(tmp_path)
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(made)
    with Server(lambda path: (200, {}, b'{"data": []}')) as server:
        server.socket = there.wrap_socket(server.socket, server_side=True)
        cloud = LambdaCloud(KEY, server.url.replace("http:", "https:"), clock=Quick())
        with pytest.raises(Unreachable) as e:
            cloud.regions()
        assert server.came == [] and not e.value.sent and "certificate" in str(e.value)
        trusting = LambdaCloud(KEY, cloud.base_url, clock=Quick())
        client = httpx.Client(verify=ssl.create_default_context(cafile=made), auth=trusting._client().auth)
        trusting._client = lambda: client
        assert trusting.regions() == [] and server.came == [("/regions", f"Bearer {KEY}")]


@pytest.mark.parametrize(
    "url",
    [
        "http://cloud.lambda.ai/api/v1",
        "http://127.0.0.1.example.com",
        "http://localhost@example.com",
        "ftp://127.0.0.1",
        "cloud.lambda.ai",
        "",
        "https://",
        f"https://user:{KEY}@x.y",
        f"https://x.y?k={KEY}",
        "https://x.y:99999",
        "https://x y",
        "https://[::1",
        None,
        "https://x.y\n",
    ],
)
def test_an_address_that_a_key_should_not_go_to(url):
    if url == "https://x.y\n":
        assert checked_url(url) == "https://x.y"
        return
    with pytest.raises(ConfigError) as e:
        checked_url(url)
    assert KEY not in str(e.value) and "\n" not in str(e.value)


def test_the_key_shows_up_nowhere(caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    told = json.dumps(dict(error=dict(code="x", message=f"Bearer {KEY}", suggestion=KEY, request_id=KEY))).encode()
    seen = []
    with Server(lambda path: (400, {}, told)) as server, LambdaCloudOf(server) as cloud:
        try:
            cloud.regions()
        except CloudError as e:
            seen += [
                str(e),
                repr(e),
                repr(vars(e)),
                "".join(traceback.TracebackException(type(e), e, e.__traceback__.tb_next, capture_locals=True).format()),
            ]
        seen += [repr(cloud), str(cloud), repr(vars(cloud)), repr(cloud._client()), repr(vars(cloud._client())), caplog.text]
        assert server.came == [("/regions", f"Bearer {KEY}")]
    with pytest.raises(TypeError):
        pickle.dumps(cloud._secret)
    assert len(caplog.records) > 0
    for text in seen:
        assert KEY not in text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


@contextlib.contextmanager
def LambdaCloudOf(server):
    cloud = LambdaCloud(KEY, server.url)
    yield cloud
    cloud._client().close()


# Where the key comes from


def test_the_first_place_that_has_a_key_wins(monkeypatch, tmp_path):
    assert where_key() is None
    with pytest.raises(ConfigError) as e:
        find_key()
    for way in ("nanogpt cloud login", "LAMBDA_API_KEY", "LAMBDA_API_KEY_FILE", "https://cloud.lambda.ai/api-keys"):
        assert way in str(e.value)
    path = Path(save_key("of_the_file"))
    assert path.stat().st_mode & 0o777 == 0o600 and (where_key(), find_key()) == ("file", "of_the_file")
    (tmp_path / "own").write_text("of_my_file\n")
    (tmp_path / "own").chmod(0o600)
    monkeypatch.setenv("LAMBDA_API_KEY_FILE", str(tmp_path / "own"))
    assert find_key() == "of_my_file"
    monkeypatch.setenv("LAMBDA_API_KEY", "of_the_environment")
    assert (where_key(), find_key(), find_key("by_hand")) == ("environment", "of_the_environment", "by_hand")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "HTTP://127.0.0.1:8000", " http://localhost:8000", "https://cloud.lambda.ai.example.com/api/v1"]
)
def test_a_key_goes_to_its_own_service_only(url, monkeypatch):
    save_key("of_the_file")
    assert LambdaCloud(base_url="HTTPS://Cloud.Lambda.AI/api/v1/").key == "of_the_file"
    with pytest.raises(ConfigError, match="does not go to"):
        LambdaCloud(base_url=url)
    monkeypatch.setenv("LAMBDA_API_KEY", "of_the_environment")
    with pytest.raises(ConfigError, match="does not go to"):
        LambdaCloud(base_url=url)
    monkeypatch.setenv("LAMBDA_API_URL", url)
    assert LambdaCloud().key == LambdaCloud(base_url=url).key == "of_the_environment"
    assert LambdaCloud(base_url=LAMBDA).key == "of_the_file"
    monkeypatch.delenv("LAMBDA_API_KEY")
    save_key("of_another", url)
    assert LambdaCloud().key == "of_another" and KEY not in find_key()
    with pytest.raises(ConfigError, match="does not go to"):
        find_key(base_url=LAMBDA)


def test_what_cannot_be_forgotten_is_said(monkeypatch, tmp_path):
    import keyring

    ring, own = Ring(broken=True), Path(save_key("of_the_file"))
    (tmp_path / "own").write_text("of_my_file\n")
    (tmp_path / "own").chmod(0o600)
    monkeypatch.setenv("LAMBDA_API_KEY_FILE", str(tmp_path / "own"))
    monkeypatch.setenv("LAMBDA_API_KEY", "of_the_environment")
    monkeypatch.setattr(keyring, "get_keyring", lambda: ring)
    monkeypatch.setattr(keyring, "get_password", ring.get_password)
    left = forget_key()
    assert len(left) == 3 and str(tmp_path / "own") in left[0] and "keyring" in left[1] and "LAMBDA_API_KEY" in left[2] and not own.exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of a Unix")
def test_a_file_that_others_can_read_is_refused():
    path = Path(save_key("of_the_file"))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        find_key()
    path.chmod(0o600)
    forget_key()
    assert where_key() is None and not path.exists()


@pytest.mark.parametrize("key", ["", " ", "secret_a secret_b", "secret_a\nsecret_b", "sécret_a", "secret_\x00a", "secret_a" * 1000, 7])
def test_a_key_that_cannot_be_one_is_refused_unseen(key):
    for gets in (find_key, save_key, LambdaCloud):
        with pytest.raises(ConfigError) as e:
            gets(key)
        assert "cret_a" not in str(e.value)


class Ring:
    "A keyring in memory."

    priority = 5

    def __init__(self, broken=False):
        self.kept, self.broken = {}, broken

    def __getattr__(self, name):
        def call(service, user, *value):
            if self.broken:
                raise RuntimeError("locked")
            return dict(get_password=self.kept.get, set_password=self.kept.__setitem__, delete_password=self.kept.pop)[name](
                (service, user), *value
            )

        return call


def test_a_keyring_is_used_where_there_is_one_and_the_file_where_it_fails(monkeypatch):
    import keyring

    old = Path(save_key("of_the_file"))
    ring = Ring()
    monkeypatch.setattr(keyring, "get_keyring", lambda: ring)
    for name in ("get_password", "set_password", "delete_password"):
        monkeypatch.setattr(keyring, name, getattr(ring, name))
    assert "keyring" in save_key("of_the_ring") and not old.exists()
    assert (where_key(), find_key()) == ("keyring", "of_the_ring")
    ring.broken = True
    assert where_key() is None and save_key("of_the_file") == str(old) and find_key() == "of_the_file"
    ring.broken = False
    forget_key()
    assert where_key() is None and ring.kept == {}
