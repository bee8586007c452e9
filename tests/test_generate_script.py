"""training/generate.py on a toy model: a row has one text whatever makes it; kills and resumption, prompts, formats."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState
from datasets import load_dataset

from modeling_edlm import EDLMModel
from support.toy import make_toy
from training import generate
from training.common.data import character_tokenizer

LENGTH, MASK, N = 24, 27, 12
COLUMNS = ["row", "prompt", "text", "tokens", "nfe", "energy_nfe", "seed"]
PROMPTS = ["the history", "a", "in the be[MASK][MASK]nning", "river "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy EDLM with a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("model")
    make_toy("nce", length=LENGTH, vocab_size=MASK + 1).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def options(folder, out, **changes) -> list[str]:
    values = {"model": folder, "out": out, "num_samples": N, "num_steps": 5, "num_candidates": 3, "batch_size": 5}
    values |= {"energy_window": "1.0,0.4", "seed": 3, "device": "cpu"} | changes
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def run(folder, out, **changes) -> list[dict]:
    """The rows of a run of its own, in the order of the file."""
    AcceleratorState._reset_state(reset_partial_state=True)
    generate.main(options(folder, out, **changes))
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == [out.name]
    return read(out)


def read(out) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def written(out) -> list[bytes]:
    """The lines of the parts."""
    paths = sorted(Path(f"{out}.parts").glob("*.jsonl"))
    return [line for path in paths for line in path.read_bytes().splitlines(keepends=True)]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    return run(folder, tmp_path_factory.mktemp("whole") / "new" / "all.jsonl")


@pytest.fixture
def stop_after(monkeypatch):
    """Ctrl-C when so many blocks are written."""

    def stop(num_blocks: int):
        made, make_rows = [], generate.make_rows

        def some(rows, *others):
            if len(made) == num_blocks:
                raise KeyboardInterrupt
            made.append(rows)
            return make_rows(rows, *others)

        monkeypatch.setattr(generate, "make_rows", some)
        return made, lambda: monkeypatch.setattr(generate, "make_rows", make_rows)

    return stop


def test_rows_are_those_of_generate(whole, folder):
    model = EDLMModel.from_pretrained(folder)
    settings = {"num_steps": 5, "num_candidates": 3, "energy_window": (1.0, 0.4), "return_dict_in_generate": True}
    output = model.generate(batch_size=N, seed=3, **settings)
    assert [row["row"] for row in whole] == list(range(N)) and list(whole[0]) == COLUMNS
    assert [row["tokens"] for row in whole] == output.sequences.tolist()
    assert [row["nfe"] for row in whole] == output.nfe.tolist()
    assert [row["energy_nfe"] for row in whole] == output.energy_nfe.tolist()
    alphabet = " abcdefghijklmnopqrstuvwxyz"
    for row in whole:
        assert row["text"] == "".join(alphabet[i] for i in row["tokens"]) and len(row["text"]) == LENGTH
        assert row["prompt"] is None and row["seed"] == 3


@pytest.mark.parametrize("batch_size", [1, 3, 8, 0])
def test_the_same_texts_at_any_batch_size(whole, folder, tmp_path, batch_size):
    assert run(folder, tmp_path / "again.jsonl", batch_size=batch_size) == whole


def test_a_killed_run_goes_on_with_any_number_of_processes(folder, tmp_path):
    """Each row exactly once, and all as in an uninterrupted run."""
    slow = {"num_samples": 24, "num_steps": 150, "batch_size": 1}
    out, two = tmp_path / "killed.jsonl", tmp_path / "two.jsonl"
    command = [sys.executable, "-m", "training.generate", *options(folder, out, **slow)]
    quiet = {"cwd": Path(__file__).parents[1], "stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 120
    while len(written(out)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    kept = [json.loads(line) for line in written(out)]
    assert 3 <= len(kept) < 24 and not out.exists()
    shutil.copytree(f"{out}.parts", f"{two}.parts")

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "training.generate", *options(folder, two, **slow | {"batch_size": 4})]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=env, check=True, **quiet | {"stdout": subprocess.PIPE}, text=True)
    assert f"this run: {24 - len(kept)} rows" in done.stdout and "(2 x cpu, float32)" in done.stdout
    uninterrupted = run(folder, tmp_path / "whole.jsonl", **slow | {"batch_size": 24})
    assert run(folder, out, **slow | {"batch_size": 16}) == uninterrupted == read(two)
    assert [row["row"] for row in uninterrupted] == list(range(24))
    assert kept == uninterrupted[: len(kept)]


def test_ctrl_c_and_a_lost_batch(whole, folder, tmp_path, stop_after, capsys):
    out = tmp_path / "lost.jsonl"
    made, go_on = stop_after(2)
    with pytest.raises(SystemExit) as stopped:
        run(folder, out)
    assert stopped.value.code == 130 and made == [range(0, 5), range(5, 10)]
    assert f"stopped: 10 rows are kept in {out}.parts; the same command goes on" in capsys.readouterr().out
    first, second = sorted(Path(f"{out}.parts").glob("*.jsonl"))
    second.rename(second.with_name(f"{second.name}.123.tmp"))  # as a kill leaves one that is being written
    go_on()
    made, _ = stop_after(9)
    assert run(folder, out) == whole
    assert made == [range(5, 10), range(10, 12)]
    printed = capsys.readouterr()
    assert " 5/12 " in printed.err and " 12/12 " in printed.err
    assert f"results: {out}, 12 rows" in printed.out and f"this run: 7 rows, {7 * LENGTH} new tokens" in printed.out


def test_a_kill_of_the_last_act(whole, folder, tmp_path, monkeypatch):
    """Rows that are all there are joined, and none is made; also where only the parts were left to be removed."""
    out = tmp_path / "late.jsonl"
    for name in ("write_rows", "remove"):
        with monkeypatch.context() as patch:
            target = generate if name == "write_rows" else generate.Parts
            patch.setattr(target, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(SystemExit):
                run(folder, out)
        assert out.exists() == (name == "remove") and len(written(out)) == N
    monkeypatch.setattr(generate, "make_rows", lambda *_: pytest.fail("all rows were there"))
    assert run(folder, out) == whole


def test_other_arguments_are_refused(whole, folder, tmp_path, stop_after):
    out = tmp_path / "part.jsonl"
    _, go_on = stop_after(1)
    with pytest.raises(SystemExit):
        run(folder, out)
    go_on()
    other = tmp_path / "other"
    make_toy("nce", length=LENGTH, vocab_size=MASK + 1, seed=1).energy_model.save_pretrained(other)
    before = written(out)
    for changes, named in (
        ({"num_steps": 6}, "num_steps=5, got 6"),
        ({"seed": 4}, "seed=3, got 4"),
        ({"num_samples": 13}, "num_samples=12, got 13"),
        ({"max_length": 20}, "max_length=24, got 20"),
        ({"max_new_tokens": 20}, "max_length=24, got None"),
        ({"temperature": 0.5}, "temperature=1.0, got 0.5"),
        ({"energy_window": "1.0,0.5"}, r"energy_window=\[1.0, 0.4\], got \[1.0, 0.5\]"),
        ({"dtype": "bfloat16"}, "dtype='float32', got 'bfloat16'"),
        ({"energy": other}, "fingerprint of the model"),
    ):
        with pytest.raises(ValueError, match=f"part.jsonl.parts has rows made with {named}.*--overwrite true"):
            run(folder, out, **changes)
    assert written(out) == before
    new = run(folder, out, seed=4, overwrite="true")
    assert len(new) == N and all(a["tokens"] != b["tokens"] for a, b in zip(new, whole, strict=True))
    with pytest.raises(ValueError, match="out is there already, .*part.jsonl.*--overwrite true"):
        run(folder, out)
    assert run(folder, out, overwrite="true", max_length=LENGTH) == whole


def test_what_outlives_a_killed_run_does_no_harm(whole, folder, tmp_path, monkeypatch):
    """A worker of a launcher that was killed goes on writing its rows: beside another run, and after it."""
    out, make_rows = tmp_path / "busy.jsonl", generate.make_rows

    def stray(rows):
        made = [dict.fromkeys(COLUMNS) | {"row": row, "text": "of other settings"} for row in rows]
        generate.Parts(out).add("0123456789ab", rows, made)

    def beside_a_stray(rows, *others):
        stray(range(3, 12))
        return make_rows(rows, *others)

    stray(range(5))
    monkeypatch.setattr(generate, "make_rows", beside_a_stray)
    assert run(folder, out) == whole
    stray(range(3, 12))
    with pytest.raises(ValueError, match="out is there already"):
        run(folder, out)


def test_nothing_but_finished_rows_binds(folder, tmp_path, monkeypatch):
    """A start that made no row leaves the choice of arguments open."""
    out = tmp_path / "none.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(generate, "make_rows", lambda *_: (_ for _ in ()).throw(FloatingPointError("logits hold NaN")))
        with pytest.raises(FloatingPointError):
            run(folder, out)
    assert len(run(folder, out, num_steps=2)) == N


def test_another_energy_is_loaded(whole, folder, tmp_path):
    make_toy("nce", length=LENGTH, vocab_size=MASK + 1, seed=1).energy_model.save_pretrained(tmp_path / "other")
    rows = run(folder, tmp_path / "x.jsonl", energy=tmp_path / "other")
    model = EDLMModel.from_pretrained(folder).load_energy(tmp_path / "other")
    x_BL = model.generate(batch_size=N, seed=3, num_steps=5, num_candidates=3, energy_window=(1.0, 0.4))
    assert [row["tokens"] for row in rows] == x_BL.tolist() != [row["tokens"] for row in whole]


def test_options_of_generate_are_handed_on(whole, folder, tmp_path):
    model = EDLMModel.from_pretrained(folder)
    for name, changes in (
        (
            "filtered",
            {"top_k": 5, "top_p": 0.9, "temperature": 0.7, "energy_temperature": 2.0, "shared_completion": True},
        ),
        ("revised", {"corrector_steps": 3, "corrector_size": 2, "corrector_candidates": 4}),
        ("greedy", {"do_sample": False}),
    ):
        rows = run(folder, tmp_path / f"{name}.jsonl", **changes)
        same = {"seed": 3, "num_steps": 5, "num_candidates": 3, "energy_window": (1.0, 0.4)} | changes
        assert [row["tokens"] for row in rows] == model.generate(batch_size=N, **same).tolist()
        assert rows != whole


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "p.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(PROMPTS).encode() + b"\n")
    (folder / "p.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": prompt}) for prompt in PROMPTS))
    pq.write_table(pa.table({"text": PROMPTS}), folder / "p.parquet")
    return folder


@pytest.mark.parametrize("length", [{"max_length": 22}, {"max_new_tokens": 7}, {}])
def test_prompts_keep_their_tokens(folder, prompt_files, tmp_path, length):
    changes = {"num_samples": None, "num_return_sequences": 3, "prompt_column": "text"} | length
    files = [prompt_files / f"p.{suffix}" for suffix in ("txt", "jsonl", "parquet")]
    sizes = (1, 5, 0)
    first, *others = [
        run(folder, tmp_path / f"{size}.jsonl", prompts=file, batch_size=size, **changes)
        for file, size in zip(files, sizes, strict=True)
    ]
    assert others == [first, first] and [row["row"] for row in first] == list(range(3 * len(PROMPTS)))
    ids = character_tokenizer()(PROMPTS).input_ids
    for row in first:
        prompt = ids[row["row"] // 3]
        assert row["prompt"] == PROMPTS[row["row"] // 3]
        assert len(row["tokens"]) == length.get("max_length", len(prompt) + 7 if length else LENGTH)
        assert all(a in (b, MASK) for a, b in zip(prompt, row["tokens"], strict=False))
        assert MASK not in row["tokens"] and len(row["text"]) == len(row["tokens"])
    assert len({row["text"] for row in first}) == len(first)


def test_a_row_does_not_depend_on_the_other_prompts(folder, tmp_path):
    """Not even where they are longer, and it is padded for them."""
    texts = []
    for other in ("x", "a longer one"):
        (tmp_path / "p.txt").write_text(f"the\n{other}\nriver")
        prompts = {"num_samples": None, "prompts": tmp_path / "p.txt", "max_new_tokens": 9}
        texts.append([row["text"] for row in run(folder, tmp_path / f"{other}.jsonl", **prompts)])
    assert texts[0][::2] == texts[1][::2] and texts[0][1] != texts[1][1]


def test_new_tokens_are_counted(folder, prompt_files, tmp_path, capsys):
    prompts = {"num_samples": None, "prompts": prompt_files / "p.txt"}
    run(folder, tmp_path / "a.jsonl", max_new_tokens=2, **prompts)
    assert f"4 rows, {4 * 2 + 2} new tokens" in capsys.readouterr().out  # one prompt has two masks
    run(folder, tmp_path / "b.jsonl", max_length=22, **prompts)
    given = sum(map(len, character_tokenizer()(PROMPTS).input_ids)) - 2
    assert f"4 rows, {4 * 22 - given} new tokens" in capsys.readouterr().out


def test_both_formats_load_with_datasets(whole, folder, prompt_files, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROW_GROUP", 5)
    for kind, suffix in (("json", "jsonl"), ("parquet", "parquet")):
        prompts = {"num_samples": None, "prompts": prompt_files / "p.txt", "num_return_sequences": 3}
        for name, changes in (("free", {}), ("prompted", prompts)):
            out = tmp_path / f"{name}.{suffix}"
            AcceleratorState._reset_state(reset_partial_state=True)
            generate.main(options(folder, out, **changes))
            data = load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
            assert data.column_names == COLUMNS and data["row"][:] == list(range(N))
            if name == "free":
                assert data.to_list() == whole
            else:
                assert data["prompt"][:] == [prompt for prompt in PROMPTS for _ in range(3)]


@pytest.mark.parametrize(
    "option, value, named",
    [
        ("model", "", "model must be given"),
        ("out", "x.csv", "out must end in .jsonl or .parquet, got 'x.csv'"),
        ("num_samples", "-2", "num_samples must be at least 1, .*got -2"),
        ("num_return_sequences", "2", "num_return_sequences counts samples of a prompt.*got 2"),
        ("batch_size", "-1", "batch_size must not be negative, got -1"),
        ("num_steps", "0", "num_steps must be .* at least 1, got 0"),
        ("num_candidates", "-3", "num_candidates must be .* at least 1, got -3"),
        ("energy_window", "0.2,0.8", r"energy_window must be .*got \(0.2, 0.8\)"),
        ("energy_window", "0.2,x", "energy_window must be numbers with commas between, got '0.2,x'"),
        ("energy_temperature", "0", "energy_temperature must be positive, got 0"),
        ("temperature", "-1", "temperature must be positive, got -1"),
        ("top_k", "-1", "top_k must be .* at least 0, got -1"),
        ("top_p", "1.5", r"top_p must lie in \(0, 1\], got 1.5"),
        ("max_length", "-5", "max_length must be .* at least 1, got -5"),
        ("max_length", "25", "max_length must be at most 24, the model's, got 25"),
        ("max_new_tokens", "30", "max_new_tokens must be at most 24, the model's, got 30"),
        ("seed", "-1", r"seed must lie in \[0, 2\*\*63\), got -1"),
        ("dtype", "float8", "dtype must be float32 or bfloat16, got 'float8'"),
        ("device", "tpu", "device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_are_named(folder, tmp_path, option, value, named):
    with pytest.raises(ValueError, match=named):
        generate.main([*options(folder, tmp_path / "x.jsonl"), f"--{option}", value])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, content, changes, named",
    [
        ("none.txt", None, {}, "prompts='.*none.txt' cannot be read: .*No such file"),
        ("none.parquet", None, {}, "prompts='.*none.parquet' cannot be read: .*no such file"),
        ("p.csv", "a", {}, "prompts must be .txt, .jsonl, .parquet or a Hub data set, got '.*p.csv'"),
        ("p.txt", "", {}, "prompts='.*p.txt' is empty"),
        ("p.jsonl", "", {}, "prompts='.*p.jsonl' is empty"),
        ("p.txt", "a\n\nb", {}, "p.txt': line 2 has no token: ''"),
        ("p.txt", "a\n" + "b" * 25, {}, "p.txt': line 2 has 25 tokens, more than max_length=24"),
        (
            "p.txt",
            "a\nbcd",
            {"max_new_tokens": 22},
            "line 2 has 3 tokens, more than the model's 24 less max_new_tokens=22",
        ),
        ("p.txt", "a", {"num_samples": 5}, "num_samples counts free samples, .*got 5"),
        ("p.txt", "a", {"num_return_sequences": 0}, "num_return_sequences must be .*at least 1, got 0"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"text": "a"}',
            {},
            "line 2 is no JSON object with 'prompt': '{\"text\": \"a\"}'",
        ),
        ("p.jsonl", '{"prompt": 5}', {}, "line 1 has 5, which is not text"),
        ("p.jsonl", "a", {}, "line 1 is no JSON object with 'prompt': 'a'"),
    ],
)
def test_bad_prompts_are_named(folder, tmp_path, name, content, changes, named):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=named):
        generate.main(
            options(folder, tmp_path / "x.jsonl", **{"num_samples": None, "prompts": tmp_path / name} | changes)
        )
    assert not Path(tmp_path / "x.jsonl.parts").exists()
