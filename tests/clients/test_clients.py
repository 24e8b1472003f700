"""Independent clients, as their makers ship them, complete a run against `divisi serve` in each topology."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Bench, replies
from tests.clients.likelihood import Choice, likelihoods

pytestmark = [pytest.mark.verify, pytest.mark.timeout(1800)]  # the first use of a client installs it

HERE = Path(__file__).parent
REQUESTS, CONCURRENCY, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 4, 32, 8
GENERATING = ("/v1/chat/completions", "/v1/completions")
Record = Callable[[str, object], None]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_openai(bench: Bench) -> None:
    out = bench.run("openai", "python", HERE / "programs" / "openai_client.py", f"{bench.url}/v1", bench.model)
    seen = json.loads(out.splitlines()[-1])
    assert len(seen["texts"]) == 10
    assert len(set(seen["texts"])) == 1, "greedy answers differ by the way they were asked for"
    assert seen["errors"] == ["NotFoundError", "BadRequestError", "BadRequestError"]


def test_guidellm(bench: Bench, record_result: Record) -> None:
    bench.run(
        "guidellm", "guidellm", "run",
        "--backend", f"kind=openai_http,target={bench.url},model={bench.model}",
        "--profile", f"kind=concurrent,streams={CONCURRENCY}",
        "--constraint", f"kind=max_requests,count={REQUESTS}",
        "--tokenizer", f"kind=hf_auto,model={bench.model_dir}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output", "kind=json,path=report.json", "--disable-console-interactive",
    )  # fmt: skip
    (report,) = load(bench.folder / "report.json")["benchmarks"]
    totals = report["metrics"]["request_totals"]
    assert totals == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
    answered = report["requests"]["successful"]
    assert {request["output_metrics"]["text_tokens"] for request in answered} == {OUTPUT_TOKENS}
    record_result("ttft_ms_p50", report["metrics"]["time_to_first_token_ms"]["successful"]["median"])


def test_aiperf(bench: Bench, record_result: Record) -> None:
    bench.run(
        "aiperf", "aiperf", "profile", "--model", bench.model, "--url", bench.url, "--endpoint-type", "chat",
        "--streaming", "--tokenizer", bench.model_dir, "--ui", "none",
        "--request-count", REQUESTS, "--concurrency", CONCURRENCY, "--random-seed", 1,
        "--prompt-input-tokens-mean", PROMPT_TOKENS, "--prompt-input-tokens-stddev", 0,
        "--prompt-output-tokens-mean", OUTPUT_TOKENS, "--extra-inputs", "ignore_eos:true", "--use-server-token-count",
        "--no-gpu-telemetry", "--no-server-metrics", "--output-artifact-dir", "report",
        # In offline mode it takes a folder's path for a repository's name; a path needs no hub.
        online=True,
    )  # fmt: skip
    report = load(bench.folder / "report" / "profile_export_aiperf.json")
    assert report["request_count"]["avg"] == REQUESTS
    assert report["error_summary"] == []
    assert report["is_complete"]
    assert not report["was_cancelled"]
    assert report["total_usage_completion_tokens"]["avg"] == REQUESTS * OUTPUT_TOKENS
    record_result("ttft_ms_avg", report["time_to_first_token"]["avg"])


def test_lm_eval(bench: Bench, expected: dict[Choice, float], record_result: Record) -> None:
    for name in ("divisi_choice.yaml", "divisi_generate.yaml", "choice.jsonl"):
        (bench.folder / name).write_bytes((HERE / "tasks" / name).read_bytes())
    model = (
        f"model={bench.model},base_url={bench.url}/v1/completions,tokenizer_backend=huggingface,"
        f"tokenizer={bench.model_dir},num_concurrent={CONCURRENCY},max_length=512,max_retries=1"
    )
    bench.run(
        "lm-eval", "lm_eval", "run", "--model", "local-completions", "--model_args", model, "--batch_size", 2,
        "--tasks", "divisi_choice,divisi_generate", "--include_path", bench.folder,
        "--output_path", "report", "--log_samples",
    )  # fmt: skip
    (folder,) = (bench.folder / "report").iterdir()
    (results,) = folder.glob("results_*.json")
    lengths = {task: result["sample_len"] for task, result in load(results)["results"].items()}
    assert lengths == {"divisi_choice": 8, "divisi_generate": 8}
    (samples,) = folder.glob("samples_divisi_choice_*.jsonl")
    found = likelihoods(samples)
    assert found.keys() == expected.keys()
    worst = max(abs(found[choice] - expected[choice]) for choice in found)
    assert worst < 1e-3, f"log-likelihoods differ from transformers' by {worst}"
    record_result("worst_likelihood_difference", worst)
    (samples,) = folder.glob("samples_divisi_generate_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 8
    assert all(answers)


def test_inspect_ai(bench: Bench) -> None:
    task = bench.folder / "inspect_task.py"
    task.write_bytes((HERE / "programs" / "inspect_task.py").read_bytes())
    bench.run(
        "inspect-ai", "inspect", "eval", task.name, "--model", f"openai-api/divisi/{bench.model}",
        "--model-base-url", f"{bench.url}/v1", "--display", "plain", "--log-dir", "logs", "--log-format", "json",
        "--max-tokens", 16, "--max-retries", 0, "--max-connections", CONCURRENCY,
    )  # fmt: skip
    (path,) = (bench.folder / "logs").glob("*.json")
    log = load(path)
    assert log["status"] == "success"
    assert log["results"]["total_samples"] == log["results"]["completed_samples"] == 8
    (usage,) = log["stats"]["model_usage"].values()
    assert 0 < usage["output_tokens"] <= 8 * 16
    assert all(sample["scores"]["includes"]["value"] in ("C", "I") for sample in log["samples"])


SHARES = {
    ("--include-path", GENERATING[0]): 0.45,
    ("--include-path", GENERATING[1]): 0.35,
    ("--exclude-path-regex", "completions$"): 0.2,
}
"""Of the fuzzer's time, by paths: one after another in one run, the first one's cases would use up all of it."""


def test_schemathesis(bench: Bench, full_tier: bool, record_result: Record) -> None:
    """Requests drawn from our own OpenAPI document: no 5xx, no answer that it does not describe, no hang."""
    long = full_tier and bench.topology == "split"
    seconds, least_whole, least_streamed = (300, 10, 3) if long else (90, 3, 1)
    before = replies(bench)
    for paths, share in SHARES.items():
        bench.run(
            "schemathesis", "schemathesis", "--config-file", HERE / "programs" / "schemathesis.toml",
            "run", f"{bench.url}/openapi.json", *paths, "--max-time", int(seconds * share),
            # Its other phases need examples in the document, or requests that change what later ones find.
            "--phases", "coverage,fuzzing",
            # A valid body may still ask for what the model cannot do: a 400 that says so is a right answer.
            "--exclude-checks", "positive_data_acceptance", "--request-timeout", 30, "--seed", 1,
            "--generation-database", "none", "--no-color",
            # It takes every name with "token" in it for a secret's.
            "--output-sanitize", "false",
            hooks=HERE / "programs" / "schemathesis_hooks.py", timeout_s=seconds + 120,
        )  # fmt: skip
    counts = replies(bench)
    counts.subtract(before)
    assert not [key for key, count in counts.items() if count and key[1] >= "500"]
    seen = Counter((bench.folder / "replies.txt").read_text(encoding="utf-8").splitlines())
    streamed = {path: seen[f"{path} 200 text/event-stream"] for path in GENERATING}
    for path in GENERATING:
        assert seen[f"{path} 200 application/json"] >= least_whole, f"{path} was hardly reached: {seen}"
        assert streamed[path] >= least_streamed, f"{path} was hardly streamed: {seen}"
    record_result("seconds", seconds)
    record_result("replies", {f"{path} {status}": count for (path, status), count in sorted(counts.items()) if count})
    record_result("streamed", streamed)
