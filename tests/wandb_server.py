"""A stand-in of W&B's server on the loopback, for tests and benchmarks.

It speaks what the real client needs: GraphQL, file streams, file uploads and artifacts. It keeps what it is sent, notes
what breaks the protocol, and fails on demand."""

import base64
import contextlib
import gzip
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from box import free_port

KEY = "local-" + hashlib.sha1(b"a key for tests").hexdigest()
ENTITY = "reader"
STREAMS = {"wandb-history.jsonl": "history", "wandb-events.jsonl": "events", "wandb-summary.json": "summary_lines", "output.log": "output"}


class Kept:
    "What the server has of one run."

    def __init__(self, entity: str, project: str, id: str):
        self.entity, self.project, self.id, self.inserted = entity, project, id, 0
        self.bucket: dict = {}
        self.history: list[str] = []
        self.events: list[str] = []
        self.summary_lines: list[str] = []
        self.output: list[str] = []
        self.files: dict[str, bytes] = {}
        self.exitcode: int | None = None

    @property
    def rows(self) -> list[dict]:
        "The history, without W&B's own keys."
        return [{k: v for k, v in json.loads(line).items() if not k.startswith("_")} for line in self.history]

    @property
    def summary(self) -> dict:
        return json.loads(self.summary_lines[-1]) if self.summary_lines else {}

    @property
    def config(self) -> dict:
        config = json.loads(self.bucket.get("config") or "{}")
        return {k: v["value"] for k, v in config.items() if k != "_wandb"}

    @property
    def console(self) -> list[str]:
        "The lines of the console log, without their times."
        return [re.sub(r"^(ERROR )?\S+T\S+ ", "", line).rstrip("\n") for line in self.output]

    def put(self, file: str, offset: int, content: list[str]) -> str | None:
        "Write lines at their place; what is wrong with that, if anything is."
        lines = getattr(self, STREAMS[file])
        if offset > len(lines):
            return f"{file} of {self.id}: a gap, {len(lines)} lines and then line {offset}"
        changed = [i for i, line in enumerate(content, offset) if i < len(lines) and lines[i] != line]
        lines[offset : offset + len(content)] = content
        if changed and file == "wandb-history.jsonl":
            return f"{file} of {self.id}: other lines at {changed}"


