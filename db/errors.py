"""Errors that a user can do something about: the command line shows their text and no traceback.

SuretyError
├── SettingsError    the environment
├── EmbeddedServerError      the embedded PostgreSQL
└── DeployError      bringing the database to a version
"""

from __future__ import annotations


class SuretyError(Exception):
    """Something is not as it must be, and the text says what."""


class SettingsError(SuretyError):
    """The environment is not as Surety needs it; the text names the variable."""


class EmbeddedServerError(SuretyError):
    """The embedded PostgreSQL could not be started."""


class DeployError(SuretyError):
    """The database could not be brought to a version; what was applied before stays, the rest is as it was."""
