"""Errors that a user can cause, each with fields, a message template and an exit status.

The message is built from the fields and says what happened, where, and what to do. An error can be
pickled: a worker sends it to its parent with class, fields and report.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Self


class AddcowError(Exception):
    """Base class of all errors of this package.

    ``template`` is filled with the keyword arguments of the constructor; ``exit_code`` is the exit
    status of a command that ends with this error.
    """

    template: ClassVar[str] = "{message}"
    exit_code: ClassVar[int] = 1

    #: The report of the job that ended with this error, if the job made one.
    report: Any = None

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def without_traceback(self) -> Self:
        """This error without its traceback and causes, whose frames refer to open files."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from class and fields: pickle alone would lose the keyword arguments."""
        state = None if self.report is None else {"report": self.report}
        return (_rebuild, (type(self), self.fields), state)


def _rebuild(kind: type[AddcowError], fields: dict[str, Any]) -> AddcowError:
    return kind(**fields)


class UsageError(AddcowError):
    """The command line, or the arguments of a call, are invalid."""

    exit_code = 64


class ImageError(AddcowError):
    """A file cannot be used for the operation; nothing was changed."""

    template = "{path}: {problem}"


class NotAddcowError(ImageError):
    """The file does not start with the add-cow magic."""

    template = "{path}: not an add-cow file{detail}; name a file that 'addcow create' made"


class FormatError(ImageError):
    """The header breaks a rule of the format; ``rule`` is its name."""

    template = "{path}: {problem} ({rule}); run 'addcow check' for every finding"


class ManifestError(ImageError):
    """A manifest cannot be used."""

    template = (
        "{path}: {problem}; it cannot be used, replace it with 'addcow manifest create --replace'"
    )


class UnsupportedError(ImageError):
    """The image is valid, but the operation does not support it."""


class FileError(AddcowError):
    """The system refused an operation on a file."""

    template = "{path}: cannot {action}: {reason}"

    @classmethod
    def of(cls, path: str, action: str, error: OSError) -> FileError:
        """The error for ``error``, which stopped ``action`` on the file at ``path``."""
        return cls(path=path, action=action, reason=error.strerror or str(error), errno=error.errno)


class SyncError(FileError):
    """Data could not be made durable; nothing that depends on it was published.

    A failed sync must not be repeated: the kernel forgets which pages failed, so the next sync
    would succeed although the data is lost.
    """

    template = (
        "{path}: cannot {action}: {reason}; nothing of this step was published, "
        "check the disk before running the command again"
    )


class ResourceError(AddcowError):
    """The system lacks memory, processes or open files; no particular file is the cause."""

    template = "cannot {action}: {reason}; {remedy}"

    @classmethod
    def of(cls, action: str, error: OSError) -> ResourceError:
        """The error for ``error``, which stopped ``action``."""
        remedy = _REMEDIES.get(error.errno or 0, "give it more, or use fewer --jobs")
        return cls(action=action, reason=error.strerror or str(error), remedy=remedy)


#: What to do when a resource is used up.
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer --jobs",
    errno.ENFILE: "close other programs' files, or raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use --jobs 0",
    errno.ENOMEM: "give it more memory, or use fewer --jobs",
}


def is_shortage(error: OSError) -> bool:
    """Whether ``error`` reports a lack of resources, and no problem of a file."""
    return error.errno in _REMEDIES


class OutsideError(ImageError):
    """A name inside an image leads outside the allowed directories."""

    template = "{path}: it lies outside {roots}; to allow it, use --root {directory}"


class LockedError(ImageError):
    """Another process holds a lock on the file that conflicts with the operation."""

    template = "{path}: in use: {holder} {verb} the permission '{permission}'; try again later"


class GuestRunsError(LockedError):
    """A program still uses an overlay that is to be taken back from QEMU."""

    template = (
        "{path}: in use: {holder} {verb} the permission '{permission}'; switch the guest off, or "
        "wait until that program has ended, and try again"
    )


class HeldError(ImageError):
    """A mount, swap, a mapping or another program uses the storage of a file to be written."""

    template = "{path}: in use: {holder}; release it first, --force does not override this"


class NoLocksError(ImageError):
    """The file system or a sandbox does not support locks, so other users cannot be detected."""

    template = (
        "{path}: cannot lock it: {reason}; if no other program uses the file, "
        "--locking off works without locks"
    )


class DependantsError(ImageError):
    """Other overlays need a file that the job would change."""

    template = "{path}: other overlays depend on it: {dependants}; {remedy}"


class LentError(ImageError):
    """The overlay is lent to QEMU."""

    template = "{path}: it is lent to {holder}; 'addcow qemu import' takes it back"


class HardLinksError(ImageError):
    """A file that would be written has several names."""

    template = (
        "{path}: it has {links} hard links, and through another one it may be part of another "
        "image; remove the others ('find DIR -samefile FILE' lists them), or use --force"
    )


class SpaceError(ImageError):
    """The file system has too little free space for the job."""

    template = (
        "{path}: {needed} bytes of free space are needed and {free} are free; make room first"
    )


class RangeError(AddcowError):
    """A request reaches outside the virtual size."""

    template = "{path}: request at {offset} of {length} bytes is outside the virtual size {size}"


class WorkerError(AddcowError):
    """A task failed, or its worker died twice; finished work of other tasks is kept."""

    template = "{path}: clusters {first} to {last}: {cause}"


class ReadBackError(AddcowError):
    """The disk returns other data than the job wrote."""

    template = (
        "{path}: what was read back differs from the data before the job, first in the {length} "
        "bytes at {start}; the job is done, but the disk or its driver cannot be trusted: "
        "restore from a backup"
    )


class CleanupError(AddcowError):
    """A job has done its work, and a step after it failed."""

    template = "{path}: {done}; {left}: {cause}"


class UnverifiedError(AddcowError):
    """A job is done, and what it wrote could not be read back."""

    template = "{path}: the job is done, but what it wrote was not verified: {cause}"


class StoppedError(AddcowError):
    """The job was stopped before its end."""

    template = "{path}: stopped; finished work is kept, the same command continues from there"

    def at_time_limit(self) -> TimeLimitError:
        """This error, where a time limit has stopped the job."""
        template = self.template.replace("stopped", "the time limit was reached", 1)
        error = TimeLimitError(**{**self.fields, "message": template.format(**self.fields)})
        error.report = self.report
        return error


class UnfinishedError(StoppedError):
    """A job that creates a new file was stopped; the file was removed."""

    template = "{path}: stopped; the unfinished file was removed, run the command again"


class RestartsError(StoppedError):
    """A job that does not record its progress was stopped."""

    template = "{path}: stopped; nothing was lost, the same command starts again"


class NotReadBackError(StoppedError):
    """A job was stopped after its work was done and before all of it was read back."""

    template = "{path}: stopped; the job is done, but what it wrote was not verified"


class InterruptedJobError(StoppedError):
    """SIGINT stopped the job; ``message`` says what was kept."""

    template = "{message}"
    exit_code = 130


class TerminatedJobError(StoppedError):
    """SIGTERM stopped the job; ``message`` says what was kept."""

    template = "{message}"
    exit_code = 143


class HangupJobError(StoppedError):
    """SIGHUP stopped the job; ``message`` says what was kept."""

    template = "{message}"
    exit_code = 129


class CpuLimitJobError(StoppedError):
    """SIGXCPU stopped the job; ``message`` says what was kept."""

    template = "{message}"
    exit_code = 152


class TimeLimitError(StoppedError):
    """A job reached its time limit; the exit status is EX_TEMPFAIL, "try again later"."""

    template = "{message}"
    exit_code = 75