class WandbServer:
    "`with WandbServer() as server`: W&B at `server.url`."

    def __init__(self, keys=(KEY,)):
        self.keys, self.runs, self.artifacts = set(keys), {}, {}
        self.wrong: list[str] = []  # what a client did that the protocol does not know
        self.requests: list[tuple[str, str, dict, bytes]] = []  # method, path, headers but the authorisation, body
        self.fault = None  # called with (method, path, operation); a status, "hang", "drop" or None
        self.room: int | None = None  # lines of history that it takes before it hangs
        self.lock, self.released, self.port, self.http = threading.RLock(), threading.Event(), 0, None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, key: str = KEY) -> dict:
        "The environment of a client that is logged in here."
        return dict(WANDB_BASE_URL=self.url, WANDB_API_KEY=key)

    def start(self):
        "Listen; after `stop`, at the same port with what was kept."
        handler = type("Bound", (Handler,), {"server_": self})
        self.released.clear()
        self.http = Listener(("127.0.0.1", self.port or free_port()), handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        "Refuse connections from now on, and break those there are."
        if self.http is None:
            return
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.http.break_all()
        self.http = None

    def run(self, id: str) -> Kept | None:
        with self.lock:
            return next((r for r in self.runs.values() if r.id == id), None)

    def wait(self, what, seconds: float = 240.0):
        "Poll until `what()` is true and return it; fail after `seconds`."
        until = time.monotonic() + seconds
        while not (got := what()):
            assert time.monotonic() < until, f"waited {seconds} s in vain; requests: {[r[:2] for r in self.requests][-5:]}"
            time.sleep(0.03)
        return got

    def operations(self) -> list[str]:
        "The names of the GraphQL operations so far."
        return [operation_of(body) for method, path, _, body in list(self.requests) if path == "/graphql"]

    # GraphQL

    def graphql(self, operation: str, v: dict) -> dict:
        with self.lock:
            return getattr(self, f"do_{operation}", self.do_unknown)(v, operation)

    def do_unknown(self, v, operation):
        self.wrong.append(f"unknown operation {operation}")
        return {}

    def do_Viewer(self, v, _):
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": dict(id="VXNlcjox", entity=ENTITY, username=ENTITY, email="reader@example.com", flags="{}", teams=teams, admin=False)}

    def do_ServerFeaturesQuery(self, v, _):
        return {"serverInfo": {"features": []}}

    def do_RunResumeStatus(self, v, _):
        entity, project = v.get("entity") or ENTITY, v["project"]
        run = self.runs.get((entity, project, v["name"]))
        model = dict(id="UHJvamVjdDox", name=project, entity=dict(id="RW50aXR5OjE=", name=entity), bucket=run and self.bucket(run))
        return {"model": model}

    def bucket(self, run: Kept) -> dict:
        config = json.loads(run.bucket.get("config") or "{}")
        started = {"t": config["_wandb"]["value"].get("t")} if isinstance(config.get("_wandb"), dict) else {}
        counts = dict(logLineCount=len(run.output), historyLineCount=len(run.history), eventsLineCount=len(run.events))
        tails = dict(historyTail=json.dumps(run.history[-1:]), eventsTail=json.dumps(run.events[-1:]))
        rest = dict(tags=[], notes=None, wandbConfig=json.dumps(started), summaryMetrics=json.dumps(run.summary))
        return {**self.named(run), **counts, **tails, **rest, "config": run.bucket.get("config") or "{}"}

    def named(self, run: Kept) -> dict:
        id = base64.b64encode(f"Run:v1:{run.id}".encode()).decode()
        project = dict(id="UHJvamVjdDox", name=run.project, entity=dict(id="RW50aXR5OjE=", name=run.entity))
        return dict(id=id, name=run.id, displayName=run.bucket.get("displayName") or run.id, description=None, sweepName=None, project=project)

    def do_UpsertBucket(self, v, _):
        if v.get("id") and not v.get("name"):
            run = next(r for r in self.runs.values() if self.named(r)["id"] == v["id"])
        else:
            where = (v.get("entity") or ENTITY, v.get("project") or "uncategorized", v["name"])
            run = self.runs.setdefault(where, Kept(*where))
        run.inserted += 1
        run.bucket |= {k: value for k, value in v.items() if value is not None}
        return {"upsertBucket": {"bucket": {**self.named(run), "config": run.bucket.get("config") or "{}", "historyLineCount": len(run.history)},
                                 "inserted": run.inserted == 1}}

    def do_OrganizationCoreWeaveOrganizationID(self, v, _):
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def do_ArtifactType(self, v, _):
        found = [a for a in self.artifacts.values() if a["name"] == v["name"].partition(":")[0]]
        return {"project": {"artifact": {"artifactType": {"name": found[0]["type"]}} if found else None}}

    def do_RunStopStatus(self, v, _):
        return {"project": {"run": {"stopped": False}}}

    def do_OrgFeatureFlags(self, v, _):
        return {"organization": {"featureFlags": []}}

    def do_XXHashDigestsEnabled(self, v, _):
        return {"entity": {"xxhashDigestsEnabled": False}}

    def do_CreateRunFiles(self, v, _):
        files = [dict(name=f, uploadUrl=f"{self.url}/put/{v['entity']}/{v['project']}/{v['run']}/{f}") for f in v["files"]]
        return {"createRunFiles": dict(runID="UnVuOjE=", uploadHeaders=[], files=files)}

    # Artifacts

    def do_CreateArtifact(self, v, _):
        i = v["input"]
        id = base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode().rstrip("=")
        name = (i.get("artifactCollectionNames") or [i.get("artifactCollectionName")])[0]
        self.artifacts[id] = dict(name=name, type=i.get("artifactTypeName"), digest=i.get("digest"), aliases=[a["alias"] for a in i.get("aliases") or []],
                                  run=i.get("runName"), metadata=json.loads(i.get("metadata") or "{}"), state="PENDING", files={})
        return {"createArtifact": {"artifact": dict(id=id, state="PENDING", artifactSequence=dict(id=f"seq-{name}", latestArtifact=None))}}

    def manifest(self, id: str) -> dict:
        return {"artifactManifest": dict(id=f"{id}-manifest", file=dict(id=f"{id}-file", uploadUrl=f"{self.url}/artifact/{id}/manifest.json", uploadHeaders=[]))}

    def do_CreateArtifactManifest(self, v, _):
        return {"createArtifactManifest": self.manifest(v["artifactID"])}

    def do_UpdateArtifactManifest(self, v, _):
        return {"updateArtifactManifest": self.manifest(v["artifactManifestID"].removesuffix("-manifest"))}

    def do_CreateArtifactFiles(self, v, _):
        specs = v.get("artifactFiles") or v["input"]["artifactFiles"]
        node = lambda f: dict(id="x", name=f["name"], displayName=f["name"], storagePath=f"s/{f['name']}", uploadHeaders=[], uploadMultipartUrls=None,
                              uploadUrl=f"{self.url}/artifact/{f['artifactID']}/{f['name']}", artifact=dict(id=f["artifactID"]))
        return {"createArtifactFiles": {"files": {"edges": [{"node": node(f)} for f in specs]}}}

    def do_CommitArtifact(self, v, _):
        self.artifacts[v["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": dict(id=v["artifactID"], digest=self.artifacts[v["artifactID"]]["digest"])}}

    def do_UseArtifact(self, v, _):
        return {"useArtifact": {"artifact": dict(id=v["input"]["artifactID"], digest="", description=None, createdAt=None, labels=None, metadata=None)}}

    # Files

    def file_stream(self, entity: str, project: str, id: str, body: dict) -> tuple[int, dict]:
        with self.lock:
            run = self.runs.get((entity, project, id))
            if run is None:
                self.wrong.append(f"a file stream of {entity}/{project}/{id}, which was never made")
                return 404, {}
            for file, chunk in (body.get("files") or {}).items():
                if file == "wandb-history.jsonl" and self.room is not None:
                    run.put(file, chunk["offset"], chunk["content"][: max(0, self.room - chunk["offset"])])
                    return 0, {}
                wrong = run.put(file, chunk["offset"], chunk["content"])
                self.wrong += [wrong] if wrong else []
            if body.get("complete"):
                run.exitcode = body.get("exitcode")
        return 200, {"limits": {}}

    def put_file(self, path: str, body: bytes):
        kind, *rest = path.strip("/").split("/")
        with self.lock:
            if kind == "put":
                entity, project, id = rest[:3]
                self.runs[entity, project, id].files["/".join(rest[3:])] = body
            else:
                self.artifacts[rest[0]]["files"]["/".join(rest[1:])] = body


def operation_of(body: bytes) -> str:
    "The name of a GraphQL operation."
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    found = re.search(r"(?:query|mutation)\s+(\w+)", told.get("query", ""))
    return told.get("operationName") or (found[1] if found else "")


class Listener(ThreadingHTTPServer):
    "A server whose connections can be broken."

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args):
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request, address):
        self.connections.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def break_all(self):
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: WandbServer

    def log_message(self, *_):
        pass

    def answer(self, status: int, told) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def authorised(self) -> bool:
        with contextlib.suppress(ValueError):
            kind, _, told = self.headers.get("Authorization", "").partition(" ")
            return kind == "Basic" and base64.b64decode(told).decode().partition(":")[2] in self.server_.keys
        return False

    def handle_any(self):
        server, body = self.server_, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        operation = operation_of(body) if self.path == "/graphql" else ""
        headers = {k: v for k, v in self.headers.items() if k.lower() != "authorization"}
        server.requests.append((self.command, self.path, headers, body))
        fault = server.fault(self.command, self.path, operation) if server.fault else None
        if fault == "hang":
            server.released.wait()
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        if fault:
            return self.answer(fault, {"error": f"asked to fail with {fault}", "errors": [{"message": f"asked to fail with {fault}"}]})
        if self.path.startswith("/sdk/otel/"):  # the client's own telemetry
            return self.answer(200, {})
        if self.path.startswith(("/put/", "/artifact/")):
            server.put_file(unquote(self.path), body)
            return self.answer(200, {})
        if not self.authorised():
            return self.answer(401, {"errors": [{"message": "user is not logged in"}]})
        if self.path == "/graphql":
            return self.answer(200, {"data": server.graphql(operation, json.loads(body).get("variables") or {})})
        if found := re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", unquote(self.path)):
            status, told = server.file_stream(*found.groups(), json.loads(body or b"{}"))
            if not status:
                server.released.wait()
                self.close_connection = True
                return
            return self.answer(status, told)
        server.wrong.append(f"{self.command} {self.path}")
        self.answer(404, {})

    do_GET = do_POST = do_PUT = handle_any


if __name__ == "__main__":
    with WandbServer() as server:
        print(f"export WANDB_BASE_URL={server.url} WANDB_API_KEY={KEY}", flush=True)
        threading.Event().wait()
