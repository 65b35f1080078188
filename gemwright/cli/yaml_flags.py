"""`--config FILE.yaml`: a file of options, expanded in place into the flags it stands for.

So a file and the command line are one set of options, declared, checked and explained once; what comes later wins, and
flags after the file override it. `true` is the bare flag, `false` and `null` leave the option out, a list is its
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

FLAG: Final = "--config"


def expand(arguments: Sequence[str]) -> list[str]:
    """The arguments with each `--config FILE` replaced by the file's flags.

    Raises FileNotFoundError, and ValueError for a file that is not a flat object of options.
    """
    done: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != FLAG:
            done.append(argument)
            continue
        file = value if equals else next(rest, None)
        if not file:
            raise ValueError(f"{FLAG}: got no file, allowed is a YAML file of options")
        done += _flags(Path(file).expanduser())
    return done


def _flags(path: Path) -> list[str]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path}: holds {type(options).__name__}, allowed is one object of options")
    flags: list[str] = []
    for name, value in options.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:
            flags += [f"--{name}", *_words(path, name, value)]
    return flags


def _words(path: Path, name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, bool) or not isinstance(each, str | int | float):
            raise ValueError(f"{path}: {name} is {value!r}, allowed is a text, a number, true, false, null or a list")
    return [str(each) for each in values]
