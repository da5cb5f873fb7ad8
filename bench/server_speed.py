"""Tokens per second through the server against transformers' generate, side by side on this machine.

    python bench/server_speed.py [--tokens 200] [--rounds 3] [--json bench/results/server_speed.json]

Starts the server with the shipped configuration, then alternates: transformers `generate` (DynamicCache, greedy), one
stream through the server, eight streams at once. End-of-text is biased away, so that every answer has the same length.
The server's model and transformers' model each run on one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import deliver, run_facts  # noqa: E402

PROMPT = "Tell me about Norway and then about its neighbours, their rivers and their cities."


def start_server() -> tuple[subprocess.Popen[str], str, float]:
    """The server on a free port: process, base URL, and the time at which it said that it listens."""
    command = [sys.executable, "-m", "server", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found:
            ready = time.monotonic()
            threading.Thread(target=process.stdout.read, daemon=True).start()  # keep the pipe empty
            return process, f"http://127.0.0.1:{found.group(1)}/v1", ready
    raise SystemExit("the server ended before it listened")


def one_stream(url: str, tokens: int, end: int) -> tuple[float, float, int]:
    """(seconds to the first token, seconds in all, tokens) of one streamed answer."""
    from openai import OpenAI

    began = time.monotonic()
    first, count = 0.0, 0
    stream = OpenAI(base_url=url, api_key="none").chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        logit_bias={str(end): -100},
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.monotonic() - began
        if chunk.usage:
            count = chunk.usage.completion_tokens
    return first, time.monotonic() - began, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    import openai  # noqa: F401 (its import takes a second, which is not the server's)

    process, url, ready = start_server()
    try:
        from openai import OpenAI

        client = OpenAI(base_url=url, api_key="none")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer, first = "", 0.0
        for chunk in client.chat.completions.create(model="demo", messages=question, stream=True):  # type: ignore[call-overload]
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.monotonic() - ready
                answer += chunk.choices[0].delta.content
        result = measure(url, options.tokens, options.rounds)
    finally:
        process.terminate()
        process.wait(30)
    import torch
    import transformers

    result |= {
        "answer": answer,
        "seconds_from_ready_line_to_first_token": round(first, 3),
        **run_facts(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": None,
    }
    deliver(result, options.json)


def measure(url: str, tokens: int, rounds: int) -> dict[str, object]:
    """Alternate the three ways of generating; medians over rounds."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectral.resources import model_path

    torch.set_num_threads(1)
    folder = model_path("demo")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end = int(tokenizer.eos_token_id)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    plain, single, eight, firsts = [], [], [], []
    for _ in range(rounds):
        began = time.monotonic()
        model.generate(**prompt, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        plain.append(tokens / (time.monotonic() - began))
        first, seconds, count = one_stream(url, tokens, end)
        single.append(count / seconds)
        firsts.append(first)
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            counts = [r[2] for r in pool.map(lambda _: one_stream(url, tokens, end), range(8))]
        eight.append(sum(counts) / (time.monotonic() - began))
    figures = {
        name: round(statistics.median(values), 1)
        for name, values in (
            ("generate_tokens_per_second", plain),
            ("one_stream_tokens_per_second", single),
            ("eight_streams_tokens_per_second", eight),
        )
    }
    return {
        **figures,
        "one_stream_against_generate": round(statistics.median(s / p for s, p in zip(single, plain, strict=True)), 3),
        "eight_streams_against_one": round(statistics.median(e / s for e, s in zip(eight, single, strict=True)), 3),
        "median_seconds_to_first_token": round(statistics.median(firsts), 4),
        "rounds": rounds,
        "tokens": tokens,
    }


if __name__ == "__main__":
    main()
