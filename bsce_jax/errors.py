"""Errors that are the user's to mend: one clear line, no traceback."""


class UserError(ValueError):
    """Bad input: the message names the field, its value and what is allowed."""
