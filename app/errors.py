"""What went wrong, in words for the page."""


class UserError(ValueError):
    """Something the user can mend; the message is a sentence for the page."""
