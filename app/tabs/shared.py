"""What the tabs share: the status line, and handlers that answer errors with a sentence."""

from __future__ import annotations

import contextlib
import functools
import html
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from app.errors import UserError
from app.present import loading_sentence, waiting_sentence
from app.service import Update, foreseen, sentence_of

OOPS = "Something went wrong here; the model is free again. Check the settings and try once more."

# Downloads the table inside an element; cells with a comma, quote or line break are quoted.
_CSV = """() => {
    const quoted = (text) => /[",\\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const cell = (one) => quoted(one.textContent);
    const rows = [...document.querySelectorAll('#ELEMENT tr')].map((row) => [...row.cells].map(cell).join(','));
    if (!rows.length) return;
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([rows.join('\\n') + '\\n'], {type: 'text/csv'}));
    link.download = 'ELEMENT.csv';
    link.click();
    URL.revokeObjectURL(link.href);
}"""


def csv_script(element: str) -> str:
    """JavaScript that saves the table in the element of that id."""
    return _CSV.replace("ELEMENT", element)


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, scrollable where it is too wide; cells are text."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="mod-table" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def shown(figure: Any) -> Any:
    """A plot that was hidden while it was empty."""
    return gr.update(value=figure, visible=True)


def status(text: str, error: bool = False, busy: bool = False) -> str:
    """A line for people, read out when it changes; ``busy`` adds a moving bar."""
    kind = " error" if error else ""
    bar = '<progress class="mod-busy" aria-label="At work"></progress>' if busy else ""
    return f'<p class="mod-status{kind}" role="{"alert" if error else "status"}">{html.escape(text)}</p>{bar}'


def waiting(update: Update, model: str) -> str | None:
    """The status line while a request waits for a place or a model; None for other updates."""
    if update.waiting is not None:
        return status(waiting_sentence(update.waiting))
    if update.loading is not None:
        return status(loading_sentence(model, update.loading), busy=True)
    return None


def told(error: BaseException, what: str) -> str:
    """A sentence for the user, whatever happened; the log has the cause of what was not foreseen.

    Raises:
        BaseException: the error itself, where it is no failure (who left, the end of the process).
    """
    if not foreseen(error):
        raise error
    if (sentence := sentence_of(error)) is not None:
        return sentence
    logging.getLogger(__name__).error("%s failed", what, exc_info=error)
    return OOPS


@contextlib.contextmanager
def sentences(what: str) -> Iterator[None]:
    """Whatever goes wrong inside, the page or the program gets a sentence, as Gradio's own error."""
    try:
        yield
    except BaseException as error:
        raise gr.Error(told(error, what), print_exception=False) from error


def answered(failed: Callable[[str], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The same as ``guarded`` for handlers that answer once."""

    def around(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def safe(*arguments: Any) -> Any:
            try:
                return handler(*arguments)
            except BaseException as error:
                return failed(status(told(error, handler.__name__), error=True))

        return safe

    return around


def guarded(failed: Callable[[str], Any]) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """A decorator for generator handlers: whatever happens, the page gets ``failed(sentence)``."""

    def around(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(handler)
        def safe(*arguments: Any) -> Iterator[Any]:
            try:
                yield from handler(*arguments)
            except BaseException as error:
                yield failed(status(told(error, handler.__name__), error=True))

        return safe

    return around


def numbers(text: str, kind: type[Any], what: str) -> list[Any]:
    """Numbers with commas between them; UserError names what they are."""
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except (ValueError, OverflowError, AttributeError):
        raise UserError(f"{what} {str(text)[:80]!r}: give numbers with commas between them.") from None
    if not found:
        raise UserError(f"{what}: give at least one number.")
    return found
