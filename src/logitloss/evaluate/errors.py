"""What can be wrong with an evaluation's input, each in one line that says where.

An error knows the argument it is about and, where there is one, the row. Whoever cut the input into batches
moves the row (`shift`), whoever knows the file's name puts it for the argument, and the error goes on its
way.
"""


class EvaluationError(Exception):
    """An input that cannot be evaluated.

    Parameters
    ----------
    argument : str
        What is wrong: "logits", "target", or a file's name.
    what : str
        What is wrong with it.
    index : tuple of int, optional
        The row it is about, as an index into the target.
    """

    def __init__(self, argument: str, what: str, index: tuple[int, ...] | None = None) -> None:
        super().__init__(argument, what, index)
        self.argument = argument
        self.what = what
        self.index = index

    def __str__(self) -> str:
        """One line: what, where, why."""
        return f"{self.argument}: {self.reason}"

    @property
    def reason(self) -> str:
        """The line without what is wrong."""
        if not self.index:
            return self.what
        row = self.index[0] if len(self.index) == 1 else list(self.index)
        return f"row {row}: {self.what}"

    def shift(self, origin: tuple[int, ...]) -> None:
        """Count the row from the start of the whole, given where its batch starts."""
        if self.index is not None:
            self.index = tuple(i + start for i, start in zip(self.index, origin, strict=True))


class FileError(EvaluationError):
    """A file that is missing, unreadable, or no array."""


class ShapeError(EvaluationError, ValueError):
    """Shapes, an axis or an option that do not go together."""


class DtypeError(EvaluationError, TypeError):
    """An array of a type that its role does not allow."""


class StateError(EvaluationError, ValueError):
    """A saved state of another version, or of other inputs."""


class LabelError(EvaluationError, IndexError):
    """A label outside the classes."""


class LogitError(EvaluationError, ValueError):
    """A row that counts and has no loss: it holds NaN, +inf, or nothing but -inf."""


class MaskError(EvaluationError, ValueError):
    """A mask's value that is neither 0 nor 1."""


class OutputError(FileError):
    """A file that cannot be written, or not be written on."""


class FileWarning(UserWarning):
    """What a file lacks, and is evaluated without."""
