"""A stand-in for the W&B server on loopback, with what the client 0.31 asks for to log online, resume and sync.

It proves what the client sends, not what the real server makes of it. An operation that it does not know is refused
and kept in `unknown`: a newer client that asks for more makes the tests fail, with its name.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tests.tracking.wandb_server_parts import Artifacts, Refused, Sweeps

KEY = "local" + "0" * 40
"""Passes the client's check of the format."""
ENTITY = "somebody"


@dataclass
class ServedRun:
    """A run as the server has it."""

    project: str
    id: str
    entity: str = ""
    name: str = ""
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    sweep: str | None = None
    commit: str | None = None
    program: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    """Name of a stream (`wandb-history.jsonl`) to its lines by their number."""
    files: dict[str, bytes] = field(default_factory=dict)
    stops: bool = False
    """Whether its Stop button was pressed."""
    rewound_to: list[int] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        rows = self.rows("wandb-summary.json")
        return rows[-1] if rows else {}

    @property
    def log(self) -> str:
        """The console log."""
        lines = self.streams.get("output.log", {})
        return "\n".join(lines[number] for number in sorted(lines))

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.rows("wandb-history.jsonl")

    def rows(self, stream: str) -> list[dict[str, Any]]:
        lines = self.streams.get(stream, {})
        return [json.loads(lines[number]) for number in sorted(lines)]


