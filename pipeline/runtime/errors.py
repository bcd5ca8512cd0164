"""The error that the user can correct, also inside the errors that Ray wraps around it."""

import re


class UserError(ValueError):
    """A mistake in a command, a config, a path or a file that the user can correct.

    The message is one line. It names the value, the file or the shard, and the remedy. The command
    line prints it and exits with code 2; after any other exception it exits with 1.
    """


_AS_TEXT = re.compile(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", re.MULTILINE)


def find_cause(error: BaseException) -> BaseException:
    """The error that a task or a worker raised, inside the errors that Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)  # of Ray Train, by rank
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None)
    return find_cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def user_message(error: BaseException) -> str:
    """The message of the UserError that caused this error; "" if none did."""
    cause = find_cause(error)
    if type(cause) is UserError:
        return str(cause)
    messages = _AS_TEXT.findall(f"{error}\n{cause}")  # Ray keeps an actor's error as text
    return str(messages[-1]) if messages else ""
