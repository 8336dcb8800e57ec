"""Whether the model hub can be asked."""

_PATIENCE = 5.0


def unreachable() -> str | None:
    """Why the Hub cannot be asked, or None. One short try: the Hub's own client repeats it for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {type(error).__name__}"
    return None
