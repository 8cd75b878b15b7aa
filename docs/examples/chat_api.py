"""An endpoint that streams answers to several users of one model: python chat_api.py -m model.gguf --port 8000

Needs fastapi and uvicorn (pip install fastapi uvicorn). For OpenAI's interface there is `indexmem serve`; this is for programs
that have an interface of their own. To try it:

    curl -N localhost:8000/chat -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Hello"}]}'

Each line of the answer is an object: {"text": "..."} for a piece, {"error": "..."} if something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator

import anyio
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from indexmem_edge import Cancelled, IndexMemError, Llama, demo_model


class Message(BaseModel):
    role: str
    content: str


class Question(BaseModel):
    """The whole conversation, as the client has it: the server remembers no user."""

    messages: list[Message]
    max_tokens: int = 256
    temperature: float = 0.2


class Answers:
    """Answers one question after the other.

    A `Llama` lets one thread compute at a time, so nothing breaks without a lock. But a stream lets others in between two of its
    pieces, and is at its end when one of them has begun another conversation (GenerationSuperseded). So an answer is a turn, and
    the next question waits for it, without holding a thread. Users do not pay for each other: a prompt goes on from the
    checkpoint that has most of it (kv_checkpoints: how many bytes those may take), so each reads only what is new.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._turn = asyncio.Lock()

    async def stream(self, question: Question) -> AsyncIterator[str]:
        """Lines of JSON. When the client goes away, the server cancels this, and this cancels the model: while it writes, while
        it still reads a long prompt, and while it waits.
        """
        async with self._turn:
            lines: asyncio.Queue[str | None] = asyncio.Queue()
            work = asyncio.ensure_future(asyncio.to_thread(self._answer, question, asyncio.get_running_loop(), lines))
            try:
                while (line := await lines.get()) is not None:
                    yield line
            finally:
                with anyio.CancelScope(shield=True):  # the next turn begins when the thread is done with this one
                    while not work.done():
                        self._llm.cancel()  # once more, should it have had nothing to cancel yet
                        await asyncio.sleep(0.01)

    def _answer(self, question: Question, loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[str | None]) -> None:
        """In a thread of its own."""

        def put(line: str | None) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        messages = [message.model_dump() for message in question.messages]
        try:
            for chunk in self._llm.create_chat_completion(
                messages, stream=True, max_tokens=question.max_tokens, temperature=question.temperature
            ):
                if text := chunk["choices"][0]["delta"].get("content"):
                    put(json.dumps({"text": text}) + "\n")
        except Cancelled:
            pass  # nobody listens any more; the cache is what it was before the question
        except IndexMemError as error:
            put(json.dumps({"error": str(error)}) + "\n")
        finally:
            put(None)


def create_app(llm: Llama) -> FastAPI:
    """The application, with the model that it is to use."""
    app, answers = FastAPI(title="Chat"), Answers(llm)

    @app.post("/chat")
    async def chat(question: Question) -> StreamingResponse:
        return StreamingResponse(answers.stream(question), media_type="application/x-ndjson")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="An endpoint that streams answers.")
    parser.add_argument("-m", "--model", help="GGUF file (default: the demo model)")
    parser.add_argument("--kv-budget", type=int, default=1024, help="entries that the cache keeps (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with Llama(args.model or demo_model(), kv_budget=args.kv_budget, verbose=False) as llm:
        uvicorn.run(create_app(llm), port=args.port)


if __name__ == "__main__":
    main()
