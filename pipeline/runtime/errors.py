"""The error that the user can correct."""


class UserError(ValueError):
    """A mistake in a command, a config, a path or a file that the user can correct.

    The message is one line. It names the value, the file or the shard, and the remedy. The command
    line prints it and exits with code 2; after any other exception it exits with 1.
    """
