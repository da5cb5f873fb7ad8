"""LangChain through both interfaces: ChatOpenAI and ChatOllama.

    pip install langchain-openai langchain-ollama
    python examples/langchain_client.py

SPECTRAL_URL names another server than http://127.0.0.1:8000, SPECTRAL_API_KEY a key where it asks for one.
"""

from __future__ import annotations

import os
from typing import Literal

from langchain_ollama import ChatOllama
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    """The capital of a country."""

    city: Literal["Paris", "Oslo", "Rome"]


url = os.environ.get("SPECTRAL_URL", "http://127.0.0.1:8000")
key = os.environ.get("SPECTRAL_API_KEY", "none")
name = os.environ.get("SPECTRAL_MODEL", "demo-7m")
question = "What is the capital of France?"
clients = {
    "ChatOpenAI": ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=name, temperature=0, max_tokens=48),
    "ChatOllama": ChatOllama(
        base_url=url,
        model=name,
        temperature=0,
        num_predict=48,
        client_kwargs={"headers": {"Authorization": f"Bearer {key}"}},
    ),
}
for title, model in clients.items():
    print(f"{title}: {model.invoke([('system', 'You are helpful.'), ('user', question)]).text}")
    print(f"{title}, streamed: {''.join(piece.text for piece in model.stream(question))}")
    print(f"{title}, in form: {model.with_structured_output(Answer, method='json_schema').invoke(question)}")
    print(f"{title}, three at once: {len(model.batch([question] * 3))} answers")
