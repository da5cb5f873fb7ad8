"""A worker without a model. The text of the prompt says how it behaves:

"hello"      answers "one two three " word by word and stops
"forever"    answers "tick " until it is cancelled; the cancellation is counted in Stats.finished["cancelled"]
"long"       is rejected with context_length_exceeded
"full"       is rejected with queue_full
"fail"       fails after its first word
"mute"       is accepted and says nothing until it is cancelled
"line"       is accepted and waits as long as somebody gets ticks, else it is answered as "hello"
"flood"      answers with large pieces, as fast as the gateway takes them, until it is cancelled
"drop"       is accepted and then given up by the worker itself
"garbage"    the worker writes bytes that are no message
"call"       calls the function weather, in the form of Hermes, after a word of text
"grammar"    answers with the grammar that it was given, as JSON {"kind", "text"}
"echo"       answers with everything that it was given, as JSON
"think"      thinks in the form of Qwen3 and then answers; with a tool it calls it
"think on"   the same, where the prompt has the mark that begins the thoughts
The model path "broken" makes the load fail; "crashing" ends the process while loading; "stuck" never becomes ready;
"stubborn" becomes ready and then ignores everything, also SIGTERM and the end of the socket. "saving" takes two seconds
to save its sessions when it ends, and leaves a file "began" and then a file "saved" where they would be.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from server.worker import messages as m
from server.worker.channel import SocketChannel
from server.worker.session_messages import ResumeSession, SaveSession

PRINT = os.environ.get("FAKE_FINGERPRINT", "")
TIMES = (0.25, 0.5, 0.125)
"""Seconds in the queue, of prefill and of decoding, as told."""
FIGURES = {"setting": "8x", "rank": 24.0, "bits_per_element": 1.9, "kl_mean": 0.012}


def main() -> None:
    """Speak the protocol until the gateway closes the socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--ahead", action="store_true")
    sock = socket.socket(fileno=parser.parse_args().fd)
    channel = SocketChannel(sock)
    load = channel.receive()
    assert isinstance(load, m.Load)
    print(f"fake worker of {load.name}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", flush=True)
    if load.path == "crashing":
        sys.exit(3)
    if load.path == "broken":
        channel.send(m.LoadFailed("no such model: broken; check models.path"))
        return
    channel.send(m.Loading("weights", 0.5))
    if load.path == "stuck":
        while channel.receive() is not None:
            pass
        return
    if load.path == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send(ready(load.profile, load.setting))
    while load.path == "stubborn":
        message = channel.receive()
        print(f"ignored {type(message).__name__}", flush=True)
        if message is None:
            signal.pause()
    Worker(channel, sock).serve()
    if load.path == "saving" and load.sessions is not None:
        folder = Path(load.sessions.folder)
        (folder / "began").touch()
        until = time.monotonic() + 2.0
        while (left := until - time.monotonic()) > 0:
            if channel.poll(left) and channel.receive() is None:
                return  # there is no more time
        (folder / "saved").touch()


def ready(profile: str | None, setting: str) -> m.Ready:
    """What this worker tells about a profile (its file's name is its id) at a setting."""
    figures = {**FIGURES, "setting": FIGURES["setting"] if setting == "auto" else setting}
    ladder = [m.LadderFigure("4x", 4.0, 0.001, 4.0), m.LadderFigure("8x", 1.9, 0.012, 8.0)]
    name = "" if profile is None else os.path.basename(profile).partition(".")[0]
    sizes = {"bytes_per_token": 100.0, "bytes_per_token_exact": 800.0, "weights_bytes": 1000, "parameters": 7_000_000}
    figures["tool_format"] = "hermes"
    figures["thought_format"] = os.environ.get("FAKE_THOUGHTS", "")
    return m.Ready(context_length=128, profile_id=name, fingerprint=PRINT, ladder=ladder, **sizes, **figures)


