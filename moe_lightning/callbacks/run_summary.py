"""The lines that a run ends with on the terminal."""

from typing import Any


def summary(report: dict[str, Any]) -> str:
    """What a run did, of predict or fit.

    Args:
        report: What ``run.json`` says.

    Returns:
        One line of numbers, and for predict where its files are.
    """
    memory = max(each["host_bytes"] + each["device_bytes"] for each in report["peak_memory"])
    used = f"{memory / 1e9:.2f} GB of memory"
    if report["mfu"] is not None:
        used += f", {100 * report['mfu']:.1f} % of peak FLOP/s"
    if "num_steps" in report:
        return (
            f"{report['num_steps']:,} steps in {report['elapsed_s']:.1f} s: "
            f"{report['num_tokens']:,} tokens, {report['tokens_per_s']:,.0f} tokens/s, {used}"
        )
    lines = [
        f"{report['num_predictions']:,} of {report['num_rows']:,} rows answered"
        f"{_before(report)} in {report['elapsed_s']:.1f} s: "
        f"{report['num_prompt_tokens']:,} prompt + {report['num_new_tokens']:,} new tokens, "
        f"{report['tokens_per_s']:,.0f} tokens/s, {used}",
        f"predictions: {report['output_dir']}",
    ]
    if num_errors := report["num_errors"]:
        rows = "row" if num_errors == 1 else "rows"
        lines.append(f"{num_errors:,} {rows} could not be computed: see errors.jsonl there")
    return "\n".join(lines)


def _before(report: dict[str, Any]) -> str:
    if not report["num_done_before"]:
        return ""
    return f", {report['num_done_before']:,} computed by earlier runs, the others"


def nothing_to_do(work: dict[str, Any], directory: str) -> str:
    """What a predict run says that found all rows answered.

    Args:
        work: The counts of ``run.json``.
        directory: Where the predictions are.

    Returns:
        Two lines.
    """
    return (
        f"nothing to do: earlier runs have answered {work['num_predictions']:,} of "
        f"{work['num_rows']:,} rows (--restart computes them again)\npredictions: {directory}"
    )
