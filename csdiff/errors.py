"""The error a user can act on."""


class CSDiffError(ValueError):
    """Bad input, said in one sentence: what was expected, what was found, where, and what to do.

    The command line prints the sentence alone and exits with code 2.
    """
