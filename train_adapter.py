"""Train an adapter: ``accelerate launch train_adapter.py --config configs/tiny.yaml``. Like ``csdiff train``."""

import sys

from csdiff.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:], prog="train_adapter.py"))
