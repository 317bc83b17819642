"""Weights and packages that may be missing, and what to do then."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class TeacherAccessError(RuntimeError):
    """The weights of a teacher cannot be had; the message says how to get them."""


def need_package(module: str, package: str, what: str) -> Any:
    """Import a package of the extra, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        msg = f'{what} needs the package {package}: pip install "histoniche[seg]", or pip install {package}.'
        raise ImportError(msg) from error


class StudentAccessError(RuntimeError):
    """The ImageNet weights of a student's encoder cannot be had; the message says how to get them."""
