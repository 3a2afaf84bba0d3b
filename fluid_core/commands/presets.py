"""The model family: parameters, blocks, width, heads. `--json` for programs, `--markdown` for the table in docs/model.md."""

import argparse
import json
from typing import Any

from fluid_core.config import PRESETS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON list")
    form.add_argument("--markdown", action="store_true", help="a Markdown table")


def run(args: argparse.Namespace) -> None:
    rows = preset_rows()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    table: list[tuple[str, ...]] = [
        ("preset", "parameters", "paper", "difference", "blocks", "width", "heads", "trunk", "aligner", "head")
    ]
    for row in rows:
        paper = row["paper_parameters"]
        table.append(
            (
                row["name"],
                _millions(row["parameters"]),
                _millions(paper) if paper else "-",
                f"{row['parameters'] / paper - 1:+.1%}" if paper else "-",
                *(str(row[key]) for key in ("blocks", "width", "heads")),
                *(_millions(row["parts"][part]) for part in ("trunk", "aligner", "head")),
            )
        )
    if args.markdown:
        table.insert(1, ("---",) * len(table[0]))
        print("\n".join("| " + " | ".join(cells) + " |" for cells in table))
        return
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for cells in table:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
        )


def preset_rows() -> list[dict[str, Any]]:
    """Every preset with its parameters counted on the meta device (text encoder and image tokenizer are not counted)."""
    import torch

    from fluid_core.config import ModelConfig
    from fluid_core.model.fluid import FluidModel

    rows = []
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = FluidModel(ModelConfig(preset=name))
        parts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("trunk", "aligner", "head")}
        rows.append(
            {
                "name": name,
                "parameters": sum(parts.values()),
                "blocks": preset.blocks,
                "width": preset.width,
                "heads": preset.heads,
                "paper_parameters": None if preset.paper_parameters is None else int(preset.paper_parameters),
                "aligner_blocks": preset.aligner_blocks,
                "head_blocks": preset.head_blocks,
                "parts": parts,
            }
        )
    return rows


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.2f}B"
