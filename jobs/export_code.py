"""The code of an exported folder: the files of `model` as they are, made to stand alone.

transformers loads such code from one flat folder, so imports become relative. What the folder does without (jaxtyping,
pydantic, the attention kernels) is replaced by files of `jobs.hub`. Which files are needed is read from their imports.
"""

import ast
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

ENTRY = "jobs.hub.modeling_svitt_ego"
OPERATOR_NAMES = "jobs.hub.operator_names"
STAND_INS = {
    "jaxtyping": "jobs.hub.shape_names",
    "pydantic": "jobs.hub.plain_settings",
    "model.attention_fused": "jobs.hub.no_kernels",
    "model.attention_triton": "jobs.hub.no_kernels",
    "model.kernel_build": "jobs.hub.no_kernels",
}
# What whoever loads the folder has installed.
ALLOWED_PACKAGES = {"torch", "transformers", "safetensors", "tokenizers", "numpy"}
_IMPORT = re.compile(r"^(\s*)from ([\w.]+) import ", re.MULTILINE)
_OPERATOR = re.compile(r'"svitt::(\w+)"')


class ExportError(Exception):
    """A model that cannot be exported, or an export that does not do what it should."""


def standalone_code(entry: str = ENTRY) -> dict[str, str]:
    """File name -> source of the module `entry` and everything that it needs.

    Raises ExportError when a file imports a package that the folder must do without, or imports in a form that
    cannot be made relative.
    """
    files: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        name = f"{_short(module)}.py"
        if name in files:
            continue
        source = _source(module)
        imported = _imports(module, source)
        is_operator = _OPERATOR.search(source) is not None
        waiting.extend(imported.values())
        waiting.extend([OPERATOR_NAMES] if is_operator else [])
        files[name] = _made_relative(module, source, imported)
    return files


def _source(module: str) -> str:
    spec = find_spec(module)
    origin = spec.origin if spec is not None else None
    assert origin is not None, f"{module} is a file of this project"
    return Path(origin).read_text(encoding="utf-8")


def _short(module: str) -> str:
    return module.rpartition(".")[2]


def _imports(module: str, source: str) -> dict[str, str]:
    """Imported module -> the one that takes its place in the folder, for all that are to lie there."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in ("model", "jobs.hub"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            own = STAND_INS.get(name, name if name.startswith(("model.", "jobs.hub.")) else None)
            if own is not None and isinstance(node, ast.ImportFrom):
                found[name] = own
            elif own is not None or name.partition(".")[0] not in ALLOWED_PACKAGES | sys.stdlib_module_names:
                raise ExportError(
                    f"{module} imports {name} in line {node.lineno}, which an exported folder has to do without; "
                    f"use one of {', '.join(sorted(ALLOWED_PACKAGES))}, or write `from {name} import ...` and give "
                    "jobs.export_code a stand-in for it"
                )
    return found


def _made_relative(module: str, source: str, imported: Mapping[str, str]) -> str:
    def relative(match: re.Match[str]) -> str:
        indent, name = match.groups()
        if name in ("model", "jobs.hub"):
            return f"{indent}from . import "
        return f"{indent}from .{_short(imported[name])} import " if name in imported else match.group()

    source = _IMPORT.sub(relative, source)
    if _OPERATOR.search(source):
        source = _OPERATOR.sub(r'operator_name("\1")', source)
        needed = f"from .{_short(OPERATOR_NAMES)} import operator_name\n\n"
        source = source.replace("import torch\n", f"import torch\n\n{needed}", 1)
    return f"# {module} of the SViTT-Ego pipeline, written here by `svitt export`: change it there.\n{source}"
