"""LangChain on a model with a bounded cache, through `indexmem serve`:

    indexmem serve -m model.gguf --kv-budget 4096 --port 8080
    python langchain_chat.py --url http://localhost:8080

Needs langchain-openai (pip install langchain-openai). The server speaks OpenAI's interface, so nothing here knows of it but the
address: a chain that streams, a conversation of several turns, and an answer that has the form of a class.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city. Small models write on and on where nothing ends them: so lengths are part of the form."""

    name: str = Field(max_length=40)
    country: str = Field(max_length=40)
    is_capital: bool


def connect(url: str, max_tokens: int = 128) -> ChatOpenAI:
    """The model that a server has. It needs no key, but the client insists on one."""
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="local", temperature=0, max_tokens=max_tokens)


def summary(model: ChatOpenAI, text: str) -> Iterator[str]:
    """A chain: a prompt, the model and its text, in pieces as they come."""
    prompt = ChatPromptTemplate.from_messages([("system", "You summarise texts in one sentence."), ("user", "{text}")])
    return (prompt | model | StrOutputParser()).stream({"text": text})


def talk(model: ChatOpenAI, questions: list[str]) -> list[BaseMessage]:
    """A conversation. Each request has all of it, and the server reads only what is new: however long it gets, a turn costs
    itself, and the cache stays as large as it is.
    """
    messages: list[BaseMessage] = [SystemMessage("You are brief.")]
    for question in questions:
        messages.append(HumanMessage(question))
        answer = model.invoke(messages)
        messages.append(AIMessage(answer.content))
    return messages


def city(model: ChatOpenAI, question: str) -> City:
    """The server lets the model write nothing but JSON of this form."""
    return model.with_structured_output(City, method="json_schema").invoke(question)


def main() -> None:
    parser = argparse.ArgumentParser(description="LangChain through indexmem serve.")
    parser.add_argument("--url", default="http://localhost:8080", help="where the server listens (default: %(default)s)")
    model = connect(parser.parse_args().url)
    for piece in summary(model, "The storm has passed and the harbour is open again. The ferry leaves at seven in the morning."):
        print(piece, end="", flush=True)
    print()
    for message in talk(model, ["Name a river in Africa.", "Which countries does it flow through?"]):
        print(f"{message.type}: {message.content}")
    print(city(model, "Tell me about Lisbon."))


if __name__ == "__main__":
    main()