class WandbServer(Artifacts, Sweeps):
    """Use as a context manager; `environment()` sends a client here.

    `host`: an address of this machine that the client can reach. `rewinds`: whether it can rewind a run, as only some
    of W&B's servers can. `fails`: answers nothing but 503.
    """

    def __init__(self, rewinds: bool = False, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.rewinds, self.fails = rewinds, False
        self.alerts: list[dict[str, Any]] = []
        self.runs: dict[str, ServedRun] = {}
        self.unknown: list[str] = []
        self.requests: list[str] = []
        """The path of each."""
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                with outer._lock:
                    code, reply = outer._route(urlsplit(self.path).path, self.headers.get("authorization"), body)
                content = json.dumps(reply).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = answer

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client drops idle connections

        self._server = Server((host, 0), Handler)
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def _route(self, path: str, authorization: str | None, body: bytes) -> tuple[int, Any]:
        self.requests.append(path)
        if self.fails:
            return 503, {"error": "not now"}
        if path == "/graphql":
            return self._graphql(authorization, json.loads(body))
        stream = re.fullmatch(rf"/files/{ENTITY}/([^/]+)/([^/]+)/file_stream", path)
        if stream:
            run = self.runs[unquote(stream[2])]
            if unquote(stream[1]) != run.project:
                self.unknown.append(path)
            self._stream(run, json.loads(body))
            return 200, {"exitcode": None, "limits": {}, **({"stopped": True} if run.stops else {})}
        artifact = re.fullmatch(r"/artifact/([^/]+)/(.+)", path)
        if artifact:
            self.artifacts[artifact[1]].blobs[unquote(artifact[2])] = body
            return 200, {}
        stored = re.fullmatch(r"/storage/([^/]+)/(.+)", path)
        if stored:
            self.runs[unquote(stored[1])].files[unquote(stored[2])] = body
            return 200, {}
        if path.startswith("/sdk/otel/"):  # the client's own telemetry
            return 200, {}
        self.unknown.append(path)
        return 404, {"error": "no such route"}

    def _graphql(self, authorization: str | None, request: dict[str, Any]) -> tuple[int, Any]:
        if base64.b64decode((authorization or "Basic ").removeprefix("Basic ")).decode() != f"api:{KEY}":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", request["query"])
        name = request.get("operationName") or (named[1] if named else "")
        operation = getattr(self, f"_do_{name}", None)
        if operation is None:
            self.unknown.append(name)
            return 400, {"errors": [{"message": f"unknown operation {name}"}]}
        try:
            return 200, {"data": operation(request.get("variables") or {})}
        except Refused as error:
            return 400, {"errors": [{"message": str(error)}]}

    def _stream(self, run: ServedRun, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            lines = run.streams.setdefault(name, {})
            lines.update({part["offset"] + number: line for number, line in enumerate(part["content"])})
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")

    def _project(self, run: ServedRun) -> dict[str, Any]:
        return {"id": f"project-{run.project}", "name": run.project, "entity": {"id": "entity", "name": ENTITY}}

    def _bucket(self, run: ServedRun) -> dict[str, Any]:
        return {
            "id": f"bucket-{run.id}",
            "name": run.id,
            "displayName": run.name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": self._project(run),
            "historyLineCount": len(run.history),
        }

    def _do_Viewer(self, variables: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": teams}
        return {"viewer": viewer}

    def _do_GetDefaultEntity(self, variables: dict[str, Any]) -> Any:
        return {"viewer": {"id": "viewer", "entity": ENTITY}}

    def _do_ServerFeaturesQuery(self, variables: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _do_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _do_RunStoppedStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables.get("runId") or "")
        return {"project": {"run": {"stopped": bool(run and run.stops)}}}

    def _do_Run(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"project": {"run": None}}
        fields = {
            "projectId": "7",
            "tags": run.tags,
            "state": "running" if run.exit_code is None else "finished",
            "group": run.group,
            "jobType": run.job_type,
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00",
            "heartbeatAt": "2026-01-01T00:00:00",
            "notes": run.notes,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "user": {"name": ENTITY, "username": ENTITY},
            "historyKeys": self._history_keys(run),
        }
        return {"project": {"run": {**self._bucket(run), **fields}}}

    def _do_RunHistoryKeys(self, variables: dict[str, Any]) -> Any:
        return {"project": {"run": {"historyKeys": self._history_keys(self.runs[variables["name"]])}}}

    def _history_keys(self, run: ServedRun) -> dict[str, Any]:
        return {"lastStep": run.history[-1]["_step"] if run.history else -1, "keys": {}}

    def _do_RewindRun(self, variables: dict[str, Any]) -> Any:
        if not self.rewinds:
            raise Refused("rewind is not enabled for this account")
        run = self.runs[variables["runName"]]
        assert variables["metricName"] == "_step"
        run.rewound_to.append(int(variables["metricValue"]))
        kept = [row for row in run.history if row["_step"] <= run.rewound_to[-1]]
        run.streams["wandb-history.jsonl"] = {number: json.dumps(row) for number, row in enumerate(kept)}
        summary = {name: value for row in kept for name, value in row.items()}
        run.streams["wandb-summary.json"] = {0: json.dumps(summary)}
        config = json.dumps({key: {"value": value} for key, value in run.config.items()})
        return {"rewindRun": {"rewoundRun": {**self._bucket(run), "config": config}}}

    def _do_NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> Any:
        self.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _do_UpsertBucket(self, variables: dict[str, Any]) -> Any:
        run_id = variables["name"] if variables.get("name") else variables["id"].removeprefix("bucket-")
        is_new = run_id not in self.runs
        run = self.runs.setdefault(run_id, ServedRun(variables.get("project") or "", run_id))
        run.name = variables.get("displayName") or run.name
        run.tags = variables.get("tags") or run.tags
        run.entity = variables.get("entity") or run.entity
        run.group = variables.get("groupName") or run.group
        run.job_type = variables.get("jobType") or run.job_type
        run.notes = variables.get("notes") or run.notes
        run.sweep = variables.get("sweep") or run.sweep
        run.commit = variables.get("commit") or run.commit
        run.program = variables.get("program") or run.program
        if variables.get("summaryMetrics"):
            run.streams["wandb-summary.json"] = {0: variables["summaryMetrics"]}
        if variables.get("config"):
            run.config = {key: entry["value"] for key, entry in json.loads(variables["config"]).items()}
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": is_new}}

    def _do_RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables["name"])
        model = self._project(run or ServedRun(variables["project"], variables["name"]))
        if run is None:
            return {"model": {**model, "bucket": None}}

        def tail(rows: list[dict[str, Any]]) -> str:
            return json.dumps([json.dumps(row) for row in rows[-1:]])

        summary, events = run.rows("wandb-summary.json"), run.rows("wandb-events.jsonl")
        status = {
            **self._bucket(run),
            "summaryMetrics": json.dumps(summary[-1] if summary else {}),
            "logLineCount": len(run.streams.get("output.log", {})),
            "eventsLineCount": len(events),
            "historyTail": tail(run.history),
            "eventsTail": tail(events),
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**model, "bucket": status}}

    def _do_CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        run_id = variables["run"]
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{run_id}/{quote(name)}"} for name in variables["files"]
        ]
        return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}
