"""Load the Space as strangers would: how long requests take, and whether its memory grows.

    python -m bench.space_load

starts it as a process of its own, sends requests one after the other and then from many clients at once, and writes
hub_cards/results/space-load-cpu.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client
from gradio_client.utils import QueueError

from tests.support.space_server import ROOT, STORIES, serve
from training.common.results import write_json

OUT = ROOT / "hub_cards" / "results" / "space-load-cpu.json"


def ask(client: Client, seed: int, is_watched: bool = False, **request) -> dict:
    """Seconds to the end and, of one that is watched, to the first draft with a token; or what was said instead."""
    began, first = time.monotonic(), None
    job = client.submit("Once upon a time, there was a little girl", seed=seed, api_name="/write", **request)
    if is_watched:  # a loop over a refused job would not end
        first = next(time.monotonic() - began for draft in job if draft["step"] > 0)
    try:
        job.result()
    except QueueError as error:
        return {"refused": str(error)}
    return {"first": first, "seconds": time.monotonic() - began, "state": job.outputs()[-1]["state"]}


def of(values: list[float]) -> dict:
    return {"median": statistics.median(values), "p95": statistics.quantiles(values, n=20, method="inclusive")[18]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="one after the other, at 8 steps")
    parser.add_argument("--clients", type=int, default=20, help="at once, at the settings of the page")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), STORIES) as server:
        client = Client(server.url, verbose=False)
        small = {"num_steps": 8, "num_candidates": 2, "length": 48}
        warm = [ask(client, seed, **small) for seed in range(20)]
        page = [ask(client, seed, is_watched=True) for seed in range(10)]
        before = server.resident_mb()
        alone = [ask(client, seed, **small) for seed in range(options.requests)]
        after = server.resident_mb()
        clients = [Client(server.url, verbose=False) for _ in range(options.clients)]
        with ThreadPoolExecutor(options.clients) as visitors:
            together = list(visitors.map(lambda i: ask(clients[i], i), range(options.clients)))
    done = [answer for answer in together if "refused" not in answer]
    own = json.loads((STORIES / "generation_config.json").read_text())
    high, low = own["energy_window"]
    longest = json.loads((STORIES / "config.json").read_text())["max_position_embeddings"]
    result = {
        "command": "python -m bench.space_load",
        "model": STORIES.name,
        "device": "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "page": {
            "requests": len(page),
            "settings": f"{own['num_steps']} steps, {own['num_candidates']} proposals, window [{low}, {high}], "
            f"{longest} tokens",
            "first_token_seconds": of([answer["first"] for answer in page]),
            "seconds": of([answer["seconds"] for answer in page]),
        },
        "one_after_the_other": {
            "requests": len(alone),
            "settings": f"8 steps, 2 proposals, window [{low}, {high}], 48 tokens, after 20 more",
            "seconds": of([answer["seconds"] for answer in alone]),
            "resident_mb_before": round(before, 1),
            "resident_mb_after": round(after, 1),
        },
        "at_once": {
            "clients": options.clients,
            "finished": len(done),
            "told_that_the_queue_is_full": len(together) - len(done),
            "seconds": of([answer["seconds"] for answer in done]),
        },
    }
    assert all(answer["state"] == "done" for answer in warm + page + alone + done)
    write_json(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
