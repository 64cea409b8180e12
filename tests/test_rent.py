"Renting: which machine, the wait until it computes, and giving back what is no good. Against the rehearsed service, with real sshds where they matter."

import json
import os
import random
import shutil
import stat
import subprocess
from types import SimpleNamespace

import pytest
from box import make_key, until, why_no_box

from nanogpt_nb.config import ConfigError
from nanogpt_nb.remote import there_compute
from nanogpt_nb.remote.address import add_host, entries, find_address
from nanogpt_nb.remote.agent import Dropped, HostError
from nanogpt_nb.remote.cloud import NoCapacity, OverQuota, Unsure
from nanogpt_nb.remote.host_key import content, new_host_key, user_data
from nanogpt_nb.remote.keys import ChangedKey
from nanogpt_nb.remote.lambda_cloud import LambdaCloud
from nanogpt_nb.remote.my_key import my_key, register_key
from nanogpt_nb.remote.order import BadBox, Limits, NoBox, Order, Stopped
from nanogpt_nb.remote.rehearsal_boxes import Boxes
from nanogpt_nb.remote.rehearsed import Fault, Service, transport
from nanogpt_nb.remote.rent import Watch, forget, rent

needs_box = pytest.mark.skipif(why_no_box() is not None, reason=why_no_box() or "")
URL = "http://127.0.0.1:1/api/v1"
QUICK = dict(boot=30, ssh=15, let_in=5, compute=0.5, give_back=30, every=0.1, look=0.1)


class Ticking:
    "A clock that only moves when somebody waits."

    simulated, now = True, 1_800_000_000.0

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds


class Dry(Order):
    "An order whose machines are mere words: `verdicts` is what their GPUs do, one after the other, and then well."

    verdicts, alive = (), None

    def until_in(self, w, host):
        for _ in range(5):
            self.clock.sleep(5)
            self.look(w)

    def until_computes(self, w, host):
        if w.id not in self.alive():
            raise BadBox("the connection to it is lost")
        if self.verdicts and (error := self.verdicts.pop(0)):
            raise BadBox(f"its GPU does not compute: {error}")
        return dict(gpus=["NVIDIA A10"])


class Place:
    "A service, a client, and what was said and noted. It watches that there are never two machines."

    def __init__(self, folder, **service):
        self.folder, self.said, self.events, self.most = folder, [], [], 0
        self.service = Service(**service)
        self.service.capacity = dict(gpu_1x_a10=["us-east-1", "us-west-1"], gpu_1x_h100_pcie=["us-west-3"], gpu_8x_h100_sxm5=["us-east-1"])
        watched = SimpleNamespace(handle=self.handle, clock=self.service.clock)
        self.cloud = LambdaCloud(self.service.key, URL, transport(watched), service.get("clock"))
        self.cloud.is_rehearsal, self.cloud.pace = True, None
        self.lease = folder / "Application Support" / "100% lease"  # as on a Mac, and worse
        self.lease.mkdir(parents=True)

    def handle(self, *request):
        try:
            return self.service.handle(*request)
        finally:
            self.most = max(self.most, len(self.alive()))

    def alive(self):
        return [m.id for m in self.service.machines.values() if m.ended is None and m.status != "terminating"]

    def note(self, kind, **facts):
        self.events.append((kind, facts))

    def kinds(self):
        return [kind for kind, _ in self.events]

    def how(self, **more):
        name_of = lambda cents: f"nanogpt-demo-until-{self.cloud.time():.0f}"
        return dict(name_of=name_of, alias="gpu", folder=self.lease, say=self.said.append) | more

    def rent(self, types=("gpu_1x_a10",), regions=(), **more):
        return rent(self.cloud, self.note, types, regions, **self.how(**dict(limits=Limits(**QUICK)) | more))

    def dry(self, types=("gpu_1x_a10",), tries=3, verdicts=(), **more):
        order = Dry(self.cloud, types=types, **dict(self.how(), note=self.note) | more)
        order.verdicts, order.alive = list(verdicts), self.alive
        order.ruled()
        order.ssh_key, order.private = register_key(self.cloud)
        return order.until_rented(tries)


