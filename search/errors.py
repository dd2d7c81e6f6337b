"""Errors and refusals of the search."""

from superopt.ir.errors import SuperoptError


class NotFusible(SuperoptError):
    """A set of ops that cannot be one kernel under the rules at hand; search moves on."""
