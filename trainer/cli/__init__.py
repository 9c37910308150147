"""The command `trainer`: finds the verb, runs it, and turns expected failures into one message and a code."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

from trainer.core.errors import ENVIRONMENT_MUST_CHANGE, INTERRUPTED, JOB_FAILED, USER_MUST_CHANGE, TrainerError
from trainer.core.garbage import no_collection

VERBS = {
    "Train": {
        "fit": "compose, check, launch and follow a training job",
        "check": "everything that can be found wrong before a job is launched",
        "init": "write a small project of your own",
        "verify-resume": "kill your own job at random moments and compare its end with the unharmed one",
        "bench": "real jobs with real faults, compared bit for bit with one that was left alone",
    },
    "Data": {"data": "tokenize text into shards"},
    "Runs": {
        "ls": "all runs here, with their true state",
        "show": "one run: steps, metrics, checkpoints, attempts",
        "why": "why it waits in the queue, or how and where it ended",
        "logs": "the log of a rank; -f follows it",
        "stop": "save a checkpoint and end",
        "resume": "go on from the newest good checkpoint",
        "evaluate": "the metrics of a checkpoint on held-out data",
        "predict": "what a checkpoint makes of each sample, in its order",
        "export": "the weights of a checkpoint as safetensors, ONNX or in Hugging Face's layout",
        "sync": "upload to Weights & Biases what was logged offline",
        "rm": "delete runs",
    },
}
"""Group to verb to one line of help. The verb `x` is the module `trainer.cli.x`, imported when it is used."""

_USAGE = """trainer: one training job from a laptop to a cluster, without changing it

usage: trainer VERB [options] [key=value ...]
"""


def main(argv: list[str] | None = None) -> int:
    """Run `trainer VERB ...` and return the exit code; a user's mistake ends without a traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `trainer ls | head`: the interpreter would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("TRAINER_TRACEBACK"):
            raise
        print(f"trainer: {_unexpected(error, arguments)}", file=sys.stderr)
        return ENVIRONMENT_MUST_CHANGE if isinstance(error, OSError) else JOB_FAILED
    finally:
        if argv is None:
            gc.freeze()  # the process ends; Python would look for garbage in every module: 8% of `--cfg job`


def _unexpected(error: Exception, arguments: list[str]) -> str:
    """One message for what nobody foresaw; its traceback goes to a file, for who reports it."""
    import tempfile
    import traceback

    told = f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="trainer-traceback-", suffix=".txt", delete=False) as file:
            file.write(f"trainer {' '.join(arguments)}\n{''.join(traceback.format_exception(error))}")
    except OSError:
        return f"{told}\n  TRAINER_TRACEBACK=1 shows the traceback"
    return f"{told}\n  not foreseen here; the traceback is in {file.name}"


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
    with no_collection():
        module = import_module(f"trainer.cli.{verb.replace('-', '_')}")
    return module.main(arguments[1:])


def _names() -> dict[str, str]:
    return {name: text for group in VERBS.values() for name, text in group.items()}


def _help() -> str:
    lines = [_USAGE]
    for group, verbs in VERBS.items():
        lines += [f"{group}:", *(f"  {name:<15}{text}" for name, text in verbs.items()), ""]
    return "\n".join([*lines, "trainer VERB --help says more about a verb."])


def _unknown(verb: str) -> int:
    from trainer.core.near import did_you_mean, listed

    hint = did_you_mean(verb, _names())
    print(f"trainer: there is no verb {verb}\n  {hint}verbs: {listed(_names())}", file=sys.stderr)
    return USER_MUST_CHANGE
