"""Requests and answers held against Lambda's own description of its service, where the file is there; against the typed models where it is not.

    check_request("POST", "/instances/0920…", b'{"name": "gpu"}')
    check_answer("GET", "/instances", 200, b'{"data": []}')

The file is the one that $NANOGPT_NB_OPENAPI names, or the newest beside the checkout. AssertionError says what does not fit.

`watch()` has all of it checked: what clients and guards of this process ask, what a rehearsed service in it answers, and what a rehearsal
in another process answers them. conftest.py calls it, and fails each test in which `mismatches()` are found.
"""

import contextlib
import functools
import json
import os
import re
import threading
from collections import Counter
from pathlib import Path

BESIDE = sorted((Path(__file__).resolve().parents[2] / "shared" / "data").glob("lambda-cloud-openapi-*.json"))
FILE = Path(os.environ["NANOGPT_NB_OPENAPI"]) if os.environ.get("NANOGPT_NB_OPENAPI") else next(reversed(BESIDE), None)
OPENAPI = json.loads(FILE.read_text(encoding="utf-8")) if FILE and FILE.is_file() else None

PATHS = {  # what the package asks for, and the fields that it may send along
    "/instance-types": {"GET": ""},
    "/regions": {"GET": ""},
    "/images": {"GET": ""},
    "/file-systems": {"GET": ""},
    "/ssh-keys": {"GET": "", "POST": "name public_key"},
    "/ssh-keys/{id}": {"DELETE": ""},
    "/filesystems": {"POST": "name region"},
    "/filesystems/{id}": {"DELETE": ""},
    "/instances": {"GET": ""},
    "/instances/{id}": {"GET": "", "POST": "name"},
    "/instance-operations/launch": {
        "POST": "region_name instance_type_name ssh_key_names name user_data hostname file_system_names file_system_mounts tags image"
    },
    "/instance-operations/terminate": {"POST": "instance_ids"},
    "/instance-operations/restart": {"POST": "instance_ids"},
}
ODD = {"garbage", "status", "fields"}  # faults of the rehearsed service whose answers are not as described, on purpose


def template(path: str) -> str:
    "`/api/v1/instances/0920…?x=1` is `/instances/{id}`."
    path = "/" + path.partition("?")[0].removeprefix("/api/v1").strip("/")
    return path if path in PATHS else re.sub(r"^(/[^/]+)/[^/]+$", r"\1/{id}", path)


def operation(method: str, path: str) -> dict | None:
    return OPENAPI["paths"].get(f"/api/v1{template(path)}", {}).get(method.lower()) if OPENAPI else None


@functools.cache
def validator(method: str, path: str, status: str):  # status: "" for the request
    from jsonschema import Draft202012Validator

    there = operation(method, path)
    part = there["responses"].get(status) if status else there.get("requestBody")
    schema = part and part.get("content", {}).get("application/json", {}).get("schema")
    return schema and Draft202012Validator({"components": OPENAPI["components"], "allOf": [schema]})


def fits(method: str, path: str, status: str, told) -> bool:
    "Whether there is a schema for this; AssertionError where `told` does not follow it."
    checks = validator(method, template(path), status)
    wrong = sorted(checks.iter_errors(told), key=lambda e: list(map(str, e.path))) if checks else []
    assert not wrong, f"{method} {path} {status}: {wrong[0].message} at {'/'.join(map(str, wrong[0].absolute_path))}"
    return bool(checks)


def parsed(body):
    return json.loads(body) if isinstance(body, (bytes, str)) and body else body or None


def check_request(method: str, path: str, body=None):
    "A request that the service knows, with a body as it wants it."
    assert method in PATHS.get(template(path), ()), f"{method} {path} is not asked for by this package"
    told = parsed(body)
    if OPENAPI:
        assert operation(method, path), f"{method} {path} is not in {FILE.name}"
        assert fits(method, path, "", told) or told is None, f"{method} {path} takes no body"
    unknown = set(told or ()) - set(PATHS[template(path)][method].split())  # the description lets any other field pass, and the service ignores it
    assert not unknown, f"{method} {path} has no field {', '.join(sorted(unknown))}"
    if template(path) == "/instance-operations/launch":
        assert {"region_name", "instance_type_name", "ssh_key_names"} <= told.keys() and len(told["ssh_key_names"]) == 1
        assert len(told.get("name", "")) <= 64 and all(
            re.fullmatch(r"[a-z][a-z0-9:-]{1,54}", t["key"]) and len(t["value"]) <= 128 for t in told.get("tags", ())
        )
    elif template(path).startswith("/instance-operations/"):
        assert [type(id) for id in told["instance_ids"]] == [str]
    elif method == "POST":
        assert 0 < len(told["name"]) <= 64


