"""Perplexity, time and memory of methods, and of what follows them, at several sparsities.

python -m tests.bench.quality MODEL --calibration C4.jsonl --text wiki.test.raw [--results FILE] [--device cuda]

MODEL is a folder or a .gguf; the calibration is 32 sequences of 1,024 tokens, perplexities have a context of 1,024.
--methods takes names of methods, and options of `prune`, such as --methods=wanda '--quality balanced'
'--method alps --refine swaps --reconstruct cg'. Each point runs in a process of its own, so that its peak memory is its
own, and is kept as a line of FILE, so that the same command goes on where it was cut off. With --jobs several run at
once, and disturb each other: they have no times then.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.bench.speed import table

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERNS = ("50%", "4:8", "2:4")
DENSE = "dense"


def measure(point: dict[str, Any], jobs: int) -> dict[str, Any]:
    """Prune and measure one point, in a process that does nothing else."""
    import torch

    import llmprune
    from llmprune.cli.options import add_recipe, recipe_options

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    found: dict[str, Any] = {"point": point, "jobs": jobs, "when": time.strftime("%Y-%m-%d %H:%M")}
    where = {"device": point["device"], "dtype": point["dtype"]}
    with tempfile.TemporaryDirectory() as folder:
        model: str = point["model"]
        if point["method"] != DENSE:
            parser = argparse.ArgumentParser()
            add_recipe(parser)
            calibration = ["--calibration", point["calibration"], "--samples", point["samples"]]
            run_on = ["--length", point["length"], "--device", where["device"], "--dtype", where["dtype"]]
            asked = parser.parse_args([*calibration, *run_on, "--sparsity", point["pattern"], *point["options"]])
            options = recipe_options(asked)
            report = llmprune.prune(model, out=Path(folder) / "out", **options).to_dict()
            for name in ("seconds", "peak_memory", "peak_device_memory", "versions"):
                found[name] = report[name]
            model = str(Path(folder) / "out")
        for text in point["texts"]:
            told = llmprune.perplexity(model, text, length=int(point["length"]), **where)
            found.setdefault("perplexity", {})[Path(text).name] = {"value": told.value, "tokens": told.tokens}
    return found


def points(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Those that are asked for, the dense model first."""
    names = ("model", "calibration", "samples", "length", "device", "dtype")
    shared = {**{name: getattr(chosen, name) for name in names}, "texts": chosen.text}
    found = [{"method": DENSE, "pattern": "", "options": [], **shared}]
    for pattern in chosen.patterns:
        for method in chosen.methods:
            options = shlex.split(method) if method.startswith("-") else ["--method", method]
            options += [part for entry in chosen.set for part in ("--set", entry)]
            found.append({"method": method, "pattern": pattern, "options": options, **shared})
    return found


def run(asked: list[dict[str, Any]], results: Path | None, jobs: int) -> list[dict[str, Any]]:
    """Bring all points to their end, those that are not in the file."""
    known = [json.loads(line) for line in results.read_text().splitlines()] if results and results.is_file() else []
    done = [record for record in known if record["point"] in asked]
    left = [point for point in asked if all(point != record["point"] for record in done)]
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not begin its use
    context = multiprocessing.get_context("forkserver")  # each begins with everything imported
    context.set_forkserver_preload(["llmprune.pipeline", "llmprune.cli.options", "llmprune.evaluate.perplexity"])
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        tasks = {pool.submit(measure, point, jobs): point for point in left}
        for task in as_completed(tasks):
            named = f"{tasks[task]['method']} {tasks[task]['pattern']}"
            if (error := task.exception()) is not None:
                print(f"{named}: {error!r}", file=sys.stderr, flush=True)
                continue
            done.append(task.result())
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
            values = [f"{found['value']:.2f}" for found in done[-1]["perplexity"].values()]
            print(named, *values, _cost(done[-1]), file=sys.stderr, flush=True)
    return done


def _cost(record: dict[str, Any]) -> str:
    if "seconds" not in record:
        return ""
    seconds = f"{record['seconds']['total']:.0f} s, " if record["jobs"] == 1 else ""
    held = record["peak_memory"] if record["peak_device_memory"] is None else record["peak_device_memory"]
    return f"{seconds}{held / 2**30:.2f} GiB"


def show(done: list[dict[str, Any]], chosen: argparse.Namespace) -> None:
    """A table for each text, and one of what it took (of memory: on the device, where there is one)."""
    found = {(record["point"]["method"], record["point"]["pattern"]): record for record in done}
    heading = ("", *chosen.patterns)

    def rows(cell: Any) -> list[tuple[str, ...]]:
        lines = ((m, *(found.get((m, p)) for p in chosen.patterns)) for m in chosen.methods)
        return [(name, *(cell(one) if one else "" for one in records)) for name, *records in lines]

    for text in (Path(text).name for text in chosen.text):
        dense = found.get((DENSE, ""))
        value = f"{dense['perplexity'][text]['value']:.2f}" if dense else "not measured"
        tokens = {record["perplexity"][text]["tokens"] for record in done}
        print(f"Perplexity on {text}, {sorted(tokens)} predicted tokens; the dense model has {value}\n")
        table(heading, rows(lambda one: f"{one['perplexity'][text]['value']:.2f}"))  # noqa: B023 (called at once)
    table(heading, rows(_cost))
    versions: dict[str, str] = next((record["versions"] for record in done if "versions" in record), {})
    print(f"{platform.processor() or platform.machine()}, {versions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", default="32")
    parser.add_argument("--length", default="1024")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of methods, or options of `prune`")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any recipe key; repeat")
    parser.add_argument("--jobs", type=int, default=1, help="points at once")
    parser.add_argument("--results", type=Path, help="a file for what is done")
    chosen = parser.parse_args()
    show(run(points(chosen), chosen.results, chosen.jobs), chosen)


if __name__ == "__main__":
    main()
