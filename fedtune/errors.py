"""The exceptions that fedtune raises on purpose, as a tree.

    FedtuneError                 everything below; the command line prints it as one paragraph
    |-- ConfigError              a setting is unknown, misspelt, or has a value that is not allowed
    |-- DataError                a data set, file, column, label or text is missing or unusable
    |   `-- PartitionError       the corpus cannot be cut into the shards that were asked for
    |-- ModelError               an encoder or adapter is missing, unsupported or does not fit
    |-- PrivacyError             a privacy setting has no meaning or promises what cannot be kept
    |   |-- CalibrationError     no noise multiplier meets the target
    |   |-- PreflightError       model, optimizer, sampler and accountant disagree; nothing was trained
    |   |-- BudgetExhausted      a release would go over a node's own budget; nothing was released
    |   |-- SeparationError      a node is asked again sooner than its plan allows; nothing was released
    |   |-- LedgerError          the ledger is missing, unreadable, full or was tampered with
    |   `-- AuditError           an audit shows more leakage than is promised: the promise is not kept
    |-- FederationError          a run cannot go on (for instance: no node sent a usable update)
    |   |-- UpdateRejected       one node's update was unusable; it costs that update, not the round
    |   `-- AggregationAborted   a sum could not be made or used; the round is charged, discarded
    |-- CheckpointError          a run folder or checkpoint cannot be resumed
    |-- RecordError              a record.json is missing, unfinished or of another schema
    `-- ResourceError            no disk space, no memory, no permission, no network, no such device

Every message is one paragraph: what happened, to whom, the numbers, and the way out.

A message is for the person at the keyboard, who owns the data that is there. Others (a server, whoever
reads a record) are shown it only if it is made of public values alone, which `public` says: settings, plans,
names, counts of messages. That is so for the kinds of errors that speak of nothing else, and never for those
that may speak of data, of what its owner has spent, or of the owner's machine
(`fedtune.privacy.publication.error_in_public`).
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AggregationAborted",
    "AuditError",
    "BudgetExhausted",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FederationError",
    "FedtuneError",
    "LedgerError",
    "ModelError",
    "PartitionError",
    "PreflightError",
    "PrivacyError",
    "RecordError",
    "ResourceError",
    "SeparationError",
    "UpdateRejected",
]


class FedtuneError(Exception):
    """Base of all errors that fedtune raises on purpose; its text is fit to be shown to a person.

    Args:
        message: one paragraph.
        public: whether it is made of public values alone; None: what is so for all errors of this kind.
        setting: the setting, argument or field of a plan that it is about, for a program that asks; None: it
            is about several, or none.
    """

    of_public_values: ClassVar[bool] = False  # the safe side: a kind that says nothing is the owner's
    in_public: ClassVar[str] = "it cannot go on"  # said in the place of a text that is the owner's

    def __init__(self, message: str = "", *, public: bool | None = None, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting
        self.public = self.of_public_values if public is None else public


class ConfigError(FedtuneError):
    """A setting is unknown, misspelt, or has a value that is not allowed."""

    of_public_values = True


class DataError(FedtuneError):
    """A data set, file, column, label or text is missing or unusable."""

    in_public = "its data is missing or unusable"


class PartitionError(DataError):
    """The corpus cannot be cut into the shards that were asked for."""


class ModelError(FedtuneError):
    """An encoder or adapter is missing, unsupported or does not fit the data."""

    in_public = "an encoder or adapter is missing, unsupported or does not fit"


class PrivacyError(FedtuneError):
    """A privacy setting has no meaning, or promises what cannot be kept."""

    of_public_values = True


class CalibrationError(PrivacyError):
    """No noise multiplier meets the target epsilon."""


class PreflightError(PrivacyError):
    """Model, optimizer, sampler and accountant disagree; nothing was trained."""


class BudgetExhausted(PrivacyError):
    """A release would go over a node's own budget, or over the plan it agreed to; nothing was released.

    What an owner allows and has spent is the owner's: such a text is not public.
    """

    of_public_values = False
    in_public = "its owner's budget does not allow it"


class SeparationError(PrivacyError):
    """A node is asked for a round sooner after its last than its plan allows; nothing was released."""


class LedgerError(PrivacyError):
    """A privacy ledger is missing, unreadable, full, or was tampered with."""

    of_public_values = False
    in_public = "its privacy ledger cannot be used"


class AuditError(PrivacyError):
    """An audit shows more leakage than is promised: code, plan or claim is wrong."""


class FederationError(FedtuneError):
    """A federation cannot go on."""

    of_public_values = True


class UpdateRejected(FederationError):
    """One node's update was unusable; it costs that update and not the round."""


class AggregationAborted(FederationError):
    """A round's sum may not be used or could not be made; the round is charged and its result discarded."""


class CheckpointError(FedtuneError):
    """A run folder or checkpoint cannot be resumed."""


class RecordError(FedtuneError):
    """A record.json is missing, unfinished or of another schema."""


class ResourceError(FedtuneError):
    """The machine lacks something: disk space, memory, permission, network, or a device."""

    in_public = "its machine lacks something (disk space, memory, permission, network or a device)"
