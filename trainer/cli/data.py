"""`trainer data tokenize`: write text files as token shards; `trainer data index`: list the files of such a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.cli.options import HelpFormatter, Parser, make_parser
from trainer.core.errors import DONE, UserError

_DESCRIPTION = (
    "Tokenize text into shards of token ids for data=token_shards. Inputs are text files, JSON lines, Parquet or Arrow "
    "files, or folders of them; the last argument is the folder to write."
)
_EXAMPLE = "trainer data tokenize texts/ shards/ --tokenizer bpe --vocab-size 16000"


def main(argv: list[str]) -> int:
    """Run `trainer data` and return the exit code."""
    parser = make_parser("data", "Prepare data for training.", _EXAMPLE, allow_abbrev=True)
    verbs = parser.add_subparsers(dest="what", required=True, metavar="tokenize|index")
    _add_tokenize(verbs)
    _add_index(verbs)
    options = parser.parse_args(argv)
    return _tokenize(options) if options.what == "tokenize" else _index(options.folder)


def _add_index(verbs: argparse._SubParsersAction[Parser]) -> None:
    text = (
        "write sizes and checksums of the files of a folder of token shards into its index.json, which a remote copy "
        "needs; tokenize writes it, too"
    )
    parser = verbs.add_parser("index", help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of trainer data tokenize")


def _index(folder: Path) -> int:
    from trainer.data.locations import INDEX, token_shards
    from trainer.data.shard_index import add_index

    print(f"{add_index(token_shards(str(folder))):,} files in {folder / INDEX}")
    return DONE


def _add_tokenize(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verbs.add_parser(
        "tokenize",
        help="write text, JSON lines, Parquet or Arrow files as token shards",
        description=_DESCRIPTION,
        epilog=f"example:\n  {_EXAMPLE}\n  trainer fit model=transformer data=token_shards data.root=shards",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help="input files or folders, then the output")
    parser.add_argument(
        "--tokenizer",
        default="bytes",
        help="bytes, bpe (trained on the inputs) or the path of a tokenizer.json (default: bytes)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="vocabulary size of bpe (default: 32000)"
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of a JSON line, or column of a table, that holds the text (default: text)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.005,
        metavar="FRACTION",
        help="fraction of the documents for each of val and test (default: 0.005)",
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="number of processes (default: 2)")


def _tokenize(options: argparse.Namespace) -> int:
    from trainer.data.tokenize import Settings, Shard, tokenize

    *inputs, out = options.inputs
    if not inputs:
        raise UserError("trainer data tokenize needs an input and an output folder", "trainer data tokenize IN OUT")

    def show(done: int, units: int, totals: Shard) -> None:
        print(f"shard {done}/{units}  {sum(totals.tokens.values()):,} tokens  {totals.bad} bad records", flush=True)

    settings = Settings(options.tokenizer, options.vocab_size, options.text_key, options.held_out)
    totals = tokenize(inputs, out, settings, options.workers, show)
    for name in totals.bad_names:
        print(f"  skipped {name}", file=sys.stderr)
    tokens = ", ".join(f"{split} {count:,}" for split, count in totals.tokens.items())
    print(f"{totals.documents:,} documents in {out}: {tokens} tokens")
    print(f"next: trainer fit model=transformer data=token_shards data.root={out}")
    return DONE
