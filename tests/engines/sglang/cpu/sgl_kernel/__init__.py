"""In place of SGLang's kernels, of which there is no build for processors on package indexes.

Every name can be imported, from here and from any module below, and raises when it is called: without AMX, SGLang
takes torch's own operations for plain language models and calls none. `scalar_type` is absent, for which SGLang has an
answer of its own.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.4.10"


def _kernel(name: str) -> Any:
    def call(*_: object, **__: object) -> None:
        raise RuntimeError(f"sgl_kernel.{name} has no build for this processor")

    return call


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _kernel(name)


class _Modules(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __name__ or name in ("", "scalar_type"):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = __getattr__  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Modules())
