"""vLLM for CPUs as a peer of bench_predict.py; run by it with a Python that has vLLM.

    bench_predict.py ── one JSON request a line ──▶ stdin   of this process
                     ◀── one JSON answer a line ──  stdout

    {"load": CHECKPOINT, "threads": 2}   -> {"versions": {"vllm": "0.32.0", ...}}
    {"run": ROWS, "out": FILE}           -> {"seconds": 1.5}      and FILE has the answers
    whatever fails                       -> {"error": "ImportError: ..."}

ROWS is JSON, a list of `{"id", "token_ids", "max_new_tokens", "repetition_penalty"}`. Only vLLM's
`generate` is timed: it need not read the file, tokenise, or make and write texts, as the other
contestants do. Prefix caching is off, since with it a second run of the same prompts would not
compute them.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Server:
    """The model, and the requests that it answers."""

    def __init__(self) -> None:
        self.llm: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        if "load" in request:
            return {"versions": self._load(request["load"], request["threads"])}
        assert self.llm is not None, "nothing has been loaded"
        return {"seconds": self._run(Path(request["run"]), Path(request["out"]))}

    def _load(self, checkpoint: str, threads: int) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm  # isort: skip (fails fast where it is missing)
        import torch

        torch.set_num_threads(threads)
        self.llm = vllm.LLM(
            checkpoint,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
        )
        return {"vllm": vllm.__version__, **{n: version(n) for n in ("torch", "transformers")}}

    def _run(self, rows_path: Path, out: Path) -> float:
        from vllm import SamplingParams

        rows = json.loads(rows_path.read_text())
        prompts = [{"prompt_token_ids": row["token_ids"]} for row in rows]
        sampling = [
            SamplingParams(
                temperature=0.0,
                max_tokens=row["max_new_tokens"],
                repetition_penalty=row["repetition_penalty"],
                ignore_eos=True,
                detokenize=False,
            )
            for row in rows
        ]
        start_s = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        elapsed_s = time.perf_counter() - start_s
        with out.open("w") as file:
            for row, output in zip(rows, outputs, strict=True):
                answer = {"id": row["id"], "token_ids": list(output.outputs[0].token_ids)}
                file.write(json.dumps(answer) + "\n")
        return elapsed_s


def main() -> None:
    """Answer requests until stdin closes."""
    # Libraries print what they like; answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server()
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            # Whatever went wrong, the benchmark goes on without this peer and says why.
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
