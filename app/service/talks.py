"""Chats on behalf of a page: a message gets its place, its models and its conversation, then both answers."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Iterator
from typing import Any

from app.service.answers import begin, in_turn, told
from app.service.conversations import Conversation, Conversations
from app.service.desk import Desk
from app.service.dials import Dial, Dials
from app.service.jobs import in_thread, once_ended
from app.service.library import Library
from app.service.loaded import Loaded
from app.service.requests import Limits, Request
from app.service.runs import Update, loading
from app.talk import ChatTape

_PATIENCE = 5.0  # seconds that a stopped answer may take to end


class Talks:
    """Conversations of all sessions.

    Args:
        library: where models come from.
        desk: where places are given.
        dials: where p is moved, under ``SESSION/chat``.
        store: the conversations.
    """

    def __init__(self, library: Library, desk: Desk, dials: Dials, store: Conversations, limits: Limits) -> None:
        self.library, self.desk, self.dials, self.store, self.limits = library, desk, dials, store, limits

    def chat(
        self, session: str, models: tuple[str, str], p: float, request: Request, blind: bool = False,
        turns: int | None = None, user: str = "",
    ) -> Iterator[Update]:
        """Both models answer ``request.prompt``: the left one at p = 0, the right one at p, or the other way round
        if ``blind`` says so by lot. ``turns``: first take back all turns but so many; ``user``: whose request it is, if
        not the session's.

        Raises:
            UserError: an empty message, a model that can't be loaded, a full context or queue.
        """
        with self.desk.request("chat"), contextlib.ExitStack() as kept:
            message = self.limits.check_prompt(request.prompt)
            dial = Dial(p)
            yield from loading(self.library, *models)
            dense, routed = (kept.enter_context(self.library.lend(name)) for name in models)
            conversation, swapped = self._begun(session, (dense, routed), blind)
            sides, dials = (dense, routed), (Dial(0.0), dial)
            if swapped:
                sides, dials = (routed, dense), (dial, Dial(0.0))
            kept.enter_context(conversation.alone(_PATIENCE))
            kept.enter_context(self.dials.hold(f"{session}/chat", dial))
            need = conversation.need(sides, message, min(request.max_new_tokens, self.limits.new_tokens), turns)
            yield from kept.enter_context(self.desk.place(user or session, need, conversation.allocated))
            kept.enter_context(conversation.counted())
            if turns is not None:
                conversation.cut(turns)
            answers = begin(conversation, sides, message, dials, request, self.limits)
            box = in_thread(functools.partial(in_turn, answers))
            kept.push(once_ended(box, kept.pop_all()))  # the caches are in use until then
            tapes = told(conversation, message, answers, box, self.limits.frame)
            for each in answers:
                kept.callback(lambda one=each: self.desk.metrics.routed(*one.counts()))
            for tape in kept.enter_context(contextlib.closing(tapes)):
                yield Update(tape=tape)

    def tape(self, session: str) -> str:
        """The session's conversation as it stands, once an answer under way has come to its end."""
        conversation = self.store.of(session)
        if conversation is None:
            return ""
        with conversation.alone(_PATIENCE):
            return conversation.tape.text

    def turns(self, session: str) -> list[str]:
        """The session's messages so far."""
        conversation = self.store.of(session)
        return [] if conversation is None else [turn.message for turn in conversation.turns]

    def record(self, session: str) -> list[dict[str, Any]]:
        """The session's turns for a program: message, answers, figures."""
        conversation = self.store.of(session)
        return [] if conversation is None else [
            {"message": turn.message, "answers": list(turn.answers),
             "figures": [None if one is None else one.to_dict() for one in turn.figures]}
            for turn in conversation.turns
        ]

    def cut(self, session: str, turns: int) -> str:
        """Take back all turns of a conversation but so many; its tape."""
        conversation = self.store.of(session)
        if conversation is not None:
            with conversation.alone(_PATIENCE):
                conversation.cut(max(0, turns))
        return self.tape(session)

    def _begun(self, session: str, models: tuple[Loaded, Loaded], blind: bool) -> tuple[Conversation, bool]:
        """The session's conversation with these models, begun anew if they or the mode changed; whether its sides are
        swapped."""
        names = (f"{models[0].name}, every layer", f"{models[1].name}, routed at p")
        found = self.store.of(session)
        if found is None or found.closed or set(found.names) != set(names) or found.tape.blind != blind:
            shown = names if not (blind and secrets.randbelow(2)) else names[::-1]
            found = Conversation(shown, ChatTape(shown, blind))
        self.store.put(session, found)
        return found, found.names != names
