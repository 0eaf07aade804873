"""Captions through a chat endpoint, against a real server that misbehaves in every way."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import shlex
import socket
import threading
import time
import traceback

import numpy as np
import pytest
from PIL import Image

from diffpref.captions import CAPTIONERS, PERTURBERS, Captioned, Perturbed, Provenance, endpoint
from diffpref.errors import UserError
from tests.caption_inputs import pictures, prompts
from tests.chat_server import Act, ChatServer, Question, answer_of, good, serving

KEY = "sk-very-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits; a client for each test."""
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.01)
    endpoint.endpoint.cache_clear()


def captioner(server: ChatServer, **settings):
    return CAPTIONERS["http"](**{"url": server.url, "model": "tiny", "timeout": 20.0, **settings})


def run(server: ChatServer, count: int, **settings) -> list[Captioned]:
    return captioner(server, **settings)(pictures(count), prompts(count), range(count))


def expected(count: int, **settings) -> list[Captioned]:
    """What a well-behaved server answers."""
    with serving() as server:
        return run(server, count, **settings)


def picture_in(question: Question) -> Image.Image:
    head, _, data = question.body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def test_the_server_gets_picture_prompt_and_settings():
    with serving() as server:
        (result,) = run(server, 1, image_format="png", seed=7, max_new_tokens=99, max_tokens=33)
    (question,) = server.asked
    assert result == Captioned(answer_of(question))
    assert question.path == "/v1/chat/completions"
    assert "Authorization" not in question.headers
    assert np.array_equal(np.asarray(picture_in(question)), np.asarray(pictures(1)[0].convert("RGB")))
    assert prompts(1)[0] in question.text
    assert "33 tokens" in question.text
    body = {name: value for name, value in question.body.items() if name != "messages"}
    assert body == {"model": "tiny", "temperature": 0.0, "max_tokens": 99, "seed": 7}


def test_large_pictures_are_sent_smaller():
    with serving() as server:
        captioner(server, max_side=64)([Image.new("RGB", (200, 100), "red")], [""], [0])
    picture = picture_in(server.asked[0])
    assert (picture.size, picture.format) == ((64, 32), "JPEG")


def test_extra_fields_join_the_request_and_null_takes_out():
    with serving() as server:
        run(server, 1, extra='{"top_k": 5, "seed": null}')
    assert server.asked[0].body["top_k"] == 5
    assert "seed" not in server.asked[0].body


def test_rows_are_part_of_the_seed_only_where_tokens_are_drawn():
    same = ([pictures(1)[0]] * 3, ["x"] * 3, [0, 1, 2])
    with serving() as server:
        captioner(server)(*same)
        assert len(server.asked) == 1  # equal questions are asked once
        captioner(server, temperature=0.5)(*same)
    assert len({question.body["seed"] for question in server.asked[1:]}) == 3


