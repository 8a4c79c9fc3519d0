"""The judge: what is asked, what is kept, what it may cost, and what happens when the endpoint misbehaves."""

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from video_stub_judge import CASES, KEY, MODEL, RIGHT, SNAPSHOT, CutOff, Silence, Status, completion, error, serve_judge

from llava.eval.chat import Chat, Endpoint, EndpointError, RequestFailed
from llava.eval.judging import PROMPT, Cache, Case, Judge, Prompt, parse_reply
from llava.eval.tasks.base import BadEvalData
from llava.eval.tasks.video_qa import Verdict

ROOT = Path(__file__).resolve().parents[2]
YES = "{'pred': 'yes', 'score': 4}"


@pytest.fixture
def stub(monkeypatch):
    with serve_judge(monkeypatch) as server:
        yield server


@pytest.fixture
def make(stub, tmp_path):
    """Judges that wait for milliseconds; closes their caches."""
    opened = []

    def build(prompt=PROMPT, model=MODEL, options=None, timeout=5.0, tries=3, file="cache.jsonl", **settings):
        settings = {"pause": 0.001, "longest_pause": 2.0, "max_calls": 1000} | settings
        while opened:
            opened.pop().__exit__()
        opened.append(Cache(tmp_path / file))
        chat = Chat(Endpoint.from_environment(timeout), model, options, **settings)
        return Judge(chat, prompt, opened[-1], tries)

    yield build
    while opened:
        opened.pop().__exit__()


def test_every_answer_gets_a_verdict(stub, make):
    judge = make()
    outcome = judge.run(CASES)
    assert outcome.verdicts == {case.id: Verdict(case.id in RIGHT, 5 if case.id in RIGHT else 1) for case in CASES}
    assert (outcome.unparsed, outcome.failed, outcome.stopped) == ({}, {}, "")
    assert outcome.models == {SNAPSHOT} and outcome.endpoints == {f"{stub.base}/chat/completions"}
    assert (judge.chat.usage.requests, judge.chat.usage.prompt_tokens, judge.chat.usage.completion_tokens) == (
        9,
        900,
        90,
    )


def test_what_a_request_holds(stub, make):
    make().run(CASES[:1])
    _, path, headers, body = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0, 64)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    for text in ("what is number 0?", "Reference answer: cat", "Model's reply: a dog"):
        assert text in body["messages"][1]["content"]


def test_texts_are_put_in_once():
    case = Case("1", "{answer} and {pred}?", "{question}", "{pred} {0}")
    prompt = Prompt("p", "", "Q {question} A {answer} P {pred} {other} {'pred': 'yes'}")
    assert prompt.messages(case) == [
        {"role": "user", "content": "Q {answer} and {pred}? A {question} P {pred} {0} {other} {'pred': 'yes'}"}
    ]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"pred": "yes", "score": 5}', Verdict(True, 5)),
        ("{'pred': 'no', 'score': 0}", Verdict(False, 0)),
        ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),
        ('{"score": "3", "pred": "YES"}', Verdict(True, 3)),
        ('```json\n{"pred": "no",\n "score": 2}\n```', Verdict(False, 2)),
        ("Sure! {'pred': 'yes', 'score': 5} It matches.", Verdict(True, 5)),
        ("{'pred': 'yes', 'score': 5} {'pred': 'yes', 'score': 5}", Verdict(True, 5)),
        ("{'pred': 'yes', 'score': 5} {'pred': 'no', 'score': 0}", None),
        ('{"pred": "yes"}', None),
        ('{"score": 5}', None),
        ('{"pred": "yes", "score": 6}', None),
        ('{"pred": "yes", "score": -1}', None),
        ('{"pred": "yes", "score": NaN}', None),
        ('{"pred": "yes", "score": true}', None),
        ('{"pred": "yes", "score": 1%s}' % ("0" * 400), None),
        ('{"pred": "yes", "score": null}', None),
        ('{"pred": "yes", "score": [5]}', None),
        ('{"pred": true, "score": 5}', None),
        ('{"pred": "maybe", "score": 3}', None),
        ('{"pred": "not yes", "score": 3}', None),
        ("yes, 5", None),
        ("{}", None),
        ("", None),
        ("{'pred': __import__('os').getcwd(), 'score': 5}", None),
        ("{[]: 1}", None),
        ("{" * 5000, None),
        ("{'pred': 'yes', 'score': 5", None),
    ],
)
def test_replies_are_read_without_running_them(text, verdict):
    assert parse_reply(text) == verdict


