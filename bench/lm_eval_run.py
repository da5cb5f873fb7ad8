"""lm-eval's `local-completions`, unmodified, against the server: log likelihoods of choices, and generated answers.

    pip install lm-eval
    python bench/lm_eval_run.py [--python PYTHON_WITH_LM_EVAL] [--json FILE]

It starts the server with the demo model and gives lm-eval two small tasks: choosing a country's capital among four
(the text is scored through `echo` and `logprobs`, in batches), and naming it. The same choices are scored by hand
through `/v1/completions`, one by one; lm-eval must come to the same answers. The model learned capitals, so that most
must be right: scores that are out of order would show as chance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from bench.report import deliver, run_facts  # noqa: E402

MODEL = "demo-7m"
CAPITALS = {
    "France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Germany": "Berlin", "Portugal": "Lisbon", "Poland": "Warsaw", "Greece": "Athens", "Peru": "Lima", "Cuba": "Havana",
}  # fmt: skip
TASKS = {
    "capital_choice": """task: capital_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: " "
metric_list: [{{metric: acc}}]
""",
    "capital_answer": """task: capital_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, temperature: 0.0}}
filter_list: [{{name: word, filter: [{{function: regex, regex_pattern: "([A-Z][a-z]+)"}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match}}]
""",
}


def documents() -> list[dict[str, Any]]:
    """Each country with its capital first and three others after it."""
    names = list(CAPITALS)
    found = []
    for place, country in enumerate(names):
        others = [CAPITALS[names[(place + step) % len(names)]] for step in (1, 3, 5)]
        found.append({"country": country, "choices": [CAPITALS[country], *others]})
    return found


def by_hand(url: str) -> float:
    """The same choices through /v1/completions, one at a time: the share whose best choice is the capital."""
    right = 0
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for document in documents():
            text = f"The capital of {document['country']} is"
            scores = []
            for choice in document["choices"]:
                body = {"model": MODEL, "prompt": f"{text} {choice}", "echo": True, "logprobs": 1, "max_tokens": 0}
                logprobs = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["logprobs"]
                pairs = zip(logprobs["text_offset"], logprobs["token_logprobs"], strict=True)
                scores.append(sum(value for offset, value in pairs if offset >= len(text)))
            right += scores.index(max(scores)) == 0
    return right / len(CAPITALS)


def evaluate(python: str, url: str, folder: Path, batch: int) -> dict[str, Any]:
    """lm-eval's own results of both tasks."""
    arguments = f"model={MODEL},base_url={url}/v1/completions,tokenizer={ROOT / 'models' / MODEL},num_concurrent=2"
    command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--batch_size", str(batch)]
    command += ["--output_path", str(folder / "out")]
    env = {**os.environ, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    env["PYTHONPATH"] = ""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    newest = max((folder / "out").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    results = json.loads(newest.read_text(encoding="utf-8"))
    return {
        "choices_right": results["results"]["capital_choice"]["acc,none"],
        "answers_right": results["results"]["capital_answer"]["exact_match,word"],
        "lm_eval": results["lm_eval_version"],
    }


def main() -> None:
    """Entry point."""
    from harness import running_server

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="a Python that has lm-eval")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "capitals.json"
        data.write_text("\n".join(map(json.dumps, documents())), encoding="utf-8")
        for task, text in TASKS.items():
            (folder / f"{task}.yaml").write_text(text.format(data=data), encoding="utf-8")
        with running_server(folder) as server:
            result: dict[str, Any] = {"choices_right_by_hand": by_hand(server.url)}
            result["batches"] = {size: evaluate(options.python, server.url, folder, size) for size in (1, 4)}
    for found in result["batches"].values():
        assert found["choices_right"] == result["choices_right_by_hand"], "lm-eval and the plain requests disagree"
    result |= {"model": MODEL, "countries": len(CAPITALS), **run_facts()}
    deliver(result, options.json)


if __name__ == "__main__":
    main()
