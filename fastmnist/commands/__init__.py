"""The subcommands: parse, call, print. Nothing heavy is imported before one of them runs."""