PASSING = {
    "429": Status(429, error("Rate limit reached", "rate_limit_exceeded", "requests"), Retry_After=0),
    "429 with a date that is over": Status(429, "", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 with a header that is neither": Status(429, "", Retry_After="soon"),
    "408": Status(408, ""),
    "500": Status(500, error("The server had an error", None, "server_error")),
    "502 with a page": Status(502, "<html>Bad Gateway</html>"),
    "503": Status(503, error("overloaded", None, "server_error")),
    "silence": Silence(0.6),
    "broken JSON": Status(200, '{"id": "chatcmpl-1", "choices": [{"mess'),
    "no JSON": Status(200, "<html>hello</html>"),
    "no body": Status(200, ""),
    "cut off": CutOff(),
    "a list": Status(200, "[]"),
    "a number": Status(200, "5"),
    "no choices": Status(200, completion("", choices=[])),
    "choices of a wrong type": Status(200, completion("", choices={"message": "text"})),
    "no message": Status(200, completion("", choices=[{"index": 0}])),
    "no content": Status(200, completion(None)),
    "content of a wrong type": Status(200, completion([{"type": "text", "text": YES}])),
}


@pytest.mark.parametrize("trouble", sorted(PASSING))
def test_what_may_pass_is_tried_again(stub, make, trouble):
    stub.plan = [PASSING[trouble], PASSING[trouble]]
    judge = make(timeout=0.3 if trouble == "silence" else 5.0)
    outcome = judge.run(CASES[1:2])
    assert outcome.verdicts == {"1": Verdict(True, 5)}
    assert len(stub.requests) == judge.chat.usage.requests == 3


def test_usage_of_a_wrong_type_is_no_matter(stub, make):
    stub.plan = [Status(200, completion(YES, usage={"prompt_tokens": "many"}, model=None)), YES]
    stub.plan.append(Status(200, completion(YES, usage=[1])))
    judge = make()
    assert judge.run(CASES[:3], workers=1).verdicts.keys() == {"0", "1", "2"}
    assert judge.chat.usage.prompt_tokens == 100


def test_retry_after_is_honoured(stub, make):
    stub.plan = [Status(429, error("slow down"), Retry_After="0.5")]
    assert make().run(CASES[:1]).verdicts.keys() == {"0"}
    first, second = (request[0] for request in stub.requests)
    assert second - first >= 0.5


def test_waits_grow_and_stay_bounded(stub, make):
    stub.plan = [Status(500)] * 4
    judge = make(pause=0.05, longest_pause=0.1)
    assert judge.run(CASES[:1]).verdicts.keys() == {"0"}
    times = [request[0] for request in stub.requests]
    gaps = [later - before for before, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.025 and all(0.05 <= gap < 1 for gap in gaps[1:])


def test_a_server_that_asks_for_no_wait_is_not_hurried(stub, make):
    stub.plan = [Status(429, "", Retry_After=0)]
    assert make(pause=0.2).run(CASES[:1]).verdicts.keys() == {"0"}
    first, second = (request[0] for request in stub.requests)
    assert second - first >= 0.1


def test_a_wait_that_is_too_long_ends_the_run(stub, make):
    stub.always = Status(429, error("come back tomorrow"), Retry_After=86400)
    outcome = make().run(CASES, workers=1)
    assert "asks to wait 86400 s" in outcome.stopped
    assert len(stub.requests) == 1 and not outcome.verdicts


FATAL = {
    "wrong key": (Status(401, error(f"Incorrect API key provided: {KEY}.", "invalid_api_key")), "check OPENAI_API_KEY"),
    "forbidden": (Status(403, error("no access")), "check OPENAI_API_KEY"),
    "no such model": (
        Status(404, error("The model does not exist", "model_not_found")),
        "check the address, the model",
    ),
    "bad request": (Status(400, error("Unsupported parameter: 'max_tokens'")), "--request-options"),
    "no money": (Status(429, error("You exceeded your current quota", "insufficient_quota")), "answered 429"),
    "moved": (Status(302, "", Location="/elsewhere"), "answered 302"),
}


@pytest.mark.parametrize("trouble", sorted(FATAL))
def test_what_cannot_pass_ends_the_run_at_once(stub, make, trouble):
    stub.always, hint = FATAL[trouble]
    outcome = make().run(CASES, workers=2)
    assert hint in outcome.stopped and KEY not in outcome.stopped
    assert len(stub.requests) <= 2 and {request[1] for request in stub.requests} == {"/v1/chat/completions"}
    assert not outcome.verdicts and not outcome.failed


def test_a_text_that_the_endpoint_refuses_is_named_and_passed_over(stub, make):
    refused = Status(400, error("The response was filtered", "content_filter"))
    stub.always = lambda body: refused if "number 4?" in body["messages"][1]["content"] else None
    outcome = make().run(CASES)
    assert list(outcome.failed) == ["4"] and "content_filter" in outcome.failed["4"]
    assert outcome.verdicts.keys() == {case.id for case in CASES} - {"4"} and not outcome.stopped


def test_many_refused_texts_do_not_end_the_run(stub, make):
    stub.always = Status(400, error("The response was filtered", "content_filter"))
    outcome = make().run([*CASES, Case("9", "what is number 9?", "cat", "a cat")])
    assert len(outcome.failed) == 10 and not outcome.stopped


def test_an_endpoint_that_is_down_ends_the_run(stub, make):
    stub.always = Status(500, "down")
    many = [Case(str(index), "what?", "cat", f"cat {index}") for index in range(100)]
    judge = make(attempts=2)
    outcome = judge.run(many, workers=4)
    assert "no usable reply in 2 attempts" in outcome.stopped and "answered 500: down" in outcome.stopped
    assert 8 <= len(outcome.failed) <= 12 and len(stub.requests) <= 24


def test_nobody_listens(make, monkeypatch, stub):
    monkeypatch.setenv("OPENAI_API_BASE", "http://127.0.0.1:9/v1")
    outcome = make(attempts=2).run(CASES[:2])
    assert outcome.failed.keys() == {"0", "1"} and "refused" in outcome.failed["0"]


def test_replies_that_cannot_be_read_are_bounded_and_named(stub, make):
    stub.always = lambda body: "I cannot say" if "number 2?" in body["messages"][1]["content"] else None
    outcome = make(tries=3).run(CASES)
    assert list(outcome.unparsed) == ["2"] and "I cannot say" in outcome.unparsed["2"]
    assert len(stub.requests) == 8 + 3
    assert outcome.verdicts.keys() == {case.id for case in CASES} - {"2"}


def test_a_reply_that_no_file_can_hold(stub, make):
    stub.plan = [Status(200, completion(f"\ud83d {YES}"))]
    assert make().run(CASES[:1]).verdicts == {"0": Verdict(True, 4)}
    assert make().cache.rows and not make().open_cases(CASES[:1])


def test_a_reply_that_cannot_be_read_at_first(stub, make):
    stub.plan = ["Well...", YES]
    assert make().run(CASES[:1]).verdicts == {"0": Verdict(True, 4)}


def test_requests_are_sent_at_the_same_time(stub, make):
    together = threading.Barrier(4, timeout=10)
    stub.meanwhile = lambda body: together.wait()  # breaks unless four requests are there at once
    assert len(make().run(CASES[:8], workers=4).verdicts) == 8


def test_nothing_is_asked_twice(stub, make):
    first = make().run(CASES)
    again = make()
    assert again.run(CASES).verdicts == first.verdicts
    assert len(stub.requests) == 9 and again.chat.usage.requests == 0


def test_equal_answers_share_a_judgement(stub, make):
    same = [Case(str(index), "what is it?", "cat", "a cat") for index in range(5)]
    assert make().run(same).verdicts == {str(index): Verdict(True, 5) for index in range(5)}
    assert len(stub.requests) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another-judge"},
        {"prompt": Prompt("other", "", "{question} {answer} {pred}\nReference answer: cat\nModel's reply: dog")},
        {"options": {"seed": 1}},
    ],
    ids=["model", "prompt", "options"],
)
def test_other_settings_are_asked_anew(stub, make, change):
    make().run(CASES)
    outcome = make(**change).run(CASES)
    assert len(stub.requests) == 18 and len(outcome.verdicts) == 9
    assert len(make().run(CASES).verdicts) == 9 and len(stub.requests) == 18


