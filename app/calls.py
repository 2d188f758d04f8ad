"""Calls of the page's and the programs' endpoints, held against what these take before Gradio sees them.

Gradio answers a call with too few or too many values, or values of a wrong type, by a traceback in the log, values and
all.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "string": ("text", (str,)), "boolean": ("true or false", (bool,)),
    "number": ("a number", (int, float)), "integer": ("a number", (int, float)),
}
_LONGEST_CHOICE = 4096  # characters; Gradio's log shows a choice that isn't one
_PATH = re.compile(
    r"/gradio_api/(?:queue/join|call/v2/(?P<keyed>[^/]+)|call/(?P<called>[^/]+)|(?:run|api)/(?P<run>[^/]+))/?"
)


class Calls:
    """What the endpoints of an app take.

    Args:
        demo: the app, whole.
        longest: characters of the longest text that is anywhere in a call. Gradio keeps what comes for each session.
    """

    def __init__(self, demo: gr.Blocks, longest: int = 1_000_000) -> None:
        self._demo, self._longest = demo, longest
        self._by_number = {number: _Takes(fn) for number, fn in demo.fns.items() if fn.fn}
        self._by_name = {str(fn.api_name): _Takes(fn) for fn in demo.fns.values() if fn.api_name}
        named = demo.get_api_info()["named_endpoints"]
        self._parameters = {path.removeprefix("/"): endpoint["parameters"] for path, endpoint in named.items()}

    def concern(self, path: str) -> bool:
        """Whether a request to that path is a call."""
        return _PATH.fullmatch(path) is not None

    def complaint(self, path: str, body: bytes) -> str | None:
        """What is wrong with a call, if it names an endpoint and has values at all; the rest is Gradio's to refuse."""
        found = _PATH.fullmatch(path)
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return "The body has to be JSON."
        if found is None or not isinstance(call, dict):
            return None
        if (odd := _unwritable(call)) is not None:
            return odd
        if (length := _longest_text(call)) > self._longest:
            return f"A text of {length:,} characters came; at most {self._longest:,} are read. Shorten it."
        if found["keyed"]:
            return self._keyed(found["keyed"], call)
        if not isinstance(call.get("data"), list):
            return None
        number = None if found["called"] else call.get("fn_index")  # Gradio prefers it to a name
        if number is not None:
            if type(number) is not int:
                return "fn_index has to be a whole number."
            if (takes := self._by_number.get(number)) is not None:
                return takes.complaint(f"number {number}", call["data"])
            if _holds_file(call["data"]):
                return "A file came, and none is taken."
            made = self._made(number, call.get("session_hash"))
            return None if made else f"There is no endpoint number {str(number)[:20]}."
        name = found["called"] or found["run"]
        if name is None or name == "predict":
            return "Which endpoint? fn_index has to be its number."
        takes = self._by_name.get(name)
        return takes.complaint(name, call["data"]) if takes else f"There is no endpoint {name[:80]}."

    def _made(self, number: int, session: Any) -> bool:
        """Whether a number is a session's own: of controls that were made as it went, none of which takes files."""
        known = self._demo.state_holder.session_data.get(session) if isinstance(session, str) else None
        own = {} if known is None else known.blocks_config.fns
        return number in own and own[number].fn is not None

    def _keyed(self, name: str, call: dict[str, Any]) -> str | None:
        """The same for values that come by name."""
        if name not in self._parameters:
            return f"There is no endpoint {name[:80]}."
        parameters = [parameter["parameter_name"] for parameter in self._parameters[name]]
        if set(call) - {*parameters, "oauth_token"}:
            return f"Endpoint {name} takes {', '.join(parameters)}, and something else came."
        for parameter in self._parameters[name]:
            if parameter["parameter_name"] not in call and not parameter["parameter_has_default"]:
                return f"Endpoint {name} needs {parameter['parameter_name']}."
        return self._by_name[name].complaint(name, [call.get(parameter) for parameter in parameters])


class _Takes:
    """What one endpoint takes: a value for each of its inputs, or for all but those that the server keeps."""

    def __init__(self, fn: Any) -> None:
        self._all = [_schema(block) for block in fn.inputs]
        self._told = [
            schema for schema, block in zip(self._all, fn.inputs, strict=True) if not block.skip_api
        ]

    def complaint(self, name: str, values: list[Any]) -> str | None:
        """What is wrong with values for the endpoint of that name; None if they may pass."""
        by_count = {len(schemas): schemas for schemas in (self._all, self._told)}
        if len(values) not in by_count:
            return f"Endpoint {name} takes {min(by_count)} values, and {len(values)} came."
        for at, (value, schema) in enumerate(zip(values, by_count[len(values)], strict=True), 1):
            if value is not None and (wanted := _unlike(value, schema)):
                return f"Endpoint {name}: value {at} has to be {wanted}."
        return None


def _schema(block: Any) -> dict[str, Any]:
    """What a component says of its values; nothing where it takes any."""
    found = {} if block.skip_api else block.api_info()
    return found if isinstance(found, dict) else {}


def _unlike(value: Any, schema: dict[str, Any]) -> str | None:
    """What a value had to be, if it is something else."""
    if "FileDataMeta" in schema.get("$defs", ()):
        return None if _uploaded(value) else "an uploaded file"
    if _holds_file(value):
        return "something else than a file"
    if "enum" in schema and isinstance(value, str) and len(value) > _LONGEST_CHOICE:
        return f"at most {_LONGEST_CHOICE:,} characters long"
    name, types = _TYPES.get(str(schema.get("type")), ("", (object,)))
    return None if isinstance(value, types) else name


def _uploaded(value: Any) -> bool:
    """Whether a value names a file that was uploaded here: Gradio would fetch it from an address, whatever its size."""
    path = value.get("path") if isinstance(value, dict) else None
    if not isinstance(path, str) or len(path) >= _LONGEST_CHOICE:
        return False
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a name too long, a null byte, a loop of links
        return "://" not in path and Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    return False


def _unwritable(value: Any) -> str | None:
    """Why a value can't be sent back, if it can't."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return "There is half a character (a lone surrogate) in it."
    except ValueError:
        return "There is a number in it that is none, or infinite."
    except RecursionError:
        return "It is nested too deeply."
    return None


def _holds_file(value: Any) -> bool:
    """Whether there is a file, as Gradio writes them, anywhere in a value."""
    tables = (one for one in _parts(value) if isinstance(one, dict))
    return any(one.get("path") is not None and isinstance(one.get("meta"), dict) for one in tables)


def _longest_text(value: Any) -> int:
    """Characters of the longest text anywhere in a value."""
    return max((len(one) for one in _parts(value) if isinstance(one, str)), default=0)


def _parts(value: Any) -> Iterator[Any]:
    """A value and all that is in it, names of fields apart."""
    left = [value]
    while left:
        yield (one := left.pop())
        if isinstance(one, dict):
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
