"""Packages of `csdiff[eval]`, asked for by name where they are used."""

from importlib.util import find_spec

from csdiff.errors import CSDiffError

_PACKAGES = {"sklearn": "scikit-learn"}


def require(module: str, what: str, install: str = "'csdiff[eval]'") -> None:
    """Raises a CSDiffError where the package that `what` needs cannot be imported by this name."""
    try:
        found = find_spec(module) is not None
    except ValueError:  # Python's mark of a module that cannot be imported: None in sys.modules.
        found = False
    if not found:
        raise CSDiffError(f"{what}: expected {_PACKAGES.get(module, module)}, found none; pip install {install}.")
