"""How the nodes of a job find each other, and what the job lets in from the network."""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.supervise.test_node import environment, make_run, wait_until
from trainer.core.errors import EnvironmentFault
from trainer.core.network import loopback_interface
from trainer.core.processes import children
from trainer.supervise import rendezvous
from trainer.supervise.rendezvous import Place

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("no_orphans")


def join(path: Path, rank: int, named: str = "first", **options: Any) -> rendezvous.Link:
    return rendezvous.join(path, Place(2, rank, named, address="127.0.0.1"), **options)


def test_the_first_node_opens_one_address_and_the_others_read_where(tmp_path: Path) -> None:
    path = tmp_path / "control" / "rendezvous-0.json"
    path.parent.mkdir()
    found: list[rendezvous.Link] = []
    waiting = threading.Thread(target=lambda: found.append(join(path, 1, timeout_s=30.0)))
    waiting.start()
    first = join(path, 0)
    waiting.join()
    assert first.listener is not None
    assert first.listener.getsockname() == ("127.0.0.1", first.server.port)
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert found[0].server == first.server
    assert found[0].listener is None
    assert re.fullmatch("[0-9a-f]{32}", first.server.token)
    other = join(path.with_name("rendezvous-1.json"), 0)
    assert other.listener is not None
    assert other.server.port != first.server.port
    assert other.server.token != first.server.token
    assert sorted(os.listdir(path.parent)) == ["rendezvous-0.json", "rendezvous-1.json"]
    first.listener.close()
    other.listener.close()


def test_the_first_node_fails_where_it_is_not_the_server(tmp_path: Path) -> None:
    """blocked by: the first node opens its own address, or ends"""
    with pytest.raises(EnvironmentFault, match=r"is node 0, but 192\.0\.2\.1 of --rendezvous is another machine"):
        join(tmp_path / "a.json", 0, named="192.0.2.1:29400")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=rf"cannot listen on 127\.0\.0\.1 port {port}"):
            join(tmp_path / "a.json", 0, named=f"127.0.0.1:{port}")
    with pytest.raises(EnvironmentFault, match=r"node 0 \(first\) has not opened its server within 0 s"):
        join(tmp_path / "a.json", 1, timeout_s=0.0)
    with pytest.raises(EnvironmentFault, match="was ended before node 0"):
        join(tmp_path / "a.json", 1, is_needed=lambda: False)


def test_one_option_sets_the_interface_of_gloo_nccl_and_tensorpipe() -> None:
    assert rendezvous.socket_variables("ib0", chosen=True) == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
        "TP_SOCKET_IFNAME": "ib0",
    }
    assert rendezvous.socket_variables("eth0", chosen=False) == {"GLOO_SOCKET_IFNAME": "eth0"}


def test_the_folder_that_a_killed_process_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from trainer.supervise import rendezvous as r\nwith r.private_folder() as f: print(f, flush=True); input()"
    killed, living = (
        subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env=_in(tmp_path))
        for _ in range(2)
    )
    left, used = (Path(process.stdout.readline().strip()) for process in (killed, living))  # type: ignore[union-attr]
    young = tmp_path / "trainer-ranks-young"
    young.mkdir()
    (tmp_path / "trainer-ranks-link").symlink_to(young)
    killed.kill()
    killed.communicate()
    for folder in (left, used):
        (folder / "ranks-0").touch()
        os.utime(folder, (0, 0))
    with rendezvous.private_folder() as own:
        assert not left.exists()
        assert used.is_dir()
        assert young.is_dir()
        assert own.parent == tmp_path
    assert not own.exists()
    living.communicate("\n")
    assert not used.exists()


