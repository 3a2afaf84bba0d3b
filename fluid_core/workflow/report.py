"""report.html: one file without any outside resource, that tells what went into each stage and what came out."""

import base64
import html
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml
from PIL import Image

from fluid_core.config import Recipe
from fluid_core.training.metrics import read_metrics
from fluid_core.workflow.charts import line_chart, smooth
from fluid_core.workflow.stage import stage_record

HEADLINES = {
    "shapes/seen": "shapes right, pairs seen in training",
    "shapes/heldout": "shapes right, pairs never seen",
    "openmoji/train_top1": "icons found again (memorised)",
    "openmoji/heldout_top1": "tone x person never seen (composed)",
    "openmoji/heldout_tone": "of those with the right skin tone",
}


def build_report(recipe: Recipe, stages: Sequence[str], seconds: Mapping[str, float | None]) -> list[Path]:
    """Write <run_dir>/report.html from the stages' records and what they wrote. A stage that left less is told in less.

    Args:
        seconds: what each stage took.
    """
    records = {stage: stage_record(recipe, stage) or {} for stage in stages}
    parts = [
        _head(recipe, records, seconds),
        _stages(recipe, records, seconds),
        _data(recipe),
        _tokenizer(recipe, records),
        _encoding(recipe),
        _training(recipe),
        _evaluation(recipe),
        _serving(recipe, records),
        _timings(seconds),
        _recipe(recipe),
    ]
    page = Template((resources.files("fluid_core.workflow") / "report_page.html").read_text())
    path = recipe.run_dir / "report.html"
    path.write_text(page.substitute(title=f"Fluid: {recipe.name}", body="\n".join(part for part in parts if part)))
    return [path]


def _head(recipe: Recipe, records: Mapping[str, Any], seconds: Mapping[str, float | None]) -> str:
    metrics = records.get("evaluate", {}).get("metrics", {})
    cards = [(f"{metrics[name]:.2f}", text) for name, text in HEADLINES.items() if name in metrics]
    model = records.get("promote", {}).get("model", {})
    if model:
        cards.append((f"{model['name']} {model['version']}", f"registered, alias {model['alias']}"))
    cards.append((_duration(sum(value or 0.0 for value in seconds.values())), "from the first image to the served model"))
    body = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(text)}</span></div>' for value, text in cards)
    return f'<h1>Fluid: {_text(recipe.name)}</h1><p class="faint">{_text(_what(recipe))}</p><div class="cards">{body}</div>'


def _what(recipe: Recipe) -> str:
    model = recipe.model
    return (
        f"{model.grid} x {model.grid} {model.tokens} tokens in {model.order} order at {recipe.data.image_size} pixels; "
        f"{model.blocks} blocks of width {model.width}; {model.objective} head"
    )


def _stages(recipe: Recipe, records: Mapping[str, Any], seconds: Mapping[str, float | None]) -> str:
    rows = []
    for stage, record in records.items():
        if stage != "report":
            went_in, came_out = _in_and_out(recipe, stage, record)
            rows.append([stage, went_in, came_out, _duration(seconds.get(stage))])
    return "<h2>Stages</h2>" + _table(["stage", "went in", "came out", "took"], rows, numbers={3})


def _in_and_out(recipe: Recipe, stage: str, record: Mapping[str, Any]) -> tuple[str, str]:
    counts, metrics = record.get("counts", {}), record.get("metrics", {})
    told = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items())
    shown = ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:6])
    if stage == "prepare_openmoji":
        return "SVGs and names of the OpenMoji package", told
    if stage == "prepare_shapes":
        return "rules: shapes, colours, counts, relations", told
    if stage == "train_tokenizer":
        return "training images", f"an autoencoder in {recipe.image_tokenizer.path}; {shown}"
    if stage == "encode_dataset":
        return f"{counts.get('in', 0):,} image-text pairs", told
    if stage == "pretrain":
        return f"the encoded pairs, {recipe.training.batch_size} a step", f"a checkpoint with EMA weights; {shown}"
    if stage == "evaluate":
        return f"the bundle {Path(record.get('bundle', '')).name}", f"{len(metrics)} scores and the pictures below"
    if stage == "promote":
        model = record.get("model", {})
        return "the bundle that was scored", f"{model.get('name')} version {model.get('version')}, alias {model.get('alias')}"
    return "prompts over HTTP", shown


