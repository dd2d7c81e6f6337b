"""Where code comes from: the user, an installed package, or what is told by its version alone.

In: a function, class, module or other object. Out: whose it is. Code of Python, PyTorch and NumPy is told by its
version. Installed packages are large, and a program reaches little of them: their functions are
followed like the user's, their classes only as far as some code names their members.
"""

import os
import sys
import sysconfig
import types
from functools import cache
from pathlib import Path
from typing import Any, Final

_VERSIONED: Final = ("torch", "numpy")
_PACKAGES: Final = ("site-packages", "dist-packages")


def package_of(value: Any) -> str:
    """Return the dotted name of the module that `value` is from."""
    name = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    if isinstance(value, types.ModuleType):
        name = value.__name__
    if isinstance(value, types.BuiltinFunctionType) and not isinstance(name, str):
        name = "builtins"
    return name if isinstance(name, str) else ""


def is_trusted(value: Any) -> bool:
    """Say whether `value` is code that a version tells."""
    if isinstance(value, types.BuiltinFunctionType | types.BuiltinMethodType):
        return True
    if isinstance(value, type) and value.__module__ == "builtins":
        return True
    code = isinstance(value, types.ModuleType | types.FunctionType | type)
    return code and _is_versioned(_root(value))


def lasting_text(value: Any) -> str:
    """Return the text of an object of Python, PyTorch or NumPy that cannot change, or ""."""
    if not _is_versioned(_root(value)) or hasattr(value, "__dict__"):
        return ""
    try:
        hash(value)
    except TypeError:  # it may change
        return ""
    text = repr(value)
    return "" if " at 0x" in text else text


def is_installed(value: Any) -> bool:
    """Say whether the class or function `value` is from an installed package."""
    return _folder_kind(_root(value)) == "package"


def name_of(value: Any) -> str:
    """Return the name of a function or class."""
    return str(getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value)))


def version_of(package: str) -> str:
    """Return what tells the code of a package: its version, else the state of its file."""
    root = sys.modules.get(package.partition(".")[0])
    version = getattr(root, "__version__", None)
    if version is not None or root is None or _folder_kind(root.__name__) != "package":
        return str(version or sys.version_info[:3])
    file = getattr(sys.modules.get(package, root), "__file__", None)
    try:
        status = os.stat(str(file))
    except OSError:
        return str(sys.version_info[:3])
    return f"{status.st_mtime_ns} {status.st_size}"


def _root(value: Any) -> str:
    return package_of(value).partition(".")[0]


@cache
def _is_versioned(root: str) -> bool:
    return root.lstrip("_") in _VERSIONED or _folder_kind(root) == "python"


@cache
def _folder_kind(root: str) -> str:
    """Return whose the module `root` is: "python", "package" or "user"."""
    module = sys.modules.get(root)
    if module is None:
        return "user"
    if root in sys.builtin_module_names:
        return "python"
    file = getattr(module, "__file__", None)
    folders = Path(file).parts if isinstance(file, str) else ()
    if any(name in folders for name in _PACKAGES):
        return "package"
    if root not in sys.stdlib_module_names:
        return "user"
    library = Path(sysconfig.get_path("stdlib"))
    frozen = file is None
    return "python" if frozen or Path(str(file)).is_relative_to(library) else "user"
