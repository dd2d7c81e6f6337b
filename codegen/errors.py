"""Errors of code generation: what could not be lowered, compiled or loaded, and what to do next.

In: data about the failure. Out: exceptions that carry it as fields and render it in `__str__`.
"""

from typing import final

from superopt.ir.errors import SuperoptError


class CodegenError(SuperoptError):
    """A kernel could not be generated, compiled or loaded."""


@final
class CompileError(CodegenError):
    """The system compiler refused generated source: a defect of the generator, or of its flags.

    Not `in_time`: nothing is wrong with it, the caller's budget was over before it answered.
    """

    def __init__(
        self, command: str, stderr: str, source_path: str | None = None, *, in_time: bool = True
    ) -> None:
        self.in_time = in_time
        self.command = command
        self.stderr = stderr
        self.source_path = source_path
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"\nsource kept at: {self.source_path}" if self.source_path else ""
        return f"the C++ compiler failed: {self.command}{where}\n{self.stderr.strip()}"


@final
class NoCompiler(CodegenError):
    """No usable C++17 compiler was found."""

    def __str__(self) -> str:
        return (
            "no C++17 compiler found: install g++ or clang++, or point the CXX environment "
            "variable at one"
        )