@pytest.fixture(autouse=True)
def laptop(tmp_path, monkeypatch):
    home = tmp_path / "laptop"
    home.mkdir()
    for name in ("SSH_AUTH_SOCK", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "LAMBDA_API_KEY", "LAMBDA_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NANOGPT_NB_DATA", str(tmp_path / "data"))
    return home


@pytest.fixture
def words(tmp_path):
    return Place(tmp_path, clock=Ticking(), boot=180)


@pytest.fixture
def place(tmp_path):
    boxes = Boxes(tmp_path / "rehearsal", swap=0.8)
    made = Place(tmp_path, hypervisor=boxes, boot=0.2, ending=0.1)
    made.boxes = boxes
    yield made
    for id in list(boxes.up):
        boxes.destroy(id)


# ---- with real sshds


@needs_box
def test_a_machine_that_computes_is_reached_by_its_name_with_the_key_that_was_made_for_it(place, laptop):
    gpu = place.rent()
    assert list(dict.fromkeys(place.kinds())) == ["asking", "launched", "status", "address", "ready"] and len(place.alive()) == 1
    assert any("key of its image" in said for said in place.said)
    done = subprocess.run(
        ["ssh", "-F", str(laptop / ".ssh" / "config"), "gpu", "echo $NANOGPT_NB_REHEARSAL"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    assert done.stdout == "1\n", done.stderr
    assert gpu.host.run(["pwd"]).out.strip().endswith(f"{gpu.instance.id}/home")
    gpu.host.close()
    kinds, name = find_address("gpu"), place.events[0][1]["name"]
    assert kinds.key_name in (kinds.known_hosts and open(kinds.known_hosts[0]).read()) and name == gpu.instance.name
    forget("gpu")
    assert "gpu" not in entries()


@needs_box
def test_a_gpu_that_gives_802_is_given_back_another_is_tried_and_no_secret_is_told(place, tmp_path, laptop, capfd):
    place.service.faults = [Fault("launch", times=1, kind="gpu", value="802")]
    gpu = place.rent()
    first, second = [facts["id"] for kind, facts in place.events if kind == "launched"]
    assert place.alive() == [second] == [gpu.instance.id] and place.most == 1
    why = next(facts["why"] for kind, facts in place.events if kind == "giving_back")
    assert "802" in why and place.kinds().index("gone") < len(place.kinds()) - 1 - place.kinds()[::-1].index("asking")
    assert not (place.boxes.folder / "boxes" / first).exists()
    machines = place.service.machines.values()
    private = [json.loads(m.user_data.partition("\n")[2])["ssh_keys"]["ed25519_private"].splitlines() for m in machines]
    secrets = [*(m.token for m in machines), *("".join(lines[2:4]) for lines in private)]
    told = " ".join(map(str, (gpu, place.said, place.events, capfd.readouterr()))).replace("\\n", "").replace("\n", "")
    files = [p for p in [*place.lease.rglob("*"), *laptop.rglob("*")] if p.is_file()]
    written = "".join(p.read_text(errors="replace") for p in files).replace("\n", "")
    assert len(secrets) == 4 and all(len(s) > 20 for s in secrets) and not [s for s in secrets if s in told or s in written]
    assert [p.name for p in files if "PRIVATE KEY" in p.read_text(errors="replace")] == ["nanogpt_nb_ed25519"]


@needs_box
def test_a_machine_that_keeps_another_host_key_is_never_talked_to(place, tmp_path):
    place.boxes.swap = 1e6
    seen = []
    place.boxes.destroy, destroy = (
        lambda id: (seen.append((place.boxes.box(id) / "sshd.log").read_text()), destroy(id)),
        place.boxes.destroy,
    )
    with pytest.raises(NoBox, match="never showed the host key") as caught:
        place.rent(tries=1, limits=Limits(**QUICK | dict(ssh=1.5)))
    assert "given back" in str(caught.value) and place.alive() == [] and "gpu" not in entries()
    assert seen and not any("Accepted" in log for log in seen)


@needs_box
def test_a_machine_without_our_key_is_given_back_and_said(place):
    boot = place.boxes.boot
    place.boxes.boot = lambda m: (boot(m), (place.boxes.box(m.id) / "home" / ".ssh" / "authorized_keys").write_text(""))[0]
    with pytest.raises(HostError, match="does not let"):
        place.rent(limits=Limits(**QUICK | dict(let_in=0.5)))
    assert place.alive() == [] and place.kinds()[-1] == "gone"


def test_what_is_awaited_is_said_and_what_the_machine_says_is_one_line(words):
    order = Order(words.cloud, types=("gpu_1x_a10",), **dict(words.how(), note=words.note))
    watch, answers = Watch("a", SimpleNamespace(gpus=1), 0), [Dropped("none")] * 60 + [ChangedKey("other")] * 60
    order.look = lambda w: None
    host = SimpleNamespace(connect=lambda tries: (_ for _ in ()).throw(answers.pop(0)) if answers else None)
    order.until_in(watch, host)
    assert (
        len(words.said) >= 5
        and "sshd does not answer" in words.said[0]
        and "key of its image" in words.said[-1]
        and "300 s" in words.said[0]
    )
    host.call = lambda verb, gpus: dict(ok=True, gpus=["\x1b[2JA10"], error="", note="x")
    assert order.until_computes(watch, host)["gpus"] == ["[2JA10"] and "\x1b" not in words.said[-1]


def test_ssh_takes_no_other_key_and_lends_no_agent(laptop):
    (laptop / ".ssh").mkdir(mode=0o700)
    (laptop / ".ssh" / "config").write_text("Host *\n  ForwardAgent yes\n  VerifyHostKeyDNS yes\n")
    address = add_host("gpu", "ubuntu@192.0.2.7", key_alias="nanogpt-a", known_hosts=str(laptop / "known"))
    said = {"GlobalKnownHostsFile /dev/null", "VerifyHostKeyDNS no", "ForwardAgent no", "StrictHostKeyChecking yes"}
    assert said <= set(entries()["gpu"]) and address.known_hosts == (str(laptop / "known"),) and address.global_hosts == ("/dev/null",)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("gpu_1x_a10", "lambda:gpu_1x_a10"),
        ("lamda:gpu_1x_a10", "lambda:gpu_1x_a10"),
        ("rehersal:cpu_4x_general", "rehearsal:cpu_4x_general"),
    ],
)
def test_a_type_is_no_host(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        find_address(name)
    add_host("gpu_1x_a10", "192.0.2.7")
    assert find_address("gpu_1x_a10").host == "192.0.2.7" and find_address("lambda").host == "lambda"


# ---- which one


def test_the_order_of_types_and_regions_counts(words):
    assert words.dry(("gpu_1x_h100_pcie", "gpu_1x_a10")).instance.region.name == "us-west-3"
    forget("gpu")
    assert words.dry(("gpu_1x_a10",), regions=("us-west-1", "us-east-1")).instance.region.name == "us-west-1"


def test_what_is_gone_when_it_is_asked_for_is_not_asked_for_again(words):
    words.service.faults = [Fault("launch", times=2, kind="capacity")]
    made = words.dry(("gpu_1x_a10", "gpu_1x_h100_pcie"))
    asked = [(facts["type"], facts["region"]) for kind, facts in words.events if kind == "asking"]
    assert len(set(asked)) == 3 and made.instance.type.name == "gpu_1x_h100_pcie"


def test_nothing_free_says_where_there_is_something(words):
    words.service.capacity = dict(gpu_1x_h100_pcie=["us-west-3"])
    with pytest.raises(NoCapacity, match=r"gpu_1x_h100_pcie \(\$\d+\.\d\d an hour\)"):
        words.dry()
    with pytest.raises(NoCapacity, match="in us-west-3 there is one"):
        words.dry(("gpu_1x_h100_pcie",), regions=("us-east-1",))
    assert words.events == []


def test_the_wait_for_one_survives_a_service_that_stumbles(words):
    words.service.capacity, clock = {}, words.cloud.clock
    words.service.faults = [Fault("instance-types", times=40, kind="before", status=503, skip=1)]
    sleep = clock.sleep
    clock.sleep = lambda s: (sleep(s), clock.now > 1_800_001_800 and words.service.capacity.update(gpu_1x_a10=["us-east-1"]))
    assert words.dry(until=clock.now + 3600).instance.type.name == "gpu_1x_a10"
    assert 1800 < clock.now - 1_800_000_000 < 2400


def test_the_wait_ends(words):
    words.service.capacity = {}
    with pytest.raises(NoCapacity):
        words.dry(until=words.cloud.clock.now + 600)
    assert 600 <= words.cloud.clock.now - 1_800_000_000 < 700


def test_a_quota_that_is_used_up_leads_to_the_next_type_and_then_to_its_error(words):
    words.service.quota = 1
    assert words.dry(("gpu_8x_h100_sxm5", "gpu_1x_a10")).instance.type.name == "gpu_1x_a10"
    with pytest.raises(OverQuota):
        words.dry(("gpu_8x_h100_sxm5", "gpu_1x_a10"))
    assert len(words.alive()) == 1


def test_a_file_system_says_the_region(words):
    for name, region in (("texts", "us-west-1"), ("more", "us-west-1"), ("far", "europe-central-1")):
        words.service.add_disk(dict(name=name, region=region))
    made = words.dry(file_systems=("texts", "more"))
    assert made.instance.region.name == "us-west-1" and set(made.instance.file_systems) == {"texts", "more"}
    for how, said in (
        (dict(file_systems=("texts", "far")), "in different regions"),
        (dict(file_systems=("text",)), "but texts is one"),
        (dict(file_systems=("texts",), regions=("us-east-1",)), "add that region"),
        (dict(regions=("us-west-9",)), "no region"),
    ):
        with pytest.raises(ConfigError, match=said):
            words.dry(**how)
    assert len(words.alive()) == 1


# ---- what goes wrong

BAD = ["unhealthy", "stuck", "sick", "preempted", "vanishes"]


@pytest.mark.parametrize("kind", BAD)
def test_a_machine_that_is_no_good_is_followed_by_another(words, kind):
    words.service.faults = [Fault("launch", times=1, kind=kind, seconds=10)]
    made = words.dry()
    assert words.alive() == [made.instance.id] and words.most == 1 and words.kinds().count("launched") == 2
    assert words.kinds().index("gone") < words.kinds().index("ready")


@pytest.mark.parametrize("kind, status", [("after", 502), ("after", 500), ("timeout_after", 0), ("dropped", 0), ("garbage", 0)])
def test_a_launch_whose_answer_is_lost_is_found_and_not_repeated(words, kind, status):
    words.service.faults = [Fault("launch$", times=1, kind=kind, status=status)]
    made = words.dry()
    assert list(words.service.machines) == [made.instance.id]


@pytest.mark.parametrize("kind", ["before", "timeout_before", "refused"])
def test_a_launch_that_surely_made_nothing_is_asked_for_again(words, kind):
    words.service.faults = [Fault("launch$", times=1, kind=kind, status=500)]
    assert [words.dry().instance.id] == words.alive() and words.most == 1


def test_a_launch_of_which_nothing_can_be_known_is_left_to_the_guards(words):
    words.service.faults = [
        Fault("launch$", times=1, kind="after", status=502),
        Fault("GET /instances", times=None, kind="before", status=500),
    ]
    with pytest.raises(Unsure):
        words.dry()
    assert words.kinds() == ["asking"] and len(words.alive()) == 1


def test_only_so_many_are_tried(words):
    with pytest.raises(NoBox, match="None of 2 machines"):
        words.dry(tries=2, verdicts=["error 802"] * 9)
    assert words.alive() == [] and words.kinds().count("launched") == words.kinds().count("gone") == 2
    assert {facts["region"] for kind, facts in words.events if kind == "asking"} == {"us-east-1", "us-west-1"}


def test_an_account_that_is_no_more_let_in_ends_it_and_what_may_run_is_said(words):
    sleep = words.cloud.clock.sleep
    words.cloud.clock.sleep = lambda s: (sleep(s), setattr(words.service, "key", "another"))
    with pytest.raises(HostError, match="not confirmed to be terminated.*nanogpt cloud down"):
        words.dry()
    assert words.kinds() == ["asking", "launched", "status", "giving_back"]


def test_one_that_somebody_else_terminates_is_not_replaced(words):
    sleep = words.cloud.clock.sleep
    words.cloud.clock.sleep = lambda s: (sleep(s), [words.service.terminate(dict(instance_ids=[id]), "") for id in words.alive()])
    with pytest.raises(Stopped, match="somebody else"):
        words.dry()
    assert len(words.service.machines) == 1 and words.alive() == []


def test_nobody_waits_for_what_is_not_wanted_any_more(words):
    with pytest.raises(Stopped):
        words.dry(keep=lambda: words.cloud.clock.now < 1_800_000_060)
    assert words.alive() == [] and words.kinds()[-1] == "gone" and "gpu" not in entries()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device"), SystemExit])
def test_an_error_at_any_step_leaves_nothing_running(tmp_path, error):
    for n in range(1, 100):
        folder = tmp_path / str(n)
        folder.mkdir()
        words, steps = Place(folder, clock=Ticking(), boot=30), []

        def strike(*args, steps=steps, n=n, **facts):
            steps.append(args)
            if len(steps) == n:
                raise error

        try:
            words.dry(note=strike, say=strike)
        except (KeyboardInterrupt, OSError, SystemExit, HostError):
            assert words.alive() == [], f"at step {n}: {steps[-1]}"
        else:
            return
    pytest.fail("it never got through")


def test_a_laptop_that_sleeps_while_it_boots_finds_it_awake(words):
    sleep, naps = words.cloud.clock.sleep, iter([0, 0, 7200])
    words.cloud.clock.sleep = lambda s: sleep(s + next(naps, 0))
    assert [words.dry().instance.id] == words.alive() and len(words.service.machines) == 1


def at_random(folder, seed):
    "Rent from a service with a handful of faults; how it ended."
    chance = random.Random(seed)
    words = Place(folder, clock=Ticking(), boot=chance.choice([5, 180]), seed=seed)
    kinds = [
        "before",
        "after",
        "timeout_before",
        "timeout_after",
        "dropped",
        "refused",
        "garbage",
        "429",
        "capacity",
        "keeps",
        "lags",
        "fields",
        "status",
        *BAD,
    ]
    for _ in range(chance.randrange(1, 7)):
        kind = chance.choice(kinds)
        match = (
            "launch$"
            if kind in (*BAD, "capacity")
            else "terminate$"
            if kind == "keeps"
            else chance.choice(["launch$", "GET /instances", "terminate$", "ssh-keys", "instance-types", ""])
        )
        fault = Fault(
            match, times=chance.randrange(1, 8), kind=kind, status=chance.choice([500, 502, 503]), seconds=chance.choice([1, 5, 30])
        )
        fault.retry_after, fault.skip = chance.choice([None, "3"]), chance.randrange(5)
        words.service.faults.append(fault)
    verdicts = chance.choices([None, "error 802"], [3, 1], k=3)
    try:
        made = words.dry(("gpu_1x_h100_pcie", "gpu_1x_a10"), verdicts=verdicts)
    except HostError as e:
        known = [facts["id"] for kind, facts in words.events if kind == "launched"]
        assert words.alive() == [] or isinstance(e, Unsure) or "not confirmed" in str(e) and words.alive() == known[-1:], (e, words.said)
        how = type(e).__name__
    else:
        assert words.alive() == [made.instance.id] and words.kinds()[-1] == "ready"
        how = "rented"
    assert words.most <= 1, words.said
    return how


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_service_does_there_are_never_two_and_never_one_too_many(tmp_path, seed):
    assert at_random(tmp_path, seed)


# ---- keys


def test_a_key_that_the_account_has_is_used_again_whatever_it_is_called(words, laptop):
    key = my_key()
    words.service.add_key(dict(name="typed by hand", public_key=key.public + " me@elsewhere"))
    assert register_key(words.cloud) == ("typed by hand", key.private) and len(words.cloud.ssh_keys()) == 1


def test_another_key_of_the_same_name_is_another_key(words, laptop):
    name = register_key(words.cloud)[0]
    other = new_host_key()[1]
    next(iter(words.service.keys.values()))["public_key"] = other
    with pytest.raises(HostError):
        register_key(words.cloud)
    assert name in [k.name for k in words.cloud.ssh_keys()]


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_the_key_that_there_is_is_used(words, laptop, kind):
    (laptop / ".ssh").mkdir(mode=0o700)
    make_key(laptop / ".ssh" / f"id_{kind}", kind)
    (laptop / ".ssh" / f"id_{kind}.pub").unlink()
    name, private = register_key(words.cloud)
    made = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, text=True, check=True).stdout
    assert content(words.cloud.ssh_keys()[0].public_key) == content(made) and private == str(laptop / ".ssh" / f"id_{kind}")


