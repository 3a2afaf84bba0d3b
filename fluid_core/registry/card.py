"""The model card that travels in the bundle and is shown in MLflow's registry."""

from typing import Any

from fluid_core.config import Recipe
from fluid_core.registry.gates import Gate

MAX_DESCRIPTION = 5000
"""Characters of a model version's description in MLflow's tables; PostgreSQL and MySQL refuse more, SQLite does not look."""

_TEXT = """# {name}

A [Fluid](https://arxiv.org/abs/2410.13863) model: autoregressive text-to-image generation, {tokens} tokens, {order} order.

| | |
|---|---|
| Parameters | {parameters:,} |
| Image size | {size} pixels, {grid} x {grid} tokens |
| Trained on | {data} |
| Trained for | {step} steps of {batch} images |
| Validation loss | {loss} |
| Objective | {objective} |
| Bundle sha256 | `{sha256}` |
| Config hash | `{config_hash}` |
| Code | `{code}` |
| Checkpoint | `{checkpoint}` |
| Licence | {licence} |
| Attribution | {attribution} |

{samples}

## Use

```python
from fluid_core.generation.pipeline import FluidPipeline
image = FluidPipeline.from_pretrained("<this folder>")(["{prompt}"], seed=0)[0]
```

Defaults: {defaults}

## Checks before promotion

{gates}

## Scores

{metrics}

## Limits

The model draws what its training captions describe and little else. It was not checked for biases of its data, and the server's
default safety hook is a plain block list. Images carry how they were made in their PNG metadata; it is easily removed.
"""


def model_card(
    recipe: Recipe,
    tags: dict[str, str],
    data: list[dict[str, Any]],
    parameters: int,
    loss: float | None,
    metrics: dict[str, float],
    gates: list[Gate],
    pixels: tuple[int, int],
    prompts: list[str],
) -> str:
    """Markdown. `data`: [{"uri", "digest", "rows"}] of the encoded data sets. `prompts`: those of samples.png, row by row."""
    generation = recipe.generation.model_dump()
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items()))
    return _TEXT.format(
        name=recipe.registry.model_name,
        tokens=recipe.model.tokens,
        order=recipe.model.order,
        parameters=parameters,
        size=f"{pixels[0]} x {pixels[1]}",
        grid=recipe.model.grid,
        data="; ".join(_data_line(one) for one in data) or "not recorded here",
        step=tags["fluid.step"],
        batch=recipe.training.batch_size,
        loss="not recorded" if loss is None else f"{loss:.5f}",
        objective=recipe.model.objective,
        sha256=tags["fluid.bundle_sha256"],
        config_hash=tags["fluid.config_hash"],
        code=tags["fluid.code_version"],
        checkpoint=tags["fluid.checkpoint"],
        licence=recipe.registry.licence,
        attribution=recipe.registry.attribution or "none needed",
        samples=f"![fixed prompts](samples.png)\n\nFixed prompts, row by row: {'; '.join(prompts)}.",
        prompt=(recipe.training.sample_prompts or ["a red circle"])[0],
        defaults=", ".join(f"{name} {value}" for name, value in generation.items()),
        gates="\n".join(f"- {'passed' if gate.passed else '**refused**'}: {gate.name}: {gate.detail}" for gate in gates),
        metrics=f"| metric | value |\n|---|---|\n{table}" if table else "No evaluation was run for this recipe.",
    )


def registry_description(card: str, step: int, gates: list[Gate], source: str) -> str:
    """The card as the registry shows it: its list of versions shows the first line, its page has the name as title already,
    has no pictures, and takes no more than its database allows."""
    refused = ", ".join(gate.name for gate in gates if not gate.passed)
    lines = [f"Step {step}: {f'refused by {refused}' if refused else 'passed every gate'}."]
    for line in card.splitlines()[1:]:
        if line.startswith("!["):
            line = "The picture of the fixed prompts is among the artifacts of the source run, and `samples.png` in the bundle."
        lines.append(line.replace("<this folder>", source))
    text = "\n".join(lines)
    if len(text) <= MAX_DESCRIPTION:
        return text
    more = "\n\n... the rest is in README.md of the bundle and of this version's run."
    return text[: MAX_DESCRIPTION - len(more)].rsplit("\n", 1)[0] + more


def _data_line(data: dict[str, Any]) -> str:
    return f"`{data['uri']}` ({data['rows']:,} images, manifest `{data['digest'][:16]}`)"
