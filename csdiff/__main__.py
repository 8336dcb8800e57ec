"""`python -m csdiff`: the same as `csdiff`."""

from csdiff.cli.entry import main

main()
