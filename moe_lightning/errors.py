"""The errors that a user can cause, each with the exit code that the command line ends with.

Anything else that is raised is a defect of ours and ends with exit code 1 and a traceback.
"""


class MoELightningError(ValueError):
    """An error whose message is written for the user: what, why, and what to do."""

    exit_code = 1


class UsageError(MoELightningError):
    """A command line, config or input file that cannot be used."""

    exit_code = 2


class CheckpointError(MoELightningError):
    """A checkpoint or model that cannot be used; nothing was started."""

    exit_code = 4


class WorkersLostError(MoELightningError):
    """Workers or ranks are gone and nobody can do their work; the same command continues."""

    exit_code = 6


class TooManyRowsFailedError(MoELightningError):
    """More rows failed than the user allows."""

    exit_code = 1


class OutOfMemoryError(MoELightningError):
    """Memory ran out in the middle of a run."""

    exit_code = 1


class StoppedError(MoELightningError):
    """A run that ended before its work was done; the same command continues."""

    exit_code = 5
