"""The `fluid` command: a thin table of subcommands, each imported only when it is called."""

import argparse
import importlib
import sys

from fluid_core.entry import ProgramError

# name -> (module, one-line help). The module has add_arguments(parser) and run(args) -> int | None.
COMMANDS: dict[str, tuple[str, str]] = {
    "presets": ("fluid_core.commands.presets", "the model family: parameters, blocks, width, heads"),
    "generate": ("fluid_core.commands.generate", "images from prompts, with a model folder or a registered model"),
    "inspect": ("fluid_core.commands.inspect", "what an encoded data set holds, and an HTML report of it"),
    "forget": ("fluid_core.commands.forget", "remove samples from an encoded data set"),
    "plan": ("fluid_core.commands.plan", "memory, time and cost of a training run"),
    "checkpoints": ("fluid_core.commands.checkpoints", "the checkpoints of a run"),
    "export": ("fluid_core.commands.export", "a checkpoint's EMA weights as a model bundle"),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `fluid`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="fluid", description="Fluid: autoregressive text-to-image with continuous tokens.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = argv[0] if argv else None
    for name, (module, text) in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == wanted:
            command = importlib.import_module(module)
            sub.description = command.__doc__ or text
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        sys.exit(args.run(args) or 0)
    except ProgramError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
