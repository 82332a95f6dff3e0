"""The one error of the lab that is meant for people."""

from __future__ import annotations


class LabError(Exception):
    """Something that the user can mend; its text is one line that says what, where and how."""
