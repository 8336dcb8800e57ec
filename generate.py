"""Pictures from prompts: ``python generate.py --prompt "a red apple, 3d style"``. Like ``csdiff generate``."""

import sys

from csdiff.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("generate", sys.argv[1:], prog="generate.py"))