@pytest.mark.skipif(not all(map(shutil.which, ("ssh-keygen", "ssh-agent", "ssh-add"))), reason="OpenSSH is not installed")
def test_a_key_with_a_passphrase_needs_the_agent_and_that_is_said_before_it_costs(words, laptop, monkeypatch, tmp_path):
    (laptop / ".ssh").mkdir(mode=0o700)
    locked = laptop / ".ssh" / "id_ed25519"
    make_key(locked, passphrase="geheim")
    with pytest.raises(ConfigError, match="ssh-add"):
        words.rent(key=str(locked))
    assert words.service.machines == {} and words.events == []
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "a")], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "a"))
        ask = tmp_path / "ask"
        ask.write_text("#!/bin/sh\necho geheim\n")
        ask.chmod(stat.S_IRWXU)
        env = dict(os.environ, SSH_ASKPASS=str(ask), SSH_ASKPASS_REQUIRE="force", DISPLAY=":0")
        until(lambda: subprocess.run(["ssh-add", str(locked)], env=env, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0, "the agent")
        assert register_key(words.cloud, str(locked))[1] == str(locked) == register_key(words.cloud)[1]
        locked.unlink()
        (laptop / ".ssh" / "id_ed25519.pub").rename(tmp_path / "away.pub")
        assert register_key(words.cloud)[1] is None and len(words.cloud.ssh_keys()) == 1
        assert my_key(str(tmp_path / "away.pub")) == my_key()
    finally:
        agent.terminate()
        agent.wait()


@pytest.mark.parametrize("text, said", [("no key", "not a private key"), (new_host_key()[0][:200], "no key that can be used")])
def test_a_file_that_is_no_key_is_refused(words, tmp_path, text, said):
    (tmp_path / "k").write_text(text)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(ConfigError, match=said):
        my_key(str(tmp_path / "k"))


def test_a_broken_key_of_the_user_is_passed_over(laptop):
    (laptop / ".ssh").mkdir(mode=0o700)
    for name in ("id_ed25519", "id_rsa", "id_rsa.pub", "id_x.pub"):
        (laptop / ".ssh" / name).write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nnonsense\n")
        (laptop / ".ssh" / name).chmod(0o600)
    assert my_key().private.endswith("nanogpt_nb_ed25519")


# ---- names, and what cloud-init reads


def test_a_host_of_the_user_keeps_its_name(words, laptop):
    (laptop / ".ssh").mkdir(mode=0o700)
    (laptop / ".ssh" / "config").write_text("Host gpu\n  HostName lab.example.edu\n")
    for name in ("gpu", "box"):
        if name == "box":
            add_host("box", "192.0.2.7")
        with pytest.raises(ConfigError, match="another name"):
            rent(words.cloud, words.note, ("gpu_1x_a10",), (), **words.how(alias=name))
        forget(name)
    assert words.service.machines == {} and "lab.example.edu" in (laptop / ".ssh" / "config").read_text() and "box" in entries()


def test_cloud_init_reads_what_is_sent():
    yaml = pytest.importorskip("yaml")
    private, public = new_host_key()
    told = yaml.safe_load(user_data(private, public))
    assert told["ssh_deletekeys"] is True and told["ssh_keys"] == dict(ed25519_private=private, ed25519_public=public)
    assert user_data(private, public).startswith("#cloud-config\n")


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
def test_the_halves_belong_together(tmp_path):
    private, public = new_host_key()
    (tmp_path / "k").write_text(private)
    (tmp_path / "k").chmod(0o600)
    assert (
        subprocess.run(["ssh-keygen", "-y", "-f", str(tmp_path / "k")], capture_output=True, text=True, check=True).stdout.split()[:2]
        == public.split()[:2]
    )


# ---- the GPU


@pytest.mark.skipif(not shutil.which("cc") and not shutil.which("gcc"), reason="there is no C compiler")
@pytest.mark.parametrize(
    "code, said",
    [
        ("", ""),
        ("-DINIT=802", "cuInit gives error 802 (CUDA_ERROR_OTHER: words)"),
        ("-DCRASH", "signal 11"),
        ("-DFEW", "0 of 1 GPUs are there"),
        ("-DWRONG", "computes wrongly"),
    ],
)
def test_a_driver_of_our_own(tmp_path, monkeypatch, code, said):
    "A real shared library, called through ctypes in a child process."
    source = r"""
#include <stddef.h>
#ifndef INIT
#define INIT 0
#endif
static unsigned n[65536];
int cuInit(unsigned f) {
#ifdef CRASH
  *(volatile int *)0 = 1;
#endif
  return INIT; }
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_OTHER"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "words"; return 0; }
#ifdef FEW
int cuDeviceGetCount(int *c) { *c = 0; return 0; }
#else
int cuDeviceGetCount(int *c) { *c = 1; return 0; }
#endif
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int k, int d) { s[0] = 'G'; s[1] = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = n; return 0; }
int cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
int cuCtxSetCurrent(void *c) { return c == n ? 0 : 201; }
int cuMemAlloc_v2(unsigned long long *p, size_t k) { *p = (unsigned long long)(size_t)n; return k == sizeof n ? 0 : 1; }
int cuMemFree_v2(unsigned long long p) { return p == (unsigned long long)(size_t)n ? 0 : 1; }
int cuMemsetD32_v2(unsigned long long p, unsigned v, size_t k) { for (size_t i = 0; i < k; i++) n[i] = v; return k == 65536 ? 0 : 1; }
int cuModuleLoadData(void **m, const char *s) { *m = n + 1; return s[0] == '.' ? 0 : 218; }
int cuModuleGetFunction(void **f, void *m, const char *s) { *f = n + 2; return m == n + 1 ? 0 : 400; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned sh, void *st, void **p, void **x) {
  unsigned *o = (unsigned *)*(size_t *)p[0];
#ifndef WRONG
  for (unsigned i = 0; i < gx * bx; i++) o[i] = i * i + 7;
#endif
  return f == n + 2 ? 0 : 400; }
int cuMemcpyDtoH_v2(void *to, unsigned long long p, size_t k) { unsigned *a = to, *b = (unsigned *)(size_t)p; for (size_t i = 0; i < k / 4; i++) a[i] = b[i]; return 0; }
"""
    (tmp_path / "d.c").write_text(source)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [shutil.which("cc") or "gcc", "-shared", "-fPIC", "-w", *code.split(), "-o", str(library), str(tmp_path / "d.c")], check=True
    )
    monkeypatch.delenv("NANOGPT_NB_REHEARSAL", raising=False)
    monkeypatch.setattr(there_compute, "open_driver", lambda open=there_compute.open_driver: open(str(library)))
    monkeypatch.setattr(there_compute, "torch", lambda: "")
    found = there_compute.works()
    assert found["ok"] is not bool(said) and said in found["error"] and found["gpus"] == ([] if said else ["G"])
