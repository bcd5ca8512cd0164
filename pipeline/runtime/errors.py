"""The one error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in a command, a config, a path or a file that its user can mend.

    The message is one line: it names the value, the file or the shard, and the remedy. The command
    line prints it as it is and exits with code 2; every other exception exits with 1.
    """
