"""The version, in a file of its own so that an uninstalled checkout knows it too."""

__version__ = "0.1.0"
