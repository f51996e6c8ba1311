"""What the commands print, where somebody reads it and where nobody does any more (`| head`)."""

import os
import sys
from typing import TextIO

from rich.console import Console


def to_nowhere(stream: TextIO) -> None:
    """Send what is still written to a standard stream, at exit, too, to nobody."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Result(Console):
    """For what a command is run for: BrokenPipeError where nobody reads it, not rich's exit."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise


class Notes(Console):
    """For what is said beside files that are written: work goes on where nobody reads it, and has not failed."""

    def on_broken_pipe(self) -> None:
        """The rest is for nobody."""
        to_nowhere(self.file)  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        """Print one line as it is."""
        self.out(text, highlight=False)


def complain(text: str) -> None:
    """Print a line on stderr."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        to_nowhere(sys.stderr)
