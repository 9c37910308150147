"""Real jobs on CPU ranks with injected failures tell servers on this machine what happened, and are not held up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from tests.notify.servers import HttpServer, SmtpServer
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Notified

SECRET = "tok-4f9a8b7c6d5e"
FAULTS = '''
import os
import time

import torch
from lightning.pytorch import Callback


class Fails(Callback):
    """A loss that is NaN at some steps, then an exception whose text is up to no good."""

    def on_after_backward(self, trainer, module):
        if trainer.global_step in (2, 3, 4):
            for parameter in module.parameters():
                parameter.grad.mul_(float("nan"))

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 8:
            time.sleep(2.5)  # so long that somebody hears of the NaN before the end
            raise ValueError("\\x1b[2Jbad <!channel> " + os.environ["MY_TOKEN"] + "\\nSubject: forged")


class Stalls(Callback):
    """In the first attempt rank 1 is slow, and then stops."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank != 1 or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
            return
        time.sleep(0.1 if trainer.global_step < 40 else 600)
'''
JOB = [
    "experiment=quickstart",
    "tracking=none",
    "model.hidden=[8]",
    "trainer.max_epochs=null",
    "checkpoint.every_n_steps=10",
    "trainer.log_every_n_steps=2",
]


@pytest.fixture
def project(workdir: Path) -> Path:
    (workdir / "faults.py").write_text(FAULTS)
    return workdir


def run_in(folder: Path) -> RunDirectory:
    (path,) = (folder / "runs").iterdir()
    return RunDirectory(path)


def test_a_failure_reaches_every_channel(trainer_cli: TrainerCli, project: Path) -> None:
    with HttpServer() as server, SmtpServer() as post_office:
        variables = {
            "SLACK_WEBHOOK_URL": f"{server.url}/slack/T0/{SECRET}",
            "NOTIFY_WEBHOOK_URL": f"{server.url}/hook",
            "MY_TOKEN": SECRET,
        }
        channels = [
            "notify=[slack,webhook,mail,command]",
            "notify.mail_to=[me@example.org]",
            f"notify.smtp_server={post_office.address}",
            "notify.command=[sh,-c,'cat >> told.jsonl']",
        ]
        faults = ["+callbacks.fails._target_=faults.Fails", "resilience.on_nonfinite=skip"]
        one_rank = ["resources.cpu_processes=1", "trainer.max_steps=20"]
        done = trainer_cli("fit", *JOB, *channels, *faults, *one_rank, env=variables, timeout=180)
        assert done.returncode == 1, done.stdout + done.stderr
        run = run_in(project)
        posts = [post.body for post in server.posts if post.path == "/hook"]
        slack = [post.body["text"] for post in server.posts if post.path.startswith("/slack/")]
        again = trainer_cli("notify", "--json", env=variables)
        assert (again.returncode, json.loads(again.stdout)) == (0, [])
        tried = trainer_cli("notify", "--test", run.id, env=variables)
        assert tried.stdout == "command: sent\nmail: sent\nslack: sent\nwebhook: sent\n"

    assert [post["event"] for post in posts] == ["nan", "failed"]
    nan, failed = posts
    assert nan["title"].startswith(f"{run.path.name} loss or gradient not finite at step ")
    assert (failed["run"], failed["id"], failed["state"], failed["step"]) == (run.path.name, run.id, "failed", 7)
    assert failed["reason"].startswith("ValueError: \\x1b[2Jbad <!channel> ***\\nSubject: forged")
    assert failed["next"] == f"trainer resume {run.path}"
    assert [text.splitlines()[0] for text in slack] == [post["title"] for post in posts]
    assert "<!channel>" not in slack[1]
    mails = [mail.message for mail in post_office.mails]
    assert [mail["Subject"] for mail in mails[:2]] == [post["title"] for post in posts]
    told = [json.loads(line) for line in (project / "told.jsonl").read_text().splitlines()]
    assert told[:2] == posts
    written = json.dumps([post.body for post in server.posts]) + "".join(mail.as_string() for mail in mails)
    for text in (written, (project / "told.jsonl").read_text(), run.events_path.read_text(), done.stdout):
        assert SECRET not in text
        assert "\x1b" not in text or text == done.stdout  # which is no terminal
    sent = run.events_of(Notified)
    assert [(event.about, event.channels, event.failed) for event in sent] == [
        ("nan", ["command", "mail", "slack", "webhook"], {}),
        ("failed", ["command", "mail", "slack", "webhook"], {}),
    ]


def test_stragglers_hangs_and_the_end_are_told_although_one_server_never_answers(
    trainer_cli: TrainerCli, project: Path
) -> None:
    with HttpServer() as server, HttpServer(hangs=True) as slow:
        variables = {"NOTIFY_WEBHOOK_URL": server.url, "SLACK_WEBHOOK_URL": f"{slow.url}/{SECRET}"}
        faults = [
            "+callbacks.stalls._target_=faults.Stalls",
            "resilience.straggler_after_s=1",
            "resilience.hang_after_s=4",
            "resilience.hang_factor=2",
        ]
        done = trainer_cli(
            "fit",
            *JOB,
            *faults,
            "notify=[webhook,slack]",
            "notify.timeout_s=1",
            "resources.cpu_processes=2",
            "trainer.max_steps=50",
            env=variables,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert [post.body["event"] for post in server.posts] == ["straggler", "hang", "finished"]
    straggler, hang, finished = [post.body for post in server.posts]
    assert "waits for rank 1" in straggler["title"]
    assert "rank 1" in hang["reason"]
    assert finished["step"] == 50
    run = run_in(project)
    assert finished["next"] == f"trainer show {run.path}"
    assert [event.failed for event in run.events_of(Notified)] == 3 * [{"slack": "no answer within 1 s"}]
    log = run.node_log(0, 0).read_text()
    assert "sent by webhook; not sent by slack: no answer within 1 s" in log
    assert SECRET not in log
