"""What an encoded data set holds: counts by reason, statistics, encoders, sizes.

fluid inspect runs/demo/encoded/train                    a summary
fluid inspect runs/demo/encoded/train --json             the same for programs
fluid inspect runs/demo/encoded/train --html report.html a page with histograms and pictures
fluid inspect runs/demo/encoded/train --verify           every file against its hash
"""

import argparse
import json
from pathlib import Path
from typing import Any

from fluid_core.latents.manifest import Manifest
from fluid_core.latents.reader import EncodedDataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="the folder (or s3:// prefix) that encode.output named")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page; decodes latents beside their originals where both are there"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=16,
        metavar="N",
        help="pictures on the page (default %(default)s); shards on S3 are fetched for their originals",
    )
    parser.add_argument("--verify", action="store_true", help="read every file and compare its sha256")


def run(args: argparse.Namespace) -> int:
    dataset = EncodedDataset(args.dataset)
    manifest = dataset.manifest
    if args.verify:
        from fluid_core.encoding.verify import verify

        verify(dataset)
    summary = summarise(dataset)
    print(json.dumps(summary) if args.json else as_text(args.dataset, manifest, summary))
    if args.html:
        from fluid_core.encoding.report import write_report

        write_report(dataset, Path(args.html), args.images)
        if not args.json:
            print(f"page: {args.html}")
    return 0


def summarise(dataset: EncodedDataset) -> dict[str, Any]:
    """The object that `--json` prints."""
    manifest = dataset.manifest
    speed = dataset.storage.read_or_none("_throughput.json")
    return {
        "in": manifest.counts["in"],
        "out": manifest.counts["out"],
        "filtered": manifest.counts["filtered"],
        "quarantined": manifest.counts["quarantined"],
        "shards": len(manifest.shards),
        "latent_mean": manifest.latent_mean,
        "latent_std": manifest.latent_std,
        "encoders": manifest.encoders,
        "shards_set_aside": manifest.counts["shards_set_aside"],
        "duplicate_shards": manifest.duplicate_shards,
        "captions": manifest.counts["captions"],
        "captions_cut": manifest.counts["captions_cut"],
        "kind": manifest.kind,
        "image_size": manifest.image_size,
        "latent_shape": manifest.latent_shape,
        "text": {"mode": manifest.text_mode, "dtype": manifest.text_dtype, "cosine": manifest.text_cosine},
        "bytes": {"latents": sum(s.bytes for s in manifest.shards), "text": sum(s.text_bytes for s in manifest.shards)},
        "histograms": manifest.histograms,
        "throughput": json.loads(speed) if speed else None,
        "hash": manifest.hash,
    }


def as_text(root: str, manifest: Manifest, summary: dict[str, Any]) -> str:
    """For people."""
    rows: list[tuple[str, str]] = [("in", f"{summary['in']:,}"), ("out", f"{summary['out']:,}")]
    for name in ("filtered", "quarantined"):
        rows.append((name, f"{sum(summary[name].values()):,}"))
        rows.extend((f"  {reason}", f"{number:,}") for reason, number in summary[name].items())
    size = summary["bytes"]
    rows += [
        (
            "shards",
            f"{summary['shards']} ({summary['shards_set_aside']} set aside, {len(summary['duplicate_shards'])} refused)",
        ),
        ("latents", f"{manifest.kind} {manifest.latent_shape}, {size['latents'] / 1e6:.1f} MB"),
        ("text", f"{manifest.text_mode} {manifest.text_dtype}, {size['text'] / 1e6:.1f} MB"),
        (
            "captions",
            f"{summary['captions']:,}, {summary['captions_cut']:,} cut to {manifest.encoders['text']['max_tokens']} tokens",
        ),
        ("latent mean", " ".join(f"{value:.3f}" for value in manifest.latent_mean)),
        ("latent std", " ".join(f"{value:.3f}" for value in manifest.latent_std)),
        ("image tokenizer", f"{manifest.encoders['image']['path']} {manifest.encoders['image']['sha256'][:12]}"),
        ("text encoder", f"{manifest.encoders['text']['path']} {manifest.encoders['text']['sha256'][:12]}"),
        ("manifest", summary["hash"][:16]),
    ]
    if manifest.text_cosine:
        rows.append(("int8 cosine", f"mean {manifest.text_cosine['mean']:.5f}, lowest {manifest.text_cosine['min']:.5f}"))
    if summary["throughput"]:
        rows.append(("last run", f"{summary['throughput']['images_per_second']:.0f} images/s"))
    return "\n".join([root, *(f"  {name:<16} {value}" for name, value in rows)])
