"""Where the files that ship with the package are."""

from pathlib import Path

from csdiff.errors import CSDiffError


def recipe(name: str) -> Path | None:
    """The recipe that ships with csdiff under a name, as `tiny.yaml` or `configs/tiny.yaml`; None without one."""
    package, path = Path(__file__).resolve().parent, Path(name)
    places = (package / "configs" / path.name, package.parent / "configs" / path.name)
    return next(filter(Path.is_file, places), None) if path.parent in (Path(), Path("configs")) else None


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
