"""`diffpref caption` with models: served over HTTP, and of transformers in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from diffpref.captions import endpoint
from diffpref.cli import main
from tests.caption_models import save_llava, save_t5
from tests.chat_server import Act, ChatServer, Question, answer_of, serving
from tests.pair_files import image_bytes, row, write


def write_pairs(path: Path, count: int) -> Path:
    rows = [
        row(float(n % 2), caption=f"a red dog beside {n} houses", jpg_0=image_bytes((n, 0, 0), (40, 30)),
            jpg_1=image_bytes((0, n, 200), (40, 30)))
        for n in range(count)
    ]  # fmt: skip
    return write(path, rows)


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*.parquet"))}


def test_a_server_that_goes_away_costs_no_answer_and_changes_no_byte(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "p.parquet", 24)

    def arguments(out: str) -> list[str]:
        return [
            "caption", "--pairs", str(pairs), "--out", str(tmp_path / out), "--method", "hybrid",
            "--captioner", "http", "--captioner.url", server.url, "--captioner.model", "m",
            "--captioner.retries", "0", "--captioner.concurrency", "3", "--perturber", "http",
            "--perturber.url", server.url, "--perturber.model", "m", "--perturber.retries", "0",
            "--rows-per-file", "10", "--batch", "4",
        ]  # fmt: skip

    server = ChatServer()
    server.start()
    assert main(arguments("whole")) == 0
    server.plan = lambda question: Act(answer_of(question), 503 if len(server.asked) > 115 else 200)
    assert main(arguments("out")) == 2
    assert "503" in capsys.readouterr().err
    assert 0 < len(parts(tmp_path / "out")) < 3
    server.plan = lambda question: Act(answer_of(question))
    assert main(arguments("out")) == 0
    server.stop()
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert set(server.answered.values()) == {2}  # once for each folder, which have journals of their own
    assert len(server.answered) == 24 * 3
    rows = [r for path in parts(tmp_path / "out") for r in pq.read_table(tmp_path / "out" / path).to_pylist()]
    assert len(rows) == 24
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["captioner.model"] == "m"
    assert server.url not in json.dumps(settings)


def test_no_caption_is_paid_for_before_the_perturber_is_reached(tmp_path, capsys):
    """A server that is gone, and a model that cannot be had; answers that are there need neither server."""
    pairs = write_pairs(tmp_path / "p.parquet", 3)
    captions, gone = ChatServer(), ChatServer()
    captions.start()

    def hybrid(*perturber: str, journal: str = "journal") -> int:
        return main(
            ["caption", "--pairs", str(pairs), "--out", str(tmp_path / "out"), "--method", "hybrid",
             "--captioner", "http", "--captioner.url", captions.url, "--captioner.model", "m",
             "--captioner.retries", "0", "--captioner.journal", str(tmp_path / journal), *perturber]
        )  # fmt: skip

    to_server = (
        "--perturber", "http", "--perturber.url", gone.url, "--perturber.model", "m",
        "--perturber.retries", "0", "--perturber.journal", str(tmp_path / "journal"),
    )  # fmt: skip
    assert hybrid(*to_server) == 2
    assert f"the server at {gone.url}/chat/completions does not answer" in capsys.readouterr().err
    assert captions.asked == []

    gone.start()
    assert hybrid(*to_server) == 0
    assert len(captions.asked) == 6
    assert (captions.knocks, gone.knocks) == (2, 1)
    captions.stop()
    gone.stop()
    shutil.rmtree(tmp_path / "out")
    assert hybrid(*to_server) == 0  # all answers are in the journal

    captions.start()
    shutil.rmtree(tmp_path / "out")
    t5 = save_t5(tmp_path / "t5")
    (t5 / "model.safetensors").unlink()
    assert hybrid("--perturber", "dipper", "--perturber.model", str(t5), journal="other") == 2
    assert str(t5) in capsys.readouterr().err
    assert len(captions.asked) == 6
    captions.stop()


def test_a_perturber_that_is_refused_everything_stops_before_many_captions_are_paid_for(tmp_path, capsys):
    """Also where the captions of an earlier run are there already, from the same server."""
    pairs = write_pairs(tmp_path / "p.parquet", 60)

    def plan(question: Question) -> Act:
        perturbs = isinstance(question.body["messages"][0]["content"], str)
        return Act("", 400, b'{"error": "I only look at pictures"}') if perturbs else Act(answer_of(question))

    with serving(plan) as server:
        arguments = [
            "caption", "--pairs", str(pairs), "--out", str(tmp_path / "out"), "--method", "hybrid",
            "--captioner", "http", "--captioner.url", server.url, "--captioner.model", "m",
            "--batch", "20", "--perturber", "http", "--perturber.url", server.url, "--perturber.model", "m",
        ]  # fmt: skip
        for _ in range(2):
            assert main(arguments) == 2
            assert "answers no request" in capsys.readouterr().err
            assert len(server.answered) == 40
            endpoint.endpoint.cache_clear()  # as in a new process


def test_answers_that_hold_no_caption_are_counted_apart(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "p.parquet", 12)

    def plan(question: Question) -> Act:
        lists = "beside 3 " in question.text or "beside 8 " in question.text
        chatty = f"Here is the caption:\n\n**{answer_of(question)}.**\n\nLet me know if you need more!"
        return Act("- a dog\n- some houses" if lists else chatty)

    with serving(plan) as server:
        arguments = [
            "caption", "--pairs", str(pairs), "--out", str(tmp_path / "out"), "--method", "captioning",
            "--captioner", "http", "--captioner.url", server.url, "--captioner.model", "m",
            "--max-failed-share", "0.2",
        ]  # fmt: skip
        assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "left out, of whose model's answer no caption could be taken  2" in shown
    assert "it has several lines, a list (- a dog / - some houses)" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["kept"], report["dropped"]["unreadable_answer"], report["dropped"]["captioner"]) == (
        10,
        2,
        0,
    )
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    captions = pq.read_table(part)["caption_0"].to_pylist()
    assert all(text.startswith("a caption of ") and text.endswith(".") for text in captions)


def test_models_of_transformers_caption_and_paraphrase_alike_in_any_batch_and_process(tmp_path):
    pairs = write_pairs(tmp_path / "p.parquet", 6)
    llava, t5 = save_llava(tmp_path / "llava"), save_t5(tmp_path / "t5")

    def run(out: Path, *more: str) -> list[dict]:
        assert main(
            ["caption", "--pairs", str(pairs), "--out", str(out), "--method", "hybrid",
             "--captioner", "transformers", "--captioner.model", str(llava),
             "--captioner.max_new_tokens", "12", "--perturber", "dipper", "--perturber.model", str(t5),
             "--perturber.max_new_tokens", "12", "--rows-per-file", "3", "--max-failed-share", "0.9", *more]
        ) == 0  # fmt: skip
        return [r for path in parts(out) for r in pq.read_table(out / path).to_pylist()]

    rows = run(tmp_path / "out", "--batch", "2", "--workers", "2")
    assert rows
    for found in rows:
        lost = int(found["label_0"])
        assert found[f"origin_{lost}"]["perturber"]["revision"].startswith("sha256:")
        assert found[f"origin_{lost}"]["before"]
        assert found[f"origin_{1 - lost}"]["captioner"]["model"] == str(llava)
    run(tmp_path / "one", "--batch", "1")
    assert parts(tmp_path / "one") == parts(tmp_path / "out")
