"""The error a user can act on."""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class CSDiffError(ValueError):
    """Bad input, said in one sentence: what was expected, what was found, where, and what to do.

    The command line prints the sentence alone and exits with code 2.
    """


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """The known name that is nearest, as the end of a sentence; nothing where none is near."""
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def require(module: str, what: str, install: str = "'csdiff[eval]'") -> None:
    """Raises a CSDiffError where a package that `what` needs is not installed."""
    try:
        found = find_spec(module) is not None
    except ValueError:  # Python's mark of a module that cannot be imported: None in sys.modules.
        found = False
    if not found:
        package = "scikit-learn" if module == "sklearn" else module
        raise CSDiffError(f"{what}: expected {package}, found none; pip install {install}.")
