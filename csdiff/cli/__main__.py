"""`python -m csdiff.cli`, which `accelerate launch --module` needs."""

from csdiff.cli.commands import main

main()