class Worker:
    """State: requests that tick, cancellations seen."""

    def __init__(self, channel: SocketChannel, sock: socket.socket) -> None:
        self.channel, self.sock = channel, sock
        self.ticking: list[str] = []
        self.flooding: list[str] = []
        self.mute: list[str] = []
        self.line: list[str] = []
        self.cancelled = 0

    def serve(self) -> None:
        """Answer until the end of the stream."""
        while True:
            if self.channel.poll(0.0 if self.flooding else 0.01 if self.ticking else 60.0):
                message = self.channel.receive()
                if message is None or isinstance(message, m.Shutdown):
                    return
                self.take(message)
            for request_id in self.ticking:
                self.channel.send(m.Delta(request_id, 0, "tick ", [7]))
            for request_id in self.flooding:
                self.channel.send(m.Delta(request_id, 0, "x" * 100_000, [7]))

    def take(self, message: m.ToWorker) -> None:
        """One message of the gateway."""
        if isinstance(message, m.Ping):
            self.channel.send(m.Pong(message.seq))
        elif isinstance(message, m.Cancel):
            self.cancelled += 1
            self.ticking = [x for x in self.ticking if x != message.request_id]
            self.mute = [x for x in self.mute if x != message.request_id]
            self.line = [x for x in self.line if x != message.request_id]
            self.flooding = [x for x in self.flooding if x != message.request_id]
            self.report()
        elif isinstance(message, m.SetProfile):
            if message.setting == "impossible":
                self.channel.send(m.Done(message.command_id, "this setting does not work"))
            else:
                self.channel.send(ready(message.profile, message.setting), m.Done(message.command_id))
        elif isinstance(message, m.Tokenize):
            self.tokenize(message)
        elif isinstance(message, m.SetSetting):
            self.channel.send(ready(None, message.setting), m.Footprint(freed_bytes=1000), m.Done(message.command_id))
        elif isinstance(message, (m.SetLease, m.Sleep, m.Wake)):
            self.channel.send(m.Footprint(context_length=128), m.Done(message.command_id))
        elif isinstance(message, (SaveSession, ResumeSession)):
            self.channel.send(m.Done(message.command_id, "this worker has no chats"))
        elif isinstance(message, m.Submit):
            text = message.messages[-1].content if message.kind == "chat" else str(message.prompt)
            self.submit(message, text)

    def tokenize(self, message: m.Tokenize) -> None:
        """A character is a token; 400 and above is none."""
        if message.kind == "ids":
            if max(message.prompt) >= 400:
                self.channel.send(m.Rejected(message.request_id, 400, "invalid_request", "no such token", "prompt"))
            else:
                text = "".join(map(chr, message.prompt))
                self.channel.send(m.Tokenized(message.request_id, list(message.prompt), text))
            return
        turns = "".join(f"{turn.role}:{turn.content}" for turn in message.messages)
        text = message.prompt if message.kind == "completion" else turns
        self.channel.send(m.Tokenized(message.request_id, [ord(letter) for letter in text], text))

    def report(self) -> None:
        """The snapshot that tests watch."""
        running = len(self.ticking) + len(self.mute) + len(self.flooding)
        finished, held = {"cancelled": self.cancelled}, 100 * running
        queued = len(self.line)
        self.channel.send(m.Stats(running, queued, kv_bytes_used=held, kv_bytes_allocated=held, finished=finished))

    def submit(self, message: m.Submit, text: str) -> None:
        """Behave as the prompt says."""
        name = message.request_id
        if text == "long":
            self.channel.send(m.Rejected(name, 400, "context_length_exceeded", "too long; shorten it", "messages"))
        elif text == "full":
            self.channel.send(m.Rejected(name, 429, "queue_full", "try again later"))
        elif text == "garbage":
            self.sock.sendall(b"\x00\x00\x00\x02zz")
        elif message.setting == "7x":
            self.channel.send(m.Rejected(name, 400, "quality_unavailable", "there is no setting 7x", "setting"))
        elif message.max_kl is not None and message.max_kl < 0.001:
            self.channel.send(m.Rejected(name, 400, "quality_unavailable", "no setting is that close", "max_kl"))
        else:
            close = message.max_kl is not None and message.max_kl < FIGURES["kl_mean"]
            told = message.setting or ("4x" if close else "")
            self.channel.send(m.Accepted(name, 5, told, text == "think on"))
            if text == "forever":
                self.ticking.append(name)
                self.report()
            elif text == "drop":
                self.channel.send(m.Delta(name, 0, "one ", [1]), m.Finished(name, 0, "cancelled", m.Usage(5, 1, 64)))
            elif text == "flood":
                self.flooding.append(name)
                self.report()
            elif text == "line" and self.ticking:
                self.line.append(name)
                self.report()
            elif text == "mute":
                self.mute.append(name)
                self.report()
            elif text == "dead end":
                failed = m.Failed(name, "the grammar cannot be satisfied", "grammar_unsatisfiable", "grammar")
                self.channel.send(m.Delta(name, 0, "one ", [1]), failed)
            elif text == "fail":
                self.channel.send(m.Delta(name, 0, "one ", [1]), m.Failed(name, "the cache is damaged", "cache_error"))
            elif text in ("call", "grammar", "echo", "think", "think on"):
                self.special(message, text)
            else:
                self.answer(message)

    def special(self, message: m.Submit, text: str) -> None:
        """Answers that show what came, or look like a call."""
        grammar = message.sampling.grammar
        if grammar is not None and grammar.kind == "json_schema" and "weather" in grammar.text:
            pieces = ['{"name": "weather", ', '"arguments": {"city": "Oslo"}}']
        elif text == "call":
            pieces = ["Sure.\n", "<tool", '_call>{"name": "weather", "argu', 'ments": {"city": "Oslo"}}</tool_call>']
            pieces += ['\n<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>']
        elif text.startswith("think"):
            pieces = [] if text == "think on" else ["<thi", "nk>\n"]
            pieces += ["Is it ", "< 1?\n", "</think", ">\n\nYes", "."]
            if message.tools:
                pieces += ['<tool_call>{"name": "weather", "arguments": ', '{"city": "', 'Oslo"}', "}</tool_call>"]
        elif text == "grammar":
            pieces = [msgspec.json.encode(grammar).decode()]
        else:
            pieces = [msgspec.json.encode(message).decode()]
        for index in range(message.sampling.n):
            for token, piece in enumerate(pieces):
                told = None if message.sampling.logprobs is None else [m.TokenLogprob(piece, -0.5)]
                self.channel.send(m.Delta(message.request_id, index, piece, [token], told))
            self.channel.send(m.Finished(message.request_id, index, "stop", m.Usage(5, len(pieces), 640)))

    def answer(self, message: m.Submit) -> None:
        """Three words for each choice."""
        if message.sampling.prompt_logprobs is not None:
            scores = [m.TokenLogprob("lo", -0.25, [], [m.TopLogprob("lo", -0.25), m.TopLogprob("p", -2.0)], 3)]
            self.channel.send(m.PromptTokens(message.request_id, "hello", "hel", scores))
        for index in range(message.sampling.n):
            for token, word in enumerate(("one ", "two ", "three ")):
                top = [m.TopLogprob(word, -0.5, list(word.encode()))]
                logprobs = [m.TokenLogprob(word, -0.5, list(word.encode()), top, 4 * token)]
                wanted = logprobs if message.sampling.logprobs is not None else None
                self.channel.send(m.Delta(message.request_id, index, word, [token], wanted))
            usage = m.Usage(5, 3, 640, message.setting or "", *TIMES)
            self.channel.send(m.Finished(message.request_id, index, "stop", usage))


if __name__ == "__main__":
    main()
