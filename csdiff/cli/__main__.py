"""`python -m csdiff.cli`, which `accelerate launch --module` needs."""

from csdiff.cli.entry import main

main()