def check_answer(method: str, path: str, status: int, body):
    "An answer as the service gives it; one that it has no description for (429, 500) is an error with code and message all the same."
    told = parsed(body)
    if operation(method, path) and fits(method, path, str(status), told):
        return
    if status >= 400:
        assert told.keys() == {"error"} and all(told["error"][k] and isinstance(told["error"][k], str) for k in ("code", "message")), told
        return
    assert told.keys() == {"data"} and MODELS[method, template(path)](told["data"]), told


def _models() -> dict:
    from nanogpt_nb.remote.cloud import FileSystem, Image, Instance, InstanceTypes, Region, SSHKey, read_all

    some = lambda cls: lambda told: len(read_all(cls, told)) == len(told) or not told  # noqa: E731
    whole = lambda i: bool(i.id and i.status and i.region and i.type and i.type.cents)  # noqa: E731
    one = lambda told: whole(Instance.from_json(told))  # noqa: E731
    asked = lambda key: lambda told: all(map(one, told[key]))  # noqa: E731
    empty = lambda told: told == {}  # noqa: E731
    return {
        ("GET", "/instance-types"): lambda told: len(InstanceTypes.from_json(told)) == len(told),
        ("GET", "/regions"): some(Region),
        ("GET", "/images"): some(Image),
        ("GET", "/file-systems"): some(FileSystem),
        ("GET", "/ssh-keys"): some(SSHKey),
        ("POST", "/ssh-keys"): lambda told: bool(SSHKey.from_json(told).public_key),
        ("DELETE", "/ssh-keys/{id}"): empty,
        ("POST", "/filesystems"): lambda told: bool(FileSystem.from_json(told).mount_point),
        ("DELETE", "/filesystems/{id}"): lambda told: isinstance(told["deleted_ids"], list),
        ("GET", "/instances"): lambda told: all(map(one, told)),
        ("GET", "/instances/{id}"): one,
        ("POST", "/instances/{id}"): one,
        ("POST", "/instance-operations/launch"): lambda told: (
            all(isinstance(id, str) and id for id in told["instance_ids"]) and told["instance_ids"]
        ),
        ("POST", "/instance-operations/terminate"): asked("terminated_instances"),
        ("POST", "/instance-operations/restart"): asked("restarted_instances"),
    }


MODELS = _models()


# All that is asked and answered

SEEN = Counter()  # how many requests and answers were checked
_FOUND: list[str] = []
_pardons: list[str] = []  # what may be wrong now
_here = threading.local()  # .struck: a fault makes the answer of this thread odd


@contextlib.contextmanager
def odd(what: str, why: str):
    "Within, each `request`, or each `answer`, may be wrong: that is what is tested."
    assert what in ("request", "answer") and why
    _pardons.append(what)
    try:
        yield
    finally:
        _pardons.remove(what)


def mismatches() -> list[str]:
    "What did not fit since this was last asked."
    found = list(dict.fromkeys(_FOUND))
    _FOUND.clear()
    return found


@functools.lru_cache(maxsize=4096)
def verdict(check, described: bool, *what) -> str:
    "What is wrong with a request or an answer; the same one is looked at once."
    try:
        check(*what)
    except Exception as e:
        return f"{' '.join(map(str, what))[:300]}: {type(e).__name__}: {e}"
    return ""


def hold(what: str, check, *told):
    if what in _pardons:
        return
    SEEN[what] += 1
    if wrong := verdict(check, bool(OPENAPI), *told):
        _FOUND.append(f"{what}: {wrong}")


def hold_request(method: str, path: str, body: bytes | str | None):
    hold("request", check_request, method, path, body or None)


def hold_answer(method: str, path: str, status: int, content: bytes):
    hold("answer", check_answer, method, template(path), status, bytes(content))


def watch():
    "Check all that is asked and answered in this process from now on."
    from nanogpt_nb.remote.asking import Api
    from nanogpt_nb.remote.rehearsed import Service

    handle, take, sent = Service.handle, Service.take, Api._sent
    if hasattr(handle, "__wrapped__"):
        return

    @functools.wraps(handle)
    def watched_handle(self, method, path, headers=None, body=b""):
        hold_request(method, path, body)
        _here.struck = False
        status, more, content = handle(self, method, path, headers, body)
        if not _here.struck:
            hold_answer(method, path, status, content)
        return status, more, content

    @functools.wraps(take)
    def watched_take(self, line, *kinds):
        fault = take(self, line, *kinds)
        if fault and fault.kind in ODD:
            _here.struck = True
        return fault

    @functools.wraps(sent)
    def watched_sent(self, method, path, body, patience):
        hold_request(method, path, None if body is None else json.dumps(body))  # of those too that get lost on the way
        status, headers, content = sent(self, method, path, body, patience)
        if self.is_rehearsal and not self._transport:  # the service is another process
            hold_answer(method, path, status, content)
        return status, headers, content

    Service.handle, Service.take, Api._sent = watched_handle, watched_take, watched_sent
