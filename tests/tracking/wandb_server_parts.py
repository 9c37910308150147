"""The parts of the stand-in server for artifacts and sweeps. A sweep is a grid, and hands out its values in order."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import yaml


class Refused(Exception):
    """What the server answers with an error."""


@dataclass
class ServedArtifact:
    """An artifact as the server has it."""

    name: str
    type: str
    run: str
    aliases: list[str]
    metadata: dict[str, Any]
    committed: bool = False
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the artifact, without its manifest."""
        return {name: content for name, content in self.blobs.items() if not name.startswith("manifest-")}

    @property
    def manifest(self) -> dict[str, Any]:
        (content,) = [content for name, content in self.blobs.items() if name.startswith("manifest-")][-1:]
        manifest: dict[str, Any] = json.loads(content)
        return manifest


class Artifacts:
    """What the client asks for to log an artifact."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.artifacts: dict[str, ServedArtifact] = {}

    def named(self, kind: str) -> list[ServedArtifact]:
        """The committed artifacts of a type, oldest first."""
        return [one for one in self.artifacts.values() if one.type == kind and one.committed]

    def _do_ArtifactType(self, variables: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}  # no artifact of this name yet

    def _do_FetchArtifactDigestAlgorithm(self, variables: dict[str, Any]) -> Any:
        return {"project": {"artifactType": None}}

    def _do_XXHashDigestsEnabled(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def _do_CreateArtifact(self, variables: dict[str, Any]) -> Any:
        given = variables["input"]
        number = f"artifact{len(self.artifacts)}"
        names = given.get("artifactCollectionNames") or [given.get("artifactCollectionName")]
        self.artifacts[number] = ServedArtifact(
            name=names[0],
            type=given["artifactTypeName"],
            run=given.get("runName") or "",
            aliases=[one["alias"] for one in given.get("aliases") or []],
            metadata=json.loads(given.get("metadata") or "{}"),
        )
        sequence = {"id": "sequence", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": sequence}}}

    def _manifest(self, number: str) -> dict[str, Any]:
        name = f"manifest-{len(self.artifacts[number].blobs)}"
        file = {"id": "file", "uploadUrl": f"{self.url}/artifact/{number}/{name}", "uploadHeaders": []}
        return {"artifactManifest": {"id": f"{number}/manifest", "file": file}}

    def _do_CreateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        return {"createArtifactManifest": self._manifest(variables["artifactID"])}

    def _do_UpdateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        return {"updateArtifactManifest": self._manifest(variables["artifactManifestID"].partition("/")[0])}

    def _do_CreateArtifactFiles(self, variables: dict[str, Any]) -> Any:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            number, name = file["artifactID"], file["name"]
            node = {
                "storagePath": name,
                "uploadUrl": f"{self.url}/artifact/{number}/{quote(name)}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": number},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _do_CommitArtifact(self, variables: dict[str, Any]) -> Any:
        self.artifacts[variables["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "digest"}}}


@dataclass
class ServedSweep:
    """A sweep as the server has it."""

    config: dict[str, Any]
    project: str
    waiting: list[dict[str, Any]]
    given: list[str] = field(default_factory=list)
    """The ids of the runs that were handed out."""
    stops: set[str] = field(default_factory=set)
    """The runs that the agent is told to stop."""


class Sweeps:
    """What `wandb sweep` and `wandb agent` ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps: dict[str, ServedSweep] = {}

    def add_sweep(self, config: dict[str, Any], project: str) -> str:
        """Create a sweep over the grid of its values; its id."""
        parameters = config["parameters"]
        values = [one.get("values") or [one["value"]] for one in parameters.values()]
        grid = [
            {name: {"value": value} for name, value in zip(parameters, point, strict=True)}
            for point in itertools.product(*values)
        ]
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = ServedSweep(config, project, grid)
        return name

    def _do_SweepWithRuns(self, variables: dict[str, Any]) -> Any:
        name = variables["sweep"]
        fields: dict[str, Any] = dict.fromkeys(
            ("description", "createdAt", "heartbeatAt", "updatedAt", "bestLoss", "controller", "scheduler")
        )
        config = self.sweeps[name].config
        fields |= {"id": name, "name": name, "method": config["method"], "state": "RUNNING", "runs": {"edges": []}}
        fields |= {"config": yaml.safe_dump(config), "earlyStopJobRunning": False}
        return {"project": {"sweep": fields}}

    def _do_CreateAgent(self, variables: dict[str, Any]) -> Any:
        return {"createAgent": {"agent": {"id": f"agent:{variables['sweep']}"}}}

    def _do_Heartbeat(self, variables: dict[str, Any]) -> Any:
        name = variables["id"].partition(":")[2]
        sweep = self.sweeps[name]
        running = [run for run, state in json.loads(variables.get("runState") or "{}").items() if state]
        commands: list[dict[str, Any]] = [{"type": "stop", "run_id": run} for run in running if run in sweep.stops]
        if not running and sweep.waiting:
            run = f"{name}run{len(sweep.given)}"
            sweep.given.append(run)
            command = {"type": "run", "run_id": run, "args": sweep.waiting.pop(0), "run_name": run}
            commands = [{**command, "program": sweep.config.get("program"), "run_storage_id": None, "logs": []}]
        elif not running:
            commands = [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}
