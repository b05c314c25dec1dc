"""The family of errors slimkit raises; each is also the built-in kind a caller would expect."""

from __future__ import annotations


class SlimkitError(Exception):
    """Root of every error that slimkit raises on purpose."""


class ArgumentTypeError(SlimkitError, TypeError):
    """An argument is of the wrong type."""


class ArgumentError(SlimkitError, ValueError):
    """An argument has the right type and a value that is not allowed."""


class ConfigError(ArgumentError):
    """A configuration (dataclass, YAML, recipe) says something that is not allowed."""


class PatternError(ArgumentError):
    """A name pattern matches nothing, or is not safe to run."""


class GraphError(ArgumentError):
    """A model could not be traced into the operator graph."""


class PlanError(ArgumentError):
    """A pruning plan does not belong to the model it is applied to."""


class UnsupportedError(ArgumentError):
    """The model, layer or device lacks what the request needs."""


class ProcessLostError(SlimkitError, RuntimeError):
    """Another of the processes that share a job has ended, or cannot be reached."""


class MissingFrameworkError(SlimkitError, ImportError):
    """PyTorch, MindSpore or an optional library is not installed."""


class FileFormatError(SlimkitError, ValueError):
    """A file is damaged, or is not what its name says."""


class LinkPathError(SlimkitError, ValueError):
    """A path is a symbolic link where links are refused."""


class AbsolutePathError(SlimkitError, ValueError):
    """A path is relative where an absolute one is required."""


class ReadYamlFileError(SlimkitError, ValueError):
    """A YAML file is missing, is a link, or cannot be read."""


class ModelConfigFreezeInfoError(SlimkitError, ValueError):
    """A configuration file holds no usable ``freeze`` section."""