TROUBLES = [
    Act("", status=429, raw=b'{"error": {"message": "slow down"}}', headers={"Retry-After": "0.05"}),
    Act("", status=500, raw=b"<html>oops"),
    Act("", raw=b"{not json"),
    Act("", raw=b'{"choices": []}'),
    Act("", raw=b'{"choices": [{"message": {"content": 5}}]}'),
    Act("", raw=b"[]"),
    Act("half", die=True),
    Act("half", die=True, chunked=True),
    Act("", raw=b'{"error": {"code": 503, "message": "upstream"}}'),
    Act("", status=503, raw=b"", headers={"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
]


def test_trouble_of_all_kinds_loses_and_doubles_nothing():
    def plan(question: Question) -> Act:
        first = int(question.name, 16)
        trouble = TROUBLES[(first + question.attempt) % len(TROUBLES)]
        return Act(answer_of(question), chunked=first % 2 == 0) if question.attempt == 4 else trouble

    with serving(plan) as server:
        results = run(server, 14, concurrency=4)
    assert results == expected(14)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 14
    assert len(server.asked) == 14 * 5
    assert server.peak <= 4


def test_slow_answers_are_asked_for_again():
    def plan(question: Question) -> Act:
        return Act(answer_of(question), delay=1.5 if question.attempt == 0 else 0.0)

    with serving(plan) as server:
        assert run(server, 3, timeout=0.3) == expected(3)
    assert sorted(question.attempt for question in server.asked) == [0, 0, 0, 1, 1, 1]


def test_a_server_that_dribbles_is_cut_off_at_the_timeout():
    def drip(server_socket):
        connection, _ = server_socket.accept()
        connection.recv(1 << 20)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with connection:
            for _ in range(100):
                try:
                    connection.sendall(b" " * 8)
                except OSError:
                    return
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        server = ChatServer()
        server.port = listening.getsockname()[1]
        (result,) = run(server, 1, timeout=0.4, retries=0)
    assert result.text == ""
    assert "no answer within 0.4 s" in result.failure


def test_the_limit_of_concurrency_is_used_and_kept():
    with serving(lambda question: Act(answer_of(question), delay=0.05)) as server:
        run(server, 24, concurrency=3)
    assert 2 <= server.peak <= 3


def test_retry_after_holds_back_every_request():
    def plan(question: Question) -> Act:
        if question == server.asked[0]:
            return Act("", status=429, raw=b"{}", headers={"Retry-After": "0.6"})
        return Act(answer_of(question), delay=0.1)

    with serving(plan) as server:
        assert run(server, 8, concurrency=3) == expected(8)
    # those under way with the first one end, the others wait
    assert all(question.time - server.asked[0].time >= 0.6 for question in server.asked[3:])


def test_a_server_that_dies_half_way_and_comes_back(tmp_path):
    def plan(question: Question) -> Act:
        return Act(answer_of(question), delay=0.02)

    with serving(plan) as server:

        def interrupt() -> None:
            while len(server.answered) < 6:
                time.sleep(0.005)
            server.stop()
            time.sleep(0.3)
            server.start()

        thread = threading.Thread(target=interrupt)
        thread.start()
        results = run(server, 20, concurrency=4, journal=str(tmp_path))
        thread.join()
    assert results == expected(20)
    assert len(server.answered) == 20
    # those that it had answered when it died may have been lost on the way, one for each connection
    assert sum(server.answered.values()) <= 20 + 4


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (
            Act("", status=401, raw=b'{"error": {"message": "bad key ' + KEY.encode() + b'"}}'),
            "bad key [key]",
        ),
        (Act("", status=403, raw=b'{"detail": "no"}'), "api_key_env"),
        (Act("", status=404, raw=b'{"error": "no such model"}'), "no such model"),
        (Act("", status=302, raw=b"", headers={"Location": "http://elsewhere/v1"}), "http://elsewhere/v1"),
        (Act("", status=429, raw=b'{"error": {"code": "insufficient_quota"}}'), "account"),
    ],
)
def test_what_concerns_all_stops_at_once_and_keeps_what_was_paid(tmp_path, monkeypatch, act, said):
    monkeypatch.setenv("SOME_KEY", KEY)
    settings = {"journal": str(tmp_path), "api_key_env": "SOME_KEY", "concurrency": 1}
    with serving(lambda question: good(question) if len(server.asked) <= 5 else act) as server:
        with pytest.raises(UserError) as raised:
            run(server, 12, **settings)
        assert len(server.asked) == 6
        assert said in str(raised.value)
        assert "5 answers are kept" in str(raised.value)
        server.plan = good
        assert run(server, 12, **settings) == expected(12)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 12


def test_no_server_is_the_users_mistake():
    server = ChatServer()
    with pytest.raises(UserError, match="does not answer") as raised:
        run(server, 3, retries=1)
    assert "2 tries" in str(raised.value)
    assert "there is no journal" in str(raised.value)


