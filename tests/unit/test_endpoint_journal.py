"""Answers on disk: nothing is asked twice after a kill, whatever the kill left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from diffpref.captions.journal import Journal, request_key
from diffpref.errors import UserError
from tests.caption_inputs import prompts
from tests.chat_server import Act, ChatServer, answer_of, serving

CLIENT = """
import json, sys
from diffpref.captions import CAPTIONERS
from tests.caption_inputs import pictures, prompts
url, journal, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ask = CAPTIONERS["http"](url=url, model="tiny", concurrency=3, journal=journal)
print("ready", flush=True)
for start in range(0, count, 6):
    part = slice(start, start + 6)
    found = ask(pictures(count)[part], prompts(count)[part], range(count)[part])
    print(json.dumps([result.text for result in found]), flush=True)
"""
COUNT = 24


def client(server: ChatServer, journal) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLIENT, server.url, str(journal), str(COUNT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kept(journal) -> int:
    """Whole answers in the files of a journal."""
    lines = [line for file in journal.glob("*.jsonl") for line in file.read_bytes().splitlines(keepends=True)]
    return sum(line.endswith(b"\n") for line in lines)


def test_kill_9_in_the_middle_then_only_the_rest_is_asked(tmp_path):
    with serving(lambda question: Act(answer_of(question), delay=0.03)) as server:
        process = client(server, tmp_path)
        while len(server.answered) < 10:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before, saved = len(server.asked), kept(tmp_path)
        assert 0 < saved < COUNT
        again = client(server, tmp_path)
        output, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert len(server.asked) - before == COUNT - saved
    assert len(server.answered) == COUNT
    # an answer on its way when the process died is the only kind that is paid for twice
    assert sum(server.answered.values()) - COUNT <= 3
    texts = [text for line in output.splitlines()[1:] for text in json.loads(line)]
    wanted = [next(answer_of(q) for q in server.asked if prompt in q.text) for prompt in prompts(COUNT)]
    assert texts == wanted


def keys(count: int) -> list[str]:
    return [request_key({"number": i}) for i in range(count)]


def test_answers_are_found_by_later_processes(tmp_path):
    first = Journal(tmp_path)
    for i, key in enumerate(keys(50)):
        first.add(key, f"answer {i}\n“ünïcode” \u2028 {i}")
        assert first.get(key) == f"answer {i}\n“ünïcode” \u2028 {i}"
    second = Journal(tmp_path)
    second.add(keys(51)[50], "of the second")
    third = Journal(tmp_path)
    assert third.count() == 51
    assert [third.get(key) for key in keys(50)] == [first.get(key) for key in keys(50)]
    assert third.get(keys(51)[50]) == "of the second"
    assert third.get(keys(52)[51]) is None
    assert len(list(tmp_path.iterdir())) == 2  # who only reads makes no file


@pytest.mark.parametrize("cut", [1, 20, 70, 85])
def test_a_torn_last_line_costs_one_answer(tmp_path, cut):
    writer = Journal(tmp_path)
    for i, key in enumerate(keys(5)):
        writer.add(key, f"answer {i}")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    reader = Journal(tmp_path)
    assert [reader.get(key) for key in keys(5)] == [*(f"answer {i}" for i in range(4)), None]
    reader.add(keys(5)[4], "again")
    assert Journal(tmp_path).get(keys(5)[4]) == "again"


def test_damaged_lines_are_left_out(tmp_path):
    writer = Journal(tmp_path)
    writer.add(keys(2)[0], "good")
    junk = [b"\xff\xfe\n", b"[]\n", b'{"key": 5, "answer": "x"}\n', b'{"key": "zz", "answer": "x"}\n', b"\n"]
    junk += [json.dumps({"key": keys(2)[1], "answer": None}).encode() + b"\n"]
    (tmp_path / "other.jsonl").write_bytes(b"".join(junk))
    reader = Journal(tmp_path)
    assert reader.count() == 1
    assert reader.get(keys(2)[0]) == "good"


def test_keys_that_begin_alike_are_told_apart(tmp_path):
    alike = [f"{'ab' * 8}{i:048x}" for i in range(3)]
    writer = Journal(tmp_path)
    writer.add(alike[0], "first")
    assert writer.get(alike[1]) is None
    other = Journal(tmp_path)
    other.add(alike[1], "second")
    reader = Journal(tmp_path)
    assert [reader.get(key) for key in alike] == ["first", "second", None]


def test_a_request_is_known_by_its_content_alone():
    assert request_key({"a": 1, "b": [1, 2]}) == request_key({"b": [1, 2], "a": 1})
    assert request_key({"a": 1, "b": [1, 2]}) != request_key({"a": 1, "b": [2, 1]})


def test_a_full_disk_is_the_users_mistake_and_tears_nothing(tmp_path, monkeypatch):
    import os

    writer = Journal(tmp_path)
    writer.add(keys(3)[0], "first")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with pytest.raises(UserError, match="cannot be written"):
        writer.add(keys(3)[1], "second")
    monkeypatch.undo()
    writer.add(keys(3)[2], "third")
    reader = Journal(tmp_path)
    assert [reader.get(key) for key in keys(3)] == ["first", None, "third"]
    assert [writer.get(key) for key in keys(3)] == ["first", None, "third"]
