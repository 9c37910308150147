"""Help texts: every verb has usage, a paragraph, every option with its default, and examples that parse."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module

import pytest

from trainer import __version__
from trainer.cli import VERBS, main
from trainer.cli.options import WIDTH, Parser, make_parser
from trainer.cli.sweep import VERBS as SWEEP_VERBS
from trainer.core.errors import DONE, USER_MUST_CHANGE, UserError

NAMES = [name for group in VERBS.values() for name in group]
COMMANDS = [[name] for name in NAMES] + [["data", "tokenize"]]


def parser_of(command: list[str], monkeypatch: pytest.MonkeyPatch) -> Parser:
    """The parser that prints the help of a verb."""
    parsers: list[Parser] = []
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "print_help", lambda self, file=None: parsers.append(self))
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    return parsers[0]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_of_a_verb(
    command: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == DONE
    text = capsys.readouterr().out
    assert text.startswith(f"usage: trainer {' '.join(command)} ")
    assert max(map(len, text.splitlines())) <= WIDTH
    description = text.split("\n\n")[1]
    assert description.endswith("."), description
    assert re.search(r"\nexamples?:\n  trainer ", text)
    for action in parser_of(command, monkeypatch)._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        positional = str(action.metavar or "{" + ",".join(action.choices or []) + "}")
        name = max(action.option_strings or [positional], key=len)
        assert re.search(rf"(?m)^  .*{re.escape(name)}", text), f"{name} is not listed"
        assert action.help, f"{name} has no help"
        if action.default not in (None, False, argparse.SUPPRESS) and action.default != []:
            assert "default: " in action.help, f"{name} does not name its default"


@pytest.mark.parametrize("verb", ["plan", "time", "doctor"])
def test_a_verb_that_refuses_sweeps_lists_no_option_for_them(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--multirun" not in parser_of([verb], monkeypatch).format_help()
    assert "--multirun" in parser_of(["fit"], monkeypatch).format_help()


def test_usage_of_sweep_names_its_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = parser_of(["sweep"], monkeypatch).format_usage()
    assert re.findall(r"\{(.*)\}", usage) == [",".join(SWEEP_VERBS)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_are_valid_commands(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(command, monkeypatch)
    examples = re.findall(rf"(?m)^  trainer {' '.join(command)} (.*)$", parser.epilog or "")
    assert examples
    for example in examples:
        # argparse cannot intermix arguments of subparsers.
        parse = parser.parse_args if command == ["data"] else parser.parse_intermixed_args
        parse(shlex.split(example))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == DONE
    text = capsys.readouterr().out
    assert text.startswith("usage: trainer VERB")
    assert max(map(len, text.splitlines())) <= WIDTH
    for name in NAMES:
        assert re.search(rf"(?m)^  {name}  +\S", text), name


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_is_a_module(name: str) -> None:
    module = import_module(f"trainer.cli.{name.replace('-', '_')}")
    assert callable(module.main)
    assert (module.__doc__ or "").startswith(f"`trainer {name}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out == f"trainer {__version__}\n"


def test_an_unknown_verb_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resumee"]) == USER_MUST_CHANGE
    first, second = capsys.readouterr().err.splitlines()
    assert first == "trainer: unknown verb resumee"
    assert second.startswith("  did you mean resume? verbs: bench, best, check, ")


def test_paragraphs_are_wrapped_and_examples_are_not() -> None:
    example = f"trainer fit {'a' * 100}"
    parser = make_parser("fit", "word " * 40, example, "trainer fit b", notes="note " * 40)
    text = parser.format_help()
    assert f"\nexamples:\n  {example}\n  trainer fit b\n" in text
    assert all(len(line) <= WIDTH for line in text.splitlines() if example not in line)
    with pytest.raises(
        UserError, match=r"unrecognized arguments: --hlep\n  did you mean --help\? see trainer fit --help"
    ):
        parser.parse_args(["--hlep"])
