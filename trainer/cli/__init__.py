"""The command `trainer`: dispatches to the verb, and reports an expected failure as one message and an exit code.

To add the verb `x`: `cli/x.py` with `main(argv)`, which returns the exit code and imports no torch; its help, a line in
`VERBS`; its name in `_READING` if it starts no process that imports Lightning; a test in `tests/cli/`.
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

from trainer.cli.process import prepare_streams, require_home, use_utf8
from trainer.core.errors import ENVIRONMENT_MUST_CHANGE, INTERRUPTED, JOB_FAILED, USER_MUST_CHANGE, TrainerError

VERBS = {
    "Train": {
        "fit": "compose, check, launch and follow a training job",
        "sweep": "launch, stop, resume and rank sweeps that outlive the terminal",
        "check": "check a configuration without launching anything",
        "plan": "plan memory, time and cost of a job without its GPUs",
        "time": "measure steps of a job, and what fits in a time or a budget",
        "init": "create a project with a model, data and configs to edit",
        "verify-resume": "check that a killed and resumed job ends bit for bit the same",
        "bench": "run jobs with injected faults, or one step on each device",
    },
    "Data": {"data": "tokenize text into token shards"},
    "Runs": {
        "ls": "list runs and their states",
        "show": "show the steps, metrics, checkpoints and attempts of a run",
        "dashboard": "show runs, curves and logs in a browser",
        "best": "find the run with the best value of a metric",
        "diff": "show what differs between two runs",
        "compare": "show what differs between runs: config, code, packages, results",
        "report": "write a page about a run, or one that compares several",
        "why": "explain why a run is queued, or how and where it failed",
        "logs": "print the log of a rank; -f follows it",
        "stop": "save a checkpoint and stop a run",
        "resume": "resume a run from its newest good checkpoint",
        "repro": "reproduce a run from its frozen code and configuration",
        "evaluate": "compute the metrics of a checkpoint on held-out data",
        "predict": "write the predictions of a checkpoint, in sample order",
        "export": "export weights as safetensors, ONNX or Hugging Face",
        "notify": "send notifications that are due, or a test message",
        "sync": "upload offline runs to Weights & Biases",
        "rm": "delete runs",
    },
    "This machine": {
        "doctor": "check drivers, GPUs, speed, storage, limits, network and SLURM",
        "env": "print versions and hardware for a bug report",
    },
}
"""Help of each verb by group. The verb `x` is the module `trainer.cli.x`, imported when it is used."""

_READING = ("ls", "show", "why", "logs", "stop", "rm", "init", "data", "compare", "diff", "best", "dashboard", "report")
"""Verbs that start no process that imports Lightning."""

_USAGE = """usage: trainer VERB [options] [key=value ...]

Run the same training job on a laptop and on a cluster.
"""


def main(argv: list[str] | None = None) -> int:
    """Run `trainer VERB ...` and return the exit code. Expected failures print no traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    prepare_streams()
    if argv is None:
        use_utf8()
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except TrainerError as error:
        _report(str(error))
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `trainer ls | head`: the interpreter would report the broken pipe again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("TRAINER_TRACEBACK"):
            raise
        from trainer.cli import unexpected

        known = unexpected.known(error)
        _report(str(known) if known else unexpected.report(error, arguments))
        if known is not None:
            return known.code
        return ENVIRONMENT_MUST_CHANGE if isinstance(error, OSError) else JOB_FAILED
    finally:
        if argv is None:
            gc.freeze()  # a garbage collection at exit would take 8% of the time of `--cfg job`


def _report(message: str) -> None:
    from trainer.core.text import printable

    print(f"trainer: {printable(message)}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from trainer import __version__

        print(f"trainer {__version__}")
        return 0
    verb = arguments[0]
    if verb not in _names():
        return _unknown(verb)
    if verb not in _READING and "-h" not in arguments and "--help" not in arguments:
        from trainer.core.install import refuse_malicious

        refuse_malicious()
        require_home()
    module = import_module(f"trainer.cli.{verb.replace('-', '_')}")
    return int(module.main(arguments[1:]))


def _names() -> dict[str, str]:
    return {name: text for group in VERBS.values() for name, text in group.items()}


def _help() -> str:
    lines = [_USAGE]
    for group, verbs in VERBS.items():
        lines += [f"{group}:", *(f"  {name:<15}{text}" for name, text in verbs.items()), ""]
    return "\n".join([*lines, "See `trainer VERB --help` for the options of a verb."])


def _unknown(verb: str) -> int:
    from trainer.core.near import did_you_mean, listed

    hint = did_you_mean(verb, _names())
    print(f"trainer: unknown verb {verb}\n  {hint}verbs: {listed(_names())}", file=sys.stderr)
    return USER_MUST_CHANGE