@pytest.mark.parametrize("field", ["question", "answer", "prediction"])
def test_another_text_is_asked_anew(stub, make, field):
    make().run(CASES[:1])
    changed = Case(**(vars(CASES[0]) | {field: "something else"}))
    make().run([changed])
    assert len(stub.requests) == 2


def test_an_interrupted_run_continues(stub, make, tmp_path):
    stopped = make(max_calls=4).run(CASES)
    assert len(stopped.verdicts) == 4 and "limit of 4 requests" in stopped.stopped
    file = tmp_path / "cache.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    make(file="other.jsonl")
    file.write_bytes(b"".join(lines[:3]) + lines[3][: len(lines[3]) // 2])  # killed while writing
    outcome = make().run(CASES)
    assert outcome.verdicts.keys() == {case.id for case in CASES}
    assert len(stub.requests) == 4 + 6
    assert len(file.read_bytes().splitlines()) == 9 and len(make().cache.rows) == 9


@pytest.mark.parametrize("workers", [1, 8])
def test_the_cost_is_bounded(stub, make, workers):
    stub.always = lambda body: Status(500) if len(stub.requests) % 2 else None
    judge = make(max_calls=6)
    outcome = judge.run(CASES, workers=workers)
    assert len(stub.requests) == judge.chat.usage.requests == 6
    assert "limit of 6 requests (--max-calls) is reached" in outcome.stopped
    assert 0 < len(outcome.verdicts) < 6


def test_one_process_at_a_time(make, tmp_path):
    make()
    code = "import sys; from pathlib import Path; from llava.eval.judging import Cache; Cache(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "cache.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0 and "another process" in done.stderr


@pytest.mark.parametrize("line", ['{"key": "k", "right": 1, "score": 5}', '{"key": "k", "right": true}', "[]", "{oops"])
def test_a_file_that_holds_no_judgements_is_refused(tmp_path, line):
    path = tmp_path / "cache.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadEvalData, match=r"cache\.jsonl"):
        Cache(path)


@pytest.mark.parametrize(
    ("variable", "address", "url"),
    [
        ("OPENAI_API_BASE", "https://host/v1", "https://host/v1/chat/completions"),
        ("OPENAI_API_BASE", "https://host/v1/", "https://host/v1/chat/completions"),
        ("OPENAI_API_URL", "https://host/v1/chat/completions", "https://host/v1/chat/completions"),
        ("OPENAI_API_URL", "http://host:8000/v1?api-version=1", "http://host:8000/v1/chat/completions?api-version=1"),
    ],
)
def test_addresses(monkeypatch, variable, address, url):
    for name in ("OPENAI_API_BASE", "OPENAI_API_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, address)
    assert Endpoint.from_environment() == Endpoint(url, "")


@pytest.mark.parametrize(
    ("base", "key", "message"),
    [
        ("", KEY, "OPENAI_API_BASE"),
        ("localhost:8000/v1", KEY, "must be an address"),
        ("file:///etc/passwd", KEY, "must be an address"),
        ("http://host/v1", f"{KEY}\n{KEY}", "OPENAI_API_KEY holds"),
        ("http://host/v1", f"{KEY}ä", "OPENAI_API_KEY holds"),
    ],
)
def test_a_wrong_environment_is_named_without_the_key(monkeypatch, base, key, message):
    monkeypatch.delenv("OPENAI_API_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_BASE", base)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EndpointError, match=message) as caught:
        Endpoint.from_environment()
    assert KEY not in str(caught.value)


def test_no_key_no_header(stub, make, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make().run(CASES[:1]).verdicts
    assert "Authorization" not in stub.requests[0][2]


def test_request_options_replace_and_remove(stub, make):
    make(options={"max_tokens": None, "max_completion_tokens": 300, "temperature": None}).run(CASES[:1])
    body = stub.requests[0][3]
    assert body["max_completion_tokens"] == 300 and not {"max_tokens", "temperature"} & body.keys()


def test_a_stopped_chat_asks_no_more(stub):
    chat = Chat(Endpoint.from_environment(), MODEL)
    chat.stop()
    with pytest.raises(EndpointError, match="stopped"):
        chat.ask([])
    assert not stub.requests


def test_one_failed_request_says_why(stub):
    stub.always = Status(200, "oops")
    with pytest.raises(RequestFailed, match=r"2 attempts.*no chat completion"):
        Chat(Endpoint.from_environment(), MODEL, attempts=2, pause=0.001).ask([])