def _in(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def start(run: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.supervise.node", str(run), *arguments],
        env={**environment(""), "TRAINER_WORKER_MODULE": "listening_worker", **variables},
        start_new_session=True,
    )


def listening(root: int) -> dict[int, list[tuple[str, int]]]:
    """Process id to the addresses and ports on which the processes below `root` listen, from /proc."""
    pids, waiting = [root], [root]
    while waiting:
        below = children(waiting.pop())
        pids += below
        waiting += below
    found = {}
    for pid in pids:
        inodes = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        of_process = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    digits, port = fields[1].split(":")
                    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
                    family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                    of_process.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
        if of_process:
            found[pid] = of_process
    return found


INTRUDER = """
import json, os, pickle, socket, struct, sys

class Planted:
    def __reduce__(self):
        return os.system, (f"touch {sys.argv[2]}",)

def counted(text):
    return struct.pack("<Q", len(text)) + text

planted = pickle.dumps(Planted())
key = b"/default_pg/0//0"
for address, port in json.loads(sys.argv[1]):
    for said in (
        b"\\x00" + struct.pack("<I", 0x3C85F7CE) + b"\\x01" + counted(key) + counted(planted),
        planted,
        struct.pack("<q", 0) + planted,
        bytes(4096),
    ):
        with socket.create_connection((address, port), 5) as connection:
            connection.sendall(said)
            connection.settimeout(0.2)
            try:
                connection.recv(4096)
            except OSError:
                pass
print(os.getuid(), "tried")
"""


def test_a_job_on_one_node_listens_on_loopback_only_and_survives_another_user(workdir: Path, tmp_path: Path) -> None:
    """A site's interface for jobs on several nodes changes nothing. No process but a gloo rank listens at all.

    blocked by: the loopback interface only; no process listens but a gloo rank while it starts
    """
    run = make_run(workdir)
    planted = tmp_path / "planted"
    job = start(run.path, NCCL_SOCKET_IFNAME="eth9", GLOO_SOCKET_IFNAME="eth9", GO=str(workdir / "go"))
    wait_until((workdir / "go.1").exists)
    wait_until((workdir / "go.0").exists)
    said = json.loads((workdir / "go.0").read_text())
    assert {said[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")} == {
        loopback_interface()
    }
    sockets = listening(job.pid)
    ranks = {int((workdir / f"go.{rank}.pid").read_text()) for rank in (0, 1)}
    assert set(sockets) == ranks, "only ranks listen: there is no server for the rendezvous or the store"
    addresses = [one for some in sockets.values() for one in some]
    assert {address for address, _ in addresses} == {"127.0.0.1"}
    store = Path(said["TRAINER_STORE"].removeprefix("file:"))
    assert stat.S_IMODE(store.stat().st_mode) == 0o700

    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    tried = subprocess.run(
        [*as_nobody, sys.executable, "-S", "-c", INTRUDER, json.dumps(addresses), str(planted)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "tried" in tried.stdout, tried.stderr
    (workdir / "go").touch()
    assert job.wait(120) == 0, run.rank_log(0, 0).read_text()
    assert not planted.exists()
    assert not store.exists()


def test_nodes_are_numbered_by_the_launcher_and_serve_on_one_address(workdir: Path) -> None:
    """Two nodes on this machine, the second one first: rank 0 is on node 0, and its server on no other address.

    blocked by: one address of the network between the nodes, a random port and a token
    """
    run = make_run(workdir)
    given = {"GO": str(workdir / "go"), "GLOO_SOCKET_IFNAME": loopback_interface(), "TRAINER_ATTEMPT": "0"}
    place = ["--nodes=2", "--local-addr=127.0.0.1", "--rendezvous=first-node"]
    second = start(run.path, *place, "--node-rank=1", **given)
    time.sleep(0.5)
    first = start(run.path, *place, "--node-rank=0", **given)
    for rank in range(4):
        wait_until((workdir / f"go.{rank}").exists)
    said = [json.loads((workdir / f"go.{rank}").read_text()) for rank in range(4)]
    server = json.loads((run.path / "control" / "rendezvous-0.json").read_text())
    assert [one["GROUP_RANK"] for one in said] == ["0", "0", "1", "1"]
    assert {one["MASTER_ADDR"] for one in said} == {"127.0.0.1"}
    assert {one["MASTER_PORT"] for one in said} == {str(server["port"])}
    of_first, of_second = listening(first.pid), listening(second.pid)
    addresses = [one for some in (of_first, of_second) for sockets in some.values() for one in sockets]
    assert {address for address, _ in addresses} == {"127.0.0.1"}
    serving = [pid for pid, sockets in of_first.items() if ("127.0.0.1", server["port"]) in sockets]
    assert serving
    assert not set(serving) & {one["pid"] for one in said}, "a rank holds the socket of the server"
    (workdir / "go").touch()
    assert (first.wait(120), second.wait(120)) == (0, 0), run.node_log(0, 0).read_text()


def test_pickles_of_torchs_own_rendezvous_are_what_is_avoided() -> None:
    """The reason for all this: should torch stop loading pickles from the store, this can be simplified."""
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    assert dynamic_rendezvous.pickle is pickle
