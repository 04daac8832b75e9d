"""An error as one line."""

from etl.redaction import redact, without_traceback


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error as one short line without secrets, which are taken out before it is cut."""
    text = " ".join(without_traceback(redact(str(error))).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
