"""The errors that end a command with a message instead of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """The command cannot go on; the message says why and what would help."""


class OptionError(CommandError):
    """An option's value is wrong; the message starts with the option's name."""
