"""`trainer data tokenize`: text files to token shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trainer.core.errors import DONE, UserError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer data", description="prepare data for training")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="tokenize")
    _add_tokenize(verbs.add_parser("tokenize", help="text, JSON lines, Parquet or Arrow to token shards"))
    return _tokenize(parser.parse_args(argv))


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, help="folders or files; the last one is the folder to write")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, bpe or the path of a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of bpe")
    parser.add_argument("--text-key", default="text", help="key of a JSON line, or column of a table, with the text")
    parser.add_argument("--held-out", type=float, default=0.005, help="fraction of documents for each of val, test")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.epilog = "example: trainer data tokenize texts/ shards/, then trainer fit data=token_shards data.root=shards"


def _tokenize(options: argparse.Namespace) -> int:
    from trainer.data.tokenize import Settings, Shard, tokenize

    *inputs, out = options.inputs
    if not inputs:
        raise UserError("trainer data tokenize needs an input and a folder to write", "trainer data tokenize IN OUT")

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
