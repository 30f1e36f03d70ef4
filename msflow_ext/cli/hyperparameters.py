"""Make flags of the hyper-parameters that the recipe and the models declare and document.

Their source is read as text, because importing a model imports torch, which would delay the help.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from msflow_ext.choices import CHOICES
from msflow_ext.cli.parser import NONE, OneOf, OrNone, number, truth, whole

#: A class, the file that declares it, and files with classes that its docstring refers to.
RECIPE = ("Recipe", "training/recipe.py")
MODELS = {
    "msflow": ("MSFlow", "models/msflow.py", "models/msflow_head.py"),
    "fastflow": ("FastFlow", "models/fastflow.py"),
}
#: Arguments of a model that other flags set: ``--weights`` and the recipe's ``--seed``.
SET_ELSEWHERE = ("pretrained", "seed")

UNITS = {
    **dict.fromkeys(("false_alarms", "hold_out", "top_k", "warmup"), "SHARE"),
    **dict.fromkeys(("decay", "warmup_from", "hidden_ratio"), "FACTOR"),
    **dict.fromkeys(("image_size", "smoothing"), "PIXELS"),
    **dict.fromkeys(("epochs", "eval_every"), "EPOCHS"),
    "batch_size": "IMAGES",
    "cond_channels": "CHANNELS",
    "milestones": "SHARE",
    "out_indices": "INDEX",
    "workers": "THREADS",
}
KINDS: dict[str, tuple[Any, str]] = {
    "int": (whole, "N"),
    "float": (number, "X"),
    "bool": (truth, "{true,false}"),
    "str": (str, "NAME"),
}


@dataclass(frozen=True)
class Parameter:
    """A field of a dataclass or an argument of a constructor, with its annotation and help from the source."""

    name: str
    annotation: str
    default: Any
    text: str

    @property
    def optional(self) -> bool:
        """Return whether None is allowed."""
        return self.annotation.endswith("| None")

    def add_to(self, group: Any, note: str = "", default: Any = None) -> None:
        """Add the flag. Its option is None unless given, so that the preset decides; ``default`` is only shown."""
        words = CHOICES.get(self.name)
        if words:
            kind, unit = OneOf(words), None
        else:
            kind, unit = KINDS[re.findall(r"int|float|bool|str", self.annotation)[0]]
            kind = OrNone(kind) if self.optional and kind in (whole, number) else kind
        several = {"Sequence": "+", "tuple": "*"}  # a tuple may be empty
        text = " ".join(filter(None, (self.text, note, _shown(default))))
        group.add_argument(
            f"--{self.name.replace('_', '-')}",
            type=kind,
            choices=words,
            metavar=unit and UNITS.get(self.name, unit),
            nargs=next((several[word] for word in several if word in self.annotation), None),
            help=text.replace("%", "%%"),
        )


@cache
def parameters(owner: str, *sources: str) -> Mapping[str, Parameter]:
    """Return the arguments of a class of the package, in their order."""
    texts = [(files("msflow_ext") / file).read_text(encoding="utf-8") for file in sources]
    nodes = [node for text in texts for node in ast.parse(text).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    documented = {name: _documented(ast.get_docstring(c) or "") for name, c in classes.items()}
    return {
        name: Parameter(name, annotation, default, _phrase(documented, owner, name))
        for name, annotation, default in _declared(classes[owner])
    }


def model_parameters(model: str) -> Mapping[str, Parameter]:
    """Return the arguments of a model that have their own flag."""
    found = parameters(*MODELS[model])
    return {name: each for name, each in found.items() if name not in SET_ELSEWHERE}


def all_model_parameters() -> Mapping[str, Parameter]:
    """Return the arguments of all models; one that several models have is that of the first."""
    found: dict[str, Parameter] = {}
    for model in MODELS:
        found = {**model_parameters(model), **found}
    return found


def given(options: Any, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """Return the parameters that the options give, with None for the word none."""
    found = {}
    for name, each in parameters.items():
        value = getattr(options, name)
        if value is not None:
            found[name] = None if each.optional and value == NONE else value
    return found


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, str, Any]]:
    """Yield name, annotation and default of each field, or of each argument of ``__init__`` with a default."""
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and each.value:
            yield (
                ast.unparse(each.target),
                ast.unparse(each.annotation),
                ast.literal_eval(each.value),
            )
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            positional = each.args.args[len(each.args.args) - len(each.args.defaults) :]
            names = [*positional, *each.args.kwonlyargs]
            for arg, value in zip(
                names, [*each.args.defaults, *each.args.kw_defaults], strict=True
            ):
                if arg.annotation and value:
                    yield arg.arg, ast.unparse(arg.annotation), ast.literal_eval(value)


def _documented(docstring: str) -> dict[str, str]:
    """Return the entries of the section Args or Attributes of a docstring, by name."""
    found = {}
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE) if section else []
    for entry in filter(str.strip, entries):
        names, _, text = entry.partition(":")
        found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


def _phrase(texts: Mapping[str, Mapping[str, str]], owner: str, name: str) -> str:
    """Return the text of an argument as a sentence without markup.

    ``see :class:`NAME``` is replaced by the text of the same argument there.
    """
    text = texts[owner].get(name, "")
    if refers := re.match(r"see :class:`(\w+)`[.;]?", text):
        rest = text[refers.end() :].strip()
        text = (
            texts[refers[1]][name] if not rest else f"{texts[refers[1]][name].rstrip('.')}; {rest}"
        )
    text = re.sub(r"[,;:]? \(?see :\w+:`[^`]*`\)?| \(:\w+:`[^`]*`\)", "", text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`|``\"?(.*?)\"?``", lambda m: m[1] or m[2], text)
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _shown(default: Any) -> str:
    if default is None or default == ():
        return ""
    values = default if isinstance(default, tuple) else [default]
    return (
        f"(default: {' '.join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)})"
    )
