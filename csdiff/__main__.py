"""`python -m csdiff`: the same as `csdiff`."""

from csdiff.cli.commands import main

main()
