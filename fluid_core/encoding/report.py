"""One self-contained HTML page about an encoded data set: counts, reasons with examples, histograms, decoded latents."""

import base64
import html
import io
import tempfile
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from fluid_core.data.decode import BadImage, DecodeOptions, DroppedImage, decode_image
from fluid_core.data.plan import PlannedShard, read_plan
from fluid_core.data.reader import read_shard
from fluid_core.data.samples import RawSample
from fluid_core.data.storage import absolute
from fluid_core.encoders.image import ImageTokenizer
from fluid_core.latents.reader import EncodedDataset

EXAMPLES_PER_REASON = 5
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}code{font-size:.9em}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
figure{margin:0}figure img{width:48%;image-rendering:auto}figcaption{font-size:.85em;color:#555}
.charts{display:flex;flex-wrap:wrap;gap:2rem}
"""


def write_report(dataset: EncodedDataset, path: Path, images: int = 16) -> None:
    """Write the page. Originals are shown where their shards are still there, decoded latents where the tokenizer is.

    Shards on S3 that hold one of the pictures are fetched whole, one after another: at most `images` of them.
    """
    manifest = dataset.manifest
    counts = manifest.counts
    rows = [("in", counts["in"]), ("out", counts["out"])]
    rows += [(f"filtered: {reason}", number) for reason, number in counts["filtered"].items()]
    rows += [(f"quarantined: {reason}", number) for reason, number in counts["quarantined"].items()]
    rows += [("captions", counts["captions"]), ("captions cut", counts["captions_cut"]), ("shards", len(manifest.shards))]
    charts = "".join(_histogram(name, bins) for name, bins in manifest.histograms.items())
    channels = zip(manifest.latent_mean, manifest.latent_std, strict=True)
    parts = [
        f"<h1>{html.escape(dataset.root)}</h1>",
        f"<p>manifest <code>{manifest.hash[:16]}</code>, {manifest.kind} latents {manifest.latent_shape}, "
        f"text {manifest.text_mode} {manifest.text_dtype}</p>",
        _table(["samples", ""], [(name, f"{number:,}") for name, number in rows]),
        f'<h2>Distributions</h2><div class="charts">{charts}</div>',
        "<h2>Latent channels</h2>" + _table(["mean", "standard deviation"], [(f"{m:.4f}", f"{s:.4f}") for m, s in channels]),
        "<h2>Encoders</h2>" + _table(["", ""], [(name, str(facts)) for name, facts in manifest.encoders.items()]),
        "<h2>Not encoded</h2>" + _reasons(dataset),
        "<h2>Decoded latents beside their originals</h2>" + _pictures(dataset, images),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Encoded data set</title><style>{STYLE}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + "\n".join(parts) + "</html>\n", encoding="utf-8")


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _histogram(name: str, bins: dict[str, int]) -> str:
    """Inline SVG bars; counts are in the tooltips."""
    if not bins:
        return ""
    values = {int(value): number for value, number in bins.items()}
    top = max(values.values())
    bars = "".join(
        f'<rect x="{i * 320 / len(values):.1f}" y="{100 - 100 * n / top:.1f}" width="{max(1.0, 300 / len(values)):.1f}" '
        f'height="{100 * n / top:.1f}" fill="#47a"><title>{value}: {n}</title></rect>'
        for i, (value, n) in enumerate(sorted(values.items()))
    )
    ends = f"{min(values)} to {max(values)}"
    label = html.escape(name.replace("_", " "))
    return f'<div><svg width="320" height="100" role="img" aria-label="{label}">{bars}</svg><br>{label}: {ends}</div>'


def _reasons(dataset: EncodedDataset) -> str:
    examples: dict[tuple[str, str], list[str]] = {}
    for shard in dataset.manifest.shards:
        if shard.quarantine_rows:
            rows = pq.read_table(dataset.storage.open_input(f"quarantine/{shard.id}.parquet")).to_pylist()
            for row in rows:
                found = examples.setdefault((row["status"], row["reason"]), [])
                if len(found) < EXAMPLES_PER_REASON:
                    found.append(f"{row['key']} {row['detail'] or ''}".strip())
    if not examples:
        return "<p>Everything was encoded.</p>"
    return _table(["", "reason", "examples"], [(s, r, "; ".join(found)) for (s, r), found in sorted(examples.items())])


def _pictures(dataset: EncodedDataset, images: int) -> str:
    """The first rows of evenly spread row groups."""
    groups = dataset.row_groups
    if not groups or not images:
        return "<p>No images.</p>"
    manifest = dataset.manifest
    try:
        facts = manifest.encoders["image"]
        tokenizer = ImageTokenizer.from_pretrained(facts["path"], manifest.kind, facts["revision"])
    except ValueError as error:
        return f"<p>The image tokenizer is not there any more: {html.escape(str(error))}</p>"
    if tokenizer.identity()["sha256"] != facts["sha256"]:
        return f"<p>{html.escape(facts['path'])} holds other weights than those that made this data set.</p>"
    plan = {shard.id: shard for shard in read_plan(dataset.storage.read_or_none("plan.parquet") or b"")}
    chosen = [groups[i * len(groups) // min(images, len(groups))] for i in range(min(images, len(groups)))]
    each = -(-images // len(chosen))
    figures = []
    bar = tqdm(chosen, desc="pictures", unit="group", disable=None, leave=False)
    for shard_index, groups_of_shard in groupby(bar, key=lambda group: group[0]):
        shown: list[tuple[str, str, torch.Tensor]] = []
        for _, group_index, _ in groups_of_shard:
            rows = dataset.read_group(shard_index, group_index, ["key", "captions", "moments", "codes"])
            latents = rows.moments.float().chunk(2, dim=1)[0] if rows.moments is not None else rows.codes
            assert latents is not None
            shown.extend(zip(rows.keys, rows.captions, tokenizer.decode(latents[:each]), strict=False))
        sizes = {key: (picture.shape[-2], picture.shape[-1]) for key, _, picture in shown}
        originals = _originals(plan.get(manifest.shards[shard_index].id), sizes, manifest.settings)
        for key, caption, picture in shown:
            array = ((picture.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            original = _png(originals[key]) if key in originals else ""
            label = f"<figcaption>{html.escape(key)}: {html.escape(caption)}</figcaption>"
            figures.append(f"<figure>{original}{_png(array)}{label}</figure>")
    grid = "".join(figures[:images])
    return f'<p>Left the original as it was cropped, right its latents decoded.</p><div class="pictures">{grid}</div>'


def _originals(shard: PlannedShard | None, sizes: dict[str, tuple[int, int]], settings: dict[str, Any]) -> dict[str, Any]:
    """Originals by key, cropped to the (height, width) that `sizes` gives, as far as the source is still there."""
    if shard is None:
        return {}
    found: dict[str, Any] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="fluid-report-") as scratch:
            for sample in read_shard(replace(shard, root=absolute(shard.root)), Path(scratch), settings["caption_fields"]):
                if isinstance(sample, RawSample) and sample.key in sizes:
                    options = DecodeOptions(settings["image_size"], buckets=(sizes[sample.key],))
                    found[sample.key] = decode_image(sample.image, options).pixels_HW3
                if len(found) == len(sizes):
                    break
    except (OSError, ValueError, BadImage, DroppedImage):
        pass  # moved or changed since, or out of reach: the page shows the decoded latents alone
    return found


def _png(array: np.ndarray[Any, Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
