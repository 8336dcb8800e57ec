"""The command line: `csdiff COMMAND [OPTIONS]`. Nothing heavy is imported before a command runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "commands": ["COMMANDS", "Command", "main", "run", "run_command"],
        "parser": ["build_parser", "parse"],
    },
)
