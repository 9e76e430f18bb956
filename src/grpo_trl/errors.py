"""Why a run ends before its last step."""


class StopRequested(BaseException):
    """A signal asks the run to stop. No `Exception`, so that no reward function swallows it."""


class OutOfStep(RuntimeError):
    """A rank fails in a forward in which others wait for it: they cannot hear of it, so it ends at once and unsaved."""


class RunStopped(RuntimeError):
    """A guard has ended the run; what is trained so far is saved, and the message says what to change."""
