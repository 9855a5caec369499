"""The errors that a user can put right. Anything else that is raised is a bug and keeps its traceback."""


class FastmnistError(Exception):
    """Something outside the program is wrong: the message says what, where and what to do."""


class DataError(FastmnistError):
    """A data source or a compiled file is missing, damaged or not what it claims to be."""


class ConfigError(FastmnistError):
    """A setting has a value that cannot work; the command line answers it with exit status 2."""