def _data(recipe: Recipe) -> str:
    parts = []
    for title, section in (("OpenMoji icons", recipe.data.openmoji), ("Shape scenes", recipe.data.shapes)):
        shards = sorted(Path(section.output, "train").glob("*.tar")) if section else []
        if section and shards:
            tiles = [
                _tile(_uri(image, "image/png"), caption) for image, caption in _first_samples(shards[len(shards) // 2], 12)
            ]
            parts.append(f'<h3>{title} ({_text(section.output)})</h3><div class="tiles">{"".join(tiles)}</div>')
    return "<h2>What it learns from</h2>" + "".join(parts) if parts else ""


def _first_samples(shard: Path, number: int) -> list[tuple[bytes, str]]:
    images: dict[str, bytes] = {}
    captions: dict[str, str] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            if file is not None and extension == "png":
                images[key] = file.read()
            elif file is not None and extension == "txt":
                captions[key] = file.read().decode()
            if len(captions) > 20 * number:
                break
    keys = [key for key in images if key in captions]
    return [(images[key], captions[key]) for key in keys[:: max(1, len(keys) // number)][:number]]


def _tokenizer(recipe: Recipe, records: Mapping[str, Any]) -> str:
    metrics = records.get("evaluate", {}).get("metrics", {})
    rows = [[name, f"{value:.3f}"] for name, value in metrics.items() if name.startswith("vae/")]
    picture = _evaluation_folder(recipe) / "vae.png"
    if not rows or not picture.is_file():
        return ""
    text = "The same checks on reconstructions of the true pictures: no model on top of this tokenizer can do better."
    table = _table(["check", "value"], rows, numbers={1})
    trained = records.get("train_tokenizer", {}).get("reconstructions")
    grids = _wide(picture, "icons and their reconstructions")
    if trained:
        grids += _wide(Path(trained), "held-out images and their reconstructions, from the tokenizer's training")
    return f"<h2>Image tokenizer</h2><p>{text}</p>{table}{grids}"


def _encoding(recipe: Recipe) -> str:
    rows, statistics = [], ""
    for root in (recipe.encode.output, recipe.encode.validation_output):
        path = Path(root or "", "manifest.json")
        if root is None or not path.is_file():
            continue
        manifest = json.loads(path.read_text())
        counts = manifest["counts"]
        dropped = {
            kind: ", ".join(f"{n} {reason}" for reason, n in counts[kind].items()) or "0"
            for kind in ("filtered", "quarantined")
        }
        size = sum(shard["bytes"] + shard.get("text_bytes", 0) for shard in manifest["shards"])
        shards = len(manifest["shards"])
        rows.append(
            [root, counts["in"], counts["out"], dropped["filtered"], dropped["quarantined"], shards, f"{size / 1e6:.1f} MB"]
        )
        if not statistics and manifest["latent_std"]:
            mean, std = (", ".join(f"{value:.2f}" for value in manifest[key]) for key in ("latent_mean", "latent_std"))
            statistics = f'<p class="faint">Latents by channel: mean {mean}; standard deviation {std}.</p>'
    headings = ["data set", "in", "out", "filtered", "quarantined", "shards", "size"]
    return f"<h2>Encoding</h2>{_table(headings, rows, numbers={1, 2, 5, 6})}{statistics}" if rows else ""


def _training(recipe: Recipe) -> str:
    lines = read_metrics(recipe.training_dir / "metrics.jsonl")
    if not lines:
        return ""
    validation = read_metrics(recipe.training_dir / "validation.jsonl")

    def series(name: str, source: list[dict[str, Any]] = lines) -> tuple[list[float], list[float]]:
        points = [(line["step"], float(line[name])) for line in source if line.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]

    steps, loss = series("loss")
    curves = {"training, running mean": (steps, smooth(loss, max(1, len(loss) // 50)))}
    for name, title in (("validation_loss", "validation"), ("validation_loss_ema", "validation, EMA weights")):
        if series(name, validation)[0]:
            curves[title] = series(name, validation)
    charts = [("Loss", line_chart(curves, "step", "loss", log=min(loss) > 0) + _joins(recipe))]
    for name, title in (("grad_norm", "Gradient norm"), ("images_per_second", "Images a second")):
        xs, ys = series(name)
        if xs:
            charts.append((title, line_chart({name: (xs, smooth(ys, max(1, len(ys) // 50)))}, "step", title.lower())))
    grids = sorted((recipe.training_dir / "samples").glob("ema_*.png"))
    while_training = "".join(_wide(path, f"samples at step {int(path.stem.rpartition('_')[2])}") for path in grids[-4:])
    return "<h2>Training</h2>" + "".join(f"<h3>{title}</h3>{svg}" for title, svg in charts) + while_training


def _joins(recipe: Recipe) -> str:
    """Why the training loss may jump: which data joins the mixture later than the rest."""
    later = [f"{data.source or data.path} from step {data.from_step}" for data in recipe.training.datasets if data.from_step]
    return f'<p class="faint">Joins later, so that the training loss jumps: {_text(", ".join(later))}.</p>' if later else ""


def _evaluation(recipe: Recipe) -> str:
    folder = _evaluation_folder(recipe)
    if not (folder / "metrics.json").is_file():
        return ""
    least = recipe.registry.minimum_metrics
    rows = []
    for row in json.loads((folder / "metrics.json").read_text())["table"]:
        interval = f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}" if row["interval"] else ""
        required = f"at least {least[row['metric']]:g}" if row["metric"] in least else ""
        rows.append([row["metric"], f"{row['value']:.3f}", row["samples"], interval, required])
    headings = ["score", "value", "answers", "95% interval", "gate"]
    columns = len(headings) if least else len(headings) - 1
    parts = [_table(headings[:columns], [row[:columns] for row in rows], numbers={1, 2})]
    for section in json.loads((folder / "samples.json").read_text()):
        tiles = [
            _tile(_uri((folder / t["file"]).read_bytes(), "image/png"), t["caption"], t["right"]) for t in section["tiles"]
        ]
        parts.append(f'<h3>{_text(section["title"])}</h3><div class="tiles">{"".join(tiles)}</div>')
    note = "The samples are chosen by their place in the list, not by their looks; a wrong one has a red frame."
    more = "".join(
        _wide(folder / name, text)
        for name, text in (("shapes.png", "more scenes"), ("openmoji.png", "generated icons beside the true ones"))
    )
    return f"<h2>Scores and samples</h2><p>{note}</p>{''.join(parts)}{more}"


def _serving(recipe: Recipe, records: Mapping[str, Any]) -> str:
    listing = recipe.run_dir / "serve" / "images.json"
    if "serve" not in records or not listing.is_file():
        return ""
    images = json.loads(listing.read_text())
    tiles = [
        _tile(_uri((listing.parent / i["file"]).read_bytes(), "image/png"), f"{i['prompt']} (seed {i['seed']})") for i in images
    ]
    return (
        f'<h2>Answered over HTTP</h2><p>By {_text(images[0]["model"])}.</p><div class="tiles">{"".join(tiles)}</div>'
        if images
        else ""
    )


def _timings(seconds: Mapping[str, float | None]) -> str:
    known = {stage: value for stage, value in seconds.items() if value}
    if not known:
        return ""
    longest = max(known.values())
    rows = "".join(
        f'<tr><td>{_text(stage)}</td><td class="number">{_duration(value)}</td>'
        f'<td style="width:60%"><div class="bar" style="width:{100 * value / longest:.1f}%"></div></td></tr>'
        for stage, value in known.items()
    )
    return f'<h2>Time</h2><div class="scroll"><table>{rows}</table></div>'


def _recipe(recipe: Recipe) -> str:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    licence = f"<p>Licence: {_text(recipe.registry.licence)}. {_text(recipe.registry.attribution)}</p>"
    return f"<h2>Recipe</h2><details><summary>as it was resolved</summary><pre>{_text(text)}</pre></details>{licence}"


# Pieces of HTML.


def _evaluation_folder(recipe: Recipe) -> Path:
    return Path(recipe.evaluation.output or recipe.run_dir / "evaluation")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _tile(source: str, caption: str, right: bool | None = None) -> str:
    mark = ' class="wrong"' if right is False else ""
    caption = _text(caption)
    return f'<figure{mark}><img src="{source}" alt="{caption}" loading="lazy"><figcaption>{caption}</figcaption></figure>'


def _wide(picture: Path, text: str) -> str:
    if not picture.is_file():
        return ""
    # Large grids: a quarter of the size, and no difference that can be seen.
    buffer = io.BytesIO()
    Image.open(picture).convert("RGB").save(buffer, "WEBP", quality=90)
    image = f'<img src="{_uri(buffer.getvalue(), "image/webp")}" alt="{_text(text)}" loading="lazy">'
    return f'<details><summary>{_text(text)}</summary><div class="scroll wide">{image}</div></details>'


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]], numbers: set[int]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        shown = [f"{value:,}" if isinstance(value, int) else value for value in row]
        classes = [' class="number"' if index in numbers else "" for index in range(len(shown))]
        return "".join(f"<{tag}{mark}>{_text(value)}</{tag}>" for mark, value in zip(classes, shown, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", headings)}</tr>{body}</table></div>'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
