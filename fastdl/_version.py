"""The version, in one place: pyproject.toml and ``fastdl.__version__`` read it here."""

__version__ = "0.1.0"
