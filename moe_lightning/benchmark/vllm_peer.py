"""The process of vLLM: ``PYTHON vllm_peer.py TASK.json``, by a Python that has it.

Its engine takes all rows at once. Nothing of this package is imported: that Python need not have
it. The phases are those of ``player``, without the scores.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def play(task: dict[str, Any]) -> None:
    """Run every phase, and leave what was seen."""
    on_cpu = task["accelerator"] != "gpu"
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    # Without prefix caching: with it the prompts of the second phase would not be computed.
    llm = LLM(
        task["checkpoint"],
        dtype=task["dtype"],
        enforce_eager=on_cpu,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    rows = [json.loads(line) for line in Path(task["rows"]).read_text().splitlines()]
    penalty = llm.get_default_sampling_params().repetition_penalty
    phases, answers = {}, []
    lengths = {"warm-up": 2, "prefill": 1, "decode": task["max_new_tokens"]}
    for name, length in lengths.items():
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            repetition_penalty=penalty,
        )
        begin_s = time.monotonic()
        answers = llm.generate([row["prompt"] for row in rows], sampling, use_tqdm=False)
        phases[name] = {"begin_s": begin_s, "end_s": time.monotonic()}
    found = [
        {"id": row["id"], "token_ids": list(answer.outputs[0].token_ids)}
        for row, answer in zip(rows, answers, strict=True)
    ]
    report = {"phases": phases, "rows": found, "device_bytes": 0}
    Path(task["out"], "rank-0.json").write_text(json.dumps(report))


if __name__ == "__main__":
    play(json.loads(Path(sys.argv[1]).read_text()))
