"""Where robench's log records go."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged(handler: logging.Handler) -> Iterator[None]:
    """Within, all that robench logs from INFO on goes to ``handler`` and no other handler of the logger ``robench``."""
    logger = logging.getLogger("robench")
    handlers, level = logger.handlers, logger.level
    try:
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        yield
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


class Lines(logging.Handler):
    """Keeps the messages in a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
