"""What can go wrong, in words a person can act on.

Every error that a user can cause is one of these classes. An error carries
fields, a template that names the file and the mend, and the exit status of the
command that meets it; the message is built from the fields, so that an error
survives being sent from a worker to its parent and means the same there.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Self


class AddcowError(Exception):
    """Base of every error this package raises on purpose.

    ``template`` is filled from the keyword arguments given to the class;
    ``exit_code`` is the exit status of a command that ends with this error.
    """

    template: ClassVar[str] = "{message}"
    exit_code: ClassVar[int] = 1

    #: What the job that ends with this error had done until then; it says so itself.
    report: Any = None

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def kept(self) -> Self:
        """The same without the way that it came: with it live the files that were open there."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from class and fields: keyword arguments survive pickling."""
        state = None if self.report is None else {"report": self.report}
        return (_rebuild, (type(self), self.fields), state)


def _rebuild(kind: type[AddcowError], fields: dict[str, Any]) -> AddcowError:
    return kind(**fields)


class UsageError(AddcowError):
    """The command line or the arguments of a call cannot mean anything."""

    exit_code = 64


class ImageError(AddcowError):
    """A file is not fit for what was asked of it; nothing was changed."""

    template = "{path}: {problem}"


class NotAddcowError(ImageError):
    """The file does not start with the add-cow magic."""

    template = "{path}: not an add-cow file{detail}; name a file that 'addcow create' made"


class FormatError(ImageError):
    """The header breaks a rule of the format; ``rule`` names it."""

    template = "{path}: {problem} ({rule}); run 'addcow check' for every finding"


class ManifestError(ImageError):
    """A manifest that cannot be used as one."""

    template = "{path}: {problem}; it cannot be used, make it anew with --replace"


class UnsupportedError(ImageError):
    """A legal image that this tool does not handle in this operation."""


class FileError(AddcowError):
    """The system refused an operation on a file."""

    template = "{path}: cannot {action}: {reason}"

    @classmethod
    def of(cls, path: str, action: str, error: OSError) -> FileError:
        """Describe ``error``, met while trying to ``action`` the file at ``path``."""
        return cls(path=path, action=action, reason=error.strerror or str(error), errno=error.errno)


class SyncError(FileError):
    """Data could not be made durable; nothing that depends on it was published.

    After one failed sync the kernel forgets which pages failed, so the same
    sync must never be tried again: the next one would succeed and prove nothing.
    """

    template = (
        "{path}: cannot {action}: {reason}; nothing of this step was published, "
        "check the disk before running the command again"
    )


class ResourceError(AddcowError):
    """The system has no room for what every job needs, whatever file it is about."""

    template = "cannot {action}: {reason}; {mend}"

    @classmethod
    def of(cls, action: str, error: OSError) -> ResourceError:
        """Describe ``error``, met while trying to ``action``."""
        mend = _MENDS.get(error.errno or 0, "give it more, or use fewer --jobs")
        return cls(action=action, reason=error.strerror or str(error), mend=mend)


#: What to do when the system has no more of something.
_MENDS = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or use fewer --jobs",
    errno.ENFILE: "close other programs' files, or raise fs.file-max",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or use --jobs 0",
    errno.ENOMEM: "give it more memory, or use fewer --jobs",
}


def is_shortage(error: OSError) -> bool:
    """Whether ``error`` says that the system has no room, and nothing of any file."""
    return error.errno in _MENDS


class OutsideError(ImageError):
    """A name inside an image leads to where nobody allowed it to lead."""

    template = "{path}: it lies outside {roots}; if it is meant, allow it with --root {directory}"


class LockedError(ImageError):
    """Another process uses the file in a way that this operation does not get along with."""

    template = "{path}: in use: {holder} {verb} the permission '{permission}'; try again later"


class HeldError(ImageError):
    """A mount, swap, a mapping or another program has the storage of a file to be written."""

    template = "{path}: in use: {holder}; release it first, --force does not override this"


class NoLocksError(ImageError):
    """The file system, or a sandbox, has no locks: nothing would tell whether the file is used."""

    template = (
        "{path}: cannot lock it: {reason}; where no other program uses the file, "
        "--locking off works without locks"
    )


class DependantsError(ImageError):
    """Other overlays need a file that the job would change."""

    template = "{path}: other overlays depend on it: {dependants}; {mend}"


class HardLinksError(ImageError):
    """A file that would be written has several names."""

    template = (
        "{path}: it has {links} hard links, and beside another one it may be part of another "
        "image; remove the others ('find DIR -samefile FILE' lists them), or use --force"
    )


class SpaceError(ImageError):
    """The file system has not enough room for what the job would write."""

    template = (
        "{path}: {needed} bytes of free space are needed and {free} are free; make room first"
    )


class RangeError(AddcowError):
    """A request reaches outside the virtual size."""

    template = "{path}: request at {offset} of {length} bytes is outside the virtual size {size}"


class WorkerError(AddcowError):
    """A task failed, or its worker died twice; what other tasks finished is kept."""

    template = "{path}: clusters {first} to {last}: {cause}"


class ReadBackError(AddcowError):
    """What a job wrote is not what is read back from the disk."""

    template = (
        "{path}: what was read back differs from what was seen before, first in the {length} "
        "bytes at {start}; the job is done, but the disk or its driver cannot be trusted: "
        "go back to a copy"
    )


class UnendedError(AddcowError):
    """A job has done its work, and failed at what comes after it."""

    template = "{path}: {done}; {left}: {cause}"


class UnverifiedError(AddcowError):
    """A job is done, and what it wrote could not be read back."""

    template = "{path}: the job is done, but what it wrote was not verified: {cause}"


class StoppedError(AddcowError):
    """The job was asked to stop before its end."""

    template = "{path}: stopped; what was finished is kept, the same command goes on from there"


class UnfinishedError(StoppedError):
    """A job whose result is a new file was stopped; the file is gone again."""

    template = "{path}: stopped; the unfinished file was removed, run the command again"


class BeginsAnewError(StoppedError):
    """A job was stopped that keeps no record of what it has done."""

    template = "{path}: stopped; nothing was lost by it, the same command begins anew"


class NotReadBackError(StoppedError):
    """A job was stopped after its work was done and before all of it was read back."""

    template = "{path}: stopped; the job is done, but what it wrote was not verified"


class InterruptedJobError(StoppedError):
    """A job that SIGINT stopped; ``message`` says what became of its work."""

    template = "{message}"
    exit_code = 130


class TerminatedJobError(StoppedError):
    """A job that SIGTERM stopped; ``message`` says what became of its work."""

    template = "{message}"
    exit_code = 143


class HangupJobError(StoppedError):
    """A job that SIGHUP stopped; ``message`` says what became of its work."""

    template = "{message}"
    exit_code = 129


class CpuLimitJobError(StoppedError):
    """A job that SIGXCPU stopped; ``message`` says what became of its work."""

    template = "{message}"
    exit_code = 152


class TimeLimitError(StoppedError):
    """A job that reached its time limit; the status is sysexits' "try again later"."""

    template = "{message}"
    exit_code = 75