REFUSALS = [
    Act("", status=400, raw=b'{"error": {"message": "unsafe picture"}}'),
    Act("", status=413, raw=b""),
    Act("", status=422, raw=b'{"detail": "no"}'),
    Act("half a sen", finish="content_filter"),
    Act("", raw=json.dumps({"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}).encode()),
    Act(""),
    Act("  \n"),
    Act("", raw=b"garbage"),
    Act("<think>hm, this picture"),
]


def test_refusals_are_failures_of_one_picture():
    order: dict[str, int] = {}

    def plan(question: Question) -> Act:
        place = order.setdefault(question.name, len(order))
        return REFUSALS[place // 2] if place % 2 else good(question)

    with serving(plan) as server:
        results = run(server, 18, concurrency=1, retries=2)
    assert results[::2] == expected(18)[::2]
    for act, result in zip(REFUSALS, results[1::2], strict=True):
        assert result.text == "", act
        assert result.failure, act
    assert "unsafe picture" in results[1].failure
    assert "I cannot" in results[9].failure
    assert "3 tries" in results[15].failure
    assert len(server.asked) == 18 + 2  # garbage is asked for again, a refusal is final


def test_a_server_that_refuses_everything_stops_the_run_early():
    refusal = Act("", status=400, raw=b'{"error": "no images here"}')
    with serving(lambda _: refusal) as server, pytest.raises(UserError, match="no images here"):
        run(server, 40, concurrency=2)
    assert len(server.asked) < 15


def openai(name: str, message: str, code: str) -> tuple[int, dict]:
    error = {"message": message, "type": "invalid_request_error", "param": name, "code": code}
    return 400, {"error": error}


REFUSED_FIELDS = {
    "OpenAI, another name": ("max_tokens", *openai(
        "max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.", "unsupported_parameter")),
    "OpenAI, another value": ("temperature", *openai(
        "temperature", "Unsupported value: 'temperature' does not support 0 with this model. "
        "Only the default (1) value is supported.", "unsupported_value")),
    "OpenAI, long ago": ("seed", 400, {"error": {
        "message": "Unrecognized request argument supplied: seed", "type": "invalid_request_error"}}),
    "pydantic": ("seed", 422, {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}),
    "pydantic in text": ("seed", 400, {"object": "error", "message":
        "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted'}]"}),
    "Google": ("seed", 400, {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message":
        'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}}),
    "Google in a list": ("seed", 400, [{"error": {"message": 'Unknown name "seed": Cannot find field.'}}]),
    "plain": ("seed", 400, {"error": "unknown field seed"}),
    "llama.cpp": ("max_tokens", 500, {"error": {"code": 500, "message": "Unsupported param: max_tokens"}}),
    "Anthropic": ("seed", 400, {"error": {"message": "seed: Extra inputs are not permitted"}}),
    "JSON schema": ("seed", 400, {"error": "Additional properties are not allowed ('seed' was unexpected)"}),
    "Python": ("seed", 500, {"error": "create() got an unexpected keyword argument 'seed'"}),
    "in other words": ("seed", 400, {"message": "This model does not accept the parameter seed."}),
    "invalid": ("max_tokens", 400, {"error": {"message": "Invalid parameter: max_tokens"}}),
    "not there": ("seed", 501, {"message": "seed is not implemented"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_a_field_that_a_server_refuses_is_named_with_the_option_that_leaves_it_out(case):
    """And that option works: it is taken from the message, as a user would."""
    field, status, answer = REFUSED_FIELDS[case]
    refusal = Act("", status=status, raw=json.dumps(answer).encode())

    def plan(question: Question) -> Act:
        return refusal if field in question.body else Act(answer_of(question))

    extra = '{"top_k": 5}'
    with serving(plan) as server:
        with pytest.raises(UserError, match=f"does not take {field}") as raised:
            run(server, 20, concurrency=1, extra=extra)
        assert len(server.asked) == 1
        given = shlex.split(raised.value.fix.partition(";")[0])
        assert given[:2] == ["give", "--captioner.extra"]
        results = run(server, 20, extra=given[2])
        assert all(result.text for result in results)
        (body,) = {json.dumps(dict(q.body, messages=0)) for q in server.asked[1:]}
    added = {"max_completion_tokens": 256} if field == "max_tokens" else {}
    sent = {"model": "tiny", "temperature": 0.0, "max_tokens": 256, "seed": 0, "top_k": 5, **added}
    assert json.loads(body) == {name: value for name, value in sent.items() if name != field} | {
        "messages": 0
    }


def test_fields_refused_one_after_the_other_and_one_of_the_users_own():
    def plan(question: Question) -> Act:
        for name in ("seed", "max_tokens", "max_completion_tokens", "top_k"):
            if name in question.body:
                return Act("", status=400, raw=json.dumps({"error": f"unknown field {name}"}).encode())
        return good(question)

    extra = '{"top_k": 5}'
    with serving(plan) as server:
        perturb = {"url": server.url, "model": "tiny", "max_new_tokens": 99}
        seen = []
        for _ in range(4):
            with pytest.raises(UserError) as raised:
                PERTURBERS["http"](extra=extra, **perturb)(["a dog"], [0])
            extra = shlex.split(raised.value.fix.partition(";")[0])[2]
            seen.append(json.loads(extra))
        (result,) = PERTURBERS["http"](extra=extra, **perturb)(["a dog"], [0])
    assert "--perturber.extra" in raised.value.fix
    assert result.changed
    assert seen[1] == {"top_k": 5, "seed": None, "max_tokens": None, "max_completion_tokens": 99}
    assert seen[3] == {"seed": None, "max_tokens": None}


ROWS_OWN = [
    "'max_tokens' is too large: 256. This model's maximum context length is 2048 tokens and your request has "
    "1900 input tokens",
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4744 in the "
    "messages, 256 in the completion). Please reduce the length of the messages or completion.",
    "The picture is not supported. No seed was tried",
    "A sunflower seed: this prompt is not allowed",
    "unknown error",
    "max_tokens must be at least 1, got -30",
    "The seed of an unknown plant is not allowed in pictures",
]


@pytest.mark.parametrize("message", ROWS_OWN)
def test_what_concerns_one_row_is_no_refused_field(message):
    def plan(question: Question) -> Act:
        raw = json.dumps({"error": {"message": message, "code": 400}}).encode()
        return Act("", status=400, raw=raw) if len(server.asked) == 2 else good(question)

    with serving(plan) as server:
        results = run(server, 3, concurrency=1)
    assert [bool(result.failure) for result in results] == [False, True, False]


@pytest.mark.parametrize("detail", ["", "low", "high"])
def test_how_closely_the_server_is_to_look(detail):
    with serving() as server:
        run(server, 1, detail=detail)
    picture = server.asked[0].body["messages"][0]["content"][0]["image_url"]
    assert picture.get("detail", "") == detail
    assert set(picture) == ({"url", "detail"} if detail else {"url"})
    with pytest.raises(UserError, match=r"captioner\.detail"):
        run(server, 1, detail="close")


def test_a_server_is_reached_without_being_asked_for_an_answer(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with serving() as server:
        perturb = PERTURBERS["http"](url=server.url, model="m", retries=1, api_key_env="SOME_KEY")
        for status, body in [(200, b"[]"), (404, b"<html>"), (501, b""), (403, b""), (302, b""), (503, b"")]:
            server.list_of_models = status, body
            perturb.reach()
        server.list_of_models = 401, b'{"error": {"message": "Missing scopes: api.model.read"}}'
        perturb.reach()  # a key that is good for answers alone
        assert server.asked == []
        assert server.knocks == 7
        server.list_of_models = 401, b'{"error": {"message": "no such key ' + KEY.encode() + b'"}}'
        with pytest.raises(UserError, match=r"no such key \[key\]"):
            perturb.reach()
    with pytest.raises(UserError, match=r"does not answer(?s:.*)2 tries"):
        perturb.reach()
    with socket.create_server(("127.0.0.1", 0)) as listening:  # takes connections and says nothing
        place = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        PERTURBERS["http"](url=place, model="m", timeout=0.2).reach()


def test_an_answer_cut_at_the_limit_ends_with_a_sentence():
    with serving(lambda _: Act("A dog. It runs. And th", finish="length")) as server:
        assert run(server, 1) == [Captioned("A dog. It runs.")]


def test_the_journal_spares_every_request_and_works_with_another_server(tmp_path):
    with serving() as server:
        first = run(server, 8, journal=str(tmp_path))
    endpoint.endpoint.cache_clear()
    with serving() as other:
        assert run(other, 8, journal=str(tmp_path), api_key_env="") == first
    assert other.asked == []


def test_the_key_is_seen_by_the_server_alone(tmp_path, monkeypatch, caplog, capfd):
    """The server repeats it in every answer, and everything that can be logged is."""
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)

    def plan(question: Question) -> Act:
        assert question.headers["Authorization"] == f"Bearer {KEY}"
        place = len(server.asked)
        if place == 3:
            return Act("", status=500, raw=json.dumps({"error": f"key {KEY} failed"}).encode())
        if place == 5:
            return Act("", status=400, raw=json.dumps({"error": f"key {KEY} refused"}).encode())
        if place == 9:
            return Act("", status=401, raw=json.dumps({"error": {"message": KEY}}).encode())
        return Act(f"{answer_of(question)} {KEY}")

    with serving(plan) as server:
        asks = captioner(server, api_key_env="SOME_KEY", journal=str(tmp_path), concurrency=1)
        results = asks(pictures(6), prompts(6), range(6))
        with pytest.raises(UserError) as raised:
            asks(pictures(9), prompts(9), range(9))
    assert all(question.headers["Authorization"] == f"Bearer {KEY}" for question in server.asked)
    shown = "".join(traceback.format_exception(raised.value))
    seen = [
        *(str(results), repr(asks), str(dataclasses.asdict(asks)), str(asks.provenance()), str(vars(asks))),
        *(caplog.text, *capfd.readouterr(), shown, repr(raised.value)),
        *(file.read_text() for file in tmp_path.iterdir()),
    ]
    assert "[key]" in "".join(seen)
    assert "[key]" in caplog.text
    assert all(KEY not in text for text in seen)
    assert len("".join(file.read_text() for file in tmp_path.iterdir())) > 0


@pytest.mark.parametrize("before", range(250, 310, 7))
def test_no_half_of_a_key_is_left_where_a_long_message_is_cut(monkeypatch, before):
    monkeypatch.setenv("SOME_KEY", KEY)
    text = "\x1b[31m" + "x" * before + KEY
    for act in (Act(status=400, raw=json.dumps({"error": text}).encode()), Act(status=200, raw=json.dumps(
        {"choices": [{"message": {"content": None, "refusal": text}}]}).encode())):  # fmt: skip
        with serving(lambda _, act=act: act) as server:
            (result,) = captioner(server, api_key_env="SOME_KEY")(pictures(1), prompts(1), [0])
        assert "xxx" in result.failure
        assert KEY[:8] not in result.failure
        assert result.failure.isprintable()


@pytest.mark.parametrize("value", ["", "  ", "two words", "line\nend", "schlüssel"])
def test_a_variable_without_a_key_is_refused_without_being_shown(monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UserError, match="SOME_KEY") as raised:
        captioner(ChatServer(), api_key_env="SOME_KEY")
    assert not value.strip() or value not in str(raised.value)


def test_a_netrc_file_adds_nothing(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serving() as server:
        run(server, 1)
    assert "Authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "localhost:8000"}, "http://localhost:8000/v1"),
        ({"url": "http://me:mine@host/v1"}, "environment variable"),
        ({"url": "https://host/v1?key=abc"}, "environment variable"),
        ({"url": "http://[::1/v1"}, "no address"),
        ({"model": " "}, "no name"),
        ({"extra": "{"}, "no JSON"),
        ({"extra": "[]"}, "no JSON object"),
        ({"extra": '{"model": "x"}'}, "'model'"),
        ({"image_format": "gif"}, "jpeg"),
        ({"concurrency": 0}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"template": "missing.txt"}, "missing.txt"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(UserError) as raised:
        CAPTIONERS["http"](**{"url": "http://localhost:1/v1", "model": "tiny", **settings})
    assert said in str(raised.value)


def test_a_journal_that_cannot_be_written_is_the_users_mistake(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    with serving() as server, pytest.raises(UserError, match="journal"):
        run(server, 1, journal=str(place))


def test_perturbed_captions_come_from_the_level_s_instruction(tmp_path):
    (tmp_path / "mine-strong.txt").write_text("Make it {level}: {caption}")
    captions = ["a {red} dog", "", "a cat", "\u200b"]
    with serving(lambda question: Act(f'"{question.text.removeprefix("Make it strong: ")}!"')) as server:
        perturb = PERTURBERS["http"](
            url=server.url, model="tiny", level="strong", template=str(tmp_path / "mine-{level}.txt"), seed=3
        )
        results = perturb(captions, range(4))
    assert results == [
        Perturbed("a {red} dog!", True),
        Perturbed("", False),
        Perturbed("a cat!", True),
        Perturbed("\u200b", False),
    ]
    assert len(server.asked) == 2
    assert len({question.body["seed"] for question in server.asked}) == 2
    assert perturb.provenance() == Provenance(
        "http", "tiny", template=perturb.provenance().template, seed=3, level="strong"
    )


def test_a_perturber_s_failures_leave_the_caption():
    acts = {"a": Act("", status=400, raw=b"{}"), "b": Act("b"), "c": Act("- one\n- two"), "d": Act("e")}
    with serving(lambda question: acts[question.text[-1]]) as server:
        results = PERTURBERS["http"](url=server.url, model="tiny")(["a", "b", "c", "d"], range(4))
    assert [result.text for result in results] == ["a", "b", "c", "e"]
    assert [result.changed for result in results] == [False, False, False, True]
    assert [bool(result.failure) for result in results] == [True, False, True, False]


def test_shipped_instructions_differ_by_level():
    digests = {
        PERTURBERS["http"](url="http://h/v1", model="m", level=level).provenance().template
        for level in ("weak", "medium", "strong")
    }
    assert len(digests) == 3
