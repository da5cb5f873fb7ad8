"""The command line without a server, and against a small stand-in that speaks HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spectral import SpectralProfile, SpectralProfiler, resources
from spectral.cli import app, main
from spectral.commands.chat import Answer, human_bytes, summary, take_chunk
from spectral.commands.evaluate import split_settings
from spectral.commands.status import model_rows, table_row

runner = CliRunner()
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": "It is "}}]},
    {"choices": [{"index": 0, "delta": {"content": "Paris."}}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
     "spectral": {"setting": "8x", "cache_bytes": 2048, "ratio": 6.5}},
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}},
]


class Handler(BaseHTTPRequestHandler):
    """Answers like a server with one model; `broken` streams an error in the middle."""

    asked: list[dict[str, Any]] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.send(200, json.dumps({"object": "list", "data": [{"id": "demo-7m"}, {"id": "broken"}]}).encode())
        else:
            self.send(503, json.dumps({"status": "loading", "models": {"demo-7m": {"state": "loading"}}}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked.append(body)
        if body["model"] == "absent":
            error = {"message": "no model 'absent'", "type": "x", "param": "model", "code": "y"}
            self.send(404, json.dumps({"error": error}).encode())
            return
        chunks = CHUNKS[:2] + [{"error": {"message": "the worker ended"}}] if body["model"] == "broken" else CHUNKS
        text = ": ping\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.send(200, text.encode(), "text/event-stream")


@pytest.fixture
def url() -> Iterator[str]:
    Handler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_piped_lines_are_one_conversation(url: str) -> None:
    lines = "Capital of France?\n\nAnd again?\n"
    result = runner.invoke(app, ["chat", "--url", url, "--system", "Be brief."], input=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("It is Paris.") == 2
    assert "4 tokens" in result.stderr and "cache 2.0 KiB" in result.stderr and "setting 8x" in result.stderr
    assert [message["role"] for message in Handler.asked[1]["messages"]] == ["system", "user", "assistant", "user"]


def test_chat_json_is_one_object_per_answer(url: str) -> None:
    result = runner.invoke(app, ["chat", "--url", url, "--json", "--max-tokens", "7"], input="Hello\n")
    record = json.loads(result.stdout)
    assert record["answer"] == "It is Paris."
    assert record["usage"]["completion_tokens"] == 4
    assert record["spectral"]["setting"] == "8x"
    assert Handler.asked[0]["max_tokens"] == 7 and "temperature" not in Handler.asked[0]


def test_slash_commands(url: str) -> None:
    result = runner.invoke(app, ["chat", "--url", url], input="Hi\n/clear\n/model broken\n/exit\nnever asked\n")
    assert result.exit_code == 0, result.output
    assert "[broken]" in result.stdout
    assert len(Handler.asked) == 1


@pytest.mark.parametrize(("model", "words"), [("absent", "404: no model 'absent'"), ("broken", "the worker ended")])
def test_refusals_and_breaks_are_errors(
    url: str, model: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.argv", ["spectral", "chat", model, "--url", url])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_no_server_is_said_clearly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["spectral", "ps", "--url", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_ps_shows_a_server_that_still_loads(url: str) -> None:
    result = runner.invoke(app, ["ps", "--url", url])
    assert result.exit_code == 0 and "loading" in result.stdout
    assert json.loads(runner.invoke(app, ["ps", "--url", url, "--json"]).stdout)["status"] == "loading"


def test_models(url: str) -> None:
    assert runner.invoke(app, ["models", "--url", url]).stdout.split() == ["demo-7m", "broken"]


def test_rows_of_both_forms() -> None:
    assert model_rows({"models": {"a": {"state": "hot"}}}) == [{"name": "a", "state": "hot"}]
    assert model_rows({"models": [{"id": "a", "state": "hot"}]}) == [{"id": "a", "state": "hot", "name": "a"}]
    assert model_rows({}) == []


def test_row_of_a_hot_model() -> None:
    model = {"name": "a", "state": "hot", "setting": {"setting": "8x", "ratio": 6.54}, "running": 2, "queued": 1}
    row = table_row({**model, "kv_bytes_used": 1536, "context_length": 2048, "pid": 7})
    assert row == ["a", "hot", "8x", "6.5x", "1.5 KiB", "2 + 1", "2048", "7"]
    assert table_row({"name": "b", "state": "loading", "fraction": 0.25})[:3] == ["b", "loading 25%", ""]


def test_version_as_json() -> None:
    facts = json.loads(runner.invoke(app, ["version", "--json"]).stdout)
    assert facts["spectral"] and facts["python"] and "torch" in facts
    assert runner.invoke(app, ["--version"]).stdout.startswith("spectral ")


def test_serve_becomes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: seen.append(arguments))
    result = runner.invoke(app, ["serve", "--config", "my.yaml", "--port", "9000"])
    assert result.exit_code == 0, result.output
    assert seen[0][1:] == ["-m", "server", "--config", "my.yaml", "--port", "9000"]


def test_eval_without_a_profile_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["spectral", "eval", "nobody/nothing"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "spectral profile build nobody/nothing" in capsys.readouterr().err


def test_eval_runs_the_model_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    """bf16 weights are the checkpoint's own, so only what is computed differs from float32's."""
    text = tmp_path / "text.txt"
    text.write_text("The country lies between two seas, and its rivers flow from the north to the south. " * 20)
    command = ["eval", "demo", "--text", str(text), "--context", "96", "--windows", "1", "--settings", "exact,8x"]
    command.append("--json")
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        result = runner.invoke(app, [*command, "--dtype", dtype])
        assert result.exit_code == 0, result.output
        found[dtype] = json.loads(result.stdout)
    assert [found[d]["dtype"] for d in ("auto", "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]
    assert found["auto"]["rows"] == found["float32"]["rows"]
    perplexity = [found[d]["rows"][0]["exact_perplexity"] for d in ("float32", "bfloat16")]
    assert perplexity[0] != perplexity[1] == pytest.approx(perplexity[0], rel=0.02)
    refused = runner.invoke(app, [*command, "--dtype", "float64"])
    assert refused.exit_code and "dtype must be auto, float32, bfloat16 or float16" in str(refused.exception)


def test_text_files_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for path, words in ((empty, "is empty"), (tmp_path / "absent.txt", "cannot be read")):
        monkeypatch.setattr("sys.argv", ["spectral", "eval", "demo", "--text", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_pieces() -> None:
    assert split_settings("8x, 4x,") == ["8x", "4x"]
    assert split_settings("") is None and split_settings(None) is None
    assert human_bytes(10) == "10 B" and human_bytes(1536) == "1.5 KiB" and human_bytes(3 * 2**30) == "3.0 GiB"
    answer = Answer()
    pieces: list[str] = []
    for chunk in CHUNKS:
        take_chunk(answer, chunk, 0.0, pieces.append)
    assert "".join(pieces) == answer.text == "It is Paris." and answer.thoughts == ""
    thoughts: list[str] = []
    take_chunk(answer, {"choices": [{"delta": {"reasoning_content": "Hm."}}]}, 0.0, pieces.append, thoughts.append)
    assert thoughts == [answer.thoughts] == ["Hm."] and answer.text == "It is Paris."
    answer.first_token_s, answer.total_s = 0.5, 2.0
    assert answer.tokens_per_second == pytest.approx(2.0)
    assert summary(Answer()) == ""


def test_resources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resources.model_path("demo")
    assert folder == resources.model_path("demo-7m")
    assert Path(folder, "config.json").is_file()
    assert resources.model_path("some/hub-name") == "some/hub-name"
    assert resources.model_path(tmp_path) == str(tmp_path)
    assert resources.profile_path("some/unheard-of") is None
    assert resources.profile_path("..") is None
    monkeypatch.setattr(resources, "data_root", lambda: tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "demo-7m.safetensors").touch()
    assert resources.profile_path("demo") == tmp_path / "profiles" / "demo-7m.safetensors"
    assert resources.profile_path("x/demo-7m/") == tmp_path / "profiles" / "demo-7m.safetensors"


def test_a_profile_is_built_for_what_is_preferred(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[str] = []

    def build(profiler: SpectralProfiler, model: str, **_: Any) -> SpectralProfile:
        asked.append(profiler.prefer)
        found = resources.profile_path(model)
        assert found is not None
        return SpectralProfile.load(found)

    monkeypatch.setattr(SpectralProfiler, "profile_from_model", build)
    command = ["profile", "build", "demo", "--output", str(tmp_path / "mine.safetensors")]
    for preferred in ([], ["--prefer", "balanced"], ["--prefer", "speed"]):
        result = runner.invoke(app, [*command, *preferred])
        assert result.exit_code == 0, result.output
        assert "bases of keys and values together" in result.stdout
    assert asked == ["quality", "balanced", "speed"]
    monkeypatch.setattr("sys.argv", ["spectral", *command, "--prefer", "fast"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and len(asked) == 3
    assert "--prefer: 'fast' is none of quality, balanced, speed" in capsys.readouterr().err
