"""Subcommands of `fluid`: each module has add_arguments(parser) and run(args)."""
