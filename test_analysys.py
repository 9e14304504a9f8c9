"""Tests of analysys.py: ``python3 -m pytest``. Each name states its rule; the sections follow the file's.

Servers, proxies and processes are real, on free loopback ports; nothing waits for the clock but `wait_until`.
"""
import _thread
import base64
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import decimal
import email.utils
import enum
import errno
import fractions
import functools
import gc
import gzip
import hashlib
import http.client
import inspect
import io
import itertools
import json
import logging
import numbers as numbers_module
import os
import pathlib
import pickle
import platform
import random
import re
import runpy
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tokenize
import traceback
import tracemalloc
import types
import unicodedata
import urllib.request
import weakref
import zipfile
import zlib

import pytest

import analysys
from analysys import AnalysysPythonSdk, BatchCollecter, DefaultCollecter, LogCollecter

IllegalData = analysys.AnalysysPythonSdkIllegalDataException
NetworkError = analysys.AnalysysPythonSdkNetworkException
FileError = analysys.AnalysysPythonSdkFileException

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.abspath(analysys.__file__)
URL = "http://127.0.0.1:1"                              # nobody listens there
WHEN = 1532514947500                                   # the trackers' clock here, in ms
NEVER = 10 ** 6                                        # seconds or records: more than any test lasts or sends
SPARE = 1 if getattr(sys, "_is_gil_enabled", lambda: True)() else 4    # times the memory: without the GIL it is freed later
linux_only = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)        # else each process of ours compiles the file anew
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # a shell's background job; our processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, signals and RLIMIT_FSIZE")


# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "PYTHONIOENCODING"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _shared(request):
    """Have other pytests run tests from the last one on: who claims a test, by a link, runs it; the others pass it by."""
    session, claims, me = request.session, os.environ.get("CLAIMS"), "a helper"

    def claim(item):
        path = os.path.join(claims, hashlib.sha256(item.nodeid.encode()).hexdigest())
        try:
            os.symlink(me, path)                       # which tells who it was from its first moment
            return True
        except FileExistsError:
            if me == "a helper" and os.readlink(path) == "the first" and item is not session.items[0]:
                session.shouldstop = "they have met"
            return False

    def share(item, test):
        item.obj = lambda **arguments: test(**arguments) if claim(item) else None
    with contextlib.ExitStack() as stack:
        helpers = []
        if claims:
            session.items[1:] = session.items[:0:-1]
        elif len(session.items) > 100 and os.cpu_count() > 1 and hasattr(os, "fork"):
            claims, me = stack.enter_context(tempfile.TemporaryDirectory()), "the first"
            command = "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", os.path.abspath(__file__)
            helpers = [stack.enter_context(launch(*command, seconds=900, env={"CLAIMS": claims}, stderr=subprocess.STDOUT))
                       for _ in range(min(os.cpu_count(), 4))]         # one more than CPUs, since many tests wait
        for item in session.items if claims else ():
            share(item, item.obj)
        yield
        for item in session.items if helpers else ():  # nothing is left for them if we end early
            claim(item)
        for helper in helpers:
            output = helper.communicate()[0].decode()
            assert helper.returncode in (0, 2), "in a helper:\n" + output


def wait_until(condition, seconds=20):
    """Return as soon as *condition()* is true; fail when it is not so in time."""
    deadline, pause = time.monotonic() + seconds, 0.0005
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        threading.Event().wait(pause)
        pause = min(pause * 2, 0.01)


def table(names, rows):
    """Parametrize with ids that stay short whatever the value."""
    def name(value):
        try:
            return ascii(value)[:40]
        except Exception:                              # too deep or too long for repr()
            return type(value).__name__
    return pytest.mark.parametrize(names, rows, ids=name)


@contextlib.contextmanager
def launch(*command, seconds=120, env=(), **options):
    """Start this Python with analysys.py importable; yield the Popen object; kill it after the block or the *seconds*."""
    options = {**dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE), **options}
    env = {**os.environ, "PYTHONPATH": os.path.dirname(SOURCE), "PYTHONIOENCODING": "utf-8", **dict(env)}
    with subprocess.Popen([sys.executable] + [str(part) for part in command], env=env, **options) as started:
        timer = threading.Timer(seconds, started.kill)
        timer.start()
        try:
            yield started
        finally:
            timer.cancel()
            started.kill()


Ended = collections.namedtuple("Ended", "status out err")


def ended(started):
    out, err = started.communicate()
    return Ended(started.returncode, out.decode(), err.decode())


def ended_well(started):
    done = ended(started)
    assert done.status == 0 and "Traceback" not in done.err, done.err
    return done


def python(*arguments, cwd=None, **env):
    """Run this Python to its end."""
    with launch(*arguments, cwd=cwd and str(cwd), env=env) as started:
        return ended(started)


class Sink:
    """A user's own collecter: it keeps what it is given."""

    def __init__(self):
        self.records, self.calls = [], []

    def uploadData(self, record):
        self.records.append(record)

    def flush(self, timeout=10):
        self.calls.append(("flush", timeout))

    def close(self, timeout=10):
        self.calls.append(("close", timeout))


class BrokenSink(Sink):
    def uploadData(self, record):
        raise RuntimeError("the sink is broken")

    flush = close = uploadData


def tracker_to(collecter=None, **options):
    """Return a tracker with an app id and a clock that stands still, on a Sink unless told otherwise."""
    tracker = AnalysysPythonSdk(collecter or Sink(), **options)
    tracker.sink, tracker._clock = tracker._collecter, functools.partial(float, WHEN / 1000)       # which pickle knows
    tracker.setAppId("app")
    return tracker


COLLECTERS = ["DefaultCollecter(url)", "BatchCollecter(url)", "LogCollecter(folder)", "LogCollecter(folder, True)",
              "LogCollecter(folder, general_rule='day')"]
each_collecter = pytest.mark.parametrize("kind", COLLECTERS)


def make(kind, url, folder):
    return eval(kind, vars(analysys), {"url": url, "folder": str(folder)})


def record(xwho, xwhat, properties=(), platform="python", is_login=False, debug=0, appid="app", xwhen=1532514947500):
    context = {"$lib": "python", "$lib_version": analysys.__version__,
               "$platform": platform, "$is_login": is_login, "$debug": debug}
    return {"appid": appid, "xwho": xwho, "xwhat": xwhat, "xwhen": xwhen, "xcontext": dict(properties, **context)}


def events(sdk, count, start=0):
    for number in range(start, start + count):
        sdk.track("u", "Event", {"n": number})


def numbers(records):
    return [one["xcontext"]["n"] for one in records]


def encode(data):
    return base64.b64encode(gzip.compress(data if isinstance(data, bytes) else json.dumps(data).encode()))


def decode(body):
    """Return the JSON value of a body or an answer, plain or encoded."""
    return json.loads((body if body[:1] in (b"[", b"{") else gzip.decompress(base64.b64decode(body))).decode())


def answer(status=200, body=b'{"code":200}', *headers):
    """Return the bytes of an HTTP answer."""
    head = ["HTTP/1.1 %d Test" % status, "Content-Length: %d" % len(body)] + list(headers)
    return "\r\n".join(head + ["", ""]).encode() + body


Request = collections.namedtuple("Request", "method target headers body")


class Server(socketserver.ThreadingTCPServer):
    """An HTTP or HTTPS server that keeps each request and answers *reply*, by default success.

    *reply* is bytes, or a function of the request that returns bytes or an iterable of them; what it raises hangs up.
    """
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply=None, certificate=None):
        super().__init__(("127.0.0.1", 0), None)
        self.reply, self.requests, self.sockets, self.connections = reply or answer(), [], [], 0
        self.is_over = False
        self.tls = certificate and server_context(certificate)
        self.url = "http%s://127.0.0.1:%d" % ("s" if certificate else "", self.server_address[1])

    def __enter__(self):
        self.accepting = threading.Thread(target=self.accept, daemon=True)
        self.accepting.start()
        return self

    def accept(self):
        while not self.is_over:
            self.handle_request()

    def __exit__(self, *_):
        self.is_over = True
        with socket.socket() as knock:                 # quicker than to have it look now and then
            knock.connect_ex(self.server_address)
        self.accepting.join(20)
        self.server_close()
        for connection in self.sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                                   # closed already

    def verify_request(self, *_):
        self.connections += not self.is_over
        return not self.is_over

    @property
    def batches(self):
        return [decode(request.body) for request in list(self.requests)]

    @property
    def records(self):
        return [one for batch in self.batches for one in batch]

    def handle_error(self, request, client_address):
        pass                                           # the client's side of it is what a test looks at

    def finish_request(self, request, client_address):
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            request = self.tls.wrap_socket(request, server_side=True)
        self.sockets.append(request)
        with request, request.makefile("rb") as stream:
            self.serve(request, stream)

    def serve(self, connection, stream):
        for line in iter(stream.readline, b""):
            method, target, _ = line.decode().split()
            headers = dict(line.decode().rstrip().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
            headers = {name.lower(): value for name, value in headers.items()}
            request = Request(method, target, headers, stream.read(int(headers.get("content-length", 0))))
            self.requests.append(request)
            reply = self.reply(request) if callable(self.reply) else self.reply
            for piece in [reply] if isinstance(reply, bytes) else reply:
                connection.sendall(piece)


class Proxy(Server):
    """A proxy that only knows CONNECT, and one machine, whatever it is called."""

    def serve(self, connection, stream):
        method, target, _ = stream.readline().decode().split()
        self.requests.append(Request(method, target, list(iter(stream.readline, b"\r\n")), b""))
        with socket.create_connection(("127.0.0.1", int(target.split(":")[1]))) as other:
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            peers = {connection: other, other: connection}
            while True:
                for ready in select.select(list(peers), [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    peers[ready].sendall(data)


class Gate(threading.Event):
    """A reply, or a step of a `FaultyServer`, that is held back until the gate is set."""

    def __call__(self, *request):
        assert self.wait(30)
        return accept(*request) if len(request) > 1 else answer()


def server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "server.pem")
        with open(path, "w") as file:
            file.write(certificate + KEY)
        context.load_cert_chain(path)
    return context


def pem(label, text):
    lines = ["-----BEGIN %s-----" % label] + textwrap.wrap("".join(text.split()), 64) + ["-----END %s-----\n" % label]
    return "\n".join(lines)


def ca_context():
    return ssl.create_default_context(cadata=CA)


# A private CA, a certificate of 127.0.0.1 and one of elsewhere.invalid, both with KEY; all valid from 2018 to 2120.
CA = pem("CERTIFICATE", """
MIIBaTCCARCgAwIBAgICEAAwCgYIKoZIzj0EAwIwGzEZMBcGA1UEAwwQYW5hbHlzeXMgdGVzdCBDQTAgFw0xODAxMDEwMDAwMDBaGA8yMTIwMDEwMTAw
MDAwMFowGzEZMBcGA1UEAwwQYW5hbHlzeXMgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHk/zeqhqgfN+EkyvSBKk3bVWTTAxuOViZI5
g8egRT/biMWwDKNqKn9NF7DxL6A+uJ8qdf/SXQZW8SCcDXpHsW6jQjBAMA8GA1UdEwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBSM
iJXX+/9UupTP2vS23/kcss29ajAKBggqhkjOPQQDAgNHADBEAiBOJXgCvgZiTvHLrx3PWtusqNj38ABcHugzDVBgI7R6hgIgYrgwEC/PsNeMpIGkCaVb
RpaFHWXFogbxtSH8jassiZ8=""")
CERTIFICATE = pem("CERTIFICATE", """
MIIBrzCCAVWgAwIBAgICEAEwCgYIKoZIzj0EAwIwGzEZMBcGA1UEAwwQYW5hbHlzeXMgdGVzdCBDQTAgFw0xODAxMDEwMDAwMDBaGA8yMTIwMDEwMTAw
MDAwMFowDzENMAsGA1UEAwwEZ29vZDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJXQiHWc3Siu8qMU+3b0BiqaGgUnpABL6kB9AdzabkS5ZeOOb8a2
aOd/g3lhu05WR6/fp+LFZYV0uR7ginlKlmyjgZIwgY8wDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4AwEwYDVR0lBAwwCgYIKwYBBQUHAwEwHQYD
VR0OBBYEFAuZEXOUlg5jEQnl4KUcadGrIufaMB8GA1UdIwQYMBaAFIyIldf7/1S6lM/a9Lbf+Ryyzb1qMBoGA1UdEQQTMBGHBH8AAAGCCWxvY2FsaG9z
dDAKBggqhkjOPQQDAgNIADBFAiEAg9jOG/o9oiIp6OIDwz9yyT32oZl2f+90ykjnX24WY7gCIHKVagW3hJEYMs3e0u5mCsWhIrI+Y2hb9U5Gjat6Hhcj""")
OTHER_HOST = pem("CERTIFICATE", """
MIIBsjCCAVigAwIBAgICEAIwCgYIKoZIzj0EAwIwGzEZMBcGA1UEAwwQYW5hbHlzeXMgdGVzdCBDQTAgFw0xODAxMDEwMDAwMDBaGA8yMTIwMDEwMTAw
MDAwMFowEDEOMAwGA1UEAwwFd3JvbmcwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASV0Ih1nN0orvKjFPt29AYqmhoFJ6QAS+pAfQHc2m5EuWXjjm/G
tmjnf4N5YbtOVkev36fixWWFdLke4Ip5SpZso4GUMIGRMAwGA1UdEwEB/wQCMAAwDgYDVR0PAQH/BAQDAgeAMBMGA1UdJQQMMAoGCCsGAQUFBwMBMB0G
A1UdDgQWBBQLmRFzlJYOYxEJ5eClHGnRqyLn2jAfBgNVHSMEGDAWgBSMiJXX+/9UupTP2vS23/kcss29ajAcBgNVHREEFTATghFlbHNld2hlcmUuaW52
YWxpZDAKBggqhkjOPQQDAgNIADBFAiEAtv8qWVDR8bwtWxmZbq3WET1K6QL88FFtU2fcx/62A7ACIBs2CWW7FEm24Bo2gjO1CsJDdtK41v/Sw2tToiuO
t8hF""")
KEY = pem("PRIVATE KEY", """
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgt5AUGBO5a1soJo2zQE8b5Tp/sB+Vuf5glUnCZX/OqNShRANCAASV0Ih1nN0orvKjFPt2
9AYqmhoFJ6QAS+pAfQHc2m5EuWXjjm/Gtmjnf4N5YbtOVkev36fixWWFdLke4Ip5SpZs""")

SCENARIO = '''# _*_coding:utf-8_*_
from __future__ import unicode_literals

from argoagent import *
server_url = "https://sdk.analysys.cn:4089"
python_sdk_platform = "js"
appkey = "fangzhouargo"
class Demo():
    def pythonsdkdemo(self):
        collector = DefaultCollecter(server_url)
        eguan = AnalysysPythonSdk(collector)
        eguan.setAppId(appkey)
        eguan.setDebugMode(1)
        distinct_id = "ABCD123456"
        commodity_properties = {
            "commodity_name" : "跑步机",
            "commodity_brand" : "zhonghua",
            "commodity_price" : 5000,
            "commodity_quality" : True,
            "commodity_function" : ["run","记录心率"]
        }
        eguan.track(distinct_id,"SearchCommodity",commodity_properties,python_sdk_platform,is_login=False)
        eguan.track(distinct_id,"register",None,python_sdk_platform,is_login=False)
        alias_id = "zhangsan"
        eguan.alias(alias_id,distinct_id,python_sdk_platform)
        profile_properties = {
            "sex" : "男",
            "phonenumber" : "13966667777",
            "email" : "[email protected]",
            "hobby" : ["basketball","听音乐","mountain-climbing"],
            "is_female" : False
        }
        eguan.profile_set(alias_id,profile_properties,python_sdk_platform,is_login=True)
        super_properties = {
            "commodity_name" : "减肥药",
            "commodity_brand" : "luomiou",
            "commodity_price" : 1000,
            "commodity_quality" : True,
        }
        eguan.registerSuperProperties(super_properties)
        purchase_properties = {
            "Referer" : "gouwuche"
        }
        eguan.track(alias_id,"purchase",purchase_properties,python_sdk_platform,is_login=True)
        payment_properties = {
            "pay_usage" : "Wechat"
        }
        eguan.track(alias_id,"payment",payment_properties,python_sdk_platform,is_login=True)
        eguan.close()

if __name__ == '__main__':
    EG = Demo()
    EG.pythonsdkdemo()
'''


# ---------------------------------------------------------------------------
# Helpers: faults
# ---------------------------------------------------------------------------

class HangUp(Exception):
    """Raised by a step: close the connection."""


class Reset(Exception):
    """Raised by a step: close the connection as a crash does."""


class FaultyServer(Server):
    """A server whose requests meet the steps of a script, one each, and then *then*; it keeps what it accepted.

    A step is the bytes of an answer, or a function of server and request that returns or yields them.
    """

    def __init__(self, *script, then=None, listening=True, certificate=None):
        self.script, self.then, self.listening = collections.deque(script), then or accept, listening
        self.accepted, self.times, self.closed = [], [], threading.Event()
        super().__init__(self._step, certificate)

    def server_activate(self):
        if self.listening:
            super().server_activate()

    def __enter__(self):
        return super().__enter__() if self.listening else self

    def __exit__(self, *_):
        self.closed.set()
        if self.listening:
            super().__exit__()
        self.server_close()

    def listen(self):
        """Accept connections, which were refused until now."""
        self.listening = True
        self.server_activate()
        self.__enter__()

    def serve(self, connection, stream):
        try:
            super().serve(connection, stream)
        except Reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _step(self, request):
        self.times.append(time.monotonic())
        try:
            step = self.script.popleft()
        except IndexError:
            step = self.then
        return step(self, request) if callable(step) else step

    @property
    def names(self):
        return [record["xwhat"] for record in list(self.accepted)]


def accept(server, request):
    server.accepted.extend(decode(request.body))
    return answer()


def silent(server, request):
    server.closed.wait()
    raise HangUp


def cut(error, sent=b""):
    def step(server, request):
        yield sent
        raise error
    return step


def dripping(head):
    """Send *head* and then a byte every tenth of a second, without end."""
    def step(server, request):
        yield head
        while not server.closed.wait(0.1):
            yield b"1"
    return step


def flood(head, chunk, megabytes=100):
    def step(server, request):
        yield head
        for _ in range((megabytes << 20) // len(chunk)):
            yield chunk
        raise HangUp
    return step


def when(condition, reply, otherwise=accept):
    return lambda server, request: reply if condition(request) else otherwise(server, request)


def code(number):
    return json.dumps({"code": number, "msg": "unknown event"}).encode()


def refuse(*names, reply=answer(200, code(400))):
    """Refuse each batch that holds one of the *names*."""
    return when(lambda request: any(record["xwhat"] in names for record in decode(request.body)), reply)


def track(tracker, *names):
    for name in names:
        tracker.track("user", name)


def give(collecter, *xwhats, **properties):
    for xwhat in xwhats:
        collecter.uploadData(event(xwhat, **properties))


def numbered(prefix, count):
    return ["%s%d" % (prefix, number) for number in range(count)]


def balanced(collecter, **expected):
    """Return the stats of *collecter*, which must balance and have the *expected* entries."""
    stats = collecter if isinstance(collecter, dict) else collecter.stats()
    assert set(stats) - {"adopted"} == {"accepted", "delivered", "rejected", "pending", "requests", "retries"}
    came = stats["accepted"] + stats.get("adopted", 0)
    assert came == stats["delivered"] + stats["rejected"] + stats["pending"], stats
    assert {name: stats[name] for name in expected} == expected, stats
    return stats


@contextlib.contextmanager
def batch(server, request_timeout=5, queue_cache_max_size=1, **options):
    """Yield a batch collecter and its tracker; whatever happens, the ledger balances in the end."""
    collecter = BatchCollecter(server.url, request_timeout=request_timeout,
                               queue_cache_max_size=queue_cache_max_size, **options)
    try:
        yield collecter, tracker_to(collecter)
        balanced(collecter)
    finally:
        with contextlib.suppress(NetworkError):
            collecter.close(0.1)
    balanced(collecter, pending=0)


@contextlib.contextmanager
def threads(*works):
    """Run functions in threads beside the block; join them at its end."""
    started = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in started:
        thread.start()
    try:
        yield started
    finally:
        for thread in started:
            thread.join(20)
    assert not any(thread.is_alive() for thread in started)


def all_at_once(check, cases):
    """Call *check* for each of the *cases*, each in a thread, and fail with the first that failed."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for case, future in [(case, pool.submit(check, case)) for case in cases]:
            error = future.exception()
            if error:
                raise AssertionError("failed: %.200r" % (case,)) from error


def side_by_side(cases):
    """Have a test of (case, folder) run once, for all *cases* at once, each with a new folder."""
    def decorate(test):
        def run_all(tmp_path):
            def check(case):
                folder = tmp_path / str(cases.index(case))
                folder.mkdir()
                test(case, folder)
            all_at_once(check, cases)
        run_all.__name__ = test.__name__
        return run_all
    return decorate


@contextlib.contextmanager
def sampled(collecter):
    """Take the stats all the while, in a thread; each sample must balance."""
    samples, done = [], threading.Event()

    def sample():
        while not done.wait(0.001):
            samples.append(collecter.stats())
    with threads(sample):
        try:
            yield samples
        finally:
            done.set()
    for stats in samples:
        balanced(stats)


@contextlib.contextmanager
def within(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@contextlib.contextmanager
def logged():
    """Yield a list that fills with what the module logs."""
    entries, handler = [], logging.Handler()
    handler.emit = entries.append
    logging.getLogger("analysys").addHandler(handler)
    try:
        yield entries
    finally:
        logging.getLogger("analysys").removeHandler(handler)


def event(xwhat, **properties):
    return record("user", xwhat, properties)


def tracing(at, disturb, steps=("line",)):
    """Return a trace function that counts the steps of the module and, once, calls *disturb* in number *at* of them."""
    def trace(frame, what, _):
        if frame.f_code.co_filename != analysys.__file__:
            return None
        if what in steps:
            trace.count += 1
            if trace.count == at:
                sys.settrace(None)
                disturb()
        return trace
    trace.count = 0
    return trace


def disturbed(call, at, disturb, *steps):
    """Call *call* and inside it, as `tracing` says, *disturb*, which may raise Interrupt; tell whether it came to that."""
    trace, before = tracing(at, disturb, *steps), sys.gettrace()
    gc.disable()                                       # the __del__ of what another test left would swallow what is raised
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    disturbed.came = trace.count >= at
    return disturbed.came


def each_step(more_than):
    """Count from 1 on as long as `disturbed`, called last with that step, came to it; there must be *more_than* so many."""
    for step in itertools.count(1):
        yield step
        if not disturbed.came:
            break
    assert more_than < step < 20000


class Interrupt(BaseException):
    """What comes out of a signal handler: as KeyboardInterrupt, which pytest would take for its own."""


def interrupt(*_):
    raise Interrupt


def child(work, *arguments):
    """Run work(...) in a fork, whose status is 0 unless it raised; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def ends_well(pid):
    return os.waitpid(pid, 0)[1] == 0


PRELUDE = """
import errno, functools, gc, itertools, json, logging, os, re, signal, sys, threading, time, traceback
try:
    import resource
except ImportError:                                    # Windows
    pass
import analysys
from analysys import *
url, folder, WHEN = sys.argv[1], sys.argv[2], %d
%s
if os.environ.get("C_FORK"):                           # see `each_fork`
    import ctypes

    def others():                                      # the state of each other thread, and how often it was woken
        me, found = os.readlink("/proc/thread-self").split("/")[-1], []
        for task in set(os.listdir("/proc/self/task")) - {me}:
            with open("/proc/self/task/%%s/status" %% task) as file:
                found.append((task, re.findall(r"(?:State|ctxt_switches):\\s+(\\w+)", file.read())))
        return sorted(found)

    def fork():
        for _ in range(20):                            # who waits for the GIL (5 ms a time) would be waited for in the child
            try:
                before = others()
                time.sleep(0.011)
                if before == others() and not any("R" in states for _, states in before):
                    break
            except OSError:                            # a thread has ended
                pass
        return ctypes.PyDLL(None).fork()
    os.fork = fork

def end():                                             # what a forked child does last; C's has a `threading` of its parent
    if os.environ.get("C_FORK"):
        analysys._deliver_at_exit()
        os._exit(0)
    sys.exit(0)

def waiting():                                         # sends nothing before somebody flushes
    return BatchCollecter(url, max_interval_time=60, queue_cache_max_size=100, request_timeout=5)

def reap(pid):
    ended = []
    def has_ended():
        ended[:] = os.waitpid(pid, os.WNOHANG)
        return ended[0]
    try:
        wait_until(has_ended)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise AssertionError("the child hangs")
    assert ended[1] == 0, ended

def error_of(call, *arguments):
    try:
        call(*arguments)
    except AnalysysPythonSdkException as error:
        return error
    raise AssertionError("nothing was raised")
""" % (WHEN, "\n".join(map(inspect.getsource, (wait_until, tracker_to, balanced, record, event, give, numbered, child,
                                                ends_well, tracing, disturbed, Interrupt, interrupt))))


@pytest.fixture(params=["os.fork", pytest.param("C fork", marks=linux_only)])
def each_fork(request, monkeypatch):
    """Run the test's processes with forks that Python knows of, and with those of a C library: see `PRELUDE`."""
    if request.param == "C fork":
        monkeypatch.setenv("C_FORK", "1")


@contextlib.contextmanager
def process(script, url=URL, folder=os.curdir, before="", **options):
    """Start Python with *before*, the prelude and *script*; yield the Popen object."""
    with tempfile.TemporaryDirectory() as home:
        path = os.path.join(home, "script.py")         # a file, which multiprocessing can import
        with open(path, "w") as file:
            file.write(textwrap.dedent(before) + PRELUDE + textwrap.dedent(script))
        with launch("-S", path, url, folder, **options) as started:    # no site-packages: quicker
            yield started


def run(script, *where, **options):
    """Run *script* like `process` to its end, which must be a good one."""
    with process(script, *where, **options) as started:
        return ended_well(started)


# ---------------------------------------------------------------------------
# Helpers: files and the processes that write and ship them
# ---------------------------------------------------------------------------

def records_in(path):
    """Return the records of a file, which must hold whole lines."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n"), data[-100:]
    return [json.loads(line.decode()) for line in data.splitlines()]


def events_in(path):
    return [one["xwhat"] for one in records_in(path)]


def files_in(folder, pattern="datas_*"):
    """Return {name: the xwhat of each line} for the files in *folder*."""
    return {path.name: events_in(path) for path in sorted(folder.glob(pattern))}


def lines(folder):
    """Return the records in the log files of *folder*, file by file in the order of their names."""
    return [one for path in sorted(folder.glob("datas_*.log")) for one in records_in(path)]


def lines_in(folder):
    return [one["xwhat"] for one in lines(folder)]


def lines_of(*xwhats, **properties):
    return "".join(json.dumps(event(xwhat, **properties)) + "\n" for xwhat in xwhats)


def log_file(path, *xwhats, ends="", **properties):
    """Write a log file of events; *ends* is what comes after them."""
    path.write_text(lines_of(*xwhats, **properties) + ends)
    return path


def zipped(path):
    """Compress a file as gzip(1) does and return the new path."""
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def then_fail(server, request):
    """Say that the server is down, for longer than `upload` waits."""
    return answer(503, b"", "Retry-After: 60")


def ship(*arguments):
    """Run `upload` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = analysys.main(["upload"] + [str(argument) for argument in arguments])
    return Ended(status, out.getvalue(), err.getvalue())


def shipper(*arguments, **options):
    """Start `upload` as a process of its own."""
    return launch("-m", "analysys", "upload", *arguments, **options)


@contextlib.contextmanager
def spooling(server, folder, **options):
    """Yield a collecter with a spool; what the block does not flush may stay on disk."""
    options = dict({"request_timeout": 5, "queue_cache_max_size": 1}, **options)
    collecter = BatchCollecter(server.url, spool_path=str(folder), **options)
    try:
        yield collecter
    finally:
        collecter.close(0.1)
    balanced(collecter)


def leave(folder, *xwhats, number=itertools.count(1), **options):
    """Write what a process leaves that tracked events, delivered none and was killed; return its name."""
    name = "%013d-1-00000000" % next(number)
    folder.mkdir(exist_ok=True)
    (folder / (name + ".lock")).write_text("")
    log_file(folder / (name + ".000001.log"), *xwhats, **options)
    return name


def damage(folder, change):
    """Have *change* edit the lines of the spool file in *folder*; return its name."""
    path, = folder.glob("*.000001.log")
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(True))))
    return path.name


def rejected_in(folder):
    return [json.loads(line) for line in (folder / "rejected.log").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------
# Public names
# ---------------------------------------------------------------------------

TRACKED = "data_platform='python', is_login=False, xwhen=None)"
PROFILE = "(self, distinct_id, profile_properties, " + TRACKED
CALLS_OF_A_COLLECTER = ["uploadData(self, record)", "flush(self, timeout=10)", "close(self, timeout=10)", "stats(self)"]
SIGNATURES = [
    (AnalysysPythonSdk, ["(collector, on_error=None)", "setAppId(self, appid)", "setDebugMode(self, debug_mode=0)",
                         "track(self, distinct_id, event_name, event_properties=None, " + TRACKED,
                         "alias(self, alias_id, distinct_id, data_platform='python', alias_properties=None, "
                         "is_login=True, xwhen=None)",
                         "profile_set" + PROFILE, "profile_set_once" + PROFILE,
                         "profile_increment" + PROFILE, "profile_append" + PROFILE,
                         "profile_unset(self, distinct_id, profile_properties_keys, " + TRACKED,
                         "profile_delete(self, distinct_id, " + TRACKED,
                         "registerSuperProperties(self, super_properties)", "clearSuperProperties(self)",
                         "unregisterSuperProperties(self, super_properties_key)",
                         "unregisterSuperProperty(self, super_properties_key)",
                         "getSingleSuperProperties(self, super_properties_key)", "getAllSuperProperties(self)",
                         "flush(self, timeout=10)", "close(self, timeout=10)"]),
    (DefaultCollecter,
     ["(server_url, request_timeout=None, *, ssl_context=None, headers=None)"] + CALLS_OF_A_COLLECTER),
    (BatchCollecter, ["(server_url, max_interval_time=15, queue_cache_max_size=10, collecter_max_size=100, "
                      "queue_max_size=1000, request_timeout=None, *, ssl_context=None, headers=None, "
                      "queue_timeout=None, spool_path=None, spool_max_bytes=1073741824, on_error=None)"] + CALLS_OF_A_COLLECTER),
    (LogCollecter, ["(log_path, is_batch=False, batch_num=20, general_rule='hour')"] + CALLS_OF_A_COLLECTER),
]


def test_a_star_import_gives_exactly_the_public_names():
    names = {}
    exec("from analysys import *", names)
    del names["__builtins__"]
    assert sorted(names) == sorted(analysys.__all__) == sorted([
        "AnalysysPythonSdk", "DefaultCollecter", "BatchCollecter", "LogCollecter", "AnalysysPythonSdkException",
        "AnalysysPythonSdkIllegalDataException", "AnalysysPythonSdkNetworkException",
        "AnalysysPythonSdkFileException"])


def test_every_public_call_has_its_name_and_the_order_and_defaults_of_its_parameters():
    for cls, signatures in SIGNATURES:
        for expected in signatures:
            name = expected.split("(")[0]
            parameters = inspect.signature(getattr(cls, name) if name else cls).parameters.values()
            bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
            assert name + str(inspect.Signature(bare)) == expected, cls
    assert AnalysysPythonSdk.unregisterSuperProperty is AnalysysPythonSdk.unregisterSuperProperties


def test_the_errors_have_one_base_and_are_value_and_os_errors_where_that_fits():
    for error in IllegalData, NetworkError, analysys.AnalysysPythonSdkFileException:
        assert issubclass(error, analysys.AnalysysPythonSdkException)
    assert issubclass(IllegalData, ValueError)
    assert issubclass(analysys.AnalysysPythonSdkFileException, OSError)


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_can_be_copied_and_pickled_with_all_that_they_tell(tmp_path, travel):
    (tmp_path / "file").write_text("")
    for call in (lambda: LogCollecter(str(tmp_path / "file" / "folder")), lambda: DefaultCollecter(URL)):
        with pytest.raises(analysys.AnalysysPythonSdkException) as caught:
            tracker_to(call()).track("u", "Event")
        error, other = caught.value, travel(caught.value)
        for name in ("__class__", "args", "records", "errno"):
            assert getattr(other, name, None) == getattr(error, name, None)
        assert str(other) == str(error) and getattr(error, "errno", errno.ENOTDIR) == errno.ENOTDIR


# ---------------------------------------------------------------------------
# The tracker
# ---------------------------------------------------------------------------

#       method, arguments, xwhat, its part of xcontext
CALLS = [("track", ("u", "Event", {"n": 1}), "Event", {"n": 1}),
         ("track", ("u", "Event"), "Event", {}),
         ("track", ("u", "Event", {}), "Event", {}),
         ("alias", ("u", "d"), "$alias", {"$original_id": "d"}),
         ("profile_set", ("u", {"n": 1}), "$profile_set", {"n": 1}),
         ("profile_set_once", ("u", {"n": 1}), "$profile_set_once", {"n": 1}),
         ("profile_increment", ("u", {"n": 1}), "$profile_increment", {"n": 1}),
         ("profile_append", ("u", {"n": ["a"]}), "$profile_append", {"n": ["a"]}),
         ("profile_unset", ("u", ["n", "m"]), "$profile_unset", {"n": "", "m": ""}),
         ("profile_delete", ("u",), "$profile_delete", {})]
each_call = table("method, arguments, xwhat, context", CALLS)


@each_call
def test_each_call_makes_exactly_its_record(method, arguments, xwhat, context):
    sdk = tracker_to()
    getattr(sdk, method)(*arguments)
    sdk.setDebugMode(2)
    getattr(sdk, method)(*arguments, data_platform="android", is_login=True, xwhen=1532514947857)
    assert sdk.sink.records == [
        record("u", xwhat, context, is_login=method == "alias"),
        record("u", xwhat, context, "Android", is_login=True, debug=2, xwhen=1532514947857)]


@each_call
def test_an_app_id_is_mandatory(method, arguments, xwhat, context):
    sdk = AnalysysPythonSdk(Sink())
    with pytest.raises(analysys.AnalysysPythonSdkException):
        getattr(sdk, method)(*arguments)


@each_call
def test_with_on_error_what_a_tracking_call_would_raise_goes_there(method, arguments, xwhat, context):
    errors = []
    sdk = tracker_to(BrokenSink(), on_error=lambda *error: errors.append(error))
    getattr(sdk, method)(*arguments)                   # the collecter raises
    getattr(sdk, method)("", *arguments[1:])           # validation raises
    assert [type(error) for error, _ in errors] == [RuntimeError, IllegalData]
    assert errors[0][1] == record("u", xwhat, context, is_login=method == "alias")
    assert errors[1][1] is None or isinstance(errors[1][1], dict)
    with pytest.raises(RuntimeError):                  # without one it comes through
        getattr(tracker_to(BrokenSink()), method)(*arguments)
    unnamed = AnalysysPythonSdk(Sink(), on_error=lambda *error: errors.append(error))
    getattr(unnamed, method)(*arguments)               # there is no app id
    assert len(errors) == 3


def test_all_other_calls_raise_even_with_on_error():
    sdk = tracker_to(BrokenSink(), on_error=lambda *error: pytest.fail("on_error was called"))
    for call in (lambda: sdk.setAppId(""), lambda: sdk.setDebugMode(9), lambda: sdk.registerSuperProperties({"": 1})):
        with pytest.raises(IllegalData):
            call()
    for call in sdk.flush, sdk.close:
        with pytest.raises(RuntimeError):
            call()


def test_an_on_error_that_raises_is_logged_and_no_more(caplog):
    def on_error(error, record):
        raise KeyError("on_error itself")
    tracker_to(on_error=on_error).track("", "Event")
    assert "on_error itself" in caplog.text


def test_flush_close_and_a_with_block_reach_the_collecter():
    with tracker_to() as sdk:
        sdk.flush()
        sdk.flush(3)
        sdk.close(timeout=None)
    assert sdk.sink.calls == [("flush", 10), ("flush", 3), ("close", None), ("close", 10)]


class Stamping(BatchCollecter):
    """A user's own version of one of ours."""

    def uploadData(self, record):
        record["xcontext"]["stamp"] = 1
        super().uploadData(record)


def test_a_collecter_with_an_upload_data_of_its_own_gets_each_record_and_may_change_it(monkeypatch):
    with Server() as server:
        with tracker_to(Stamping(server.url)) as sdk:
            sdk.track("u", "subclass", {"tags": ["a"]})
        patched = DefaultCollecter(server.url)
        with tracker_to(patched) as sdk:
            patched.uploadData = lambda record: DefaultCollecter.uploadData(patched, dict(record, xwho="instance"))
            sdk.track("u", "patched")
            del patched.uploadData
            sdk.track("u", "plain")
            monkeypatch.setattr(DefaultCollecter, "uploadData", lambda self, record: self.flush(), raising=False)
            sdk.track("u", "swallowed")
        assert server.records == [record("u", "subclass", {"tags": ["a"], "stamp": 1}), record("instance", "patched"),
                                  record("u", "plain")]


def test_a_collecter_may_be_made_of_the_methods_of_another():
    with Server() as server:
        inner = BatchCollecter(server.url)
        methods = types.SimpleNamespace(uploadData=inner.uploadData, flush=inner.flush, close=inner.close)
        with tracker_to(methods) as sdk:
            sdk.track("u", "Event")
        assert server.records == [record("u", "Event")] and balanced(inner)["delivered"] == 1


@each_collecter
@table("bad", [{"xwhat": "e", "n": float("nan")}, {"xwhat": "e", "n": {1}}, {"xwhat": "e", "n": "\ud83d"}, {}, None, b"{}"])
def test_a_record_given_by_hand_that_is_no_json_raises_and_is_not_counted(tmp_path, kind, bad):
    collecter = make(kind, URL, tmp_path)
    with pytest.raises(IllegalData) as caught:
        collecter.uploadData(bad)
    assert "record is " in str(caught.value)
    assert set(balanced(collecter).values()) == {0}
    collecter.close()


def test_super_properties_go_into_track_records_only():
    sdk = tracker_to()
    sdk.registerSuperProperties({"member": "VIP"})
    for method, arguments, xwhat, context in CALLS:
        getattr(sdk, method)(*arguments)
        expected = dict(context, member="VIP") if method == "track" else context
        assert sdk.sink.records[-1] == record("u", xwhat, expected, is_login=method == "alias")


def test_an_event_property_replaces_a_super_property_whatever_the_case():
    sdk = tracker_to()
    sdk.registerSuperProperties({"City": "Beijing", "member": "VIP"})
    sdk.track("u", "Event", {"cITY": "Oslo"})
    sdk.track("u", "Event")
    assert sdk.sink.records == [record("u", "Event", {"cITY": "Oslo", "member": "VIP"}),
                                record("u", "Event", {"City": "Beijing", "member": "VIP"})]


def test_super_property_names_match_whatever_the_case():
    sdk = tracker_to()
    sdk.registerSuperProperties({"City": "Beijing", "member": "VIP"})
    sdk.registerSuperProperties({"CITY": "Oslo"})
    assert sdk.getAllSuperProperties() == {"CITY": "Oslo", "member": "VIP"}
    assert sdk.getSingleSuperProperties("city") == "Oslo"
    sdk.unregisterSuperProperties("cItY")
    sdk.unregisterSuperProperty("MEMBER")
    assert sdk.getAllSuperProperties() == {}


def test_the_getters_return_copies_and_none_for_what_is_absent():
    sdk = tracker_to()
    sdk.registerSuperProperties({"tags": ["a"], "n": 1})
    sdk.getSingleSuperProperties("tags").append("b")
    sdk.getAllSuperProperties()["tags"].append("b")
    sdk.getAllSuperProperties().clear()
    assert sdk.getAllSuperProperties() == {"tags": ["a"], "n": 1}
    assert sdk.getSingleSuperProperties("absent") is None
    sdk.clearSuperProperties()
    assert sdk.getAllSuperProperties() == {} and sdk.getSingleSuperProperties("tags") is None


def test_debug_mode_logs_each_record_and_each_answer_and_mode_0_nothing(caplog):
    caplog.set_level(logging.DEBUG, "analysys")
    with Server() as server:
        sdk = tracker_to(DefaultCollecter(server.url))
        sdk.track("u", "Unseen")
        assert [entry for entry in caplog.records if entry.name == "analysys"] == []
        for mode in 1, 2:
            sdk.setDebugMode(mode)
            sdk.track("u", "Seen")
            messages = [entry.getMessage() for entry in caplog.records if entry.name == "analysys"]
            assert any("Seen" in message for message in messages)
            assert any("200" in message for message in messages if "Seen" not in message)
            caplog.clear()
        assert [one["xcontext"]["$debug"] for one in server.records] == [0, 1, 2]


def test_debug_mode_is_seen_on_stderr_where_no_logging_is_configured():
    run("""
        import io
        def shown():
            sys.stderr = io.StringIO()
            tracker.track("user", "Seen")
            return sys.stderr.getvalue()
        tracker = AnalysysPythonSdk(type("Sink", (), dict.fromkeys(["uploadData", "flush", "close"], print))())
        tracker.setAppId("app")
        assert shown() == ""
        tracker.setDebugMode(1)
        assert '"Seen"' in shown()
        logging.getLogger().addHandler(logging.NullHandler())
        assert shown() == ""
    """)


@table("change", [lambda sdk: sdk.setAppId("other"), lambda sdk: sdk.setDebugMode(2),
                  lambda sdk: sdk.registerSuperProperties({"a": 1}), lambda sdk: sdk.unregisterSuperProperty("gone")])
def test_what_two_threads_change_in_a_tracker_at_once_is_changed_by_both(change):
    def meanwhile():
        other.start()
        other.join(0.02)                               # it may have to wait for the first
    for at in range(1, NEVER):
        sdk = tracker_to()
        sdk.registerSuperProperties({"gone": 1})
        other = threading.Thread(target=sdk.registerSuperProperties, args=({"kept": 2},))
        if not disturbed(lambda: change(sdk), at, meanwhile, ("call",)):
            break
        other.join()
        assert sdk.getSingleSuperProperties("kept") == 2
    assert at > 5


@pytest.mark.parametrize("collecter", [DefaultCollecter, BatchCollecter, LogCollecter, Sink])
def test_a_class_is_no_collecter(collecter):
    with pytest.raises(IllegalData, match="collector"):
        AnalysysPythonSdk(collecter)


@pytest.mark.parametrize("missing", ["uploadData", "flush", "close"])
def test_what_lacks_one_of_the_three_methods_is_no_collecter(missing):
    methods = dict.fromkeys(["uploadData", "flush", "close"], print)
    AnalysysPythonSdk(type("Whole", (), methods)())
    with pytest.raises(IllegalData, match="collector"):
        AnalysysPythonSdk(type("Lacking", (), dict(methods, **{missing: None}))())


def test_a_callable_super_property_is_called_for_each_track_in_the_callers_thread_and_the_getters_return_it():
    calls = []

    def who():
        calls.append(threading.current_thread().name)
        return "call %d" % len(calls)
    sdk = tracker_to()
    sdk.registerSuperProperties({"Request": who, "plain": 1})
    assert sdk.getSingleSuperProperties("request") is who and sdk.getAllSuperProperties() == {"Request": who, "plain": 1}
    with threads(lambda: sdk.track("u", "Event")):
        pass
    sdk.track("u", "Event", {"own": 1})
    sdk.profile_set("u", {"a": 1})
    sdk.alias("u", "d")
    sdk.track("u", "Event", {"REQUEST": "own"})        # which wins, whatever the case
    assert sdk.sink.records == [
        record("u", "Event", {"Request": "call 1", "plain": 1}),
        record("u", "Event", {"Request": "call 2", "plain": 1, "own": 1}), record("u", "$profile_set", {"a": 1}),
        record("u", "$alias", {"$original_id": "d"}, is_login=True), record("u", "Event", {"REQUEST": "own", "plain": 1})]
    assert len(calls) == 2 and calls[0] != calls[1] == threading.current_thread().name
    sdk.unregisterSuperProperty("REQUEST")
    sdk.track("u", "Event")
    assert sdk.sink.records[-1] == record("u", "Event", {"plain": 1})


@table("value", [None, {}, b"x", "x" * 256, ["x", 1], float("nan"), 2 ** 63, object(), len])
def test_what_a_callable_super_property_returns_keeps_the_rules_or_the_call_fails(value):
    told, sdk = [], tracker_to()
    sdk.registerSuperProperties({"Request": lambda: value})
    with pytest.raises(IllegalData, match="super_properties.*Request"):
        sdk.track("u", "Event")
    sdk._on_error = lambda *error: told.append(error)
    sdk.track("u", "Event")
    (error, _), = told
    assert isinstance(error, IllegalData) and sdk.sink.records == []


def test_a_callable_super_property_that_raises_fails_the_call_and_says_how():
    sdk = tracker_to()
    sdk.registerSuperProperties({"Request": lambda: {}["no request"]})
    with pytest.raises(IllegalData, match="super_properties.*Request.*no request"):
        sdk.track("u", "Event")
    sdk.profile_delete("u")
    assert sdk.sink.records == [record("u", "$profile_delete")]


@table("call", [lambda needed: 1, int, Sink])
def test_a_super_property_is_called_without_arguments_and_is_no_class(call):
    assert "Request" in refused(tracker_to(), "registerSuperProperties", {"ok": 1, "Request": call})


@table("seconds", [0, 5, 978307199, 10 ** 10])
def test_where_our_own_clock_is_not_set_a_call_without_xwhen_raises_and_says_so(seconds):
    sdk = tracker_to()
    sdk._clock = lambda: seconds
    with pytest.raises(IllegalData, match="clock.*is not set"):
        sdk.track("u", "Event")
    sdk.track("u", "Event", xwhen=WHEN)
    assert sdk.sink.records == [record("u", "Event")]


# ---------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------

@table("module, collecter", [
    ("analysys", "DefaultCollecter(server_url)"),
    ("analysyspythonsdk", "BatchCollecter(server_url, 10, 2, 100, 1000, request_timeout=None)")])
def test_the_scenario_of_section_5_arrives_field_by_field(tmp_path, module, collecter):
    shutil.copy(SOURCE, str(tmp_path / "analysyspythonsdk.py"))
    with analysys.Receiver() as server:
        script = SCENARIO.replace("argoagent", module).replace("https://sdk.analysys.cn:4089", server.url)
        script = script.replace("DefaultCollecter(server_url)", collecter)
        (tmp_path / "scenario.py").write_text(script, encoding="utf-8")
        start = time.time()
        done = python("scenario.py", cwd=tmp_path)
        end = time.time()
        arrived = list(server.records)
    assert (done.status, done.out) == (0, "")
    assert "SearchCommodity" in done.err            # debug mode, and no logging configured
    times = [one["xwhen"] for one in arrived]
    assert all(type(xwhen) is int and start * 1000 - 1 <= xwhen <= end * 1000 + 1 for xwhen in times)
    assert times == sorted(times) and {len(str(xwhen)) for xwhen in times} == {13}
    bought = {"commodity_name": "减肥药", "commodity_brand": "luomiou", "commodity_price": 1000,
              "commodity_quality": True}
    expected = [
        ("ABCD123456", "SearchCommodity", False,
         {"commodity_name": "跑步机", "commodity_brand": "zhonghua", "commodity_price": 5000,
          "commodity_quality": True, "commodity_function": ["run", "记录心率"]}),
        ("ABCD123456", "register", False, {}),
        ("zhangsan", "$alias", True, {"$original_id": "ABCD123456"}),
        ("zhangsan", "$profile_set", True,
         {"sex": "男", "phonenumber": "13966667777", "email": "[email protected]",
          "hobby": ["basketball", "听音乐", "mountain-climbing"], "is_female": False}),
        ("zhangsan", "purchase", True, dict(bought, Referer="gouwuche")),
        ("zhangsan", "payment", True, dict(bought, pay_usage="Wechat"))]
    assert arrived == [record(xwho, xwhat, properties, "JS", is_login, 1, "fangzhouargo", xwhen)
                       for (xwho, xwhat, is_login, properties), xwhen in zip(expected, times)]


def test_a_record_is_the_same_whether_its_like_was_made_before_or_not(monkeypatch):
    chance = random.Random(1)
    values = ["", "跑步机", 'a"\\\n\x00\u2028', True, False, 0, -1, 2 ** 63 - 1, -2 ** 63, 0.5, -1e300, [], ["a", "易"],
              decimal.Decimal("2.50"), datetime.date(2018, 7, 25)]

    def some(names):
        return {name: chance.choice(values) for name in names if chance.random() < 0.4}

    def calls():
        who, platform = chance.choice("uvw"), chance.choice([None, "", "js", "JS", "自定义"])
        login = chance.random() < 0.5
        name = chance.choice(["Event", "$profile_set"])
        yield lambda sdk: sdk.track(who, name, some_properties, platform, login)
        yield lambda sdk: sdk.alias(who, "d", platform, some_properties, login)
        yield lambda sdk: sdk.profile_set(who, some_properties, platform, login)
        yield lambda sdk: sdk.profile_unset(who, list(some_properties), platform, login)
        yield lambda sdk: sdk.profile_delete(who, platform, login)
    kept, fresh = tracker_to(), []
    settings = [{}, 0, "app"]
    for number in range(2000):
        if number < 1000 and chance.random() < 0.1:
            settings = [some(["A", "b", "Common"]), chance.choice([0, 1, 2]), chance.choice(["app", "另一个"])]
            apply(kept, *settings)
        some_properties = some(["a", "B", "common", "own", "$importFlag"])
        call = chance.choice(list(calls()))
        call(kept)
        other = tracker_to()
        apply(other, *settings)
        call(other)
        fresh += other.sink.records
    assert kept.sink.records == fresh and len(fresh) > 1200
    monkeypatch.setattr(analysys, "_MAX_FRAMES", 10000)
    names = numbered("many_", 200)                     # more than are kept
    for name in names * 2:
        kept.track("u", name)
    assert [one["xwhat"] for one in kept.sink.records[-400:]] == names * 2
    assert {type(one["xcontext"]["$is_login"]) for one in fresh} == {bool}


def apply(sdk, super_properties, debug_mode, appid):
    sdk.clearSuperProperties()
    sdk.registerSuperProperties(super_properties)
    sdk._settings = sdk._settings.replace(debug=debug_mode)    # setDebugMode() would have it log
    sdk.setAppId(appid)


@pytest.mark.parametrize("value", [1, 0, "True", None])
def test_what_equals_a_good_argument_is_not_taken_for_it(value):
    sdk = tracker_to()
    for good in (True, False):
        sdk.track("u", "Event", {"n": 1}, "js", good)
    with pytest.raises(IllegalData):
        sdk.track("u", "Event", {"n": 1}, "js", value)
    assert len(sdk.sink.records) == 2


def test_what_is_kept_of_large_super_properties_is_bounded():
    collecter = types.SimpleNamespace(uploadData=len, flush=len, close=len)
    sdk = AnalysysPythonSdk(collecter)
    sdk.setAppId("app")
    sdk.registerSuperProperties({"p%d" % number: "易" * 255 for number in range(100)})
    tracemalloc.start()
    try:
        for number in range(200):                      # 76 KB of text each
            sdk.track("u", "e%d" % number)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


class Folding(str):
    """A str that equals another whatever the case, as an application may have for header names."""

    def __hash__(self):
        return hash(str.lower(self))

    def __eq__(self, other):
        return str.lower(self) == str.lower(other)


class Pretender:
    def __hash__(self):
        return hash("buy")

    def __eq__(self, other):
        return other == "buy"


def test_what_equals_an_earlier_argument_is_sent_and_checked_for_what_it_is():
    sdk = tracker_to()
    sdk.track("u", "buy", {"n": 1}, "python")
    sdk.track("u", Folding("BUY"), {Folding("N"): 1}, Folding("Python"))
    for bad in Pretender(), Folding("bu y"):
        for arguments in ("u", bad), ("u", "buy", {bad: 1}), ("u", "buy", None, Pretender()):
            with pytest.raises(IllegalData):
                sdk.track(*arguments)
    assert sdk.sink.records == [record("u", "buy", {"n": 1}), record("u", "BUY", {"N": 1}, "Python")]


def test_an_alias_is_always_a_login():
    sdk = tracker_to()
    sdk.alias("u", "d", "ios", {"n": 1}, is_login=False)
    assert sdk.sink.records == [record("u", "$alias", {"$original_id": "d", "n": 1}, "iOS", is_login=True)]


@table("given, sent", [("ios", "iOS"), ("IOS", "iOS"), ("ANDROID", "Android"), ("Js", "JS"), ("WECHAT", "WeChat"),
                       ("HarmonyOS", "HarmonyOS"), ("小程序", "小程序"), ("Python", "Python"), (" ios", " ios"),
                       (None, "python"), ("", "python")])
def test_four_platforms_have_their_spelling_and_any_other_passes_as_it_is(given, sent):
    sdk = tracker_to()
    sdk.track("u", "Event", data_platform=given)
    sdk.alias("u", "d", given)
    sdk.profile_delete("u", given)
    assert [one["xcontext"]["$platform"] for one in sdk.sink.records] == [sent] * 3


def test_xwhen_is_now_or_the_callers_int_or_datetime():
    sdk, utc = tracker_to(), datetime.timezone.utc
    noon = datetime.datetime(2018, 7, 25, 12, 0, 0, 857000)
    noons = [noon.replace(tzinfo=utc, microsecond=ms * 1000) for ms in range(1000)]
    for xwhen in [None, 10 ** 12, 10 ** 13 - 1, noon] + noons:
        sdk.track("u", "Event", xwhen=xwhen)
    local = round(time.mktime(noon.timetuple())) * 1000 + 857
    times = [one["xwhen"] for one in sdk.sink.records]
    assert times == [WHEN, 10 ** 12, 10 ** 13 - 1, local] + [1532520000000 + ms for ms in range(1000)]
    assert {type(xwhen) for xwhen in times} == {int}


class Number:
    """An integer as numpy's: no int, yet a `numbers.Integral`."""

    def __init__(self, value):
        self.value = value

    def __int__(self):
        return self.value

    __index__ = __int__


numbers_module.Integral.register(Number)


class Stamp(datetime.datetime):
    """As pandas' Timestamp: its own arithmetic makes other things than datetimes."""

    def __sub__(self, other):
        return "no timedelta"

    def astimezone(self, zone=None):
        return "no datetime"

    def isoformat(self, *_):
        return "no date"


class NotATime(datetime.datetime):
    """As pandas' NaT: a datetime that is unequal to itself."""

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True

    __hash__ = datetime.datetime.__hash__


def test_xwhen_may_be_any_integral_and_a_datetime_of_any_subclass():
    sdk, utc = tracker_to(), datetime.timezone.utc
    for xwhen in Number(WHEN), Level13.WHEN, Stamp(2018, 7, 25, 10, 35, 47, 500000, utc):
        sdk.track("u", "Event", xwhen=xwhen)
    assert sdk.sink.records == [record("u", "Event")] * 3
    assert {type(one["xwhen"]) for one in sdk.sink.records} == {int}


@table("xwhen", [True, 10 ** 12 - 1, 10 ** 13, Number(1), 1532514947500.0, decimal.Decimal(WHEN), str(WHEN),
                 datetime.date(2018, 7, 25), NotATime(1, 1, 1), datetime.datetime(1999, 1, 1)])
def test_any_other_xwhen_is_refused(xwhen):
    assert "xwhen" in refused(tracker_to(), "track", "u", "Event", xwhen=xwhen)


@table("method", ["profile_set", "profile_set_once", "profile_increment", "profile_append"])
def test_a_profile_call_without_properties_sends_nothing_and_is_no_error(method):
    sdk = tracker_to()
    getattr(sdk, method)("u", {})
    getattr(sdk, method)("u", None)
    sdk.profile_unset("u", [])
    assert sdk.sink.records == []


# ---------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------

# method, arguments before the properties, name of their argument, value of a property
PROPERTY_CALLS = [("track", ("u", "Event"), "event_properties", 1),
                  ("alias", ("u", "d", "js"), "alias_properties", 1),
                  ("profile_set", ("u",), "profile_properties", 1),
                  ("profile_set_once", ("u",), "profile_properties", 1),
                  ("registerSuperProperties", (), "super_properties", 1)]
NAME_CALLS = PROPERTY_CALLS + [("profile_increment", ("u",), "profile_properties", 1),
                               ("profile_append", ("u",), "profile_properties", ["a"]),
                               ("profile_unset", ("u",), "profile_properties_keys", "")]
RESERVED = ["xwho", "xwhat", "xwhen", "appid", "xcontext", "$lib", "$lib_version", "$is_login", "$debug", "$platform",
            "$original_id"]


def refused(sdk, method, *arguments, **keywords):
    """Check that the call is refused, with a short message, and changes nothing; return the message."""
    before = sdk.getAllSuperProperties(), len(sdk.sink.records)
    with pytest.raises(IllegalData) as caught:
        getattr(sdk, method)(*arguments, **keywords)
    assert (sdk.getAllSuperProperties(), len(sdk.sink.records)) == before
    assert 0 < len(str(caught.value)) <= 500 and str(caught.value).isprintable()
    return str(caught.value)


def accepted(method, *arguments):
    """Return the properties that the call sends or registers, of those it was given."""
    sdk = tracker_to()
    getattr(sdk, method)(*arguments)
    if method == "registerSuperProperties":
        return sdk.getAllSuperProperties()
    preset = record("u", "Event", {"$original_id": "d"})["xcontext"]
    return {name: value for name, value in sdk.sink.records[0]["xcontext"].items() if name not in preset}


class Text(str):
    def __str__(self):
        return "something else"


Colour = enum.Enum("Colour", {"RED": "red"}, type=str)
Level = enum.IntEnum("Level", "LOW HIGH")
Level13 = enum.IntEnum("Level13", {"WHEN": WHEN})
Pair = collections.namedtuple("Pair", "first second")
NESTED = []
for _ in range(10 ** 5):
    NESTED = [NESTED]

NAMES = ["a", "Z", "$a", "a_", "a1", "A" * 99, "$" + "a" * 98, "$importFlag"]
BAD_NAMES = ["", "$", "1a", "_a", "$1", "$_a", "$$a", "a$", "a-b", "a b", "a.b", " a", "a ", "a\n", "\na", "é", "aé",
             "名字", "ａ", "a٣", "\u017f", "\u212a", "a\ud800", "a\0", "a" * 100, "$" + "a" * 99, None, 1, True, 1.5, b"a", ("a",)]
VALUES = [  # given, sent
    ("", ""), ("x" * 255, "x" * 255), ("\U0001f600" * 255, "\U0001f600" * 255), ("a\nb\0", "a\nb\0"),
    (Text("plain"), "plain"), (Colour.RED, "red"), (True, True), (False, False),
    (0, 0), (2 ** 63 - 1, 2 ** 63 - 1), (-2 ** 63, -2 ** 63), (Level.HIGH, 2),
    (1.5, 1.5), (5.0, 5.0), (-1e300, -1e300), (sys.float_info.max, sys.float_info.max),
    (fractions.Fraction(1, 2), 0.5), (fractions.Fraction(4, 2), 2),
    (decimal.Decimal("0.1"), 0.1), (decimal.Decimal("5.00"), 5), (decimal.Decimal("1E+18"), 10 ** 18),
    (decimal.Decimal(2 ** 63 - 1), 2 ** 63 - 1), (decimal.Decimal("12345678901234567890.5"), 12345678901234567890.5),
    ([], []), (["x" * 255] * 100, ["x" * 255] * 100), (("a", "b"), ["a", "b"]), (Pair("a", "b"), ["a", "b"]),
    ([Colour.RED, Text("plain")], ["red", "plain"]),
    (datetime.datetime(2018, 7, 25, 20, 55, 14, 857000), "2018-07-25 20:55:14"),
    (datetime.datetime(1, 2, 3, 4, 5, 6), "0001-02-03 04:05:06"), (datetime.date(1, 2, 3), "0001-02-03")]
BAD_VALUES = [
    None, {}, {"a": 1}, b"x", bytearray(b"x"), {"a"}, frozenset("a"), object(), 1j, int, len, range(3), iter("a"),
    datetime.time(1), datetime.timedelta(1), NotATime(2018, 7, 25), "x" * 256, "\U0001f600" * 256, "\ud800", "a\udfff",
    2 ** 63, -2 ** 63 - 1, 10 ** 5000, float("nan"), float("inf"), float("-inf"),
    decimal.Decimal("NaN"), decimal.Decimal("sNaN"), decimal.Decimal("-Infinity"), decimal.Decimal(2 ** 63),
    decimal.Decimal("1E+999999999999"), fractions.Fraction(2 ** 64), fractions.Fraction(10 ** 400, 3),
    ["x"] * 101, ["x" * 256], ["\ud800"], [1], [None], [True], [b"a"], [["a"]], ("a", 1), NESTED]


@table("given, sent", VALUES)
def test_a_value_is_accepted_and_sent_as_plain_json(given, sent):
    for method, arguments, _, _ in PROPERTY_CALLS:
        value = accepted(method, *arguments, {"name": given})["name"]
        assert (type(value), value) == (type(sent), sent)
        if type(value) is list:
            assert {type(item) for item in value} <= {str}


@table("value", BAD_VALUES)
def test_any_other_value_is_refused(value):
    sdk = tracker_to()
    sdk.registerSuperProperties({"n": 1})
    for method, arguments, argument, _ in PROPERTY_CALLS:
        message = refused(sdk, method, *arguments, {"ok": 1, "the_name": value})
        assert argument in message and "the_name" in message


def named(method, names, value):
    """Return what the method takes as properties of these names."""
    return list(names) if method == "profile_unset" else {name: copy.copy(value) for name in names}


def test_a_datetime_with_a_time_zone_is_sent_as_local_time():
    east = datetime.timezone(datetime.timedelta(hours=5, minutes=45))
    for kind in datetime.datetime, Stamp:
        for zone in datetime.timezone.utc, east:
            given = kind(2018, 7, 25, 20, 55, 14, 857000, zone)
            local = datetime.datetime.fromtimestamp(datetime.datetime.timestamp(given))
            assert accepted("track", "u", "Event", {"at": given}) == {"at": local.strftime("%Y-%m-%d %H:%M:%S")}
    assert accepted("track", "u", "Event", {"at": Stamp(2018, 7, 25, 1, 2, 3)}) == {"at": "2018-07-25 01:02:03"}


def test_two_names_that_a_subclass_of_str_keeps_apart_are_one():
    class Hostile(str):
        def __eq__(self, other):
            return self is other

        def __hash__(self):
            return id(self)

        def lower(self):
            return "%d" % id(self)
    for names in (Hostile("name"), Hostile("name")), (Hostile("name"), "name"), (Hostile("Name"), "name"):
        for method, arguments, _, _ in PROPERTY_CALLS:
            assert "name" in refused(tracker_to(), method, *arguments, dict.fromkeys(names, 1))


def test_a_platform_has_at_most_255_characters():
    sdk = tracker_to()
    sdk.track("u", "Event", None, "p" * 255)
    assert sdk.sink.records == [record("u", "Event", platform="p" * 255)]
    assert "data_platform" in refused(sdk, "track", "u", "Event", None, "p" * 256)


def test_a_call_for_which_the_stack_is_too_short_says_so_and_blames_no_value():
    run("""
        import datetime
        from collections import OrderedDict

        class Sink:
            def uploadData(self, record):
                records.append(record)
            flush = close = uploadData

        def outcome(room):
            depth, frame = 0, sys._getframe()
            while frame:
                depth, frame = depth + 1, frame.f_back
            before = len(records)
            try:
                sys.setrecursionlimit(depth + room)
                call(room)
            except RecursionError:
                assert len(records) == before
            else:
                assert len(records) == before + 1
            finally:
                sys.setrecursionlimit(1000)
            return len(records) - before

        records, tracker = [], tracker_to(Sink())
        properties = {"day": datetime.date(2020, 1, 1), "number": 1.5, "names": ["x"], "whole": 10 ** 18}
        for call in (lambda room: tracker.track("user", "Event%d" % room, properties),
                     lambda room: tracker.track("user", "Event%d" % room, OrderedDict(properties)),
                     lambda room: tracker.profile_unset("user", ["name"], "platform%d" % room)):
            for _ in range(2):                         # once with nothing imported and kept, then with all
                outcomes = [outcome(room) for room in range(1, 100)]
                assert sorted(set(outcomes)) == [0, 1]
    """)


def test_a_message_is_one_printable_line_whatever_a_value_and_its_class_say_of_themselves():
    class Nameless(type):
        @property
        def __name__(cls):
            raise ZeroDivisionError
    for said in "\x1b[31mred\nline\0", "\ud800", "\u202eright to left", 1, "x" * 10 ** 6:
        for kind in object, str, int, list:
            hostile = type("Hostile", (kind,), {"__repr__": lambda self: said})
            value = hostile(*{str: ["a" * 300], int: [2 ** 70], list: [[1]]}.get(kind, []))
            for call in ("track", "u", "Event", {"the_name": value}), ("track", value, "Event"), ("profile_unset", "u", [value]):
                refused(tracker_to(), *call)
    refused(tracker_to(), "track", "u", "Event", {"the_name": Nameless("Hostile", (), {})()})


@pytest.mark.parametrize("method, arguments, argument, value", NAME_CALLS[:-1])
def test_a_name_that_cannot_be_hashed_again_is_refused_or_taken_as_the_str_that_it_is(method, arguments, argument, value):
    class Once(str):
        def __hash__(self):
            assert "hashed" not in vars(self)
            self.hashed = True
            return 1
    for kind in dict, collections.OrderedDict, collections.Counter:
        for name, bad in (Once("name"), False), (Once("a name"), True):
            given = kind()
            dict.__setitem__(given, name, value)
            if bad:
                assert argument in refused(tracker_to(), method, *arguments, given)
            else:
                assert accepted(method, *arguments, given) == {"name": value}


@table("bad", [1, None, "x" * 256, "\ud800"])
def test_a_message_about_a_list_names_the_position_and_one_about_a_string_its_length(bad):
    message = refused(tracker_to(), "track", "u", "Event", {"tags": ["ok", "ok", bad]})
    assert "event_properties['tags'][2]" in message
    assert message.endswith(": it must be a str of at most 255 characters, encodable as UTF-8")
    assert "256" in message or bad != "x" * 256
    assert "301" in refused(tracker_to(), "track", "u", "Event", {"a": "x" * 301})


@table("call, said", [
    (("setAppId", "\ud800"), "encodable as UTF-8"), (("track", "\ud800", "Event"), "encodable as UTF-8"),
    (("profile_delete", "u", "\ud800"), "encodable as UTF-8"),
    (("profile_delete", "u", "", True, datetime.datetime(1999, 12, 31)), "datetime.datetime(1999, 12, 31, 0, 0)"),
    (("track", "u", "Event", {"until": datetime.datetime.max.replace(tzinfo=datetime.timezone.utc)}), "9999")])
def test_a_message_shows_what_the_rule_is_about(monkeypatch, call, said):
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        message = refused(tracker_to(), *call)
        assert said in message
    finally:
        monkeypatch.undo()
        time.tzset()


@table("name", NAMES)
def test_a_name_is_accepted(name):
    sdk = tracker_to()
    sdk.track("u", name)
    assert sdk.sink.records == [record("u", name)]
    for method, arguments, _, value in NAME_CALLS:
        assert accepted(method, *arguments, named(method, [name], value)) == {name: value}


@table("name", BAD_NAMES)
def test_any_other_name_is_refused(name):
    sdk = tracker_to()
    assert "event_name" in refused(sdk, "track", "u", name)
    for method, arguments, argument, value in NAME_CALLS:
        assert argument in refused(sdk, method, *arguments, named(method, ["ok", name], value))


@table("name", RESERVED)
def test_a_reserved_property_name_is_refused_in_any_case(name):
    for spelled in name, name.upper(), name.title():
        for method, arguments, argument, value in NAME_CALLS:
            message = refused(tracker_to(), method, *arguments, named(method, [spelled], value))
            assert argument in message and spelled in message


def test_names_that_differ_only_by_case_are_refused_in_one_call():
    for method, arguments, argument, value in NAME_CALLS:
        assert argument in refused(tracker_to(), method, *arguments, named(method, ["name", "NAME"], value))


def many(count, start=0):
    return {"p%d" % number: number for number in range(start, start + count)}


def test_a_call_takes_100_properties_and_no_more():
    for method, arguments, argument, value in NAME_CALLS:
        assert accepted(method, *arguments, named(method, many(100), value)) == dict.fromkeys(many(100), value)
        assert argument in refused(tracker_to(), method, *arguments, named(method, many(101), value))


def test_there_are_100_super_properties_in_all_and_no_more():
    sdk = tracker_to()
    sdk.registerSuperProperties(many(60))
    refused(sdk, "registerSuperProperties", many(41, 60))
    refused(sdk, "registerSuperProperties", dict(many(41, 60), P0=-1))          # nothing is replaced either
    sdk.registerSuperProperties(many(40, 60))
    sdk.registerSuperProperties({name.upper(): -1 for name in many(100)})       # replaces them: still 100
    assert sdk.getAllSuperProperties() == {name.upper(): -1 for name in many(100)}
    refused(sdk, "registerSuperProperties", {"one_more": 1})
    sdk.unregisterSuperProperty("p0")
    sdk.registerSuperProperties({"one_more": 1})


def test_an_event_may_have_100_properties_beside_100_super_properties():
    with analysys.Receiver() as server:
        sdk = tracker_to(DefaultCollecter(server.url))
        sdk.registerSuperProperties(many(100))
        sdk.track("u", "Event", many(100, 100))
        assert server.records == [record("u", "Event", many(200))]


NO_NUMBERS = [True, False, "1", [], ["a"], None, datetime.date(2018, 7, 25), float("nan"), 2 ** 63]
NO_LISTS = ["a", 1, True, None, {"a"}, {}, datetime.date(2018, 7, 25), [1], ["x"] * 101]


@table("method, good, bad", [
    ("profile_increment", [1, -1.5, decimal.Decimal("0.5"), fractions.Fraction(1, 2), Level.HIGH], NO_NUMBERS),
    ("profile_append", [["a"], []], NO_LISTS)])
def test_profile_increment_takes_numbers_and_profile_append_lists_and_nothing_else(method, good, bad):
    for value in good:
        assert accepted(method, "u", {"name": value}) == {"name": value}
    for value in bad:
        message = refused(tracker_to(), method, "u", {"ok": good[0], "the_name": value})
        assert "profile_properties" in message and "the_name" in message


def test_profile_unset_takes_a_list_tuple_or_set_and_nothing_else():
    for keys in ["name"], ("name",), {"name"}:
        assert accepted("profile_unset", "u", keys) == {"name": ""}
    for keys in "name", b"name", 1, True, {"name": 1}, object():
        assert "profile_properties_keys" in refused(tracker_to(), "profile_unset", "u", keys)


@table("properties", [["a"], "a", 1, True, {"a"}, [("a", 1)], object()])
def test_properties_are_a_dict(properties):
    for method, arguments, argument, _ in NAME_CALLS[:-1]:
        assert argument in refused(tracker_to(), method, *arguments, properties)


@each_call
def test_ids_platform_login_and_time_are_checked_in_every_call(method, arguments, xwhat, context):
    sdk, who = tracker_to(), "alias_id" if method == "alias" else "distinct_id"
    for xwho in "u", "x" * 254, "\U0001f600" * 254:
        getattr(sdk, method)(xwho, *arguments[1:])
        assert sdk.sink.records[-1] == record(xwho, xwhat, context, is_login=method == "alias")
    for xwho in "", "x" * 255, "\U0001f600" * 255, "\ud800", None, 1, True, b"u", ["u"]:
        assert who in refused(sdk, method, xwho, *arguments[1:])
        assert "distinct_id" in refused(sdk, "alias", "u", xwho)
    for name, values in [("data_platform", [1, True, b"ios", ["ios"], "\ud800"]),
                         ("is_login", [1, 0, None, "true", "", []]),
                         ("xwhen", [10 ** 12 - 1, 10 ** 13, 0, 1.5e12, "1532514947857", True, [],
                                    datetime.date(2018, 7, 25), decimal.Decimal(1532514947857)])]:
        for value in values:
            assert name in refused(sdk, method, *arguments, **{name: value})


@table("appid", ["", "x" * 256, "\ud800", None, 1, True, b"app"])
def test_a_refused_app_id_leaves_the_last_one(appid):
    sdk = tracker_to()
    assert "appid" in refused(sdk, "setAppId", appid)
    for good in None, "x" * 255, "\U0001f600" * 255:
        if good:
            sdk.setAppId(good)
        sdk.track("u", "Event")
        assert sdk.sink.records.pop() == record("u", "Event", appid=good or "app")


@table("mode", [3, -1, None, "1", 1.0, 10 ** 5000])
def test_a_refused_debug_mode_leaves_the_last_one(mode):
    sdk = tracker_to()
    sdk.setDebugMode(2)
    assert "debug_mode" in refused(sdk, "setDebugMode", mode)
    sdk.track("u", "Event")
    sdk.setDebugMode()
    sdk.track("u", "Event")
    assert sdk.sink.records == [record("u", "Event", debug=2), record("u", "Event")]


HUGE = "x" * 10 ** 7


@table("words, call", [
    ("appid 5", ("setAppId", 5)), ("debug_mode 7 0 1 2", ("setDebugMode", 7)), ("distinct_id 7", ("track", 7, "E")),
    ("alias_id 7", ("alias", 7, "d")), ("event_name 1st", ("track", "u", "1st")),
    ("data_platform 7", ("profile_delete", "u", 7)), ("is_login yes", ("profile_delete", "u", "", "yes")),
    ("xwhen 7 13", ("profile_delete", "u", "", True, 7)), ("event_properties 100", ("track", "u", "E", many(101))),
    ("event_properties bad-key", ("track", "u", "E", {"bad-key": 1})),
    ("event_properties city 100", ("track", "u", "E", {"city": ["x"] * 101})),
    ("event_properties city xxxxx 255", ("track", "u", "E", {"city": "x" * 256})),
    ("profile_properties_keys bad-key", ("profile_unset", "u", ["bad-key"])),
    ("appid xxxxx 255", ("setAppId", HUGE)), ("debug_mode xxxxx", ("setDebugMode", HUGE)),
    ("distinct_id xxxxx", ("track", HUGE, "E")), ("event_name xxxxx", ("track", "u", HUGE)),
    ("event_properties", ("track", "u", "E", HUGE)), ("event_properties xxxxx", ("track", "u", "E", {HUGE: 1})),
    ("city xxxxx 255", ("track", "u", "E", {"city": HUGE})), ("city 255", ("track", "u", "E", {"city": [HUGE]})),
    ("xxxxx None", ("track", "u", "E", {HUGE: None})),
    ("city", ("track", "u", "E", {"city": {HUGE: 1}})), ("city", ("track", "u", "E", {"city": 10 ** 10 ** 5})),
    ("data_platform", ("profile_delete", "u", [HUGE])), ("is_login xxxxx", ("profile_delete", "u", "", HUGE)),
    ("xwhen xxxxx", ("profile_delete", "u", "", True, HUGE)),
    ("xwhen", ("profile_delete", "u", "", True, 10 ** 10 ** 5)),
    ("city int 332193 bits", ("track", "u", "E", {"city": {"a": [10 ** 10 ** 5]}})),
    ("super_properties", ("registerSuperProperties", HUGE)), ("profile_properties_keys", ("profile_unset", "u", HUGE)),
    ("profile_properties_keys xxxxx", ("profile_unset", "u", [HUGE]))])
def test_a_message_names_the_argument_the_value_and_the_limit_and_is_short(words, call):
    message = refused(tracker_to(), *call)                # which checks the length
    assert [word for word in words.split() if word not in message] == []


def test_the_callers_objects_are_never_changed_and_what_they_do_later_changes_nothing():
    for method, arguments, _, _ in PROPERTY_CALLS + [("profile_append", ("u",), "", "")]:
        sdk, given = tracker_to(), {"tags": ["a"]}
        if method != "profile_append":
            given["when"] = datetime.datetime(2018, 7, 25)
        before = copy.deepcopy(given)
        getattr(sdk, method)(*arguments, given)
        assert given == before
        given["tags"].append("b")
        given["more"] = 1
        kept = sdk.sink.records[0]["xcontext"] if sdk.sink.records else sdk.getAllSuperProperties()
        assert kept["tags"] == ["a"] and "more" not in kept
    keys = ["n"]
    sdk.profile_unset("u", keys)
    assert keys == ["n"]


def test_records_share_nothing_with_each_other_or_the_tracker():
    sdk = tracker_to()
    sdk.registerSuperProperties({"tags": ["a"]})
    sdk.track("u", "Event")
    sdk.sink.records[0]["xcontext"]["tags"].append("b")
    sdk.track("u", "Event")
    assert sdk.sink.records[1] == record("u", "Event", {"tags": ["a"]})



@table("named, make, values", [
    ("server_url", DefaultCollecter,
     [None, 5, b"http://127.0.0.1", "", "127.0.0.1:80", "ftp://127.0.0.1", "http://", "http://:80",
      "https://host:port",
      "http://h:0", "http://h/?a=b", "http://h/#a", "http://h\xe9/", "http://user:pass@h/",
      "http://h:65536", "http://h:-1", "http://a b/", URL + "/\n", "http://[::1", "http://" + " " * 10 ** 6]),
    ("server_url", BatchCollecter, ["host", None]),
    ("request_timeout", lambda value: DefaultCollecter(URL, value), [0, -1, "10", float("nan")]),
    ("request_timeout", lambda value: BatchCollecter(URL, request_timeout=value), [0, -1, "10", float("nan")]),
    ("max_interval_time", lambda value: BatchCollecter(URL, value), [0, -1, "15", float("nan")]),
    ("queue_cache_max_size", lambda value: BatchCollecter(URL, 15, value), [0, -1, 1.0, "10", None]),
    ("collecter_max_size", lambda value: BatchCollecter(URL, 15, 10, value), [0, -1, 1.0, "100", None]),
    ("queue_max_size", lambda value: BatchCollecter(URL, 15, 10, 100, value), [0, -1, 1.0, "1000", None, True]),
    ("queue_timeout", lambda value: BatchCollecter(URL, queue_timeout=value), [-1, -0.001, "10", float("nan"), True]),
    ("spool_path", lambda value: BatchCollecter(URL, spool_path=value), ["", 5, "a\0b"]),
    ("spool_max_bytes", lambda value: BatchCollecter(URL, spool_max_bytes=value), [0, -1, 1.0, "1", None]),
    ("ssl_context", lambda value: BatchCollecter(URL, ssl_context=value), [True, "ca.pem", ssl.SSLContext]),
    ("headers", lambda value: DefaultCollecter(URL, headers=value), [5, "a: b", {"a b": "c"}, {"a": 5}]),
    ("on_error", lambda value: BatchCollecter(URL, on_error=value), [5, "log", []]),
    ("on_error", lambda value: AnalysysPythonSdk(Sink(), value), [5, "log", []]),
    ("log_path", LogCollecter, ["", 5, None, "a\0b"]),
    ("is_batch", lambda value: LogCollecter("logs", value), [1, None, "yes"]),
    ("batch_num", lambda value: LogCollecter("logs", True, value), [0, -1, 2.5, "20", None]),
    ("batch_num", lambda value: LogCollecter("logs", False, value), [0, None]),
    ("general_rule", lambda value: LogCollecter("logs", True, 20, value), ["", "week", None, 1, HUGE])])
def test_a_bad_constructor_argument_is_named_and_refused(tmp_path, monkeypatch, named, make, values):
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(IllegalData, match=named) as caught:
            make(value)
        assert len(str(caught.value)) <= 500 and os.listdir(str(tmp_path)) == []


def test_a_directory_may_be_a_path_and_type_checkers_know_that(tmp_path):
    for make, name in (LogCollecter, "log_path"), (functools.partial(BatchCollecter, URL), "spool_path"):
        make(**{name: tmp_path}).close()
        assert "os.PathLike[str]" in inspect.signature(make).parameters[name].annotation


def test_the_smallest_constructor_arguments_are_accepted(tmp_path):
    for collecter in [DefaultCollecter(URL, 0.001), BatchCollecter(URL, 0.001, 1, 1, 1, 0.001, queue_timeout=0)] + [
            LogCollecter(str(tmp_path), True, 1, rule) for rule in ("hour", "day", "Hour", "DAY")]:
        collecter.close()
        balanced(collecter, accepted=0)
        with pytest.raises(analysys.AnalysysPythonSdkException, match="closed"):
            collecter.uploadData(record("u", "Event"))


# ---------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------

def test_a_request_is_a_post_of_base64_gzip_json_to_up():
    with Server() as server:
        tracker_to(DefaultCollecter(server.url, headers={"X-Team": "argo"})).track("u", "Event", {"name": "跑步机"})
        request = server.requests[0]
    assert (request.method, request.target) == ("POST", "/up")
    assert request.headers["user-agent"] == "analysys-python/" + analysys.__version__
    assert request.headers["x-team"] == "argo"
    body = gzip.decompress(base64.b64decode(request.body, validate=True)).decode("utf-8")
    assert json.loads(body) == [record("u", "Event", {"name": "跑步机"})]


def test_a_body_of_more_than_a_packet_is_compressed():
    with Server() as server:
        with tracker_to(BatchCollecter(server.url, queue_cache_max_size=NEVER)) as sdk:
            events(sdk, 100)
        assert numbers(server.records) == list(range(100))
        assert len(server.requests[0].body) < len(json.dumps(server.records)) / 4


@table("path, target", [("", "/up"), ("/", "/up"), ("/up", "/up"), ("/a/b", "/a/b/up"), ("/a/up", "/a/up"), ("/a/up/", "/a/up"),
                        ("/startup", "/startup/up")])
def test_up_is_appended_unless_the_path_ends_in_it(path, target):
    with Server() as server:
        tracker_to(DefaultCollecter(server.url + path)).track("u", "Event")
        assert [request.target for request in server.requests] == [target]


OK = b'{"code":200}'
DELIVERED = [(200, OK), (200, b' {"code": 200, "msg": "ok"}\n'), (201, OK), (299, OK), (200, encode(OK)),
             (200, encode(b'{"code":200,"message":"\xe5\xa5\xbd"}')), (200, b" " * 65524 + OK),
             (200, encode(b" " * 65524 + OK))]
REFUSED = [(200, b'{"code":400,"msg":"no such app","message":"no such app"}'), (200, encode({"code": 400})),
           (200, b'{"code":402}'), (200, b'{"code":499}'), (200, b'{"code":413}'), (400, b'{"code":400}'),
           (400, b"{}"), (422, b'{"error":"bad"}'), (400, encode({})), (413, b""), (413, b"<html>too large</html>")]
NOT_DELIVERED = [
    (500, OK), (503, OK), (404, OK), (403, OK), (300, OK), (200, b'{"code":500}'), (200, b'{"code":399}'),
    (200, b'{"code":401}'), (200, b'{"code":403}'), (200, b'{"code":404}'), (200, b'{"code":407}'),
    (200, b'{"code":408}'), (200, b'{"code":429}'), (401, b'{"code":401}'), (404, b'{"code":404}'),
    (429, b'{"code":429}'), (400, b"<html>400</html>"), (400, b""), (400, b"[]"), (422, b"null"), (200, b""),
    (204, b""), (200, b"200"), (200, b"<html>200</html>"), (200, b'"200"'), (200, b"[200]"), (200, b'[{"code":200}]'),
    (200, b"{}"), (200, b'{"code":"200"}'), (200, b'{"code":"400"}'), (200, b'{"code":null}'), (200, b'{"code":true}'),
    (200, b'{"code":200'), (200, b'{"Code":200}'), (200, b'{"code":' + b"9" * 5000 + b"}"), (200, b"\xff\xfe"),
    (200, b"[" * 60000), (200, base64.b64encode(OK)), (200, gzip.compress(OK)), (200, encode(OK)[:20]),
    (200, b" " * 65525 + OK), (200, encode(b" " * 65525 + OK)), (200, encode(b" " * 10 ** 7 + OK))]


def attempt(reply, **keywords):
    """Send one record to a server that answers *reply*; return (what was raised, number of requests)."""
    with Server(reply) as server:
        collecter, one = DefaultCollecter(server.url, **keywords), record("u", "Event")
        try:
            collecter.uploadData(one)
        except analysys.AnalysysPythonSdkException as error:
            assert error.records == [one]
            return error, len(server.requests)
        return None, len(server.requests)


@table("expected, rows", [(type(None), DELIVERED), (IllegalData, REFUSED), (NetworkError, NOT_DELIVERED)])
def test_a_2xx_with_code_200_is_success_the_platforms_own_word_refuses_and_all_else_is_not_the_datas_fault(
        expected, rows):
    def check(row):
        error, requests = attempt(answer(*row))
        assert (type(error), requests) == (expected, 1)
        assert b"no such app" not in row[1] or "no such app" in str(error)
    all_at_once(check, rows)


def deflate(data, form):
    packer = zlib.compressobj(6, zlib.DEFLATED, form)
    return packer.compress(data) + packer.flush()


BOM = b"\xef\xbb\xbf"


@table("encoding, pack", [(None, bytes), ("identity", bytes), ("gzip", gzip.compress), ("X-GZip ", gzip.compress),
                          ("gzip", bytes), ("deflate", zlib.compress), ("Deflate", lambda data: deflate(data, -15))])
def test_a_success_is_understood_in_every_form_that_servers_give_it(encoding, pack):
    def check(body):
        assert attempt(answer(200, pack(body), *["Content-Encoding: " + encoding] if encoding else [])) == (None, 1)
    all_at_once(check, [OK, BOM + OK, encode(OK), BOM + encode(OK), encode(BOM + OK)])


@table("encoding, body", [("gzip", gzip.compress(b" " * 65525 + OK)), ("deflate", deflate(b" " * 10 ** 7 + OK, -15)),
                          ("gzip", gzip.compress(OK)[:-9]), ("br", gzip.compress(OK)),
                          (None, OK.decode().encode("utf-16")), (None, b'{"code":true}')])
def test_an_answer_that_is_not_understood_is_told_as_one_that_may_make_a_duplicate(encoding, body):
    error, _ = attempt(answer(200, body, *["Content-Encoding: " + encoding] if encoding else []))
    assert type(error) is NetworkError and "the server may have the data, and it may come twice" in str(error)


@table("before", [b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n",
                  b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n",
                  b"HTTP/1.1 199 Any\r\n" + b"X-Much: 12345678\r\n" * 90 + b"\r\n"])
@table("times", [1, 200])
def test_any_number_of_1xx_answers_may_come_before_the_answer(before, times):
    with Server(before * times + answer()) as server:
        events(tracker_to(DefaultCollecter(server.url)), 2)
        assert (numbers(server.records), server.connections) == ([0, 1], 1)


@table("kind, status, body", [
    ("failing", 500, OK), ("failing", 503, b"<html>"), ("failing", 599, b""), ("failing", 200, code(500)),
    ("failing", 200, code(599)), ("failing", 404, code(500)), ("retry", 200, code(600)),
    ("retry", 200, b'{"code":5e2}'),
    ("retry", 500, code(401)), ("too large", 500, code(413)), ("too large", 413, OK), ("refused", 500, code(400)),
    ("refused", 422, code(200)), ("retry", 429, b"{}"), ("retry", 600, b"{}"), ("delivered", 206, OK)])
def test_an_answer_is_delivered_refused_too_large_a_server_that_chokes_or_any_other_trouble(kind, status, body):
    assert analysys._judge(analysys._Answer(status, {}, body)).kind == kind


@table("header, seconds", [("7", 7), (" 7 ", 7), ("0", None), ("-1", None), ("soon", None), ("301", 300),
                           ("9" * 400, 300),
                           ("Fri, 31 Dec 9999 23:59:59 GMT", 300), ("Thu, 01 Jan 1970 00:00:00 GMT", None),
                           ("\xb2", None), ("Fri, 99 Dec 2100", None), ("Thu, 99 Jan 2020 25:00:00 GMT", None),
                           ("", None), ("-5", None), ("1e3", None), ("nan", None)])
def test_retry_after_is_seconds_or_a_date_and_five_minutes_at_most(header, seconds):
    assert analysys._judge(analysys._Answer(503, {"Retry-After": header}, b"")).wait == seconds


def test_answers_that_end_with_a_chunk_or_with_the_connection_are_understood():
    assert attempt(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nc\r\n" + OK + b"\r\n0\r\n\r\n") == (None, 1)

    def until_closed(request):
        yield b"HTTP/1.0 200 OK\r\n\r\n" + OK
        raise ConnectionError
    assert attempt(until_closed) == (None, 1)


# ---------------------------------------------------------------------------
# Transport
# ---------------------------------------------------------------------------

def not_loopback(url):
    """Return *url* under a name that a proxy is used for, and that OTHER_HOST is a certificate of."""
    return url.replace("127.0.0.1", "elsewhere.invalid")


@table("certificate, through_a_proxy", [(None, False), (CERTIFICATE, False), (OTHER_HOST, True)])
def test_200_events_over_http_https_or_a_tunnel_use_one_connection(monkeypatch, certificate, through_a_proxy):
    with Server(certificate=certificate) as server, Proxy() as proxy:
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//user:secret@"))
        url = not_loopback(server.url) if through_a_proxy else server.url
        sdk = tracker_to(DefaultCollecter(url, ssl_context=ca_context()))
        events(sdk, 200)
        assert server.records == [record("u", "Event", {"n": number}) for number in range(200)]
        assert (server.connections, proxy.connections) == (1, through_a_proxy)
        assert not through_a_proxy or "Basic " + base64.b64encode(b"user:secret").decode() in str(proxy.requests)
        assert "authorization" not in str(server.requests[0].headers)
        assert balanced(sdk.sink) == {"accepted": 200, "delivered": 200, "rejected": 0, "pending": 0,
                                   "requests": 200, "retries": 0}


def test_http_uses_the_proxy_of_the_environment_and_heeds_no_proxy(monkeypatch):
    with Server() as server, Server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        events(tracker_to(DefaultCollecter("http://nowhere.invalid:8089/a")), 2)
        assert [request.target for request in proxy.requests] == ["http://nowhere.invalid:8089/a/up"] * 2
        monkeypatch.setenv("no_proxy", "elsewhere.invalid")
        resolves_to(monkeypatch, server.server_address)
        events(tracker_to(DefaultCollecter(not_loopback(server.url))), 2)
        assert (proxy.connections, server.connections, len(server.requests)) == (1, 1, 2)
        server.reply = answer(500)
        assert "proxy" not in mishap(not_loopback(server.url))


def test_a_proxy_of_http_that_speaks_tls_gets_it_and_is_verified_as_a_server_is(tmp_path, monkeypatch):
    with Server(certificate=CERTIFICATE) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert "ssl_context" in mishap("http://nowhere.invalid") and not proxy.requests
        (tmp_path / "ca.pem").write_text(CA)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        monkeypatch.setenv("https_proxy", proxy.url)   # no Python opens a tunnel over TLS
        events(tracker_to(DefaultCollecter("http://nowhere.invalid:8089/a")), 2)
        assert [request.target for request in proxy.requests] == ["http://nowhere.invalid:8089/a/up"] * 2
        assert "to which we speak HTTP and not https: " in mishap("https://nowhere.invalid")


def resolves_to(monkeypatch, *addresses):
    """Let every host name have these addresses."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


@table("scheme", ["http", "https"])
@table("host", ["127.0.0.1", "localhost", "127.1", "LOCALHOST.", "a.localhost", "[::1]", "[0:0::1]",
                "[::ffff:127.0.0.1]"])
def test_this_machine_is_never_reached_through_a_proxy(monkeypatch, scheme, host):
    with Server(certificate=CERTIFICATE if scheme == "https" else None) as server, Proxy() as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        resolves_to(monkeypatch, server.server_address)
        context = scheme == "https" and ssl._create_unverified_context() or None
        url = server.url.replace("127.0.0.1", host)
        DefaultCollecter(url, ssl_context=context).uploadData(record("u", "Event"))
        assert (len(server.requests), proxy.connections) == (1, 0)


def test_behind_a_proxy_the_receiver_works_as_it_is(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.invalid:3128")
    with analysys.Receiver() as server:
        events(tracker_to(DefaultCollecter(server.url)), 1)
        assert numbers(server.records) == [0]


@table("through_a_proxy", [False, True])
@table("certificate, trust, accepted", [
    (CERTIFICATE, None, False), (CERTIFICATE, "context", True), (CERTIFICATE, "machine", True),
    (OTHER_HOST, None, False), (OTHER_HOST, "context", False), (OTHER_HOST, "machine", False)])
def test_a_private_ca_needs_trust_and_another_hosts_name_is_always_refused(tmp_path, monkeypatch, certificate, trust,
                                                                           accepted, through_a_proxy):
    if through_a_proxy:                                # under its other name
        certificate = OTHER_HOST if certificate == CERTIFICATE else CERTIFICATE
    with Server(certificate=certificate) as server, Proxy() as proxy:
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
        if trust == "machine":
            (tmp_path / "ca.pem").write_text(CA)
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        url = not_loopback(server.url) if through_a_proxy else server.url
        collecter = DefaultCollecter(url, ssl_context=ca_context() if trust == "context" else None)
        if accepted:
            collecter.uploadData(record("u", "Event"))
        else:
            with pytest.raises(NetworkError, match="(?i)certificate|hostname"):
                collecter.uploadData(record("u", "Event"))
        assert (len(server.requests), proxy.connections) == (accepted, through_a_proxy)


def test_nothing_about_tls_or_urllib_changes_for_the_rest_of_the_process():
    def settings():
        return (ssl._create_default_https_context, ssl.create_default_context, urllib.request._opener,
                socket.getdefaulttimeout())
    before = settings()
    with Server(certificate=CERTIFICATE) as server:
        tracker_to(DefaultCollecter(server.url, ssl_context=ca_context())).track("u", "Event")
        assert len(server.requests) == 1 and settings() == before
        with pytest.raises(OSError, match="(?i)certificate"):
            urllib.request.urlopen(server.url, timeout=10)
        assert len(server.requests) == 1


def test_a_stale_connection_is_replaced_without_the_caller_noticing():
    def hang_up(request):
        yield answer()
        raise ConnectionError
    with Server(hang_up) as server:
        sdk = tracker_to(DefaultCollecter(server.url))
        events(sdk, 50)
        assert numbers(server.records) == list(range(50))
        assert server.connections == 50


def test_what_a_server_says_unasked_is_not_taken_for_the_answer_to_the_next_request():
    read, sent = threading.Event(), threading.Event()

    def talkative(request):
        yield answer()
        if not sent.is_set():
            assert read.wait(10)
            yield answer(408, b"{}")
            sent.set()
    with Server(talkative) as server:
        sdk = tracker_to(DefaultCollecter(server.url))
        events(sdk, 1)
        read.set()
        assert sent.wait(10)
        events(sdk, 1, start=1)
        assert (numbers(server.records), server.connections) == ([0, 1], 2)


class BreakingServer(Server):
    """A server with a script: how many bytes of a request's body it reads, what it answers, how it then hangs up."""

    def __init__(self, *script, certificate=None):
        self.script = collections.deque(script)
        super().__init__(certificate=certificate)

    def serve(self, connection, stream):
        for line in iter(stream.readline, b""):
            headers = dict(line.decode().lower().rstrip().split(": ", 1) for line in iter(stream.readline, b"\r\n"))
            size = int(headers["content-length"])
            read, reply, end = self.script.popleft() if self.script else (size, answer(), None)
            self.requests.append(Request("POST", "/up", headers, stream.read(min(read, size))))
            connection.sendall(reply)
            if end:
                return end(connection)


def closed(connection):
    """What remains unread resets the connection; over TLS nothing says goodbye."""


def hung_up(connection):
    connection.settimeout(0.05)
    with contextlib.suppress(OSError):                 # who waits for the other's goodbye waits in vain
        connection.unwrap() if isinstance(connection, ssl.SSLSocket) else connection.shutdown(socket.SHUT_WR)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


ENDS = [closed, hung_up, reset]
SIZES = [3, 25000, 2000000]                            # bytes
UNBUFFERED = 20000000                                  # bytes: more than the socket buffers on the way take
over_http_and_https = pytest.mark.parametrize("certificate", [None, CERTIFICATE], ids=["http", "https"])


@over_http_and_https
def test_what_a_server_says_beyond_its_answer_is_not_taken_for_the_answer_to_the_next_request(certificate):
    read_at_once = analysys._READ_AT_ONCE              # bytes, and as many has the answer
    size = read_at_once - len(answer(200, b"." * 8000)) + 8000
    said = answer(200, code(200).ljust(size)) + answer(400, code(400))
    with Server(lambda _: said if len(server.requests) == 1 else answer(), certificate) as server:
        sdk = tracker_to(DefaultCollecter(server.url, ssl_context=certificate and ca_context()))
        events(sdk, 2)
        assert (numbers(server.records), server.connections) == ([0, 1], 2)


@contextlib.contextmanager
def posting(*script, certificate, timeout=20):
    """Yield a server with that script and a function that posts a body to it and returns the verdict."""
    with BreakingServer(*script, certificate=certificate) as server:
        transport = analysys._Transport(server.url + "/up", certificate and ca_context(), {})
        yield server, lambda body=b"[1]": transport.ask(body, timeout)
        transport.close()


@over_http_and_https
def test_a_kept_connection_that_breaks_before_the_answer_is_replaced_unnoticed(certificate):
    def check(case):
        end, read, size = case
        steps = [(10 ** 9, answer(), None), (read, b"", end)] + [(10 ** 9, answer(), end)] * 2
        with posting(*steps, certificate=certificate) as (server, post):
            for _ in range(4):
                assert post(bytes(size)) == analysys._SUCCESS
            assert (server.connections, len(server.requests)) == (4, 5)
    all_at_once(check, list(itertools.product(ENDS, [0, 10 ** 9], SIZES)))


@over_http_and_https
def test_half_an_answered_request_is_not_sent_again_unnoticed(certificate):
    def check(case):
        end, reply = case
        with posting((9, answer(), None), (9, reply, end), certificate=certificate) as (server, post):
            assert post() == analysys._SUCCESS
            verdict = post()
            assert (verdict.kind, len(server.requests)) == (analysys._RETRY, 2)
            assert "the server may have the data, and it may come twice" in verdict.reason
    all_at_once(check, list(itertools.product(ENDS, [b"H", answer()[:20], answer()[:-12],
                                                     answer(200, b"{", "Connection: close")])))


@over_http_and_https
def test_a_server_that_hangs_up_on_a_whole_body_chokes_and_one_that_does_in_the_middle_is_only_gone(certificate):
    def check(case):
        end, size = case
        with posting((min(size, 2000000), b"", end), certificate=certificate) as (server, post):
            verdict = post(bytes(size))
            if size == UNBUFFERED:
                assert verdict.kind == analysys._RETRY
            else:
                assert (verdict.kind, len(server.requests[0].body)) == (analysys._CHOKED, size)
                assert "hung up" in verdict.reason and server.url in verdict.reason
    all_at_once(check, list(itertools.product(ENDS, SIZES + [UNBUFFERED])))


@over_http_and_https
def test_an_early_answer_is_judged_but_half_a_body_is_not_delivered(certificate):
    def check(case):
        end, (status, kind, size) = case
        early = (0, answer(status, code(status), "Connection: close"), end)
        with posting((10 ** 9, answer(), None), early, early, certificate=certificate) as (server, post):
            assert post() == analysys._SUCCESS
            for _ in range(2):                         # a kept connection and a new one
                assert post(bytes(size)).kind == kind
            assert len(server.requests) == 3
    answers = [(413, analysys._TOO_LARGE, size) for size in SIZES] + [(400, analysys._REFUSED, size) for size in SIZES]
    all_at_once(check, list(itertools.product(ENDS, answers + [(200, analysys._RETRY, UNBUFFERED)])))


@over_http_and_https
def test_a_batch_that_is_refused_early_as_too_large_is_halved_and_all_arrives(certificate):
    class Strict(FaultyServer):
        def serve(self, connection, stream):
            for line in iter(stream.readline, b""):
                size = max(int(line.split()[1]) for line in iter(stream.readline, b"\r\n")
                           if line.lower().startswith(b"content-length"))
                if size > 20000:
                    return connection.sendall(answer(413, b"", "Connection: close"))
                self.accepted.extend(decode(stream.read(size)))
                connection.sendall(answer())
    with Strict(certificate=certificate) as server:
        collecter = BatchCollecter(server.url, queue_cache_max_size=NEVER, collecter_max_size=300,
                                   ssl_context=certificate and ca_context())
        tracker = tracker_to(collecter)
        for number in range(300):
            tracker.track("user", "Event", {"n": number, "noise": os.urandom(120).hex()})
        tracker.close()
        assert [one["xcontext"]["n"] for one in server.accepted] == list(range(300))


@table("through_a_proxy", [False, True])
def test_request_timeout_bounds_the_tls_handshake_and_the_tunnel_too(monkeypatch, through_a_proxy):
    with socket.socket() as silent:                    # accepts connections, as far as the client can tell
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        url = "127.0.0.1:%d" % silent.getsockname()[1]
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", "http://" + url)
        start = time.monotonic()
        with pytest.raises(NetworkError):
            url = not_loopback(url) if through_a_proxy else url
            DefaultCollecter("https://" + url, 0.2).uploadData(record("u", "Event"))
        assert time.monotonic() - start < 8


@over_http_and_https
def test_request_timeout_bounds_a_request_to_a_server_that_reads_slowly(certificate):
    class Slow(Server):
        def serve(self, connection, stream):
            while not done.wait(0.01):
                connection.recv(65536)
    done = threading.Event()
    with Slow(certificate=certificate) as server:
        transport = analysys._Transport(server.url, certificate and ca_context(), {})
        with within(8):
            verdict = transport.ask(bytes(UNBUFFERED), 0.3)
        done.set()
        assert verdict.kind == analysys._RETRY and "request_timeout" in verdict.reason


def test_a_request_takes_10_seconds_at_most_where_request_timeout_says_nothing(monkeypatch):
    class Watched(socket.socket):
        def settimeout(self, seconds):
            if threading.current_thread() is threading.main_thread():
                seen.append(seconds)
            super().settimeout(seconds)
    seen = []
    with Server() as server:
        monkeypatch.setattr(socket, "socket", Watched)
        DefaultCollecter(server.url).uploadData(record("u", "Event"))
        monkeypatch.undo()
    assert 5 < max(seen) <= 10                         # what was left of it


def test_a_hosts_first_address_does_not_use_up_the_whole_deadline(monkeypatch):
    with Server() as server, socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):                             # nobody accepts: what comes after these is not answered
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        resolves_to(monkeypatch, full.getsockname(), server.server_address)
        with within(8):
            DefaultCollecter(not_loopback(server.url), 2).uploadData(record("u", "Event"))
        resolves_to(monkeypatch, full.getsockname())
        with within(8), pytest.raises(NetworkError, match="nobody answers there.*firewall"):
            DefaultCollecter(not_loopback(server.url), 0.2).uploadData(record("u", "Event"))


def test_an_endless_answer_is_read_no_further_than_64_kib():
    sent = []

    def endless(request):
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        while True:
            sent.append(1)
            yield b" " * 65536
    error, requests = attempt(endless)
    assert (type(error), requests) == (NetworkError, 1)
    assert len(sent) < 1000                            # what socket buffers hold, not what ten seconds bring


class FakeClock:
    def __init__(self, monkeypatch):
        self.ahead = 0
        monkeypatch.setattr(analysys, "_CLOCK", self)

    def now(self):
        return time.monotonic() + self.ahead

    wait = staticmethod(analysys._CLOCK.wait)

    def advance(self, seconds):
        self.ahead += seconds


def sockets_of(transport):
    return [connection.sock for connection in list(transport._pool._all) if connection.sock is not None]


@over_http_and_https
def test_an_idle_connection_is_used_for_a_minute_and_then_closed_whoever_looks(monkeypatch, certificate):
    clock, now = FakeClock(monkeypatch), time.monotonic()
    clock.now = lambda: now + clock.ahead              # a second that this machine loses is none
    with posting(certificate=certificate) as (server, post):
        transport = analysys._Transport(server.url, certificate and ca_context(), {})
        ask = lambda: transport.ask(b"[1]", 5)
        for seconds, connections in [(0, 1), (59, 1), (59, 1), (61, 2)]:
            clock.advance(seconds)
            assert ask() == analysys._SUCCESS and server.connections == connections
        assert len(sockets_of(transport)) == 1         # the old one is closed
        assert 59 < transport.sweep() <= 60            # so long may a thread sleep
        clock.advance(61)
        assert transport.sweep() is None and not transport._pool._all
        assert ask() == analysys._SUCCESS and sockets_of(transport)
        transport.close()
        assert not transport._pool._all


def test_a_connection_is_not_kept_when_its_answer_was_too_long_or_its_collecter_is_closed_meanwhile():
    gate = Gate()
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + OK + b" " * (65537 - len(OK))
    with Server(lambda request: gate() if len(server.requests) == 2 else long) as server:
        transport = analysys._Transport(server.url, None, {})
        assert transport.ask(b"[1]", 20) == analysys._SUCCESS
        with threads(lambda: transport.ask(b"[1]", 20)):
            wait_until(lambda: len(server.requests) == 2)
            transport.close()
            gate.set()
        assert server.connections == 2 and not transport._pool._all


@over_http_and_https
def test_after_a_burst_of_threads_no_dead_connection_stays_open(monkeypatch, certificate):
    clock, gate, number = FakeClock(monkeypatch), threading.Barrier(20), 20

    def together(request):
        if len(server.requests) <= number:
            gate.wait(20)
        return answer()
    with Server(together, certificate) as server:
        transport = analysys._Transport(server.url, certificate and ca_context(), {})
        with threads(*[lambda: transport.ask(b"[1]", 20)] * number):
            pass
        assert len(sockets_of(transport)) == server.connections == number
        for sock in server.sockets[1:]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        clock.advance(1.1)                             # each call looks, at most once a second
        wait_until(lambda: transport.ask(b"[1]", 5) and clock.advance(1.1) or len(sockets_of(transport)) == 1)


@pytest.mark.parametrize("kind", [BatchCollecter, DefaultCollecter])
def test_a_thread_closes_an_idle_connection_and_one_that_died_while_nobody_calls(monkeypatch, kind):
    clock = FakeClock(monkeypatch)
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0.05)
    with Server() as server, tracker_to(kind(server.url)) as tracker:
        state = tracker.sink._state()
        transport = state._sender.transport if kind is BatchCollecter else state._transport
        for leave in (lambda: clock.advance(61), lambda: server.sockets[-1].shutdown(socket.SHUT_RDWR)):
            track(tracker, "Event")
            tracker.flush()
            assert len(sockets_of(transport)) == 1
            leave()
            wait_until(lambda: not sockets_of(transport))


def test_a_default_collecter_starts_its_thread_where_a_connection_is_kept_and_tries_again_where_it_could_not(monkeypatch):
    started, real = [], threading.Thread.start
    def start(thread):
        if thread.name == "analysys-sweeper":
            started.append(thread)
            if len(started) == 1:
                raise RuntimeError("can't start new thread")
        real(thread)
    monkeypatch.setattr(threading.Thread, "start", start)
    with Server(answer(200, b'{"code":200}', "Connection: close")) as server:
        with tracker_to(DefaultCollecter(server.url)) as tracker:
            for number, reply in enumerate([server.reply, server.reply, answer(), answer(), answer()]):
                server.reply = reply
                track(tracker, "Event")
                assert len(started) == [0, 0, 1, 2, 2][number]


def test_the_thread_of_a_default_collecter_ends_with_its_last_connection_or_its_collecter(monkeypatch):
    def sweepers():                                    # but those that other tests left
        return {thread for thread in threading.enumerate() if thread.name == "analysys-sweeper"} - others
    others = set()
    others = sweepers()
    clock = FakeClock(monkeypatch)
    with Server() as server:
        for end in ("drop", "close", "wait"):
            monkeypatch.setattr(analysys, "_LOOK_EVERY", 0.05 if end == "wait" else NEVER)
            tracker = tracker_to(DefaultCollecter(server.url))
            track(tracker, "Event", "Event")
            assert len(sweepers()) == 1
            clock.advance(61 if end == "wait" else 0)
            if end == "close":
                tracker.close()
            if end == "drop":
                del tracker
            wait_until(lambda: not sweepers())


@posix_only
@over_http_and_https
def test_a_child_has_no_descriptor_of_a_connection_that_its_parent_is_opening_using_or_keeping(certificate, monkeypatch):
    monkeypatch.setattr(analysys._FORK_GUARD, "before", lambda: None)   # which would wait for the handshake
    reached, gate = threading.Semaphore(0), threading.Event()

    def held(request):
        reached.release()
        gate.wait(20)
        return answer()
    with Server(held, certificate) as server, socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(5)
        context = certificate and ca_context()
        using = analysys._Transport(server.url, context, {})
        opening = analysys._Transport("https://127.0.0.1:%d" % mute.getsockname()[1], ca_context(), {})
        works = [lambda: using.ask(b"[1]", 20), lambda: opening.ask(b"[1]", 5)]
        with threads(*works):
            assert reached.acquire(timeout=20)
            met = mute.accept()[0]
            assert met.recv(1)                         # the handshake has begun
            numbers = [connection.descriptor[0] for one in (using, opening) for connection in one._pool._all]

            def check():
                assert len(numbers) == 2
                for one in (using, opening):
                    one.disown()
                for number in numbers:
                    with pytest.raises(OSError):
                        os.fstat(number)
            did_well = ends_well(child(check))
            gate.set()
            met.close()
        assert did_well


HTML_PAGE = b"<!DOCTYPE html>\n<title>Welcome to nginx!</title>\x1b[31m" + b"x" * 999
TO_HTTPS = "does that port speak https"
TWICE = "not understood: the server may have the data, and it may come twice"


def mishap(url, **options):
    """Return what a call to *url* raises, as text that is fit for a terminal."""
    with pytest.raises(analysys.AnalysysPythonSdkException) as caught:
        DefaultCollecter(url, **options).uploadData(record("u", "Event"))
    text = str(caught.value)
    assert type(caught.value) is NetworkError or "refused for good" in text
    assert text.isprintable() and len(text) < 700 and "secret" not in text
    return text


@table("reply, said", [
    (answer(404, code(404)), "is the path right?"), (answer(404, HTML_PAGE), "is this the receiving address?"),
    (answer(404, HTML_PAGE), "is the path right?"), (answer(407, HTML_PAGE), "(the proxy wants credentials"),
    (answer(200, HTML_PAGE), TWICE + "; that is an HTML page"), (answer(204, b""), "an empty answer (" + TWICE),
    (answer(200, b'{"code":"200"}'), TWICE), (answer(200, b"[200]"), TWICE),
    (answer(200, OK.decode().encode("utf-16")), TWICE),
    (answer(301, b"", "Location: https://user:secret@ark.invalid/up"),
     "a redirect to https://ark.invalid/up is not foll"),
    (answer(300, b"", "Location: /new"), "a redirect to /new is not followed"),
    (answer(401, b""), "does it want credentials, as headers=?"), (answer(405, b""), "it takes no POST"),
    (answer(400, b"Client sent an HTTP request to an HTTPS server."), TO_HTTPS),
    (b"\x15\x03\x01\x00\x02\x02F", TO_HTTPS), (b"SSH-2.0-OpenSSH_9\r\n", "that is no HTTP: is the port right?"),
    (answer(200, b'{"code":400,"msg":"\\u202eabc"}'), "refused for good"), (answer(503, b"busy"), "HTTP 503, busy")])
def test_a_message_about_an_answer_names_the_address_what_came_and_what_to_try(reply, said):
    with BreakingServer((10 ** 9, reply, closed)) as server:
        text = mishap(server.url, headers={"Authorization": "secret"})
        assert server.url + "/up: " in text and said in text


def test_a_message_about_a_connection_names_the_address_and_what_to_try(monkeypatch):
    with Server() as plain, Server(certificate=CERTIFICATE) as tls, Server(certificate=OTHER_HOST) as other:
        for url, said in [
                (URL, "nobody listens there"), ("http://a..b:1", "is the host's name right"), (tls.url, "ssl_context=ssl.create_default_context(cafile=FILE)"),
                (tls.url.replace("https", "http"), TO_HTTPS),
                (plain.url.replace("http", "https"), "speak plain http?")]:
            text = mishap(url)
            assert url + "/up: " in text and said in text
        assert "the certificate is for another host" in mishap(other.url, ssl_context=ca_context())

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "is the host's name right" in mishap("http://nowhere.invalid")


@table("error, said", [
    (OSError("Tunnel connection failed: 403 Forbidden"), "no_proxy=HOST goes around the proxy"),
    (OSError("Tunnel connection failed: 407 Unknown"), "http://user:password@host:port"),
    (OSError(errno.ENETUNREACH, "Network is unreachable"), "is this machine connected"),
    (ssl.SSLError(1, "certificate verify failed: certificate has expired"), "this machine's clock is wrong"),
    (ssl.SSLError(1, "certificate verify failed: unsuitable certificate purpose"), "have it made anew, for servers"),
    (ssl.SSLError(1, "certificate verify failed: Basic Constraints of CA cert not marked critical"), "have it made anew")])
def test_a_message_about_what_no_test_can_bring_about_says_what_to_try(error, said):
    assert said in analysys._failure(error).reason


@table("is_old", [False, True])
def test_a_server_that_wants_a_clients_certificate_is_named_as_one_and_has_nothing(is_old):
    class Strict(Server):
        def finish_request(self, request, client_address):
            with request.dup() as kept:                # lest what is unread has the connection reset
                try:
                    super().finish_request(request, client_address)
                finally:
                    while kept.recv(9999):
                        pass                           # until the client leaves
    with Strict(certificate=CERTIFICATE) as server:
        server.tls.verify_mode = ssl.CERT_REQUIRED
        if is_old and sys.version_info >= (3, 7):      # TLS 1.3 tells when the request is sent
            server.tls.maximum_version = ssl.TLSVersion.TLSv1_2
        text = mishap(server.url, ssl_context=ca_context())
        assert "does it want a client's certificate?" in text and "twice" not in text


def test_an_https_address_whose_port_answers_in_plain_http_is_told_so():
    class Plain(Server):
        def serve(self, connection, stream):
            connection.recv(100)
            connection.sendall(answer(400, b""))
    with Plain() as server:
        assert "speak plain http?" in mishap(server.url.replace("http", "https"))


@table("scheme", ["http", "https"])
@table("proxy, shown, said", [
    ("http://user:secret@127.0.0.1:%d", "127.0.0.1:%d", "the proxy wants credentials"),
    ("http://user:secret@127.0.0.1:port%d", "127.0.0.1:port%d", "is no http://host:port"),
    ("socks5h://user:secret@127.0.0.1:%d", "127.0.0.1:%d, to which we speak HTTP and not socks5h", ""),
    ("http://user:top/secret@127.0.0.1:%d/", "127.0.0.1:%d", ""),
    ("http:/user:secret@127.0.0.1:%d", "127.0.0.1:%d", "")])
def test_a_message_names_the_proxy_but_no_credentials(monkeypatch, scheme, proxy, shown, said):
    with Server(answer(407, b"")) as server:
        port = server.server_address[1]
        monkeypatch.setenv(scheme + "_proxy", proxy % port)
        text = mishap(scheme + "://elsewhere.invalid")
        assert "%s://elsewhere.invalid/up through the proxy %s: " % (scheme, shown % port) in text and said in text


@table("make", [
    lambda: DefaultCollecter(URL, headers={"Authorization": "Bearer secret\n"}),
    lambda: DefaultCollecter(URL, headers={"Authorization": b"secret"}),
    lambda: DefaultCollecter(URL, headers={"Authorization: secret": "x"}),
    lambda: DefaultCollecter(URL, headers=["Authorization: secret"]),
    lambda: DefaultCollecter(URL, headers="Authorization: secret"),
    lambda: DefaultCollecter("https://user:secret@127.0.0.1"), lambda: DefaultCollecter("https://user:secret@[")])
def test_a_refused_header_or_address_shows_no_secret(make):
    with pytest.raises(IllegalData, match="^(headers|server_url)") as caught:
        make()
    assert "secret" not in str(caught.value)


@table("text, shown", [("a b\xe9\u6613", "a b\xe9\u6613"), ("\x1b[2J\r\n\x00", "\\x1b[2J\\r\\n\\x00"),
                       ("\u202e", "\\u202e"),
                       ("\ud800", "\\ud800"), (b"\xff\n", "\ufffd\\n"), ("x" * 300, "x" * 300),
                       ("x" * 301, "x" * 297 + "..."),
                       ("\x00" * 300, ("\\x00" * 75)[:297] + "..."), (OSError(2, "\x07"), "[Errno 2] \\x07")])
def test_what_others_wrote_is_made_printable_and_short(text, shown):
    assert analysys._printable(text) == shown


@posix_only
def test_where_eventlet_has_replaced_select_an_idle_connection_is_looked_at_by_the_original():
    with Server() as server:
        run("""
            import select, types

            def green(*_):
                raise RuntimeError("Second simultaneous read")
            original = types.SimpleNamespace(**vars(select))
            del select.poll
            select.select = green
            sys.modules["eventlet.patcher"] = types.SimpleNamespace(
                is_monkey_patched=lambda name: name == "select", original=lambda name: original)
            with tracker_to(DefaultCollecter(url)) as tracker:
                tracker.track("u", "First")
                tracker.track("u", "Second")
        """, server.url)
        assert (len(server.records), server.connections) == (2, 1)


# ---------------------------------------------------------------------------
# Queues: log files
# ---------------------------------------------------------------------------

each_way_to_log = pytest.mark.parametrize("options", [(), (True, 3)], ids=["single", "batched"])


@pytest.mark.usefixtures("each_fork")
@posix_only
@each_way_to_log
def test_lines_of_eight_processes_never_interleave_and_none_is_missing_or_doubled(tmp_path, options):
    run("""
        import random
        collecter = LogCollecter(folder, *%r)
        for number in range(2):
            collecter.uploadData(event("parent", number=number))       # batched: waits while the children are forked

        def work(name):
            for number in range(60):
                collecter.uploadData(event(name, number=number, filler="\u6613" * random.randrange(60, 7000)))
            collecter.close()
        assert all(list(map(ends_well, [child(work, "child%%d" %% number) for number in range(8)])))
        collecter.close()
    """ % (options,), URL, tmp_path)
    numbers = collections.defaultdict(list)
    for path in tmp_path.iterdir():
        for line in path.read_bytes().splitlines():
            entry = json.loads(line.decode())
            numbers[entry["xwhat"]].append(entry["xcontext"]["number"])
    assert numbers == dict({name: list(range(60)) for name in numbered("child", 8)}, parent=[0, 1])


@each_way_to_log
def test_threads_and_collecters_of_one_process_share_a_file(tmp_path, options):
    collecters = [LogCollecter(str(tmp_path), *options) for _ in range(2)]

    def work(number):
        give(collecters[number % 2], *numbered("t%d_" % number, 100), filler="x" * 500)
    with threads(*[functools.partial(work, number) for number in range(6)]):
        pass
    for collecter in collecters:
        collecter.close()
        assert collecter.stats()["delivered"] == 300
    written, = files_in(tmp_path).values()
    for number in range(6):
        mine = numbered("t%d_" % number, 100)
        assert [xwhat for xwhat in written if xwhat in mine] == mine


@posix_only
def test_after_kill_9_every_event_whose_call_returned_is_there_and_no_line_is_glued_to_a_cut_one(tmp_path):
    returned = []
    for life in range(3):
        with process("""
            collecter = LogCollecter(folder)
            for number in itertools.count():
                collecter.uploadData(event("life%d", number=number, filler="x" * 20000))
                os.write(1, b".")
        """ % life, URL, tmp_path) as started:
            returned.append(len(started.stdout.read(random.randrange(1, 50))))
            started.kill()
            returned[-1] += len(started.stdout.read())
    LogCollecter(str(tmp_path)).uploadData(event("after"))
    lines = [line for path in sorted(tmp_path.iterdir()) for line in path.read_bytes().splitlines()]
    whole = collections.Counter(json.loads(line.decode())["xwhat"] for line in lines if line.endswith(b"}}"))
    assert len(lines) - sum(whole.values()) <= 3 and whole.pop("after") == 1
    for life, count in enumerate(returned):
        assert count <= whole["life%d" % life] <= count + 1


@posix_only
def test_who_is_killed_inside_a_write_blocks_no_other_writer_also_while_a_child_of_it_lives(tmp_path):
    with process("""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)                  # kills at 3000 bytes, in the middle of a line
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        collecter = LogCollecter(folder)
        collecter.uploadData(event("before"))
        pid = os.fork()
        if not pid:
            signal.pause()                                             # this child never tracks
        os.write(1, b"%d\\n" % pid)
        collecter.uploadData(event("cut", filler="x" * 20000))
    """, URL, tmp_path) as started:
        pid = int(started.stdout.readline())
        try:
            assert started.wait() == -signal.SIGXFSZ
            LogCollecter(str(tmp_path)).uploadData(event("after"))
        finally:
            os.kill(pid, signal.SIGKILL)
    path, = tmp_path.iterdir()
    before, cut, after = path.read_bytes().splitlines()
    assert len(before) + len(cut) + 1 == 3000 and json.loads(after.decode())["xwhat"] == "after"


@posix_only
@each_way_to_log
def test_a_disk_that_is_full_in_the_middle_of_a_line_costs_an_error_and_no_event(tmp_path, options):
    taken = json.loads(run("""
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        collecter, taken = LogCollecter(folder, *%r), []

        def fill():
            for number in range(100):
                last[:] = [event("e%%d" %% len(taken))]
                collecter.uploadData(last[0])
                taken.append(last[0]["xwhat"])
        last = []
        for attempt in range(3):
            error = error_of(fill)
            assert isinstance(error, AnalysysPythonSdkFileException) and error.errno == errno.EFBIG, error
            assert folder in str(error) and error.records == last, error
            path, = [os.path.join(folder, name) for name in os.listdir(folder)]
            assert open(path).read().endswith("}\\n")
            counts = collecter.stats()
            assert counts["accepted"] == len(taken) and counts["delivered"] == len(open(path).readlines()), counts
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path), resource.RLIM_INFINITY))
        if counts["pending"]:
            assert isinstance(error_of(collecter.flush), AnalysysPythonSdkFileException)
            assert len(error_of(collecter.close).records) == counts["pending"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        collecter.close()
        print(json.dumps(taken))
    """ % (options,), URL, tmp_path).out)
    assert list(files_in(tmp_path).values()) == [taken] and len(taken) > 10


DISTURBANCES = [  # what somebody does to the file, and the files afterwards
    ("rename", lambda path: path.rename(path.with_name("old")), {"old": ["before"], "log": ["after"]}),
    ("delete", lambda path: path.unlink(), {"log": ["after"]}),
    ("truncate", lambda path: path.write_bytes(b""), {"log": ["after"]}),
    ("copy and truncate", lambda path: [shutil.copy(str(path), str(path.with_name("old"))), path.write_bytes(b"")],
     {"old": ["before"], "log": ["after"]}),
    ("replace", lambda path: [path.unlink(), log_file(path, "other")], {"log": ["other", "after"]}),
    ("remove the directory", lambda path: shutil.rmtree(str(path.parent)), {"log": ["after"]}),
    ("make the directory anew", lambda path: [shutil.rmtree(str(path.parent)), path.parent.mkdir()],
     {"log": ["after"]}),
    ("put a symlink there", lambda path: [path.rename(path.with_name("old")), path.symlink_to("old")],
     {"old": ["before", "after"], "log": ["before", "after"]}),
    ("put a symlink to no file there", lambda path: [path.unlink(), path.symlink_to("old")],
     {"old": ["after"], "log": ["after"]}),
]


@posix_only
@each_way_to_log
@pytest.mark.parametrize("disturb, expected", [row[1:] for row in DISTURBANCES], ids=[row[0] for row in DISTURBANCES])
def test_whatever_becomes_of_the_file_the_next_write_goes_to_its_path(tmp_path, disturb, expected, options):
    collecter = LogCollecter(str(tmp_path / "logs"), *options)
    collecter.uploadData(event("before"))
    collecter.flush()
    path, = (tmp_path / "logs").iterdir()
    moment = path.stat().st_mtime
    collecter._state().clock = lambda: moment          # the same hour, however long this takes
    disturb(path)
    collecter.uploadData(event("after"))
    collecter.close()
    found = files_in(tmp_path / "logs", "*")
    found["log"] = found.pop(path.name)
    assert found == expected


OBSTACLES = [
    ("a FIFO", lambda path: os.mkfifo(str(path))),
    ("a directory", lambda path: path.mkdir()),
    ("a device", lambda path: path.symlink_to("/dev/null")),
    ("a symlink to itself", lambda path: path.symlink_to(path.name)),
    ("a symlink into no directory", lambda path: path.symlink_to("nowhere/log")),
    ("a file for a directory", lambda path: [path.parent.rmdir(), path.parent.write_text("")]),
]


@posix_only
@pytest.mark.parametrize("opened", [False, True], ids=["new", "in use"])
@pytest.mark.parametrize("obstruct", [row[1] for row in OBSTACLES], ids=[row[0] for row in OBSTACLES])
def test_where_the_file_cannot_be_the_call_says_so_and_what_waits_is_written_when_it_can(tmp_path, obstruct, opened):
    folder = tmp_path / "logs"
    folder.mkdir()
    collecter = LogCollecter(str(folder), True, 3)
    collecter._state().clock = lambda: 1532514947.857
    path = folder / time.strftime("datas_%Y%m%d%H.log", time.localtime(1532514947.857))
    if opened:
        collecter.uploadData(event("first"))
        collecter.flush()
        path.unlink()
    give(collecter, "a", "b")
    obstruct(path)
    for _ in range(2):
        with pytest.raises(FileError, match=re.escape(str(path))) as error:
            collecter.uploadData(event("refused"))
        assert error.value.records == [event("refused")] and error.value.errno
    assert collecter.stats()["pending"] == 2
    shutil.rmtree(str(folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.unlink()
    collecter.uploadData(event("c"))
    assert files_in(folder) == {path.name: ["a", "b", "c"]}


@posix_only
def test_a_write_that_failed_keeps_no_other_writer_out(tmp_path):
    folder, aside = tmp_path / "logs", tmp_path / "aside"
    failing, other = LogCollecter(str(folder)), LogCollecter(str(folder))
    for collecter in failing, other:
        collecter._state().clock = lambda: 1532514947.857
        collecter.uploadData(event("before"))
    folder.rename(aside)
    folder.write_text("")
    with pytest.raises(FileError):
        failing.uploadData(event("refused"))
    folder.unlink()
    aside.rename(folder)
    other.uploadData(event("after"))
    assert list(files_in(folder).values()) == [["before", "before", "after"]]


@posix_only
@pytest.mark.parametrize("zone, rule, moments", [
    ("UTC0", "hour", [(1532516399.9, "2018072510"), (1532516400.0, "2018072511"), (1532516399.9, "2018072510")]),
    ("CST-8", "HOUR", [(1532516399.9, "2018072518"), (1532516400.0, "2018072519"), (1532430000.0, "2018072419")]),
    ("NPT-5:45", "hour", [(1532513699.9, "2018072515"), (1532513700.0, "2018072516"), (1532513699.0, "2018072515")]),
    ("CST-8", "day", [(1532534399.9, "20180725"), (1532534400.0, "20180726"), (1532534399.9, "20180725")]),
])
def test_files_follow_the_local_hour_or_day_also_when_the_clock_is_set_back(tmp_path, monkeypatch, zone, rule, moments):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        collecter, expected = LogCollecter(str(tmp_path), general_rule=rule), collections.defaultdict(list)
        for number, (moment, period) in enumerate(moments):
            collecter._state().clock = lambda now=moment: now
            collecter.uploadData(event("e%d" % number))
            expected["datas_%s.log" % period].append("e%d" % number)
        assert files_in(tmp_path) == expected
    finally:
        monkeypatch.undo()
        time.tzset()


INTERRUPTED = """
import fcntl
signal.signal(signal.SIGIO, interrupt)
watched, interrupts = os.open(folder, os.O_RDONLY), 0
for number in range(30):
    if number % 10 == 5:
        fcntl.fcntl(watched, fcntl.F_NOTIFY, fcntl.DN_MODIFY)          # the next write in the folder raises SIGIO, once
    try:
        collecter.uploadData(event("e%d" % number))
    except Interrupt:
        interrupts += 1
        collecter.uploadData(event("e%d" % number))
assert interrupts == 3
collecter.flush()
collecter.close()
"""


def check_interrupted(found):
    """Check that what was interrupted is there once or twice, since it was tracked again, and the others once."""
    assert list(dict.fromkeys(found)) == numbered("e", 30)
    doubled = collections.Counter(found) - collections.Counter(numbered("e", 30))
    assert len(doubled) <= 3 and max(doubled.values(), default=1) == 1


dnotify_only = pytest.mark.skipif(sys.platform != "linux", reason="needs dnotify")


@dnotify_only
@each_way_to_log
def test_an_exception_out_of_a_signal_handler_costs_and_doubles_no_other_line(tmp_path, options):
    run("collecter = LogCollecter(folder, *%r)\n" % (options,) + INTERRUPTED, URL, tmp_path)
    check_interrupted(list(files_in(tmp_path).values())[0])


INTERRUPTED_ANYWHERE = """
signal.alarm(30)                                       # a lock that is not released would hold us for ever
for number in range(50):                               # no call takes more steps
    collecter.uploadData(event("e%d" % number))
    disturbed(lambda: collecter.uploadData(event("interrupted")), number + 1, interrupt, ("call", "return"))
collecter.flush()
collecter.close()
"""


@posix_only
@pytest.mark.parametrize("options", [(), (True, 2)], ids=["single", "batched"])
def test_wherever_an_exception_comes_out_of_a_signal_handler_the_lines_before_and_after_are_written(tmp_path, options):
    run("collecter = LogCollecter(folder, *%r)\n" % (options,) + INTERRUPTED_ANYWHERE, URL, tmp_path)
    written = [xwhat for xwhat in list(files_in(tmp_path).values())[0] if xwhat != "interrupted"]
    assert list(dict.fromkeys(written)) == numbered("e", 50)


def test_a_line_that_comes_inside_a_write_is_written_when_that_write_ends(tmp_path):
    collecter, at = LogCollecter(str(tmp_path)), 1
    while disturbed(lambda: collecter.uploadData(event("outer")), at, lambda: collecter.uploadData(event("inner"))):
        names, = files_in(tmp_path).values()
        assert sorted(names[-2:]) == ["inner", "outer"] and len(names) == 2 * at
        at += 1
    assert at > 20


@pytest.mark.parametrize("options", ["", ", is_batch=True, batch_num=2"])
def test_where_each_write_brings_another_line_a_call_returns_and_all_lines_are_there_in_the_end(options, tmp_path):
    run("""
        collecter, hooks, tracked, depths = LogCollecter(folder%s), [], [], []
        def track(name):
            collecter.uploadData(event(name))
            tracked.append(name)
        def hook(frame, kind, called):
            if kind == "c_call" and called in (os.write, os.stat) and not hooks:
                hooks.append(called)                   # it is in no hook of its own
                depths.append(len(list(traceback.walk_stack(frame))))
                track("hook")
                hooks.clear()
        sys.setprofile(hook)
        for _ in range(4):
            track("outer")
        sys.setprofile(None)
        assert tracked.count("outer") == 4 and "hook" in tracked and max(depths) < 50
        collecter.flush()
        balanced(collecter, delivered=len(tracked), pending=0)
    """ % options, URL, tmp_path, before="import traceback\n")
    assert set(lines_in(tmp_path)) == {"outer", "hook"} and lines_in(tmp_path).count("outer") == 4


@linux_only
@pytest.mark.parametrize("make", ["BatchCollecter(url, spool_path='spool')", "LogCollecter('logs')"])
def test_a_relative_path_where_the_current_directory_is_gone_is_refused_by_its_name(make):
    run("""
        os.chdir(tempfile.mkdtemp())
        os.rmdir(os.getcwd())
        error = error_of(lambda: %s)
        assert isinstance(error, ValueError) and "_path is" in str(error), error
    """ % make, before="import tempfile\n")


@posix_only
def test_new_log_files_are_0640_less_the_umask(tmp_path):
    before = os.umask(0)
    try:
        for umask, name in (0, "a"), (0o077, "b"):
            os.umask(umask)
            LogCollecter(str(tmp_path / name)).uploadData(event("a"))
    finally:
        os.umask(before)
    modes = {path.parent.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*/datas_*.log")}
    assert modes == {"a": 0o640, "b": 0o600}


@table("part", [None, 9])
def test_a_line_whose_call_was_interrupted_is_whole_and_counts_or_is_not_there(tmp_path, monkeypatch, part):
    def interrupted(fd, data):
        monkeypatch.undo()
        write(fd, data[:part])
        interrupt()
    write = os.write
    with contextlib.closing(LogCollecter(str(tmp_path))) as collecter:
        collecter.uploadData(event("a"))
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(Interrupt):
            collecter.uploadData(event("b"))
        collecter.uploadData(event("c"))
        names = [one["xwhat"] for one in lines(tmp_path)]
        assert names == (["a", "c"] if part else ["a", "b", "c"])
        balanced(collecter, accepted=len(names), delivered=len(names))


def test_a_cut_line_is_ended_also_in_another_file_of_the_same_length(tmp_path):
    with contextlib.closing(LogCollecter(str(tmp_path), general_rule="day")) as collecter:
        collecter.uploadData(event("a"))
        path, = tmp_path.glob("datas_*")
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(b"x" * len(data))
        collecter.uploadData(event("b"))
        assert path.read_bytes() == b"x" * len(data) + b"\n" + data.replace(b'"a"', b'"b"')


def test_of_a_record_that_is_too_large_for_rejected_log_the_beginning_is_there(tmp_path):
    line = analysys._Line(b"x" * 9000, "file", 1, 0, 9000, 9000, None)
    analysys._RejectedLog(str(tmp_path / "rejected.log"), 6000).add([(line, "refused")], False)
    assert [(entry["record"], entry["length"]) for entry in rejected_in(tmp_path)] == [("x" * 4096, 9000)]


def test_rejected_log_is_renamed_at_16_mib(tmp_path):
    line = analysys._Line(b'"%s"' % (b"x" * (1 << 20)), "file", 1, 0, 0, 0, None)
    analysys._RejectedLog(str(tmp_path / "rejected.log")).add([(line, "refused")] * 16, False)
    assert 15 << 20 < (tmp_path / "rejected.log.1").stat().st_size <= 16 << 20


def test_a_line_that_was_cut_after_its_writers_own_last_write_is_ended_before_the_next(tmp_path):
    collecter = LogCollecter(str(tmp_path))
    collecter._state().clock = lambda: 1532514947.857
    collecter.uploadData(event("before"))
    path, = tmp_path.iterdir()
    with open(str(path), "ab") as file:
        file.write(b'{"cut')
    collecter.uploadData(event("after"))
    before, cut, after = path.read_bytes().splitlines()
    assert cut == b'{"cut' and json.loads(after.decode())["xwhat"] == "after"


@posix_only
def test_a_lock_that_a_stranger_holds_costs_10_seconds_once_and_then_next_to_nothing_until_it_is_free(tmp_path,
                                                                                                     monkeypatch):
    import fcntl

    class Clock:
        moment = 0.0

        def now(self):
            return self.moment

        def wait(self, lock, seconds):
            self.moment += seconds
    clock = Clock()
    monkeypatch.setattr(analysys, "_CLOCK", clock)
    collecter = LogCollecter(str(tmp_path))
    collecter._state().clock = lambda: 1532514947.857
    collecter.uploadData(event("before"))
    path, = tmp_path.iterdir()
    waits = []
    with open(str(path)) as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        for _ in range(3):
            clock.moment += 1
            began = clock.moment
            with pytest.raises(FileError, match="another process has held its lock") as error:
                collecter.uploadData(event("refused"))
            waits.append(clock.moment - began)
            assert error.value.records == [event("refused")]
    assert 10 <= waits[0] < 10.1 and max(waits[1:]) < 0.1
    collecter.uploadData(event("after"))
    with open(str(path)) as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        began = clock.moment
        with pytest.raises(FileError):
            collecter.uploadData(event("refused"))
        assert clock.moment - began >= 10              # another one, another patience
    assert events_in(path) == ["before", "after"]


@linux_only
def test_a_path_that_the_file_system_cannot_hold_is_our_error(tmp_path):
    collecter = LogCollecter(str(tmp_path))
    collecter._state()._directory = os.path.join(str(tmp_path), "\ud83d")
    with pytest.raises(FileError) as error:
        collecter.uploadData(event("e"))
    assert error.value.records == [event("e")]


class Lines(analysys._Source):
    def __init__(self, data, position=(0, 0, ())):
        super().__init__("file", position)
        self.data = data

    def open(self, offset):
        file = io.BytesIO(self.data)
        file.seek(offset)
        return file.read


class Queue(analysys._LineQueue):
    """A line queue over bytes."""

    def __init__(self, folder, *sources):
        super().__init__(analysys._Ledger(), analysys._RejectedLog(str(folder / "rejected.log")))
        self.sources, self.notes = sources, []

    def _source(self):
        return next((source for source in self.sources if not source.is_read), None)

    def _settle(self, lines):
        super()._settle(lines)
        self.notes.append(lines[0].source.position())

    def all(self, most=1000):
        items = []
        while self._source():
            items += self.take(most)
        return items


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 17])
def test_marks_nuls_and_every_kind_of_line_end_are_no_damage(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(analysys, "_CHUNK", chunk)
    data = (b'\xef\xbb\xbf{"a":1}\n\n \0\n\0\0\0{"b":1}\r\n\r\n[1]\n{"c":1}\r{"d":1}\n  \x1a\r\xef\xbb\xbf{"e":1}')
    queue = Queue(tmp_path, Lines(data))
    items = queue.all()
    assert [(json.loads(item.text.decode()), item.number) for item in items] == [
        ({"a": 1}, 1), ({"b": 1}, 4), ({"c": 1}, 7), ({"d": 1}, 8), ({"e": 1}, 10)]
    assert [(entry["line"], entry["record"], entry["length"]) for entry in rejected_in(tmp_path)] == [(6, "[1]\n", 4)]
    queue.settle(items[1:2])
    queue.settle(items[3:])                            # a and c stand aside
    again = Queue(tmp_path, Lines(data, json.loads(json.dumps(queue.notes[-1])))).all()
    assert [(item.text.strip(), item.number) for item in again] == [(b'{"a":1}', 1), (b'{"c":1}', 7)]


def test_a_line_of_more_than_40_mib_is_damage():
    reasons = [analysys._damage(b"{}", (40 << 20) + more) for more in (0, 1)]
    assert ["40 MiB" in reason for reason in reasons] == [False, True]


@pytest.mark.parametrize("damaged", [
    b'{"b":[1\n2]},{"c":1}\n', b'{"b":[1\n2]}\n{"c":1},{"d":1}\n', b'{"b":[1\n2]},"mark",{"c":1}\n', b"null\n1\n"])
def test_lines_are_damaged_each_for_itself_also_where_one_begins_what_another_one_ends(tmp_path, damaged):
    queue = Queue(tmp_path, Lines(b'{"a":1}\n' + damaged + b'{"z":1}'))
    assert [item.text for item in queue.all()] == [b'{"a":1}\n', b'{"z":1}']
    assert [entry["record"].encode() for entry in rejected_in(tmp_path)] == damaged.splitlines(True)


@table("text, length", [(b"{}\n", 9), (b'{"a":' + b"[" * 100000, None), (b'{"a":"' + b"x" * 300000 + b'"}', None)])
def test_lines_are_damaged_together_as_each_alone(text, length):
    texts = [b'{"a":1}\n', text, b'{"b":1}\n']
    lines = [analysys._Line(one, "file", 1, 0, 0, length if one is text and length else len(one), None) for one in texts]
    assert analysys._damages(lines) == [analysys._damage(line.text, line.length) for line in lines]


def test_no_file_can_hold_the_mark_between_lines():
    assert analysys._mark.__wrapped__() != analysys._mark.__wrapped__()


def test_up_to_where_a_file_is_settled_is_an_offset_and_few_ranges_before_it_that_are_not():
    def taken(source, most):
        lines = []
        source.take(lines, most, 10 ** 6)
        return lines
    source = Lines(b"{}\n" * 400)
    lines = taken(source, 400)
    for line in lines[150:] + lines[:50]:
        source.settle(line)
    assert source.position() == (1200, 400, [(150, 50, 450)])
    source = Lines(source.data, source.position())
    lines = taken(source, 10)
    for line in lines[:5]:
        source.settle(line)
    assert source.position() == (1200, 400, [(165, 55, 180), (180, 60, 450)])
    source = Lines(b"{}\n" * (2 * analysys._MAX_HOLES + 4))
    for line in taken(source, 10 ** 6)[1::2]:
        source.settle(line)
    assert source.position() == (0, 0, [])             # too many to be noted


def test_a_batch_of_lines_has_at_most_4_mib_of_text_but_at_least_one_line(tmp_path):
    large = b'{"a":"' + b"x" * (3 << 20) + b'"}\n'
    queue = Queue(tmp_path, Lines(large * 5 + b'{"a":"' + b"x" * (9 << 20) + b'"}\n' + large))
    assert [len(queue.take(1000)) for _ in range(7)] == [1] * 7


@table("text", [b"\n", b" ", b"[1]\n"])
def test_in_a_file_without_end_that_holds_no_record_take_looks_no_further_in_a_while(tmp_path, text):
    class Endless(Lines):
        def open(self, offset):
            reads = iter(range(1000))
            return lambda size: next(reads) * b"" + text * (size // len(text))
    queue = Queue(tmp_path, Endless(b""))
    for _ in range(2):
        assert queue.take(5000) == []
    assert queue.ledger.stats()["rejected"] < 5000


def test_of_many_empty_files_take_looks_at_some(tmp_path):
    queue = Queue(tmp_path, *[Lines(b"") for _ in range(2000)])
    assert queue.take(1000) == [] and not queue.sources[-1].is_read


def test_a_long_line_of_a_file_that_was_shortened_meanwhile_is_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_MAX_TAKEN", 100000)
    monkeypatch.setattr(analysys, "_CHUNK", 10000)

    class Shortened(Lines):
        def open(self, offset):
            read, self.data = super().open(offset), self.data[:50000]      # the next time
            return read
    queue = Queue(tmp_path, Shortened(b'{"a":"' + b"x" * 200000 + b'"}\n{}\n'))
    assert [item.text for item in queue.all()] == [b"{}\n"]
    assert [entry["length"] for entry in rejected_in(tmp_path)] == [200009]


def test_an_exception_out_of_a_signal_handler_while_lines_are_taken_loses_none(tmp_path):
    data = b"".join(b'{"n":%d}\n' % number for number in range(50))
    for step in range(1, 10000):
        source, items = Lines(data), []
        queue = Queue(tmp_path, source)
        was_interrupted = disturbed(lambda: items.extend(queue.take(7)), step, interrupt)
        if not was_interrupted or queue.ledger.stats()["accepted"]:        # from then on they are the caller's
            break
        assert not source.flight
        assert [(json.loads(item.text.decode())["n"], item.number) for item in queue.all()] == [
            (number, number + 1) for number in range(50)], step
    assert step > 50


HOSTILE = [                                            # what is written between two events, and how many lines that is
    ("file.seek(1 << 28, 1)", 0),                      # a hole
    ("[file.write(bytes(1 << 20)) for _ in range(48)]", 0),
    ("[file.write(b'x' * (1 << 20)) for _ in range(48)]", 1),
    ("file.write(b'{'), [file.write(b'x' * (1 << 20)) for _ in range(48)]", 1),
    ("[file.write(b'{\"a\":[' + b'[],' * 300000 + b'[]]}\\n') for _ in range(10)]", 10),
    ("[file.write(b'\\n' * (1 << 20)) for _ in range(48)]", 0),
]


@linux_only
def test_hostile_spool_files_cost_little_memory_and_no_record(tmp_path):
    paths = [str(tmp_path / (leave(tmp_path) + ".000001.log")) for _ in HOSTILE]
    run("\n".join("with open(%r, 'wb') as file:\n    file.write(%r), %s, file.write(%r)\n" % (
        path, lines_of("a").encode(), write, b"\n" + lines_of("b").encode())
        for path, (write, _) in zip(paths, HOSTILE)), URL, tmp_path)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        printed = run("""
            collecter = BatchCollecter(url, spool_path=folder, on_error=lambda error, records: None)
            wait_until(lambda: len(os.listdir(folder)) == 2, 30)       # our lock file and rejected.log
            collecter.close()
            counts = collecter.stats()
            print(counts["rejected"], counts["delivered"])
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, server.url, tmp_path).out
    rejected, delivered, peak = map(int, printed.split())
    assert peak < 64000 * SPARE and rejected == sum(lines for _, lines in HOSTILE) and delivered == 2 * len(HOSTILE)


# ---------------------------------------------------------------------------
# Queues: the spool
# ---------------------------------------------------------------------------

def test_a_record_is_on_disk_before_the_call_returns_and_gone_when_it_is_delivered(tmp_path):
    folder = tmp_path / "spool"
    with FaultyServer(listening=False) as server:
        with spooling(server, folder, queue_max_size=1) as collecter:
            for number in range(20):
                collecter.uploadData(event("e%d" % number))
                assert list(files_in(folder, "*.log").values()) == [numbered("e", number + 1)]
            assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
            server.listen()
            collecter.flush(20)
            assert server.names == numbered("e", 20)
    assert list(folder.iterdir()) == []


def test_close_leaves_on_disk_what_is_not_delivered_and_raises_nothing(tmp_path):
    with FaultyServer(listening=False) as server:
        with spooling(server, tmp_path) as collecter:
            collecter.uploadData(event("a"))
            with pytest.raises(NetworkError):
                collecter.flush(0.1)
        collecter.close()
        assert collecter.stats()["pending"] == 1 and list(files_in(tmp_path, "*.log").values()) == [["a"]]


@posix_only
def test_exit_delivers_what_is_spooled_and_leaves_no_file(tmp_path):
    with FaultyServer() as server:
        run("""
            collecter = BatchCollecter(url, spool_path=folder)
            give(collecter, *numbered("e", 3))
        """, server.url, tmp_path)
        assert server.names == numbered("e", 3)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_what_a_process_leaves_the_next_delivers_at_start_in_order_before_its_own(tmp_path):
    leave(tmp_path, *numbered("first", 5))
    leave(tmp_path, *numbered("second", 5))
    with FaultyServer() as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(20)
        assert server.names == numbered("first", 5) + numbered("second", 5) + ["own"]
        assert (collecter.stats()["adopted"], collecter.stats()["accepted"]) == (10, 1)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_after_kill_9_and_restart_every_event_whose_call_returned_arrives_in_order_and_hardly_any_twice(
        tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LAST_BACKOFF", 0.1)
    chance = random.Random(4)
    lives, returned = 3, []

    def flaky(server, request):
        return answer(503) if chance.random() < 0.3 else accept(server, request)
    with FaultyServer(then=flaky) as server:
        for life in range(lives):
            with process("""
                collecter = BatchCollecter(url, queue_cache_max_size=5, collecter_max_size=10, spool_path=folder)
                for number in itertools.count():
                    collecter.uploadData(event("life%d", number=number))
                    os.write(1, b".")
                    time.sleep(0.001)
            """ % life, server.url, tmp_path) as started:
                returned.append(len(started.stdout.read(random.randrange(1, 200))))
                started.kill()
                returned[-1] += len(started.stdout.read())
        with spooling(server, tmp_path) as collecter:
            wait_until(lambda: len(list(tmp_path.iterdir())) == 1, 20)
            assert collecter.stats()["rejected"] <= lives                  # lines that were cut by a kill
        arrived = [(entry["xwhat"], entry["xcontext"]["number"]) for entry in server.accepted]
    assert len(arrived) - len(set(arrived)) <= 10 * lives
    for life, count in enumerate(returned):
        once = list(dict.fromkeys(number for xwhat, number in arrived if xwhat == "life%d" % life))
        assert once in (list(range(count)), list(range(count + 1)))


@pytest.mark.usefixtures("each_fork")
@posix_only
def test_living_processes_deliver_once_what_killed_ones_left_also_while_an_idle_child_of_those_lives(tmp_path):
    code = """
        analysys._LOOK_EVERY = analysys._NOTICE_EVERY = analysys._LAST_BACKOFF = 0.1           # seconds
        collecter = BatchCollecter(url, queue_cache_max_size=1, spool_path=folder)
        give(collecter, *numbered("%s", 20))
        pid = %s
        if not pid:
            signal.pause()                                             # this child never tracks
        os.write(1, b"%%d\\n" %% pid)
        os.read(0, 1)
        collecter.close()
    """
    with FaultyServer(listening=False) as server, contextlib.ExitStack() as stack:
        living = [stack.enter_context(process(code % (name, "1"), server.url, tmp_path)) for name in ("a", "b")]
        killed = [stack.enter_context(process(code % (name, "os.fork()"), server.url, tmp_path)) for name in ("c", "d")]
        pids = [int(started.stdout.readline()) for started in living + killed][2:]
        try:
            for started in killed:
                started.kill()
            server.listen()
            wait_until(lambda: len(list(tmp_path.glob("*.lock"))) == 2, 20)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        for started in living:
            started.communicate(b"x")
            assert started.returncode == 0
    assert sorted(server.names) == sorted(numbered("a", 20) + numbered("b", 20) + numbered("c", 20) + numbered("d", 20))
    for name in "abcd":
        assert [xwhat for xwhat in server.names if xwhat[0] == name] == numbered(name, 20)
    assert list(tmp_path.iterdir()) == []


def test_two_collecters_of_one_process_share_a_spool_and_the_second_delivers_what_the_first_left(tmp_path):
    with FaultyServer(listening=False) as server:
        with spooling(server, tmp_path) as first:
            first.uploadData(event("left"))
        server.listen()
        with spooling(server, tmp_path) as second, spooling(server, tmp_path) as third:
            for xwhat in numbered("e", 50):
                second.uploadData(event(xwhat))
                third.uploadData(event(xwhat))
            second.flush(20)
            third.flush(20)
            wait_until(lambda: len(server.names) >= 101)
            wait_until(lambda: not second.stats()["pending"] + third.stats()["pending"])       # the answer has come, too
        assert collections.Counter(server.names) == dict(dict.fromkeys(numbered("e", 50), 2), left=1)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_close_lets_the_request_in_flight_end_so_that_nothing_is_delivered_twice(tmp_path):
    leave(tmp_path, *numbered("e", 5))
    gate = threading.Event()
    with FaultyServer(lambda server, request: accept(server, request) if gate.wait(10) else b"") as server:
        with spooling(server, tmp_path) as collecter:
            wait_until(lambda: server.requests)
            timer = threading.Timer(0.1, gate.set)
            timer.start()
            collecter.close(10)
            timer.join()
        with spooling(server, tmp_path) as collecter:
            wait_until(lambda: len(list(tmp_path.iterdir())) <= 1)
        assert server.names == numbered("e", 5)


@pytest.mark.usefixtures("each_fork")
@posix_only
def test_forked_children_spool_and_deliver_their_own_records_and_the_parent_its_own(tmp_path):
    with FaultyServer() as server:
        run("""
            collecter = BatchCollecter(url, spool_path=folder, max_interval_time=60, queue_cache_max_size=1000)
            collecter.uploadData(event("parent0"))
            # A fork of which Python is not told, while another thread waits for the GIL, leaves the child's GIL broken.
            wait_until(lambda: collecter._state()._changed._sleepers)

            def work(name):
                give(collecter, *numbered(name, 20))
                collecter.close()
            assert all(list(map(ends_well, [child(work, name) for name in "abcd"])))
            collecter.uploadData(event("parent1"))
            collecter.close()
        """, server.url, tmp_path)
        expected = [numbered(name, 20) for name in "abcd"] + [numbered("parent", 2)]
        assert sorted(server.names) == sorted(sum(expected, []))
        for names in expected:
            assert [xwhat for xwhat in server.names if xwhat in names] == names
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_files_roll_are_numbered_and_go_once_they_are_delivered(tmp_path):
    with FaultyServer(listening=False) as server, spooling(server, tmp_path, spool_max_bytes=40000) as collecter:
        give(collecter, *numbered("e", 100))
        paths = sorted(tmp_path.glob("*.log"))
        assert [path.name[-10:] for path in paths] == ["%06d.log" % number for number in range(1, len(paths) + 1)]
        assert len(paths) > 1 and max(path.stat().st_size for path in paths) <= 10000
        server.listen()
        collecter.flush(20)
        assert server.names == numbered("e", 100)
        assert [path for path in paths if path.exists()] == paths[-1:]


@posix_only
def test_files_roll_at_16_mib_and_where_the_directory_is_made_it_is_0700(tmp_path):
    before, folder = os.umask(0), tmp_path / "spool"
    try:
        with FaultyServer(listening=False) as server, spooling(server, folder) as collecter:
            for _ in range(16):
                collecter.uploadData(dict(event("large"), text="x" * (1 << 20)))
            sizes = [path.stat().st_size for path in sorted(folder.glob("*.log"))]
            assert len(sizes) == 2 and 15 << 20 < sizes[0] <= 16 << 20
            modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
            assert (modes, stat.S_IMODE(folder.stat().st_mode)) == ({0o600}, 0o700)
    finally:
        os.umask(before)


@posix_only
def test_where_files_may_not_grow_to_16_mib_they_roll_before_and_so_does_rejected_log(tmp_path):
    with FaultyServer(*[answer(200, code(400))] * 60) as server:
        run("""
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
            collecter = BatchCollecter(url, spool_path=folder, collecter_max_size=1, on_error=lambda *_: None)
            for xwhat in numbered("e", 200):
                give(collecter, xwhat, text="x" * 255)
            collecter.flush()
            balanced(collecter, accepted=200, rejected=60, delivered=140)
        """, server.url, tmp_path)
    assert len(lines_of("e", text="x" * 255)) * 60 > 20000
    names = [one["record"]["xwhat"] for end in (".1", "") for one in map(json.loads, open(str(tmp_path / "rejected.log") + end))]
    assert names == numbered("e", 60)


def test_leftovers_are_looked_for_at_start_and_then_every_5_seconds(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    clock.now = lambda: moment
    moment = 0.0
    queue = analysys._Spool(str(tmp_path), 1 << 30, 10, NEVER)
    with contextlib.closing(queue):
        for moment, is_found in (0.0, False), (4.9, False), (6.0, True):   # once a second it asks
            assert (queue.due_at() <= moment) is is_found
            if moment == 0.0:
                leave(tmp_path, "left")
        assert [json.loads(line.text.decode())["xwhat"] for line in queue.take(9)] == ["left"]


def test_beyond_spool_max_bytes_a_call_raises_like_a_full_queue_until_there_is_room(tmp_path):
    with FaultyServer(listening=False) as server:
        with spooling(server, tmp_path, spool_max_bytes=20000) as collecter:
            with pytest.raises(NetworkError, match="full") as error:
                for number in range(1000):
                    collecter.uploadData(event("e%d" % number))
            assert error.value.records == [event("e%d" % number)] and number > 20
            assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 20000
            server.listen()
            wait_until(lambda: collecter.stats()["pending"] == 0)
            collecter.uploadData(event("room"))
            collecter.flush(20)
            assert server.names == numbered("e", number) + ["room"]


def test_spool_max_bytes_holds_for_all_processes_and_restarts_together(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0.05)    # the one before may be at its last request when the next looks
    with FaultyServer(listening=False) as server:
        for _ in range(4):
            with spooling(server, tmp_path, spool_max_bytes=20000) as collecter:
                with pytest.raises(NetworkError, match="full"):
                    give(collecter, *numbered("e", 1000))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 20000


def test_spool_max_bytes_counts_rejected_log(tmp_path):
    (tmp_path / "rejected.log").write_bytes(b"x" * 12000)
    with FaultyServer(listening=False) as server, spooling(server, tmp_path, spool_max_bytes=20000) as collecter:
        with pytest.raises(NetworkError, match="full"):
            give(collecter, *numbered("e", 1000))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 20000


@posix_only
def test_damaged_lines_end_in_rejected_log_with_file_number_and_reason_and_the_rest_is_delivered(tmp_path):
    leave(tmp_path, *numbered("e", 10))
    name = damage(tmp_path, lambda lines: lines[:2] + [b"\0" * 99 + b"\xff{]\n"] + lines[3:7] + [b"[%s]\n" % (b"1" * 9999)] + lines[8:] +
                  [lines[0][:30]])
    reported = []
    with FaultyServer() as server:
        with spooling(server, tmp_path, on_error=lambda *told: reported.append(told)) as collecter:
            collecter.uploadData(event("own"))
            collecter.flush(20)
            assert server.names == [xwhat for xwhat in numbered("e", 10) if xwhat not in ("e2", "e7")] + ["own"]
            assert (collecter.stats()["adopted"], collecter.stats()["rejected"]) == (11, 3)
    entries = rejected_in(tmp_path)
    assert [(entry["file"], entry["line"]) for entry in entries] == [(name, 3), (name, 8), (name, 11)]
    assert all("JSON" in entry["reason"] for entry in entries) and entries[1]["length"] == 10002
    assert entries[1]["record"] == "[" + "1" * 4095             # the first 4 KiB
    assert [str(error) for error, _ in reported] == [entry["reason"] for entry in entries]
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.log"]
    assert stat.S_IMODE((tmp_path / "rejected.log").stat().st_mode) == 0o600


@posix_only
@pytest.mark.parametrize("value", ["0", "NaN", '"\\ud83d"', "1" * 400], ids=["good", "NaN", "half a character", "big"])
def test_records_that_the_platform_refuses_end_in_rejected_log_whatever_they_hold(tmp_path, value):
    leave(tmp_path, "a", "bad", "c")
    damage(tmp_path, lambda lines: [lines[0], lines[1].replace(b'"$debug":0', b'"$debug":' + value.encode()), lines[2]])
    with FaultyServer(then=refuse("bad")) as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(20)
        assert server.names == ["a", "c", "own"] and collecter.stats()["rejected"] == 1
        entry, = rejected_in(tmp_path)
        assert entry["line"] == 2 and '"bad"' in json.dumps(entry["record"]).replace("\\", "") and entry["reason"]


@posix_only
def test_a_spool_on_a_full_disk_says_so_and_loses_nothing(tmp_path):
    with FaultyServer() as server:
        taken = json.loads(run("""
            collecter, taken = BatchCollecter(url, spool_path=folder, queue_cache_max_size=1), []
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

            def fill():
                for number in range(100):
                    collecter.uploadData(event("e%d" % number, filler="x" * 500))
                    taken.append("e%d" % number)
            error = error_of(fill)
            assert isinstance(error, AnalysysPythonSdkFileException) and error.errno == errno.EFBIG, error
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            collecter.uploadData(event("room"))
            collecter.flush()
            collecter.close()
            print(json.dumps(taken + ["room"]))
        """, server.url, tmp_path).out)
        assert server.names == taken and len(taken) < 20
    assert list(tmp_path.iterdir()) == []


@dnotify_only
def test_an_exception_out_of_a_signal_handler_costs_and_doubles_no_other_spooled_record(tmp_path):
    never = "collecter = BatchCollecter(url, max_interval_time=60, queue_cache_max_size=1000, spool_path=folder)\n"
    with FaultyServer() as server:
        run(never + INTERRUPTED, server.url, tmp_path)
        check_interrupted(server.names)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_wherever_an_exception_comes_out_of_a_signal_handler_the_records_before_and_after_are_delivered(tmp_path):
    with FaultyServer() as server:
        run("collecter = BatchCollecter(url, spool_path=folder)\n" + INTERRUPTED_ANYWHERE, server.url, tmp_path)
    assert [xwhat for xwhat in server.names if xwhat != "interrupted"] == numbered("e", 50)


@contextlib.contextmanager
def spool(folder, max_bytes=1 << 20):
    """Yield the queue of a spool and what puts an event into it, larger by so many bytes."""
    queue = analysys._Spool(str(folder), max_bytes, 10, 60)
    try:
        yield queue, lambda xwhat, size=0: queue.put(lines_of(xwhat).encode().replace(b"{", b"{" + b" " * size, 1))
    finally:
        queue.close()


def held(folder):
    """Return what the spool files in *folder* hold."""
    return [xwhat for path in sorted(folder.glob("*.0*.log")) for xwhat in events_in(path)]


def all_of(queue):
    return list(itertools.chain.from_iterable(iter(lambda: queue.take(9), [])))


def names_of(items):
    return [json.loads(item.text.decode())["xwhat"] for item in items]


@pytest.mark.parametrize("size", [0, 700])             # of which the second one goes into another file
@pytest.mark.parametrize("inner", ["", "x", "xy", "x, take"])
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_spool_counts_what_it_holds_and_hands_it_out_once_whatever_comes_inside_any_step_of_put(
        tmp_path, size, inner, is_interrupted):
    def disturb():
        for xwhat in inner.split(",")[0]:              # as a signal handler or __del__,
            put(xwhat, size)
        if "take" in inner:                            # and meanwhile the sender
            taken.extend(queue.take(9))
            assert len(taken) <= queue.ledger.stats()["accepted"] == queue.mark()[0]
        if is_interrupted:
            interrupt()
    for step in each_step(20):
        folder, taken = tmp_path / str(step), []
        with spool(folder, 4000) as (queue, put):
            put("a", size)
            disturbed(lambda: put("b", size), step, disturb)
            names = held(folder)
            assert len(names) == queue.mark()[0] == queue.ledger.stats()["accepted"]
            names += ["c"] if put("c", size) else []
            taken += all_of(queue)
            assert names_of(taken) == names
            queue.settle(taken)
            assert queue.mark() == (len(names), len(names))
            balanced(queue.ledger.stats(), delivered=len(names), pending=0)


def test_wherever_a_signal_handler_raises_in_put_the_files_of_a_spool_still_roll(tmp_path):
    for step in each_step(20):
        with spool(tmp_path / str(step)) as (queue, put):
            queue._own.room.roll_size = 1000
            disturbed(lambda: put("a", 700), step, interrupt)
            while queue._own.writing._is_owned():      # in a `with` that was about to unlock it
                queue._own.writing.release()
            put("b", 700)
            put("c", 700)
            assert max(path.stat().st_size for path in (tmp_path / str(step)).glob("*.log")) <= 1000


@table("mends", ["at once", "with the next call"])
def test_a_part_of_a_line_that_an_interrupted_call_left_is_cut_off(tmp_path, monkeypatch, mends):
    def interrupted(fd, data):
        monkeypatch.undo()
        write(fd, data[:9])
        if mends != "at once":
            monkeypatch.setattr(os, "ftruncate", failing)
        interrupt()

    def failing(*_):
        monkeypatch.undo()
        raise OSError(errno.EIO, "")
    write = os.write
    with spool(tmp_path) as (queue, put):
        put("a")
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises((Interrupt, FileError)):
            put("b")
        put("c")
        assert names_of(all_of(queue)) == held(tmp_path) == ["a", "c"] and queue.mark() == (2, 0)


def test_what_somebody_cuts_off_is_lost_and_told_also_where_a_call_is_interrupted(tmp_path):
    for step in each_step(20):
        folder = tmp_path / str(step)
        with spool(folder) as (queue, put):
            put("a", 999)                              # longer than what comes then, so that it shows
            for path in folder.glob("*.0*.log"):
                os.truncate(str(path), 0)
            disturbed(lambda: put("b"), step, interrupt)
            queue.due_at()                             # it looks whether its file is there
            accepted = queue.ledger.stats()["accepted"]
            queue.settle(all_of(queue))
            assert queue.mark() == (accepted, accepted) and queue.ledger.stats()["rejected"] >= 1
            assert put("c") and names_of(all_of(queue)) == ["c"]


def test_what_a_spool_has_accepted_is_never_told_too_low(tmp_path):
    for step in each_step(20):
        for look_inside in False, True:
            with spool(tmp_path / ("%d%s" % (step, look_inside)), 4000) as (queue, put):
                put("a", 700)
                put("b", 700)                          # in another file: that of a goes when it is settled
                items, found = queue.take(1), []
                work = [lambda: queue.settle(items), lambda: found.append(queue.mark()[0])]
                disturbed(work[not look_inside], step, work[look_inside])
                assert found in ([], [2]) or found[0] > 2


def test_what_a_spool_has_written_and_settled_is_known_however_many_files_there_are(tmp_path):
    with spool(tmp_path) as (queue, put):
        queue._own.room.roll_size = 1000
        for number in range(40):
            put("e%d" % number, 700 * (number % 2))
            assert queue.mark() == (number + 1, 0)
        assert len(list(tmp_path.glob("*.*.log"))) > 10
        items = queue.take(30)
        queue.settle(items)
        put("last", 700)
        assert queue.mark() == (41, 30)
        balanced(queue.ledger.stats(), accepted=41, delivered=30, pending=11)


@posix_only
@table("inner", ["mark", "put"])
@table("call", ["mark", "put", "put where its file is gone"])
def test_what_a_spool_has_written_is_told_rightly_inside_any_step_of_a_call_that_makes_a_file(tmp_path, call, inner):
    def work(name):
        if name == "mark":
            seen.append(queue.mark()[0])
        else:
            put(name, 1500)
    for step in each_step(5):
        folder, seen = tmp_path / str(step), []
        with spool(folder) as (queue, put):
            queue._own.room.roll_size = 2000           # so that each of these goes into another file
            for xwhat in "abc":
                put(xwhat, 1500)
            put("also in the last one")
            if call.endswith("gone"):                  # an inner call makes one, too
                sorted(folder.glob("*.*.log"))[-1].unlink()
                queue._notice()
            came = disturbed(lambda: work(call), step, lambda: work(inner))
            puts = (call != "mark") + (inner != "mark" and came)
            assert queue.mark()[0] == 4 + puts and set(seen) <= set(range(4, 5 + puts))
            balanced(queue.ledger.stats(), accepted=4 + puts)


def test_a_file_that_could_not_be_made_changes_no_count(tmp_path):
    names = map("%06d.log".__mod__, itertools.count(1))                # of its files
    with spool(tmp_path) as (queue, put):
        queue._own.room.roll_size = 1000
        for number, xwhat in enumerate("abcd"):
            for name in itertools.islice(names, 2 * (number > 0)):
                (tmp_path / (queue._own.name + "." + name)).mkdir()
                with pytest.raises(FileError):
                    put("not_taken", 700)
            put(xwhat, 700)
            assert queue.mark() == (number + 1, 0) and (tmp_path / (queue._own.name + "." + next(names))).is_file()
        assert names_of(all_of(queue)) == list("abcd")


@posix_only
@table("what", ["take", "_notice"])
def test_a_record_that_is_taken_or_lost_counts_once_at_any_moment(tmp_path, what):
    for step in range(1, 400):
        folder, seen = tmp_path / str(step), []
        with spool(folder) as (queue, put):
            look = threading.Thread(target=lambda: seen.append(queue.ledger.stats()))
            put("a")
            put("b")
            if what == "_notice":
                shutil.rmtree(str(folder))
            work = functools.partial(getattr(queue, what), *[9] * (what == "take"))
            if not disturbed(work, step, lambda: [look.start(), look.join(0.005)]):
                break
            look.join(20)
            balanced(seen[0], accepted=2)
    assert step > 20


def test_an_exception_out_of_a_signal_handler_while_a_spool_hands_out_records_loses_none_and_counts_each_once(tmp_path):
    for step in range(1, 1000):
        with spool(tmp_path / str(step)) as (queue, put):
            for xwhat in "abcde":
                put(xwhat)
            items = []
            disturbed(lambda: items.extend(queue.take(3)), step, interrupt)
            assert queue.mark() == (5, 0)
            if queue._own.files[0].flight:             # from then on they are the caller's
                break
            items += all_of(queue)
            assert names_of(items) == list("abcde")
            queue.settle(items)
            assert queue.mark() == (5, 5)
            balanced(queue.ledger.stats(), accepted=5, delivered=5, pending=0)
    assert step > 50


def test_a_record_that_is_put_back_counts_at_no_moment_as_settled(tmp_path):
    for step in each_step(1):
        with spool(tmp_path / str(step)) as (queue, put):
            put("a")
            line, = queue.take(1)
            seen = [queue.mark()[1]]
            disturbed(lambda: line.source.put_back(line), step, lambda: seen.append(queue.mark()[1]))
            assert set(seen) == {0} and names_of(queue.take(1)) == ["a"]


@posix_only
def test_a_spool_whose_close_is_interrupted_lets_go_of_its_files_when_it_is_closed_again(tmp_path):
    for step in range(1, 400):
        with spool(tmp_path / str(step)) as (queue, put):
            put("a")
            came = disturbed(queue.close, step, interrupt)
            queue.close()
            balanced(queue.ledger.stats(), accepted=1, pending=1)
            with spool(tmp_path / str(step)) as (other, _):
                assert names_of(all_of(other)) == ["a"], step
        if not came:
            break
    assert step > 20


@posix_only
def test_what_was_in_a_removed_spool_file_is_told_and_counts_once_also_where_a_signal_handler_ends_the_look(tmp_path):
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        with spool(folder) as (queue, put):
            for xwhat in "abcde":
                put(xwhat)
            items = queue.take(2)
            for path in folder.glob("*.0*.log"):
                path.unlink()
            came = disturbed(queue._notice, step, interrupt)
            queue._notice()                            # as a second later
            assert queue.mark() == (5, 0)
            queue.settle(items)
            assert queue.mark() == (5, 5) and queue.ledger.refusals
            balanced(queue.ledger.stats(), accepted=5, delivered=2, rejected=3, pending=0)
            if not came:
                break
    assert step > 50


def test_a_spool_file_that_cannot_be_looked_at_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(errno.EIO, "a disk that is tired")
    with spool(tmp_path) as (queue, put):
        put("a")
        with monkeypatch.context() as patched:
            patched.setattr(os, "lstat", failing)
            queue._notice()
        assert names_of(all_of(queue)) == ["a"] and queue.ledger.stats()["rejected"] == 0


def test_what_is_settled_counts_where_an_exception_comes_out_of_the_note_of_it(tmp_path, monkeypatch):
    def interrupted(*_):
        monkeypatch.undo()
        interrupt()
    with spool(tmp_path) as (queue, put):
        for xwhat in "abc":
            put(xwhat)
        items = queue.take(9)
        for error in None, IllegalData("refused"):
            monkeypatch.setattr(os, "lseek", interrupted)
            with pytest.raises(Interrupt):
                queue.settle([items.pop(0)], error)
        assert queue.mark() == (3, 2) and len(queue.ledger.refusals) == 1
        balanced(queue.ledger.stats(), delivered=1, rejected=1, pending=1)


@posix_only
def test_the_note_of_what_is_settled_is_in_a_lock_file_made_anew_too(tmp_path):
    with spool(tmp_path) as (first, put):
        for xwhat in "abc":
            put(xwhat)
        first.settle(first.take(2))
        for path in tmp_path.glob("*.lock"):
            path.unlink()
        first._notice()
        first.disown()                                 # as if it was killed
        with spool(tmp_path) as (second, _):
            assert names_of(all_of(second)) == ["c"]


@posix_only
def test_of_two_that_look_for_leftovers_at_once_one_adopts_them(tmp_path, monkeypatch):
    def listed():
        found = open_files()
        if threading.current_thread().name == "first":
            inside.set()
            assert go_on.wait(20)
        return found

    def wait(*arguments):
        waits.append(arguments)
        return kept(*arguments)
    inside, go_on, waits = threading.Event(), threading.Event(), []
    open_files, kept = analysys._open_files, analysys._CLOCK.wait
    clock, now = FakeClock(monkeypatch), time.monotonic()
    with spool(tmp_path) as (first, _), spool(tmp_path) as (second, _):
        leave(tmp_path, "left")
        clock.now, clock.wait = lambda: now, wait      # which stands still, lest the patience ends
        monkeypatch.setattr(analysys, "_open_files", listed)
        looks = [threading.Thread(target=queue._leftovers.look, name=name)
                 for queue, name in ((first, "first"), (second, "second"))]
        looks[0].start()
        assert inside.wait(20)
        looks[1].start()
        wait_until(lambda: waits or not looks[1].is_alive())
        go_on.set()
        for look in looks:
            look.join(20)
        assert len(first._leftovers.adopted + second._leftovers.adopted) == 1


def test_leftovers_in_flight_stay_with_who_sends_them_also_where_descriptors_are_few(tmp_path, monkeypatch):
    def failing(path, *arguments):
        if str(path).endswith(late + ".lock"):
            raise OSError(errno.EMFILE, "")
        return kept(path, *arguments)
    kept = os.open
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0)
    leave(tmp_path, "a")
    leave(tmp_path, "b")
    with spool(tmp_path) as (first, _), spool(tmp_path) as (second, _):
        assert names_of(first.take(9)) == ["a", "b"]
        late = leave(tmp_path, "late")
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", failing)
            assert first.take(9) == []
        assert names_of(all_of(second)) == ["late"]


@posix_only
def test_leftovers_that_others_deliver_meanwhile_are_no_reason_for_a_warning_and_those_mended_are_delivered(
        tmp_path, monkeypatch):
    def listed():
        monkeypatch.undo()
        for path in tmp_path.glob(gone + "*"):
            path.unlink()
        return open_files()
    open_files = analysys._open_files
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0)
    for suffix in ".lock", ".000001.log":              # without the lock file, or with nothing else
        gone = leave(tmp_path)
        (tmp_path / (gone + suffix)).unlink()
        with logged() as entries, spool(tmp_path) as (queue, _):
            monkeypatch.setattr(analysys, "_open_files", listed)
            assert queue.take(9) == [] and not entries
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0)
    with logged() as entries, spool(tmp_path) as (queue, _):
        name = leave(tmp_path, "mended")
        (tmp_path / (name + ".lock")).unlink()
        (tmp_path / (name + ".lock")).mkdir()
        assert queue.take(9) == [] and len(entries) == 1
        shutil.rmtree(str(tmp_path / (name + ".lock")))
        (tmp_path / (name + ".000001.log")).rename(tmp_path / "aside")
        assert queue.take(9) == []                     # and it looks
        (tmp_path / "aside").rename(tmp_path / (name + ".000001.log"))
        assert names_of(queue.take(9)) == ["mended"]


def test_what_rejected_log_does_not_take_is_told_while_no_lock_is_held(tmp_path):
    class Handler(logging.Handler):
        def emit(self, entry):
            with threads(lambda: found.append(queue.take(9))):
                pass
    found, handler = [], Handler()
    (tmp_path / "rejected.log").mkdir()
    with spool(tmp_path) as (queue, put):
        put("bad")
        logging.getLogger("analysys").addHandler(handler)
        try:
            queue.settle(queue.take(9), IllegalData("refused"))
        finally:
            logging.getLogger("analysys").removeHandler(handler)
        assert found == [[]]


def test_a_spool_is_due_by_its_oldest_record(tmp_path, monkeypatch):
    clock = FakeClock(monkeypatch)
    with spool(tmp_path) as (queue, put):              # 60 seconds
        put("a")
        assert queue.due_at() > clock.now() + 30
        clock.advance(40)
        put("b")
        assert queue.due_at() < clock.now() + 21
        queue.settle(queue.take(9))
        put("c")
        assert queue.due_at() > clock.now() + 30


def test_a_closed_spool_hands_out_and_settles_nothing(tmp_path):
    with spool(tmp_path) as (queue, put):
        put("a")
        put("b")
        items = queue.take(1)
        queue.close()
        queue.settle(items)
        assert queue.take(9) == [] and queue.mark() == (2, 0) and held(tmp_path) == ["a", "b"]
        balanced(queue.ledger.stats(), accepted=2, pending=2)


def test_a_disk_that_fails_for_a_while_stops_the_sender_no_longer(tmp_path, monkeypatch):
    def failing(path, flags, *arguments):
        if str(path).endswith("000001.log") and not flags & os.O_CREAT and failures:
            failures.pop()
            raise OSError(errno.EMFILE, "")
        return kept(path, flags, *arguments)
    kept, failures = os.open, [None] * 3
    with FaultyServer() as server, spooling(server, tmp_path) as collecter:
        monkeypatch.setattr(os, "open", failing)
        collecter.uploadData(event("a"))
        wait_until(lambda: server.names == ["a"])      # and nobody calls
        assert not failures


def test_a_line_that_was_damaged_on_disk_holds_up_no_flush(tmp_path):
    with FaultyServer() as server, spooling(server, tmp_path, queue_cache_max_size=NEVER) as collecter:
        collecter.uploadData(event("a"))
        damage(tmp_path, lambda lines: [b"x" * (len(line) - 1) + b"\n" for line in lines])
        collecter.flush()
        balanced(collecter, accepted=1, rejected=1, pending=0)


def test_a_spool_has_room_for_what_all_hold_the_share_of_rejected_log_and_one_file_more(tmp_path, monkeypatch):
    own, other = "%013d-1-00000000" % 1, tmp_path / ("%013d-1-00000000.000001.log" % 2)
    room = analysys._Room(str(tmp_path), own, 4000)    # files of 1000 bytes, and up to three of 250 for what is rejected
    (tmp_path / (own + ".000001.log")).write_bytes(bytes(2000))        # it knows how much itself
    assert room.is_left(2250) and not room.is_left(2251)
    other.write_bytes(bytes(2000))
    wait_until(lambda: room.is_left(250) and not room.is_left(251))
    other.unlink()
    (tmp_path / "rejected.log.1").write_bytes(bytes(2000))
    wait_until(lambda: room.is_left(1000) and not room.is_left(1001))
    (tmp_path / "rejected.log.1").write_bytes(bytes(9000))
    wait_until(lambda: room.is_left(0) and not room.is_left(1))        # one file there may always be
    other.write_bytes(bytes(2000))
    listdir, room = os.listdir, analysys._Room(str(tmp_path), own, 4000)
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lambda path: [listdir(path), other.unlink()][0])    # others deliver it just then
        assert room.is_left(0) and not room.is_left(1)
    with spool(tmp_path / "large", 4000) as (queue, put):
        for _ in range(3):                             # larger than a file: what is delivered takes no room
            assert put("a", 2500)
            queue.settle(queue.take(9))


@posix_only
def test_a_disk_that_is_full_after_a_call_was_interrupted_costs_no_other_spooled_record(tmp_path):
    accepted = json.loads(run("""
        collecter = BatchCollecter(url, max_interval_time=60, queue_cache_max_size=1000, spool_path=folder)
        accepted = []

        def take(xwhat):
            collecter.uploadData(event(xwhat))
            accepted.append(xwhat)

        path, = [os.path.join(folder, name[:-len("lock")] + "000001.log") for name in os.listdir(folder)]
        take("first")
        for disturb in lambda: take("inner"), interrupt, lambda: [take("inner"), interrupt()]:
            at = 1
            while disturbed(lambda: collecter.uploadData(event("disturbed")), at, disturb):
                size = os.path.getsize(path)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
                assert isinstance(error_of(take, "cut"), AnalysysPythonSdkFileException)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                take("after%d" % at)
                at += 1
            assert at > 20
        print(json.dumps(accepted))
        sys.stdout.flush()
        os._exit(0)
    """, URL, tmp_path).out)
    path, = tmp_path.glob("*.log")
    written = [json.loads(line)["xwhat"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [xwhat for xwhat in written if xwhat != "disturbed"] == accepted


@pytest.mark.usefixtures("each_fork")
@posix_only
def test_children_forked_while_a_spool_is_read_do_not_hang(tmp_path):
    leave(tmp_path, *["e"] * 2000, filler="x" * 5000)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        run("""
            collecter = BatchCollecter(url, spool_path=folder)
            while collecter.stats()["delivered"] < 2000:
                reap(child(lambda: None))
            collecter.close()
        """, server.url, tmp_path)


@posix_only
@pytest.mark.parametrize("notice", [0.1, NEVER])
def test_nothing_is_written_into_files_that_got_the_numbers_of_descriptors_that_somebody_closed(tmp_path, notice):
    with FaultyServer() as server:
        run("""
            logging.disable(logging.WARNING)           # it may have to say that it cannot note what is delivered
            analysys._NOTICE_EVERY = notice = %r
            path = os.path.join(folder, "spool")
            waiting, locks, strangers = analysys._CLOCK.wait, [], []
            def wait(*arguments):
                if threading.current_thread() is not threading.main_thread() and not strangers:
                    wait_until(lambda: locks)          # now nobody has a file open for a moment only
                    os.closerange(3, 50)               # as what becomes a daemon does
                    strangers[:] = [open(os.path.join(folder, "file%%d" %% number), "w+b") for number in range(50)]
                return waiting(*arguments)
            analysys._CLOCK.wait = wait
            collecters = LogCollecter(folder), BatchCollecter(url, 1000, 1000, spool_path=path)
            for collecter in collecters:
                collecter.uploadData(event("a"))
            lock, = locks[:] = [os.path.join(path, name) for name in os.listdir(path) if name.endswith(".lock")]
            wait_until(lambda: strangers)
            for name in "b", "c":
                for collecter in collecters:
                    collecter.uploadData(event(name))
            wait_until(lambda: notice > 1 or any(os.path.samestat(os.stat(lock), os.fstat(fd)) for fd in descriptors()))
            for collecter in collecters:
                collecter.close()
                balanced(collecter, accepted=3, delivered=3)
            assert [os.fstat(file.fileno()).st_size for file in strangers] == [0] * 50
        """ % notice, server.url, tmp_path, before="""
            def descriptors():
                for fd in range(3, 100):
                    try:
                        os.fstat(fd)
                        yield fd
                    except OSError:
                        pass
        """)
        assert server.names == ["a", "b", "c"] == lines_in(tmp_path) and list((tmp_path / "spool").iterdir()) == []


@posix_only
@pytest.mark.parametrize("kind", ["BatchCollecter", "DefaultCollecter"])
@pytest.mark.parametrize("who", ["the next call", "a look"])
def test_a_connection_whose_descriptor_somebody_closed_is_replaced_and_who_has_its_number_keeps_it(kind, who):
    with FaultyServer() as server:
        run("""
            import socket
            analysys._LOOK_EVERY = 0.05 if %r == "a look" else 1e6
            collecter = %s(url)
            give(collecter, "a")
            collecter.flush()
            os.closerange(3, 50)                       # as what becomes a daemon does
            strangers = [end for _ in range(20) for end in socket.socketpair()]
            if analysys._LOOK_EVERY < 1:
                state = collecter._state()
                pool = (state._transport if hasattr(state, "_transport") else state._sender.transport)._pool
                wait_until(lambda: not pool._all)
            give(collecter, "b")
            collecter.flush()
            collecter.close()
            balanced(collecter, delivered=2, retries=0)
            for end in strangers:                      # open, and nothing came
                end.setblocking(False)
                try:
                    raise AssertionError(end.recv(1))
                except BlockingIOError:
                    pass
        """ % (who, kind), server.url)
        assert server.names == ["a", "b"]


@posix_only
def test_a_spool_whose_lock_file_another_process_takes_as_it_is_made_makes_another_one(tmp_path, monkeypatch):
    import fcntl
    opening, takers, (ours, theirs) = os.open, [], os.pipe()

    def hold(path):
        file = open(path, "r+b")
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(theirs, b".")
        signal.pause()

    def opened(path, flags, *mode, **where):
        fd = opening(path, flags, *mode, **where)
        if str(path).endswith(".lock") and flags & os.O_EXCL and not takers:
            takers.append(child(hold, path))
            assert os.read(ours, 1)
        return fd
    monkeypatch.setattr(os, "open", opened)
    try:
        with FaultyServer() as server, spooling(server, tmp_path) as collecter:
            track(tracker_to(collecter), "a")
            collecter.flush()
            assert server.names == ["a"]
    finally:
        os.kill(takers[0], signal.SIGKILL)
        os.waitpid(takers[0], 0)
        os.close(ours)
        os.close(theirs)


@posix_only
def test_a_lock_file_that_cannot_be_used_keeps_no_other_files_from_being_adopted(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", NEVER)                # but at the start
    leave(tmp_path, "left")
    (tmp_path / "0000000000000-1-00000000.lock").mkdir()
    with FaultyServer() as server, spooling(server, tmp_path):
        wait_until(lambda: server.names == ["left"])


@posix_only
def test_a_spool_that_cannot_be_written_is_an_error_of_the_constructor(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    deep = str(tmp_path)
    while len(deep) < 4075:
        deep = os.path.join(deep, "d" * min(200, 4085 - len(deep)))    # too long with the name of a spool file
    for path in str(tmp_path / "file"), str(tmp_path / "file" / "spool"), str(tmp_path / "link"), deep:
        with pytest.raises(FileError):
            BatchCollecter("http://127.0.0.1:1", spool_path=path)


@linux_only
def test_a_spool_larger_than_the_memory_it_may_take_is_drained(tmp_path):
    leave(tmp_path, *["e"] * 1000, filler="x" * 50000)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        peak = int(run("""
            collecter = BatchCollecter(url, collecter_max_size=300, spool_path=folder)
            wait_until(lambda: collecter.stats()["delivered"] == 1000, 30)
            collecter.close()
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, server.url, tmp_path).out)
    assert peak < 50000 * SPARE and list(tmp_path.iterdir()) == []


root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users: run as root")


@posix_only
def test_copies_of_the_module_in_one_process_share_a_spool_and_send_each_record_once(tmp_path):
    leave(tmp_path, *numbered("left", 5))
    with FaultyServer() as server:
        run("""
            import importlib, importlib.util
            spec = importlib.util.spec_from_file_location("vendored", analysys.__file__)
            vendored = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(vendored)
            collecters = []
            for load in lambda: analysys, lambda: importlib.reload(analysys), lambda: vendored:
                module = load()
                module._LOOK_EVERY = module._NOTICE_EVERY = 0.02       # all look for leftovers all the time
                collecters.append(module.BatchCollecter(url, spool_path=folder, queue_cache_max_size=1))
                collecters[-1].uploadData(event("first%d" % len(collecters)))
            looks = [collecter._state()._queue._leftovers for collecter in collecters]
            for _ in range(5):
                before = [look.look_at for look in looks]
                for number, collecter in enumerate(collecters):
                    collecter.uploadData(event("e%d" % number))
                wait_until(lambda: all(look.look_at > at for look, at in zip(looks, before)))
            for collecter in collecters:
                collecter.flush()
            assert sum(collecter.stats()["adopted"] for collecter in collecters) == 5
            for collecter in collecters:
                collecter.close()
        """, server.url, tmp_path).out
    expected = numbered("left", 5) + ["first1", "first2", "first3"] + 5 * numbered("e", 3)
    assert sorted(server.names) == sorted(expected) and list(tmp_path.iterdir()) == []


@posix_only
def test_interpreters_of_one_process_share_a_spool_and_send_each_record_once(tmp_path):
    interpreters = pytest.importorskip("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    leave(tmp_path, *numbered("left", 5))
    code = """if True:
        import sys
        sys.path.insert(0, %r)
        import analysys
        analysys._LOOK_EVERY = analysys._NOTICE_EVERY = 0.02
        with analysys.AnalysysPythonSdk(analysys.BatchCollecter(%r, queue_cache_max_size=1, spool_path=%r)) as tracker:
            tracker.setAppId("app")
            for number in range(20):
                tracker.track("user", %r + str(number))
    """
    with FaultyServer() as server:
        def work(prefix):
            number = interpreters.create()
            failure = interpreters.run_string(number, code % (os.path.dirname(SOURCE), server.url, str(tmp_path), prefix))
            interpreters.destroy(number)
            assert failure is None, failure
        all_at_once(work, ["a", "b"])
    assert sorted(server.names) == sorted(numbered("left", 5) + numbered("a", 20) + numbered("b", 20))
    assert list(tmp_path.iterdir()) == []


TRAPS = {                                              # what lies among the leftovers, in place of a lock or a file
    "FIFO": lambda path: os.mkfifo(str(path)),
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "directory": lambda path: path.mkdir(),
    "hard link": lambda path: [path.write_text(lines_of("trapped")), os.link(str(path), str(path) + "2")],
}


@posix_only
def test_leftovers_that_are_traps_are_set_aside_with_one_warning_each_and_hold_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", 0.02)
    monkeypatch.setattr(analysys, "_NOTICE_EVERY", 0.02)
    for trap in TRAPS.values():
        for suffix in ".lock", ".000001.log":
            path = tmp_path / (leave(tmp_path, "trapped") + suffix)
            path.unlink()
            trap(path)
            leave(tmp_path, "left")
    trap(tmp_path / (leave(tmp_path) + ".000002.log"))                 # the last file, without a lock
    for path in sorted(tmp_path.glob("*.lock"))[-1:]:
        path.unlink()
    with FaultyServer() as server, logged() as entries, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(10)
        assert server.names == ["left"] * 8 + ["own"]
        looks = collecter._state()._queue._leftovers
        for _ in range(3):
            before = looks.look_at
            wait_until(lambda: looks.look_at > before)
        messages = [entry.getMessage() for entry in entries]
    assert len(messages) == len(set(messages)) == 9 and all("set aside" in message for message in messages), messages


@linux_only
def test_a_directory_whose_name_steers_terminals_or_is_no_text_serves_and_is_shown_in_safe_characters(tmp_path):
    folder = pathlib.Path(os.path.join(str(tmp_path), "\x1b[31m\n\udcff"))
    (folder / (leave(folder, "left") + ".99999999999999.log")).mkdir()
    (folder / (leave(folder, "again") + ".lock")).write_text("x")
    with FaultyServer(then=refuse("bad")) as server, logged() as entries:
        with spooling(server, folder, on_error=lambda *_: None, spool_max_bytes=10000) as collecter:
            collecter.uploadData(event("bad", filler="x" * 2000))
            collecter.uploadData(event("own"))
            collecter.flush(10)
            assert server.names == ["left", "again", "own"] and collecter.stats()["rejected"] == 1
    messages = [entry.getMessage() for entry in entries]
    shutil.rmtree(str(folder))
    folder.write_text("")
    with pytest.raises(FileError) as error:
        LogCollecter(str(folder)).uploadData(event("e"))
    messages.append(str(error.value))
    assert len(messages) == 4 and all(message.isprintable() and "\\udcff" in message for message in messages), messages


@posix_only
def test_a_file_that_cannot_be_read_any_more_keeps_its_place_for_the_next_process(tmp_path):
    path, gate = tmp_path / (leave(tmp_path, *numbered("e", 2000)) + ".000001.log"), Gate()
    with FaultyServer(then=gate) as server, logged() as entries, spooling(server, tmp_path) as collecter:
        wait_until(lambda: server.requests)
        os.link(str(path), str(tmp_path / "second"))
        gate.set()
        collecter.uploadData(event("own"))
        collecter.flush(10)
        first = server.names
        assert 100 < len(first) < 1500 and first.pop() == "own"
        assert len([entry for entry in entries if "set aside" in entry.getMessage()]) == 1
    (tmp_path / "second").unlink()
    with FaultyServer() as server, spooling(server, tmp_path):
        wait_until(lambda: len(list(tmp_path.iterdir())) == 1)
    assert first + server.names == numbered("e", 2000)


KEPT = {                                               # what a lock file says about a file of three lines
    "beyond": '{"%s": [99999999999999999999, 1, []]}', "negative": '{"%s": [-1, 0, []]}', "infinite": '{"%s": [1e999, 0, []]}',
    "holes": '{"%s": [0, 0, [[9, 9, 4]]]}', "text": '{"%s": "x"}', "list": "[1]", "number": "7" * 5000, "bytes": "\xff\0",
    "nested": "[" * 100000, "cut": '{"%s": [17', "lines": '{"%s": [0, -5, []]}',
}


@posix_only
def test_a_position_that_does_not_fit_its_file_has_it_delivered_from_the_beginning(tmp_path):
    for xwhat, kept in KEPT.items():
        name = leave(tmp_path, *numbered(xwhat, 3))
        (tmp_path / (name + ".lock")).write_text(kept.replace("%s", name + ".000001.log"))
        (tmp_path / (name + ".99999999999999999999999.log")).write_text(lines_of("last"))
    with FaultyServer() as server, logged() as entries, spooling(server, tmp_path):
        wait_until(lambda: len(list(tmp_path.iterdir())) == 1)
    assert server.names == sum([numbered(xwhat, 3) + ["last"] for xwhat in KEPT], [])
    warned = {entry.args[0][-37:-11] for entry in entries if "from its beginning" in entry.getMessage()}
    assert len({entry.args[1] for entry in entries if "from its beginning" in entry.getMessage()}) == len(KEPT), warned


@posix_only
def test_files_without_their_lock_are_delivered_in_their_turn_unless_their_owner_lives(tmp_path):
    (tmp_path / (leave(tmp_path, *numbered("first", 3)) + ".lock")).unlink()
    leave(tmp_path, "second")
    gate = Gate()
    with FaultyServer(then=gate) as other, FaultyServer() as server, spooling(other, tmp_path) as living:
        wait_until(lambda: other.requests)             # it has these now, and loses their lock and its own
        living.uploadData(event("living"))
        for path in tmp_path.glob("*.lock"):
            path.unlink()
        (tmp_path / (leave(tmp_path, "third") + ".lock")).unlink()
        with spooling(server, tmp_path) as collecter:
            wait_until(lambda: "third" in server.names)
            collecter.uploadData(event("own"))
            collecter.flush(10)
            assert "living" not in server.names and server.names[-2:] == ["third", "own"]
        gate.set()
        living.flush(10)
        assert other.names[-1] == "living" and other.names[:3] == numbered("first", 3)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_hundreds_of_leftovers_are_listed_a_few_times_and_take_few_descriptors(tmp_path, monkeypatch):
    listings, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listings.append(path) or listdir(path))
    monkeypatch.setattr(analysys, "_LOOK_EVERY", NEVER)                # more are adopted as soon as some are done
    for xwhat in numbered("e", 400):
        leave(tmp_path, xwhat)
    with FaultyServer() as server, spooling(server, tmp_path) as collecter:
        adopted = collecter._state()._queue._leftovers.adopted
        sizes = [0]
        wait_until(lambda: sizes.append(len(adopted)) or len(server.names) >= 400, 60)
        wait_until(lambda: len(listdir(str(tmp_path))) == 1)
    assert server.names == numbered("e", 400) and listings.count(str(tmp_path)) < 5 and 0 < max(sizes) <= 50


@linux_only
def test_where_descriptors_are_few_leftovers_leave_some_to_the_program(tmp_path):
    for xwhat in numbered("e", 100):
        leave(tmp_path, xwhat)
    with FaultyServer() as server:
        run("""
            resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
            collecter = BatchCollecter(url, spool_path=folder)
            wait_until(lambda: collecter.stats()["delivered"] == 100)
            collecter.close()
        """, server.url, tmp_path)
    assert server.names == numbered("e", 100) and list(tmp_path.iterdir()) == []


@posix_only
@pytest.mark.parametrize("size", [0, 1])               # bytes that a file may have: of a note, a part gets through
def test_closing_on_a_disk_that_takes_nothing_raises_nothing_and_one_warning_tells_what_may_come_twice(tmp_path, size):
    with FaultyServer() as server:
        printed = run("""
            collecter = BatchCollecter(url, spool_path=folder, queue_cache_max_size=1)
            collecter.uploadData(event("held"))
            collecter.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (%d, resource.RLIM_INFINITY))
            logged = []
            logging.getLogger("analysys").addHandler(type("Keeper", (logging.Handler,), {
                "emit": lambda self, entry: logged.append(entry.getMessage())})())
            collecter.close()
            print(len(logged), collecter.stats()["pending"], os.listdir(folder), logged)
        """ % size, server.url, tmp_path).out
        assert printed.startswith("1 0 [] ['cannot note") and "may come twice" in printed


@root_only
def test_on_a_disk_that_is_full_what_is_delivered_is_noted_all_the_same(tmp_path):
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], stderr=subprocess.DEVNULL):
        pytest.skip("cannot mount a file system here")
    try:
        with FaultyServer(answer(), then=silent) as server:
            run("""
                collecter = BatchCollecter(url, spool_path=folder, max_interval_time=60, queue_cache_max_size=100,
                                           collecter_max_size=2)
                give(collecter, *numbered("e", 4))
                with open(folder + "/other", "wb", 0) as file:
                    try:
                        while file.write(b"x" * 1000):
                            pass
                    except OSError:
                        pass
                error_of(collecter.flush, 0.5)
                assert collecter.stats()["delivered"] == 2
                os._exit(0)
            """, server.url, tmp_path)
        with FaultyServer() as server, spooling(server, tmp_path):
            wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
            assert server.names == ["e2", "e3"]
    finally:
        subprocess.check_call(["umount", "-l", str(tmp_path)])


@root_only
def test_files_of_another_user_are_set_aside_and_a_directory_of_another_user_is_refused(tmp_path):
    leave(tmp_path, "theirs")
    os.chmod(str(tmp_path), 0o777)
    for path in tmp_path.iterdir():
        os.chown(str(path), 1, 1)
    leave(tmp_path, "left")
    with FaultyServer() as server, logged() as entries, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(10)
        assert server.names == ["left", "own"]
        assert len([entry for entry in entries if "another user" in entry.getMessage()]) == 1
        with spooling(server, tmp_path):
            pass
        assert len([entry for entry in entries if "everybody may write" in entry.getMessage()]) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "their link").symlink_to("mine")
    os.chown(str(tmp_path / "their link"), 1, 1, follow_symlinks=False)
    os.chown(str(tmp_path), 1, 1)
    for path in tmp_path, tmp_path / "their link":
        with pytest.raises(FileError, match="another user"):
            BatchCollecter("http://127.0.0.1:1", spool_path=str(path))


ANOTHER_USER = """
    import asyncio, http.client, multiprocessing, reprlib, urllib.parse, urllib.request    # which may be root's alone
    DefaultCollecter(url).uploadData(event("before"))
    os.setuid(1)
    logged = []
    logging.getLogger("analysys").addHandler(type("Keeper", (logging.Handler,), {
        "emit": lambda self, entry: logged.append(entry.getMessage())})())
    """


@root_only
def test_two_users_share_a_spool_and_what_one_may_not_read_holds_up_neither():
    with tempfile.TemporaryDirectory() as name, FaultyServer() as server, logged() as entries:
        folder = pathlib.Path(name)
        os.chmod(name, 0o777)
        leave(folder, "of root")
        for xwhat, suffix in ("no file", ".000001.log"), ("no lock", ".lock"):
            base = leave(folder, xwhat)
            os.chmod(str(folder / (base + suffix)), 0)
            for path in folder.glob(base + "*"):
                os.chown(str(path), 1, 1)
        with spooling(server, folder, max_interval_time=60, queue_cache_max_size=100) as collecter:
            collecter.uploadData(event("own of root"))
            warned = run(ANOTHER_USER + """
    analysys._LOOK_EVERY = analysys._NOTICE_EVERY = 0.02
    collecter = BatchCollecter(url, spool_path=folder, queue_cache_max_size=1)
    collecter.uploadData(event("of the other"))
    collecter.flush()
    looks = collecter._state()._queue._leftovers
    for _ in range(3):                                 # root's lock, and two that it may not read
        before = looks.look_at
        wait_until(lambda: looks.look_at > before)
    print(len(logged), len(set(logged)), collecter.stats()["adopted"])
    collecter.close()
            """, server.url, folder).out
            collecter.flush(10)
        assert sorted(server.names) == ["before", "of root", "of the other", "own of root"] and warned == "4 4 0\n"
        assert len([entry for entry in entries if "another user" in entry.getMessage()]) == 2
        assert len(os.listdir(name)) == 4


@root_only
def test_what_is_delivered_and_cannot_be_removed_is_not_delivered_again():
    with tempfile.TemporaryDirectory() as name, FaultyServer() as server:
        leave(pathlib.Path(name), "left")
        for path in [name] + [os.path.join(name, found) for found in os.listdir(name)]:
            os.chown(path, 1, 1)
        for then in "leave", "remove":
            run(ANOTHER_USER + """
    analysys._LOOK_EVERY = analysys._NOTICE_EVERY = 0.02
    collecter = BatchCollecter(url, spool_path=folder, queue_cache_max_size=1)
    collecter.uploadData(event("own"))
    os.chmod(folder, 0o%d00)
    collecter.flush()
    looks = collecter._state()._queue._leftovers
    for _ in range(3):
        before = looks.look_at
        wait_until(lambda: looks.look_at > before)
    collecter.close()
    assert len(logged) == %d, logged
    os.chmod(folder, 0o700)
            """ % ((5, 1) if then == "leave" else (7, 0)), server.url, name)
        assert sorted(server.names) == ["before", "before", "left", "own", "own"] and os.listdir(name) == []


@root_only
def test_while_a_directory_may_not_be_written_or_searched_calls_say_so_and_afterwards_all_goes_on():
    with tempfile.TemporaryDirectory() as name, FaultyServer() as server:
        os.chown(name, 1, 1)
        run(ANOTHER_USER + """
    os.chmod(folder, 0o500)
    for make in lambda: BatchCollecter(url, spool_path=folder), lambda: LogCollecter(folder).uploadData(event("e")):
        assert error_of(make).errno == errno.EACCES
    os.chmod(folder, 0o700)
    collecter = BatchCollecter(url, spool_path=folder, queue_cache_max_size=1, spool_max_bytes=4000)
    collecter.uploadData(event("first"))
    collecter.flush()
    for mode in 0o500, 0:
        os.chmod(folder, mode)
        for _ in range(3):
            assert error_of(collecter.uploadData, event("more", filler="x" * 700)).errno == errno.EACCES
        collecter._state()._queue._notice()
        os.chmod(folder, 0o700)
        collecter.uploadData(event("after"))
        collecter.flush()
    collecter.close()
    assert len(logged) == 1 and os.listdir(folder) == [], logged
        """, server.url, name)
        assert server.names == ["before", "first", "after", "after"]


REMOVALS = {                                           # what somebody does to the files of a running process
    "the directory": lambda folder: shutil.rmtree(str(folder)),
    "all files": lambda folder: [path.unlink() for path in folder.iterdir()],
    "the spool file": lambda folder: [path.unlink() for path in folder.glob("*.log")],
    "what is in it": lambda folder: [path.write_bytes(b"") for path in folder.glob("*.log")],
    "another file in its place": lambda folder: [
        os.replace(str(log_file(folder / "new", *numbered("x", 9))), str(path)) for path in folder.glob("*.log")],
    "a directory in its place": lambda folder: [[path.unlink(), path.mkdir()] for path in folder.glob("*.log")],
    "a link in its place": lambda folder: [[path.rename(folder / "aside"), path.symlink_to("aside")]
                                           for path in folder.glob("*.log")],
}


@posix_only
def test_what_somebody_removes_is_noticed_within_a_second_rejected_and_told_and_new_files_are_made(tmp_path):
    def check(what):
        folder, told = tmp_path / what / "spool", []
        with FaultyServer() as server, spooling(server, folder, queue_cache_max_size=100, max_interval_time=60,
                                                on_error=lambda *error: told.append(error)) as collecter:
            give(collecter, *numbered("lost", 3))
            REMOVALS[what](folder)
            wait_until(lambda: collecter.stats()["rejected"] == 3)
            wait_until(lambda: len(list(folder.glob("*.lock"))) == 1)
            collecter.uploadData(event("after"))
            collecter.flush(10)
            assert server.names == ["after"]
            wait_until(lambda: told)
            assert "3 records" in str(told[0][0]) and collecter.stats()["pending"] == 0
        leave(folder, "next")
        with FaultyServer() as server, spooling(server, folder):
            wait_until(lambda: server.names == ["next"])
    assert analysys._NOTICE_EVERY == 1
    all_at_once(check, list(REMOVALS))


@posix_only
def test_where_somebody_else_in_a_process_reads_its_spool_the_lock_is_back_within_a_second(tmp_path):
    def is_free():                                     # for other processes
        script = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        return python("-S", "-c", script, lock).status == 0
    with FaultyServer(listening=False) as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("here"))
        lock, = tmp_path.glob("*.lock")
        assert not is_free()
        lock.read_bytes()                              # which closes it; POSIX has it that the process's lock goes
        wait_until(lambda: not is_free())


@posix_only
def test_what_somebody_removes_just_before_the_end_is_rejected_and_told_too(tmp_path):
    def check(what):
        folder, told = tmp_path / what / "spool", []
        with FaultyServer(then=answer(500)) as server:
            collecter = BatchCollecter(server.url, spool_path=str(folder), queue_cache_max_size=1, collecter_max_size=1,
                                       on_error=lambda error, records: told.extend(records))
            track(tracker_to(collecter), *numbered("lost", 3))
            wait_until(lambda: collecter.stats()["requests"])      # one of them is in flight
            REMOVALS[what](folder)
            collecter.close(0)
            wait_until(lambda: collecter.stats()["rejected"] == 3)
            wait_until(lambda: told)
        balanced(collecter, accepted=3, pending=0)
    all_at_once(check, list(REMOVALS))


@posix_only
def test_a_file_that_goes_while_its_lines_are_taken_counts_each_of_them_once(tmp_path, monkeypatch):
    read_at, reads = analysys._read_at, []

    def read(fd, offset, size):                        # at the second block of the file, it is gone
        reads.append(offset)
        if len(reads) == 2:
            path, = tmp_path.glob("*.log")
            path.unlink()
        return read_at(fd, offset, size)
    with FaultyServer() as server, spooling(server, tmp_path, queue_cache_max_size=1000,
                                            collecter_max_size=1000, max_interval_time=60, on_error=lambda *_: None) as collecter:
        give(collecter, *numbered("e", 100), filler="x" * 5000)
        monkeypatch.setattr(analysys, "_read_at", read)
        with contextlib.suppress(NetworkError):
            collecter.flush(10)
        wait_until(lambda: collecter.stats()["pending"] == 0)
        counts = balanced(collecter, accepted=100, delivered=len(server.names))
        assert server.names == numbered("e", counts["delivered"]) and 10 < counts["delivered"] < 100


@posix_only
def test_a_second_name_of_its_own_file_which_a_backup_makes_holds_up_no_record(tmp_path):
    with FaultyServer(listening=False) as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("a"))
        path, = tmp_path.glob("*.log")
        os.link(str(path), str(tmp_path / "backup"))
        server.listen()
        collecter.uploadData(event("b"))
        collecter.flush(10)
        assert server.names == ["a", "b"]


@table("line, act", [
    (lines_of("a").encode(), lambda queue, items: queue.settle(items, IllegalData("no"))),
    (b'{"cut', lambda queue, _: queue.take(1))])
def test_what_a_spool_refuses_is_to_be_told_before_it_counts_as_settled(line, act, tmp_path):
    for step in each_step(20):
        with spool(tmp_path / str(step)) as (queue, _):
            queue.put(line.rstrip() + b"\n")
            items, seen = queue.take(1) if line.endswith(b"\n") else [], []
            disturbed(lambda: act(queue, items), step, lambda: seen.append(
                (queue.mark()[1], len(queue.ledger.refusals), queue.ledger.stats()["rejected"])))
            assert set(seen) <= {(0, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1)} and queue.mark() == (1, 1)


def test_a_flood_of_refused_records_stays_within_the_limit_of_the_spool_and_what_is_dropped_is_counted(tmp_path):
    with FaultyServer(then=refuse("bad")) as server, logged() as entries:
        with spooling(server, tmp_path, spool_max_bytes=64000, on_error=lambda *_: None) as collecter:
            for number in range(120):
                collecter.uploadData(event("bad", filler="x" * (100 if number < 119 else 9000)))
            collecter.flush(20)
            sizes = {path.name: path.stat().st_size for path in tmp_path.glob("rejected.log*")}
            kept = sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("rejected.log*"))
            assert set(sizes) == {"rejected.log", "rejected.log.1", "rejected.log.2"} and max(sizes.values()) <= 4000
            assert collecter.stats()["rejected"] == 120
        dropped = [int(entry.args[0]) for entry in entries if "records are not in" in entry.getMessage()]
        assert sum(dropped) + kept == 120 and len(dropped) <= 3


@posix_only
def test_several_processes_roll_rejected_log_at_once_and_lose_no_line_that_is_not_counted(tmp_path):
    printed = run("""
        line = analysys._Line(b'{"a":1}\\n', "f", 1, 0, 8, 8, None)

        def work():
            log = analysys._RejectedLog(os.path.join(folder, "rejected.log"), 4000)
            for number in range(100):
                log.add([(line, "because")], False)
            os.write(1, b"%d\\n" % sum(log._lost.values()))
        assert all(list(map(ends_well, [child(work) for _ in range(4)])))
    """, URL, tmp_path).out
    files = [path.read_text().splitlines() for path in tmp_path.iterdir()]
    assert len(files) == 3 and sum(map(int, printed.split())) + sum(map(len, files)) == 400
    assert {json.dumps(json.loads(line)) for lines in files for line in lines} == {
        json.dumps({"file": "f", "line": 1, "reason": "because", "record": {"a": 1}})}


@posix_only
@pytest.mark.parametrize("trap", ["link", "hard link", "FIFO", "directory"])
def test_a_trap_in_place_of_rejected_log_gets_nothing_and_the_loss_is_told(tmp_path, trap):
    target, path = tmp_path / "target", tmp_path / "spool" / "rejected.log"
    target.write_text("precious")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(str(target)), "hard link": lambda: os.link(str(target), str(path)),
     "FIFO": lambda: os.mkfifo(str(path)), "directory": path.mkdir}[trap]()
    with FaultyServer(then=refuse("bad")) as server, logged() as entries:
        with spooling(server, path.parent, on_error=lambda *_: None) as collecter:
            collecter.uploadData(event("bad"))
            collecter.flush(10)
            assert collecter.stats()["rejected"] == 1
    assert target.read_text() == "precious"
    assert [entry.args[0] for entry in entries if "cannot be written" in entry.getMessage()] == [1]


@posix_only
def test_a_record_that_stands_aside_alone_comes_again_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LAST_BACKOFF", 0.1)
    names = numbered("e", 8)
    with FaultyServer(then=refuse("e3", reply=answer(500))) as server, spooling(
            server, tmp_path, queue_cache_max_size=8, max_interval_time=60) as collecter:
        queue = collecter._state()._queue
        give(collecter, *names)
        wait_until(lambda: collecter.stats()["delivered"] >= 4, 30)
        done = list(server.names)
        assert queue.mark()[1] == 3 and "e3" not in done
    with FaultyServer() as server, spooling(server, tmp_path):
        wait_until(lambda: "e3" in server.names)
        wait_until(lambda: len(list(tmp_path.iterdir())) == 1)
        assert sorted(server.names + done) == names


@posix_only
def test_leftovers_are_delivered_in_the_order_of_time_and_removed_locks_are_not_claimed(tmp_path):
    for number, xwhat in (("10000000000000", "third"), ("9999999999999", "second"), ("0000000000003", "first")):
        name = number + "-1-00000000"
        (tmp_path / (name + ".lock")).write_text("")
        (tmp_path / (name + ".999999.log")).write_text(lines_of(xwhat))
        (tmp_path / (name + ".1000000.log")).write_text(lines_of("then"))
    with FaultyServer() as server, spooling(server, tmp_path):
        wait_until(lambda: server.names == ["first", "then", "second", "then", "third", "then"])
        wait_until(lambda: len(list(tmp_path.iterdir())) == 1)
    owner, path = analysys._Owner(str(tmp_path), "0000000000003-1-00000000"), tmp_path / "0000000000003-1-00000000.lock"
    path.write_text("")
    lock, analysys_lock = analysys._try_lock, []
    try:
        analysys._try_lock = lambda fd, way: analysys_lock.append(fd) or path.unlink() or lock(fd, way)
        assert owner.claim(0) is False and analysys_lock
    finally:
        analysys._try_lock = lock


def test_what_on_error_tracks_in_a_spool_is_an_echo_and_ends(tmp_path):
    with FaultyServer(then=refuse("bad")) as server:
        calls = []

        def on_error(error, records):
            calls.append(error)
            collecter.uploadData(event("bad"))
        with spooling(server, tmp_path, on_error=on_error) as collecter:
            collecter.uploadData(event("bad"))
            wait_until(lambda: collecter.stats()["rejected"] == 2)
            collecter.flush(20)
        assert len(calls) == 1


# ---------------------------------------------------------------------------
# Sender
# ---------------------------------------------------------------------------

HTML = b"<html><body>Please log in</body></html>"
HALF = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"code"'
NOT_THE_DATA = 401, 403, 404, 407, 408, 429
FAULTS = [                                             # each row is what one server does before it recovers
    [answer(500)] * 3, [answer(200, code(500))] * 2, [answer(200, encode(code(500)))] * 2, [answer(502, HTML)],
    [cut(Reset)] * 2, [cut(Reset, HALF)] * 2, [cut(HangUp)] * 2, [cut(HangUp, HALF)] * 2, [cut(HangUp, b"SSH-2.0\r\n")],
    [answer(200, HTML)], [answer(400, HTML)], [answer(422, HTML)], [answer(200, b"")], [answer(204, b"")],
    [answer(200, b"200")], [answer(200, b"[200]")], [answer(400, b"null")], [answer(400, b"[]")], [answer(200, b"{}")],
    [answer(200, b'{"code":"400"}')], [answer(200, b'{"code":400.5}')], [answer(200, b'{"code":true}')],
    [answer(200, b"[" * 60000)], [answer(200, b"\xff\xfe\0")], [answer(200, b"H4sIA")],
    [answer(200, encode(b"{}")[:-9])],
] + [[answer(status)] for status in NOT_THE_DATA + (405, 410)] + [
    [answer(status, code(status)), answer(200, code(status))] for status in NOT_THE_DATA
] + [[answer(503, HTML, "Retry-After: soon")]]


def test_after_each_fault_that_is_not_the_datas_all_events_arrive_in_order():
    def check(steps):
        with FaultyServer(*steps) as server, batch(server, 30) as (collecter, tracker):    # they share the processor
            track(tracker, "a", "b")
            tracker.alias("user", "visitor")
            track(tracker, "c", "d")
            tracker.flush(40)
            track(tracker, "e")                        # no retry any more
            tracker.flush(40)
            assert server.names == ["a", "b", "$alias", "c", "d", "e"]
            balanced(collecter, accepted=6, delivered=6, requests=len(server.requests), retries=len(steps))
    all_at_once(check, FAULTS)


def test_a_default_collecter_makes_one_attempt_and_gives_the_record_back():
    def check(steps):
        with FaultyServer(steps[0]) as server, contextlib.closing(DefaultCollecter(server.url, 5)) as collecter:
            with pytest.raises(NetworkError) as error:
                collecter.uploadData(record("user", "lost"))
            assert error.value.records == [record("user", "lost")]
            collecter.uploadData(record("user", "kept"))
            assert (len(server.requests), server.names) == (2, ["kept"])
            balanced(collecter, delivered=1, pending=0, requests=2)
    all_at_once(check, FAULTS)
    with FaultyServer(answer(413)) as server, pytest.raises(IllegalData):      # it will never be smaller
        DefaultCollecter(server.url, 5).uploadData(record("user", "large"))


def test_a_server_that_is_down_for_three_seconds_costs_one_warning_and_no_event(skipping):
    def wait(lock, seconds):
        if log and skipping.ahead >= 3 and not server.listening:       # flush() waits, too, before the first request fails
            server.listen()
        return SkippingClock.wait(skipping, lock, min(seconds, 1))
    skipping.wait = wait
    with FaultyServer(listening=False) as server, batch(server, NEVER) as (collecter, tracker), logged() as log:
        track(tracker, "a", "b")
        tracker.alias("user", "visitor")
        track(tracker, "c")
        tracker.flush(None)
        assert server.names == ["a", "b", "$alias", "c"]
        assert [entry.levelname for entry in log if entry.levelno >= logging.WARNING] == ["WARNING"]
        assert balanced(collecter, accepted=4, delivered=4)["retries"] >= 1


def test_retry_after_is_honoured_in_seconds_and_as_a_date(skipping):
    for status, value in (429, "100"), (503, email.utils.formatdate(time.time() + 100, usegmt=True)):
        with FaultyServer(answer(status, b"", "Retry-After: " + value)) as server, batch(server, NEVER) as (_, tracker):
            before = skipping.now()
            track(tracker, "a")
            wait_until(lambda: server.names == ["a"])
            assert len(server.requests) == 2 and skipping.now() - before > 90


def test_flush_cuts_back_offs_short_at_most_once_a_second_for_all_callers(monkeypatch):
    monkeypatch.setattr(analysys, "_CUT_EVERY", 0.1)   # that second
    with FaultyServer(then=answer(503, b"", "Retry-After: 60")) as server, batch(server) as (_, tracker):
        start = time.monotonic()
        track(tracker, "a")

        def flush():
            with pytest.raises(NetworkError):
                tracker.flush(0.25)
        with threads(*[flush] * 10):
            pass
        wait_until(lambda: len(server.requests) > 2 or flush())    # it cuts again
        assert len(server.requests) <= 2 + (time.monotonic() - start) / 0.1


def test_a_back_off_is_not_cut_short_twice_within_a_second(monkeypatch):
    clock, outage, moments = FakeClock(monkeypatch), analysys._Outage(), []
    for moment in 100.0, 100.9, 101.1, 101.9:
        clock.now = lambda: moment
        outage.failed("HTTP 500")
        outage.cut()
        moments += [moment] if not outage.not_before else []
    assert moments == [100.0, 101.1]


def test_flush_cuts_a_back_off_short_that_begins_while_it_waits(monkeypatch, skipping):
    for name in "_FIRST_BACKOFF", "_LAST_BACKOFF":
        monkeypatch.setattr(analysys, name, 1e6)
    with FaultyServer(*[answer(503)] * 3) as server, batch(server) as (_, tracker):
        track(tracker, "a")
        tracker.flush(10000)                           # of the clock's seconds; of the machine's at least 20


STUCK = [
    silent,
    dripping(b""),
    dripping(b"HTTP/1.1 200 OK\r\nX-Padding: "),
    dripping(b"HTTP/1.1 200 OK\r\n\r\n"),
    dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
    dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"),
    flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
]


def test_request_timeout_bounds_a_request_to_a_stuck_server_and_delivery_goes_on_afterwards():
    def alone(step):
        with FaultyServer(step, accept) as server, contextlib.closing(DefaultCollecter(server.url, 0.7)) as collecter:
            with within(8), pytest.raises(NetworkError) as error:
                collecter.uploadData(record("user", "lost"))
            assert error.value.records == [record("user", "lost")]
            collecter.uploadData(record("user", "next"))
            assert server.names == ["next"]
            balanced(collecter, delivered=1, pending=0)

    def batched(step):
        with FaultyServer(step) as server, batch(server, request_timeout=0.7) as (collecter, tracker), within(8):
            track(tracker, "a", "b")
            tracker.flush(10)
            assert server.names == ["a", "b"]
            balanced(collecter, accepted=2, delivered=2, retries=1)
    all_at_once(lambda case: case[0](case[1]), list(itertools.product([alone, batched], STUCK)))


REFUSALS = [answer(200, code(400)), answer(400, code(400)), answer(422, b'{"msg":"unknown event"}'),
            answer(200, encode(code(499))), answer(500, code(402))]


@pytest.mark.parametrize("bad", [[41], [0, 50, 99], [7, 8, 9], range(100)], ids=["one", "three", "a run", "all"])
def test_a_refused_record_is_found_and_reported_and_the_others_are_delivered_in_order(bad):
    reported, names = [], numbered("e", 100)
    refused = [names[index] for index in bad]
    with FaultyServer(then=refuse(*refused)) as server:
        with batch(server, 5, 100, on_error=lambda *args: reported.append(args)) as (collecter, tracker):
            track(tracker, *names)
            tracker.flush(20)
            assert server.names == [name for name in names if name not in refused]
            balanced(collecter, delivered=100 - len(bad), rejected=len(bad), requests=len(server.requests))
    assert [[entry["xwhat"] for entry in records] for _, records in reported] == [[name] for name in refused]
    for error, records in reported:
        assert isinstance(error, IllegalData) and "unknown event" in str(error) and error.records == records
    assert len(server.batches[0]) == 100 and len(server.requests) <= 14 * len(bad) + 1


def test_each_form_of_refusal_is_told_to_the_caller_or_counted_in_the_log_once():
    for refusal in REFUSALS:
        with FaultyServer(then=refuse("bad", reply=refusal)) as server, logged() as log:
            collecter = DefaultCollecter(server.url)
            with pytest.raises(IllegalData, match="unknown event") as error:
                collecter.uploadData(record("user", "bad"))
            assert error.value.records == [record("user", "bad")]
            balanced(collecter, delivered=0, pending=0, requests=1)
            collecter.close()
            with batch(server, 5, 3) as (_, tracker):
                track(tracker, "a", "bad", "c")
                tracker.flush(10)
                message, = [entry.getMessage() for entry in log if entry.levelno == logging.ERROR]
                assert re.search(r"\b1\b", message) and "unknown event" in message
                assert server.names == ["a", "c"]


@pytest.mark.parametrize("too_large, reply", [
    (lambda request: len(decode(request.body)) > 10, answer(413)),
    (lambda request: len(decode(request.body)) > 10, answer(200, code(413))),
    (lambda request: len(request.body) > 4000, answer(413, HTML)),
], ids=["records", "code 413 in HTTP 200", "bytes"])
def test_a_batch_too_large_is_halved_and_the_next_ones_start_from_the_size_that_worked(too_large, reply):
    noise = random.Random(3)
    sound = when(too_large, reply, refuse("bad"))
    with FaultyServer(then=sound) as server, batch(server, 5, 64, on_error=lambda *_: None) as (collecter, tracker):
        tried = []
        for start in 0, 64:
            before = len(server.requests)
            for number in range(start, start + 64):
                tracker.track("user", "e%d" % number, {"noise": "%0200x" % noise.getrandbits(800)})
            tracker.flush(20)
            assert server.names == numbered("e", start + 64)
            tried.append([len(records) for records in server.batches[before:]])
            track(tracker, "bad")                      # which has nothing to do with it
            tracker.flush(20)
        assert tried[0][0] == 64 < sum(tried[0]) and sum(tried[1]) == 64        # nothing is sent twice any more
        assert max(tried[1]) <= 2 * tried[0][-1]
        balanced(collecter, accepted=130, delivered=128, requests=len(server.requests))


def test_a_single_record_too_large_is_refused_for_good_and_the_next_batches_are_large_again():
    reported, names = [], ["a", "b", "c", "large", "d", "e", "f", "g"]
    with FaultyServer(then=refuse("large", reply=answer(413))) as server:
        with batch(server, 5, 8, on_error=lambda *args: reported.append(args)) as (collecter, tracker):
            track(tracker, *names)
            tracker.flush(10)
            assert server.names == [name for name in names if name != "large"]
            balanced(collecter, accepted=8, delivered=7, rejected=1)
            track(tracker, *numbered("e", 8))
            tracker.flush(10)
            assert [one["xwhat"] for one in server.batches[-1]] == numbered("e", 8)
    (error, records), = reported
    assert isinstance(error, IllegalData) and [entry["xwhat"] for entry in records] == ["large"]


@table("number", [1, 256])
def test_the_ledger_is_shortened_and_holds_all_that_is_added_also_inside_any_step_of_it(number):
    def add(times):
        for _ in range(times):
            ledger.add(analysys._ACCEPTED)
    for step in range(1, 40):
        ledger = analysys._Ledger()
        add(255)
        came = disturbed(lambda: add(2), step, lambda: add(number))
        add(1500)
        assert len(ledger._changes) < 1000
        balanced(ledger.stats(), accepted=1757 + came * number)


def test_the_stats_of_a_ledger_copy_nothing_while_its_lock_is_held_since_that_may_call_a_del_which_waits():
    class Watched(list):
        def __getitem__(self, at):
            if isinstance(at, slice):
                seen.append(queue.ledger.lock._is_owned())
            return super().__getitem__(at)
    queue, seen = analysys._MemoryQueue(9, 9, 1.0), []
    queue.ledger._changes = Watched(queue.ledger._changes)
    balanced(queue.ledger.stats(), accepted=0)
    assert seen == [False]


def test_a_refusal_is_there_to_be_told_before_it_counts_as_settled():
    class Watched(analysys._Ledger):
        def add(self, change):
            seen.append(len(self.refusals))
            super().add(change)
    seen, ledger = [], Watched()
    ledger.settle(1, IllegalData("refused"))
    ledger.settle(1)
    assert seen == [1, 1]
    for step in each_step(5):
        queue, seen = analysys._MemoryQueue(9, 9, 1.0), []
        queue.put(b"{}\n")
        items = queue.take(9)
        disturbed(lambda: queue.settle(items, IllegalData("refused")), step,
                  lambda: seen.append(queue.mark()[1] <= len(queue.ledger.refusals)))
        assert all(seen)


def test_flush_returns_after_on_error_was_told_of_each_refusal():
    told = []

    def on_error(error, records):
        threading.Event().wait(0.02)                   # in which a flush might return
        told.extend(records)
    with FaultyServer(then=answer(200, code(400))) as server:
        with batch(server, on_error=on_error) as (collecter, tracker):
            for number in range(1, 5):
                tracker.track("user", "e")
                tracker.flush()
                assert len(told) == number


def test_a_flush_sends_all_that_waits_and_then_records_wait_for_more_again(monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", NEVER)    # the sender looks when it is woken, not by itself
    with FaultyServer() as server, batch(server, 5, 100, collecter_max_size=1) as (collecter, tracker):
        track(tracker, *numbered("e", 90))
        tracker.flush(15)                              # and not a request for each look that it takes
        assert server.names == numbered("e", 90)
        for name in numbered("later", 3):
            track(tracker, name)
            wait_until(lambda: collecter._state()._changed._sleepers)      # the sender has looked
        assert collecter.stats()["pending"] >= 2       # the haste of the flush may be left for one
        tracker.flush()


class SkippingClock(FakeClock):
    """A clock that every wait sets forward at once: rules about time, without the time.

    But for those of a `DefaultCollecter`'s thread, which may be one that an earlier test has left. And a request has a
    while for its answer before time goes on: a machine that is busy is no outage.
    """

    patience = 2                                       # seconds; 0 where the server is silent on purpose

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.requests = {}                             # when those began that are under way
        ask = analysys._Transport.ask

        def timed(*args):
            self.requests[threading.get_ident()] = time.monotonic()
            try:
                return ask(*args)
            finally:
                del self.requests[threading.get_ident()]
        monkeypatch.setattr(analysys._Transport, "ask", timed)

    def wait(self, lock, seconds):
        if threading.current_thread().name == "analysys-sweeper":
            return FakeClock.wait(lock, seconds)
        while not lock.acquire(timeout=0.002):
            if all(began < time.monotonic() - self.patience for began in list(self.requests.values())):
                self.advance(min(seconds, 5))
                return False
        return True


@pytest.fixture
def skipping(monkeypatch):
    return SkippingClock(monkeypatch)


def choking_on(names, reply=answer(500), until=lambda: False):
    """Fail on each batch that holds one of the *names*, and on all *until* something is so."""
    def step(server, request):
        records = decode(request.body)
        if not until() and (names is None or any(one["xwhat"] in names for one in records)):
            return reply(server, request) if callable(reply) else reply
        return accept(server, request)
    return step


@table("bad, reply", [([0], answer(500)), ([50], answer(200, code(500))), ([99], answer(503, HTML, "Retry-After: 2")),
                      ([0], cut(HangUp)), ([0, 1, 50], answer(500)), ([97, 98, 99], cut(HangUp))])
def test_records_on_which_the_server_chokes_are_given_up_and_the_others_arrive_in_order(bad, reply, skipping):
    names, reported = ["e%d" % number for number in range(100)], []
    refused = [names[index] for index in bad]
    with FaultyServer(then=choking_on(refused, reply)) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 1000, request_timeout=NEVER, on_error=lambda error,
                                               records: reported.extend(records))) as collecter:
            give(collecter, *names)
            collecter.flush(None)
            assert server.names == [name for name in names if name not in refused]
            assert [len(records) for records in server.batches[:5]] == [100] * 4 + [50]
            assert sorted(one["xwhat"] for one in reported) == sorted(refused)
            balanced(collecter, delivered=100 - len(bad), rejected=len(bad), pending=0)


@table("most, script", [(1, [500] * 3), (2, [413] + [500] * 3), (2, [413] + [500] * 4 + [404])])  # alone, or cut off
def test_failures_of_a_record_alone_that_may_be_the_servers_change_no_order(skipping, most, script):
    with FaultyServer(*map(answer, script)) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 3, most, request_timeout=NEVER)) as collecter:
            give(collecter, "a", "b", "c")
            collecter.flush(None)
            assert server.names == ["a", "b", "c"]


@pytest.mark.parametrize("bad", [[0], [99], [0, 1, 50], range(100)], ids=["head", "end", "three", "all"])
def test_a_spool_gives_up_what_chokes_the_server_and_delivers_the_others_in_order(bad, skipping, tmp_path):
    names = ["e%d" % number for number in range(100)]
    refused = [names[index] for index in bad]
    with FaultyServer(then=choking_on(refused)) as server:
        collecter = BatchCollecter(server.url, NEVER, 1000, request_timeout=NEVER, spool_path=str(tmp_path))
        with contextlib.closing(collecter):
            give(collecter, *names)
            if len(bad) == 100:                        # an outage, as far as anybody can tell
                with pytest.raises(NetworkError):
                    collecter.flush(100)
                balanced(collecter, pending=100, rejected=0)
                return
            collecter.flush(None)
            assert server.names == [name for name in names if name not in refused]
            assert sorted(entry["record"]["xwhat"] for entry in rejected_in(tmp_path)) == sorted(refused)
            balanced(collecter, delivered=100 - len(bad), rejected=len(bad), pending=0)


@pytest.mark.parametrize("bad", [[], [3], [0, 19]], ids=str)
def test_in_an_outage_nothing_is_given_up_and_the_order_is_kept_when_it_is_over(bad, skipping):
    names, over = ["e%d" % number for number in range(20)], []
    refused = [names[index] for index in bad]
    step, outage = choking_on(refused), choking_on(None)

    def fail(server, request):
        if len(server.requests) > 80 and decode(request.body)[0]["xwhat"] == "e0":
            over.append(True)                          # not between the first and another one that is tried at once
        if not server.accepted:
            server.first = [one["xwhat"] for one in decode(request.body)]
        return (step if over else outage)(server, request)
    with FaultyServer(then=fail) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 20, request_timeout=NEVER)) as collecter:
            give(collecter, *names)
            wait_until(lambda: len(server.requests) > 60)
            balanced(collecter, accepted=20, pending=20, rejected=0)
            collecter.flush(None)
            expected = [name for name in names if name not in refused]
            first = [] if bad != [0, 19] else server.first     # behind a bad one, one request is tried out of order
            assert server.names == first + [name for name in expected if name not in first]
            balanced(collecter, delivered=20 - len(bad), rejected=len(bad))


def test_a_record_on_which_the_server_chokes_waits_while_it_is_alone_and_steps_aside_for_what_comes(skipping):
    def reply(server, request):
        late.extend(server.names[:1])
        return answer(500)
    late = []
    with FaultyServer(then=choking_on(["bad"], reply)) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 1, request_timeout=NEVER)) as collecter:
            collecter.uploadData(record("user", "bad"))
            wait_until(lambda: len(server.requests) > 20)
            balanced(collecter, pending=1, rejected=0)
            give(collecter, "a", "b")
            collecter.flush(None)
            assert server.names == ["a", "b"]
            assert len(late) == 4                      # with the last one before these got through: five
            balanced(collecter, delivered=2, rejected=1)


def test_a_failure_before_a_refusal_is_not_held_against_the_records_that_are_cut_off(skipping):
    def step(server, request):
        names = [one["xwhat"] for one in decode(request.body)]
        if names == every and not failed or names == ["d"] and len(failed) < 4:
            failed.append(names)
            return answer(500)
        return answer(200, code(400)) if "bad" in names else accept(server, request)
    every, failed = ["a", "b", "c", "d", "bad", "e"], []
    with FaultyServer(then=step) as server, batch(server, NEVER, 6, on_error=lambda *_: None) as (collecter, tracker):
        track(tracker, *every)
        tracker.flush(None)
        assert server.names == ["a", "b", "c", "d", "e"] and failed == [every] + [["d"]] * 3


def test_what_failed_in_an_outage_is_not_given_up_for_it_when_others_get_through_again(skipping):
    def step(server, request):
        name = decode(request.body)[0]["xwhat"]
        if len(server.requests) == 1:
            return answer(413)
        if "b" in server.names:
            late.append(name)
        is_down = len(server.requests) < 30 or name == "a" and len(late) < 3
        return answer(500) if is_down else accept(server, request)
    late = []
    with FaultyServer(then=step) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 2, request_timeout=NEVER)) as collecter:
            give(collecter, "a", "b")
            collecter.flush(None)
            assert server.names == ["b", "a"]


def test_back_offs_are_between_a_tenth_and_30_seconds_and_grow(skipping):
    outage = analysys._Outage()
    pauses = []
    for _ in range(300):
        outage.failed("500")
        pauses.append(outage.not_before - skipping.now())
    assert all(0.09 < pause <= 30 for pause in pauses) and max(pauses[:3]) <= 0.4
    assert max(pauses[20:]) > 20 and min(pauses[20:]) < 10
    others = [analysys._Outage() for _ in range(9)]        # those whose server comes back do not call it at one moment
    for other in others:
        other.failed("500")
    assert len({other._random.random() for other in others}) == 9


def test_the_halves_of_a_batch_on_which_the_server_chokes_wait_no_longer_than_the_batch_did(skipping, monkeypatch):
    pauses, kept = [], analysys._Outage.failed

    def failed(outage, *arguments):
        kept(outage, *arguments)
        pauses.append(outage.not_before - skipping.now())
    monkeypatch.setattr(analysys._Outage, "failed", failed)
    with FaultyServer(then=choking_on(["e0"])) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 100, request_timeout=NEVER)) as collecter:
            give(collecter, *numbered("e", 100))
            collecter.flush(None)
    assert len(pauses) > 20 and max(pauses) <= 0.8


def test_an_outage_is_warned_of_at_once_and_then_once_a_minute(skipping):
    outage, ledger = analysys._Outage(), analysys._Ledger()
    ledger.add({"accepted": 3, "pending": 3})
    with logged() as log:
        for _ in range(150):
            outage.failed("HTTP 500")
            outage.warn(ledger)
            assert log                                 # of the first failure
            skipping.advance(1)
    assert len(log) == 3 and log[0].getMessage().startswith("analysys: 3 records wait, the server has been failing")
    assert log[0].getMessage().endswith(", trying again")


def test_a_redirect_is_not_followed_and_no_event_reaches_the_other_host():
    def check(status):
        with FaultyServer() as other, FaultyServer(answer(status, b"", "Location: " + other.url + "/up")) as server:
            with batch(server) as (collecter, tracker):
                track(tracker, "a", "b")
                tracker.flush(10)
                balanced(collecter, accepted=2, delivered=2, retries=1)
            assert (server.names, other.connections) == (["a", "b"], 0)
    all_at_once(check, [301, 302, 303, 307, 308])


def test_a_huge_answer_costs_less_than_a_megabyte():
    bomb, spaces = encode(b" " * (40 << 20)), b" " * 65536
    assert len(bomb) < 65536                           # so that all of it is read
    floods = [flood(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n", spaces), answer(200, bomb),
              flood(b"HTTP/1.1 200 OK\r\n", b"X: " + spaces[:60000] + b"\r\n"),
              flood(b"HTTP/1.1 200 OK\r\n\r\n", b"{" * 65536), flood(b"HTTP/1.1 200 OK\r\nX: ", spaces),
              flood(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n%s\r\n" % spaces),
              answer(200, encode(b"9" * (40 << 20)))]
    with FaultyServer(accept, *[step for each in floods for step in (each, accept)]) as server:
        run("""
            import tracemalloc
            collecter = BatchCollecter(url, queue_cache_max_size=1)
            tracker = tracker_to(collecter)
            for number in range(8):
                tracker.track("user", "e%d" % number)
                tracker.flush()
                tracemalloc.start()                    # the first event was there to import what is needed
            assert tracemalloc.get_traced_memory()[1] < 1 << 20, tracemalloc.get_traced_memory()
            balanced(collecter, delivered=8, retries=7)
        """, server.url)
        assert server.names == numbered("e", 8)


def test_the_ledger_balances_at_every_moment_under_threads_and_faults():
    chance, reported, bad = random.Random(4), [], ("e77", "e177")
    sound = when(lambda request: len(decode(request.body)) > 30, answer(413), refuse(*bad))
    faults = [answer(500), answer(200, HTML), answer(200, encode(code(500))), cut(Reset), cut(HangUp, HALF)]

    def moody(server, request):
        step = chance.choice(faults) if chance.random() < 0.05 else sound
        return step(server, request) if callable(step) else step

    def report(error, records):
        reported.extend(records)

    def work():
        for name in numbered("e", 300):
            while True:
                try:
                    collecter.uploadData(record(threading.current_thread().name, name))
                    break
                except NetworkError:                   # the queue is full and the server fails
                    threading.Event().wait(0.005)
    with FaultyServer(then=moody) as server, batch(
            server, 5, 50, queue_max_size=300, on_error=report) as (collecter, _):
        with sampled(collecter) as samples:
            with threads(*[work] * 4) as started:
                pass
            collecter.flush(20)
        balanced(collecter, accepted=1200, delivered=1192, rejected=8)
    for thread in started:
        own = [entry["xwhat"] for entry in server.accepted if entry["xwho"] == thread.name]
        assert own == [name for name in numbered("e", 300) if name not in bad]
    assert len(reported) == 8 and len(samples) > 10 and max(stats["pending"] for stats in samples) <= 300


# ---------------------------------------------------------------------------
# Collecters
# ---------------------------------------------------------------------------

@side_by_side(COLLECTERS)
def test_of_16_threads_with_200_events_each_every_event_arrives_once_and_in_order(kind, folder):
    with Server() as server:
        run("""
            collecter = %s
            tracker, errors = tracker_to(collecter, on_error=lambda *error: errors.append(error)), []
            def work(name):
                for number in range(200):
                    tracker.track(name, "Event", {"n": number})
            threads = [threading.Thread(target=work, args=("t%%d" %% number,)) for number in range(16)]
            sys.setswitchinterval(0.0005)              # ten times as often: fewer events meet in as many ways
            if getattr(sys, "_is_gil_enabled", lambda: True)() and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])    # two cores fight for the GIL: twice the time
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            tracker.flush(60)
            assert not errors, errors
            balanced(collecter, accepted=3200, delivered=3200, retries=0)
        """ % kind.replace("url", "url, request_timeout=60"), server.url, folder)
        arrived = server.records + lines(folder)
    assert server.connections <= 16
    by_thread = {"t%d" % number: [] for number in range(16)}
    for one in arrived:
        by_thread[one["xwho"]].append(one["xcontext"]["n"])
    assert set(map(tuple, by_thread.values())) == {tuple(range(200))}


@each_collecter
def test_close_delivers_may_be_repeated_and_ends_tracking(tmp_path, kind):
    with Server() as server:
        with tracker_to(make(kind, server.url, tmp_path / "made" / "for it")) as sdk:
            sdk.track("u", "Event", {"name": "跑步机"})
        assert server.records + lines(tmp_path / "made" / "for it") == [record("u", "Event", {"name": "跑步机"})]
        sdk.close()
        with pytest.raises(analysys.AnalysysPythonSdkException) as error:
            sdk.track("u", "Event")
        assert error.type is analysys.AnalysysPythonSdkException and balanced(sdk.sink)["delivered"] == 1


def test_a_collecter_whose_close_failed_is_closed_and_so_are_its_copies():
    collecter = BatchCollecter(URL)
    collecter.uploadData(record("u", "Event"))
    with pytest.raises(NetworkError):
        collecter.close(0)
    for one in collecter, pickle.loads(pickle.dumps(collecter)):
        with pytest.raises(analysys.AnalysysPythonSdkException, match="closed"):
            one.uploadData(record("u", "Event"))


def test_a_collecter_whose_call_failed_is_no_work_for_the_garbage_collector():
    gc.disable()
    try:
        collecter = DefaultCollecter(URL)
        with pytest.raises(NetworkError):
            collecter.uploadData(record("u", "Event"))
        dropped = weakref.ref(collecter)
        del collecter
        assert dropped() is None
    finally:
        gc.enable()


def test_a_collecter_that_is_dropped_is_forgotten(tmp_path):
    kept = len(analysys._ALL_STATES)
    for kind in COLLECTERS:
        make(kind, URL, tmp_path)
    wait_until(lambda: len(analysys._ALL_STATES) <= kept)


def test_a_collecter_to_which_only_its_own_on_error_leads_is_dropped_and_on_error_told_to_the_last():
    class Application:
        def __init__(self, url):
            self.collecter = BatchCollecter(url, on_error=self.on_error)

        def on_error(self, error, records):
            told.extend(record["xwhat"] for record in records)
    told = []
    with FaultyServer(then=refuse("bad")) as server:
        application = Application(server.url)
        track(tracker_to(application.collecter), "good", "bad")        # which wait
        thread, gone = application.collecter._state()._thread, weakref.ref(application)
        del application
        gc.collect()
        thread.join(20)
        assert (thread.is_alive(), server.names, told) == (False, ["good"], ["bad"])
        gc.collect()
        assert gone() is None


def test_default_has_delivered_when_the_call_returns():
    with analysys.Receiver() as server:
        sdk = tracker_to(DefaultCollecter(server.url))
        sdk.track("u", "Event")
        assert server.records == [record("u", "Event")]
        assert balanced(sdk.sink)["delivered"] == 1


@table("settings, count", [((NEVER, 10), 10), ((NEVER, NEVER, 100, 5), 5), ((0.3, NEVER), 3)])
def test_batch_sends_when_enough_wait_or_the_queue_is_full_or_time_is_over_and_no_sooner(settings, count):
    with Server() as server:
        sdk = tracker_to(BatchCollecter(server.url, *settings))
        start = time.monotonic()
        events(sdk, count)
        wait_until(lambda: server.requests, min(10, 5 * settings[0]))
        assert settings[0] == NEVER or time.monotonic() - start >= settings[0]
        sdk.close()
        assert [numbers(batch) for batch in server.batches] == [list(range(count))]


def test_batch_sends_an_alias_at_once_with_what_waits_before_it(monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", NEVER)    # the sender looks when it is woken, not by itself
    with Server() as server:
        sdk = tracker_to(BatchCollecter(server.url, NEVER, NEVER))
        sdk.track("u", "Event")
        wait_until(lambda: sdk._collecter._state()._changed._sleepers)
        sdk.alias("u", "d")
        wait_until(lambda: server.requests)
        assert server.batches == [[record("u", "Event"), record("u", "$alias", {"$original_id": "d"}, is_login=True)]]
        sdk._collecter.flush()
        wait_until(lambda: sdk._collecter._state()._changed._sleepers)
        sdk._collecter.uploadData(record("u", "$alias", {"$original_id": "e"}))      # by hand, too
        wait_until(lambda: len(server.requests) == 2)


def test_a_batch_request_carries_at_most_collecter_max_size_records_in_order():
    with Server() as server:
        sdk = tracker_to(BatchCollecter(server.url, NEVER, NEVER, 10))
        events(sdk, 25)
        sdk.flush()
        assert [numbers(batch) for batch in server.batches] == [
            list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_a_full_queue_makes_the_caller_wait_for_room_and_is_never_exceeded():
    gate = Gate()
    with Server(gate) as server:
        sdk = tracker_to(BatchCollecter(server.url, NEVER, 10, 100, 10))
        caller = threading.Thread(target=events, args=(sdk, 50))
        caller.start()
        wait_until(lambda: server.requests and balanced(sdk.sink)["pending"] == 10)
        assert balanced(sdk.sink)["accepted"] == 10       # the ten in flight count too
        gate.set()
        caller.join()
        sdk.flush()
        assert numbers(server.records) == list(range(50))
        assert max(map(len, server.batches)) <= 10


def test_flush_returns_only_when_the_records_are_delivered():
    gate = Gate()
    with Server(gate) as server:
        sdk = tracker_to(BatchCollecter(server.url, NEVER, NEVER))
        events(sdk, 3)
        caller = threading.Thread(target=sdk.flush)
        caller.start()
        wait_until(lambda: server.requests)
        caller.join(0.1)
        assert caller.is_alive() and balanced(sdk.sink)["delivered"] == 0
        with pytest.raises(NetworkError, match="3.*no answer has come yet") as caught:
            sdk.flush(timeout=0.1)
        assert caught.value.records == [] and balanced(sdk.sink)["pending"] == 3
        gate.set()
        caller.join(10)
        assert not caller.is_alive() and balanced(sdk.sink)["delivered"] == 3
        gate.clear()
        events(sdk, 1)
        with pytest.raises(NetworkError, match="1.*the server answers"):
            sdk.flush(timeout=0.1)
        gate.set()


@table("rule, name", [("hour", "%Y%m%d%H"), ("day", "%Y%m%d")])
def test_a_log_file_is_named_after_the_local_time_of_the_writing(tmp_path, rule, name):
    sdk, clock, expected = tracker_to(LogCollecter(str(tmp_path), True, 2, rule)), [], []
    sdk.sink._state().clock = lambda: clock[-1]
    for written in 1532514947.857, 1532514947.857 + 90000:
        clock.append(written - 90000)                  # when the first of the two is tracked
        events(sdk, 1)
        clock.append(written)                          # when both are written
        events(sdk, 1)
        expected.append("datas_%s.log" % time.strftime(name, time.localtime(written)))
    assert sorted(os.listdir(str(tmp_path))) == expected
    assert numbers(lines(tmp_path)) == [0] * 4


@table("batched, written", [((), [1, 2, 3, 4]), ((True, 3), [0, 0, 3, 3])])
def test_a_log_record_is_written_at_once_or_with_its_batch_and_flush_writes_the_rest(tmp_path, batched, written):
    sdk = tracker_to(LogCollecter(str(tmp_path), *batched))
    for number in range(4):
        events(sdk, 1, number)
        assert lines(tmp_path) == [record("u", "Event", {"n": n}) for n in range(written[number])]
        assert balanced(sdk.sink)["delivered"] == written[number]
    sdk.flush()
    assert numbers(lines(tmp_path)) == [0, 1, 2, 3]


def test_two_log_collecters_share_a_folder(tmp_path):
    first, second = tracker_to(LogCollecter(str(tmp_path))), tracker_to(LogCollecter(str(tmp_path)))
    for number in range(10):
        events([first, second][number % 2], 1, number)
    assert numbers(lines(tmp_path)) == list(range(10))


def test_an_interrupted_default_call_leaves_nothing_pending(monkeypatch):
    with FaultyServer() as server, contextlib.closing(DefaultCollecter(server.url)) as collecter:
        monkeypatch.setattr(analysys._Transport, "ask", interrupt)
        with pytest.raises(Interrupt):
            collecter.uploadData(record("u", "Event"))
        balanced(collecter, accepted=1, rejected=1, pending=0)
        monkeypatch.undo()
        collecter.uploadData(record("u", "Event"))
        balanced(collecter, accepted=2, rejected=1, delivered=1, pending=0)


def test_a_call_that_close_overtakes_raises_and_its_record_is_not_counted(monkeypatch):
    with FaultyServer() as server:
        collecter, put = BatchCollecter(server.url, NEVER, NEVER), analysys._MemoryQueue.put
        collecter.uploadData(record("u", "before"))

        def slow(queue, line):
            taken = put(queue, line)
            worker._phase = analysys._CLOSING          # as close() in another thread does first of all
            return taken
        worker = collecter._state()
        monkeypatch.setattr(analysys._MemoryQueue, "put", slow)
        with pytest.raises(analysys.AnalysysPythonSdkException, match="closed"):
            collecter.uploadData(record("u", "late"))
        balanced(collecter, accepted=1, pending=1)
        collecter.close()
        assert server.names == ["before"]
        balanced(collecter, accepted=1, delivered=1, pending=0)


# ---------------------------------------------------------------------------
# Collecters under fault
# ---------------------------------------------------------------------------

def test_a_full_queue_with_a_slow_healthy_server_holds_the_caller_back_and_loses_nothing():
    gate = Gate()
    with FaultyServer(then=gate) as server, batch(server, queue_max_size=5) as (collecter, tracker):
        with sampled(collecter) as samples, threads(lambda: track(tracker, *numbered("e", 9))) as (caller,):
            wait_until(lambda: len(server.requests) == 1 and collecter.stats()["pending"] == 5)
            caller.join(0.1)
            assert caller.is_alive()
            balanced(collecter, accepted=5)
            gate.set()
        tracker.flush(10)
        assert server.names == numbered("e", 9)
        assert max(stats["pending"] for stats in samples) == 5


def test_a_full_queue_with_a_failing_server_raises_at_once_and_says_how_many_wait_and_since_when():
    errors = []
    with FaultyServer(then=answer(500, HTML)) as server, logged() as log:
        with batch(server, request_timeout=30, queue_max_size=5) as (collecter, tracker):
            track(tracker, *numbered("e", 5))
            wait_until(lambda: log)                    # the warning: it is known that the server fails
            with within(10), pytest.raises(NetworkError, match=r"\b5\b.*\b(since|for|ago)\b") as error:
                collecter.uploadData(record("user", "refused"))
            assert error.value.records == [record("user", "refused")]
            tracker_to(collecter, on_error=lambda *args: errors.append(args)).track("user", "refused_too")
            (caught, given), = errors
            assert isinstance(caught, NetworkError) and given["xwhat"] == "refused_too"
            balanced(collecter, pending=5)
            server.then = accept
            tracker.flush(10)
            assert server.names == numbered("e", 5)


def test_a_full_queue_with_a_silent_server_holds_the_caller_no_longer_than_request_timeout():
    with FaultyServer(silent) as server, batch(server, request_timeout=0.4, queue_max_size=3) as (collecter, tracker):
        track(tracker, *numbered("e", 3))
        with within(8), pytest.raises(NetworkError) as error:
            collecter.uploadData(record("user", "refused"))
        assert error.value.records == [record("user", "refused")]
        tracker.flush(10)
        assert server.names == numbered("e", 3)
        balanced(collecter, delivered=3)


def test_flush_and_close_end_in_time_whatever_the_server_does():
    def check(step):
        with FaultyServer(accept, accept, then=step) as server:
            with batch(server, collecter_max_size=2) as (collecter, tracker):
                for name in "a", "b":
                    track(tracker, name)
                    tracker.flush(10)
                if step is None:
                    server.__exit__()
                names = numbered("e", 9)
                track(tracker, *names)
                with within(8), pytest.raises(NetworkError, match=r"\b9\b") as error:
                    tracker.flush(0.3)
                assert error.value.records == []
                balanced(collecter, delivered=2, pending=9)
                with within(8), pytest.raises(NetworkError) as error:
                    tracker.close(0.3)
                assert [entry["xwhat"] for entry in error.value.records] == names
                tracker.close()
                with pytest.raises(analysys.AnalysysPythonSdkException):
                    track(tracker, "late")
                balanced(collecter, accepted=11, delivered=2, rejected=9, pending=0)
                assert server.names == ["a", "b"]
    all_at_once(check, STUCK + [answer(500), answer(503, b"", "Retry-After: 60"), None])        # None: it is gone


@table("reply", [answer(), answer(500)])
def test_what_close_gave_back_is_neither_counted_again_nor_said_to_be_tried_again_when_its_request_ends(reply):
    gate = Gate()
    with FaultyServer(then=lambda *_: gate() and reply) as server, logged() as log:
        with batch(server) as (collecter, tracker):
            track(tracker, "a", "b")
            wait_until(lambda: server.requests)
            with pytest.raises(NetworkError) as error:
                collecter.close(0.1)
            assert [entry["xwhat"] for entry in error.value.records] == ["a", "b"]
            gate.set()
            wait_until(lambda: collecter._state()._thread is None)
            balanced(collecter, accepted=2, delivered=0, rejected=2, pending=0)
            assert not log


def test_close_ends_a_flush_and_a_call_that_wait_in_other_threads():
    ends = []

    def expect(call, *args):
        try:
            call(*args)
        except analysys.AnalysysPythonSdkException as error:
            ends.append(error)
    with FaultyServer(then=silent) as server:
        with batch(server, request_timeout=30, queue_max_size=2) as (collecter, tracker):
            track(tracker, "a", "b")
            wait_until(lambda: server.requests)
            with threads(lambda: expect(collecter.flush, None), lambda: expect(track, tracker, "c")) as started:
                started[0].join(0.1)
                with pytest.raises(NetworkError):
                    collecter.close(0.3)
            assert len(ends) == 2                      # neither was done
            balanced(collecter, accepted=2, rejected=2)


def test_an_on_error_may_close_its_collecter():
    def on_error(error, records):
        collecter.close()
        closed.append(records)
    closed = []
    with FaultyServer(then=answer(200, code(400))) as server, logged() as entries:
        collecter = BatchCollecter(server.url, NEVER, 1, on_error=on_error)
        collecter.uploadData(event("a"))
        wait_until(lambda: closed)
        assert closed == [[event("a")]] and not entries


def without_a_thread(server, *xwhats):
    """Return the state of a batch collecter whose records nobody sends."""
    collecter = BatchCollecter(server.url, NEVER, NEVER, 1, request_timeout=5)
    state = collecter._states.pop(os.getpid())         # so it is not abandoned when the collecter is dropped
    state._thread = threading.current_thread()
    for xwhat in xwhats:
        state.put(analysys._line(event(xwhat)), False)
    return state


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_what_is_urgent_inside_any_step_of_the_sender_is_sent_with_it_or_with_the_next_one(is_interrupted):
    def disturb():
        state.put(analysys._line(event("b")), True)
        if is_interrupted and "attempt" in [frame.name for frame in traceback.extract_stack()]:
            interrupt()
    with FaultyServer() as server:
        for step in itertools.chain(range(1, 80), range(80, 1000, 7)):
            state = without_a_thread(server, "a")
            state._hurried = True
            came = disturbed(state._step, step, disturb)
            assert state._turn.is_free()
            while not is_interrupted and state._step():
                pass
            assert is_interrupted or state.stats()["delivered"] == 1 + came
            left = state._queue.close()
            balanced(state.stats(), rejected=len(left), pending=0)
            if not came:
                break
        assert step > 100


def test_a_collecter_that_is_dropped_after_its_close_was_interrupted_delivers_and_its_thread_ends(monkeypatch):
    with FaultyServer() as server:
        collecter = BatchCollecter(server.url, NEVER, NEVER)
        collecter.uploadData(event("e"))
        state = collecter._state()
        with monkeypatch.context() as patched, pytest.raises(Interrupt):
            patched.setattr(state, "hurry", interrupt)             # which flush() does while it waits
            collecter.close()
        del collecter
        wait_until(lambda: state._thread is None and server.names == ["e"])
        assert state not in analysys._OPEN


def test_a_closed_collecter_sends_nothing_more_and_stays_closed_when_it_is_dropped():
    with FaultyServer() as server:
        state = without_a_thread(server, "a")
        state._thread = None
        state._queue.put(analysys._line(event("b")))
        state._phase = analysys._ENDED                 # as another thread's close() does before it empties the queue
        assert not state._step() and not server.requests
        state.abandon()                                # after an exit hook has closed it
        assert state.closed


def test_what_is_refused_is_told_once_also_where_on_error_is_interrupted():
    with FaultyServer(then=answer(200, code(400))) as server:
        state = without_a_thread(server, "a")
        state.on_error, state._hurried = interrupt, True
        with pytest.raises(Interrupt):
            state._step()
        assert not state._queue.ledger.refusals and state._turn.is_free()


def test_a_flush_does_not_wait_for_a_record_whose_call_close_overtook():
    line = analysys._line(event("late"))
    with FaultyServer() as server:
        for step in each_step(5):
            state = without_a_thread(server)
            state._thread = None
            state._queue.put(line)
            disturbed(lambda: state.flush(20), step, lambda: state._queue.take_back(line))
            assert state.stats()["pending"] == 0
            state.close(20)


def test_the_turn_is_one_threads_and_it_alone_gives_it_back():
    turn, found = analysys._Turn(), []
    assert turn.is_free() and turn.take() and turn.take() and turn.is_mine()
    with threads(lambda: found.extend([turn.take(), turn.is_mine(), turn.give(), turn.is_free()])):
        pass
    assert found == [False, False, None, False]
    turn.give()
    assert turn.is_free()


def test_an_on_error_that_raises_is_logged_and_the_worker_lives_on():
    def broken(error, records):
        raise RuntimeError("broken on_error")
    with FaultyServer(then=refuse("bad")) as server, batch(server, on_error=broken) as (collecter, tracker):
        for number in range(3):
            with logged() as log:
                track(tracker, "bad", "e%d" % number)
                tracker.flush(10)
                wait_until(lambda: log)
        with logged() as log:
            tracker_to(collecter, on_error=broken).track("user", None)
            assert log
        assert server.names == numbered("e", 3)
        balanced(collecter, delivered=3, rejected=3)


@pytest.mark.parametrize("thrower", ["on_error", "handler"])
@pytest.mark.parametrize("error", [KeyError, SystemExit, KeyboardInterrupt, GeneratorExit, Interrupt])
def test_what_an_on_error_or_a_logging_handler_raises_never_ends_the_sending_thread(thrower, error):
    def throw(*_):
        raise error
    with FaultyServer(then=refuse("bad")) as server, logged():
        on_error = throw if thrower == "on_error" else None
        logging.getLogger("analysys").handlers[-1].emit = throw
        options = {"queue_cache_max_size": 2, "collecter_max_size": 1, "max_interval_time": 0.1}
        with batch(server, on_error=on_error, **options) as (collecter, tracker):
            track(tracker, "bad", "good")              # so "good" waits for the thread that told of "bad"
            wait_until(lambda: server.names == ["good"])
            wait_until(lambda: collecter.stats()["pending"] == 0)
            balanced(collecter, delivered=1, rejected=1)


def test_on_error_is_called_under_no_lock_and_may_track_without_waiting_for_room():
    stuck, full = [], threading.Event()

    def look():
        collecter.stats()
        with contextlib.suppress(NetworkError):
            collecter.flush(0.01)

    def report(error, records):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(20)
        stuck.append(thread.is_alive())
        full.wait(10)
        for name in "x", "y", "z":
            with contextlib.suppress(NetworkError):
                track(tracker, name)
    with FaultyServer(then=refuse("bad")) as server:
        with batch(server, 60, queue_max_size=4, collecter_max_size=1, on_error=report) as (collecter, tracker):
            track(tracker, "bad")
            wait_until(lambda: stuck)
            with threads(lambda: track(tracker, *numbered("e", 4))) as (filler,):
                filler.join(0.1)
                full.set()
            tracker.flush(10)
            assert stuck == [False]
            assert [name for name in server.names if name not in "xyz"] == numbered("e", 4)
            balanced(collecter, rejected=1, pending=0)


@pytest.mark.parametrize("debug", [0, 2])
def test_a_logging_handler_that_tracks_causes_neither_deadlock_nor_recursion(debug):
    with FaultyServer(answer(500), then=refuse("bad")) as server:
        run("""
            class Handler(logging.Handler):
                deepest = depth = 0
                def emit(self, entry):
                    self.depth += 1
                    self.deepest = max(self.depth, self.deepest)
                    try:
                        tracker.track("user", "logged")
                    except AnalysysPythonSdkException:
                        pass                           # closed meanwhile
                    finally:
                        self.depth -= 1
            handler = Handler()
            logging.getLogger().addHandler(handler)
            logging.getLogger().setLevel(logging.DEBUG)
            collecter = BatchCollecter(url, queue_cache_max_size=1)
            tracker = tracker_to(collecter)
            tracker.setDebugMode(%d)
            for name in "a", "bad", "b":
                tracker.track("user", name)
            tracker.flush()
            assert handler.deepest < 5, handler.deepest
            tracker.close()
            balanced(collecter, pending=0)
        """ % debug, server.url)
        assert [name for name in server.names if name != "logged"] == ["a", "b"] and "logged" in server.names


KINDS = ["DefaultCollecter(url)", "BatchCollecter(url, queue_cache_max_size=3)", "LogCollecter(folder)",
         "LogCollecter(folder, is_batch=True, batch_num=3)",
         "BatchCollecter(url, queue_cache_max_size=3, spool_path=folder)"]


def test_a_finalizer_that_tracks_while_the_collecter_works_does_no_harm(tmp_path):
    def check(kind):
        folder = tmp_path / str(KINDS.index(kind))
        with FaultyServer() as server:
            run("""
                collecter = %s
                tracker, made = tracker_to(collecter), []
                class Cycle:
                    def __init__(self):
                        self.me = self
                    def __del__(self):
                        tracker.track("user", "finalized")
                        made.append(1)
                def work():
                    for _ in range(5):
                        Cycle()
                        tracker.track("user", "tracked")
                        made.append(1)
                    tracker.flush()
                gc.set_threshold(1)
                for _ in range(5):                         # new threads: what is thread-local is made anew, too
                    workers = [threading.Thread(target=work) for _ in range(3)]
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()
                gc.set_threshold(700)
                gc.collect()
                tracker.flush()
                assert len(made) == 150, len(made)
                balanced(collecter, accepted=150, delivered=150)
            """ % kind, server.url, folder)
            assert collections.Counter(server.names + lines_in(folder)) == {"tracked": 75, "finalized": 75}
    all_at_once(check, KINDS)


def test_a_call_from_within_any_line_of_the_module_does_no_harm(tmp_path):
    def check(kind):
        folder = tmp_path / str(KINDS.index(kind))
        with FaultyServer() as server:
            ended = run("""
                seen = set()                               # each line, at its first run and at its second one
                def interrupted():                         # four times, in the first lines that are new
                    collecter, calls, closing = %s, ["outer"], False
                    tracker, lines, before = tracker_to(collecter), set(), len(seen)
                    def trace(frame, event, arg):
                        if frame.f_code.co_filename != analysys.__file__:
                            return None
                        if event == "line" and len(seen) < before + 4:
                            place = frame.f_code, frame.f_lineno
                            place += (place in lines,)
                            lines.add(place[:2])
                            if place not in seen:
                                seen.add(place)
                                try:
                                    tracker.track("user", "inner")
                                    calls.append("inner")
                                except AnalysysPythonSdkException:
                                    assert closing         # which ends it
                        return trace
                    def work():
                        tracker.track("user", "outer")
                        tracker.flush()
                    threading.settrace(trace)              # of this thread and the collecter's
                    thread = threading.Thread(target=work)
                    thread.start()
                    thread.join(10)
                    threading.settrace(None)
                    assert not thread.is_alive(), "hangs"
                    closing = True
                    tracker.close()
                    wait_until(lambda: threading.active_count() == 1)
                    balanced(collecter, accepted=len(calls), delivered=len(calls))
                    print(*calls)
                    return len(seen) > before
                while interrupted():
                    pass
            """ % kind, server.url, folder)
            calls = ended.out.split()
            assert len(calls) > 100 and sorted(calls) == sorted(server.names + lines_in(folder))
    all_at_once(check, KINDS)


def misbehaving(base, value, methods):
    """Return *value* as an instance of a subclass of *base* whose *methods*, given in one str, raise."""
    def fail(*args, **kwargs):
        raise RuntimeError("misbehaves")
    return type("Bad" + base.__name__, (base,), dict.fromkeys(methods.split(), fail))(value)


class Liar:
    __class__ = property(lambda self: str)             # as Mock(spec=str) does

    def __repr__(self):
        raise RuntimeError("misbehaves")


class Nowhere(datetime.tzinfo):
    def utcoffset(self, when):
        raise RuntimeError("misbehaves")


class Classless(dict):
    @property
    def __class__(self):
        raise RuntimeError("misbehaves")


def malformed():
    """Return values that somebody once passed where something else was meant."""
    endless, circular = [], {}
    endless.append(endless)
    circular["self"] = circular
    text = "__str__ __repr__ __format__ __len__ __iter__ __getitem__ __contains__ encode lower startswith strip isascii"
    number = ("__repr__ __str__ __format__ __int__ __index__ __float__ __bool__ __lt__ __le__ __gt__ __ge__ __abs__"
              " __neg__ __trunc__ is_integer")
    container = "__repr__ __iter__ __len__ __getitem__ __contains__ __bool__ items keys get copy"
    equal = "__eq__ __ne__ __hash__"
    when, decimals = datetime.datetime, [decimal.Decimal(value) for value in (
        "NaN", "sNaN", "-Infinity", "0.1", "1e400", "1e999999999", "1e-999999999")]
    return decimals + [
        None, True, 0, -1, 1.5, 10 ** 12, 2 ** 63, -2 ** 63 - 1, 2 ** 64, 10 ** 5000, float("nan"), float("inf"),
        1e308, 1j, fractions.Fraction(1, 3), fractions.Fraction(10 ** 400, 3), "", " ", "a b", "$", "$lib", "xwho",
        "1st", "\u540d", "line\n", "\0", "\ud800", "\udcff", "x" * 99, "x" * 100, "x" * 254, "x" * 255, "x" * 256,
        "x" * (10 << 20), b"bytes", bytearray(b"bytes"), memoryview(b"m"), [], [[]], ["a", None], ["\ud800"],
        ["x" * 256], ["a"] * 101, ("a", ("b",)), endless, NESTED, {}, circular, {1: 2}, {None: 1}, {b"k": 1}, {(): 1},
        {"a": {}}, {"a": None}, {"a": 1, "A": 2}, {"\ud800": 1}, {"": 1}, {"$lib": 1}, {"a": float("nan")},
        {"a": endless}, {"p%d" % index: 1 for index in range(101)}, {"x" * (1 << 20): 1}, {"a"}, frozenset("ab"),
        iter("ab"), range(3), object(), object, len, ..., NotImplementedError, when.min, when.max,
        when(2020, 1, 1, tzinfo=Nowhere()), datetime.date.min, datetime.time(), datetime.timedelta(1),
        Liar(), Classless(a=1), misbehaving(str, "value", text), misbehaving(str, "value", equal),
        misbehaving(int, 5, number), misbehaving(int, 5, equal), misbehaving(float, 1.5, number),
        misbehaving(float, 1.5, equal), misbehaving(dict, {"a": 1}, container), misbehaving(dict, {"a": 1}, equal),
        misbehaving(list, ["a"], container), misbehaving(tuple, ("a",), container), misbehaving(set, {"a"}, container),
        misbehaving(decimal.Decimal, "1.5", number), misbehaving(fractions.Fraction, "1/3", number),
    ]


POSITIONS = [
    lambda t, x: t.track(x, "e"), lambda t, x: t.track("u", x), lambda t, x: t.track("u", "e", x),
    lambda t, x: t.track("u", "e", {x: 1}), lambda t, x: t.track("u", "e", {"p": x}),
    lambda t, x: t.track("u", "e", {"p": [x]}), lambda t, x: t.track("u", "e", None, x),
    lambda t, x: t.track("u", "e", is_login=x), lambda t, x: t.track("u", "e", xwhen=x), lambda t, x: t.alias(x, "u"),
    lambda t, x: t.alias("u", x), lambda t, x: t.alias("u", "v", alias_properties=x),
    lambda t, x: t.profile_set("u", x), lambda t, x: t.profile_set_once("u", {"p": x}),
    lambda t, x: t.profile_increment("u", x), lambda t, x: t.profile_increment("u", {"p": x}),
    lambda t, x: t.profile_append("u", {"p": x}), lambda t, x: t.profile_append("u", {"p": [x]}),
    lambda t, x: t.profile_unset("u", x), lambda t, x: t.profile_unset("u", [x]), lambda t, x: t.profile_delete(x),
    lambda t, x: t.registerSuperProperties(x), lambda t, x: t.registerSuperProperties({x: 1}),
    lambda t, x: t.registerSuperProperties({"s": x}), lambda t, x: t.unregisterSuperProperty(x),
    lambda t, x: t.getSingleSuperProperties(x),
]


def test_malformed_calls_raise_illegal_data_or_arrive_and_the_good_ones_around_them_all_arrive():
    good, refused, escaped, values = [], 0, [], malformed()
    with analysys.Receiver() as server, batch(server, 5, 100, queue_max_size=10000) as (collecter, tracker):
        for call in POSITIONS:
            for value in values:
                try:
                    call(tracker, value)
                except IllegalData as error:
                    assert len(str(error)) < 1000
                    refused += 1
                except Exception as error:             # fine only where the value could not even be passed
                    if SOURCE in [frame.filename for frame in traceback.extract_tb(error.__traceback__)]:
                        escaped.append((POSITIONS.index(call), type(value), error))
                good.append("good_%d" % len(good))
                tracker.track("good", good[-1])
                tracker.clearSuperProperties()
        tracker.flush(60)
        received = list(server.records)
        balanced(collecter, accepted=len(received), delivered=len(received), rejected=0)
    assert not escaped and len(good) >= 300 and refused >= 300
    assert [entry["xwhat"] for entry in received if entry["xwho"] == "good"] == good
    json.dumps(received, allow_nan=False).encode("utf-8")


def test_a_memory_queue_is_bounded_in_bytes_a_record_counts_once_for_each_16_kib_begun():
    def large(size):
        return dict(record("user", "large"), appid="x" * size)
    with FaultyServer(then=silent) as server:
        collecter = BatchCollecter(server.url, NEVER, NEVER, queue_max_size=8, queue_timeout=0)
        for size, fits in (40000, True), (40000, True), (40000, False), (1, True), (1, True), (1, False):
            with contextlib.suppress() if fits else pytest.raises(NetworkError):
                collecter.uploadData(large(size))
        balanced(collecter, accepted=4, pending=4)
        with pytest.raises(NetworkError):
            collecter.close(0)
    with FaultyServer() as server, contextlib.closing(BatchCollecter(server.url, queue_max_size=2)) as collecter:
        for size in 1 << 20, 1, 1 << 20:
            collecter.uploadData(large(size))                    # larger than the queue: it goes in alone
        collecter.flush()
        assert [len(one["appid"]) for one in server.accepted] == [1 << 20, 1, 1 << 20]


def test_a_queue_that_is_full_by_large_records_is_sent_at_once(monkeypatch):
    monkeypatch.setattr(analysys, "_LOOK_EVERY", NEVER)    # the sender looks when it is woken, not by itself
    with FaultyServer() as server, batch(server, 5, 10, queue_max_size=10, max_interval_time=NEVER) as (collecter, _):
        for _ in range(5):
            collecter.uploadData(dict(record("user", "large"), appid="x" * 20000))
            wait_until(lambda: collecter._state()._changed._sleepers or server.names)      # it sleeps
        wait_until(lambda: len(server.names) == 5)


def test_absurd_times_bound_nothing_and_break_nothing():
    with FaultyServer() as server:
        with contextlib.closing(DefaultCollecter(server.url, request_timeout=1e10)) as default:
            default.uploadData(record("user", "a"))
        collecter = BatchCollecter(server.url, 1e10, request_timeout=1e10)
        collecter.uploadData(record("user", "b"))
        collecter.flush(1e300)
        collecter.close(1e300)
        assert server.names == ["a", "b"]


def test_an_on_error_that_takes_its_time_makes_no_flush_fail():
    gate, flushed = threading.Event(), threading.Event()

    def on_error(error, records):
        collecter.flush(60)                            # in the sender's own thread: it waits for nothing
        flushed.set()
        gate.wait(10)
    with FaultyServer(then=answer(200, code(400))) as server:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 1, on_error=on_error)) as collecter:
            collecter.uploadData(record("user", "a"))
            assert flushed.wait(10)
            collecter.flush(0.05)
            gate.set()


def test_what_a_finalizer_tracks_while_the_thread_of_a_dropped_collecter_ends_is_delivered():
    def trace(frame, *_):                              # of the thread, which has seen that nothing is left
        if frame.f_code is analysys._Worker._end.__code__:
            state.put(analysys._line(event("late")), False)
    with FaultyServer() as server:
        collecter = BatchCollecter(server.url, NEVER, NEVER)
        state = collecter._state()
        threading.settrace(trace)
        collecter.uploadData(event("first"))
        threading.settrace(None)
        del collecter
        wait_until(lambda: server.names == ["first", "late"])


def test_wherever_a_signal_handler_raises_in_put_the_queue_keeps_its_room_and_its_counts():
    for step in each_step(5):
        queue, put = analysys._MemoryQueue(2, 2, 1.0), []
        queue.put(b"{}\n")                                 # one that equals it
        disturbed(lambda: put.append(queue.put(b"{}\n")), step, interrupt)
        accepted, settled = queue.mark()
        items = queue.take(2)
        assert settled == 0 and accepted == len(items) == queue.ledger.stats()["pending"] and len(items) > len(put)
        queue.settle(items)
        assert queue.put(b"{}\n") and queue.put(b"{}\n") and not queue.put(b"{}\n")


def test_a_record_that_came_in_before_a_signal_handler_raised_keeps_its_room():
    class Interrupted(collections.deque):
        def append(self, entry):
            super().append(entry)
            interrupt()
    queue = analysys._MemoryQueue(1, 1, 1.0)
    queue._waiting = Interrupted()
    with pytest.raises(Interrupt):
        queue.put(b"{}\n")
    assert not queue.put(b"{}\n") and len(queue.take(9)) == 1


def test_wherever_a_signal_handler_raises_in_take_no_record_is_lost_or_there_twice():
    for step in each_step(5):
        queue, lines = analysys._MemoryQueue(9, 9, 1.0), [b"0\n", b"1\n", b"2\n", b"3\n"]
        for line in lines:
            queue.put(line)
        disturbed(lambda: queue.take(2), step, interrupt)
        queue.take(1)
        assert queue.mark() == (4, 0) and queue.close() == lines
        balanced(queue.ledger.stats(), accepted=4, rejected=4)


@pytest.mark.parametrize("call, other", list(itertools.permutations(["take", "settle", "close", "stats"], 2)))
@pytest.mark.parametrize("is_inside", [False, True])
def test_each_record_counts_once_whatever_comes_inside_any_step_of_a_queue_from_another_thread_or_its_own(
        call, other, is_inside):
    def work(name):
        if name == "take":
            queue.take(2)
        elif name == "settle":
            queue.settle(items)
        elif name == "close":
            left[:] = queue.close()
        else:
            seen.append(queue.ledger.stats())

    def disturb():
        if is_inside:                                  # a __del__ or a signal handler
            work(other)
        else:                                          # it may have to wait for the end of *call*
            thread.start()
            thread.join(0.005)
    lines = [b"0\n", b"1\n", b"2\n", b"3\n"]
    for step in range(1, 60):
        queue, left, seen = analysys._MemoryQueue(9, 9, 1.0), [], []
        thread = threading.Thread(target=work, args=(other,))
        for line in lines:
            queue.put(line)
        items = queue.take(2)[1:]
        if not disturbed(lambda: work(call), step, disturb):
            break
        if not is_inside:
            thread.join(20)
        work("close")
        for stats in seen if not is_inside else ():
            balanced(stats, accepted=4)
        balanced(queue.ledger.stats(), accepted=4, pending=0, rejected=len(left))
        assert left in (lines, lines[:1] + lines[2:]) and queue.mark()[1] == 0 and queue.mark()[0] >= 4


def test_in_a_queue_in_memory_the_oldest_record_decides_when_it_is_due_and_what_is_settled(monkeypatch):
    clock, queue = FakeClock(monkeypatch), analysys._MemoryQueue(9, 9, 15.0)
    for line in b"0\n", b"1\n", b"2\n":
        queue.put(line)
        clock.advance(4)
    assert queue.due_at() < clock.now() + 4
    items = queue.take(9)
    queue.settle(items[1:])
    assert queue.mark() == (3, 0)
    queue.settle(items[:1])
    assert queue.mark() == (3, 3)


def test_a_closed_queue_in_memory_has_given_all_back_once_and_hands_out_nothing():
    queue, late = analysys._MemoryQueue(4, 9, 1.0), b"late\n"
    for line in b"0\n", b"1\n", b"2\n":
        queue.put(line)
    items = queue.take(2)
    assert queue.close() == queue.close() == [b"0\n", b"1\n", b"2\n"]
    queue.settle(items)                                # its request ends
    for _ in range(3):
        assert queue.put(late) and queue.take(9) == [] and queue.take_back(late) and not queue.take_back(late)
    assert queue.mark() == (3, 0)
    balanced(queue.ledger.stats(), accepted=3, rejected=3)


def test_what_another_thread_settles_while_a_queue_is_looked_at_is_no_error():
    class Changed(collections.OrderedDict):
        def __iter__(self):
            found = super().__iter__()
            queue.settle(items[:1])
            return found
    queue = analysys._MemoryQueue(9, 9, 1.0)
    queue.put(b"0\n")
    queue.put(b"1\n")
    items = queue.take(2)
    queue._inflight = Changed(queue._inflight)
    assert queue.mark() == (2, 1)


@table("disturb", [lambda queue: queue.put(b"{}\n"), interrupt])
def test_wherever_a_small_record_or_an_exception_comes_into_the_put_of_a_large_one_no_room_is_lost(disturb):
    for step in each_step(5):
        queue = analysys._MemoryQueue(3, 9, 1.0)
        disturbed(lambda: queue.put(b"x" * 40000), step, functools.partial(disturb, queue))      # all of it, and a third
        queue.settle(queue.take(9))
        assert queue.put(b"x" * 40000)


@pytest.mark.parametrize("begins", ["before", "after", "as it is looked at"])
@pytest.mark.parametrize("kind, name", [(BatchCollecter, "analysys-sender"), (DefaultCollecter, "analysys-sweeper")])
def test_a_start_of_a_thread_that_is_interrupted_leaves_one_such_thread(monkeypatch, kind, name, begins):
    def start(thread, begin=threading.Thread.start):
        if thread.name != name:
            return begin(thread)
        def not_yet():
            del thread.is_alive
            return False
        if begins == "after":
            _thread.start_new_thread(begin, (thread,))
        else:
            begin(thread)
        if begins == "as it is looked at":
            thread.is_alive = not_yet
        raise Interrupt

    def ours():                                        # but those that other tests left
        return {thread for thread in threading.enumerate() if thread.name == name} - others
    others = set()
    others = ours()
    with FaultyServer() as server, tracker_to(kind(server.url)) as tracker:
        monkeypatch.setattr(threading.Thread, "start", start)
        for event in numbered("e", 5):
            with contextlib.suppress(Interrupt):
                track(tracker, event)
        monkeypatch.undo()
        track(tracker, "last")
        tracker.flush()
        assert server.names == numbered("e", 5) + ["last"]
        wait_until(lambda: len(ours()) == 1)
        assert {tracker.sink._state()._thread} == ours()
        balanced(tracker.sink, delivered=6)


@pytest.mark.parametrize("spool, arrives", [("None", ["b", "c"]), ("folder", ["a", "b", "c"])])
def test_a_sending_thread_that_dies_as_it_is_born_is_replaced_and_close_does_not_wait_for_it(tmp_path, spool, arrives):
    with FaultyServer() as server:
        run("""
            def stillborn(frame, what, _):             # as a broken tracer makes it, or a moment without memory
                raise MemoryError

            def with_one(xwhat):
                collecter = BatchCollecter(url, max_interval_time=60, queue_cache_max_size=2, spool_path=%s)
                give(collecter, xwhat)
                wait_until(lambda: not collecter._state()._thread.is_alive())
                return collecter
            threading.settrace(stillborn)
            with open(os.devnull, "w") as sys.stderr:
                try:
                    with_one("a").close(0)
                except AnalysysPythonSdkNetworkException as error:
                    assert len(error.records) == 1
                collecter = with_one("b")
                threading.settrace(None)
                give(collecter, "c")
            sys.stderr = sys.__stderr__
            wait_until(lambda: collecter.stats()["delivered"] == %d)
            collecter.close()
        """ % (spool, len(arrives)), server.url, tmp_path)
        assert server.names == arrives


def test_wherever_a_signal_handler_raises_in_a_call_exit_knows_of_what_was_accepted():
    for step in each_step(10):
        collecter = BatchCollecter(URL, max_interval_time=NEVER)
        state = collecter._state()
        disturbed(lambda: give(collecter, "Event"), step, interrupt)
        assert state in analysys._OPEN or not state.stats()["accepted"]
        with contextlib.suppress(NetworkError):
            collecter.close(0)


def test_a_put_whose_record_is_taken_meanwhile_has_put_it():
    for step in each_step(5):
        queue, put = analysys._MemoryQueue(3, 9, 1.0), []
        disturbed(lambda: put.append(queue.put(b"{}\n")), step, lambda: queue.take(9))
        assert put[0] > 0


def test_a_look_and_a_large_record_inside_any_step_of_a_queue_neither_hang_nor_see_too_much_settled():
    told = []

    def disturb(queue):
        told.append(queue.mark())
        queue.ledger.stats()
        queue.put(b"x" * 40000)

    def work():
        for step in each_step(5):
            queue = analysys._MemoryQueue(9, 9, 1.0)
            queue.put(b"{}\n")
            queue.put(b"{}\n")
            disturbed(lambda: queue.settle(queue.take(2)[:1]), step, lambda: disturb(queue))
    with threads(work):
        pass
    assert len(told) > 20 and all(accepted >= 2 and settled <= 1 for accepted, settled in told)
    for step in each_step(5):                          # and inside a look, the sender
        queue = analysys._MemoryQueue(9, 9, 1.0)
        queue.put(b"{}\n")
        disturbed(lambda: told.append(queue.mark()), step, lambda: queue.take(2))
        assert told[-1][0] >= 1 and told[-1][1] == 0


def test_queue_timeout_bounds_the_wait_for_room_and_0_never_waits(skipping):
    skipping.patience = 0
    with FaultyServer(then=silent) as server:
        for given, request_timeout, seconds in (0, NEVER, 0), (7, NEVER, 7), (None, 7, 7):
            collecter = BatchCollecter(server.url, NEVER, 1, 1, 1, request_timeout, queue_timeout=given)
            collecter.uploadData(record("user", "a"))
            before = skipping.now()
            with pytest.raises(NetworkError, match="queue is full") as error:
                collecter.uploadData(record("user", "b"))
            assert seconds <= skipping.now() - before < seconds + 6 and error.value.records == [record("user", "b")]
            with pytest.raises(NetworkError):
                collecter.close(0)


@table("given, seconds, ways", [(None, 0, "spool_path.*queue_max_size.*queue_timeout"), (7, 7, "queue is full")])
def test_in_a_running_event_loop_a_call_never_waits_unless_told_to_and_names_the_ways_out(skipping, given, seconds, ways):
    import asyncio
    skipping.patience = 0
    with FaultyServer(then=silent) as server:
        collecter = BatchCollecter(server.url, NEVER, 1, 1, 1, request_timeout=60, queue_timeout=given)

        async def main():
            collecter.uploadData(record("user", "a"))
            before = skipping.now()
            with pytest.raises(NetworkError, match=ways):
                collecter.uploadData(record("user", "b"))
            assert seconds <= skipping.now() - before < seconds + 20
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        with pytest.raises(NetworkError):
            collecter.close(0)


def test_what_fails_inside_an_on_error_is_logged_once_and_not_told_again():
    told, here = [], threading.get_ident()

    class Tracking(logging.Handler):
        def emit(self, entry):
            if threading.get_ident() == here:          # and not the thread of another test
                tracker.track("user", "3 logged")

    def on_error(error, record):
        told.append(str(error))
        tracker.track("user", "1 bad")
        tracker.track("user", "2 bad")
        logging.getLogger("analysys").error("of the application")
    with logged() as log:
        tracker = tracker_to(Sink(), on_error=on_error)
        handler = Tracking()
        logging.getLogger("analysys").addHandler(handler)
        try:
            tracker.track("user", "0 bad")
        finally:
            logging.getLogger("analysys").removeHandler(handler)
    assert len(told) == 1 and "0 bad" in told[0]
    assert [sum(name in entry.getMessage() for entry in log) for name in ("1 bad", "2 bad")] == [1, 1]


def test_an_on_error_that_tracks_what_is_refused_again_ends():
    told = []

    def on_error(error, records):
        told.append(records)
        give(collecter, "again", "and again")
    with FaultyServer(then=answer(200, code(400))) as server, logged() as log:
        with contextlib.closing(BatchCollecter(server.url, NEVER, 1, 1, on_error=on_error)) as collecter:
            collecter.uploadData(record("user", "first"))
            wait_until(lambda: collecter.stats()["rejected"] == 3)
            collecter.flush()
            assert [records for records in told] == [[record("user", "first")]]
    assert sum("records are lost" in entry.getMessage() for entry in log) == 2


def test_a_frozen_monotonic_clock_hangs_nothing(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with FaultyServer(answer(500)) as server, contextlib.closing(BatchCollecter(server.url, 0.05)) as collecter:
        collecter.uploadData(record("user", "a"))
        collecter.flush(10)
        assert server.names == ["a"]
        with pytest.raises(NetworkError):
            server.script.append(silent)
            collecter.uploadData(record("user", "b"))
            collecter.close(0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_tracker_works_and_starts_empty_and_a_closed_one_stays_closed(kind, tmp_path):
    with FaultyServer() as server:
        collecter = make(kind, server.url, tmp_path)
        tracker = AnalysysPythonSdk(collecter)
        tracker.setAppId("app")
        tracker.registerSuperProperties({"super": 1})
        track(tracker, "a")
        copy, collecter_copy = pickle.loads(pickle.dumps(tracker)), pickle.loads(pickle.dumps(collecter))
        assert copy.getAllSuperProperties() == {"super": 1} and not any(collecter_copy.stats().values())
        track(copy, "b")
        track(tracker_to(collecter_copy), "c")
        for thing in tracker, copy, collecter_copy:
            thing.close()
        balanced(collecter, accepted=1, delivered=1)
        balanced(collecter_copy, accepted=1, delivered=1)
        assert sorted(server.names + lines_in(tmp_path)) == ["a", "b", "c"]
        for closed in pickle.loads(pickle.dumps(tracker)), tracker_to(pickle.loads(pickle.dumps(collecter))):
            with pytest.raises(analysys.AnalysysPythonSdkException):
                track(closed, "late")


def test_pickles_carry_on_error_and_debug_mode_and_refuse_an_ssl_context(capsys):
    tracker = tracker_to(on_error=print)
    tracker.setDebugMode(2)
    copy = pickle.loads(pickle.dumps(tracker))
    track(copy, "a")
    assert copy.sink.records[-1]["xcontext"]["$debug"] == 2
    copy.track("", "bad")
    assert "distinct_id" in capsys.readouterr().out
    with FaultyServer(then=answer(200, code(400))) as server:
        collecter = pickle.loads(pickle.dumps(BatchCollecter(server.url, on_error=print)))
        collecter.uploadData(record("user", "refused"))
        collecter.close()
        assert "refused for good" in capsys.readouterr().out
    for kind in DefaultCollecter, BatchCollecter:
        with pytest.raises(TypeError, match="make it in the worker"):
            pickle.dumps(kind(URL, ssl_context=ssl.create_default_context()))


class Tagging:
    """What a user's subclass of a collecter adds: a setting of its own, and what it does with it."""

    def __init__(self, *arguments, tag):
        super().__init__(*arguments)
        self.tag = tag

    def uploadData(self, record):
        super().uploadData(dict(record, xwhat=record["xwhat"] + self.tag))


class TaggingDefault(Tagging, DefaultCollecter):
    pass


class TaggingBatch(Tagging, BatchCollecter):
    pass


class TaggingLog(Tagging, LogCollecter):
    pass


@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy],
                         ids=["pickle", "copy", "deepcopy"])
@pytest.mark.parametrize("kind", [TaggingDefault, TaggingBatch, TaggingLog])
def test_a_copy_of_a_subclass_of_a_collecter_has_what_the_subclass_added(kind, copied, tmp_path):
    with FaultyServer() as server:
        original = kind(str(tmp_path) if kind is TaggingLog else server.url, tag="_tagged")
        with tracker_to(copied(original)) as other:
            track(other, "copied")
            assert balanced(other.sink)["accepted"] == 1
        with tracker_to(original) as own:              # which goes on
            track(own, "own")
        assert server.names + lines_in(tmp_path) == ["copied_tagged", "own_tagged"]


def test_a_hundred_collecters_made_used_and_dropped_leave_nothing_behind(tmp_path):
    with FaultyServer() as server:
        run("""
            import tracemalloc
            def use(count):
                for number in range(count):
                    for collecter in BatchCollecter(url), DefaultCollecter(url), LogCollecter(folder, is_batch=True):
                        tracker_to(collecter).track("user", "e")
                del collecter
                gc.collect()
                wait_until(lambda: threading.active_count() == 1)
                gc.collect()
            def descriptors():
                return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
            use(10)
            files = descriptors()
            tracemalloc.start()
            use(10)
            memory = tracemalloc.get_traced_memory()[0]
            use(80)
            assert descriptors() <= files, (descriptors(), files)
            grown = tracemalloc.get_traced_memory()[0] - memory
            assert grown < %d, grown
        """ % (50000 * SPARE), server.url, tmp_path)
        assert len(server.names) == 200 and len(lines_in(tmp_path)) == 100


CLOCK = """
    import time
    ahead, _time, _localtime, _strftime = [0], time.time, time.localtime, time.strftime
    time.time = lambda: _time() + ahead[0]
    time.localtime = lambda seconds=None: _localtime(time.time() if seconds is None else seconds)
    time.strftime = lambda form, when=None: _strftime(form, when or time.localtime())
"""


def test_when_the_system_clock_is_set_batches_go_out_on_time_and_file_names_follow(tmp_path):
    with FaultyServer(accept, answer(500)) as server:
        run("""
            collecter = BatchCollecter(url, max_interval_time=0.05, queue_cache_max_size=100)
            tracker, log, expected = tracker_to(collecter), tracker_to(LogCollecter(folder)), []
            for count, jump in enumerate([0, -3600, 7200, 86400]):
                tracker.track("user", "e%d" % count)
                ahead[0] += jump
                wait_until(lambda: collecter.stats()["delivered"] == count + 1)
                before = time.strftime("datas_%Y%m%d%H.log")
                log.track("user", "e")
                expected.append({before, time.strftime("datas_%Y%m%d%H.log")})
                assert expected[-1] & set(os.listdir(folder)), (expected, os.listdir(folder))
            assert set(os.listdir(folder)) <= set.union(*expected)
            balanced(collecter, accepted=4, delivered=4)
        """, server.url, tmp_path, before=CLOCK)
        assert server.names == numbered("e", 4)


# ---------------------------------------------------------------------------
# Process hooks
# ---------------------------------------------------------------------------

SCRIPT = """
import gc, os, sys, threading, time
from analysys import *
sdk = AnalysysPythonSdk(%s)
sdk.setAppId("app")
for n in range(150):
    sdk.track("u", "Event", {"n": n})
"""
DROPPED = """
del sdk
gc.collect()
deadline = time.monotonic() + 20
while threading.active_count() > 1 and time.monotonic() < deadline:
    threading.Event().wait(0.005)
print(threading.active_count())
"""


@side_by_side([(collecter, *ending) for collecter in (
    "BatchCollecter(sys.argv[1], queue_max_size=100)", "BatchCollecter(sys.argv[1], 10 ** 6, 10 ** 6, 20, 200)",
    "LogCollecter(sys.argv[2], True, 200)") for ending in (
    ("sdk.flush(); os._exit(3)", 3, ""), ("", 0, ""), ("sys.exit(3)", 3, ""), ("raise SystemError", 1, ""),
    (DROPPED, 0, "1\n"), (DROPPED + "os._exit(0)", 0, "1\n"))])
def test_no_record_is_lost_however_a_process_ends_or_drops_its_collecter(case, folder):
    collecter, ending, status, printed = case
    with Server() as server:
        done = python("-S", "-c", SCRIPT % collecter + ending, server.url, folder)
        assert (done.status, done.out) == (status, printed), done.err
        assert numbers(server.records + lines(folder)) == list(range(150))


@pytest.fixture(scope="module", autouse=True)
def exits(request):
    """Two processes that exit while their server is dead: ten seconds each, so they run beside all the other tests.

    No thread of ours looks after them: other tests patch what it would call.
    """
    if not any(item.name.startswith("test_exit_with") for item in request.session.items):
        yield
        return
    last = """
        import atexit, time
        atexit.register(lambda: print(time.monotonic() - began, flush=True))        # how long exit took, as the last thing
    """
    with FaultyServer(listening=False) as refusing, FaultyServer(then=silent) as mute, process("""
        logging.basicConfig(format="%(levelname)s %(message)s")
        tracker = tracker_to(BatchCollecter(url, queue_cache_max_size=2))
        for number in range(7):
            tracker.track("user", "e%d" % number)
        began = time.monotonic()
    """, refusing.url, before=last) as refused, process("""
        def report(error, records):
            print(" ".join([type(error).__name__] + [record["xwhat"] for record in records]), flush=True)
        trackers = [tracker_to(BatchCollecter(url, on_error=report, collecter_max_size=2)) for _ in range(2)]
        for number in range(5):
            trackers[0].track("user", "a%d" % number)
            trackers[1].track("user", "b%d" % number)
        began = time.monotonic()
    """, mute.url, before=last) as unheard:
        yield refused, unheard


def test_exit_with_a_dead_server_ends_within_ten_seconds_with_one_error_line_that_counts(exits):
    done = ended_well(exits[0])
    errors = [line for line in done.err.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1 and re.search(r"\b7\b", errors[0]), done
    assert float(done.out) < 17


def test_exit_with_a_silent_server_and_two_collecters_hands_all_to_on_error_within_ten_seconds(exits):
    done = ended_well(exits[1])
    assert done.err.count("waiting at exit") == 1 and "not delivered at exit" not in done.err
    *reports, (seconds,) = [line.split() for line in done.out.splitlines()]
    assert float(seconds) < 17
    assert {words[0] for words in reports} == {"AnalysysPythonSdkNetworkException"}
    names = [name for words in reports for name in words[1:]]
    assert sorted(names) == numbered("a", 5) + numbered("b", 5)
    assert [name for name in names if "a" in name] == numbered("a", 5)


def test_where_the_main_thread_is_over_a_closed_collecter_is_not_kept():
    with FaultyServer() as server:
        assert run("""
            def work():
                threading.main_thread().join()
                with tracker_to(DefaultCollecter(url)) as tracker:
                    tracker.track("user", "e")
                print(len(analysys._OPEN))
            threading.Thread(target=work).start()
        """, server.url).out == "0\n" and server.names == ["e"]


@each_collecter
def test_a_collecter_that_is_dropped_also_inside_a_fork_is_forgotten(tmp_path, kind):
    gc.collect()
    before = set(analysys._ALL_STATES)
    for step in each_step(5):
        collecters = [make(kind, URL, tmp_path) for _ in range(2)]
        disturbed(analysys._after_fork_in_child, step, collecters.pop)
        del collecters
    gc.collect()
    assert set(analysys._ALL_STATES) <= before


def test_a_collecter_whose_constructor_raised_goes_without_a_word():
    assert run("""
        for kind in DefaultCollecter, BatchCollecter, LogCollecter:
            assert isinstance(error_of(kind, ""), AnalysysPythonSdkIllegalDataException)
    """).err == ""


def test_exit_does_not_wait_out_a_long_back_off():
    with FaultyServer(answer(503, b"", "Retry-After: 30")) as server:
        run("""
            failed = threading.Event()
            class Handler(logging.Handler):
                def emit(self, entry):
                    failed.set()
            logging.getLogger("analysys").addHandler(Handler())
            tracker = tracker_to(BatchCollecter(url, queue_cache_max_size=1))
            tracker.track("user", "a")
            assert failed.wait(10)                     # the warning
            tracker.track("user", "b")
            try:
                tracker.flush(0.01)                    # has used up what may be cut in this second
            except AnalysysPythonSdkNetworkException:
                pass
        """, server.url, seconds=25)
        assert server.names == ["a", "b"]


def test_at_exit_collecters_that_fail_take_nothing_from_the_others(tmp_path):
    with FaultyServer() as server, FaultyServer(then=silent) as mute:
        done = run("""
            analysys._EXIT_TIMEOUT = 1                 # seconds
            logs = [LogCollecter(os.path.join(folder, str(number)), True) for number in range(4)]
            mute = [BatchCollecter(%r) for _ in range(3)]
            for number, collecter in enumerate([waiting()] + logs + mute + [waiting()]):
                collecter.uploadData(event("e%%d" %% number))
            for number in range(4):
                open(os.path.join(folder, str(number)), "w").close()       # where the folder should be
        """ % mute.url, server.url, tmp_path)
        assert sorted(server.names) == ["e0", "e8"] and "7 records were not delivered at exit" in done.err


def test_exit_also_counts_what_fails_by_an_error_that_is_none_of_ours(tmp_path):
    done = run("""
        collecter = LogCollecter(folder, True)
        for number in range(3):
            collecter.uploadData(event("e%d" % number))
        analysys._LogFile.clock = staticmethod(lambda: 1e300)           # as good as no memory: OverflowError
    """, URL, tmp_path)
    assert "3 records were not delivered at exit" in done.err and not lines_in(tmp_path)


def test_what_a_closed_collecter_left_on_disk_is_not_waited_for_at_exit(tmp_path):
    with FaultyServer(then=silent) as server:
        done = run("""
            collecter = BatchCollecter(url, queue_cache_max_size=1, spool_path=folder)
            collecter.uploadData(event("e"))
            collecter.close(0.01)
        """, server.url, tmp_path)
        assert done.err == "" and len(list(tmp_path.glob("*.log"))) == 1


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]])
def test_exit_while_daemon_threads_still_track_delivers_what_was_accepted(kind, tmp_path):
    with FaultyServer() as server:
        done = run("""
            collecter = %s
            tracker = tracker_to(collecter)
            def work():
                try:
                    while True:
                        tracker.track("user", "e")
                        done.append(1)
                except AnalysysPythonSdkException:
                    pass                               # closed
            for _ in range(3):
                threading.Thread(target=work, daemon=True).start()
            wait_until(lambda: collecter.stats()["accepted"] > 50)
        """ % kind, server.url, tmp_path, before="""
            import atexit
            done = []
            atexit.register(lambda: print(len(done), flush=True))           # the last thing at exit
        """)
        arrived = len(server.names + lines_in(tmp_path))
        assert int(done.out) <= arrived <= int(done.out) + 3


@side_by_side([
    ("", "threading.Thread.start = fail\nwork()"), ("", "threading.Thread.__init__ = fail\nwork()"),
    ("", "import atexit; atexit.register(work)"),                          # the first use is at exit
    ("import atexit; atexit.register(lambda: work())", ""),                # and after our own hook
    ("import atexit; atexit.register(lambda: work())", "BatchCollecter(url).uploadData(event('first'))")])
def test_where_no_thread_can_be_started_the_callers_thread_sends(case, _):
    before, after = case
    failed = set()

    def flaky(server, request):                        # fails once for the first record and once for the last
        fresh = {one["xwhat"] for one in decode(request.body)} & {"e0", "e5"} - failed
        failed.update(fresh)
        return answer(500) if fresh else accept(server, request)
    with FaultyServer(then=flaky) as server:
        done = run("""
            def fail(*args, **kwargs):
                raise RuntimeError("can't start new thread")
            def work():
                collecter = BatchCollecter(url, queue_cache_max_size=2, request_timeout=5)
                tracker = tracker_to(collecter)
                for number in range(5):
                    tracker.track("user", "e%d" % number)
                tracker.flush()
                balanced(collecter, delivered=5)
                tracker.track("user", "e5")
                print("worked", flush=True)
            exec({!r})
        """.format(after), server.url, before=before)
        names = [name for name in server.names if name != "first"]
        assert done.out == "worked\n" and names == numbered("e", 6), done


@pytest.fixture
def no_threads(monkeypatch):
    """Be where uWSGI runs no threads."""
    monkeypatch.setitem(sys.modules, "uwsgi", types.SimpleNamespace(worker_id=lambda: 1, has_threads=0))


def test_uwsgi_that_runs_no_threads_is_warned_of_once_and_its_master_starts_none(no_threads):
    analysys._warn_of_uwsgi.cache_clear()
    with FaultyServer() as server, logged() as entries:
        for _ in range(2):
            with batch(server) as (_, tracker):
                track(tracker, "a")
        sys.modules["uwsgi"] = types.SimpleNamespace(worker_id=lambda: 0, mule_id=lambda: 0, has_threads=1)
        with batch(server) as (collecter, tracker):
            track(tracker, "b")
            assert collecter._state()._thread is None
        assert server.names == ["a", "a", "b"]
    assert ["enable-threads = true" in entry.getMessage() for entry in entries] == [True]


def test_where_no_thread_runs_a_call_sends_all_that_waits_and_close_closes_the_connections(no_threads, monkeypatch):
    clock = FakeClock(monkeypatch)
    with FaultyServer(then_fail) as server:
        collecter = BatchCollecter(server.url, NEVER, 4, 1, 3, request_timeout=30)
        tracker = tracker_to(collecter)
        track(tracker, *"abc")
        with pytest.raises(NetworkError, match="queue is full"):
            tracker.track("user", "lost")
        assert server.names == []
        clock.advance(61)                              # the back-off is over: there is room again, and nobody who makes it
        track(tracker, "d")
        assert server.names == list("abcd")
        server.script.append(then_fail)
        track(tracker, *"ef")
        clock.advance(61)
        track(tracker, "g")
        assert server.names == list("abcdefg")
        balanced(collecter, delivered=7, pending=0)
        connection, = sockets_of(collecter._state()._sender.transport)
        collecter.close()
        assert connection.fileno() == -1


def test_where_no_thread_runs_flush_sends_until_its_time_is_over_and_says_why_the_rest_waits(no_threads, monkeypatch):
    clock = FakeClock(monkeypatch)

    with FaultyServer(then_fail, then=refuse("bad")) as server:
        collecter = BatchCollecter(server.url, NEVER, 4, 1, request_timeout=60, on_error=lambda *_: clock.advance(100))
        tracker = tracker_to(collecter)
        track(tracker, "a", "bad", "c")
        with pytest.raises(NetworkError, match="1 records are not delivered: the server answers"):
            tracker.flush(60)
        assert server.names == ["a"]
        server.script.append(silent)
        with within(30), pytest.raises(NetworkError, match="1 .* failing"):
            tracker.flush(0.2)
        tracker.close()
        assert server.names == ["a", "c"]


def test_a_call_in_an_exit_hook_after_ours_raises_where_its_record_cannot_be_delivered():
    with FaultyServer(then=then_fail) as server:
        done = run("""
            analysys._EXIT_TIMEOUT = 0.2
            collecter = BatchCollecter(url, request_timeout=5)
        """, server.url, before="""
            import atexit
            @atexit.register
            def later():
                error = error_of(tracker_to(collecter).track, "user", "Event")
                print(type(error).__name__, [record["xwhat"] for record in error.records])
                balanced(collecter, rejected=1, pending=0)
        """)
        assert done.out == "AnalysysPythonSdkNetworkException ['Event']\n", done


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 12), (3, 13)), reason="needs the interpreters of 3.12 or 3.13")
def test_in_a_subinterpreter_each_event_is_sent_once_unless_its_call_raised():
    with FaultyServer(answer(500), accept, cut(Reset), answer(500)) as server:
        done = run("""
            try:
                import _interpreters as interpreters
            except ImportError:
                import _xxsubinterpreters as interpreters
            print(interpreters.run_string(interpreters.create(), '''if True:
                import analysys
                collecter = analysys.BatchCollecter(%r, queue_cache_max_size=1, request_timeout=5)
                tracker = analysys.AnalysysPythonSdk(collecter)
                tracker.setAppId("app")
                for name in "abcdefgh":
                    try:
                        tracker.track("user", name)
                        print(name, flush=True)
                    except analysys.AnalysysPythonSdkNetworkException as error:
                        assert [record["xwhat"] for record in error.records] == [name]
                tracker.flush()
                stats = collecter.stats()
                assert stats["accepted"] == stats["delivered"] + stats["rejected"] and not stats["pending"], stats
            ''' % url), flush=True)
            os._exit(0)                                # 3.12.1 itself crashes later on, once ssl was imported
        """, server.url)
        assert done.out.split() == server.names + ["None"], done


def test_the_thread_of_a_default_collecter_ends_at_exit_and_hooks_that_run_later_still_track():
    with FaultyServer() as server:
        done = run("""
            @atexit.register                           # older than our hook: it runs after it
            def later():
                tracker.track("user", "at_exit")
                print([thread.name for thread in threading.enumerate()])
            tracker = tracker_to(DefaultCollecter(url))
            tracker.track("user", "before")
            assert len(threading.enumerate()) == 2
        """, server.url, before="import atexit")
        assert (done.out, server.names) == ("['MainThread']\n", ["before", "at_exit"]), done


@pytest.mark.skipif(sys.version_info < (3, 13), reason="needs the interpreters of 3.13")
def test_a_subinterpreter_in_which_a_default_collecter_keeps_a_connection_ends():
    with FaultyServer() as server:
        done = run("""
            import _interpreters as interpreters
            interpreter = interpreters.create("legacy")  # as mod_wsgi has it
            failed = interpreters.run_string(interpreter, '''if True:
                import analysys
                tracker = analysys.AnalysysPythonSdk(analysys.DefaultCollecter(%r))
                tracker.setAppId("app")
                tracker.track("user", "Event")
            ''' % url)
            interpreters.destroy(interpreter)
            print(failed, flush=True)
        """, server.url)
        assert (done.out, server.names) == ("None\n", ["Event"]), done


@posix_only
def test_what_is_left_is_told_however_often_ctrl_c_comes_while_exit_waits():
    with FaultyServer(then=silent) as server:
        with process("""
            collecter = BatchCollecter(url, 60, 1)
            give(collecter, *numbered("e", 12))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                print("ready", flush=True)
                while True:
                    time.sleep(1)
            except KeyboardInterrupt:
                print("exit", flush=True)
        """, server.url) as running:
            assert running.stdout.readline() == b"ready\n"
            running.send_signal(signal.SIGINT)
            assert running.stdout.readline() == b"exit\n"
            assert b"waiting at exit" in running.stderr.readline()
            for _ in range(5):
                running.send_signal(signal.SIGINT)
            with within(8):
                err = ended(running).err
    assert "12 records were not delivered at exit" in err, err
    assert "analysys.py" not in err, err               # no traceback of ours: `logging` ends after us and may have one


@pytest.fixture
def exits_here(monkeypatch):
    """Return what exits as a process does, in this one; only the collecters that are made meanwhile take part."""
    def exits():
        analysys._HOOKS[os.getpid()] = True
        analysys._deliver_at_exit()
    monkeypatch.setattr(analysys, "_HOOKS", {os.getpid(): True})
    monkeypatch.setattr(analysys, "_OPEN", {})
    monkeypatch.setattr(analysys, "_EXIT_TIMEOUT", 0.001)
    yield exits


@pytest.mark.parametrize("name", ["close", "exit"])
def test_wherever_a_signal_handler_raises_in_close_or_at_exit_each_record_left_is_told(name, exits_here):
    def close():
        try:
            collecter.close(0)
        except (NetworkError, Interrupt) as error:
            told.extend(getattr(error, "records", getattr(error.__context__, "records", ())))

    def on_error(error, records):
        told.extend(records)

    def time_out():                                    # what is an Exception, too, as a TimeoutError is
        raise type("TimedOut", (Interrupt, Exception), {})
    for step in each_step(100):
        told = []
        analysys._HOOKS[os.getpid()] = True
        with logged() as entries:
            collecter = BatchCollecter(URL, NEVER, NEVER, on_error=on_error if step % 2 else None)
            give(collecter, *numbered("e", 3))
            came = disturbed(close if name == "close" else exits_here, step,
                             interrupt if name == "close" or step % 3 else time_out)
            analysys._LOGGING.now = os.getpid()        # as if it had raised in the very moment in which they are cleared
            analysys._TELLING.add((os.getpid(), threading.get_ident()))
            state = collecter._state()
            while state._queue.ledger.lock._is_owned():            # in a `with` that was about to unlock it
                state._queue.ledger.lock.release()
            wait_until(lambda: state._phase < analysys._ENDED or state._thread is None)
            for end in [exits_here, close] if step % 4 < 2 else [close, exits_here]:
                end()
        told += ["logged"] * 3 * sum("3 records" in entry.getMessage() for entry in entries if entry.levelname == "ERROR")
        balanced(collecter, accepted=3, rejected=3)
        assert len(told) == 3 or came and len(told) > 3, (step, told)


def test_of_threads_that_close_a_collecter_at_once_one_has_what_is_left():
    def close():
        try:
            collecter.close(0)
        except NetworkError as error:
            told.extend(error.records)

    def close_aside(*_):
        other.start()
        other.join(0.01)                               # it may wait for a lock that the step has
    for step in range(1, 2000):
        told, collecter, other = [], BatchCollecter(URL, NEVER, NEVER), threading.Thread(target=close, daemon=True)
        give(collecter, *numbered("e", 3))
        came = disturbed(close, step, close_aside)
        if not came:
            break
        other.join(9)
        balanced(collecter, accepted=3, rejected=3)
        assert len(told) == 3, (step, told)
    assert step > 50


def test_exit_tells_what_a_thread_that_closed_a_collecter_did_not_live_to_tell(exits_here):
    collecter = BatchCollecter(URL, NEVER, NEVER)
    collecter.uploadData(event("e"))
    thread = threading.Thread(target=collecter._state().close, args=(0,))
    thread.start()
    thread.join()
    with logged() as entries:
        exits_here()
    assert [entry.args[0] for entry in entries if "not delivered at exit" in entry.msg] == [1]


def test_what_two_signal_handlers_track_before_and_in_the_write_of_a_log_is_there_once(tmp_path):
    def first():                                       # at any step, and where it comes before the write
        collecter.uploadData(event("b"))
        sys.settrace(second)

    def second(frame, *_):                             # in it, too
        if frame.f_code is analysys._SharedFile.append.__code__:
            sys.settrace(None)
            names.append("c")
            collecter.uploadData(event("c"))
    came_twice = 0
    for step in range(1, 500):
        collecter, names = LogCollecter(str(tmp_path / str(step))), ["a", "b"]
        came = disturbed(lambda: collecter.uploadData(event("a")), step, first)
        collecter.close()
        if not came:
            break
        assert sorted(one["xwhat"] for one in lines(tmp_path / str(step))) == names, step
        came_twice += "c" in names
    assert came_twice > 5


def test_an_on_error_that_raises_at_exit_is_not_called_again_and_the_log_is_told(exits_here):
    calls = []
    def on_error(*_):
        calls.append(1)
        raise KeyboardInterrupt
    collecter = BatchCollecter(URL, NEVER, NEVER, on_error=on_error)
    collecter.uploadData(event("e"))
    with logged() as entries:
        exits_here()
    assert calls == [1] and [entry.args[0] for entry in entries if "not delivered at exit" in entry.msg] == [1]


@pytest.mark.parametrize("has_on_error", [False, True])
def test_a_sys_exit_of_a_signal_handler_inside_a_logging_handler_at_exit_leaves_nothing_untold(has_on_error, exits_here):
    def exit_once(*_):
        calls.append(1)
        if len(calls) <= 1 + has_on_error:
            sys.exit(3)
    calls = []
    collecter = BatchCollecter(URL, NEVER, NEVER, on_error=exit_once if has_on_error else None)
    collecter.uploadData(event("e"))
    logger, handler = logging.getLogger("analysys"), logging.Handler()
    handler.filter = lambda entry: "on_error raised" in entry.msg or "not delivered at exit" in entry.msg
    handler.emit = exit_once
    logger.addHandler(handler)
    try:
        with logged() as entries:
            exits_here()
    finally:
        logger.removeHandler(handler)
    assert len(calls) == 2 + has_on_error
    assert {entry.args[0] for entry in entries if "not delivered at exit" in entry.msg} == {1}


def test_a_log_that_signal_handlers_left_locked_is_written_by_this_thread_and_the_others(tmp_path, exits_here):
    collecter = LogCollecter(str(tmp_path), True, 3)
    state = collecter._state()
    collecter.uploadData(event("a"))
    state._lock.acquire()                              # as an exception in a `with` that is about to unlock it leaves it
    with within(8):
        collecter.flush()
        thread = threading.Thread(target=lambda: [collecter.uploadData(event(xwhat)) for xwhat in "bcd"], daemon=True)
        thread.start()
        thread.join(8)
    state._lock.acquire()
    analysys._WRITES.log = state                       # and one more, where that is cleared
    collecter.uploadData(event("e"))
    with within(8):
        exits_here()
    assert lines_in(tmp_path) == ["a", "b", "c", "d", "e"]
    balanced(collecter, delivered=5)


def test_wherever_a_signal_handler_raises_as_a_failed_write_closes_its_file_nobody_is_kept_from_its_lock(tmp_path):
    for step in each_step(20):
        path = str(tmp_path / str(step))
        file, other = (analysys._SharedFile(path, analysys._open_lines) for _ in range(2))
        disturbed(lambda: file.append(b"a\n", interrupt), step, interrupt)
        file.append(b"b\n", lambda: None, 0.0)
        other.append(b"c\n", lambda: None, 0.0)
        file.close()
        other.close()


@pytest.mark.parametrize("name", ["uploadData", "flush", "close"])
def test_wherever_a_signal_handler_raises_in_a_call_to_a_log_exit_writes_what_waits(name, tmp_path, exits_here):
    for step in each_step(30):
        analysys._HOOKS[os.getpid()] = True
        folder = tmp_path / str(step)
        folder.mkdir()
        collecter = LogCollecter(str(folder), True, 3)
        give(collecter, *"ab")
        disturbed(lambda: getattr(collecter, name)(*[event("c")] * (name == "uploadData")), step, interrupt)
        exits_here()
        written = [one["xwhat"] for one in lines(folder)]
        assert written[:2] == ["a", "b"], (step, written)          # all of it again where it was not noted
        balanced(collecter)


def test_a_call_while_modules_are_torn_down_raises_our_exception_or_nothing():
    done = run("""
        class Late:
            def __del__(self):
                try:
                    self.tracker.track("user", "e", {"a": __import__})
                    self.tracker.track("user", "e")
                except AnalysysPythonSdkException:
                    print("ours", file=sys.__stdout__, flush=True)
        for number, collecter in enumerate([BatchCollecter(url), DefaultCollecter(url), LogCollecter(folder)]):
            late = sys.modules["late%d" % number] = Late()
            late.tracker = AnalysysPythonSdk(collecter)
            late.tracker.setAppId("app")
        del late, collecter
    """, "http://127.0.0.1:1")
    assert done.err == "" and set(done.out.split()) <= {"ours"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_that_becomes_a_normal_exit_loses_nothing(number):
    with FaultyServer() as server, process("""
            signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))
            tracker, count = tracker_to(BatchCollecter(url)), 0
            try:
                while True:
                    tracker.track("user", "e")
                    count += 1
            finally:
                print(count, flush=True)
            """, server.url) as running:
        wait_until(lambda: len(server.names) > 200)
        running.send_signal(number)
        _, out, err = ended(running)
        assert int(out) <= len(server.names) <= int(out) + 1, err       # the signal came inside a call


@pytest.mark.usefixtures("each_fork")
@posix_only
@side_by_side(["waiting()", "LogCollecter(folder, is_batch=True)"])
def test_a_fork_with_events_queued_sends_each_once(kind, tmp_path):
    with FaultyServer() as server:
        run("""
            collecter = %s
            tracker = tracker_to(collecter)
            for number, how in enumerate(["flush", "exit", "idle"]):
                tracker.track("user", "parent%%d" %% number)
                pid = os.fork()
                if not pid:
                    if how != "idle":
                        tracker.track("user", how)
                        pid = os.fork()
                        tracker.track("user", how + ("_child" if pid else "_grandchild"))
                        if pid:
                            reap(pid)
                        assert balanced(collecter)["accepted"] <= 2
                    if how == "flush":
                        tracker.flush()
                        os._exit(0)
                    end()
                reap(pid)
            tracker.flush()
            balanced(collecter, accepted=3, delivered=3)
        """ % kind, server.url, tmp_path)
        expected = [how + who for how in ("exit", "flush") for who in ("", "_child", "_grandchild")]
        assert sorted(server.names + lines_in(tmp_path)) == expected + numbered("parent", 3)


@posix_only
@side_by_side(KINDS)
def test_what_a_fork_hook_that_is_older_than_ours_tracks_is_sent_once(kind, tmp_path):
    with FaultyServer() as server:
        run("""
            collecter.close()
            collecter = %s
            tracker = tracker_to(collecter)
            tracker.track("user", "parent")
            pid = child(lambda: (tracker.track("user", "child"), tracker.flush()))
            reap(pid)
            tracker.close()
            if hasattr(os, "register_at_fork"):
                assert hooked == ["before", "after_in_parent"]
        """ % kind, server.url, tmp_path, before="""
            import os, sys
            import analysys
            hooked, collecter, tracker = [], None, None
            def hook(name):
                def call():
                    hooked.append(name)
                    tracker.track("user", name)
                return call
            if hasattr(os, "register_at_fork"):        # not on 3.6
                os.register_at_fork(**{name: hook(name) for name in ("before", "after_in_parent", "after_in_child")})
            collecter = analysys.BatchCollecter("http://127.0.0.1:1")
        """)
        names = ["child", "parent"]
        if hasattr(os, "register_at_fork"):
            names += ["before", "after_in_parent", "after_in_child"]
        assert sorted(server.names + lines_in(tmp_path)) == sorted(names)


@posix_only
@pytest.mark.parametrize("options", ["", ", is_batch=True"])
def test_a_child_forked_inside_a_write_of_its_parent_is_inside_none(options, each_fork, tmp_path):
    run("""
        collecter, pids = LogCollecter(folder%s), []
        def work():
            sys.setprofile(None)
            collecter.uploadData(event("child"))
            collecter.flush()
        def hook(frame, kind, called):                 # as a signal handler that keeps a number of workers
            if kind == "c_call" and called is os.write and not pids:
                pids.append(None)
                pids[0] = child(work)
        sys.setprofile(hook)
        collecter.uploadData(event("parent"))
        collecter.flush()
        sys.setprofile(None)
        reap(*pids)
    """ % options, URL, tmp_path)
    assert sorted(lines_in(tmp_path)) == ["child", "parent"]


@posix_only
def test_a_child_forked_inside_a_logging_handler_logs(each_fork):
    done = run("""
        class Forking(logging.Handler):
            def emit(self, record):
                os.write(1, re.search("Parent|Child", record.getMessage()).group().encode() + b"\\n")
                if not pids:
                    pids.append(None)
                    pids[0] = child(tracker.track, "user", "Child")
        pids, tracker = [], AnalysysPythonSdk(type("Sink", (), dict.fromkeys(["uploadData", "flush", "close"], len))())
        tracker.setAppId("app")
        tracker.setDebugMode(1)
        logging.getLogger().addHandler(Forking())
        logging.getLogger().setLevel("INFO")
        tracker.track("user", "Parent")
        reap(*pids)
    """, before="import re\n")
    swallowed = hasattr(logging.Logger, "_is_disabled")                # 3.13.4 and 3.13.5 log nothing inside a handler
    assert done.out.split() == ["Parent"] + ["Child"] * (not swallowed), done


@posix_only
def test_a_call_that_waits_for_the_end_of_the_write_around_it_hangs_no_fork_and_no_other_thread(tmp_path):
    run("""
        import fcntl, glob
        collecter = LogCollecter(folder)
        collecter.uploadData(event("first"))
        held = os.open(glob.glob(os.path.join(folder, "*.log"))[0], os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)               # as another process would
        nested, statuses = threading.Event(), []

        def track(*_):
            collecter.uploadData(event("inner"))
            nested.set()
        signal.signal(signal.SIGALRM, track)

        def work():
            collecter.uploadData(event("child"))
            collecter.flush()

        other = LogCollecter(os.path.join(folder, "other"))

        def forker():
            nested.wait()
            other.uploadData(event("elsewhere"))       # before the lock is released, or the outer call raises
            pid = os.fork()
            if not pid:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(10)                       # ends the child if it hangs
                fcntl.flock(held, fcntl.LOCK_UN)
                try:
                    work()
                finally:
                    os._exit(0)
            statuses.append(os.waitpid(pid, 0)[1])
        thread = threading.Thread(target=forker)
        thread.start()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        collecter.uploadData(event("outer"))
        thread.join()
        assert statuses == [0], statuses
    """, URL, tmp_path)
    shutil.rmtree(str(tmp_path / "other"))
    names, = files_in(tmp_path).values()
    assert sorted(names) == ["child", "first", "inner", "outer"]


@pytest.mark.usefixtures("each_fork")
@posix_only
def test_a_fork_in_the_middle_of_a_request_sends_each_event_once(tmp_path):
    gate = Gate()

    def hold(server, request):
        (tmp_path / "asked").touch()
        return gate(server, request)
    with FaultyServer(hold) as server, process("""
            collecter = BatchCollecter(url, queue_cache_max_size=1)
            tracker = tracker_to(collecter)
            tracker.track("user", "parent0")
            tracker.track("user", "parent1")
            wait_until(lambda: os.path.exists(os.path.join(folder, "asked")))
            def work():
                tracker.track("user", "child")
                tracker.flush()
                balanced(collecter, accepted=1, delivered=1)
            reap(child(work))
            pid = os.fork()
            if not pid:
                tracker.track("user", "exiting")
                end()
            reap(pid)
            print("forked", flush=True)
            tracker.flush()
            balanced(collecter, accepted=2, delivered=2)
            """, server.url, tmp_path) as running:
        assert running.stdout.readline() == b"forked\n", running.stderr.read()
        assert server.names == ["child", "exiting"]
        gate.set()
        done = ended(running)
        assert done.status == 0, done.err
        assert server.names[2:] == ["parent0", "parent1"]


LOCKS = '''
import collections, types
OPEN = dict, list, tuple, set, collections.deque, threading.Condition, threading.Event, types.MethodType

def locks(*roots):
    """Return every lock that can be reached from *roots* through objects of the module."""
    seen, todo = {}, list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            if isinstance(thing, OPEN) or getattr(thing, "__module__", "") == "analysys":
                todo += gc.get_referents(thing)
    return [thing for thing in seen.values() if isinstance(thing, (type(threading.Lock()), type(threading.RLock())))]
'''


@pytest.mark.usefixtures("each_fork")
@posix_only
@side_by_side(KINDS)
def test_a_fork_while_another_thread_holds_one_of_our_locks_hangs_nobody(kind, folder):
    with FaultyServer() as server:
        done = run(LOCKS + textwrap.dedent("""
            collecter = %s
            tracker = tracker_to(collecter)
            tracker.track("user", "parent")
            tracker.flush()
            def work():
                tracker.setDebugMode(0)            # takes the tracker's own lock
                tracker.track("user", "child")
                tracker.flush(20)
                balanced(collecter)
            def hold():
                got = lock.acquire(timeout=0.05)   # one that a worker sleeps with is taken as it is
                held.set()
                done.wait()
                if got:
                    lock.release()
            found = locks(tracker, collecter, vars(analysys))
            for lock in found:
                held, done = threading.Event(), threading.Event()
                thread = threading.Thread(target=hold)
                thread.start()
                held.wait()
                try:
                    reap(child(work))
                finally:
                    done.set()
                    thread.join()
                tracker.track("user", "parent")
                tracker.flush()
            balanced(collecter, accepted=len(found) + 1, delivered=len(found) + 1)
            print(len(found))
        """) % kind, server.url, folder)
        count = int(done.out)
        assert count > 0
        assert collections.Counter(server.names + lines_in(folder)) == {"parent": count + 1, "child": count}


@posix_only
def test_a_fork_loop_against_a_busy_sender_hangs_nobody_and_sends_each_event_once():
    with FaultyServer() as server:
        done = run("""
            collecter = BatchCollecter(url.replace("127.0.0.1", "localhost"), queue_cache_max_size=1)
            tracker, done, count = tracker_to(collecter), threading.Event(), 0
            def keep_busy():
                global count
                while not done.is_set():
                    tracker.track("user", "parent")
                    count += 1
            thread = threading.Thread(target=keep_busy)
            thread.start()
            def work():
                tracker.track("user", "child")
                tracker.flush(20)
                balanced(collecter, accepted=1, delivered=1)
            for _ in range(40):
                reap(child(work))
            done.set()
            thread.join()
            tracker.flush()
            balanced(collecter, accepted=count, delivered=count)
            print(count)
        """, server.url)
        assert collections.Counter(server.names) == {"parent": int(done.out), "child": 40}


@posix_only
@pytest.mark.skipif(sys.version_info < (3, 7), reason="without os.register_at_fork")
def test_a_forked_child_has_no_connection_of_its_parent_also_where_gevent_puts_off_what_os_close_does():
    with Server() as server:
        run("""
            tracker = tracker_to(DefaultCollecter(url))
            tracker.track("user", "Event")
            connection, = tracker.sink._state()._transport._pool._all
            pid = os.fork()
            if pid == 0:
                try:
                    os.fstat(connection.descriptor[0])
                except OSError:
                    os._exit(0)
                os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
        """, server.url, before="import os; os.close = lambda fd: None")


@linux_only
def test_the_resolver_has_read_its_files_before_a_thread_looks_a_name_up_since_a_fork_meanwhile_would_lock_it_for_ever():
    for kind in ("DefaultCollecter(url)", "BatchCollecter(url)"):
        run("""
            import encodings.idna, socket
            def cost():                                # in bytes read, but those of the count itself
                before, counted = read()
                socket.getaddrinfo("localhost", 1)
                return read()[0] - before - counted
            def read():
                with open("/proc/self/io") as file:
                    text = file.read()
                return int(text.split()[1]), len(text)
            read()
            collecter = %s
            assert len(threading.enumerate()) == 1
            wait_until(lambda: len(os.listdir("/proc/self/task")) == 1)        # at its end a thread loads libgcc_s
            first = cost()
            assert first == cost(), first
        """ % kind)


def test_a_fork_and_a_call_of_one_thread_do_not_wait_for_each_other_and_no_call_longer_than_its_time():
    guard, found = analysys._ForkGuard(), []

    def nested():
        guard.hold_off(NEVER, int)
        found.append(guard._inside.copy())             # a fork waits for the outer one again
        guard.before()                                 # a signal handler forks

    def work():
        guard.hold_off(NEVER, nested)
        assert guard.hold_off(NEVER, int) == 0
        with threads(lambda: found.append(guard.hold_off(0.01, int))):
            pass                                       # while that fork is still under way
        guard.after_in_parent()
    with threads(work):
        pass
    assert len(found[0]) == 1 and found[1:] == [0] and not guard._inside and not guard._forking


@posix_only
@pytest.mark.skipif(sys.version_info < (3, 7), reason="without os.register_at_fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent_and_for_its_own_as_ever():
    run("""
        guard, go_on = analysys._FORK_GUARD, threading.Event()
        collecter = waiting()                          # whose hooks they are
        def in_child():
            assert list(guard._inside) == [threading.get_ident()]          # the call in which this process was forked
            other = threading.Thread(target=guard.hold_off, args=(1000, int), daemon=True)
            other.start()
            other.join(20)
            assert not other.is_alive()
        def in_parent():
            reap(child(in_child))
        other = threading.Thread(target=guard.hold_off, args=(0, go_on.wait), daemon=True)     # no fork waits for it
        other.start()
        wait_until(lambda: guard._inside)
        guard.hold_off(1000, in_parent)
        assert not guard._forking
    """)


@posix_only
@pytest.mark.skipif(sys.version_info < (3, 7), reason="without os.register_at_fork")
def test_a_fork_waits_for_a_handshake_that_holds_locks_of_openssl_and_the_other_way_round_but_not_for_long():
    with FaultyServer(certificate=CERTIFICATE) as server:
        run("""
            import socket, ssl
            inside, go_on, log = threading.Semaphore(0), threading.Semaphore(0), []
            class Context(ssl.SSLContext):             # `ssl` as it is, but for the moment
                def wrap_socket(self, *arguments, **named):
                    inside.release()
                    assert go_on.acquire(timeout=20)
                    log.append("shaken")
                    return super().wrap_socket(*arguments, **named)
            context = Context(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            os.register_at_fork(before=lambda: hook())  # older than ours: it runs after it, when the fork is under way
            hook = lambda: None
            collecter = BatchCollecter(url, ssl_context=context, queue_cache_max_size=1)
            tracker = tracker_to(collecter)
            def fork():
                pid = child(int)                               # which does nothing
                log.append("forked")
                reap(pid)
            def start():
                thread = threading.Thread(target=fork)
                thread.start()
                return thread
            def break_off():                           # so that the next request shakes hands
                collecter._states[os.getpid()]._sender.transport.close()

            tracker.track("u", "in_a_handshake")
            assert inside.acquire(timeout=20)
            thread = start()
            wait_until(lambda: analysys._FORK_GUARD._forking)
            go_on.release()
            thread.join()
            assert log == ["shaken", "forked"], log
            tracker.flush()

            del log[:]
            break_off()
            tracker.track("u", "in_a_long_one")
            assert inside.acquire(timeout=20)
            fork()                                     # returns before the handshake does
            go_on.release()
            tracker.flush()
            assert log == ["forked", "shaken"], log

            del log[:]
            break_off()
            forking, over = threading.Event(), threading.Event()
            hook = lambda: (forking.set(), over.wait(20))
            thread = start()
            assert forking.wait(20)
            tracker.track("u", "during_a_fork")
            wait_until(lambda: thread.ident in analysys._FORK_GUARD._forking and len(analysys._FORK_GUARD._inside) == 1)
            assert not inside.acquire(blocking=False)
            over.set()
            thread.join()
            go_on.release()
            tracker.flush()
            assert log == ["forked", "shaken"], log
        """, server.url)
        assert server.names == ["in_a_handshake", "in_a_long_one", "during_a_fork"]


@posix_only
def test_what_waits_when_the_module_is_reloaded_is_delivered_at_exit_and_forked_children_leave_it_alone(tmp_path):
    with FaultyServer() as server:
        run("""
            import glob, importlib
            def let_go():
                locks = glob.glob(os.path.join(folder, "*", "*.lock"))
                held = analysys._open_files() if hasattr(os, "register_at_fork") else ()
                assert locks and not any(analysys._inode(os.stat(path)) in held for path in locks)
            kept = []
            for name in "abc":
                kept += [BatchCollecter(url, max_interval_time=60), LogCollecter(folder, True)]
                kept += [BatchCollecter(url, max_interval_time=60, spool_path=os.path.join(folder, name))]
                for collecter in kept[-3:]:
                    give(collecter, name)
                importlib.reload(analysys)
                reap(child(let_go))
                from analysys import *
        """, server.url, tmp_path)
        assert sorted(server.names) == sorted("aabbcc") and lines_in(tmp_path) == ["a", "b", "c"]


@posix_only
@pytest.mark.skipif(sys.version_info < (3, 7), reason="without os.register_at_fork")
@pytest.mark.parametrize("module, name", [("ssl", "create_default_context"), ("_socket", "getaddrinfo")])
def test_a_fork_waits_for_what_the_first_collecter_of_a_process_makes_ready_also_in_a_module_reloaded(module, name):
    run("""
        import importlib, %s as module
        inside, go_on, log, forking = threading.Semaphore(0), threading.Semaphore(0), [], []
        os.register_at_fork(before=lambda: forking.append(list(analysys._FORK_GUARD._forking)))  # runs after ours
        real = module.%s
        def slow(*arguments):
            inside.release()
            assert go_on.acquire(timeout=20)
            log.append("made")
            return real(*arguments)
        module.%s = slow
        def fork():
            pid = child(int)                                   # which does nothing
            log.append("forked")
            reap(pid)
        making = threading.Thread(target=lambda: collecters.append(DefaultCollecter("https://localhost:1/")))
        collecters = []
        making.start()
        assert inside.acquire(timeout=20)
        thread = threading.Thread(target=fork)
        thread.start()
        wait_until(lambda: analysys._FORK_GUARD._forking)
        go_on.release()
        thread.join()
        making.join()
        assert log == ["made", "forked"], log
        importlib.reload(analysys)
        fork()
        assert forking == [[thread.ident], [threading.get_ident()]], forking
    """ % (module, name, name))


def test_the_sender_imports_nothing_since_a_fork_meanwhile_would_lock_that_module_for_ever():
    faults = [answer(503, b"", "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT"), answer(200, HTML), cut(Reset),
              cut(HangUp), answer(200, encode(code(500))), answer(200, encode(code(400))), silent,
              answer(301, b"\x1b\xff", "Location: http://e.invalid"), answer(200, BOM + b"{", "Retry-After: 0"),
              answer(200, gzip.compress(code(500)), "Content-Encoding: gzip"), b"HTTP/1.1 103 Hint\r\n\r\n" + answer(404)]
    steps = [step for fault in faults for step in (fault, accept)]

    def check(case):
        certificate, through_a_proxy = case
        with FaultyServer(*steps, certificate=certificate) as server, Proxy() as proxy:
            env = {"https_proxy": proxy.url.replace("//", "//user:secret@"),
                   "http_proxy": server.url.replace("//", "//user:secret@")} if through_a_proxy else {}
            run("", server.url.replace("127.0.0.1", "e.invalid" if through_a_proxy else "localhost"), before="""
                import os, sys, threading                  # and nothing that might hide what is missing
                import analysys
                class Watch:
                    late = []
                    def find_spec(self, name, path=None, target=None):
                        if threading.current_thread().name == "analysys-sender":
                            self.late.append(name)
                sys.meta_path.insert(0, Watch())
                url, context = sys.argv[1], None
                if url.startswith("https"):
                    import ssl
                    context = ssl._create_unverified_context()
                collecter = analysys.BatchCollecter(url, queue_cache_max_size=1, request_timeout=0.3, ssl_context=context)
                tracker = analysys.AnalysysPythonSdk(collecter)
                tracker.setAppId("app")
                tracker.setDebugMode(1)
                for _ in range(12):
                    tracker.track("user", "e")
                    tracker.flush()
                os._exit(1 if Watch.late and sys.stderr.write(str(Watch.late)) else 0)
            """, env=env)
            assert not server.script                       # all faults had their turn
    all_at_once(check, [(certificate, proxy) for certificate in (None, CERTIFICATE) for proxy in (False, True)])


@pytest.mark.usefixtures("each_fork")
@linux_only
def test_a_child_that_closed_all_descriptors_and_opened_others_keeps_these(tmp_path):
    with Server() as server:
        run("""
            collecters = [DefaultCollecter(url), BatchCollecter(url), LogCollecter(folder),
                          BatchCollecter(url, spool_path=os.path.join(folder, "spool"))]
            trackers = [tracker_to(collecter) for collecter in collecters]

            def call(name):
                for tracker in trackers:
                    tracker.track("u", name)
                    tracker.flush()

            def daemon():
                os.closerange(3, 256)
                own = [os.open(os.path.join(folder, "own%d" % n), os.O_CREAT | os.O_RDWR) for n in range(40)]
                files = [os.fstat(fd) for fd in own]
                call("Child")
                assert all(os.path.samestat(os.fstat(fd), file) for fd, file in zip(own, files))
                assert not any(os.fstat(fd).st_size for fd in own)
            call("Parent")
            assert ends_well(child(daemon))
            call("Parent")
        """, server.url, tmp_path)
        assert collections.Counter(one["xwhat"] for one in server.records) == {"Parent": 6, "Child": 3}
        assert sorted(lines_in(tmp_path)) == ["Child", "Parent", "Parent"]


@pytest.mark.usefixtures("each_fork")
@posix_only
@side_by_side(KINDS)
def test_parent_and_child_share_no_connection_and_no_descriptor(kind, tmp_path):
    with FaultyServer() as server:
        run("""
            tracker = tracker_to(%s)
            def send(name):
                tracker.track("user", name)
                tracker.flush()
            def opened():                              # sockets and files of ours
                found = set()
                for number in range(3, 30):
                    try:
                        found.add(os.readlink("/proc/self/fd/%%d" %% number))
                    except OSError:                    # closed, or no Linux
                        pass
                return {link for link in found if link.startswith(("socket:", folder))}
            send("parent")
            parents = opened()
            def work():
                if hasattr(os, "register_at_fork") and not os.environ.get("C_FORK"):
                    assert bool(parents) == os.path.isdir("/proc/self/fd")
                    assert not parents & opened()      # at once; other forks are noticed when it tracks
                send("child")
                send("child")
                assert not [link for link in parents & opened() if link.startswith("socket:")]
            reap(child(work))
            send("parent")
            reap(child(work))
            send("parent")
        """ % kind, server.url, tmp_path)
        assert server.names + lines_in(tmp_path) == ["parent", "child", "child"] * 2 + ["parent"]
        assert server.connections == (0 if "Log" in kind else 3)


@pytest.mark.parametrize("method", ["spawn"] + ["fork", "forkserver"] * hasattr(os, "fork"))
def test_processes_and_closed_pools_of_multiprocessing_deliver_at_their_end(method):
    with FaultyServer() as server:
        run("""
            import multiprocessing
            def work(tracker, name):
                tracker.track("user", name)
            def start(given):
                global tracker
                tracker = given
            def task(name):
                tracker.track("user", name)
            if __name__ == "__main__":
                context = multiprocessing.get_context(%r)
                collecter = waiting()
                tracker = tracker_to(collecter)
                tracker.track("user", "parent0")
                workers = [context.Process(target=work, args=(tracker, "process%%d" %% number)) for number in range(2)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join(20)
                    assert worker.exitcode == 0, worker.exitcode
                pool = context.Pool(2, start, (tracker,))
                pool.map(task, ["pool%%d" %% number for number in range(6)], chunksize=1)
                pool.close()
                pool.join()
                tracker.track("user", "parent1")
                tracker.flush()
                balanced(collecter, accepted=2, delivered=2)
        """ % method, server.url)
        assert sorted(server.names) == sorted(["parent0", "parent1"] + numbered("process", 2) + numbered("pool", 6))


@pytest.mark.parametrize("method", ["spawn"] + ["fork", "forkserver"] * hasattr(os, "fork"))
def test_what_is_tracked_before_a_process_of_multiprocessing_begins_is_delivered_at_its_end(method):
    with FaultyServer() as server:
        done = run("""
            import multiprocessing
            def track(name):                           # in one step, though processes share the output
                tracker.track("user", name)
                os.write(1, (name + "\\n").encode())
            def work(number):
                track("work%%d" %% number)
                if number:                             # a process of a process
                    start(number - 1)
            def start(number):
                worker = multiprocessing.get_context(%r).Process(target=work, args=(number,))
                worker.start()
                worker.join(20)
                assert worker.exitcode == 0, worker.exitcode
            tracker = tracker_to(waiting())
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=lambda: track("forked"))
            track("imported")
            if __name__ == "__main__":
                start(1)
        """ % method, server.url)
        tracked = sorted(done.out.split())
        assert {"imported", "work0", "work1"}.issubset(tracked)
        wait_until(lambda: len(server.names) >= len(tracked))       # a forkserver ends after its last process
        assert sorted(server.names) == tracked


@pytest.mark.skipif(sys.version_info < (3, 7), reason="before, threads end with a process of multiprocessing")
@pytest.mark.parametrize("kind, method", [(KINDS[3], "spawn")] + [(kind, "fork") for kind in ["waiting()", KINDS[4]]])
def test_threads_of_a_process_of_multiprocessing_track_until_their_own_end(kind, method, tmp_path):
    with FaultyServer() as server:
        run("""
            import multiprocessing
            def late():
                threading.main_thread().join(20)       # the process is ending
                if sys.version_info < (3, 13):         # whose exit hooks come after the threads; before, nothing waits
                    wait_until(lambda: tracker.sink.stats()["delivered"])
                tracker.track("user", "late")
                threading.Thread(target=tracker.track, args=("user", "later")).start()
            def work():
                global tracker
                tracker = tracker_to(%s)
                tracker.track("user", "early")
                threading.Thread(target=late).start()
            if __name__ == "__main__":
                worker = multiprocessing.get_context(%r).Process(target=work)
                worker.start()
                worker.join(30)
                assert worker.exitcode == 0, worker.exitcode
        """ % (kind, method), server.url, tmp_path)
        assert server.names + lines_in(tmp_path) == ["early", "late", "later"]


@posix_only
def test_a_process_of_multiprocessing_ends_with_its_threads_also_where_its_parent_and_copies_of_the_module_tracked():
    with FaultyServer() as server:
        run("""
            import importlib.util, multiprocessing.util
            spec = importlib.util.spec_from_file_location("vendored", analysys.__file__)
            copy = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(copy)
            trackers = [module.AnalysysPythonSdk(module.BatchCollecter(url)) for module in (analysys, copy)]
            def track(name):
                for tracker in trackers:
                    tracker.setAppId("app")
                    tracker.track("user", name)
                    tracker.flush(20)
            def work():
                track("child")
                threading.Thread(target=late).start()
            def late():
                threading.main_thread().join()         # the process is ending
                if [thread.name for thread in threading.enumerate()].count(analysys._WAITER) > len(trackers):
                    os._exit(3)                        # one of a copy tells all that is left
            track("parent")
            worker = multiprocessing.get_context("fork").Process(target=work)
            worker.start()
            worker.join(30)
            status = worker.exitcode
            worker.terminate()
            assert status == 0, status
        """, server.url)
        assert server.names == ["parent"] * 2 + ["child"] * 2


# ---------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------

def test_an_import_loads_nothing_that_only_http_the_receiver_or_the_command_line_needs():
    script = """if 1:
        import sys
        sys.path.insert(0, sys.argv[1])
        import analysys, threading
        heavy = "argparse http http.client http.server logging socket socketserver ssl urllib.request".split()
        print([name for name in heavy if name in sys.modules], threading.active_count())"""
    done = python("-I", "-S", "-c", script, os.path.dirname(SOURCE))
    assert (done.out, done.err) == ("[] 1\n", "")


@side_by_side(["ssl", "fcntl msvcrt", "zlib", "threads"])
def test_what_a_python_lacks_is_missed_only_by_what_needs_it(missing, folder):
    script = """if 1:
        import sys
        for name in sys.argv[3:]:
            sys.modules[name] = None
        if "threads" in sys.argv:
            import _thread
            def refuse(*arguments, **keywords):
                raise RuntimeError("can't start new thread")
            _thread.start_new_thread = _thread.start_joinable_thread = refuse
        sys.path.insert(0, sys.argv[1])
        from analysys import *
        sdk = AnalysysPythonSdk(DefaultCollecter(sys.argv[2]))
        sdk.setAppId("app")
        sdk.track("u", "Event", {"n": 1})
        if "ssl" in sys.argv:
            try:
                DefaultCollecter("https://127.0.0.1:1").uploadData({})
            except AnalysysPythonSdkException as error:
                print(error)"""
    with Server() as server:
        done = python("-I", "-S", "-c", script, os.path.dirname(SOURCE), server.url, *missing.split())
        assert (done.status, done.err) == (0, "")
        assert numbers(server.records) == [1]
        assert (server.requests[0].body[:1] == b"[") == (missing == "zlib")
    assert ("ssl" in done.out.lower()) == (missing == "ssl")


@side_by_side(["renamed.py", "package/inside.py", "archive.zip"])
def test_the_file_works_under_another_name_in_a_package_and_from_a_zip(name, tmp_path):
    if name.endswith(".zip"):
        with zipfile.ZipFile(str(tmp_path / name), "w") as archive:
            archive.write(SOURCE, "analysys.py")
        place, module = tmp_path / name, "analysys"
    else:
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__init__.py").write_text("")
        shutil.copy(SOURCE, str(tmp_path / name))
        place, module = tmp_path, name[:-3].replace("/", ".")
    script = """if 1:
        import importlib, sys
        sys.path.insert(0, sys.argv[1])
        module = importlib.import_module(sys.argv[2])
        try:
            module.AnalysysPythonSdk(None).setAppId("")
        except module.AnalysysPythonSdkIllegalDataException:
            sys.exit(module.main(["--version"]) or module.main(["demo"]))"""
    done = python("-I", "-S", "-OO", "-c", script, place, module)
    assert (done.status, done.err) == (0, "")
    assert digest() in done.out and done.out.count("SearchCommodity") >= 3


def test_the_text_works_where_it_has_no_file_as_in_a_notebook_or_a_frozen_program(tmp_path):
    with FaultyServer() as server:
        script = """if 1:
            import sys
            names = {"__name__": "pasted"}
            exec(open(sys.argv[1], encoding="utf-8").read(), names)
            for kind in "DefaultCollecter", "BatchCollecter", "LogCollecter":
                tracker = names["AnalysysPythonSdk"](names[kind](sys.argv[2 + (kind == "LogCollecter")]))
                tracker.setAppId("app")
                tracker.setDebugMode(2)
                tracker.track("user", kind)
                tracker.close()"""
        done = python("-c", script, SOURCE, server.url, tmp_path)
        sent = ["DefaultCollecter", "BatchCollecter"]
        assert (done.status, server.names, lines_in(tmp_path)) == (0, sent, ["LogCollecter"]), done
        assert re.findall("record .*xwhat.:.([A-Za-z]+)", done.err) == sent + ["LogCollecter"]


# ---------------------------------------------------------------------------
# The receiver
# ---------------------------------------------------------------------------

def post(url, body, method="POST", path="/up", **headers):
    """Return the answer's HTTP status and JSON value, None if it is none."""
    connection = http.client.HTTPConnection(url.split("//")[1].split("/")[0], timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    try:
        return response.status, decode(data)
    except (ValueError, OSError, EOFError):
        return response.status, None


def changed(change, xwhat="Event"):
    """Return a record with this changed, in xcontext where the name is not one of the record's own."""
    one = record("u", xwhat)
    for name, value in change.items():
        (one if name in one else one["xcontext"])[name] = value
    return one


BAD_RECORDS = [changed(change) for change in [
    {"appid": ""}, {"appid": "x" * 256}, {"appid": None}, {"xwho": ""}, {"xwho": "x" * 255}, {"xwho": 1},
    {"xwhat": "1st"}, {"xwhat": ""}, {"xwhat": "x" * 100}, {"xwhat": None}, {"xwhen": 10 ** 12 - 1},
    {"xwhen": 10 ** 13}, {"xwhen": True}, {"xwhen": "1532514947857"}, {"xwhen": 1532514947857.5}, {"xcontext": []},
    {"a": None}, {"a": {}}, {"a": "x" * 256}, {"a": 2 ** 63}, {"a": float("nan")}, {"a": [1]}, {"a": ["x" * 256]},
    {"a": ["x"] * 101}, {"a-b": 1}, {"1a": 1}, {"x" * 100: 1}, {"a": 1, "A": 1}, {"$platform": 1}, {"$is_login": 1},
    {"$debug": 3}, {"$debug": "1"}]]
BAD_RECORDS += [changed({"a": "1"}, "$profile_increment"), changed({"a": 1}, "$profile_append"),
                changed({"$original_id": ""}, "$alias"), changed({}, "$alias"), changed({"$lib": 1}), changed({"$lib_version": 1}),
                changed(many(201)), "record", None, []]


@table("encoded", [False, True])
def test_the_receiver_takes_plain_and_encoded_bodies_and_keeps_the_records(encoded):
    batch = [record("u", "Event", {"name": "跑步机"}), record("u", "$profile_unset", {"a": ""}),
             record("u", "$alias", {"$original_id": "d"}, is_login=True), record("u", "$profile_delete")]
    with analysys.Receiver() as server:
        assert server.url.startswith("http://127.0.0.1:") and server.records == []
        status, value = post(server.url, encode(batch) if encoded else json.dumps(batch).encode())
        assert 200 <= status < 300 and value["code"] == 200
        assert server.records == batch


def test_the_receiver_refuses_a_batch_with_one_bad_record_and_keeps_nothing_of_it():
    with analysys.Receiver() as server:
        for bad in BAD_RECORDS:
            _, value = post(server.url, encode([record("u", "Event"), bad]))
            assert value["code"] == 400, bad
        assert server.records == []
        with pytest.raises(IllegalData):
            DefaultCollecter(server.url).uploadData(BAD_RECORDS[0])
        assert server.records == []


@table("body", [b"", b"[", b"{}", b"not JSON", b"\xff", encode(b"not JSON"), encode([])[:-9],
                b"[" * 10 ** 5, base64.b64encode(b"not gzip")])
def test_the_receiver_takes_no_body_that_it_does_not_understand(body):
    with analysys.Receiver() as server:
        status, value = post(server.url, body)
        assert not (200 <= status < 300 and (value or {}).get("code") == 200)
        assert server.records == []
        assert post(server.url, encode([record("u", "Event")]))[1]["code"] == 200


def test_the_receiver_takes_posts_to_up_only():
    with analysys.Receiver() as server:
        for method, path in [("GET", "/up"), ("PUT", "/up"), ("POST", "/"), ("POST", "/elsewhere")]:
            status, value = post(server.url, encode([record("u", "Event")]), method, path)
            assert status >= 400 and (value or {}).get("code") != 200
        assert server.records == []


def test_the_receiver_bounds_a_body_and_its_decompressed_size():
    bomb = gzip.compress(b"[" + b" " * (1 << 26) + json.dumps(record("u", "Event")).encode() + b"]", 1)
    with analysys.Receiver() as server:
        assert (post(server.url, base64.b64encode(bomb))[1] or {}).get("code") != 200
        assert post(server.url, None, **{"Content-Length": str(10 ** 12)})[0] >= 400      # and none of them sent
        assert server.records == []


def dial(url):
    host, port = url.split("//")[1].split(":")
    return socket.create_connection((host, int(port)), 10)


def exchange(url, *pieces, pause=0.0):
    """Send *pieces* over a connection of their own; return what came back until the server hung up, or for 10 s."""
    with dial(url) as client:
        for piece in pieces:
            client.sendall(piece)
            threading.Event().wait(pause)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def request_of(body, *headers, method="POST", path="/up"):
    lines = ["%s %s HTTP/1.1" % (method, path)] + list(headers) + ["", ""]
    return "\r\n".join(lines).encode() + body


def status_of(reply):
    return int(reply.split()[1]) if reply else None


ONE = json.dumps([record("u", "Event")]).encode()
LENGTH = "Content-Length: %d" % len(ONE)


@table("headers, expected", [
    (["Content-Length: \u00b2"], 400), (["Content-Length: " + "9" * 5000], 400), (["Content-Length: -1"], 400),
    (["Content-Length: +5"], 400), (["Content-Length: 5 5"], 400), (["Content-Length: 0x5"], 400),
    (["Content-Length:"], 400), ([LENGTH, LENGTH], 400), ([LENGTH, "Content-Length: 0"], 400), ([], 411),
    (["Transfer-Encoding: chunked"], 411), ([LENGTH, "Transfer-Encoding: chunked"], 411),
    (["Content-Length: %d" % (len(ONE) + 1)], 400), (["Content-Length: 999999999"], 413),
    ([LENGTH, " folded: line"], 400), ([LENGTH, "no colon"], 400), ([LENGTH, "X: a\nTransfer-Encoding: chunked"], 400),
    ([LENGTH, "X: a\rContent-Length: 0"], 400), ([LENGTH, "X: \0"], 400), ([LENGTH + " "], 200), (["Content-Length : 5"], 400), ([LENGTH, "X: " + "x" * 70000], 431), ([LENGTH], 200)])
def test_a_request_has_one_length_in_plain_digits_and_all_of_its_body(headers, expected):
    with analysys.Receiver() as server:
        assert status_of(exchange(server.url, request_of(ONE, *headers))) == expected
        assert len(server.records) == (expected == 200)


def test_a_chunked_body_is_refused_and_nothing_in_it_is_taken_for_a_request():
    hidden = request_of(ONE, LENGTH)
    with analysys.Receiver() as server:
        for headers in ["Transfer-Encoding: chunked"], ["transfer-encoding: x", LENGTH], ["Transfer-Encoding: chunked", LENGTH]:
            reply = exchange(server.url, request_of(b"0\r\n\r\n" + hidden, *headers))
            assert re.findall(rb"HTTP/1.1 (\d+)", reply) == [b"411"] and b"Content-Length is needed" in reply
        assert server.records == []


def test_a_client_that_speaks_tls_to_a_plain_port_is_told_at_once():
    with analysys.Receiver() as server:
        assert status_of(exchange(server.url, b"\x16\x03\x01\x02\x00\x01\x00\x01")) == 400


def test_requests_share_a_connection_also_in_one_packet_and_with_100_continue():
    with analysys.Receiver() as server:
        reply = exchange(server.url, request_of(ONE, LENGTH) * 2 + request_of(b"", LENGTH, "Expect: 100-continue"), ONE,
                         pause=0.1)
        assert re.findall(rb"HTTP/1.1 (\d+)", reply) == [b"200", b"200", b"100", b"200"]
        assert len(server.records) == 3


def test_an_empty_line_in_front_of_a_request_is_passed_over():
    with analysys.Receiver() as server:
        request = request_of(ONE, LENGTH)
        reply = exchange(server.url, b"\r\n" + request, b"\r", b"\n\r\n", request + b"\r\n" + request, b"\r\n", pause=0.1)
        assert re.findall(rb"HTTP/1.1 (\d+)", reply) == [b"200"] * 3


def test_a_client_that_never_stops_sending_is_drained_for_a_second(monkeypatch):
    clock = FakeClock(monkeypatch)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"x" * 65536)
        monkeypatch.setattr(clock, "now", lambda: clock.advance(0.4) or clock.ahead)
        analysys._Connection(None, ours)._drain()
        assert ours.recv(1)


def test_slow_clients_are_timed_out_whatever_they_drip(monkeypatch):
    monkeypatch.setattr(analysys, "_CLIENT_TIMEOUT", 0.3)
    monkeypatch.setattr(analysys, "_IDLE_TIMEOUT", 0.3)

    def drip(pieces):
        with dial(server.url) as client, within(9):
            with contextlib.suppress(OSError):
                for piece in pieces:
                    client.sendall(piece)
                    threading.Event().wait(0.05)
                client.recv(1)
    with analysys.Receiver() as server:
        all_at_once(drip, [[b"P"] * 99, [request_of(ONE, LENGTH)[:-9]] + [b" "] * 8, []])
        assert server.records == []


def test_what_is_there_is_taken_however_late_the_receiver_is():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = analysys._Connection(None, ours)
        theirs.sendall(b"x")
        assert connection._receive(time.monotonic() - 9)
        with pytest.raises(OSError):
            connection._receive(time.monotonic() - 9)


def test_many_clients_that_come_at_once_are_all_answered():
    with analysys.Receiver() as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(server.url)) for _ in range(120)]
        for client in clients:
            client.sendall(request_of(ONE, LENGTH))
        assert {status_of(client.recv(4096)) for client in clients} == {200}
        assert len(server.records) == 120


def test_clients_that_never_end_their_heads_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(analysys, "_MAX_CONNECTIONS", 9)  # so some of these are left whatever posts are not quite over
    with analysys.Receiver() as server, contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(dial(server.url))
            client.sendall(b"POST /up HTTP/1.1\r\nX: ")
            wait_until(lambda: any(one._buffer for one in list(server._listener._connections)))
        for _ in range(8):
            assert post(server.url, ONE) == (200, {"code": 200})


@linux_only
def test_clients_that_take_all_descriptors_keep_nobody_out():
    command = ["sh", "-c", 'ulimit -n 40; exec "$0" "$1" serve --port 0', sys.executable, SOURCE]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as started, contextlib.ExitStack() as stack:
        try:
            url = started.stdout.readline().decode().split()[-1]
            assert post(url, ONE) == (200, {"code": 200})      # whose modules are loaded now
            for _ in range(60):
                stack.enter_context(dial(url))
            assert post(url, ONE) == (200, {"code": 200})
        finally:
            started.terminate()


def test_whose_request_is_at_work_is_not_hung_up_on_to_make_room():
    with analysys.Receiver() as server, dial(server.url) as client:
        with server._arrived:
            client.sendall(request_of(ONE, LENGTH))
            wait_until(lambda: [one.idle_since for one in list(server._listener._connections)] == [float("inf")])
            server._listener._make_room()
        assert status_of(client.recv(4096)) == 200


def test_beyond_the_bytes_held_at_once_bodies_wait_unread_but_for_the_oldest(monkeypatch):
    assert analysys._MAX_HELD == 64 << 20              # in earnest
    monkeypatch.setattr(analysys, "_MAX_HELD", 100000)
    large = b"[" + b" " * 150000 + ONE[1:]
    head = request_of(b"", "Content-Length: %d" % len(large))
    with analysys.Receiver() as server, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(dial(server.url)) for _ in "12")
        for start in range(0, 1000, 100):              # small packets count as what they are
            first.sendall((head + large)[start:start + 100])
            threading.Event().wait(0.001)
        wait_until(lambda: 1000 - len(head) in [len(one._buffer) for one in list(server._listener._connections)])
        assert server._listener.bodies._held <= 1000 + 16384
        first.sendall((head + large)[1000:len(head) + 120000])
        wait_until(lambda: server._listener.bodies._held >= 100000)
        second.sendall(head + large)
        second.settimeout(0.3)
        with pytest.raises(socket.timeout):            # it waits
            second.recv(1)
        assert server._listener.bodies._held <= 150000 + 3 * 16384
        first.sendall(large[120000:])
        second.settimeout(10)
        assert [status_of(client.recv(4096)) for client in (first, second)] == [200, 200]
        wait_until(lambda: server._listener.bodies._held == 0)


def test_a_refusal_names_record_field_and_rule():
    with analysys.Receiver() as server:
        batch = [record("u", "Event"), changed({"a": None}), record("u", "Event")]
        status, told = post(server.url, encode(batch))
        assert (status, told["code"]) == (200, 400)
        assert told["msg"].startswith("record 2 of 3: ") and "'a'" in told["msg"] and "None" in told["msg"]
        for digits in "1" * 1200, 10 ** 1200:
            told = post(server.url, json.dumps([changed({"a": digits})]).encode())[1]["msg"]
            assert told.startswith("record 1 of 1: ") and "'a'" in told
        half = json.dumps([record("u", "Event"), dict(record("u", "Event"), extra="\ud800")]).encode()    # of a character
        assert post(server.url, half)[1]["msg"].startswith("record 2 of 2: ")
        for body in (b"{}", gzip.compress(ONE), b"data=" + ONE, ONE + b"x", b"[NaN]", b'["\xe9"]', b"[]", encode({"a": 1}),
                     b"[" * 10 ** 5):
            assert "array of records, plain or as base64 of gzip" in post(server.url, body)[1]["msg"]


@table("body, status", [(b"[" + b"9" * 10 ** 6 + b"]", 200), (b"[" + b",".join([b"9" * 999] * 20000) + b"]", 200),
                        (b"[" + b"[]," * 10 ** 6 + b"[]]", 413),
                        (b"[" + b'{"a":' * 10 ** 5 + b"1" + b"}" * 10 ** 5 + b"]", 200)])
def test_no_body_takes_long_or_much_memory(body, status):
    with analysys.Receiver() as server:
        start = time.monotonic()
        found = post(server.url, encode(body))
        assert (found[0], found[1]["code"]) == (status, 413 if status == 413 else 400)
        assert time.monotonic() - start < 20 and server.records == []


@posix_only
def test_a_forked_child_that_closes_a_receiver_leaves_it_to_its_parent():
    with analysys.Receiver() as server:
        pid = os.fork()
        if not pid:
            try:
                server.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert post(server.url, ONE) == (200, {"code": 200})


def test_wait_for_returns_the_records_once_they_are_there_and_clear_begins_anew():
    with analysys.Receiver() as server:
        threading.Timer(0.05, post, (server.url, encode([record("u", "A"), record("u", "B")]))).start()
        assert server.wait_for(2) == server.records == [record("u", "A"), record("u", "B")]
        server.clear()
        assert server.records == []
        with pytest.raises(TimeoutError):
            server.wait_for(1, timeout=0.01)
        post(server.url, ONE)
        assert len(server.wait_for(1)) == 1


def test_wait_for_is_woken_by_what_arrives():
    with analysys.Receiver() as server:
        waiting = threading.Thread(target=server.wait_for, args=(1, None), daemon=True)
        waiting.start()
        wait_until(lambda: server._arrived._waiters)
        post(server.url, ONE)
        waiting.join(20)
        assert not waiting.is_alive()


@table("options, status, code", [({}, 500, 500), ({"status": 503}, 503, 503), ({"code": 403}, 200, 403),
                                 ({"status": 413, "code": 400}, 200, 400)])
def test_fail_next_fails_that_many_posts_and_keeps_nothing_of_them(options, status, code):
    with analysys.Receiver() as server:
        server.fail_next(2, **options)
        for _ in "12":
            found = post(server.url, ONE)
            assert (found[0], found[1]["code"]) == (status, code)
        assert server.records == []
        assert post(server.url, ONE) == (200, {"code": 200})
        server.fail_next(10 ** 9)
        server.clear()
        assert post(server.url, ONE) == (200, {"code": 200})


@table("status", [204, 304])
def test_what_may_have_no_body_has_none(status):
    with analysys.Receiver() as server:
        server.fail_next(1, status)
        first, second, body = exchange(server.url, request_of(ONE, LENGTH) * 2).split(b"\r\n\r\n")
        assert (status_of(first), second[:12], body) == (status, b"HTTP/1.1 200", b'{"code": 200}')


def test_failures_to_come_come_in_the_order_in_which_they_were_asked_for():
    with analysys.Receiver() as server:
        for arguments in (1, 500), (2, 503), (1, 200, 401):
            server.fail_next(*arguments)
        assert [post(server.url, ONE)[1]["code"] for _ in "12345"] == [500, 503, 503, 401, 200]


@table("arguments", [(0,), (-1,), ("1",), (1, 199), (1, 600), (1, "500"), (1, 500, "400"), (True,), (1, None)])
def test_fail_next_refuses_what_no_server_could_do(arguments):
    with analysys.Receiver() as server, pytest.raises(IllegalData):
        server.fail_next(*arguments)


def test_a_receiver_takes_records_without_with_and_ends_with_its_connections():
    server = analysys.Receiver()
    with dial(server.url) as client:
        client.sendall(request_of(ONE, LENGTH))
        assert status_of(client.recv(4096)) == 200
        start = time.monotonic()
        server.close()
        assert client.recv(1) == b"" and time.monotonic() - start < 8
    server.close()                                     # idempotent
    with pytest.raises(OSError):
        dial(server.url)


def test_a_receiver_says_where_it_cannot_listen():
    with analysys.Receiver() as server, pytest.raises(analysys.AnalysysPythonSdkException) as caught:
        analysys.Receiver(port=int(server.url.split(":")[2]))
    assert "127.0.0.1" in str(caught.value) and server.url.split(":")[2] in str(caught.value)


HOST = "127.0.0.1:1"
FOREIGN = [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://" + HOST}, {"Origin": ""},
           {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://localhost:1"},
           {"Host": "rebound.example", "Origin": "http://rebound.example"},
           {"Host": "rebound.example", "Sec-Fetch-Site": "same-origin"},
           {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, {"Origin": "http://" + HOST + "@evil.example"}]


@table("headers", FOREIGN)
def test_pages_of_another_origin_may_not_post(headers):
    with analysys.Receiver() as server:
        sent = {"Host": HOST, **headers, "Content-Length": str(len(ONE))}
        lines = ["%s: %s" % header for header in sent.items()]
        told = exchange(server.url, request_of(ONE, *lines))
        assert status_of(told) == 403 and b"--cors" in told
        assert server.records == []


@table("headers", [{}, {"Host": HOST}, {"Host": "any.example"}, {"Host": HOST, "Origin": "http://" + HOST},
                   {"Host": "[::1]:80", "Origin": "http://[::1]:80", "Sec-Fetch-Site": "same-origin"},
                   {"Host": HOST, "Sec-Fetch-Site": "none"}])
def test_sdks_may_post_under_any_host_name_or_none(headers):
    with analysys.Receiver() as server:
        lines = ["%s: %s" % header for header in headers.items()]
        assert status_of(exchange(server.url, request_of(ONE, LENGTH, *lines))) == 200


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------

def digest():
    with open(SOURCE, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def test_demo_shows_all_records_three_times_from_a_folder_that_holds_the_file_alone(tmp_path):
    def demo(case):
        options, environment = case
        done = python(*(options + ["analysys.py", "demo"]), cwd=tmp_path, **environment)
        assert (done.status, done.err) == (0, "")
        for xwhat in "SearchCommodity", "register", "$alias", "$profile_set", "purchase", "payment":
            assert len(re.findall(r"(?<!\w)" + re.escape(xwhat) + r"\b", done.out)) >= 3
        for word in "time", "who", "what", "platform", "login", "properties", "sent", "received":
            assert word in done.out.lower()
        assert "ABCD123456" in done.out and "zhangsan" in done.out and "JS" in done.out and "\nnext: " in done.out
    shutil.copy(SOURCE, str(tmp_path))
    all_at_once(demo, [(["-I", "-S", "-OO"], {"LC_ALL": "C"}), ([], {"PYTHONIOENCODING": "ascii", "http_proxy": URL})])
    assert os.listdir(str(tmp_path)) == ["analysys.py"]


def test_a_demo_of_which_a_record_does_not_arrive_says_so_and_is_2(monkeypatch, capsys):
    monkeypatch.setattr(DefaultCollecter, "stats", lambda self: {"accepted": 7})
    assert analysys.main(["demo"]) == 2
    assert re.search("(✗|NO) DefaultCollecter +7 sent, 6 received", capsys.readouterr().out)


def test_no_arguments_print_the_help_with_or_without_docstrings():
    plain, stripped = python("-m", "analysys"), python("-I", "-S", "-OO", SOURCE)
    assert (plain.status, plain.err) == (stripped.status, stripped.err) == (0, "")
    assert "demo" in plain.out and plain.out == stripped.out


@table("arguments, defaults", [
    (["serve"], {"host": "127.0.0.1", "port": 4089}), (["upload", "a"], {"batch": 20000, "request_timeout": 10}),
    (["check", "--server", "a", "--app-id", "b"], {"request_timeout": 10})])
def test_options_have_the_defaults_that_the_readme_tells(arguments, defaults):
    given = vars(analysys._parser().parse_args(arguments))
    assert {name: given[name] for name in defaults} == defaults


def test_version_tells_the_version_the_files_sha_256_and_the_python(capsys):
    assert analysys.main(["--version"]) == 0
    printed = capsys.readouterr().out
    for word in analysys.__version__, digest(), platform.python_version():
        assert word in printed


@posix_only
def test_the_sha_256_of_what_came_out_of_a_pipe_is_unknown(tmp_path):
    path = tmp_path / "pipe.py"
    os.mkfifo(str(path))
    with launch(path, "--version") as started:
        with path.open("wb") as pipe:
            pipe.write(pathlib.Path(SOURCE).read_bytes())
        assert "SHA-256 unknown" in ended_well(started).out


@table("arguments", [["nonsense"], ["--nonsense"], ["demo", "nonsense"], ["demo", "--nonsense"]])
def test_wrong_usage_ends_with_64_and_one_sentence(capsys, arguments):
    assert analysys.main(arguments) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.strip() and printed.err.strip().count("\n") == 0


@table("option, value, rule", [("--port", "65536", "a port from 0 to 65535"), ("--port", "²", "a port from 0 to 65535")])
def test_a_value_that_breaks_a_rule_is_told_the_rule(capsys, option, value, rule):
    assert analysys.main(["serve", option, value]) == 64
    assert capsys.readouterr().err == "analysys serve: error: argument %s: it must be %s, not '%s'\n" % (option, rule, value)


@table("error", [MemoryError(), KeyError("key"), BaseException("any"), SystemExit(1)])
def test_whatever_goes_wrong_is_one_sentence_and_2(capsys, monkeypatch, error):
    def fail(arguments):
        raise error
    monkeypatch.setattr(analysys, "_demo", fail)
    assert analysys.main(["demo"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and type(error).__name__ in printed.err


@posix_only
@table("environment, is_terminal, expected", [
    ({"TERM": "xterm"}, True, True), ({"TERM": "xterm"}, False, False), ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
    ({"TERM": "dumb"}, True, False)])
def test_colours_are_for_a_terminal_and_no_color_is_kept(monkeypatch, environment, is_terminal, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    line = analysys._event_text(None, "refused", 80)
    monkeypatch.undo()
    assert ("\x1b" in line) is expected


def test_ctrl_c_is_one_sentence_however_early_it_comes(capsys):
    def arguments():
        raise KeyboardInterrupt
        yield
    assert analysys.main(arguments()) == 2
    assert capsys.readouterr() == ("", "analysys: it was stopped\n")


# ---------------------------------------------------------------------------
# The command line: serve
# ---------------------------------------------------------------------------

Site = collections.namedtuple("Site", "url process lines")


@contextlib.contextmanager
def serving(*options, status=0):
    """Run `serve` as a process on a free port; yield its address, the process and what it printed; end it by SIGTERM."""
    with launch("-m", "analysys", "serve", "--port", "0", *options) as started:
        first = started.stdout.readline().decode()
        assert first.startswith("serving on http"), (first, started.stderr.read())
        site = Site(first.split()[-1], started, [])
        yield site
        if started.poll() is None:
            started.terminate()
        out, err = started.communicate()
        site.lines.extend(out.decode().splitlines())
        site.lines.append(err.decode())
        assert started.returncode in (status, -signal.SIGKILL), err


@contextlib.contextmanager
def site(**options):
    """Yield a site of this process, with what it needs of `serve`."""
    names = dict({"host": "127.0.0.1", "port": 0, "allow_host": [], "cors": []}, **options)
    made = analysys._Site(types.SimpleNamespace(**names), None)
    try:
        yield made
    finally:
        made.close()


def ask(url, path, method="GET", body=b"", *headers):
    """Return status, headers and body of an answer to a request of a page, or as it is, with *headers*."""
    lines = list(headers) if any(h.startswith("Host") for h in headers) else ["Host: 127.0.0.1:1"] + list(headers)
    reply = exchange(url, request_of(body, "Content-Length: %d" % len(body), *lines, method=method, path=path))
    head, _, payload = reply.partition(b"\r\n\r\n")
    return status_of(head), head.decode(), payload


def seen(url, after=0):
    status, head, body = ask(url, "/api/events?after=%d" % after)
    assert status == 200 and "ndjson" in head
    return [json.loads(line) for line in body.decode().splitlines()]


def test_events_are_numbered_lines_with_the_reason_of_what_was_refused():
    start = time.time()
    with site() as server:
        assert post(server.url, encode([record("u", "A"), record("u", "B", {"n": 2 ** 63 - 1})]))[1]["code"] == 200
        assert post(server.url, encode([record("u", "C"), changed({"a": None}), record("u", "D")]))[1]["code"] == 400
        for body in b"[]", b"{}", b"[1]", b"\xff", b"":
            assert post(server.url, body)[1]["code"] == 400
        found = seen(server.url)
        assert [event["record"] and event["record"]["xwhat"] for event in found] == ["A", "B", "C", "Event", "D"] + [None] * 5
        assert found[1]["record"] == record("u", "B", {"n": 2 ** 63 - 1})
        reasons = [event["reason"] for event in found]
        assert reasons[:3] == [None, None, "refused with record 2"] == [None, None, reasons[4]]
        assert reasons[3].startswith("record 2 of 3: ") and all(reasons[5:])
        assert [sorted(event) for event in found] == [["n", "reason", "received", "record"]] * 10
        assert [event["n"] for event in found] == list(range(found[0]["n"], found[0]["n"] + 10))
        assert found[0]["n"] > start * 1e6 - 1 and abs(found[0]["received"] / 1000 - start) < 10
        assert seen(server.url, found[7]["n"]) == found[8:] and seen(server.url, found[9]["n"]) == []
        assert ask(server.url, "/api/events?after=x")[0] == 400


def test_the_last_thousand_events_are_kept_and_all_are_counted():
    with site() as server:
        post(server.url, encode([record("u", "Event", {"n": n}) for n in range(1500)]))
        post(server.url, encode([record("u", "Event", {"n": n}) for n in range(1500, 1600)]))
        assert numbers(event["record"] for event in seen(server.url)) == list(range(600, 1600))
        assert json.loads(ask(server.url, "/api/inventory")[2].decode())["accepted"] == 1600


@table("hostile", ['"\\ud800"', '{"a":"\\ud800"}', "9" * 400])
def test_whatever_a_refused_record_holds_its_event_is_json(hostile):
    with site() as server:
        body = json.dumps([changed({"a": "HERE"})]).replace('"HERE"', hostile).encode()
        assert post(server.url, body)[1]["code"] == 400
        event, = seen(server.url)
        assert event["reason"] and event["record"]["xwhat"] == "Event"


def test_the_inventory_counts_events_properties_types_and_conflicts_of_what_was_accepted():
    with site() as server:
        post(server.url, encode([record("u", "A", {"n": 1, "s": "x"}), record("u", "B", {"N": "1"})]))
        post(server.url, encode([changed({"a": None})]))
        found = json.loads(ask(server.url, "/api/inventory")[2].decode())
        assert found["events"]["A"] == {"count": 1, "properties": {
            "n": {"types": {"number": 1}, "example": 1}, "s": {"types": {"string": 1}, "example": "x"}}}
        assert found["conflicts"] == [{"kind": "event", "property": "n", "types": {"number": 1, "string": 1},
                                       "spellings": ["N", "n"]}]
        assert (found["accepted"], found["refused"], found["cut"]) == (2, 1, False)


def test_an_inventory_has_first_values_shortened_an_alias_among_events_and_no_properties_of_the_platform_or_unset():
    with site() as server:
        post(server.url, encode([
            record("u", "$alias", {"$original_id": "d", "n": 1}), record("u", "A", {"n": "first" + "x" * 250}),
            record("u", "A", {"n": "second", "$importFlag": 1}), record("u", "$profile_set", {"n": True}),
            record("u", "$profile_unset", {"n": ""})]))
        found = json.loads(ask(server.url, "/api/inventory")[2].decode())
        example = found["events"]["A"]["properties"]["n"]["example"]
        assert example.startswith("firstx") and len(example) < 100
        assert {name: list(event["properties"]) for name, event in found["events"].items()} == {
            "$alias": ["n"], "A": ["n"], "$profile_set": ["n"], "$profile_unset": []}
        assert [(one["kind"], one["types"]) for one in found["conflicts"]] == [("event", {"number": 1, "string": 2})]


def test_delete_forgets_events_inventory_and_failures_and_the_number_still_grows():
    with site() as server:
        post(server.url, encode([record("u", "Old")]))
        post(server.url, encode([{}]))
        before = seen(server.url)[-1]["n"]
        assert ask(server.url, "/api/fail", "POST", b'{"number":3,"status":503,"code":null}')[0] == 204
        assert post(server.url, ONE)[0] == 503
        status, head, body = ask(server.url, "/api/events", "DELETE")
        assert (status, body) == (204, b"") and "Content-Length" not in head
        assert seen(server.url) == [] and post(server.url, ONE)[0] == 200
        found = json.loads(ask(server.url, "/api/inventory")[2].decode())
        assert (found["accepted"], found["refused"]) == (1, 0) and "Old" not in found["events"]
        assert seen(server.url)[0]["n"] > before


def test_post_fail_is_fail_next():
    with site() as server:
        assert ask(server.url, "/api/fail", "POST", b'{"code":500}')[0] == 204
        assert (post(server.url, ONE), post(server.url, ONE)[1]) == ((200, {"code": 500, "msg": "it was told to fail"}),
                                                                     {"code": 200})
        for body in b"[]", b'{"number":0}', b'{"status":99}', b'{"other":1}', b"x":
            assert ask(server.url, "/api/fail", "POST", body)[0] == 400
        assert len(seen(server.url)) == 1


@contextlib.contextmanager
def streaming(url, *headers):
    """Yield a function that returns what a stream has sent once *condition* holds for it."""
    with dial(url) as client:
        client.sendall(request_of(b"", "Host: localhost", *headers, method="GET", path="/api/stream"))
        received = bytearray()

        def until(condition):
            client.settimeout(0.05)
            def come():
                with contextlib.suppress(socket.timeout):
                    received.extend(client.recv(1 << 16))
                return condition(bytes(received))
            wait_until(come)
            return bytes(received)
        until.client = client
        yield until


def test_a_stream_sends_each_event_once_and_goes_on_after_the_last_that_was_seen(monkeypatch):
    assert analysys._ALIVE_EVERY == 15                 # in earnest
    monkeypatch.setattr(analysys, "_ALIVE_EVERY", 0.1)
    with site() as server:
        post(server.url, ONE)
        with streaming(server.url) as until:
            until(lambda sent: sent.count(b"\nid: ") == 1)
            post(server.url, encode([record("u", "A"), record("u", "B")]))
            sent = until(lambda sent: sent.count(b"\nid: ") == 3)
            assert b"text/event-stream" in sent and b"\r\nX-Accel-Buffering: no\r\n" in sent and b"\r\n\r\nretry: " in sent
            lines = re.findall(rb"(?<=\n)id: (\d+)\ndata: (.*)\n", sent)
            assert [json.loads(line.decode()) for _, line in lines] == seen(server.url)
            assert [int(number) for number, _ in lines] == [event["n"] for event in seen(server.url)]
            until(lambda sent: b"\n:\n\n" in sent)         # a comment, that it is alive
        with streaming(server.url, "Last-Event-ID: " + lines[1][0].decode()) as until:
            sent = until(lambda sent: b"\nid: " in sent)
            assert re.findall(rb"\nid: (\d+)\n", sent) == [lines[2][0]]
            ask(server.url, "/api/events", "DELETE")
            until(lambda sent: b"\nevent: clear\ndata" in sent)
        with streaming(server.url, "Last-Event-ID: " + lines[2][0].decode()) as until:
            until(lambda sent: b"\nevent: clear\ndata" in sent)      # it missed that
        post(server.url, ONE)
        ahead = seen(server.url)[0]["n"] + 10 ** 12    # of a server whose clock was ahead: that is not waited for
        with streaming(server.url, "Last-Event-ID: %d" % ahead) as until:
            sent = until(lambda sent: sent.count(b"\nid: ") == 2)
            assert re.findall(rb"\nevent: clear\n|\ndata: {.n", sent) == [b"\nevent: clear\n", b'\ndata: {"n']


@table("reads", [False, True])
def test_a_page_that_lags_is_disconnected_and_holds_up_nobody(reads):
    with site() as server, streaming(server.url) as until:
        large = json.dumps([{"too large": "x" * 10 ** 6}]).encode()
        if not reads:
            until.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda sent: b"retry" in sent)
        connection, = [one for one in server._listener._connections if one.idle_since == float("inf")]
        if not reads:
            assert connection.sock.gettimeout() == 20  # in earnest
            connection.sock.settimeout(0.1)
        for _ in range(12):
            assert post(server.url, large)[1]["code"] == 400
        if reads:                                      # it goes on, too late
            until.client.settimeout(0.05)
            def is_over():
                with contextlib.suppress(socket.timeout):
                    return not until.client.recv(1 << 20)
            wait_until(is_over)
        wait_until(lambda: connection not in server._listener._connections)


def test_the_page_has_a_strict_policy_and_nothing_from_elsewhere():
    with site() as server:
        status, head, page = ask(server.url, "/?whatever=1")
        assert status == 200 and "text/html" in head and "no-store" in head and "nosniff" in head
        policy, = re.findall("Content-Security-Policy: (.*)\r", head)
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        for tag in "style", "script":
            source, = re.findall("<%s>(.*?)</%s>" % (tag, tag), page.decode(), re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert "%s-src 'sha256-%s'" % (tag, digest) in policy
        assert not re.search(r"https?:|//\w+\.|innerHTML|\bon\w+=\"|style=\"", page.decode().replace("://", ""))
        assert ask(server.url, "/", "HEAD")[2] == b""
        for method, path in [("GET", "/elsewhere"), ("POST", "/api/clear"), ("DELETE", "/api"), ("GET", "/api/events/")]:
            assert ask(server.url, path, method)[0] == 404
        post(server.url, ONE)
        for method, path in [("DELETE", "/"), ("POST", "/api/events"), ("PUT", "/api/events"), ("GET", "/api/fail"),
                             ("DELETE", "/api/inventory"), ("POST", "/api/stream"), ("get", "/api/events")]:
            assert ask(server.url, path, method)[0] == 405
        assert len(seen(server.url)) == 1


API = [("GET", "/"), ("GET", "/api/events"), ("GET", "/api/inventory"), ("GET", "/api/stream"), ("GET", "/api/rates"),
       ("DELETE", "/api/events"), ("POST", "/api/fail")]


@table("headers", FOREIGN[:-2] + [{"Host": "evil.example"}, {"Host": ""}, {"Host": "127.0.0.1.evil.example"},
                                  {"Host": "127.0.0.1:1, evil.example"}, {"Host": "localhost@evil.example"}])
def test_the_page_and_the_api_are_for_nobody_elses_pages_and_names(headers):
    with site() as server:
        post(server.url, ONE)
        for method, path in API:
            sent = {"Host": HOST, **headers}
            lines = ["%s: %s" % header for header in sent.items()]
            status, _, told = ask(server.url, path, method, b"", *lines)
            assert status == 403, (method, path)
            if "Host" in headers and "Origin" not in headers and "Sec-Fetch-Site" not in headers:
                assert b"--allow-host" in told
        assert ask(server.url, "/api/events", "GET", b"", "Hos: none", "X: y", "Host:")[0] == 403
        assert len(seen(server.url)) == 1


def test_a_link_to_the_page_may_be_followed_and_the_api_only_be_asked_by_the_page():
    followed = ["Host: " + HOST, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"]
    own = ["Host: " + HOST, "Origin: http://" + HOST, "Sec-Fetch-Site: same-origin"]
    with site(allow_host=["Relay.Example"]) as server:
        assert ask(server.url, "/", "GET", b"", *followed)[0] == 200
        assert ask(server.url, "/api/events", "GET", b"", *followed)[0] == 403
        assert ask(server.url, "/api/events", "DELETE", b"", *own)[0] == 204
        for host in "localhost:5", "relay.example", "RELAY.example:99", "[::1]", "10.1.2.3:4":
            assert ask(server.url, "/", "GET", b"", "Host: " + host)[0] == 200


def test_cors_lets_pages_of_one_origin_post_to_up_and_no_more():
    with site(cors=["HTTP://LocalHost:3000"]) as server:
        origin = ["Host: " + HOST, "Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"]
        status, head, _ = ask(server.url, "/up", "OPTIONS", b"", *origin, "Access-Control-Request-Headers: content-type")
        assert status == 204 and "Access-Control-Allow-Origin: http://localhost:3000\r" in head
        assert "Access-Control-Allow-Headers: content-type\r" in head
        status, head, _ = ask(server.url, "/up", "POST", ONE, *origin)
        assert status == 200 and "Access-Control-Allow-Origin: http://localhost:3000\r" in head and "*" not in head
        for method, path in API:
            assert ask(server.url, path, method, b"", *origin)[0] == 403
        assert ask(server.url, "/up", "OPTIONS", b"", "Host: " + HOST, "Origin: http://localhost:3001")[0] == 403


def test_a_host_that_is_no_name_admits_nobody():
    with site(host="") as server:
        port = server.url.split(":")[2]
        assert ask("http://127.0.0.1:" + port, "/", "GET", b"", "Hos: none", "X: y", "Host:")[0] == 403


@table("options, word", [
    (["--cors", "*"], "--cors"), (["--cors", "http://a/b"], "--cors"), (["--cors", "http://*.a"], "--cors"),
    (["--spool-path", "x"], "--spool-path"),
    (["--forward", "http://127.0.0.1:1"], "--spool-path"), (["--port", "65536"], "--port"), (["--port", "-1"], "--port"),
    (["--tls", "nowhere.pem", "nowhere.key"], "nowhere.pem"), (["--tls", SOURCE, SOURCE], "--tls"),
    (["--forward", "ftp://x", "--spool-path", "x"], "ftp://x"), (["--log-path", ""], "--log-path"),
    (["--forward", "", "--spool-path", ""], "--spool-path"), (["--host", ""], "--host")])
def test_serve_names_the_option_at_fault(capsys, options, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert analysys.main(["serve"] + options) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and word in printed.err and printed.err.strip().count("\n") == 0


def test_a_log_path_that_cannot_be_used_is_2_at_once(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for path in tmp_path / "file", tmp_path / "file" / "below":
        assert analysys.main(["serve", "--port", "0", "--log-path", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and str(path) in printed.err and printed.err.count("\n") == 1


@posix_only
def test_only_what_keeps_serve_from_writing_its_log_keeps_it_from_starting(capsys, tmp_path):
    os.mkfifo(str(tmp_path / "datas_1.log"))
    (tmp_path / "rejected.log").symlink_to("nowhere")
    with serving("--log-path", str(tmp_path)):
        pass
    for path in tmp_path.glob("datas_2*"):
        path.unlink()
    for hour in 0, 3600:
        (tmp_path / time.strftime("datas_%Y%m%d%H.log", time.localtime(time.time() + hour))).mkdir()
    assert analysys.main(["serve", "--port", "0", "--log-path", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_port_that_is_taken_is_2_and_says_how_to_choose_another(capsys):
    with analysys.Receiver() as server:
        port = server.url.split(":")[2]
        assert analysys.main(["serve", "--port", port]) == 2
        printed = capsys.readouterr().err
        assert port in printed and "--port" in printed and printed.count("\n") == 1


@posix_only
def test_serve_ends_with_its_summary_and_0_however_often_it_is_told_to():
    for _ in range(4):
        with serving() as server:
            for number in [signal.SIGINT, signal.SIGTERM] * 4:
                server.process.send_signal(number)
            server.process.wait(20)
        assert server.lines[:-1] == ["0 accepted, 0 refused"] and "KeyboardInterrupt" not in server.lines[-1], server.lines


@table("host, warns", [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_beyond_loopback_a_warning_is_printed_and_the_address_is_one_to_open(host, warns, capsys, monkeypatch):
    monkeypatch.setattr(analysys._Printer, "run", analysys._Printer.stop)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert analysys.main(["serve", "--host", host, "--port", "0"]) == 0
    printed = capsys.readouterr()
    assert re.match(r"serving on http://(127\.0\.0\.1|\[::1\]):\d+\n0 accepted, 0 refused\n$", printed.out)
    assert printed.err.count("\n") == warns and (host in printed.err) == warns
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_line_is_printed_in_one_step_lest_a_signal_leaves_half_of_it_before_the_summary(monkeypatch):
    class Stream(io.StringIO):
        def write(self, text):
            pieces.append(text)
    pieces = []
    monkeypatch.setattr(sys, "stdout", Stream())
    analysys._print("a")
    assert pieces == ["a\n"]


@table("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_prints_a_line_a_record_and_ends_at_once_with_a_summary(number):
    with serving() as server:
        post(server.url, encode([record("zhang\x1b[31m\u202e", "Purchase", {"price": 5}, "JS")]))
        post(server.url, encode([changed({"a": None})]))
        with streaming(server.url) as until:           # an open page and an idle client hold up nothing
            until(lambda sent: b"retry" in sent)
            printed = [server.process.stdout.readline().decode() for _ in "12"]
            start = time.monotonic()
            server.process.send_signal(number)
            server.process.wait(20)
            assert time.monotonic() - start < 8
    (first, second), (summary, err) = printed, server.lines
    assert "Purchase" in first and "price: 5" in first and "JS" in first and "\x1b" not in first + second
    assert "record 1 of 1" in second and "'a'" in second
    assert summary == "1 accepted, 1 refused" and err == ""


@linux_only
def test_serve_ends_also_where_nobody_reads_what_it_prints():
    with serving() as server:
        pipe = os.open("/proc/%d/fd/1" % server.process.pid, os.O_WRONLY | os.O_NONBLOCK)
        for piece in b"x" * 4096, b"x":
            with contextlib.suppress(BlockingIOError):
                while True:                            # until it is full
                    os.write(pipe, piece)
        os.close(pipe)
        post(server.url, ONE)
        server.process.terminate()
        server.process.wait(60)


def test_serve_leaves_nothing_behind_where_it_may_not_have_signals(capsys):
    before, statuses = threading.enumerate(), []
    caller = threading.Thread(target=lambda: statuses.append(analysys.main(["serve", "--port", "0"])))
    caller.start()
    caller.join(20)
    assert statuses == [2] and set(threading.enumerate()) <= set(before)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_summary_waits_for_no_request_that_is_still_at_work(capsys, monkeypatch):
    sites, is_over = [], threading.Event()

    class Noted(analysys._Site):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            sites.append(self)

    def fill():
        for number in itertools.takewhile(lambda _: not is_over.is_set(), itertools.count()):
            sites[0].inventory.add(record("u", "E%d" % number, {"a": 1}))

    def stop(printer):
        filler.start()
        wait_until(lambda: sites[0].inventory.accepted > 3000)
    filler = threading.Thread(target=fill)
    monkeypatch.setattr(analysys, "_Site", Noted)
    monkeypatch.setattr(analysys._Printer, "run", stop)
    try:
        assert analysys.main(["serve", "--port", "0"]) == 0
    finally:
        is_over.set()
        filler.join()
    assert re.search(r"\n[0-9,]+ accepted, 0 refused\n$", capsys.readouterr().out)


def test_a_running_serve_imports_nothing_for_a_signal_to_come_in_between():
    code = """if True:
        import analysys, os, signal, sys
        before, plain, printer = [], analysys._print, analysys._Printer
        def print_(*told):                             # first where it serves, then a line of each kind, then the sum
            plain(*told)
            before.extend([] if before else sys.modules)
            if "bad" in told[0]:
                os.kill(os.getpid(), signal.SIGINT)
        def run(self, run=printer.run):
            self.add(%r, None), self.add({}, "bad")
            run(self)
        analysys._print, printer.run = print_, run
        analysys.main(["serve", "--port", "0"])
        print(sorted(set(sys.modules) - set(before)))""" % (record("李四" * 99, "Event", {"a": ["x" * 99], "b": 1}),)
    done = python("-c", code)
    assert (done.status, done.out.splitlines()[-1], done.err) == (0, "[]", "")
    assert done.out.count("Event") == 1


def test_at_most_a_hundred_lines_a_second_are_printed(monkeypatch):
    clock, printed = FakeClock(monkeypatch), []
    monkeypatch.setattr(clock, "now", lambda: 1000 + clock.ahead)      # else a second may be over amid a request

    def print_(text):
        printed.extend(text.splitlines())
        if len(printed) > 201:
            raise KeyboardInterrupt
    monkeypatch.setattr(analysys, "_print", print_)
    with site() as server:
        for _ in "12":
            post(server.url, encode([record("u", "Event")] * 2000))
            clock.advance(1)
        with pytest.raises(KeyboardInterrupt):
            server.printer.run()
    told = [line for line in printed if "more" in line]
    assert len(printed) == 202 and told == [printed[100], printed[201]] == ["… 1,900 more"] * 2


def test_what_waits_to_be_printed_is_small_however_large_its_record():
    with site() as server:
        post(server.url, json.dumps([{"too large": "x" * 10 ** 6}]).encode())
        assert 0 < len(str(server.printer._lines)) < 1000


@table("xwho, properties", [("李四" * 100, {"name": "跑步机" * 50}), ("u", {}), ("u" * 200, {"a": "x" * 255, "b": ["\x1b[31m"] * 9})])
def test_a_line_fits_the_terminal_and_a_refused_one_is_red(xwho, properties, monkeypatch):
    one = record(xwho, "Event", properties)
    for columns in 20, 61, 160:
        lines = [analysys._event_text(one, reason, columns) for reason in (None, "record 1 of 1: 长" * 30)]
        monkeypatch.setattr(analysys, "_has_colours", lambda: True)
        red = analysys._event_text(one, "record 1 of 1: 长" * 30, columns)
        monkeypatch.undo()
        assert re.fullmatch(r"\x1b\[31m\d\d:\d\d:\d\d%s\x1b\[0m" % re.escape(lines[1][8:]), red)      # the time is another
        assert "\x1b" not in "".join(lines)
        for line in lines:
            width = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in line)
            is_short = xwho == "u" and line is lines[0]
            assert width <= columns and (width >= columns - 1 or is_short) and (columns < 61 or is_short == ("…" not in line))
    assert "record 1 of 1" in lines[1]


def test_log_path_has_what_was_accepted_on_disk_before_the_answer(tmp_path):
    with serving("--log-path", tmp_path) as server:
        good = [record("u", "A"), record("李四", "B")]
        assert post(server.url, encode(good))[1]["code"] == 200
        assert post(server.url, encode(good + [changed({"a": None})]))[1]["code"] == 400
        server.process.kill()
        lines = [json.loads(line) for path in tmp_path.glob("datas_*.log")
                 for line in path.read_text(encoding="utf-8").splitlines()]
        assert lines == good


def test_what_cannot_be_written_is_not_accepted(tmp_path):
    folder = tmp_path / "gone"
    with serving("--log-path", folder) as server:
        shutil.rmtree(str(folder))
        folder.write_text("no directory")
        status, told = post(server.url, encode([record("u", "A"), record("u", "B")]))
        assert status == 503 and told["code"] == 500 and "gone" in told["msg"]
        assert seen(server.url) == []
        folder.unlink()
        assert post(server.url, ONE)[1]["code"] == 200
        first, second = [server.process.stdout.readline().decode() for _ in "12"]
    assert "cannot write" in first and "Event" in second       # who looks on hears of it


def test_forward_hands_on_what_was_accepted_and_what_is_left_stays_in_the_spool(tmp_path):
    with Server() as platform_, serving("--forward", platform_.url, "--spool-path", tmp_path) as server:
        sent = [record("u", "A"), changed({"$original_id": "d", "$is_login": True}, "$alias")]     # that goes at once
        post(server.url, encode(sent))
        wait_until(lambda: platform_.records == sent)
    assert server.lines[-2] == "2 accepted, 0 refused; 0 wait in %s" % tmp_path
    with serving("--forward", URL, "--spool-path", tmp_path) as server:
        post(server.url, encode([record("u", "C")]))
    assert server.lines[-2] == "1 accepted, 0 refused; 1 wait in %s" % tmp_path
    with serving("--forward", URL, "--spool-path", tmp_path) as server:
        assert post(server.url, encode([record("u", "D"), record("u", "E")]))[1]["code"] == 200
        server.process.kill()
    spooled = [one["xwhat"] for path in tmp_path.glob("*.log") for one in records_in(path)]
    assert sorted(spooled) == ["C", "D", "E"]


def test_what_the_spool_of_forward_has_no_room_for_is_not_in_the_log_and_of_one_request_nothing_is(tmp_path):
    big = [record("u", "Big", {"n": number, "p": "x" * 255}) for number in range(300)]
    forward = BatchCollecter(URL, spool_path=str(tmp_path / "spool"), spool_max_bytes=1 << 20, queue_timeout=0)
    log = LogCollecter(str(tmp_path / "log"))
    with site() as receiver:
        receiver.log, receiver.forward, kept = log, forward, []
        post(receiver.url, encode([record("u", "Before")]))
        kept.append(record("u", "Before"))
        for _ in range(50):
            status, answer_ = post(receiver.url, encode(big))
            if status != 200:
                break
            kept += big
        assert status == 503 and "the queue is full" in answer_["msg"]
        forward.close(0)
        assert forward.stats()["accepted"] == forward.stats()["pending"] == len(kept)
        spooled = [one for path in sorted((tmp_path / "spool").glob("*.log")) for one in records_in(path)]
        assert records_in(*(tmp_path / "log").iterdir()) == spooled == kept
        assert balanced(log)["accepted"] == len(kept) // 300 + 1
    log.close()


def test_serve_speaks_tls_with_a_certificate_and_its_key(tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    with serving("--tls", certificate, key) as server:
        assert server.url.startswith("https://127.0.0.1:")
        DefaultCollecter(server.url, 5, ssl_context=ca_context()).uploadData(record("u", "Event"))


def test_a_receiver_that_closes_hangs_up_in_the_middle_of_a_handshake():
    with site() as server, contextlib.ExitStack() as stack:
        server._listener.tls = server_context(CERTIFICATE)
        client = stack.enter_context(socket.create_connection(server._listener.address, 10))
        def is_at_it():
            return [one for one in list(server._listener._connections) if isinstance(one.sock, ssl.SSLSocket)]
        wait_until(is_at_it)
        server.close()
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


def test_a_receiver_that_closes_before_a_handshake_has_begun_hangs_up():
    with site() as server, contextlib.ExitStack() as stack:
        tls = server_context(CERTIFICATE)

        class Closing:
            def wrap_socket(self, *arguments, **options):
                wrapped = tls.wrap_socket(*arguments, **options)
                server.close()
                return wrapped
        server._listener.tls = Closing()
        client = stack.enter_context(socket.create_connection(server._listener.address, 10))
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


@linux_only
def test_five_hundred_connections_take_less_than_150_mb():
    with serving() as server, contextlib.ExitStack() as stack:
        for _ in range(5):                             # more than the backlog at once would have to knock again
            clients = [stack.enter_context(dial(server.url)) for _ in range(100)]
            for client in clients:
                client.sendall(request_of(ONE, LENGTH))
            assert {status_of(client.recv(4096)) for client in clients} == {200}
        with open("/proc/%d/status" % server.process.pid) as file:
            peak = int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1))
        assert peak < 150 * 1024 * SPARE


@linux_only
def test_a_closed_or_full_output_ends_nothing():
    def end(case):
        command, shell = case
        line = '"$0" -m analysys "$@" ' + shell
        done = subprocess.run(["sh", "-c", line, sys.executable] + command, stdout=subprocess.PIPE, timeout=60, cwd=HERE)
        assert done.returncode == (64 if "x" in command else 0)
        assert "error" not in done.stdout.decode()     # which is for what was asked for
    commands, shells = [["demo"], ["serve", "--port", "x"]], [">/dev/full 2>&1", ">&- 2>&-", "2>&-", "2>/dev/full"]
    all_at_once(end, [(command, shell) for command in commands for shell in shells])


@linux_only
def test_no_file_and_no_connection_takes_the_place_of_a_stream_that_is_closed(tmp_path):
    command = 'exec "$0" "$1" serve --port 0 --log-path "$2" <&- 2>&-'
    with subprocess.Popen(["sh", "-c", command, sys.executable, SOURCE, str(tmp_path)], stdout=subprocess.PIPE) as started:
        try:
            url = started.stdout.readline().decode().split()[-1]
            assert post(url, json.dumps([record("u", "a")]).encode()) == (200, {"code": 200})
            assert [os.readlink("/proc/%d/fd/%d" % (started.pid, number)) for number in (0, 2)] == [os.devnull] * 2
        finally:
            started.terminate()


def test_demo_shows_nothing_that_a_stranger_posts_meanwhile():
    code = """if True:
        import analysys, json, threading, urllib.request
        class Watched(analysys._DemoReceiver):
            def __init__(self):
                super().__init__()
                body = b'[{"appid":"x","xwho":"stranger","xwhat":"E","xwhen":1532514947500,"xcontext":{}}]'
                for path in "/up", "/0123456789abcdef/up":
                    try:
                        urllib.request.urlopen(self.url + path, body)
                    except urllib.error.HTTPError as error:
                        print(error.code)
        analysys._DemoReceiver = Watched
        raise SystemExit(analysys.main(["demo"]))"""
    done = python("-c", code)
    assert (done.status, done.err) == (0, "") and "stranger" not in done.out
    assert done.out.startswith("404\n404\n") and "next:" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_demo_where_no_thread_can_start_is_one_sentence():
    code = "import analysys, threading; threading.stack_size(1 << 46); raise SystemExit(analysys.main(['demo']))"
    done = python("-c", code)
    assert done.status == 2 and done.err.count("\n") == 1 and "thread" in done.err


# ---------------------------------------------------------------------------
# The command line: check
# ---------------------------------------------------------------------------

STEPS = "file python proxy resolve connect tls clock event".split()
# Of 127.0.0.1, with KEY, signed by itself; it ended in 2019.
EXPIRED = pem("CERTIFICATE", """
MIIBSTCB76ADAgECAgIQAzAKBggqhkjOPQQDAjAOMQwwCgYDVQQDDANvbGQwHhcNMTgwMTAxMDAwMDAwWhcNMTkwMTAxMDAwMDAwWjAOMQwwCgYDVQQD
DANvbGQwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASV0Ih1nN0orvKjFPt29AYqmhoFJ6QAS+pAfQHc2m5EuWXjjm/Gtmjnf4N5YbtOVkev36fixWWF
dLke4Ip5SpZsoz0wOzAPBgNVHREECDAGhwR/AAABMAkGA1UdEwQCMAAwHQYDVR0OBBYEFAuZEXOUlg5jEQnl4KUcadGrIufaMAoGCCqGSM49BAMCA0kA
MEYCIQCUrdbnWlNwjVpYZ0EGBh+lkX+ZWRz8frCXDLeNaMvd0AIhAIsJgHGQEqbknUdx1KmDIDJkc63jcbzsvLMBXlXXr1kF""")


def checked(url, *options, expected=0):
    """Run `check`; return what it saw by step, after a look at its shape."""
    arguments = ["check", "--server", url, "--app-id", "app", "--json", "--request-timeout", "3"]
    out, err = io.TextIOWrapper(io.BytesIO(), "ascii"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = analysys.main(arguments + [str(option) for option in options])
    rows = json.loads(out.buffer.getvalue().decode())
    assert [row["step"] for row in rows[:8]] == STEPS and err.getvalue() == ""
    for row in rows:
        assert sorted(row) == ["ms", "seen", "state", "step", "try"] and row["state"] in ("OK", "WARN", "FAIL", "SKIP")
        assert row["seen"] and (row["ms"] is None) == (row["state"] == "SKIP")
    assert status == expected == (2 if any(row["state"] == "FAIL" for row in rows) else 0), rows
    return {row["step"]: row for row in rows}


def states(found, *steps):
    return [found[step]["state"] for step in steps]


def test_check_of_a_serve_is_ok_and_its_event_arrives_marked_for_debugging():
    with site() as server:
        found = checked(server.url)
        assert states(found, *STEPS) == ["OK"] * 5 + ["SKIP", "OK", "OK"]
        assert digest() in found["file"]["seen"] and platform.python_version() in found["python"]["seen"]
        event, = seen(server.url)
        assert event["reason"] is None and event["record"]["xwhat"] == "analysys_check"
        assert (event["record"]["xwho"], event["record"]["xcontext"]["$debug"]) == ("analysys-check", 1)


def test_check_prints_a_line_a_step_within_the_terminals_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with site() as server:
        assert analysys.main(["check", "--server", server.url, "--app-id", "app"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == "" and max(map(len, lines)) <= 60 + len("SHA-256 ") + 64 - 42
    assert [line.split()[1] for line in lines if not line.startswith(" ")] == STEPS


@table("reply, event", [
    (answer(404, b"<html>nothing here</html>"), "FAIL"), (answer(200, b"<html>a page</html>"), "FAIL"),
    (answer(500), "FAIL"), (answer(200, '{"code":400,"msg":"no such app id é"}'.encode()), "FAIL"), (answer(), "OK"),
    (answer(301, b"", "Location: https://elsewhere.example/"), "FAIL"),
    (lambda request: (_ for _ in ()).throw(OSError), "FAIL")])
def test_check_says_what_the_server_answers_to_an_event(reply, event):
    with Server(reply) as server:
        found = checked(server.url, expected=2 if event == "FAIL" else 0)
        assert found["event"]["state"] == event and bool(found["event"]["try"]) == (event == "FAIL")
        if isinstance(reply, bytes) and b"no such app id" in reply:
            assert "no such app id é" in found["event"]["seen"]


def test_what_a_failure_makes_impossible_is_skipped():
    found = checked("http://127.0.0.1:1", expected=2)
    assert states(found, *STEPS[3:]) == ["OK", "FAIL", "SKIP", "SKIP", "SKIP"] and found["connect"]["try"]
    found = checked("https://nowhere.invalid", expected=2)
    assert states(found, *STEPS[3:]) == ["FAIL", "SKIP", "SKIP", "SKIP", "SKIP"]
    assert "nowhere.invalid" in found["resolve"]["seen"] and found["resolve"]["try"]


def test_a_silent_server_costs_each_step_its_time_and_no_more():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(5)
        start = time.monotonic()
        found = checked("http://127.0.0.1:%d" % listening.getsockname()[1], "--request-timeout", "0.1", expected=2)
        assert time.monotonic() - start < 9
        assert states(found, "connect", "clock", "event") == ["OK", "SKIP", "FAIL"]


def test_a_step_of_check_that_does_not_end_is_left_behind(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ended.wait(60))
    with within(40):
        found = checked("http://ark.invalid", "--request-timeout", "0.1", expected=2)
    ended.set()
    assert states(found, "resolve", "connect", "event") == ["FAIL", "SKIP", "SKIP"]
    assert "0.1 s" in found["resolve"]["seen"]


@table("off, state", [(0, "OK"), (-30, "OK"), (90, "WARN"), (-90, "WARN"), (None, "OK"), ("nonsense", "OK")])
def test_a_clock_that_is_a_minute_off_is_a_warning(off, state):
    date = [] if off is None else ["Date: " + (off if off == "nonsense" else email.utils.formatdate(time.time() + off))]
    reply = answer(200, b'{"code":200}', *date)
    with Server(lambda request: reply if request.method == "POST" else reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n") as server:
        clock = checked(server.url)["clock"]
        assert clock["state"] == state and bool(clock["try"]) == (state == "WARN")
        assert off != 90 or "90 s ahead" in clock["seen"] or "89 s ahead" in clock["seen"]


def test_check_looks_at_the_certificate_and_names_what_is_wrong(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_text(CA)
    with Server(certificate=CERTIFICATE) as server:
        found = checked(server.url, "--ca", ca)
        assert states(found, "tls", "clock", "event") == ["OK"] * 3
        assert "TLS" in found["tls"]["seen"] and "analysys test CA" in found["tls"]["seen"] and "2120" in found["tls"]["seen"]
        found = checked(server.url, expected=2)
        assert states(found, "tls", "clock", "event") == ["FAIL", "SKIP", "SKIP"] and "--ca" in found["tls"]["try"]
    with Server(certificate=OTHER_HOST) as server:
        found = checked(server.url, "--ca", ca, expected=2)
        assert found["tls"]["state"] == "FAIL" and "another host" in found["tls"]["try"]
    ca.write_text(EXPIRED)
    with Server(certificate=EXPIRED) as server:
        found = checked(server.url, "--ca", ca, expected=2)
        assert found["tls"]["state"] == "FAIL"
        assert "clock" in found["tls"]["try"] or sys.version_info < (3, 7)      # that one does not say why
    with site() as server:
        found = checked(server.url.replace("http:", "https:"), expected=2)
        assert found["tls"]["state"] == "FAIL" and "plain http" in found["tls"]["try"]
    with Server(certificate=CERTIFICATE) as server:
        found = checked(server.url.replace("https:", "http:"), expected=2)
        assert states(found, "tls", "clock", "event") == ["SKIP", "SKIP", "FAIL"] and "https" in found["event"]["seen"]


def test_a_certificate_that_ends_within_thirty_days_is_a_warning(tmp_path, monkeypatch):
    ca = tmp_path / "ca.pem"
    ca.write_text(CA)
    monkeypatch.setattr(time, "time", lambda: ssl.cert_time_to_seconds("Jan  1 00:00:00 2120 GMT") - 29 * 86400)
    with Server(certificate=CERTIFICATE) as server:
        found = checked(server.url, "--ca", ca)
        assert found["tls"]["state"] == "WARN" and "29 days" in found["tls"]["try"]


def test_one_of_several_addresses_that_is_dead_is_a_warning():
    if len({found[4][0] for found in socket.getaddrinfo("localhost", 1, 0, socket.SOCK_STREAM)}) < 2:
        pytest.skip("localhost has one address here")
    with site() as server:
        found = checked(server.url.replace("127.0.0.1", "localhost"))
        assert states(found, "resolve", "connect", "event") == ["OK", "WARN", "OK"]


def test_an_address_of_a_kind_that_this_system_lacks_is_a_dead_one(monkeypatch):
    known, lacking = socket.getaddrinfo, (99, socket.SOCK_STREAM, 0, "", ("::1", 1, 0, 0))      # as where IPv6 is disabled
    with site() as server:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *asked: [lacking] + known(*asked))
        found = checked(server.url)
        assert states(found, "resolve", "connect", "event") == ["OK", "WARN", "OK"] and "::1: " in found["connect"]["seen"]


def test_no_room_is_a_failure_and_little_room_a_warning(tmp_path, monkeypatch):
    with site() as server:
        monkeypatch.setattr(analysys, "_LITTLE_ROOM", 1 << 60)
        assert checked(server.url, "--log-path", tmp_path)["log-path"]["state"] == "WARN"
        monkeypatch.setattr(analysys, "_NO_ROOM", 1 << 60)
        assert checked(server.url, "--log-path", tmp_path, expected=2)["log-path"]["state"] == "FAIL"


@table("options, word", [(["--app-id", ""], "appid"), (["--server", "ftp://x"], "ftp://x"), (["--header", "x"], "--header"),
                         (["--ca", "nowhere.pem"], "nowhere.pem"), (["--request-timeout", "0"], "--request-timeout"),
                         (["--spool-path", ""], "--spool-path")])
def test_check_names_the_option_at_fault(capsys, options, word):
    assert analysys.main(["check", "--server", URL, "--app-id", "app"] + options) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and word in printed.err and printed.err.count("\n") == 1


def test_where_the_clock_is_not_set_check_says_so_and_minds_no_app_id(monkeypatch):
    monkeypatch.setattr(analysys.AnalysysPythonSdk, "_clock", staticmethod(lambda: 9.0))
    with site() as server:
        found = checked(server.url, expected=2)["event"]
        assert "clock" in found["seen"] and "clock" in found["try"] and not server.records
    with FaultyServer(then=answer(200, code(400))) as refusing:
        monkeypatch.undo()
        assert "app id" in checked(refusing.url, expected=2)["event"]["try"]


def test_check_takes_a_proxy_that_speaks_tls_for_one_of_http_and_none_of_https(tmp_path, monkeypatch):
    (tmp_path / "ca.pem").write_text(CA)
    with Server(certificate=CERTIFICATE) as proxy:
        for name in "http_proxy", "https_proxy":
            monkeypatch.setenv(name, proxy.url)
        found = checked("http://nowhere.invalid", "--ca", tmp_path / "ca.pem")
        assert states(found, "proxy", "resolve", "connect", "event") == ["OK"] * 4
        assert checked("https://nowhere.invalid", "--ca", tmp_path / "ca.pem", expected=2)["proxy"]["state"] == "FAIL"


def test_behind_a_proxy_check_looks_at_the_proxy_and_hides_its_password(monkeypatch):
    with Server(answer(407)) as refusing:
        monkeypatch.setenv("https_proxy", refusing.url)
        found = checked("https://nowhere.invalid:4", expected=2)
        assert states(found, "connect", "tls", "event") == ["OK", "FAIL", "SKIP"] and "password" in found["tls"]["try"]
    for proxy, steps in [("http://127.0.0.1:9", ["OK", "OK", "FAIL"]), ("user:secret@127.0.0.1:9", ["OK", "OK", "FAIL"]),
                         ("socks5://127.0.0.1:9", ["FAIL", "SKIP", "SKIP"]), ("http://[::1", ["FAIL", "SKIP", "SKIP"]),
                         ("http://user:secret/s@127.0.0.1:9", ["FAIL", "SKIP", "SKIP"])]:
        monkeypatch.setenv("https_proxy", proxy)
        found = checked("https://nowhere.invalid:4", expected=2)
        assert states(found, "proxy", "resolve", "connect") == steps and "secret" not in json.dumps(found)
        assert bool(found["proxy"]["try"]) == (steps[0] == "FAIL")
    with Proxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//user:secret@"))
        found = checked("https://nowhere.invalid:4", expected=2)
        assert states(found, "proxy", "resolve", "connect", "tls") == ["OK", "OK", "OK", "FAIL"]
        assert "the proxy" in found["resolve"]["seen"] and "secret" not in json.dumps(found)
        assert any(b"Proxy-Authorization" in line for line in proxy.requests[0].headers)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with site() as server:
        assert checked(server.url)["proxy"]["state"] == "OK"


def directory(found):
    return found["log-path"] if "log-path" in found else found["spool-path"]


def test_check_counts_what_waits_in_the_directories_and_makes_nothing(tmp_path):
    logs, spool = tmp_path / "logs", tmp_path / "spool"
    with site() as server:
        found = checked(server.url, "--log-path", logs, "--spool-path", spool)
        assert states(found, "log-path", "spool-path") == ["WARN", "WARN"]
        assert os.listdir(str(tmp_path)) == []
        logs.mkdir()
        spool.mkdir(0o700)
        log_file(logs / "datas_2018072510.log", "a", "b", "c")
        found = checked(server.url, "--log-path", logs, "--spool-path", spool)
        assert states(found, "log-path", "spool-path") == ["OK", "OK"] and "3 lines wait" in found["log-path"]["seen"]
        assert ship(logs, "--server", server.url).status == 0
        log_file(logs / "datas_2018072511.log", "d")
        assert "1 lines wait in 1 files" in checked(server.url, "--log-path", logs)["log-path"]["seen"]
        leave(spool, "a", "b")
        before = sorted((path.name, path.stat().st_mtime) for path in tmp_path.rglob("*"))
        found = checked(server.url, "--log-path", logs, "--spool-path", spool)
        assert found["spool-path"]["state"] == "WARN" and "2 lines wait" in found["spool-path"]["seen"]
        lock, = spool.glob("*.lock")
        noted = '{"%s": [%%d, 1, []]}' % next(spool.glob("*.log")).name
        for text, number in (noted % len(lines_of("a")), 1), (noted % 10 ** 9, 2), ("{", 2), ("[]", 2):     # as adoption has it
            lock.write_text(text + "\n")
            assert "%d lines wait" % number in checked(server.url, "--spool-path", spool)["spool-path"]["seen"]
        before = sorted((path.name, path.stat().st_mtime) for path in tmp_path.rglob("*"))
        checked(server.url, "--spool-path", spool)
        assert sorted((path.name, path.stat().st_mtime) for path in tmp_path.rglob("*")) == before


@table("make, state", [
    (lambda path: path.write_text(""), "FAIL"),
    (lambda path: path.symlink_to("nowhere/else"), "FAIL"),
    (lambda path: path.mkdir() or (path / "rejected.log").write_text("x\n"), "WARN"),
    (lambda path: path.mkdir() or (path / "rejected.log").symlink_to("elsewhere"), "FAIL"),
    (lambda path: path.mkdir() or (path / "upload.checkpoint").symlink_to("elsewhere"), "FAIL"),
    (lambda path: path.mkdir() or (path / "a").write_text("a") and os.link(str(path / "a"), str(path / "rejected.log")), "FAIL"),
    (lambda path: path.mkdir() or (path / "upload.checkpoint").write_text("x\n"), "FAIL"),
    (lambda path: path.mkdir() or (path / "upload.checkpoint").mkdir(), "FAIL"),
    (lambda path: path.mkdir() or os.mkfifo(str(path / "datas_2018072510.log")), "FAIL")])
def test_check_finds_what_is_in_the_way_in_a_directory(make, state, tmp_path):
    path = tmp_path / "logs"
    make(path)
    with site() as server:
        found = checked(server.url, "--log-path", path, expected=2 if state == "FAIL" else 0)
        assert found["log-path"]["state"] == state and found["log-path"]["try"]


def test_check_names_a_log_file_that_may_not_be_read_and_minds_none_that_goes_meanwhile(tmp_path, monkeypatch):
    log_file(tmp_path / "datas_2018072510.log", "a")
    names = os.listdir(str(tmp_path)) + ["datas_2018072511.log", "rejected.log"]
    monkeypatch.setattr(os, "listdir", lambda path: names)
    with site() as server:
        assert checked(server.url, "--log-path", tmp_path)["log-path"]["state"] == "OK"
        monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("10.log"))      # root may read all
        found = checked(server.url, "--log-path", tmp_path, expected=2)["log-path"]
        assert found["state"] == "FAIL" and "may not read datas_2018072510.log" in found["seen"]


def test_check_names_the_log_file_of_this_period_where_it_may_not_be_written_and_minds_no_older_one(tmp_path, monkeypatch):
    log_file(tmp_path / "datas_2018072510.log", "a")
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith(".log") or not mode & os.W_OK)
    with site() as server:
        assert checked(server.url, "--log-path", tmp_path)["log-path"]["state"] == "OK"
        for seconds in 0, 86400:
            day = time.strftime("datas_%Y%m%d.log", time.localtime(time.time() + seconds))
            log_file(tmp_path / day, "a")
        found = checked(server.url, "--log-path", tmp_path, expected=2)["log-path"]
        assert found["state"] == "FAIL" and "may not write to datas_20" in found["seen"]


def test_a_spool_that_everybody_may_write_to_is_a_warning_and_one_of_another_user_a_failure(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    spool.chmod(0o777)
    with site() as server:
        assert checked(server.url, "--spool-path", spool)["spool-path"]["state"] == "WARN"
        if os.geteuid() == 0:
            os.chown(str(spool), 12345, 12345)
            assert checked(server.url, "--spool-path", spool, expected=2)["spool-path"]["state"] == "FAIL"


# ---------------------------------------------------------------------------
# The command line: upload
# ---------------------------------------------------------------------------

@contextlib.contextmanager
def heeding(*numbers):
    """Have signals that come too late, or that `upload` does not heed, end nothing but the test."""
    kept = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def follow(monkeypatch, acts, *arguments):
    """Run `upload --follow`, at a quick pace, until acts() has returned in another thread; return how it ended."""
    assert analysys._FOLLOW_EVERY in (1, 0.02)         # seconds; the first in earnest
    monkeypatch.setattr(analysys, "_FOLLOW_EVERY", 0.02)
    problems = []

    def act():
        try:
            acts()
        except BaseException as error:
            problems.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    with heeding(signal.SIGTERM):
        actor = threading.Thread(target=act, daemon=True)
        actor.start()
        shipped = ship(*arguments, "--follow")
        actor.join(20)
    assert not problems, (problems, shipped)
    return shipped


def looks(number=3):
    """Wait until a follower has looked at its files some more times."""
    seen, kept = [], analysys._Files._changed

    def counting(files):
        seen.append(1)
        return kept(files)
    analysys._Files._changed = counting
    try:
        wait_until(lambda: len(seen) >= number)
    finally:
        analysys._Files._changed = kept

OTHER_SDK = (
    '{"xwho": "u", "xcontext": {"$lib": "Java", "$lib_version": "4.1.0", "$platform": "Java", "name": "\\u8dd1"},'
    ' "xwhen": 1532514947857, "appid": "x", "xwhat": "java"}\r\n'
    '\n'
    '{"appid":"x","xwho":"u","xwhat":"node","xwhen":1532514947857,"xcontext":{"$lib":"Node"}}'      # and no newline
)


def test_a_folder_a_file_a_gz_and_standard_input_are_delivered_in_the_order_of_names(tmp_path):
    log_file(tmp_path / "datas_2018072511.log", "c", "d")
    log_file(tmp_path / "datas_2018072510.log", "a", "b")
    zipped(log_file(tmp_path / "datas_2018072512.log", "e"))
    log_file(tmp_path / "datas_20180726.log.1", "f")
    (tmp_path / "datas_20180727.log").write_text(OTHER_SDK)
    log_file(tmp_path / "other.log", "other")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert shipped[:2] == (0, "delivered 8, rejected 0, remaining 0\n")
        assert shipped.err.count("\n") == 1 and shipped.err.endswith(": other.log\n")
        assert ship(tmp_path / "other.log", "--server", server.url).status == 0
        with shipper("-", "--server", server.url, cwd=str(tmp_path)) as started:
            out, err = started.communicate((lines_of("g", "h") + lines_of("i").rstrip()).encode())
            assert (started.returncode, out, err) == (0, b"delivered 3, rejected 0, remaining 0\n", b"")
        assert server.names == ["a", "b", "c", "d", "e", "f", "java", "node", "other", "g", "h", "i"]
        assert server.accepted[6]["xcontext"]["name"] == "\u8dd1"
        assert len(ship(tmp_path, tmp_path / "other.log", "--server", server.url).out) and len(server.names) == 12


E = "--server"
USAGE = [                                              # arguments, and a word of what is said
    ([], "PATH"), (["PATH"], "--server"), (["PATH", E, ""], "--server"), (["PATH", E, "ftp://host"], "ftp://host"),
    (["PATH", E, "URL", "--batch", "0"], "--batch"), (["PATH", E, "URL", "--batch", "many"], "--batch"), ([E, "URL"], "PATH"),
    (["PATH", E, "URL", "--request-timeout", "0"], "--request-timeout"), (["PATH", E, "URL", "--frob"], "--frob"),
    (["PATH", E, "URL", "--header", "no colon"], "--header"), (["PATH", E, "URL", "--header", "A: \u6613"], "headers['A']"),
    (["PATH/nowhere", E, "URL"], "nowhere"), (["PATH/nowhere/", E, "URL"], "nowhere"),
    (["PATH/nowhere", "--dry-run"], "nowhere"),
    (["PATH", E, "URL", "--ca", "nope.pem"], "nope.pem"), (["PATH", E, "URL", "--checkpoint", ""], "--checkpoint"),
    (["-", E, "URL", "--follow"], "followed"),
]


@table("arguments, word", USAGE)
def test_wrong_usage_is_one_sentence_and_status_64_and_writes_nothing(tmp_path, arguments, word):
    log_file(tmp_path / "datas_2018072510.log", "a")
    with FaultyServer() as server:
        filled = [part.replace("PATH", str(tmp_path)).replace("URL", server.url) for part in arguments]
        shipped = ship(*filled)
        assert (shipped.status, shipped.out, shipped.err.count("\n"), server.names) == (64, "", 1, [])
        assert word in shipped.err
    assert [path.name for path in tmp_path.iterdir()] == ["datas_2018072510.log"]


NOTHING_NEW = "delivered 0, rejected 0, remaining 0\nnothing new, %d delivered before\n"


def test_the_exit_status_tells_done_rejected_and_not_delivered(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = log_file(folder / "datas_2018072510.log", "a", "bad", "c", ends="damaged\n" + lines_of("d"))
    with FaultyServer(then=refuse("bad")) as server:
        shipped = ship(folder, "--server", server.url)
        assert (shipped.status, server.names) == (1, ["a", "c", "d"])
        assert shipped.out.startswith("delivered 3, rejected 2, remaining 0\n")
        damaged, refused = rejected_in(folder)
        assert (damaged["file"], damaged["line"], refused["file"], refused["line"]) == (path.name, 4, path.name, 2)
        assert "unknown event" in refused["reason"] and "JSON" in damaged["reason"]
        assert ship(folder, "--server", server.url) == (0, NOTHING_NEW % 3, "")      # what was rejected was not delivered
    for ends in "\n", "":                                              # a last line that lacks its newline counts too
        path.write_text(lines_of("x", "y") + lines_of("z").rstrip() + ends)
        with FaultyServer(then=then_fail) as server:
            shipped = ship(folder, "--server", server.url)
            assert (shipped.status, shipped.out) == (2, "delivered 0, rejected 0, remaining 3\n")
            assert "503" in shipped.err


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"\\ud83d"', "1e999", "[-1e999]"])
@pytest.mark.parametrize("options", [[], ["--history"]], ids=["as it is", "history"])
def test_a_value_that_is_hardly_json_stops_neither_the_others_nor_its_own_rejection(tmp_path, value, options):
    path = log_file(tmp_path / "datas_2018072510.log", "a", "bad", "c")
    path.write_text(path.read_text().replace('"bad"', '"bad", "value": %s' % value))
    with FaultyServer(then=refuse("bad")) as server:
        assert ship(tmp_path, "--server", server.url, *options).status == 1
        assert server.names == ["a", "c"]
    entry, = rejected_in(tmp_path)
    assert entry["line"] == 2 and '"bad"' in json.dumps(entry["record"]).replace("\\", "")


def test_after_an_error_upload_goes_on_exactly_where_it_stopped(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *numbered("a", 25))
    zipped(log_file(tmp_path / "datas_2018072511.log", *numbered("b", 25)))
    left = 50
    with FaultyServer() as server:
        for accepted in 2, 0, 1, 2, 9:
            server.script.extend([accept] * accepted + [then_fail] * (accepted < 9))
            shipped = ship(tmp_path, "--server", server.url, "--batch", "10")
            left = max(0, 50 - len(server.names))
            assert "remaining %d\n" % left in shipped.out and shipped.status == (2 if left else 0)
        assert server.names == numbered("a", 25) + numbered("b", 25)


@posix_only
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_after_ten_signals_upload_has_delivered_each_event_once(tmp_path, name):
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 60))
    number, left = getattr(signal, name), 60

    def signalled(server, request):
        for _ in range(len(server.batches) % 3 + 1):                   # an impatient user's, too
            os.kill(os.getpid(), number)
        return accept(server, request)
    with FaultyServer(*[signalled, accept, signalled] * 5) as server, heeding(number):
        for _ in range(10):
            shipped = ship(tmp_path, "--server", server.url, "--batch", "2")
            left = 60 - len(server.names)
            assert shipped[::2] == (2, "analysys: not all is delivered: it was stopped\n")
            assert shipped.out.endswith(", rejected 0, remaining %d\n" % left)
        assert left == 30 and ship(tmp_path, "--server", server.url).status == 0
        assert server.names == numbered("e", 60)


def test_one_more_signal_inside_the_handler_of_a_stop_raises_nothing():
    for step in each_step(3):
        stop = analysys._Stop()
        disturbed(lambda: stop._on_signal(2, None), step, lambda: stop._on_signal(2, None))
        stop.wait(float("inf"))                        # returns at once


@posix_only
def test_however_often_ctrl_c_comes_check_says_in_one_sentence_that_it_was_stopped():
    for _ in range(3):
        with FaultyServer(then=silent) as server:
            with launch("-m", "analysys", "check", "--server", server.url, "--app-id", "app") as running:
                wait_until(lambda: server.times)
                while running.poll() is None:
                    running.send_signal(signal.SIGINT)
                done = ended(running)
        # CPython itself may add that it ignored a signal, which came as signals were told to be ignored.
        assert done.status == 2 and done.err.startswith("analysys: it was stopped\n"), done
        assert "KeyboardInterrupt" not in done.err and "analysys" not in done.err[9:].replace(SOURCE, ""), done


@posix_only
@table("options, status, said", [([], 2, "analysys: not all is delivered: it was stopped\n"), (["--follow"], 0, "")])
def test_a_process_that_gets_a_signal_ends_its_request_and_says_what_remains(tmp_path, options, status, said):
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 30))
    gate = threading.Event()

    def slow(server, request):
        return gate.wait(20) and accept(server, request)
    with FaultyServer(accept, slow) as server:
        with shipper(tmp_path, "--server", server.url, "--batch", "10", *options) as started:
            wait_until(lambda: len(server.requests) == 2)
            started.send_signal(signal.SIGTERM)
            started.send_signal(signal.SIGTERM)
            gate.set()
            assert ended(started) == (status, "delivered 20, rejected 0, remaining 10\n", said)


@posix_only
def test_after_ten_times_kill_9_upload_delivers_all_and_only_the_batches_in_flight_twice(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 200))
    killed = []

    def deadly(server, request):                       # takes the batch, kills who sent it, never answers
        accept(server, request)
        killed.extend(entry["xwhat"] for entry in server.batches[-1])
        os.kill(int(request.headers["x-pid"]), signal.SIGKILL)
        return b""
    with FaultyServer(*[deadly, accept, deadly, accept, accept] * 5) as server:
        run("""
            for _ in range(10):
                pid = os.fork()
                if not pid:
                    arguments = ["upload", folder, "--server", url, "--batch", "10", "--header", "X-Pid: %d" % os.getpid()]
                    os._exit(analysys.main(arguments))
                assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        """, server.url, tmp_path)
        assert ship(tmp_path, "--server", server.url).status == 0
        twice = collections.Counter(server.names) - collections.Counter(numbered("e", 200))
        assert twice == collections.Counter(killed) and len(killed) == 100
        assert list(dict.fromkeys(server.names)) == numbered("e", 200)


def rotated(path):
    path.rename(path.with_name(path.name + ".1"))


def replaced(path):
    rotated(path)
    log_file(path, *numbered("new", 5))


def copied_and_truncated(path):
    shutil.copy(str(path), str(path) + ".1")
    log_file(path, *numbered("new", 5))


@pytest.mark.parametrize("change", [
    rotated, zipped, lambda path: zipped(path.rename(str(path) + ".1") or path.with_name(path.name + ".1")),
    lambda path: path.rename(path.with_name("datas_1.log")), replaced, copied_and_truncated,
    lambda path: [shutil.copy(str(path), str(path) + ".copy"), path.unlink()],
    lambda path: log_file(path, *numbered("old", 25) + numbered("more", 5)),
], ids=["renamed", "gzipped", "both", "another period", "rotated", "copytruncate", "copied", "grown"])
def test_a_file_is_known_by_its_beginning_whatever_its_name(tmp_path, change):
    path = log_file(tmp_path / "datas_2018072510.log", *numbered("old", 25))
    with FaultyServer(accept, then_fail) as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "10").status == 2
        change(path)
        assert ship(tmp_path, "--server", server.url, "--batch", "10").status == 0
        for prefix, count in ("old", 25), ("new", 5), ("more", 5):
            found = [xwhat for xwhat in server.names if xwhat.startswith(prefix)]
            assert found in ([], numbered(prefix, count))
        assert len(server.names) == 25 + 5 * (change in (replaced, copied_and_truncated) or "more0" in server.names)
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % len(server.names)


@pytest.mark.parametrize("changes", [
    [lambda path: path.rename(path.with_name("datas_2026112401_old.log"))],
    [lambda path: path.rename(path.with_name("datas_2026112401_old.log")),
     lambda path: zipped(path.with_name("datas_2026112401_old.log"))],
    [zipped], [copied_and_truncated], [lambda path: log_file(path, *numbered("new", 90))]],
    ids=["renamed", "renamed and gzipped", "gzipped", "copytruncate", "rewritten"])
def test_a_file_that_is_rotated_in_the_middle_of_an_upload_is_delivered_once(tmp_path, changes):
    path = log_file(tmp_path / "datas_2026112401.log", *numbered("old", 60))
    left = list(changes)

    def meanwhile(server, request):
        if left:
            left.pop(0)(path)
        return accept(server, request)
    with FaultyServer(then=meanwhile) as server:
        for _ in range(3):
            assert ship(tmp_path, "--server", server.url, "--batch", "10").status == 0
        assert [name for name in server.names if name[0] == "o"] == numbered("old", 60)
        assert [name for name in server.names if name[0] == "n"] in ([], numbered("new", 5), numbered("new", 90))


def test_files_that_begin_alike_are_told_apart_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LOOKED_AT", 10)
    for number in range(40):
        log_file(tmp_path / ("datas_%d.log" % number), "same", who="x" * 200, number=number)
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url) == (0, "delivered 40, rejected 0, remaining 0\n", "")
        assert ship(tmp_path, "--server", server.url) == (0, NOTHING_NEW % 40, "")


@linux_only
def test_what_is_noted_is_so_in_an_order_that_survives_a_power_cut(tmp_path, monkeypatch):
    log_file(tmp_path / "datas_1.log", *numbered("e", 20))
    log_file(tmp_path / "datas_2.log", "f")
    steps = []

    def traced(name):
        kept = getattr(os, name)

        def call(target, *arguments):
            path = os.readlink("/proc/self/fd/%d" % target) if isinstance(target, int) else target
            if str(path).startswith(str(tmp_path)):
                steps.append((name, os.path.basename(path)))
            return kept(target, *arguments)
        monkeypatch.setattr(os, name, call)
    for name in "fsync", "write", "replace", "unlink":
        traced(name)

    def noting(server, request):
        steps.append(("answer", ""))
        return accept(server, request)
    with FaultyServer(then=noting) as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "5", "--delete").status == 0
    point, folder = "upload.checkpoint", tmp_path.name
    begin, rest = steps[:steps.index(("answer", ""))], steps[steps.index(("answer", "")):]
    assert begin == [("write", point + ".new"), ("fsync", point + ".new"), ("replace", point + ".new"), ("fsync", folder)]
    assert rest == [("answer", ""), ("write", point)] * 5 + [                # at most one fsync a second
        ("fsync", point), ("unlink", "datas_1.log"), ("fsync", folder), ("write", point), ("fsync", point)]


@posix_only
def test_copytruncate_under_a_writer_leaves_out_nothing_that_is_in_the_files(tmp_path, monkeypatch):
    path = log_file(tmp_path / "datas_2018072510.log")

    def acts():
        for number in range(60):
            with path.open("a") as file:
                file.write(lines_of(*["e%d_%d" % (number, line) for line in range(20)]))
            if number % 20 == 19:
                shutil.copy(str(path), "%s.%d" % (path, 9 - number // 20))
                os.truncate(str(path), 0)
            if number % 7 == 0:
                looks(1)
        wait_until(lambda: len(set(server.names)) == 1200)
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, tmp_path, "--server", server.url).status == 0


@posix_only
def test_a_second_uploader_of_the_same_folder_says_so_and_stops(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", "a")
    gate = threading.Event()
    with FaultyServer(lambda server, request: gate.wait(20) and accept(server, request)) as server:
        with shipper(tmp_path, "--server", server.url) as started:
            wait_until(lambda: server.requests)
            shipped = ship(tmp_path, "--server", server.url)
            assert (shipped.status, shipped.out) == (2, "") and re.match("analysys: another upload.*\n$", shipped.err)
            gate.set()
            assert ended(started).status == 0
        assert server.names == ["a"]


def test_a_checkpoint_elsewhere_leaves_a_read_only_medium_alone(tmp_path):
    medium, home = tmp_path / "medium", tmp_path / "home"
    medium.mkdir()
    home.mkdir()
    log_file(medium / "datas_2018072510.log", "a", "bad", "c", "d")
    before = {path.name: path.stat().st_mtime for path in medium.iterdir()}
    medium.chmod(0o500)
    try:
        with FaultyServer(accept, then_fail, then=refuse("bad")) as server:
            options = "--server", server.url, "--checkpoint", home / "point", "--batch", "1"
            assert ship(medium, *options).status == 2
            assert ship(medium, *options).status == 1
            assert server.names == ["a", "c", "d"]
        assert {path.name: path.stat().st_mtime for path in medium.iterdir()} == before
    finally:
        medium.chmod(0o700)
    assert sorted(path.name for path in home.iterdir()) == ["point", "point.lock", "rejected.log"]


def test_a_checkpoint_that_cannot_be_used_is_an_error_in_one_sentence_and_nothing_is_sent(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", "a")
    (tmp_path / "broken").write_text("{")
    with FaultyServer() as server:
        (tmp_path / "link").symlink_to("nowhere")
        for checkpoint in tmp_path, tmp_path / "broken", path / "point", tmp_path / "link":
            shipped = ship(path, "--server", server.url, "--checkpoint", checkpoint)
            assert (shipped.status, shipped.err.count("\n")) == (2, 1) and "--checkpoint" in shipped.err
        assert server.requests == [] and not (tmp_path / "nowhere").exists()


def test_a_checkpoint_is_fsynced_once_a_second(tmp_path, monkeypatch):
    clock, synced, counts = FakeClock(monkeypatch), [], []
    journal = analysys._Journal(str(tmp_path / "upload.checkpoint"))
    journal.open()
    journal.write_anew(b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced.append)
        for moment in 10.0, 10.9, 11.0, 11.5, 12.4, 12.5:
            clock.now = lambda: moment
            journal.append(b"{}\n")
            counts.append(len(synced))
    journal.close()
    assert counts == [0, 0, 1, 1, 1, 2]


def test_xz_that_takes_much_memory_to_unpack_is_named(tmp_path):
    import lzma
    large = lzma.compress(lines_of("b").encode(), preset=9)
    for number, data in enumerate([large, lzma.compress(lines_of("a").encode()) + large]):
        (tmp_path / ("datas_%d.log.xz" % number)).write_bytes(data)
    log_file(tmp_path / "datas_9.log", "z")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert (shipped.status, server.names) == (2, ["a", "z"]) and shipped.err.count("xz -d unpacks it") == 3


@table("key, value", [
    ("holes", [[5, 0, 1]]), ("holes", [[-9, 0, 50]]), ("holes", [[0, 0, 9], [0, 0, 9]]), ("holes", [["a", "b", "c"]]), ("holes", 5),
    ("place", [-5, 0]), ("place", [10 ** 30, 5]), ("place", [1.5, 2]), ("place", "x"), ("place", None), ("n", None), ("n", "1"),
    ("name", ["a"]), ("settled", "x"), ("head", 5), ("tail", ["a", "b"]), ("tail", None)])
def test_a_checkpoint_that_somebody_has_changed_is_an_error_that_names_it_and_nothing_is_sent(tmp_path, key, value):
    log_file(tmp_path / "datas_2018072510.log", "a", "b")
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url).status == 0
        point = tmp_path / "upload.checkpoint"
        head, entry = point.read_text().splitlines()[:2]
        point.write_text("%s\n%s\n" % (head, json.dumps(dict(json.loads(entry), **{key: value}))))
        shipped = ship(tmp_path, "--server", server.url)
        assert (shipped.status, shipped.err.count("\n"), len(server.requests)) == (2, 1, 1) and str(point) in shipped.err


@posix_only
def test_a_checkpoint_that_is_removed_or_whose_directory_is_replaced_meanwhile_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_SYNC_EVERY", 0.02)
    folder, point = tmp_path / "logs", tmp_path / "logs" / "upload.checkpoint"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    with FaultyServer() as server:
        assert ship(log_file(tmp_path / "other" / "datas_9.log", "z"), "--server", server.url).status == 0
    log_file(folder / "datas_1.log", "a")
    with FaultyServer() as server:
        def acts():
            wait_until(lambda: server.names == ["a"])
            point.unlink()
            wait_until(point.exists)
            (tmp_path / "other" / "upload.checkpoint").replace(point)  # it is added to what is known
            wait_until(lambda: {"datas_1.log", "datas_9.log"} <= set(re.findall("datas_..log", point.read_text())))
            folder.rename(tmp_path / "old")
            looks()                                    # there is no place for another one yet
            folder.mkdir()
            log_file(folder / "datas_2.log", "b")
            log_file(folder / "datas_3.log", "c")
            wait_until(lambda: server.names == ["a", "b", "c"] and point.exists())
        assert follow(monkeypatch, acts, folder, "--server", server.url).status == 0
        assert ship(folder, "--server", server.url).out == NOTHING_NEW % 2
        assert ship(tmp_path / "old", "--server", server.url).out == NOTHING_NEW % 1


def test_the_journal_of_a_shipment_that_never_ends_is_made_compact_and_nothing_comes_twice(tmp_path, monkeypatch):
    for name in "_ROLL_SIZE", "_ROOM", "_SYNC_EVERY":
        monkeypatch.setattr(analysys, name, 0)
    log_file(tmp_path / "datas_1.log", *numbered("e", 60))
    point = tmp_path / "upload.checkpoint"

    def in_the_way(server, request):                           # it cannot be made compact then: it goes on as it is
        (tmp_path / "upload.checkpoint.new").mkdir(exist_ok=True)
        return accept(server, request)
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "1").status == 0
        assert len(server.requests) == 60 and len(point.read_text().splitlines()) < 10
        log_file(tmp_path / "datas_2.log", *numbered("f", 60))
        server.then = in_the_way
        assert ship(tmp_path, "--server", server.url, "--batch", "1").status == 0
        assert len(server.requests) == 120 and len(point.read_text().splitlines()) > 60
        (tmp_path / "upload.checkpoint.new").rmdir()
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % 120
    assert server.names == numbered("e", 60) + numbered("f", 60)


@posix_only
def test_an_upload_that_can_note_nothing_stops_and_one_batch_at_most_comes_again(tmp_path):
    log_file(tmp_path / "datas_1.log", *numbered("e", 60))
    with FaultyServer() as server:
        shipped = run("""
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            analysys._ROOM = 0
            print(analysys.main(["upload", folder, "--server", url, "--batch", "1"]))
        """, server.url, tmp_path)
        assert shipped.out.endswith("\n2\n") and str(tmp_path / "upload.checkpoint") in shipped.err
        assert 1 < len(server.names) < 10
        assert ship(tmp_path, "--server", server.url).status == 0
        assert list(dict.fromkeys(server.names)) == numbered("e", 60) and len(server.names) <= 61


def test_a_note_that_a_power_cut_damaged_is_passed_over(tmp_path):
    log_file(tmp_path / "datas_1.log", "a")
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url).status == 0
        point = tmp_path / "upload.checkpoint"
        text = point.read_bytes().rstrip()
        point.write_bytes(text + b"\n" + text.splitlines()[-1][:-9] + b"\0" * 50 + b"\n\n")
        assert ship(tmp_path, "--server", server.url) == (0, NOTHING_NEW % 1, "")


def test_a_checkpoint_always_has_room_for_the_next_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_ROOM", 2000)
    log_file(tmp_path / "datas_1.log", *numbered("e", 60))
    has_room = []

    def looking(server, request):
        has_room.append((tmp_path / "upload.checkpoint").read_bytes().endswith(b"\n" * 500))
        return accept(server, request)
    with FaultyServer(then=looking) as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "1").status == 0
    assert has_room == [True] * 60


def test_a_checkpoint_forgets_files_that_are_long_gone_and_none_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_REMOVED_KEPT", 3)
    paths = [log_file(tmp_path / ("datas_%d.log" % number), "e%d" % number) for number in range(9)]
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url).status == 0
        for path in paths[2:]:
            path.unlink()
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % 2
        names = re.findall('"name":"datas_(.)', (tmp_path / "upload.checkpoint").read_text())
        assert sorted(names) == list("01678")


def test_a_renamed_file_is_taken_for_the_one_that_was_read_furthest(tmp_path):
    first = log_file(tmp_path / "datas_1.log", *numbered("e", 40))
    second = log_file(tmp_path / "datas_2.log", *numbered("e", 50))
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url).out == "delivered 90, rejected 0, remaining 0\n"
        first.unlink()
        second.rename(tmp_path / "datas_3.log")
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % 50


@posix_only
def test_a_file_that_has_several_names_is_delivered_once_also_as_it_grows(tmp_path, monkeypatch):
    folder, other = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    other.symlink_to("a")
    path = log_file(folder / "datas_2.log", "a")
    monkeypatch.setattr(analysys, "_SYNC_EVERY", 0.0)

    def acts():
        for number, name in enumerate("bcdefgh"):
            wait_until(lambda: len(server.names) > number)
            if name == "d":
                (folder / "datas_1.log").symlink_to("datas_2.log")
                os.link(str(path), str(folder / "datas_3.log"))
            with path.open("a") as file:
                file.write(lines_of(name))
        wait_until(lambda: len(server.names) >= 8)
        looks()
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, folder, other, "--server", server.url).status == 0
        assert server.names == list("abcdefgh")
        for paths in [[folder], [folder, other], [other, folder], [path, other / "datas_1.log"]]:
            assert ship(*paths, "--server", server.url).out == NOTHING_NEW % 8
            assert ship(*paths, "--dry-run").out.endswith("\n8 lines are good, 0 are not, 0 conflicts\n")
        assert (folder / "upload.checkpoint").read_text().count('"name"') == 1  # it is not two that note down each other
        log_file(folder / "datas_4.log", "j")
        (folder / "datas_3.log").unlink()
        log_file(folder / "datas_3.log", "i")
        (folder / "datas_0.log").symlink_to("datas_4.log")
        assert ship(folder, "--server", server.url).status == 0 and server.names == list("abcdefghij")


@root_only
def test_a_link_of_another_user_does_not_stand_for_the_file_that_it_points_to(tmp_path):
    log_file(tmp_path / "datas_1.log", "a")
    (tmp_path / "datas_2.log").symlink_to("datas_1.log")
    os.lchown(str(tmp_path / "datas_2.log"), 12345, 12345)
    with FaultyServer() as server:
        ship(tmp_path, "--server", server.url)
        assert server.names == ["a"]


@posix_only
def test_names_of_a_file_that_is_not_there_yet_are_names_of_one_file_when_it_is(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    names = [str(tmp_path / folder / "app.log") for folder in "ab"]
    os.symlink(names[0], names[1])
    listing = analysys._Listing(names, [], True)
    assert listing.all() == names
    log_file(pathlib.Path(names[0]), "a")
    assert listing.all() == names[1:]


@linux_only
def test_a_file_whose_name_is_not_utf_8_is_delivered_once_like_any_other(tmp_path):
    log_file(tmp_path / "datas_1.log", "a")
    for name in b"datas_2.\xff.log", b"datas_3.\xe4\x1b[2J.log":
        log_file(pathlib.Path(os.fsdecode(os.path.join(os.fsencode(str(tmp_path)), name))), name[:7].decode(), ends="damaged\n")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert shipped.out.startswith("delivered 3, rejected 2, remaining 0\n") and "\x1b" not in shipped.out + shipped.err
        assert ship(tmp_path, "--server", server.url) == (0, NOTHING_NEW % 3, "")


def test_a_checkpoint_whose_fsync_fails_is_named(tmp_path, monkeypatch):
    log_file(tmp_path / "datas_1.log", "a")
    kept = os.fsync

    def failing(fd):                                   # no file system here would say EIO
        if server.requests:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        kept(fd)
    monkeypatch.setattr(os, "fsync", failing)
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
    assert shipped.status == 2 and str(tmp_path / "upload.checkpoint") in shipped.err and shipped.err.count("\n") == 1


@posix_only
def test_follow_ships_what_grows_and_rotates_waits_for_the_end_of_a_line_and_stops_on_sigterm(tmp_path, monkeypatch):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends=lines_of("b")[:40])

    def acts():
        wait_until(lambda: server.names == ["a"])
        with path.open("a") as file:
            file.write(lines_of("b")[40:] + lines_of("c"))
        rotated(path)
        log_file(path, "d")
        zipped(log_file(tmp_path / "datas_2018072509.log", "e"))
        log_file(tmp_path / "datas_2018072511.log", "f", ends=lines_of("g").rstrip())
        wait_until(lambda: len(server.names) >= 6)
        looks()
        assert len(server.names) == 6
        with (tmp_path / "datas_2018072511.log").open("a") as file:
            file.write("\n")
        wait_until(lambda: len(server.names) >= 7)
        log_file(tmp_path / "datas_2018072512.log", "h", ends=lines_of("i").rstrip())
        wait_until(lambda: len(server.names) >= 8)
        log_file(tmp_path / "datas_2018072513.log", "j")               # a newer one: the last line of h's is whole
        wait_until(lambda: len(server.names) >= 10)
    with FaultyServer() as server:
        shipped = follow(monkeypatch, acts, str(tmp_path) + "/", "--server", server.url)
        assert shipped[:2] == (0, "delivered 10, rejected 0, remaining 0\n") and "Traceback" not in shipped.err
        assert sorted(server.names) == list("abcdefghij")


@posix_only
@table("name, turned", [("app.log", None), ("datas_2018072510.log", None), ("app_1.log", "app_2.log")])
def test_a_followed_file_is_read_to_its_end_also_where_it_is_rotated_away_from_its_path(tmp_path, monkeypatch, name, turned):
    file, old = log_file(tmp_path / name, "a"), tmp_path / (name if turned else name + ".1")
    path = tmp_path / "current" if turned else file
    log_file(tmp_path / (name + ".2"), "not asked for")
    if turned:
        path.symlink_to(name)

    def acts():
        wait_until(lambda: server.names == ["a"])
        with file.open("a") as stream:
            if turned:
                path.unlink()
                path.symlink_to(turned)
            else:
                path.rename(old)
            stream.write(lines_of("b"))
        looks()
        log_file(path, "c")
        wait_until(lambda: len(server.names) == 3)
        with old.open("a") as stream:                  # by a writer that has it open still
            stream.write(lines_of("d").rstrip())
        wait_until(lambda: len(server.names) == 4)
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, path, "--server", server.url).status == 0
        assert server.names == ["a", "b", "c", "d"]


@posix_only
def test_follow_waits_for_a_file_that_is_not_there_for_a_while(tmp_path, monkeypatch):
    path = log_file(tmp_path / "events.log", "a")

    def acts():
        wait_until(lambda: server.names == ["a"])
        path.unlink()
        looks()
        log_file(path, "b")
        wait_until(lambda: server.names == ["a", "b"])
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, path, "--server", server.url).status == 0


@pytest.mark.parametrize("is_followed", [False, pytest.param(True, marks=posix_only)], ids=["once", "follow"])
def test_a_last_line_that_is_ended_while_others_are_sent_is_delivered_whole(tmp_path, monkeypatch, is_followed):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends=lines_of("b")[:40])

    def meanwhile(server, request):
        with path.open("a") as file:
            file.write(lines_of("b")[40:] + lines_of("c"))
        return accept(server, request)
    with FaultyServer(meanwhile) as server:
        arguments = tmp_path, "--server", server.url
        shipped = (follow(monkeypatch, lambda: wait_until(lambda: len(server.names) == 3), *arguments) if is_followed
                   else ship(*arguments))
        assert shipped == (0, "delivered 3, rejected 0, remaining 0\n", "")
        assert server.names == ["a", "b", "c"]


@contextlib.contextmanager
def reader(folder, *arguments):
    """Start `upload` in *folder*; yield it and what writes a piece to its standard input and waits until it wants more."""
    ours, theirs = os.pipe()
    looks = folder / "looks"
    code = """if True:
        import analysys, sys
        look, looks = analysys._is_ready, open("looks", "ab", 0)
        def is_ready(stream):
            ready = look(stream)
            looks.write(b"" if ready else b"in vain\\n")
            return ready
        analysys._is_ready = is_ready
        sys.exit(analysys.main(["upload"] + sys.argv[1:]))
    """

    def write(piece):
        while piece:
            piece = piece[os.write(theirs, piece):]
        wait_until(lambda: not select.select([ours], [], [], 0)[0])
        seen = looks.stat().st_size if looks.exists() else 0
        wait_until(lambda: looks.exists() and looks.stat().st_size > seen)
    try:
        with launch("-c", code, *arguments, cwd=str(folder), stdin=ours) as started, os.fdopen(theirs, "wb", 0) as pipe:
            yield started, write, pipe.close
    finally:
        os.close(ours)


@posix_only
def test_a_long_line_that_comes_on_standard_input_in_pieces_is_delivered_once_and_whole(tmp_path):
    long = json.dumps(event("b", filler="x" * 300000)) + "\n"
    pieces = [lines_of("a") + long[:100000], long[100000:200000], long[200000:] + lines_of("c") + long[:5000],
              long[5000:] + lines_of("d").rstrip()]
    with FaultyServer() as server, reader(tmp_path, "-", "--server", server.url) as (started, write, end):
        for piece, names in zip(pieces, ("a", "a", "abc", "abcbd")):
            write(piece.encode())
            wait_until(lambda: server.names == list(names) or names[4:])
        end()
        assert ended(started)[:2] == (0, "delivered 5, rejected 0, remaining 0\n")
        assert server.names == list("abcbd")
        assert [len(one["xcontext"].get("filler", "")) for one in server.accepted] == [0, 300000, 0, 300000, 0]


@posix_only
def test_a_dry_run_waits_for_the_end_of_a_line_on_standard_input(tmp_path):
    text = lines_of(*["e"] * 2000).rstrip()            # more than a pipe takes: it is read while it is written
    with reader(tmp_path, "-", "--dry-run") as (started, write, end):
        for piece in text[:-100], text[-100:-50], text[-50:]:
            write(piece.encode())
        end()
        assert ended(started)[:2] == (0, "    2000  event  e\n2000 lines are good, 0 are not, 0 conflicts\n")


@posix_only
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_signal_also_stops_upload_where_it_waits_for_standard_input(tmp_path, packed):
    packing = zlib.compressobj(wbits=31)
    data = lines_of("a").encode()
    data = packing.compress(data) + packing.flush(zlib.Z_SYNC_FLUSH) if packed else data
    with FaultyServer() as server, shipper("-", "--server", server.url, "--batch", "1", cwd=str(tmp_path)) as started:
        started.stdin.write(data)
        started.stdin.flush()
        wait_until(lambda: server.names == ["a"])
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 2                   # more may come, or half a line has come
        assert started.stdout.read().startswith(b"delivered 1, rejected 0, remaining more than 0\n")


@posix_only
def test_a_stop_while_a_batch_is_put_together_counts_what_of_it_is_in_files_that_are_read(tmp_path):
    log_file(tmp_path / "datas_1.log", "a", "b")
    with FaultyServer() as server, reader(tmp_path, tmp_path, "-", "--server", server.url) as (started, write, _):
        write(b"")
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 2
        assert started.stdout.read() == b"delivered 0, rejected 0, remaining more than 2\n"


@posix_only
@pytest.mark.parametrize("packing", [None, "gzip", "bz2", "lzma"])
def test_standard_input_may_come_in_pieces_and_not_block_whatever_packs_it(tmp_path, packing):
    pack = __import__(packing).compress if packing else bytes
    data = pack(lines_of("a", "b").encode()) + pack(lines_of("c").encode())
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)                       # as a parent that runs an event loop may leave it
    with FaultyServer() as server, shipper("-", "--server", server.url, cwd=str(tmp_path), stdin=ours) as started:
        for piece in data[:1], data[1:3], data[3:-1], data[-1:]:
            os.write(theirs, piece)
            wait_until(lambda: not select.select([ours], [], [], 0)[0])
        os.close(theirs)
        os.close(ours)
        assert ended(started) == (0, "delivered 3, rejected 0, remaining 0\n", "")
        assert server.names == ["a", "b", "c"]


@posix_only
def test_a_signal_that_comes_before_anything_was_looked_at_is_said_too(tmp_path, monkeypatch):
    log_file(tmp_path / "datas_1.log", "a")
    replace = os.replace

    def stopped(*paths):                               # when the checkpoint is made
        replace(*paths)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(os, "replace", stopped)
    with FaultyServer() as server, heeding(signal.SIGTERM):
        assert ship(tmp_path, "--server", server.url) == (
            2, "delivered 0, rejected 0, remaining 1\n", "analysys: not all is delivered: it was stopped\n")


def test_delete_removes_what_is_wholly_delivered_but_never_the_current_periods_nor_the_newest(tmp_path):
    moment = time.localtime()
    current = [time.strftime(pattern, moment) for pattern in ("datas_%Y%m%d%H.log", "datas_%Y%m%d.log")]
    newest = ["datas_2999010100.log", "datas_2999010100.log.1"]       # by its period: what follows does not count
    for number, name in enumerate(current + newest + ["datas_2018072510.log", "datas_2018072511.log.1"]):
        log_file(tmp_path / name, "e%d" % number)
    zipped(log_file(tmp_path / "datas_2018072512.log", "zipped"))
    log_file(tmp_path / "datas_2018072513.log", "bad")
    log_file(tmp_path / "datas_2018072514.log", "f", ends='{"cut')
    (tmp_path / "datas_2018072515.log").write_text(lines_of("g") + "\n\n")
    grows = log_file(tmp_path / "datas_2018072516.log", "h")

    def meanwhile(server, request):
        if server.batches[-1][0]["xwhat"] == "e0":                     # when that file has been read to its end
            log_file(grows, "h", "i")
        return accept(server, request) if server.batches[-1][0]["xwhat"] != "bad" else answer(200, b'{"code":400}')
    with FaultyServer(then=meanwhile) as server:
        assert ship(tmp_path, "--server", server.url, "--delete", "--batch", "1").status == 1
        names = {path.name for path in tmp_path.iterdir()}
        assert {"datas_2018072514.log", "datas_2999010100.log", "rejected.log"} <= names
        assert names.isdisjoint({"datas_2018072510.log", "datas_2018072511.log.1", "datas_2018072512.log.gz",
                                 "datas_2018072513.log", "datas_2018072515.log"})
        assert names.issuperset(current) or time.localtime().tm_hour != moment.tm_hour
        assert ship(tmp_path, "--server", server.url, "--delete").status == 0
        assert not grows.exists() and server.names.count("i") == server.names.count("h") == 1


def test_delete_keeps_a_file_whose_last_line_may_still_be_ended(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends=lines_of("b")[:40])
    log_file(tmp_path / "datas_2018072511.log", "c")
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url, "--delete").status == 1 and path.exists()
        log_file(path, "a", "b")
        assert ship(tmp_path, "--server", server.url, "--delete").status == 0 and not path.exists()
        assert server.names == ["a", "c", "b"]


def test_delete_keeps_a_file_that_alone_has_what_was_rejected_and_the_last_words_tell(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends="damaged\n")
    log_file(tmp_path / "datas_2018072511.log", "b")
    (tmp_path / "rejected.log").mkdir()
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url, "--delete")
        assert (shipped.status, server.names) == (1, ["a", "b"]) and "but for 1\n" in shipped.out
        assert ship(tmp_path, "--server", server.url, "--delete").out == NOTHING_NEW % 2 and path.exists()


@posix_only
def test_an_upload_ends_where_the_last_record_is_given_up(tmp_path, skipping):
    log_file(tmp_path / "datas_1.log", "a", "bad", "b")
    late = []
    timer = threading.Timer(30, lambda: late.append(os.kill(os.getpid(), signal.SIGTERM)))
    with FaultyServer(then=choking_on(["bad"])) as server, heeding(signal.SIGTERM):
        timer.start()
        shipped = ship(tmp_path, "--server", server.url)
        timer.cancel()
        assert shipped.status == 1 and server.names == ["a", "b"] and not late


def test_refusals_are_no_outage(tmp_path):
    log_file(tmp_path / "datas_1.log", *numbered("e", 8))
    with FaultyServer(then=refuse("e1", "e5")) as server, logged() as entries:
        assert ship(tmp_path, "--server", server.url).status == 1
    assert {entry.levelname for entry in entries} == {"ERROR"}


def test_delete_delivers_no_event_again_where_a_copy_or_gz_of_a_removed_file_is_there(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log.1", "a", "b")
    shutil.copy(str(zipped(path)), str(tmp_path / "datas_2018072510.log.1.gz.copy.gz"))
    log_file(path, "a", "b")
    log_file(tmp_path / "datas_2018072511.log", "c")
    with FaultyServer() as server:
        for _ in range(2):
            assert ship(tmp_path, "--server", server.url, "--delete").status == 0
        assert server.names == ["a", "b", "c"]
        log_file(path, "d")                            # another one of that name is not said to have changed
        assert ship(tmp_path, "--server", server.url) == (0, "delivered 1, rejected 0, remaining 0\n", "")


@posix_only
def test_follow_and_delete_remove_a_file_when_a_newer_one_has_come(tmp_path, monkeypatch):
    first, second = tmp_path / "datas_2018072510.log", tmp_path / "datas_2018072511.log"

    def acts():
        wait_until(lambda: server.names == ["a"])
        looks()
        assert first.exists()
        log_file(second, "b")
        wait_until(lambda: server.names == ["a", "b"] and not first.exists())
    log_file(first, "a")
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, tmp_path, "--server", server.url, "--delete").status == 0 and second.exists()


def test_history_flags_the_records_that_lack_the_flag(tmp_path):
    path = tmp_path / "datas_2018072510.log"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (event("a"), event("b", **{"$importFlag": 0}))))
    with FaultyServer() as server:
        assert ship(path, "--server", server.url, "--history").status == 0
        assert server.accepted == [event("a", **{"$importFlag": 1}), event("b", **{"$importFlag": 0})]


def test_dry_run_sends_and_writes_nothing_and_tells_the_errors_with_the_first_of_each_and_the_inventory(tmp_path):
    first, second = tmp_path / "datas_2018072510.log", tmp_path / "datas_2018072511.log"
    first.write_text("".join(json.dumps(entry) + "\n" for entry in (
        event("Look", price=5), event("Look", price=6), event("Buy"), event("$profile_set", PRICE="x"))))
    good = ship(first, "--dry-run")
    assert good == (0, "\n".join([
        "       2  event  Look", "          price: number 2  (5)", "       1  event  Buy", "       1  event  $profile_set",
        '          PRICE: string 1  ("x")', "4 lines are good, 0 are not, 0 conflicts"]) + "\n", "")
    log_file(second, "Buy", "not a name", ends="\n{\n[]\n" + lines_of("Buy").replace('"xwho": "user"', '"xwho": ""'))
    with second.open("a") as file:
        file.write(json.dumps(event("Sell", Price="5")))
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--dry-run", "--server", server.url)
        told = json.loads(ship(tmp_path, "--dry-run", "--json").out)
        assert server.connections == 0
    assert (shipped.status, shipped.err) == (1, "")
    assert shipped.out.startswith("conflict  event property price: number 2, string 1  (spelled Price, price)\n")
    assert shipped.out.endswith("6 lines are good, 4 are not, 1 conflicts\n")
    assert sorted((error["count"], error["first"]) for error in told["errors"]) == [
        (1, "%s:%d" % (second, number)) for number in (2, 4, 5, 6)]
    assert [told[name] for name in ("lines", "accepted", "refused", "cut")] == [10, 6, 4, False]
    assert told["events"]["Look"] == {"count": 2, "properties": {"price": {"types": {"number": 2}, "example": 5}}}
    assert told["conflicts"] == [{"kind": "event", "property": "price", "types": {"number": 2, "string": 1},
                                  "spellings": ["Price", "price"]}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]


def test_a_dry_run_checks_the_values_of_each_record_also_where_another_one_like_it_was_good(tmp_path):
    good = dict(event("Event", number=1, names=["x"]))
    good["xcontext"]["text"] = "x"
    lines = [good]
    changes = [
        dict(appid=""), dict(appid="a" * 256), dict(xwho=""), dict(xwho="a" * 255), dict(xwhen=WHEN // 10), dict(xwhen=10 ** 13),
        dict(text="x" * 256), dict(number=2 ** 63), dict(number=-2 ** 63 - 1), dict(names=["x"] * 101),
        dict(names=["x" * 256]), dict(names=[1])]
    for change in changes:
        one = copy.deepcopy(good)
        for name, value in change.items():
            (one if name in one else one["xcontext"])[name] = value
        lines += [one, good]
    alias = event("$alias")
    alias["xcontext"]["$original_id"] = "d"
    lines += [alias, copy.deepcopy(alias), dict(good, xcontext=dict(good["xcontext"], **{"$debug": 3}))]
    lines[-2]["xcontext"]["$original_id"] = ""
    path = tmp_path / "datas_1.log"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(ship(path, "--dry-run", "--json").out)
    assert (found["lines"], found["refused"]) == (len(lines), len(changes) + 2)


def test_a_dry_run_is_1_for_conflicts_alone_and_2_where_a_file_cannot_be_read(tmp_path):
    lines = [event("A", n=1), event("B", n="x")]
    (tmp_path / "datas_1.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ship(tmp_path, "--dry-run").status == 1
    (tmp_path / "datas_2.log").mkdir()
    for options in [], ["--json"]:
        shipped = ship(tmp_path, "--dry-run", *options)
        assert shipped.status == 2 and "datas_2.log" in shipped.err


def test_our_own_files_are_never_read_whatever_the_pattern_hands_over(tmp_path):
    log_file(tmp_path / "datas_1.log", "a")
    for name in "rejected.log.1", "rejected.log.2", "upload.checkpoint", "upload.checkpoint.lock":
        log_file(tmp_path / name, "own")
    with FaultyServer() as server:
        for _ in range(2):
            paths = sorted(tmp_path.iterdir())
            shipped = ship(*paths, "--server", server.url, "--checkpoint", tmp_path / "mark")
            assert (shipped.status, shipped.err.count("our own")) == (0, len(paths) - 1)
        assert server.names == ["a"]


@pytest.mark.parametrize("most", [analysys._MAX_HOLES, 20])
def test_whatever_stands_aside_comes_again_after_a_stop_also_where_there_is_more_than_can_be_noted(tmp_path, monkeypatch, most):
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 2 * analysys._MOST_ASIDE))

    def taken(step):
        """Take all lines, settle every *step*th of them, and stop."""
        listing = analysys._Listing([str(tmp_path)], [], False)
        with contextlib.closing(analysys._Checkpoints("", listing)) as checkpoints:
            files = analysys._Files(listing, lambda: None)
            shipment = analysys._Shipment(files, checkpoints, analysys._Stop(), False)
            items = shipment.take(10000)
            settled = items[1::step]
            for start in range(0, len(settled), 100):
                shipment.settle(settled[start:start + 100])
            return [json.loads(item.text.decode())["xwhat"] for item in items]
    monkeypatch.setattr(analysys, "_MAX_HOLES", most)
    names = taken(2)
    again = taken(10000)
    assert again == (names[::2] if most > 20 else names)


@pytest.mark.parametrize("settled", [0, 1])
@pytest.mark.parametrize("change", [lambda path: path, rotated, zipped], ids=["grown", "renamed", "packed"])
def test_a_file_that_comes_again_goes_on_and_what_may_be_a_copy_waits_for_its_lines_in_flight_to_be_settled(
        tmp_path, monkeypatch, change, settled):
    monkeypatch.setattr(analysys, "_FOLLOW_EVERY", 0)
    path = log_file(tmp_path / "datas_1.log", *"abc")
    listing = analysys._Listing([str(tmp_path)], [], True)
    with contextlib.closing(analysys._Checkpoints("", listing)) as checkpoints:
        files = analysys._Files(listing, lambda: None)
        shipment = analysys._Shipment(files, checkpoints, analysys._Stop(), False)
        taken = lambda: [json.loads(item.text.decode())["xwhat"] for item in items]
        items = flight = shipment.take(10)
        assert taken() == ["a", "b", "c"]
        items = shipment.take(10)                      # it is done with that file
        if settled:
            shipment.settle(flight[:1])
        if change is zipped and not settled:           # it is not known yet: another file, as far as anybody can tell
            return
        with path.open("a") as file:
            file.write(lines_of("d"))
        change(path)
        for _ in range(3):
            items += shipment.take(10)
        assert taken() == ([] if change is zipped else ["d"])
        shipment.settle(flight[settled:])
        wait_until(lambda: items.extend(shipment.take(10)) or items)
        shipment.settle(items)
        items += shipment.take(10)
        assert taken() == ["d"]
        shipment.close()


def test_batch_header_and_request_timeout_reach_the_requests(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", *numbered("e", 7))
    with FaultyServer(lambda server, request: server.closed.wait(60) and b"") as server:
        start = time.monotonic()
        shipped = ship(path, "--server", server.url, "--batch", "3", "--header", "X-Key: a b", "--header=X-Other:c",
                       "--request-timeout", "1")
        assert shipped.status == 0 and time.monotonic() - start < 50
        assert max(len(batch) for batch in server.batches) == 3 and server.names == numbered("e", 7)
        assert {(request.headers["x-key"], request.headers["x-other"]) for request in server.requests} == {("a b", "c")}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_longer_than_any_record_is_damaged_and_the_lines_after_it_are_delivered(tmp_path, place):
    lines = [lines_of("a"), lines_of("b")]
    lines.insert(place, "x" * (9 << 20) + "\n")
    (tmp_path / "datas_2018072510.log").write_text("".join(lines))
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "2").status == 1
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % 2
        assert server.names == ["a", "b"]


def test_a_record_of_more_than_4_mib_and_the_lines_after_it_are_delivered_once(tmp_path):
    (tmp_path / "datas_2018072510.log").write_text(
        lines_of("a") + lines_of("large", filler="x" * (5 << 20)) + lines_of(*numbered("e", 900)))
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url) == (0, "delivered 902, rejected 0, remaining 0\n", "")
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % 902
        assert server.names == ["a", "large"] + numbered("e", 900)


@posix_only
def test_a_terminal_gets_a_progress_line_and_a_file_does_not(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 20))

    def slow(server, request):
        server.closed.wait(0.55)
        return accept(server, request)
    with FaultyServer(slow, then_fail) as server:
        master, slave = os.openpty()
        try:
            with shipper(tmp_path, "--server", server.url, "--batch", "10", stderr=slave) as started:
                assert started.wait() == 2
            os.close(slave)
            shown = b""
            with contextlib.suppress(OSError):         # EIO: the other end is closed
                for piece in iter(lambda: os.read(master, 1000), b""):
                    shown += piece
        finally:
            os.close(master)
        line = r"\r\d of 1 files, [\d.]+ of [\d.]+ MB, 10 events, \d+ events/s, \d+:\d\d left\x1b\[K"
        assert re.match(line, shown.decode()) and "\r\x1b[Kanalysys: not all" in shown.decode()
        with shipper(tmp_path, "--server", server.url) as started:
            assert ended(started) == (0, "delivered 10, rejected 0, remaining 0\n", "")


def test_what_is_no_terminal_gets_no_progress_however_long_it_takes(tmp_path, monkeypatch):
    def slow(server, request):
        clock.advance(100)
        return accept(server, request)
    log_file(tmp_path / "datas_2018072510.log", *numbered("e", 20))
    with FaultyServer(then=slow) as server:
        clock = FakeClock(monkeypatch)
        shipped = ship(tmp_path, "--server", server.url, "--batch", "10", "--request-timeout", "1000")
        assert shipped == (0, "delivered 20, rejected 0, remaining 0\n", "")


@linux_only
def test_a_file_larger_than_the_memory_it_may_take_is_delivered(tmp_path):
    log_file(tmp_path / "datas_1.log", *["e"] * 1000, filler="x" * 50000)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        out = run("""
            status = analysys.main(["upload", folder, "--server", url, "--batch", "200"])
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, server.url, tmp_path).out
    told, peak = out.splitlines()
    assert told == "delivered 1000, rejected 0, remaining 0" and int(peak) < 50000


def test_what_rotation_makes_is_read_old_first_what_else_looks_like_records_is_named_and_our_own_never_read(tmp_path):
    names = ["datas_9.log", "datas_10.log.2.gz", "datas_10.log.1", "datas_10_old.log", "datas_10.log",
             "datas_2026112401-20261124.log", "datas_2026112401.log-20261125.gz", "datas_2026112401.log"]
    for name in reversed(names):
        log_file(tmp_path / name.replace(".gz", ""), name)
        if name.endswith(".gz"):
            zipped(tmp_path / name.replace(".gz", ""))
    log_file(tmp_path / "events.json", "other")
    (tmp_path / "notes.txt").write_text("nothing")
    with FaultyServer(then=refuse("bad")) as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert (shipped.status, server.names) == (0, names)
        assert shipped.err.count("\n") == 1 and "events.json" in shipped.err and "notes" not in shipped.err
        log_file(tmp_path / "events.json", "other", "bad")
        assert ship(*sorted(tmp_path.iterdir()), "--server", server.url).status == 1
        own = tmp_path / "rejected.log"
        shutil.copy(str(own), str(tmp_path / "mine.log"))
        size = own.stat().st_size
        for arguments in ([own], [own, tmp_path / "upload.checkpoint"], [tmp_path / "mine.log"]):
            shipped = ship(*arguments, "--server", server.url)
            assert shipped.err.count("rejected.log") >= 1 and own.stat().st_size == size
        with own.open("rb") as file, shipper("-", "--server", server.url, cwd=str(tmp_path), stdin=file) as started:
            assert ended(started).status == 2
        assert server.names == names + ["other"] and own.stat().st_size == size


@posix_only
def test_a_copy_that_somebody_makes_is_not_delivered_and_what_grows_beside_it_is_not_delivered_again(
        tmp_path, monkeypatch):
    path, copy = tmp_path / "datas_1.log", tmp_path / "datas_1.log.bak"

    def acts():
        wait_until(lambda: len(server.names) == 50)
        shutil.copy(str(path), str(copy))
        looks()
        log_file(path, *numbered("e", 55))
        wait_until(lambda: len(server.names) >= 55)
        looks()
    log_file(path, *numbered("e", 50))
    with FaultyServer() as server:
        assert follow(monkeypatch, acts, tmp_path, "--server", server.url).status == 0
        log_file(path, *numbered("e", 60))
        assert ship(tmp_path, "--server", server.url).status == 0
        assert server.names == numbered("e", 60)


def test_what_remains_is_counted_also_behind_a_copy_and_the_copy_is_not(tmp_path):
    for number in range(4):
        path = log_file(tmp_path / ("datas_%d.log" % number), *numbered("e%d_" % number, 300))
        shutil.copy(str(path), str(path) + ".copy")
    with FaultyServer(then=then_fail) as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert (shipped.status, shipped.out) == (2, "delivered 0, rejected 0, remaining more than 1200\n")


@pytest.mark.parametrize("is_known", [False, True])
def test_a_copy_in_any_given_directory_is_not_delivered_though_blank_lines_end_it(tmp_path, is_known):
    for name in "ab":
        (tmp_path / name).mkdir()
    path = log_file(tmp_path / "b" / "datas_1.log", "e", ends="\n\n")
    with FaultyServer() as server:
        assert not is_known or ship(tmp_path / "b", "--server", server.url).status == 0
        shutil.copy(str(path), str(path) + ".1")
        shutil.copy(str(path), str(tmp_path / "a"))
        for names in "ba", "ab", "a":
            shipped = ship(*[tmp_path / name for name in names], "--server", server.url)
            assert (shipped.status, shipped.err, server.names) == (0, "", ["e"])


def test_a_directory_without_any_log_file_says_so(tmp_path):
    shipped = ship(tmp_path, "--server", "http://127.0.0.1:1")
    assert shipped.status == 0 and shipped.err == "analysys: there is no datas_*.log in %s\n" % tmp_path


NOT_AS_IT_WAS = {
    "cut and grown": lambda path: path.write_text(lines_of(*numbered("o", 3) + numbered("n", 40))),
    "rewritten": lambda path: path.write_text(path.read_text()[:5000].rpartition("\n")[0] + "\n" + lines_of(*numbered("n", 40))),
    "rewritten at the beginning": lambda path: path.write_text(path.read_text().replace('"o0"', '"n0"')),
    "another beside it": lambda path: log_file(path.with_name("datas_2.log"), *numbered("o", 30) + numbered("n", 9)),
}


@table("change", list(NOT_AS_IT_WAS))
def test_a_file_that_is_not_as_it_was_left_or_begins_like_another_is_read_from_its_beginning_and_it_says_so(
        tmp_path, change):
    path = log_file(tmp_path / "datas_1.log", *numbered("o", 30))
    assert path.stat().st_size > 5500
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url).status == 0
        NOT_AS_IT_WAS[change](path)
        shipped = ship(tmp_path, "--server", server.url)
        assert shipped.status == 0 and "starts at the beginning" in shipped.err and shipped.err.count("\n") == 1
        expected = [line["xwhat"] for file in sorted(tmp_path.glob("datas*")) for line in records_in(file)]
        assert set(expected) <= set(server.names) and [name for name in server.names if name[0] == "n"] == [
            name for name in expected if name[0] == "n"]
        assert ship(tmp_path, "--server", server.url).out == NOTHING_NEW % len(expected)


def test_each_directory_has_a_checkpoint_of_its_own_whatever_the_order(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        log_file(tmp_path / name / "datas_1.log", name)
    with FaultyServer() as server:
        assert ship(tmp_path / "a", tmp_path / "b", "--server", server.url).status == 0
        assert ship(tmp_path / "b", tmp_path / "a", "--server", server.url).out == NOTHING_NEW % 2
        assert server.names == ["a", "b"]


@posix_only
def test_where_the_checkpoint_cannot_be_written_nothing_is_sent(tmp_path):
    import resource
    log_file(tmp_path / "datas_1.log", *numbered("e", 5))
    with FaultyServer() as server:
        for size in [0] * 4 + [30000]:
            kept = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
            try:
                shipped = ship(tmp_path, "--server", server.url)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, kept)
            assert (shipped.status, shipped.err.count("\n"), server.connections) == (2, 1, 0)
            assert "upload.checkpoint" in shipped.err
        assert ship(tmp_path, "--server", server.url).status == 0 and len(server.names) == 5


def test_marks_blanks_endings_and_packings_are_no_damage_whatever_the_names(tmp_path):
    import bz2
    import lzma
    mark = b"\xef\xbb\xbf"
    a, b, c = (lines_of(name).encode() for name in "abc")
    contents = {
        "datas_1.log": mark + a + mark + b.replace(b"\n", b"\r\n") + c + b"\x1a",
        "datas_2.log": (a + b + c).replace(b"\n", b"\r"),
        "datas_3.log": b"\0" * 9000 + a + b"\n\n \n" + b + b"\0\0" + c.strip(),
        "datas_4.log": gzip.compress(a + b) + gzip.compress(c),
        "datas_5.log.gz": a + b + c,
        "datas_6.log": bz2.compress(a + b + c),
        "datas_7.log.1": lzma.compress(a + b + c),
    }
    for name, content in contents.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        with FaultyServer() as server:
            for _ in range(2):
                assert ship(folder, "--server", server.url)[::2] == (0, ""), name
            assert server.names == ["a", "b", "c"], name


@pytest.mark.parametrize("packing", ["gzip", "bz2", "lzma"])
def test_what_stands_behind_a_packed_stream_is_delivered_or_named(tmp_path, packing):
    pack, zeros = __import__(packing).compress, b"" if packing == "bz2" else bytes(512)
    for number, behind in enumerate([lambda b: b, lambda b: zeros + b + zeros, lambda b: b"?" + b, lambda b: b[:-5]]):
        a, b = (pack(lines_of(name + str(number), filler="x" * 9000).encode()) for name in "ab")
        (tmp_path / ("datas_%d.log" % number)).write_bytes(a + behind(b))
    log_file(tmp_path / "datas_9.log", "z")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url, "--delete")
        assert (shipped.status, shipped.err.count("cannot read")) == (2, 3)
        assert [name for name in server.names if name != "b3"] == ["a0", "b0", "a1", "b1", "a2", "a3", "z"]
        assert sorted(path.name for path in tmp_path.glob("datas*")) == ["datas_2.log", "datas_3.log", "datas_9.log"]


@pytest.mark.parametrize("packing", ["gzip", "bz2", "lzma"])
def test_a_packed_file_that_is_cut_before_anything_can_be_unpacked_is_named_and_stays(tmp_path, packing):
    data = __import__(packing).compress(lines_of("a").encode())
    for length in range(7, 13):
        (tmp_path / ("datas_%d.log.1" % length)).write_bytes(data[:length])
    log_file(tmp_path / "datas_99.log", "z")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url, "--delete")
        assert (shipped.status, server.names, len(list(tmp_path.glob("datas_*.1")))) == (2, ["z"], 6)


def test_what_is_wrong_is_said_clearly_and_holds_up_no_other_file(tmp_path):
    log_file(tmp_path / "datas_1.log", "a")
    (tmp_path / "datas_2.log").write_bytes(b"\x28\xb5\x2f\xfd....")
    (tmp_path / "datas_3.log").write_text(lines_of("b"), encoding="utf-16")
    (tmp_path / "datas_4.log").write_bytes(gzip.compress(lines_of(*numbered("g", 200)).encode())[:-9])
    (tmp_path / "datas_5.log").symlink_to("nowhere")
    (tmp_path / "datas_6.log.gz").write_bytes(b"no gzip at all")
    (tmp_path / "datas_7.log").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(str(tmp_path / "datas_8.log"))
    log_file(tmp_path / "datas_9.log", "z", ends='{"a":1e999}\n{"a":%s}\n' % ("1" * 5000) + '{"a":' * 9000 + "\n")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
        readable = len(server.names) - 2
        assert shipped.status == 2 and server.names == ["a"] + numbered("g", readable) + ["z"]
        assert readable > 100                          # all lines before the damage, not whole batches
        for word in "zstd", "UTF-16", "datas_4.log", "datas_5.log", "datas_7.log":
            assert word in shipped.err
        assert "rejected 4," in shipped.out and shipped.err.count("\n") == 6 + hasattr(os, "mkfifo")


@table("word, data", [
    ("a zip archive", b"PK\3\4" + lines_of("a").encode()), ("a 7z archive", b"7z\xbc\xaf...."),
    ("packed by lz4", b"\x04\x22\x4d\x18...."), ("packed by compress", b"\x1f\x9d...."), ("UTF-16", lines_of("a").encode("utf-16-le")),
    ("packed by lzma", b"\x5d\0\0\x80...."), ("packed by lzip", b"LZIP\1...."),
    ("UTF-32", lines_of("a").encode("utf-32-be")), ("UTF-32", lines_of("a").encode("utf-32")), ("a tar archive", b"datas_1.log".ljust(257, b"\0") + b"ustar\n" + lines_of("a").encode())])
def test_what_has_to_be_unpacked_or_converted_first_is_named_and_neither_rejected_nor_removed(tmp_path, word, data):
    for number, packed in enumerate((data, gzip.compress(data))):
        (tmp_path / ("datas_%d.log.x" % number)).write_bytes(packed)
    log_file(tmp_path / "datas_9.log", "z")
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url, "--delete")
        assert (shipped.status, server.names, shipped.err.count("it is %s:" % word)) == (2, ["z"], 3)
        assert shipped.out == "delivered 1, rejected 0, remaining 0\n" and len(list(tmp_path.glob("datas_?.log.x"))) == 2


@posix_only
def test_closed_and_full_streams_end_nothing(tmp_path):
    with FaultyServer(then=refuse("bad")) as server, contextlib.ExitStack() as stack:
        started = []
        for number, streams in enumerate(["2>&-", ">&-", ">&- 2>&-", ">/dev/full 2>/dev/full", "<&-"]):
            folder = tmp_path / str(number)
            folder.mkdir()
            log_file(folder / "datas_1.log", "a", "bad", "b")
            command = 'exec "$0" -m analysys upload %s --server %s %s' % (folder, server.url, streams)
            environment = dict(os.environ, PYTHONPATH=os.path.dirname(SOURCE))
            started.append(stack.enter_context(subprocess.Popen(
                ["sh", "-c", command, sys.executable], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
        assert [each.wait() for each in started] == [1] * 5 and sorted(server.names) == ["a"] * 5 + ["b"] * 5


@posix_only
def test_what_is_printed_is_whole_also_where_a_full_pipe_does_not_block(tmp_path):
    log_file(tmp_path / "datas_1.log", *numbered("e", 9000))
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)                     # as a parent that runs an event loop may leave it
    with shipper(tmp_path, "--dry-run", stdout=theirs) as started, open(ours, "rb") as shown:
        wait_until(lambda: started.poll() is not None or not select.select([], [theirs], [], 0)[1])    # it is full
        os.close(theirs)
        assert shown.read().count(b"\n") == 9001 and started.wait() == 0


def test_a_request_carries_lines_of_many_files_and_more_of_them_where_requests_take_long(tmp_path):
    for number in range(40):
        log_file(tmp_path / ("datas_%d.log" % number), *numbered("e%d_" % number, 50))

    def slow(server, request):
        server.closed.wait(0.05)
        return accept(server, request)
    with FaultyServer(then=slow) as server:
        assert ship(tmp_path, "--server", server.url).status == 0
        assert [len(batch) for batch in server.batches] == [500, 1000, 500]
    assert (tmp_path / "upload.checkpoint").stat().st_size < 100000 + (64 << 10)


@posix_only
def test_follow_waits_for_a_directory_and_for_a_file_that_can_be_read(tmp_path, monkeypatch):
    folder = tmp_path / "later"

    def acts():
        looks()
        folder.mkdir()
        (folder / "datas_1.log").mkdir()
        (folder / "datas_3.log").symlink_to("nowhere")
        if os.path.exists("/proc/self/mem"):
            (folder / "datas_4.log").symlink_to("/proc/self/mem")      # EIO
        (folder / "datas_5.log").symlink_to("datas_5.log")             # ELOOP
        (folder / "datas_6.log.gz").write_bytes(b"\x1f\x8b no gzip at all")
        log_file(folder / "datas_2.log", "b")
        wait_until(lambda: server.names == ["b"])
        looks()
        (folder / "datas_1.log").rmdir()
        log_file(folder / "nowhere", "c")
        wait_until(lambda: server.names == ["b", "c"])                 # what lies behind a link changes no directory
        for number, name in (1, "a"), (4, "d"), (5, "e"), (6, "f"):
            path = folder / ("datas_%d.log" % number + ".gz" * (number == 6))
            log_file(folder / "draft", name)
            (folder / "draft").replace(path)
        wait_until(lambda: sorted(server.names) == list("abcdef"))
    with FaultyServer() as server:
        shipped = follow(monkeypatch, acts, folder, "--server", server.url)
        assert shipped[:2] == (0, "delivered 6, rejected 0, remaining 0\n")
        assert sum("cannot read" in line for line in shipped.err.splitlines()) >= 4 and "Traceback" not in shipped.err


@posix_only
def test_follow_tries_what_cannot_be_read_again_whatever_the_reason(tmp_path, monkeypatch):
    for number, name in enumerate("abcde"):
        log_file(tmp_path / ("datas_%d.log" % number), name)
    kept, tries = os.open, collections.Counter()
    reasons = dict(zip("1234", (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENFILE)))

    def failing(path, *arguments, **keywords):         # no file system here would say ESTALE
        number = str(path)[-5:-4] if "datas_" in str(path) else ""
        tries[number] += 1
        if number in reasons and tries[number] <= most:
            raise OSError(reasons[number], os.strerror(reasons[number]), path)
        return kept(path, *arguments, **keywords)
    monkeypatch.setattr(os, "open", failing)
    with FaultyServer() as server:
        most = 9
        shipped = ship(tmp_path, "--server", server.url)
        assert (shipped.status, server.names) == (2, ["a"])
        assert [shipped.err.count("cannot read %s/datas_%s.log" % (tmp_path, number)) for number in "12340"] == [
            2, 1, 1, 1, 0]
        shipped = follow(monkeypatch, lambda: wait_until(lambda: len(server.names) == 5), tmp_path, "--server", server.url)
        assert shipped[:2] == (0, "delivered 4, rejected 0, remaining 0\n")
        assert sorted(server.names) == list("abcde") and shipped.err.count("cannot read") == 4


@posix_only
def test_follow_reads_on_when_it_may_and_when_there_are_descriptors_again():
    with tempfile.TemporaryDirectory() as name, FaultyServer() as server:
        folder = pathlib.Path(name)
        folder.chmod(0o777)
        shut = folder / "shut"
        shut.mkdir()
        shut.chmod(0o755)
        log_file(folder / "datas_1.log", "a").chmod(0o644)
        log_file(shut / "datas_7.log", "b").chmod(0)
        shut.chmod(0)
        with process("""
            def starve():
                wait_until(lambda: os.path.exists(folder + "/starve"), 50)
                with contextlib.ExitStack() as held:
                    try:
                        while True:
                            held.callback(os.close, os.open(os.devnull, os.O_RDONLY))
                    except OSError:
                        print("starved", flush=True)
                    wait_until(lambda: not os.path.exists(folder + "/starve"), 50)
            import contextlib
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            analysys.main(["upload", folder + "/datas_1.log", "--server", url, "--checkpoint", folder + "/warm"])
            if os.getuid() == 0:                       # after the imports: Python itself may be for root only
                os.setgid(65534)
                os.setuid(65534)
            threading.Thread(target=starve, daemon=True).start()
            analysys._FOLLOW_EVERY = 0.02
            sys.exit(analysys.main(["upload", folder + "/shut", folder, "--follow", "--server", url,
                                    "--checkpoint", folder + "/point"]))
        """, server.url, folder) as started:
            wait_until(lambda: server.names == ["a", "a"])
            shut.chmod(0o755)
            assert b"cannot read %s: Permission" % bytes(shut) in started.stderr.readline()
            assert b"cannot read %s: Permission" % bytes(shut / "datas_7.log") in started.stderr.readline()
            (shut / "datas_7.log").chmod(0o644)
            wait_until(lambda: server.names == ["a", "a", "b"])
            (folder / "starve").touch()
            assert b"starved\n" in iter(started.stdout.readline, b"")
            log_file(folder / "datas_2.log", "c").chmod(0o644)
            assert b"Too many open files" in started.stderr.readline()
            (folder / "starve").unlink()
            wait_until(lambda: server.names == ["a", "a", "b", "c"])
            started.send_signal(signal.SIGTERM)
            out, err = started.communicate()
            assert (started.returncode, out) == (0, b"delivered 3, rejected 0, remaining 0\n") and b"Traceback" not in err


@posix_only
def test_a_follower_bears_a_failing_server_and_its_status_tells_what_became_of_what_it_read(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_GIVE_UP", -1.0)
    (tmp_path / "datas_1.log").symlink_to("nowhere")
    cases = [(["a"], [answer(503)] * 2, accept, 0, "cannot read"), (["b", "bad"], [], refuse("bad"), 1, "cannot read"),
             (["c"], [], then_fail, 2, "503")]
    for number, (names, steps, then, status, word) in enumerate(cases):
        log_file(tmp_path / ("datas_2%d.log" % number), *names)
        with FaultyServer(*steps, then=then) as server:
            def acts():
                wait_until(lambda: names[0] in server.names or server.requests and status == 2)
                wait_until(lambda: status != 1 or (tmp_path / "rejected.log").exists())
            shipped = follow(monkeypatch, acts, tmp_path, "--server", server.url)
            assert shipped.status == status and word in shipped.err


@posix_only
def test_a_follower_delivers_what_comes_behind_a_record_alone_on_which_the_server_chokes(tmp_path, monkeypatch):
    monkeypatch.setattr(analysys, "_LAST_BACKOFF", 0.1)
    path = log_file(tmp_path / "datas_1.log", "bad")

    def acts():
        wait_until(lambda: len(server.requests) >= 5)  # it stands aside
        with path.open("a") as file:
            file.write(lines_of("a"))
        wait_until(lambda: server.names == ["a"])
        rotated(path)
        log_file(path, "b")
        wait_until(lambda: server.names == ["a", "b"] and (tmp_path / "rejected.log").exists())
    with FaultyServer(then=choking_on(["bad"])) as server:
        shipped = follow(monkeypatch, acts, tmp_path, "--server", server.url)
        assert (shipped.status, shipped.out[:36]) == (1, "delivered 2, rejected 1, remaining 0")


def test_what_goes_while_others_are_sent_ends_in_a_word_and_status_2_where_it_was_asked_for(tmp_path):
    folder = tmp_path / "logs"

    def files():
        shutil.rmtree(str(folder), ignore_errors=True)
        folder.mkdir()
        return [log_file(folder / ("datas_%d.log" % number), "e%d" % number) for number in (1, 2)]
    changes = [  # what goes, what is given, status, what arrives, the word
        (lambda: paths[1].unlink(), lambda: paths, 2, ["e1"], "cannot read %s" % (folder / "datas_2.log")),
        (lambda: paths[1].unlink(), lambda: [folder], 0, ["e1"], "datas_2.log is gone"),
        (lambda: rotated(paths[1]), lambda: [folder], 0, ["e1", "e2"], ""),
        (lambda: shutil.rmtree(str(folder)), lambda: [folder], 2, ["e1"], "cannot read %s:" % folder)]
    for goes, given, status, arrives, word in changes:
        paths = files()

        def meanwhile(server, request):
            goes()
            return accept(server, request)
        with FaultyServer(meanwhile) as server:
            shipped = ship(*given(), "--server", server.url, "--batch", "1", "--checkpoint", tmp_path / "point")
            assert (shipped.status, server.names) == (status, arrives) and word in shipped.err, shipped
        (tmp_path / "point").unlink()


@root_only
def test_a_link_in_a_directory_counts_only_where_it_and_its_file_have_one_owner(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    owners = {"datas_1.log": (0, 0), "datas_2.log": (65534, 0), "datas_3.log": (0, 65534), "datas_4.log": (65534, 65534)}
    for name, (link, file) in owners.items():
        os.chown(str(log_file(tmp_path / name, "e" + name[6])), file, file)
        (folder / name).symlink_to(tmp_path / name)
        os.chown(str(folder / name), link, link, follow_symlinks=False)
    with FaultyServer() as server:
        shipped = ship(folder, "--server", server.url)
        assert (shipped.status, server.names) == (0, ["e1", "e4"])
        assert [name for name in owners if "%s is a link to another user's file" % name in shipped.err] == [
            "datas_2.log", "datas_3.log"]
        assert json.loads(ship(folder, "--dry-run", "--json").out)["accepted"] == 2
        assert ship(folder / "datas_2.log", "--server", server.url).status == 0   # who names it wants it
        assert server.names == ["e1", "e4", "e2"]


def test_history_leaves_the_rest_of_the_line_as_it_is(tmp_path):
    cases = [('{"xwhat": "\\u8dd1", "xcontext" : { } }', '{"xwhat": "\\u8dd1", "xcontext" : {"$importFlag":1 } }'),
             ('{"a":"\\"xcontext\\":{","xcontext":{"b":1.50}}', '{"a":"\\"xcontext\\":{","xcontext":{"$importFlag":1,"b":1.50}}'),
             ('{"xcontext":{"$importFlag":0}}', '{"xcontext":{"$importFlag":0}}'), ('{"xcontext":[]}', '{"xcontext":[]}')]
    for line, flagged in cases:
        assert analysys._flagged(line.encode()) == flagged.encode()


def test_an_inventory_is_bounded():
    inventory = analysys._Inventory()
    for number in range(510):
        inventory.add(event("e%d" % number, **{"p%d" % one: "v" * 100 for one in range(100)}))
    found = inventory.as_json()
    assert found["cut"] and found["accepted"] == 510 and found["conflicts"] == []
    assert sum(len(each["properties"]) for each in found["events"].values()) == 50000


@linux_only
def test_hostile_files_cost_little_memory_and_keep_nothing_else_from_being_delivered(tmp_path):
    with (tmp_path / "datas_1.log").open("wb") as file:
        file.write(lines_of("a").encode() + b'{"' + b"x" * (48 << 20) + b"\n")
        file.truncate(100 << 20)
        file.seek(100 << 20)
        file.write(lines_of("b").encode())
    (tmp_path / "datas_2.log.gz").write_bytes(
        gzip.compress(lines_of("c").encode()) + gzip.compress(b"\n" * (2 << 20)) * 20 + gzip.compress(lines_of("d").encode()))
    with FaultyServer() as server:
        out = run("""
            for options in ["--dry-run"], ["--server", url]:
                status = analysys.main(["upload", folder] + options)
                print(status, [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, server.url, tmp_path).out
        assert server.names == list("abcd")
    assert "4 lines are good, 1 are not" in out and "delivered 4, rejected 1, remaining 0" in out
    assert all(status == "1" and int(peak) < 64000 for status, peak in re.findall(r"^(\d) (\d+)$", out, re.M))


# ---------------------------------------------------------------------------
# README.md and setup.py
# ---------------------------------------------------------------------------

def source(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


README = source("README.md")
ENGLISH, CHINESE, APPENDIX = re.split("^# (?:中文|Appendix · 附录)\n", README.split("\n# English\n")[1], flags=re.M)
halves = pytest.mark.parametrize("half", [ENGLISH, CHINESE], ids=["English", "Chinese"])


def blocks(half, language):
    return re.findall(r"^```%s\n(.*?)^```$" % language, half, re.M | re.S)


def outside_code(half):
    return re.sub(r"^```.*?^```$", "", half, flags=re.M | re.S)


def code_of(example):
    """Return an example's tokens without comments and texts, which are in the half's language."""
    tokens = tokenize.generate_tokens(io.StringIO(example).readline)
    return [token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER)]


def test_the_halves_of_the_readme_have_the_same_sections_tables_and_examples():
    def shape(half):
        lines = outside_code(half).splitlines()
        return [re.match("#+", line).group() if line.startswith("#") else line.count(" |")
                for line in lines if line.startswith(("#", "|"))]
    assert shape(ENGLISH) == shape(CHINESE)
    assert blocks(ENGLISH, "sh") == blocks(CHINESE, "sh") and blocks(ENGLISH, "text") == blocks(CHINESE, "text")
    for language in "python", "py":                    # "py": a recipe, which .ci/hosts.py runs
        assert [code_of(each) for each in blocks(ENGLISH, language)] == [code_of(each) for each in blocks(CHINESE, language)]
    assert set(re.findall("^```(.+)", README, re.M)) == {"sh", "python", "py", "text"}
    assert len(blocks(ENGLISH, "py")) == len(re.findall("<!-- recipe: .+ -->\n```py", README))


@halves
def test_no_sentence_stands_twice_in_a_half_of_the_readme(half):
    cells = re.sub(r"\s*\|\s*|\n\n|\n- ", "\0", outside_code(half)).replace("\n", " ")
    sentences = [sentence.strip() for sentence in re.split("\0|[.。:：] ?(?![a-z0-9])", cells)]
    assert not [each for each, number in collections.Counter(sentences).items()
                if number > 1 and len(re.sub("`.*?`", "", each)) > 15]     # shorter ones are table cells, or code


def test_each_link_of_the_readme_leads_to_a_heading():
    headings = re.findall("^#+ (.+)", outside_code(README), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#(.+?)\)", README)) - anchors == set()


@halves
def test_a_half_of_the_readme_names_all_calls_arguments_errors_and_options_and_no_others(half, capsys):
    known = set(analysys.__all__)
    for kind in AnalysysPythonSdk, DefaultCollecter, BatchCollecter, LogCollecter:
        members = [kind.__init__] + [value for name, value in vars(kind).items() if name[0] != "_" and callable(value)]
        for member in members:
            known.update([member.__name__] if member.__name__[0] != "_" else [])
            known.update(set(inspect.signature(member).parameters) - {"self", "collector"})
    known.update(name for name in vars(analysys.Receiver) if name in ("wait_for", "fail_next", "clear"))
    assert known - set(re.findall(r"\w+", half)) == set()
    options = {"--version"}
    for command in "upload", "serve", "check":
        analysys.main([command, "--help"])
        options.update(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options - {"--help"} == set(re.findall(r"--[a-z][a-z-]+", half)) - {"--preload", "--raw"}     # gunicorn's, Redis's


# The frameworks of the examples, as far as they go; `.ci/hosts.py` has the true ones. It runs the example in files.
EXAMPLES = """
import asyncio, inspect, json, sys

class Framework:
    def __init__(self, *_, **options):
        vars(self).update(options)
    def route(self, *_):
        return lambda function: function
    get = route
    def task(self, function):
        return function
    def connect(self, function, weak):
        self.function = function

shutdown = Framework()
for name in "flask", "fastapi", "celery", "celery.signals", "django", "django.http":
    sys.modules[name] = Framework(Flask=Framework, FastAPI=Framework, Celery=Framework, HttpResponse=str.encode,
                                  worker_process_shutdown=shutdown)

async def asgi(lifespan, function):
    async with lifespan(None):
        await function()

for code in json.load(sys.stdin):
    sys.modules.pop("tracking", None)                  # a tracker each: some close it
    if code.startswith("# tracking.py"):
        with open("tracking.py", "w", encoding="utf-8") as file:
            file.write(code)
    if "asynccontextmanager" in code and sys.version_info < (3, 7):
        continue
    space = {}
    exec(code, space)
    if "lifespan" in space:
        asyncio.run(asgi(space["lifespan"], space["hello"]))
    elif "hello" in space:
        space["hello"](*inspect.signature(space["hello"]).parameters)
    elif "application" in space:
        space["application"]({}, lambda status, headers: None)
    elif "lambda_handler" in space:
        space["lambda_handler"]({}, None)
    for name in list(space):
        if name.startswith("test_"):
            space[name]()
    if "worker_process_shutdown" in space:
        shutdown.function()
"""


def test_the_python_examples_of_the_readme_and_of_the_manual_run(tmp_path):
    def run_examples(half):
        folder = tmp_path / str(len(half))
        folder.mkdir()
        (folder / "examples.py").write_text(EXAMPLES)
        with analysys.Receiver() as server:
            manual = re.search("    from analysys import .*?close\\(\\)\n", analysys.__doc__, re.S).group()
            examples = [re.sub("http://127.0.0.1:4089|https://host:port", server.url, code)
                        for code in blocks(half, "python") + [textwrap.dedent(manual)]]
            done = subprocess.run([sys.executable, "examples.py"], input=json.dumps(examples), cwd=str(folder), timeout=60,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                                  env={**os.environ, "PYTHONPATH": os.path.dirname(SOURCE), "PYTHONIOENCODING": "utf-8"})
            others = [line for line in done.stdout.splitlines() if "it was told to fail" not in line]
            assert (done.returncode, others) == (0, [])
            records = server.records
        assert sum(record["xwhat"] == "SearchCommodity" for record in records) == 4
        assert sum(record["xwhat"] == "hello" for record in records) == (7 if sys.version_info >= (3, 7) else 6)
        assert {record["xcontext"]["request_id"] for record in records if "request_id" in record["xcontext"]} == {"r-17"}
        masked = [record["appid"] for record in records if record["xcontext"].get("phone") == "***"]
        assert sorted(masked) == ["archive", "shop"] and "13800000000" not in str(records)
        assert os.listdir(str(folder / "events"))
    all_at_once(run_examples, [ENGLISH, CHINESE])


@posix_only
def test_the_commands_of_the_readme_run_and_the_demo_prints_what_it_says(tmp_path):
    def run_command(command):
        command = command.replace("http://127.0.0.1:4089", server.url)
        command = command.replace("python3 analysys.py", "python3 -m analysys").replace("python3", sys.executable)
        command = re.sub(" serve$", " serve --port 0", command, flags=re.M)
        started = subprocess.Popen(["bash", "-e", "-c", command], cwd=str(tmp_path), encoding="utf-8",
                                   env={**os.environ, "PYTHONIOENCODING": "utf-8"}, stdout=subprocess.PIPE)
        if " serve " in command:
            assert started.stdout.readline().startswith("serving on http://127.0.0.1:")
            started.terminate()
        out = started.communicate(timeout=60)[0]
        assert started.returncode == 0, out
        if "demo" in command:
            said = [re.sub(r"\d\d:\d\d:\d\d|[\d.]+ ms", "…", text) for text in (out, blocks(ENGLISH, "text")[0])]
            assert set(said[1].splitlines()) - {"…"} <= set(said[0].splitlines())
    shutil.copy(SOURCE, str(tmp_path / "analysys.py"))
    with AnalysysPythonSdk(LogCollecter(str(tmp_path / "events"), general_rule="day")) as tracker:
        tracker.setAppId("fangzhouargo")
        tracker.track("ABCD123456", "SearchCommodity", {"commodity_price": 5000})
    commands = [command for command in blocks(ENGLISH, "sh") if "venv" not in command]     # .ci/run runs the one that has it
    assert "<!-- the test command -->\n```sh\n" + blocks(ENGLISH, "sh")[-1] in README
    with analysys.Receiver() as server:
        all_at_once(run_command, commands)
        assert "SearchCommodity" in [record["xwhat"] for record in server.records]


def test_the_file_and_both_halves_say_first_that_they_are_not_the_vendors():
    for text in analysys.__doc__, ENGLISH:
        assert "independent implementation, not the vendor's" in "\n".join(text.splitlines()[:4])
    for text in analysys.__doc__, CHINESE:
        assert re.search("独立实现[,，]非官方", "\n".join(text.splitlines()[:4]))


@linux_only
def test_an_import_makes_no_socket_thread_handler_hook_or_file(tmp_path):
    """The README says so to who reviews the file."""
    (tmp_path / "look.py").write_text(textwrap.dedent("""
        import atexit, logging, os, signal, sys, threading

        def state():
            handlers = [signal.getsignal(number) for number in range(1, 65)]
            return (len(os.listdir("/proc/self/fd")), threading.active_count(), handlers, list(logging.root.handlers),
                    logging.root.manager.loggerDict, getattr(atexit, "_ncallbacks", int)(), sys.excepthook)

        def refuse(*_, **__):
            raise AssertionError("a fork hook")

        before, os.register_at_fork = state(), refuse
        import analysys
        assert state() == before
    """))
    done = python("-B", "look.py", cwd=tmp_path)
    assert (done.status, done.err, os.listdir(str(tmp_path))) == (0, "", ["look.py"])


def test_the_file_holds_the_notice_of_its_licence():
    notice = README[README.index("Permission is hereby granted"):].split()
    header = re.sub("^# ?", "", source("analysys.py")[:12000], flags=re.M).split()
    start = header.index("Permission")
    assert header[start:start + len(notice)] == notice and "Copyright (c) 2026 the analysys.py authors" in README
    assert source("analysys.py").splitlines()[0] == "# SPDX-License-Identifier: MIT"


def test_the_table_of_versions_has_a_row_for_this_one_and_full_hashes_of_the_others():
    rows = [row.split(" | ") for row in re.findall(r"^\| (\d.+) \|$", APPENDIX, re.M)]
    assert rows[-1][0] == analysys.__version__ and "run `--version`" in rows[-1][1]
    assert all(re.match("`?[0-9a-f]{64}`?$", row[1]) for row in rows[:-1])


def test_setup_needs_nothing_and_takes_the_version_from_the_module(monkeypatch):
    given, setuptools = {}, types.ModuleType("setuptools")
    setuptools.setup = given.update
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.chdir(HERE)
    runpy.run_path(os.path.join(HERE, "setup.py"), run_name="__main__")
    assert (given["version"], given["py_modules"], given["python_requires"].replace(" ", "")) == (
        analysys.__version__, ["analysys"], ">=3.6")
    assert not given.get("install_requires")
    assert given["entry_points"] == {"console_scripts": ["analysys = analysys:main"]}


def test_the_version_is_written_once():
    with open(os.path.join(HERE, "setup.py"), encoding="utf-8") as file:
        assert analysys.__version__ not in file.read()
    with open(SOURCE, encoding="utf-8") as file:
        assert file.read().count('"%s"' % analysys.__version__) == 1
