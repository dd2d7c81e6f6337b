"""Errors of the project: every error a user can meet derives from `SuperoptError`."""


class SuperoptError(Exception):
    """Base of all errors that reach a user; the message says what, where and what to do."""


class GraphError(SuperoptError):
    """A graph or a node breaks a rule of the IR."""


class ParseError(SuperoptError):
    """Text that is not a graph.

    Args:
        message: what was expected and what came.
        line, column: position in the text, 1-based.
        source: the offending line, shown with a caret.
    """

    def __init__(self, message: str, line: int, column: int, source: str) -> None:
        self.line = line
        self.column = column
        self.source = source
        super().__init__(f"line {line}:{column}: {message}\n  {source}\n  {' ' * (column - 1)}^")


class MissingRule(SuperoptError):
    """A rule table has no rule for an op."""
