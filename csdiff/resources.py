"""Where the files that ship with the package are."""

from pathlib import Path

from csdiff.errors import CSDiffError


def recipes() -> dict[str, Path]:
    """The recipes that ship with csdiff, by name: `tiny.yaml`, ..."""
    package = Path(__file__).resolve().parent
    files = [*(package / "configs").glob("*.yaml"), *(package.parent / "configs").glob("*.yaml")]
    return {file.name: file for file in sorted(files)}


def assets_dir() -> Path:
    """The embedded default: ``csdiff/assets`` in an installed wheel, ``assets/`` beside the package in a checkout.

    Raises:
        CSDiffError: if neither exists.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / "assets", package.parent / "assets"):
        if candidate.is_dir():
            return candidate
    raise CSDiffError(
        f"Expected the shipped models in {package / 'assets'} or {package.parent / 'assets'}, found neither: "
        "reinstall csdiff, or run `make assets` in a checkout."
    )
