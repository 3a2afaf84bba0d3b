"""Remove samples from an encoded data set: its files, its ledger and its manifest no longer hold them.

    fluid forget --dataset runs/demo/encoded/train --keys takedown.txt

FILE lists keys, image sha256 or URLs, one a line. Safe to interrupt and to run again. A data set that is encoded anew reads
its own opt-out list (data.filters.opt_out): add the same entries there.
"""

import argparse

from fluid_core.data.filters import OptOut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", required=True, help="the folder (or s3:// prefix) that encode.output named")
    parser.add_argument("--keys", required=True, metavar="FILE", help="keys, sha256 or URLs, one a line")


def run(args: argparse.Namespace) -> int:
    from fluid_core.encoding.forget import forget

    done = forget(args.dataset, OptOut.read(args.keys))
    print(f"{args.dataset}: {done.samples} samples removed from {done.shards} shards")
    if not done.samples:
        print("nothing matched: entries are compared with keys, image sha256 and the metadata's `url`")
    return 0
