"""The version, read by setup.py and by the package: nowhere else is it written."""

__version__ = "0.1.0"
