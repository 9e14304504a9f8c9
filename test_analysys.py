"""Tests of analysys.py: ``python3 -m pytest``. Each name states its rule; the sections follow the file's.

Servers, proxies and processes are real, on free loopback ports; nothing waits for the clock but `wait_until`.
"""
import base64
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import decimal
import email.utils
import enum
import fractions
import gzip
import hashlib
import http.client
import inspect
import io
import json
import logging
import os
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
import traceback
import tracemalloc
import types
import urllib.request
import zipfile

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
linux_only = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, signals and RLIMIT_FSIZE")


# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "PYTHONIOENCODING"):
            monkeypatch.delenv(name)


def wait_until(condition, seconds=10):
    """Return as soon as *condition()* is true; fail when it is not so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        threading.Event().wait(0.005)


def table(names, rows):
    """Parametrize with ids that stay short whatever the value."""
    def name(value):
        try:
            return ascii(value)[:40]
        except Exception:                              # too deep or too long for repr()
            return type(value).__name__
    return pytest.mark.parametrize(names, rows, ids=name)


def python(*arguments, cwd=None, **environment):
    """Run this interpreter with analysys.py importable; return the finished process."""
    variables = {**os.environ, "PYTHONPATH": os.path.dirname(SOURCE), "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run([sys.executable] + [str(argument) for argument in arguments], cwd=cwd and str(cwd),
                          env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding="utf-8", timeout=120)


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


class Tracker(AnalysysPythonSdk):
    """A tracker with an app id and a clock that stands still, on a Sink unless told otherwise."""

    def __init__(self, collecter=None, **keywords):
        self.sink = collecter or Sink()
        super().__init__(self.sink, **keywords)
        self._clock = lambda: WHEN / 1000
        self.setAppId("app")


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


def stats(collecter):
    """Return the collecter's counters, after a look at their names and their balance."""
    found = collecter.stats()
    assert set(found) == {"accepted", "delivered", "rejected", "pending", "requests", "retries"}
    assert found["accepted"] == found["delivered"] + found["rejected"] + found["pending"]
    return found


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
        self.tls = certificate and server_context(certificate)
        self.url = "http%s://127.0.0.1:%d" % ("s" if certificate else "", self.server_address[1])

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        for connection in self.sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass                                   # closed already

    def get_request(self):
        self.connections += 1
        return super().get_request()

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
    """A proxy that only knows CONNECT."""

    def serve(self, connection, stream):
        method, target, _ = stream.readline().decode().split()
        self.requests.append(Request(method, target, list(iter(stream.readline, b"\r\n")), b""))
        host, port = target.split(":")
        with socket.create_connection((host, int(port))) as other:
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
    """A reply that is held back until the gate is set."""

    def __call__(self, request):
        assert self.wait(30)
        return answer()


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

    def __init__(self, *script, then=None, listening=True):
        self.script, self.then, self.listening = collections.deque(script), then or accept, listening
        self.accepted, self.times, self.closed = [], [], threading.Event()
        super().__init__(self._step)

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


def gated(gate):
    """Accept when *gate* is set."""
    return lambda server, request: gate.wait(20) and accept(server, request)


def when(condition, reply, otherwise=accept):
    return lambda server, request: reply if condition(request) else otherwise(server, request)


def code(number):
    return json.dumps({"code": number, "msg": "unknown event"}).encode()


def refuse(*names, reply=answer(200, code(400))):
    """Refuse each batch that holds one of the *names*."""
    return when(lambda request: any(record["xwhat"] in names for record in decode(request.body)), reply)


def tracker_to(collecter, **options):
    tracker = AnalysysPythonSdk(collecter, **options)
    tracker.setAppId("app")
    return tracker


def track(tracker, *names):
    for name in names:
        tracker.track("user", name)


def numbered(prefix, count):
    return ["%s%d" % (prefix, number) for number in range(count)]


def balanced(collecter, **expected):
    """Return the stats of *collecter*, which must balance and have the *expected* entries."""
    stats = collecter if isinstance(collecter, dict) else collecter.stats()
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


def lines_in(folder):
    """Return the xwhat of each line of the log files in *folder*."""
    return [json.loads(line)["xwhat"] for path in sorted(folder.glob("datas_*.log"))
            for line in path.read_text(encoding="utf-8").splitlines()]


PRELUDE = """
import gc, json, logging, multiprocessing, os, signal, sys, threading, time, traceback
import analysys
from analysys import *
url, folder = sys.argv[1:3]
%s
%s
%s
def waiting():                                         # sends nothing before somebody flushes
    return BatchCollecter(url, max_interval_time=60, queue_cache_max_size=100, request_timeout=5)

def child(work):                                       # work() in a fork, whose status tells whether it raised
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)

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
""" % tuple(inspect.getsource(function) for function in (wait_until, tracker_to, balanced))


@contextlib.contextmanager
def process(script, url, folder=os.curdir, before=""):
    """Run *before*, the prelude and *script* in a new Python, killed after 40 s; yield the Popen object."""
    with tempfile.TemporaryDirectory() as home:
        path = os.path.join(home, "script.py")
        with open(path, "w") as file:
            file.write(textwrap.dedent(before) + PRELUDE + textwrap.dedent(script))
        with subprocess.Popen([sys.executable, path, url, str(folder)], universal_newlines=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=dict(os.environ, PYTHONPATH=os.path.dirname(SOURCE))) as running:
            timer = threading.Timer(40, running.kill)
            timer.start()
            try:
                yield running
            finally:
                timer.cancel()
                running.kill()


Ended = collections.namedtuple("Ended", "out err seconds")


def run(script, *args, **options):
    """Run *script* like `process` to its end, which must be a good one."""
    start = time.monotonic()
    with process(script, *args, **options) as running:
        out, err = running.communicate()
    assert running.returncode == 0 and "Traceback" not in err, err
    return Ended(out, err, time.monotonic() - start)


posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# ---------------------------------------------------------------------------
# Helpers: files and the processes that write and ship them
# ---------------------------------------------------------------------------

def event(xwhat, **properties):
    return record("user", xwhat, properties)


def events_in(path):
    """Return the xwhat of each line of a file, which must hold whole records."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n"), data[-100:]
    return [json.loads(line.decode())["xwhat"] for line in data.splitlines()]


def files_in(folder, pattern="datas_*"):
    """Return {name: the xwhat of each line} for the files in *folder*."""
    return {path.name: events_in(path) for path in sorted(folder.glob(pattern))}


def lines_of(*xwhats):
    return "".join(json.dumps(event(xwhat)) + "\n" for xwhat in xwhats)


def log_file(path, *xwhats, ends=""):
    """Write a log file of events; *ends* is what comes after them."""
    path.write_text(lines_of(*xwhats) + ends)
    return path


def zipped(path):
    """Compress a file as gzip(1) does and return the new path."""
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def run_of(prefix, count):
    return ["%s%d" % (prefix, number) for number in range(count)]


def then_fail(server, request):
    """Say that the server is down, for longer than `upload` waits."""
    return answer(503, b"", "Retry-After: 60")


def refusing(*xwhats):
    """Return a step that refuses each batch with one of *xwhats* and accepts the others."""
    def step(server, request):
        if any(entry["xwhat"] in xwhats for entry in server.batches[-1]):
            return answer(200, b'{"code":400,"msg":"unknown event"}')
        return accept(server, request)
    return step


DISK_SCRIPT = """
import errno, itertools, json, os, random, resource, signal, sys, threading, time, traceback
import analysys
from analysys import *
folder, url = sys.argv[1:3]
%s
def event(xwhat, **properties):
    return record("user", xwhat, properties)

def fork(work, *arguments):                            # work(...) in a child_process, whose status says whether it raised
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

def error_of(call, *arguments):
    try:
        call(*arguments)
    except AnalysysPythonSdkException as error:
        return error
    raise AssertionError("nothing was raised")
""" % inspect.getsource(record)


@contextlib.contextmanager
def child_process(*command, **options):
    """Start a program, yield its Popen object, kill what is left of it."""
    environment = dict(os.environ, PYTHONPATH=os.path.dirname(SOURCE), PYTHONIOENCODING="utf-8")
    options = dict({"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}, **options)
    with subprocess.Popen([sys.executable] + [str(part) for part in command], env=environment, **options) as started:
        timer = threading.Timer(40, started.kill)
        timer.start()
        try:
            yield started
        finally:
            timer.cancel()
            if started.poll() is None:
                started.kill()


def script(code, folder, url="http://127.0.0.1:1", **options):
    """Start Python with *code*, which knows *folder* and *url*."""
    return child_process("-c", DISK_SCRIPT + textwrap.dedent(code), folder, url, **options)


def script_ends(code, folder, url="http://127.0.0.1:1"):
    """Run *code* to its end, which must be a good one; return what it printed."""
    with script(code, folder, url) as started:
        out, err = started.communicate()
    assert started.returncode == 0 and b"Traceback" not in err, err.decode()
    return out.decode()


Shipped = collections.namedtuple("Shipped", "status out err")


def ship(*arguments):
    """Run `upload` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = analysys.main(["upload"] + [str(argument) for argument in arguments])
    return Shipped(status, out.getvalue(), err.getvalue())


def shipper(*arguments, **options):
    """Start `upload` as a process of its own."""
    return child_process(SOURCE, "upload", *arguments, **options)


def ended(started):
    out, err = started.communicate()
    return Shipped(started.returncode, out.decode(), err.decode())


@contextlib.contextmanager
def spooling(server, folder, **options):
    """Yield a collecter with a spool; what the block does not flush may stay on disk."""
    options = dict({"request_timeout": 5, "queue_cache_max_size": 1}, **options)
    collecter = BatchCollecter(server.url, spool_path=str(folder), **options)
    try:
        yield collecter
    finally:
        collecter.close(0.1)
    counts = collecter.stats()
    assert counts["accepted"] + counts["adopted"] == counts["delivered"] + counts["rejected"] + counts["pending"]


def leave(folder, *xwhats):
    """Have a process track events that it cannot deliver, and end as if it were killed."""
    script_ends("""
        collecter = BatchCollecter(url, spool_path=folder)
        for xwhat in %r:
            collecter.uploadData(event(xwhat))
        os._exit(0)
    """ % (xwhats,), folder)


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
                      "spool_path=None, spool_max_bytes=1073741824, on_error=None)"] + CALLS_OF_A_COLLECTER),
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
    sdk = Tracker()
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
    sdk = Tracker(BrokenSink(), on_error=lambda *error: errors.append(error))
    getattr(sdk, method)(*arguments)                   # the collecter raises
    getattr(sdk, method)("", *arguments[1:])           # validation raises
    assert [type(error) for error, _ in errors] == [RuntimeError, IllegalData]
    assert errors[0][1] == record("u", xwhat, context, is_login=method == "alias")
    assert errors[1][1] is None or isinstance(errors[1][1], dict)
    with pytest.raises(RuntimeError):                  # without one it comes through
        getattr(Tracker(BrokenSink()), method)(*arguments)
    unnamed = AnalysysPythonSdk(Sink(), on_error=lambda *error: errors.append(error))
    getattr(unnamed, method)(*arguments)               # there is no app id
    assert len(errors) == 3


def test_all_other_calls_raise_even_with_on_error():
    sdk = Tracker(BrokenSink(), on_error=lambda *error: pytest.fail("on_error was called"))
    for call in (lambda: sdk.setAppId(""), lambda: sdk.setDebugMode(9), lambda: sdk.registerSuperProperties({"": 1})):
        with pytest.raises(IllegalData):
            call()
    for call in sdk.flush, sdk.close:
        with pytest.raises(RuntimeError):
            call()


def test_an_on_error_that_raises_is_logged_and_no_more(caplog):
    def on_error(error, record):
        raise KeyError("on_error itself")
    Tracker(on_error=on_error).track("", "Event")
    assert "on_error itself" in caplog.text


def test_flush_close_and_a_with_block_reach_the_collecter():
    with Tracker() as sdk:
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
        with Tracker(Stamping(server.url)) as sdk:
            sdk.track("u", "subclass", {"tags": ["a"]})
        patched = DefaultCollecter(server.url)
        with Tracker(patched) as sdk:
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
        with Tracker(types.SimpleNamespace(uploadData=inner.uploadData, flush=inner.flush, close=inner.close)) as sdk:
            sdk.track("u", "Event")
        assert server.records == [record("u", "Event")] and stats(inner)["delivered"] == 1


@each_collecter
@table("bad", [{"xwhat": "e", "n": float("nan")}, {"xwhat": "e", "n": {1}}, {"xwhat": "e", "n": "\ud83d"}, {}, None, b"{}"])
def test_a_record_given_by_hand_that_is_no_json_raises_and_is_not_counted(tmp_path, kind, bad):
    collecter = make(kind, URL, tmp_path)
    with pytest.raises(IllegalData) as caught:
        collecter.uploadData(bad)
    assert "record is " in str(caught.value)
    assert set(stats(collecter).values()) == {0}
    collecter.close()


def test_super_properties_go_into_track_records_only():
    sdk = Tracker()
    sdk.registerSuperProperties({"member": "VIP"})
    for method, arguments, xwhat, context in CALLS:
        getattr(sdk, method)(*arguments)
        expected = dict(context, member="VIP") if method == "track" else context
        assert sdk.sink.records[-1] == record("u", xwhat, expected, is_login=method == "alias")


def test_an_event_property_replaces_a_super_property_whatever_the_case():
    sdk = Tracker()
    sdk.registerSuperProperties({"City": "Beijing", "member": "VIP"})
    sdk.track("u", "Event", {"cITY": "Oslo"})
    sdk.track("u", "Event")
    assert sdk.sink.records == [record("u", "Event", {"cITY": "Oslo", "member": "VIP"}),
                                record("u", "Event", {"City": "Beijing", "member": "VIP"})]


def test_super_property_names_match_whatever_the_case():
    sdk = Tracker()
    sdk.registerSuperProperties({"City": "Beijing", "member": "VIP"})
    sdk.registerSuperProperties({"CITY": "Oslo"})
    assert sdk.getAllSuperProperties() == {"CITY": "Oslo", "member": "VIP"}
    assert sdk.getSingleSuperProperties("city") == "Oslo"
    sdk.unregisterSuperProperties("cItY")
    sdk.unregisterSuperProperty("MEMBER")
    assert sdk.getAllSuperProperties() == {}


def test_the_getters_return_copies_and_none_for_what_is_absent():
    sdk = Tracker()
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
        sdk = Tracker(DefaultCollecter(server.url))
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


# ---------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------

@table("collecter", ["DefaultCollecter(server_url)",
                     "BatchCollecter(server_url, 10, 2, 100, 1000, request_timeout=None)"])
@table("module", ["analysys", "analysyspythonsdk"])
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
    assert (done.returncode, done.stdout) == (0, "")
    assert "SearchCommodity" in done.stderr            # debug mode, and no logging configured
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


def test_a_record_is_the_same_whether_its_like_was_made_before_or_not():
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
    kept, fresh = Tracker(), []
    settings = [{}, 0, "app"]
    for number in range(5000):
        if number < 1000 and chance.random() < 0.1:
            settings = [some(["A", "b", "Common"]), chance.choice([0, 1, 2]), chance.choice(["app", "另一个"])]
            apply(kept, *settings)
        some_properties = some(["a", "B", "common", "own", "$importFlag"])
        call = chance.choice(list(calls()))
        call(kept)
        other = Tracker()
        apply(other, *settings)
        call(other)
        fresh += other.sink.records
    assert kept.sink.records == fresh and len(fresh) > 3000
    for number in range(1100):                         # more than are kept
        kept.track("u", "many_%d" % number)
    assert [one["xwhat"] for one in kept.sink.records[-1100:]] == ["many_%d" % number for number in range(1100)]
    assert {type(one["xcontext"]["$is_login"]) for one in fresh} == {bool}


def apply(sdk, super_properties, debug_mode, appid):
    sdk.clearSuperProperties()
    sdk.registerSuperProperties(super_properties)
    sdk._settings = sdk._settings.replace(debug=debug_mode)    # setDebugMode() would have it log
    sdk.setAppId(appid)


@pytest.mark.parametrize("value", [1, 0, "True", None])
def test_what_equals_a_good_argument_is_not_taken_for_it(value):
    sdk = Tracker()
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
        for number in range(300):                      # 76 KB of text each
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
    sdk = Tracker()
    sdk.track("u", "buy", {"n": 1}, "python")
    sdk.track("u", Folding("BUY"), {Folding("N"): 1}, Folding("Python"))
    for bad in Pretender(), Folding("bu y"):
        for arguments in ("u", bad), ("u", "buy", {bad: 1}), ("u", "buy", None, Pretender()):
            with pytest.raises(IllegalData):
                sdk.track(*arguments)
    assert sdk.sink.records == [record("u", "buy", {"n": 1}), record("u", "BUY", {"N": 1}, "Python")]


def test_an_alias_is_always_a_login():
    sdk = Tracker()
    sdk.alias("u", "d", "ios", {"n": 1}, is_login=False)
    assert sdk.sink.records == [record("u", "$alias", {"$original_id": "d", "n": 1}, "iOS", is_login=True)]


@table("given, sent", [("ios", "iOS"), ("IOS", "iOS"), ("ANDROID", "Android"), ("Js", "JS"), ("WECHAT", "WeChat"),
                       ("HarmonyOS", "HarmonyOS"), ("小程序", "小程序"), ("Python", "Python"), (" ios", " ios"),
                       (None, "python"), ("", "python")])
def test_four_platforms_have_their_spelling_and_any_other_passes_as_it_is(given, sent):
    sdk = Tracker()
    sdk.track("u", "Event", data_platform=given)
    sdk.alias("u", "d", given)
    sdk.profile_delete("u", given)
    assert [one["xcontext"]["$platform"] for one in sdk.sink.records] == [sent] * 3


def test_xwhen_is_now_or_the_callers_int_or_datetime():
    sdk, utc = Tracker(), datetime.timezone.utc
    noon = datetime.datetime(2018, 7, 25, 12, 0, 0, 857000)
    noons = [noon.replace(tzinfo=utc, microsecond=ms * 1000) for ms in range(1000)]
    for xwhen in [None, 10 ** 12, 10 ** 13 - 1, noon] + noons:
        sdk.track("u", "Event", xwhen=xwhen)
    local = round(time.mktime(noon.timetuple())) * 1000 + 857
    times = [one["xwhen"] for one in sdk.sink.records]
    assert times == [WHEN, 10 ** 12, 10 ** 13 - 1, local] + [1532520000000 + ms for ms in range(1000)]
    assert {type(xwhen) for xwhen in times} == {int}


@table("method", ["profile_set", "profile_set_once", "profile_increment", "profile_append"])
def test_a_profile_call_without_properties_sends_nothing_and_is_no_error(method):
    sdk = Tracker()
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
    assert 0 < len(str(caught.value)) <= 500
    return str(caught.value)


def accepted(method, *arguments):
    """Return the properties that the call sends or registers, of those it was given."""
    sdk = Tracker()
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
Pair = collections.namedtuple("Pair", "first second")
NESTED = []
for _ in range(10 ** 5):
    NESTED = [NESTED]

NAMES = ["a", "Z", "$a", "a_", "a1", "A" * 99, "$" + "a" * 98, "$importFlag"]
BAD_NAMES = ["", "$", "1a", "_a", "$1", "$_a", "$$a", "a$", "a-b", "a b", "a.b", " a", "a ", "a\n", "\na", "é", "aé",
             "名字", "ａ", "a٣", "a\ud800", "a\0", "a" * 100, "$" + "a" * 99, None, 1, True, 1.5, b"a", ("a",)]
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
    datetime.time(1), datetime.timedelta(1), "x" * 256, "\U0001f600" * 256, "\ud800", "a\udfff",
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
    sdk = Tracker()
    sdk.registerSuperProperties({"n": 1})
    for method, arguments, argument, _ in PROPERTY_CALLS:
        message = refused(sdk, method, *arguments, {"ok": 1, "the_name": value})
        assert argument in message and "the_name" in message


def named(method, names, value):
    """Return what the method takes as properties of these names."""
    return list(names) if method == "profile_unset" else {name: copy.copy(value) for name in names}


@table("name", NAMES)
def test_a_name_is_accepted(name):
    sdk = Tracker()
    sdk.track("u", name)
    assert sdk.sink.records == [record("u", name)]
    for method, arguments, _, value in NAME_CALLS:
        assert accepted(method, *arguments, named(method, [name], value)) == {name: value}


@table("name", BAD_NAMES)
def test_any_other_name_is_refused(name):
    sdk = Tracker()
    assert "event_name" in refused(sdk, "track", "u", name)
    for method, arguments, argument, value in NAME_CALLS:
        assert argument in refused(sdk, method, *arguments, named(method, ["ok", name], value))


@table("name", RESERVED)
def test_a_reserved_property_name_is_refused_in_any_case(name):
    for spelled in name, name.upper(), name.title():
        for method, arguments, argument, value in NAME_CALLS:
            message = refused(Tracker(), method, *arguments, named(method, [spelled], value))
            assert argument in message and spelled in message


def test_names_that_differ_only_by_case_are_refused_in_one_call():
    for method, arguments, argument, value in NAME_CALLS:
        assert argument in refused(Tracker(), method, *arguments, named(method, ["name", "NAME"], value))


def many(count, start=0):
    return {"p%d" % number: number for number in range(start, start + count)}


def test_a_call_takes_100_properties_and_no_more():
    for method, arguments, argument, value in NAME_CALLS:
        assert accepted(method, *arguments, named(method, many(100), value)) == dict.fromkeys(many(100), value)
        assert argument in refused(Tracker(), method, *arguments, named(method, many(101), value))


def test_there_are_100_super_properties_in_all_and_no_more():
    sdk = Tracker()
    sdk.registerSuperProperties(many(60))
    refused(sdk, "registerSuperProperties", many(41, 60))
    sdk.registerSuperProperties(many(40, 60))
    sdk.registerSuperProperties({name.upper(): -1 for name in many(100)})       # replaces them: still 100
    assert sdk.getAllSuperProperties() == {name.upper(): -1 for name in many(100)}
    refused(sdk, "registerSuperProperties", {"one_more": 1})
    sdk.unregisterSuperProperty("p0")
    sdk.registerSuperProperties({"one_more": 1})


def test_an_event_may_have_100_properties_beside_100_super_properties():
    with analysys.Receiver() as server:
        sdk = Tracker(DefaultCollecter(server.url))
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
        message = refused(Tracker(), method, "u", {"ok": good[0], "the_name": value})
        assert "profile_properties" in message and "the_name" in message


def test_profile_unset_takes_a_list_tuple_or_set_and_nothing_else():
    for keys in ["name"], ("name",), {"name"}:
        assert accepted("profile_unset", "u", keys) == {"name": ""}
    for keys in "name", b"name", 1, True, {"name": 1}, object():
        assert "profile_properties_keys" in refused(Tracker(), "profile_unset", "u", keys)


@table("properties", [["a"], "a", 1, True, {"a"}, [("a", 1)], object()])
def test_properties_are_a_dict(properties):
    for method, arguments, argument, _ in NAME_CALLS[:-1]:
        assert argument in refused(Tracker(), method, *arguments, properties)


@each_call
def test_ids_platform_login_and_time_are_checked_in_every_call(method, arguments, xwhat, context):
    sdk, who = Tracker(), "alias_id" if method == "alias" else "distinct_id"
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
    sdk = Tracker()
    assert "appid" in refused(sdk, "setAppId", appid)
    for good in None, "x" * 255, "\U0001f600" * 255:
        if good:
            sdk.setAppId(good)
        sdk.track("u", "Event")
        assert sdk.sink.records.pop() == record("u", "Event", appid=good or "app")


@table("mode", [3, -1, None, "1", 1.0, 10 ** 5000])
def test_a_refused_debug_mode_leaves_the_last_one(mode):
    sdk = Tracker()
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
    ("super_properties", ("registerSuperProperties", HUGE)), ("profile_properties_keys", ("profile_unset", "u", HUGE)),
    ("profile_properties_keys xxxxx", ("profile_unset", "u", [HUGE]))])
def test_a_message_names_the_argument_the_value_and_the_limit_and_is_short(words, call):
    message = refused(Tracker(), *call)                # which checks the length
    assert [word for word in words.split() if word not in message] == []


def test_the_callers_objects_are_never_changed_and_what_they_do_later_changes_nothing():
    for method, arguments, _, _ in PROPERTY_CALLS + [("profile_append", ("u",), "", "")]:
        sdk, given = Tracker(), {"tags": ["a"]}
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
    sdk = Tracker()
    sdk.registerSuperProperties({"tags": ["a"]})
    sdk.track("u", "Event")
    sdk.sink.records[0]["xcontext"]["tags"].append("b")
    sdk.track("u", "Event")
    assert sdk.sink.records[1] == record("u", "Event", {"tags": ["a"]})



@table("named, make, values", [
    ("server_url", DefaultCollecter,
     [None, 5, b"http://127.0.0.1", "", "127.0.0.1:80", "ftp://127.0.0.1", "http://", "http://:80",
      "https://host:port",
      "http://h:65536", "http://h:-1", "http://a b/", URL + "/\n", "http://[::1", "http://" + " " * 10 ** 6]),
    ("server_url", BatchCollecter, ["host", None]),
    ("request_timeout", lambda value: DefaultCollecter(URL, value), [0, -1, "10", float("nan")]),
    ("request_timeout", lambda value: BatchCollecter(URL, request_timeout=value), [0, -1, "10", float("nan")]),
    ("max_interval_time", lambda value: BatchCollecter(URL, value), [0, -1, "15", float("nan")]),
    ("queue_cache_max_size", lambda value: BatchCollecter(URL, 15, value), [0, -1, 1.0, "10", None]),
    ("collecter_max_size", lambda value: BatchCollecter(URL, 15, 10, value), [0, -1, 1.0, "100", None]),
    ("queue_max_size", lambda value: BatchCollecter(URL, 15, 10, 100, value), [0, -1, 1.0, "1000", None]),
    ("batch_num", lambda value: LogCollecter("logs", True, value), [0, -1, 2.5, "20", None]),
    ("general_rule", lambda value: LogCollecter("logs", True, 20, value), ["", "week", None, 1, HUGE])])
def test_a_bad_constructor_argument_is_named_and_refused(tmp_path, monkeypatch, named, make, values):
    monkeypatch.chdir(tmp_path)
    for value in values:
        with pytest.raises(IllegalData, match=named) as caught:
            make(value)
        assert len(str(caught.value)) <= 500 and os.listdir(str(tmp_path)) == []


def test_the_smallest_constructor_arguments_are_accepted(tmp_path):
    DefaultCollecter(URL, 0.001).close()
    BatchCollecter(URL, 0.001, 1, 1, 1, 0.001).close()
    for rule in "hour", "day", "Hour", "DAY":
        LogCollecter(str(tmp_path), True, 1, rule).close()


# ---------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------

def test_a_request_is_a_post_of_base64_gzip_json_to_up():
    with Server() as server:
        Tracker(DefaultCollecter(server.url, headers={"X-Team": "argo"})).track("u", "Event", {"name": "跑步机"})
        request = server.requests[0]
    assert (request.method, request.target) == ("POST", "/up")
    assert request.headers["user-agent"] == "analysys-python/" + analysys.__version__
    assert request.headers["x-team"] == "argo"
    body = gzip.decompress(base64.b64decode(request.body, validate=True)).decode("utf-8")
    assert json.loads(body) == [record("u", "Event", {"name": "跑步机"})]


def test_a_body_of_more_than_a_packet_is_compressed():
    with Server() as server:
        with Tracker(BatchCollecter(server.url, queue_cache_max_size=NEVER)) as sdk:
            events(sdk, 100)
        assert numbers(server.records) == list(range(100))
        assert len(server.requests[0].body) < len(json.dumps(server.records)) / 4


@table("path, target", [("", "/up"), ("/", "/up"), ("/up", "/up"), ("/a/b", "/a/b/up"), ("/a/up", "/a/up"),
                        ("/startup", "/startup/up")])
def test_up_is_appended_unless_the_path_ends_in_it(path, target):
    with Server() as server:
        Tracker(DefaultCollecter(server.url + path)).track("u", "Event")
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


@table("status, body", DELIVERED)
def test_a_2xx_with_code_200_is_success(status, body):
    assert attempt(answer(status, body)) == (None, 1)


@table("status, body", REFUSED)
def test_data_are_refused_for_good_on_the_platforms_own_word(status, body):
    error, requests = attempt(answer(status, body))
    assert (type(error), requests) == (IllegalData, 1)
    assert b"no such app" not in body or "no such app" in str(error)


@table("status, body", NOT_DELIVERED)
def test_everything_else_is_not_the_datas_fault(status, body):
    error, requests = attempt(answer(status, body))
    assert (type(error), requests) == (NetworkError, 1)


def test_answers_that_end_with_a_chunk_or_with_the_connection_are_understood():
    assert attempt(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nc\r\n" + OK + b"\r\n0\r\n\r\n") == (None, 1)

    def until_closed(request):
        yield b"HTTP/1.0 200 OK\r\n\r\n" + OK
        raise ConnectionError
    assert attempt(until_closed) == (None, 1)


# ---------------------------------------------------------------------------
# Transport
# ---------------------------------------------------------------------------

@table("certificate, through_a_proxy", [(None, False), (CERTIFICATE, False), (CERTIFICATE, True)])
def test_1000_events_over_http_https_or_a_tunnel_use_one_connection(monkeypatch, certificate, through_a_proxy):
    with Server(certificate=certificate) as server, Proxy() as proxy:
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//user:secret@"))
        sdk = Tracker(DefaultCollecter(server.url, ssl_context=ca_context()))
        events(sdk, 1000)
        assert server.records == [record("u", "Event", {"n": number}) for number in range(1000)]
        assert (server.connections, proxy.connections) == (1, through_a_proxy)
        assert not through_a_proxy or "Basic " + base64.b64encode(b"user:secret").decode() in str(proxy.requests)
        assert "authorization" not in str(server.requests[0].headers)
        assert stats(sdk.sink) == {"accepted": 1000, "delivered": 1000, "rejected": 0, "pending": 0,
                                   "requests": 1000, "retries": 0}


def test_http_uses_the_proxy_of_the_environment_and_heeds_no_proxy(monkeypatch):
    with Server() as server, Server() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        events(Tracker(DefaultCollecter("http://nowhere.invalid:8089/a")), 2)
        assert [request.target for request in proxy.requests] == ["http://nowhere.invalid:8089/a/up"] * 2
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        events(Tracker(DefaultCollecter(server.url)), 2)
        assert (proxy.connections, server.connections, len(server.requests)) == (1, 1, 2)


@table("through_a_proxy", [False, True])
@table("certificate, trust, accepted", [
    (CERTIFICATE, None, False), (CERTIFICATE, "context", True), (CERTIFICATE, "machine", True),
    (OTHER_HOST, None, False), (OTHER_HOST, "context", False), (OTHER_HOST, "machine", False)])
def test_a_private_ca_needs_trust_and_another_hosts_name_is_always_refused(tmp_path, monkeypatch, certificate, trust,
                                                                           accepted, through_a_proxy):
    with Server(certificate=certificate) as server, Proxy() as proxy:
        if through_a_proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
        if trust == "machine":
            (tmp_path / "ca.pem").write_text(CA)
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        collecter = DefaultCollecter(server.url, ssl_context=ca_context() if trust == "context" else None)
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
        Tracker(DefaultCollecter(server.url, ssl_context=ca_context())).track("u", "Event")
        assert len(server.requests) == 1 and settings() == before
        with pytest.raises(OSError, match="(?i)certificate"):
            urllib.request.urlopen(server.url, timeout=10)
        assert len(server.requests) == 1


def test_a_stale_connection_is_replaced_without_the_caller_noticing():
    def hang_up(request):
        yield answer()
        raise ConnectionError
    with Server(hang_up) as server:
        sdk = Tracker(DefaultCollecter(server.url))
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
        sdk = Tracker(DefaultCollecter(server.url))
        events(sdk, 1)
        read.set()
        assert sent.wait(10)
        events(sdk, 1, start=1)
        assert (numbers(server.records), server.connections) == ([0, 1], 2)


@table("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    with Server() as elsewhere:
        error, requests = attempt(answer(status, OK, "Location: " + elsewhere.url + "/up"))
        assert (type(error), requests, elsewhere.connections) == (NetworkError, 1, 0)


def drip(head):
    def reply(request):
        yield head
        for _ in range(100):
            threading.Event().wait(0.1)
            yield b"1"
    return reply


@table("reply", [drip(b""), drip(b"HTTP/1.1 200 OK\r\nX-Header: "), drip(b"HTTP/1.1 200 OK\r\n\r\n"),
                 drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"),
                 drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), Gate()])
def test_request_timeout_bounds_the_whole_request_however_the_server_drips(reply):
    start = time.monotonic()
    error, requests = attempt(reply, request_timeout=0.2)
    assert time.monotonic() - start < 2
    assert (type(error), requests) == (NetworkError, 1)


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
            DefaultCollecter("https://" + url, 0.2).uploadData(record("u", "Event"))
        assert time.monotonic() - start < 2


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


def test_a_server_that_is_not_there_is_a_network_error():
    with Server() as server:
        url = server.url
    with pytest.raises(NetworkError) as caught:
        Tracker(DefaultCollecter(url)).track("u", "Event")
    assert caught.value.records == [record("u", "Event")]


# ---------------------------------------------------------------------------
# Queues: log files
# ---------------------------------------------------------------------------

each_way_to_log = pytest.mark.parametrize("options", [(), (True, 3)], ids=["single", "batched"])


@posix_only
@each_way_to_log
def test_lines_of_eight_processes_never_interleave_and_none_is_missing_or_doubled(tmp_path, options):
    script_ends("""
        collecter = LogCollecter(folder, *%r)
        for number in range(2):
            collecter.uploadData(event("parent", number=number))       # batched: waits while the children are forked

        def work(name):
            for number in range(150):
                collecter.uploadData(event(name, number=number, filler="\u6613" * random.randrange(60, 7000)))
            collecter.close()
        assert all(list(map(ends_well, [fork(work, "child_process%%d" %% number) for number in range(8)])))
        collecter.close()
    """ % (options,), tmp_path)
    numbers = collections.defaultdict(list)
    for path in tmp_path.iterdir():
        for line in path.read_bytes().splitlines():
            entry = json.loads(line.decode())
            numbers[entry["xwhat"]].append(entry["xcontext"]["number"])
    assert numbers == dict({name: list(range(150)) for name in run_of("child_process", 8)}, parent=[0, 1])


@each_way_to_log
def test_threads_and_collecters_of_one_process_share_a_file(tmp_path, options):
    collecters = [LogCollecter(str(tmp_path), *options) for _ in range(2)]

    def work(number):
        for xwhat in run_of("t%d_" % number, 100):
            collecters[number % 2].uploadData(event(xwhat, filler="x" * 500))
    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for collecter in collecters:
        collecter.close()
        assert collecter.stats()["delivered"] == 300
    written, = files_in(tmp_path).values()
    for number in range(6):
        mine = run_of("t%d_" % number, 100)
        assert [xwhat for xwhat in written if xwhat in mine] == mine


@posix_only
def test_after_kill_9_every_event_whose_call_returned_is_there_and_no_line_is_glued_to_a_cut_one(tmp_path):
    returned = []
    for life in range(5):
        with script("""
            collecter = LogCollecter(folder)
            for number in itertools.count():
                collecter.uploadData(event("life%d", number=number, filler="x" * 20000))
                os.write(1, b".")
        """ % life, tmp_path) as started:
            returned.append(len(started.stdout.read(random.randrange(1, 50))))
            started.kill()
            returned[-1] += len(started.stdout.read())
    LogCollecter(str(tmp_path)).uploadData(event("after"))
    lines = [line for path in sorted(tmp_path.iterdir()) for line in path.read_bytes().splitlines()]
    whole = collections.Counter(json.loads(line.decode())["xwhat"] for line in lines if line.endswith(b"}}"))
    assert len(lines) - sum(whole.values()) <= 5 and whole.pop("after") == 1
    for life, count in enumerate(returned):
        assert count <= whole["life%d" % life] <= count + 1


@posix_only
def test_who_is_killed_inside_a_write_blocks_no_other_writer_also_while_a_child_of_it_lives(tmp_path):
    with script("""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)                  # kills at 3000 bytes, in the middle of a line
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        collecter = LogCollecter(folder)
        collecter.uploadData(event("before"))
        pid = os.fork()
        if not pid:
            signal.pause()                                             # this child_process never tracks
        os.write(1, b"%d\\n" % pid)
        collecter.uploadData(event("cut", filler="x" * 20000))
    """, tmp_path) as started:
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
    taken = json.loads(script_ends("""
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
    """ % (options,), tmp_path))
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
    collecter.uploadData(event("a"))
    collecter.uploadData(event("b"))
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

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt
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
    assert list(dict.fromkeys(found)) == run_of("e", 30)
    doubled = collections.Counter(found) - collections.Counter(run_of("e", 30))
    assert len(doubled) <= 3 and max(doubled.values(), default=1) == 1


dnotify_only = pytest.mark.skipif(sys.platform != "linux", reason="needs dnotify")


@dnotify_only
@each_way_to_log
def test_an_exception_out_of_a_signal_handler_costs_and_doubles_no_other_line(tmp_path, options):
    script_ends("collecter = LogCollecter(folder, *%r)\n" % (options,) + INTERRUPTED, tmp_path)
    check_interrupted(list(files_in(tmp_path).values())[0])


INTERRUPTED_ANYWHERE = """
class Interrupt(BaseException):
    pass

def interrupted(steps):                                # where a function begins or ends, Python looks for signals
    def trace(frame, what, _):
        nonlocal steps
        if frame.f_code.co_filename != analysys.__file__:
            return None
        if what in ("call", "return"):
            steps -= 1
            if not steps:
                raise Interrupt
        return trace
    sys.settrace(trace)
    try:
        collecter.uploadData(event("interrupted"))
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
signal.alarm(30)                                       # a lock that is not released would hold us for ever
for number in range(50):                               # no call takes more steps
    collecter.uploadData(event("e%d" % number))
    interrupted(number + 1)
collecter.flush()
collecter.close()
"""


@posix_only
@pytest.mark.parametrize("options", [(), (True, 2)], ids=["single", "batched"])
def test_wherever_an_exception_comes_out_of_a_signal_handler_the_lines_before_and_after_are_written(tmp_path, options):
    script_ends("collecter = LogCollecter(folder, *%r)\n" % (options,) + INTERRUPTED_ANYWHERE, tmp_path)
    written = [xwhat for xwhat in list(files_in(tmp_path).values())[0] if xwhat != "interrupted"]
    assert list(dict.fromkeys(written)) == run_of("e", 50)


def test_a_line_that_comes_inside_a_write_is_written_when_that_write_ends(tmp_path):
    collecter = LogCollecter(str(tmp_path))

    def nested(at):                                    # tracks again in line number *at* of those that are run
        count = 0

        def trace(frame, what, _):
            nonlocal count
            if frame.f_code.co_filename != SOURCE:
                return None
            count += what == "line"
            if what == "line" and count == at:
                sys.settrace(None)
                collecter.uploadData(event("inner"))
            return trace
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            collecter.uploadData(event("outer"))
        finally:
            sys.settrace(before)
        return count >= at
    at = 1
    while nested(at):
        names, = files_in(tmp_path).values()
        assert sorted(names[-2:]) == ["inner", "outer"] and len(names) == 2 * at
        at += 1
    assert at > 20


# ---------------------------------------------------------------------------
# Queues: the spool
# ---------------------------------------------------------------------------

def test_a_record_is_on_disk_before_the_call_returns_and_gone_when_it_is_delivered(tmp_path):
    folder = tmp_path / "spool"
    with FaultyServer(listening=False) as server:
        with spooling(server, folder, queue_max_size=1) as collecter:
            for number in range(20):
                collecter.uploadData(event("e%d" % number))
                assert list(files_in(folder, "*.log").values()) == [run_of("e", number + 1)]
            assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
            server.listen()
            collecter.flush(20)
            assert server.names == run_of("e", 20)
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
        script_ends("""
            collecter = BatchCollecter(url, spool_path=folder)
            for number in range(3):
                collecter.uploadData(event("e%d" % number))
        """, tmp_path, server.url)
        assert server.names == run_of("e", 3)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_what_a_process_leaves_the_next_delivers_at_start_in_order_before_its_own(tmp_path):
    leave(tmp_path, *run_of("first", 5))
    leave(tmp_path, *run_of("second", 5))
    with FaultyServer() as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(20)
        assert server.names == run_of("first", 5) + run_of("second", 5) + ["own"]
        assert (collecter.stats()["adopted"], collecter.stats()["accepted"]) == (10, 1)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_after_kill_9_and_restart_every_event_whose_call_returned_arrives_in_order_and_hardly_any_twice(tmp_path):
    chance = random.Random(4)
    lives, returned = 3, []

    def flaky(server, request):
        return answer(503) if chance.random() < 0.3 else accept(server, request)
    with FaultyServer(then=flaky) as server:
        for life in range(lives):
            with script("""
                collecter = BatchCollecter(url, queue_cache_max_size=5, collecter_max_size=10, spool_path=folder)
                for number in itertools.count():
                    collecter.uploadData(event("life%d", number=number))
                    os.write(1, b".")
                    time.sleep(0.001)
            """ % life, tmp_path, server.url) as started:
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


@posix_only
def test_living_processes_deliver_once_what_killed_ones_left_also_while_an_idle_child_of_those_lives(tmp_path):
    code = """
        analysys._LOOK_EVERY = analysys._Spool.rounds = 0.5            # seconds, so that nobody waits for 5
        collecter = BatchCollecter(url, queue_cache_max_size=1, spool_path=folder)
        for number in range(20):
            collecter.uploadData(event("%s%%d" %% number))
        pid = %s
        if not pid:
            signal.pause()                                             # this child_process never tracks
        os.write(1, b"%%d\\n" %% pid)
        os.read(0, 1)
        collecter.close()
    """
    with FaultyServer(listening=False) as server, contextlib.ExitStack() as stack:
        living = [stack.enter_context(script(code % (name, "1"), tmp_path, server.url)) for name in ("a", "b")]
        killed = [stack.enter_context(script(code % (name, "os.fork()"), tmp_path, server.url)) for name in ("c", "d")]
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
    assert sorted(server.names) == sorted(run_of("a", 20) + run_of("b", 20) + run_of("c", 20) + run_of("d", 20))
    for name in "abcd":
        assert [xwhat for xwhat in server.names if xwhat[0] == name] == run_of(name, 20)
    assert list(tmp_path.iterdir()) == []


def test_two_collecters_of_one_process_share_a_spool_and_the_second_delivers_what_the_first_left(tmp_path):
    with FaultyServer(listening=False) as server:
        with spooling(server, tmp_path) as first:
            first.uploadData(event("left"))
        server.listen()
        with spooling(server, tmp_path) as second, spooling(server, tmp_path) as third:
            for xwhat in run_of("e", 50):
                second.uploadData(event(xwhat))
                third.uploadData(event(xwhat))
            second.flush(20)
            third.flush(20)
            wait_until(lambda: len(server.names) >= 101)
        assert collections.Counter(server.names) == dict(dict.fromkeys(run_of("e", 50), 2), left=1)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_close_lets_the_request_in_flight_end_so_that_nothing_is_delivered_twice(tmp_path):
    leave(tmp_path, *run_of("e", 5))
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
        assert server.names == run_of("e", 5)


@posix_only
def test_forked_children_spool_and_deliver_their_own_records_and_the_parent_its_own(tmp_path):
    with FaultyServer() as server:
        script_ends("""
            collecter = BatchCollecter(url, spool_path=folder, max_interval_time=60, queue_cache_max_size=1000)
            collecter.uploadData(event("parent0"))

            def work(name):
                for number in range(20):
                    collecter.uploadData(event(name + str(number)))
                collecter.close()
            assert all(list(map(ends_well, [fork(work, name) for name in "abcd"])))
            collecter.uploadData(event("parent1"))
            collecter.close()
        """, tmp_path, server.url)
        expected = [run_of(name, 20) for name in "abcd"] + [run_of("parent", 2)]
        assert sorted(server.names) == sorted(sum(expected, []))
        for names in expected:
            assert [xwhat for xwhat in server.names if xwhat in names] == names
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_files_roll_are_numbered_and_go_once_they_are_delivered(tmp_path):
    with FaultyServer(listening=False) as server, spooling(server, tmp_path, spool_max_bytes=40000) as collecter:
        for xwhat in run_of("e", 100):
            collecter.uploadData(event(xwhat))
        paths = sorted(tmp_path.glob("*.log"))
        assert [path.name[-10:] for path in paths] == ["%06d.log" % number for number in range(1, len(paths) + 1)]
        assert len(paths) > 1 and max(path.stat().st_size for path in paths) <= 10000
        server.listen()
        collecter.flush(20)
        assert server.names == run_of("e", 100)
        assert [path for path in paths if path.exists()] == paths[-1:]


def test_beyond_spool_max_bytes_a_call_raises_like_a_full_queue_until_there_is_room(tmp_path):
    with FaultyServer(listening=False) as server:
        with spooling(server, tmp_path, spool_max_bytes=20000) as collecter:
            with pytest.raises(NetworkError, match="full") as error:
                for number in range(1000):
                    collecter.uploadData(event("e%d" % number))
            assert error.value.records == [event("e%d" % number)] and number > 20
            assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 20000
            server.listen()
            wait_until(lambda: len(server.names) == number)
            collecter.uploadData(event("room"))
            collecter.flush(20)
            assert server.names == run_of("e", number) + ["room"]


def test_spool_max_bytes_holds_for_all_processes_and_restarts_together(tmp_path):
    with FaultyServer(listening=False) as server:
        for _ in range(4):
            with spooling(server, tmp_path, spool_max_bytes=20000) as collecter:
                with pytest.raises(NetworkError, match="full"):
                    for number in range(1000):
                        collecter.uploadData(event("e%d" % number))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) <= 20000


@posix_only
def test_damaged_lines_end_in_rejected_log_with_file_number_and_reason_and_the_rest_is_delivered(tmp_path):
    leave(tmp_path, *run_of("e", 10))
    name = damage(tmp_path, lambda lines: lines[:2] + [b"\0" * 99 + b"\xff{]\n"] + lines[3:7] + [b"[1]\n"] + lines[8:] +
                  [lines[0][:30]])
    reported = []
    with FaultyServer() as server:
        with spooling(server, tmp_path, on_error=lambda *told: reported.append(told)) as collecter:
            collecter.uploadData(event("own"))
            collecter.flush(20)
            assert server.names == [xwhat for xwhat in run_of("e", 10) if xwhat not in ("e2", "e7")] + ["own"]
            assert (collecter.stats()["adopted"], collecter.stats()["rejected"]) == (11, 3)
    entries = rejected_in(tmp_path)
    assert [(entry["file"], entry["line"]) for entry in entries] == [(name, 3), (name, 8), (name, 11)]
    assert all("JSON" in entry["reason"] for entry in entries) and entries[1]["record"] == "[1]\n"
    assert [str(error) for error, _ in reported] == [entry["reason"] for entry in entries]
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.log"]
    assert stat.S_IMODE((tmp_path / "rejected.log").stat().st_mode) == 0o600


@posix_only
@pytest.mark.parametrize("value", ["0", "NaN", '"\\ud83d"', "1" * 400], ids=["good", "NaN", "half a character", "big"])
def test_records_that_the_platform_refuses_end_in_rejected_log_whatever_they_hold(tmp_path, value):
    leave(tmp_path, "a", "bad", "c")
    damage(tmp_path, lambda lines: [lines[0], lines[1].replace(b'"$debug":0', b'"$debug":' + value.encode()), lines[2]])
    with FaultyServer(then=refusing("bad")) as server, spooling(server, tmp_path) as collecter:
        collecter.uploadData(event("own"))
        collecter.flush(5)
        assert server.names == ["a", "c", "own"] and collecter.stats()["rejected"] == 1
        entry, = rejected_in(tmp_path)
        assert entry["line"] == 2 and '"bad"' in json.dumps(entry["record"]).replace("\\", "") and entry["reason"]


@posix_only
def test_a_spool_on_a_full_disk_says_so_and_loses_nothing(tmp_path):
    with FaultyServer() as server:
        taken = json.loads(script_ends("""
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
        """, tmp_path, server.url))
        assert server.names == taken and len(taken) < 20
    assert list(tmp_path.iterdir()) == []


@dnotify_only
def test_an_exception_out_of_a_signal_handler_costs_and_doubles_no_other_spooled_record(tmp_path):
    never = "collecter = BatchCollecter(url, max_interval_time=60, queue_cache_max_size=1000, spool_path=folder)\n"
    with FaultyServer() as server:
        script_ends(never + INTERRUPTED, tmp_path, server.url)
        check_interrupted(server.names)
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_wherever_an_exception_comes_out_of_a_signal_handler_the_records_before_and_after_are_delivered(tmp_path):
    with FaultyServer() as server:
        script_ends("collecter = BatchCollecter(url, spool_path=folder)\n" + INTERRUPTED_ANYWHERE, tmp_path, server.url)
    assert [xwhat for xwhat in server.names if xwhat != "interrupted"] == run_of("e", 50)


@posix_only
def test_a_disk_that_is_full_after_a_call_was_interrupted_costs_no_other_spooled_record(tmp_path):
    accepted = json.loads(script_ends("""
        class Interrupt(BaseException):
            pass
        collecter = BatchCollecter(url, max_interval_time=60, queue_cache_max_size=1000, spool_path=folder)
        accepted = []

        def take(xwhat):
            collecter.uploadData(event(xwhat))
            accepted.append(xwhat)

        def disturbed(at, tracks):                     # in line number *at*: a call, or an exception
            count = 0
            def trace(frame, what, _):
                nonlocal count
                if frame.f_code.co_filename != analysys.__file__:
                    return None
                count += what == "line"
                if what == "line" and count == at:
                    sys.settrace(None)
                    if not tracks:
                        raise Interrupt
                    take("inner")
                return trace
            sys.settrace(trace)
            try:
                collecter.uploadData(event("disturbed"))
            except Interrupt:
                pass
            finally:
                sys.settrace(None)
            return count >= at

        path, = [os.path.join(folder, name[:-len("lock")] + "000001.log") for name in os.listdir(folder)]
        for tracks in True, False:
            at = 1
            while disturbed(at, tracks):
                size = os.path.getsize(path) if at > 1 or not tracks else 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
                assert isinstance(error_of(take, "cut"), AnalysysPythonSdkFileException)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                take("after%d" % at)
                at += 1
            assert at > 20
        print(json.dumps(accepted))
        sys.stdout.flush()
        os._exit(0)
    """, tmp_path))
    path, = tmp_path.glob("*.log")
    written = [json.loads(line)["xwhat"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [xwhat for xwhat in written if xwhat != "disturbed"] == accepted


@posix_only
def test_children_forked_while_a_spool_is_read_do_not_hang(tmp_path):
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        script_ends("""
            if not os.fork():
                collecter = BatchCollecter("http://127.0.0.1:1", spool_path=folder)
                for number in range(3000):
                    collecter.uploadData(event("e", filler="x" * 5000))
                os._exit(0)
            os.wait()
            collecter = BatchCollecter(url, spool_path=folder)
            while collecter.stats()["delivered"] < 3000:
                pid = os.fork()
                if not pid:
                    os._exit(0)
                deadline = time.monotonic() + 5
                while os.waitpid(pid, os.WNOHANG) == (0, 0):
                    if time.monotonic() > deadline:
                        os.kill(pid, signal.SIGKILL)
                        raise AssertionError("a child_process hangs")
                    time.sleep(0.0005)
            collecter.close()
        """, tmp_path, server.url)


@posix_only
def test_a_lock_file_that_cannot_be_used_keeps_no_other_files_from_being_adopted(tmp_path):
    leave(tmp_path, "left")
    (tmp_path / "0000000000001-1-00000000.lock").mkdir()
    with FaultyServer() as server, spooling(server, tmp_path):
        wait_until(lambda: server.names == ["left"], 4)


@posix_only
def test_a_spool_that_cannot_be_written_is_an_error_of_the_constructor(tmp_path):
    (tmp_path / "file").write_text("")
    deep = str(tmp_path)
    while len(deep) < 4060:
        deep = os.path.join(deep, "d" * min(200, 4070 - len(deep)))    # too long with the name of a spool file
    for path in str(tmp_path / "file"), os.path.join(str(tmp_path), "file", "spool"), deep:
        script_ends("""
            signal.alarm(5)
            error = error_of(lambda: BatchCollecter(url, spool_path=sys.argv[1]))
            assert isinstance(error, AnalysysPythonSdkFileException), error
        """, path)


@linux_only
def test_a_spool_larger_than_the_memory_it_may_take_is_drained(tmp_path):
    script_ends("""
        collecter = BatchCollecter(url, spool_path=folder)
        for number in range(12000):
            collecter.uploadData(event("e", number=number, filler="x" * 5000))
        os._exit(0)
    """, tmp_path)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        peak = int(script_ends("""
            collecter = BatchCollecter(url, spool_path=folder)
            while collecter.stats()["delivered"] < 12000:
                time.sleep(0.01)
            collecter.close()
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, tmp_path, server.url))
    assert peak < 50000 and list(tmp_path.iterdir()) == []


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
] + [[answer(503, HTML, "Retry-After: " + value)] for value in (
    "", "-5", "soon", "1e3", "nan", "\xb2", "Thu, 99 Jan 2020 25:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 30)]


def test_after_each_fault_that_is_not_the_datas_all_events_arrive_in_order():
    def check(steps):
        with FaultyServer(*steps) as server, batch(server) as (collecter, tracker):
            track(tracker, "a", "b")
            tracker.alias("user", "visitor")
            track(tracker, "c", "d")
            tracker.flush(20)
            assert server.names == ["a", "b", "$alias", "c", "d"]
            balanced(collecter, accepted=5, delivered=5, requests=len(server.requests), retries=len(steps))
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


def test_a_server_that_is_down_for_three_seconds_costs_one_warning_and_no_event():
    with FaultyServer(listening=False) as server, batch(server) as (collecter, tracker), logged() as log:
        timer = threading.Timer(3, server.listen)
        timer.start()
        track(tracker, "a", "b")
        tracker.alias("user", "visitor")
        track(tracker, "c")
        tracker.flush(20)
        timer.join()
        assert server.names == ["a", "b", "$alias", "c"]
        assert [entry.levelname for entry in log if entry.levelno >= logging.WARNING] == ["WARNING"]
        assert balanced(collecter, accepted=4, delivered=4)["retries"] >= 2


def test_retry_after_is_honoured_in_seconds_and_as_a_date():
    def later(server, request):
        return answer(503, b"", "Retry-After: " + email.utils.formatdate(time.time() + 2, usegmt=True))
    with FaultyServer(answer(429, b"", "Retry-After: 1")) as seconds, FaultyServer(later) as date:
        with batch(seconds) as (_, first), batch(date) as (_, second):
            track(first, "a")
            track(second, "a")
            wait_until(lambda: seconds.names == date.names == ["a"], 20)
    for server in seconds, date:
        assert len(server.times) == 2 and server.times[1] - server.times[0] > 0.9


def test_flush_cuts_back_offs_short_at_most_once_a_second_for_all_callers():
    with FaultyServer(then=answer(503, b"", "Retry-After: 60")) as server, batch(server) as (_, tracker):
        track(tracker, "a")

        def flush():
            with pytest.raises(NetworkError):
                tracker.flush(1.5)
        with threads(*[flush] * 10):
            pass
        assert 2 <= len(server.requests) <= 4


STUCK = [
    silent,
    dripping(b"HTTP/1.1 200 OK\r\nX-Padding: "),
    dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"),
    dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"),
    flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
]


def test_request_timeout_bounds_a_request_to_a_stuck_server_and_delivery_goes_on_afterwards():
    def check(step):
        with FaultyServer(accept, step, step) as server, batch(server, request_timeout=0.3) as (collecter, tracker):
            with contextlib.closing(DefaultCollecter(server.url, request_timeout=0.3)) as default:
                default.uploadData(record("user", "first"))
                with within(1.5), pytest.raises(NetworkError) as error:
                    default.uploadData(record("user", "lost"))
                assert error.value.records == [record("user", "lost")]
                balanced(default, delivered=1, pending=0)
            track(tracker, "a", "b")
            tracker.flush(10)
            assert server.names == ["first", "a", "b"]
            assert server.times[-1] - server.times[1] < 5
            balanced(collecter, accepted=2, delivered=2, retries=1)
    all_at_once(check, STUCK)


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
    with FaultyServer(then=when(too_large, reply)) as server, batch(server, 5, 64) as (collecter, tracker):
        tried = []
        for start in 0, 64:
            for number in range(start, start + 64):
                tracker.track("user", "e%d" % number, {"noise": "%0200x" % noise.getrandbits(800)})
            tracker.flush(20)
            assert server.names == numbered("e", start + 64)
            tried.append([len(records) for records in server.batches[sum(map(len, tried)):]])
        assert tried[0][0] == 64 < sum(tried[0]) and sum(tried[1]) == 64        # nothing is sent twice any more
        assert max(tried[1]) <= 2 * tried[0][-1]
        balanced(collecter, accepted=128, delivered=128, requests=len(server.requests))


def test_a_single_record_too_large_is_refused_for_good():
    reported, names = [], ["a", "b", "c", "large", "d", "e", "f", "g"]
    with FaultyServer(then=refuse("large", reply=answer(413))) as server:
        with batch(server, 5, 8, on_error=lambda *args: reported.append(args)) as (collecter, tracker):
            track(tracker, *names)
            tracker.flush(10)
            assert server.names == [name for name in names if name != "large"]
            balanced(collecter, accepted=8, delivered=7, rejected=1)
    (error, records), = reported
    assert isinstance(error, IllegalData) and [entry["xwhat"] for entry in records] == ["large"]


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
              flood(b"HTTP/1.1 200 OK\r\n\r\n", b"{" * 65536), flood(b"HTTP/1.1 200 OK\r\nX: ", spaces),
              flood(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n%s\r\n" % spaces),
              answer(200, encode(b"9" * (40 << 20)))]
    with FaultyServer(accept, *[step for each in floods for step in (each, accept)]) as server:
        run("""
            import tracemalloc
            collecter = BatchCollecter(url, queue_cache_max_size=1)
            tracker = tracker_to(collecter)
            for number in range(7):
                tracker.track("user", "e%d" % number)
                tracker.flush()
                tracemalloc.start()                    # the first event was there to import what is needed
            assert tracemalloc.get_traced_memory()[1] < 1 << 20, tracemalloc.get_traced_memory()
            balanced(collecter, delivered=7, retries=6)
        """, server.url)
        assert server.names == numbered("e", 7)


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

def lines(folder):
    """Return the records in the log files of a folder, file by file in the order of their names."""
    found = []
    for name in sorted(os.listdir(str(folder))):
        assert re.match(r"datas_\d{8}(\d\d)?\.log\Z", name)
        with open(os.path.join(str(folder), name), "rb") as file:
            data = file.read()
        assert data.endswith(b"\n")
        found += [json.loads(line.decode("utf-8")) for line in data.splitlines()]
    return found


@each_collecter
def test_of_16_threads_with_1000_events_each_every_event_arrives_once_and_in_order(tmp_path, kind):
    with Server() as server:
        run("""
            errors = []
            collecter = %s
            tracker = AnalysysPythonSdk(collecter, on_error=lambda *error: errors.append(error))
            tracker.setAppId("app")
            def work(name):
                for number in range(1000):
                    tracker.track(name, "Event", {"n": number})
            threads = [threading.Thread(target=work, args=("t%%d" %% number,)) for number in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            tracker.flush(60)
            assert errors == []
            balanced(collecter, accepted=16000, delivered=16000, retries=0)
        """ % kind, server.url, tmp_path)
        arrived = server.records + lines(tmp_path)
        assert server.connections <= 16
    by_thread = {"t%d" % number: [] for number in range(16)}
    for one in arrived:
        by_thread[one["xwho"]].append(one["xcontext"]["n"])
    assert set(map(tuple, by_thread.values())) == {tuple(range(1000))}


@each_collecter
def test_close_delivers_may_be_repeated_and_ends_tracking(tmp_path, kind):
    with Server() as server:
        with Tracker(make(kind, server.url, tmp_path / "made" / "for it")) as sdk:
            sdk.track("u", "Event", {"name": "跑步机"})
        assert server.records + (lines(tmp_path / "made" / "for it") if os.listdir(str(tmp_path)) else []) == [
            record("u", "Event", {"name": "跑步机"})]
        sdk.close()
        with pytest.raises(analysys.AnalysysPythonSdkException):
            sdk.track("u", "Event")
        assert stats(sdk.sink)["delivered"] == 1


def test_default_has_delivered_when_the_call_returns():
    with analysys.Receiver() as server:
        sdk = Tracker(DefaultCollecter(server.url))
        sdk.track("u", "Event")
        assert server.records == [record("u", "Event")]
        assert stats(sdk.sink)["delivered"] == 1


@table("settings, count", [((NEVER, 10), 10), ((NEVER, NEVER, 100, 5), 5), ((0.3, NEVER), 3)])
def test_batch_sends_when_enough_wait_or_the_queue_is_full_or_time_is_over_and_no_sooner(settings, count):
    with Server() as server:
        sdk = Tracker(BatchCollecter(server.url, *settings))
        start = time.monotonic()
        events(sdk, count)
        wait_until(lambda: server.requests, min(10, 5 * settings[0]))
        assert settings[0] == NEVER or time.monotonic() - start >= settings[0]
        sdk.close()
        assert [numbers(batch) for batch in server.batches] == [list(range(count))]


def test_batch_sends_an_alias_at_once_with_what_waits_before_it():
    with Server() as server:
        sdk = Tracker(BatchCollecter(server.url, NEVER, NEVER))
        sdk.track("u", "Event")
        sdk.alias("u", "d")
        wait_until(lambda: server.requests)
        assert server.batches == [[record("u", "Event"), record("u", "$alias", {"$original_id": "d"}, is_login=True)]]


def test_a_batch_request_carries_at_most_collecter_max_size_records_in_order():
    with Server() as server:
        sdk = Tracker(BatchCollecter(server.url, NEVER, NEVER, 10))
        events(sdk, 25)
        sdk.flush()
        assert [numbers(batch) for batch in server.batches] == [
            list(range(10)), list(range(10, 20)), list(range(20, 25))]


def test_a_full_queue_makes_the_caller_wait_for_room_and_is_never_exceeded():
    gate = Gate()
    with Server(gate) as server:
        sdk = Tracker(BatchCollecter(server.url, NEVER, 10, 100, 10))
        caller = threading.Thread(target=events, args=(sdk, 50))
        caller.start()
        wait_until(lambda: server.requests and stats(sdk.sink)["pending"] == 10)
        assert stats(sdk.sink)["accepted"] == 10       # the ten in flight count too
        gate.set()
        caller.join()
        sdk.flush()
        assert numbers(server.records) == list(range(50))
        assert max(map(len, server.batches)) <= 10


def test_flush_returns_only_when_the_records_are_delivered():
    gate = Gate()
    with Server(gate) as server:
        sdk = Tracker(BatchCollecter(server.url, NEVER, NEVER))
        events(sdk, 3)
        caller = threading.Thread(target=sdk.flush)
        caller.start()
        wait_until(lambda: server.requests)
        caller.join(0.1)
        assert caller.is_alive() and stats(sdk.sink)["delivered"] == 0
        with pytest.raises(NetworkError, match="3") as caught:
            sdk.flush(timeout=0.1)
        assert caught.value.records == [] and stats(sdk.sink)["pending"] == 3
        gate.set()
        caller.join(10)
        assert not caller.is_alive() and stats(sdk.sink)["delivered"] == 3


@table("rule, name", [("hour", "%Y%m%d%H"), ("day", "%Y%m%d")])
def test_a_log_file_is_named_after_the_local_time_of_the_writing(tmp_path, rule, name):
    sdk, clock, expected = Tracker(LogCollecter(str(tmp_path), True, 2, rule)), [], []
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
    sdk = Tracker(LogCollecter(str(tmp_path), *batched))
    for number in range(4):
        events(sdk, 1, number)
        assert lines(tmp_path) == [record("u", "Event", {"n": n}) for n in range(written[number])]
        assert stats(sdk.sink)["delivered"] == written[number]
    sdk.flush()
    assert numbers(lines(tmp_path)) == [0, 1, 2, 3]


def test_two_log_collecters_share_a_folder(tmp_path):
    first, second = Tracker(LogCollecter(str(tmp_path))), Tracker(LogCollecter(str(tmp_path)))
    for number in range(10):
        events([first, second][number % 2], 1, number)
    assert numbers(lines(tmp_path)) == list(range(10))


# ---------------------------------------------------------------------------
# Collecters under fault
# ---------------------------------------------------------------------------

def test_a_full_queue_with_a_slow_healthy_server_holds_the_caller_back_and_loses_nothing():
    gate = threading.Event()
    with FaultyServer(then=gated(gate)) as server, batch(server, queue_max_size=5) as (collecter, tracker):
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
            with within(2), pytest.raises(NetworkError, match=r"\b5\b.*\b(since|for|ago)\b") as error:
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
        with within(2), pytest.raises(NetworkError) as error:
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
                with within(1.5), pytest.raises(NetworkError, match=r"\b9\b") as error:
                    tracker.flush(0.3)
                assert error.value.records == []
                balanced(collecter, delivered=2, pending=9)
                with within(1.5), pytest.raises(NetworkError) as error:
                    tracker.close(0.3)
                assert [entry["xwhat"] for entry in error.value.records] == names
                tracker.close()
                with pytest.raises(analysys.AnalysysPythonSdkException):
                    track(tracker, "late")
                balanced(collecter, accepted=11, delivered=2, rejected=9, pending=0)
                assert server.names == ["a", "b"]
    all_at_once(check, STUCK + [answer(500), answer(503, b"", "Retry-After: 60"), None])        # None: it is gone


def test_what_close_gave_back_is_not_counted_again_when_the_request_in_flight_succeeds():
    gate = threading.Event()
    with FaultyServer(then=gated(gate)) as server, batch(server) as (collecter, tracker):
        track(tracker, "a", "b")
        wait_until(lambda: server.requests)
        with pytest.raises(NetworkError) as error:
            collecter.close(0.2)
        assert [entry["xwhat"] for entry in error.value.records] == ["a", "b"]
        gate.set()
        wait_until(lambda: not any(thread.name == "analysys-sender" for thread in threading.enumerate()))
        assert len(server.names) == 1
        balanced(collecter, accepted=2, delivered=0, rejected=2, pending=0)


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


def test_on_error_is_called_under_no_lock_and_may_track_without_waiting_for_room():
    stuck, full = [], threading.Event()

    def look():
        collecter.stats()
        with contextlib.suppress(NetworkError):
            collecter.flush(0.01)

    def report(error, records):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(5)
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


@pytest.mark.parametrize("debug", [0, 1, 2])
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_finalizer_that_tracks_while_the_collecter_works_does_no_harm(kind, tmp_path):
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
            for _ in range(10):                        # new threads: what is thread-local is made anew, too
                workers = [threading.Thread(target=work) for _ in range(3)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            gc.set_threshold(700)
            gc.collect()
            tracker.flush()
            assert len(made) == 300, len(made)
            balanced(collecter, accepted=300, delivered=300)
        """ % kind, server.url, tmp_path)
        assert collections.Counter(server.names + lines_in(tmp_path)) == {"tracked": 150, "finalized": 150}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_from_within_any_line_of_the_module_does_no_harm(kind, tmp_path):
    with FaultyServer() as server:
        ended = run("""
            def interrupted(at):                       # once, in line number *at* of those that are run
                collecter, lines, calls, closing = %s, [0], ["outer"], False
                tracker = tracker_to(collecter)
                def trace(frame, event, arg):
                    if frame.f_code.co_filename != analysys.__file__:
                        return None
                    if event == "line":
                        lines[0] += 1
                        if lines[0] == at:
                            sys.settrace(None)
                            try:
                                tracker.track("user", "inner")
                                calls.append("inner")
                            except AnalysysPythonSdkException:
                                assert closing         # which ends it
                    return trace
                def work():
                    tracker.track("user", "outer")
                    tracker.flush()
                threading.settrace(trace)              # of this thread and the sender's
                thread = threading.Thread(target=work)
                thread.start()
                thread.join(10)
                threading.settrace(None)
                assert not thread.is_alive(), "hangs"
                closing = True
                tracker.close()
                balanced(collecter, accepted=len(calls), delivered=len(calls))
                print(*calls)
                return lines[0] >= at
            at = 1
            while interrupted(at):
                at += 1
        """ % kind, server.url, tmp_path)
        calls = ended.out.split()
        assert len(calls) > 100 and sorted(calls) == sorted(server.names + lines_in(tmp_path))


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
    endless, circular, deep = [], {}, []
    endless.append(endless)
    circular["self"] = circular
    for _ in range(100000):
        deep = [deep]
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
        ["x" * 256], ["a"] * 101, ("a", ("b",)), endless, deep, {}, circular, {1: 2}, {None: 1}, {b"k": 1}, {(): 1},
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
    good, refused, escaped = [], 0, []
    with analysys.Receiver() as server, batch(server, 5, 100, queue_max_size=10000) as (collecter, tracker):
        for call in POSITIONS:
            for value in malformed():
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_tracker_works_and_starts_empty_and_a_closed_one_stays_closed(kind, tmp_path):
    with FaultyServer() as server:
        collecter = eval(kind, dict(vars(analysys), url=server.url, folder=str(tmp_path)))
        tracker = tracker_to(collecter)
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
            use(20)
            files = descriptors()
            tracemalloc.start()
            use(10)
            memory = tracemalloc.get_traced_memory()[0]
            use(100)
            assert descriptors() <= files, (descriptors(), files)
            grown = tracemalloc.get_traced_memory()[0] - memory
            assert grown < 50000, grown
        """, server.url, tmp_path)
        assert len(server.names) == 2 * 130 and len(lines_in(tmp_path)) == 130


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
            collecter = BatchCollecter(url, max_interval_time=0.2, queue_cache_max_size=100)
            tracker, log, expected = tracker_to(collecter), tracker_to(LogCollecter(folder)), []
            for count, jump in enumerate([0, -3600, 7200, 86400]):
                tracker.track("user", "e%d" % count)
                ahead[0] += jump
                wait_until(lambda: collecter.stats()["delivered"] == count + 1, 3)
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
for n in range(1500):
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


@table("ending, status, printed", [
    ("sdk.flush(); os._exit(3)", 3, ""), ("", 0, ""), ("sys.exit(3)", 3, ""), ("raise SystemError", 1, ""),
    (DROPPED, 0, "1\n")])
@table("collecter", ["BatchCollecter(sys.argv[1])", "BatchCollecter(sys.argv[1], 10 ** 6, 10 ** 6, 100, 2000)",
                     "LogCollecter(sys.argv[2], True, 2000)"])
def test_no_record_is_lost_however_a_process_ends_or_drops_its_collecter(tmp_path, collecter, ending, status, printed):
    with Server() as server:
        done = python("-c", SCRIPT % collecter + ending, server.url, tmp_path)
        assert (done.returncode, done.stdout) == (status, printed), done.stderr
        assert numbers(server.records + lines(tmp_path)) == list(range(1500))


def test_a_dropped_batch_collecter_delivers_even_if_the_process_goes_on_to__exit():
    with Server() as server:
        done = python("-c", SCRIPT % "BatchCollecter(sys.argv[1])" + DROPPED + "os._exit(0)", server.url)
        assert done.returncode == 0, done.stderr
        assert numbers(server.records) == list(range(1500))


@pytest.fixture(scope="module", autouse=True)
def exits(request):
    """Two processes that exit while their server is dead: ten seconds each, so they run beside all the other tests."""
    if not any(item.name.startswith("test_exit_with") for item in request.session.items):
        yield
        return
    with FaultyServer(listening=False) as refusing, FaultyServer(then=silent) as mute:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            yield pool.submit(run, """
                logging.basicConfig(format="%(levelname)s %(message)s")
                tracker = tracker_to(BatchCollecter(url, queue_cache_max_size=2))
                for number in range(7):
                    tracker.track("user", "e%d" % number)
            """, refusing.url), pool.submit(run, """
                def report(error, records):
                    print(" ".join([type(error).__name__] + [record["xwhat"] for record in records]), flush=True)
                trackers = [tracker_to(BatchCollecter(url, on_error=report, collecter_max_size=2)) for _ in range(2)]
                for number in range(5):
                    trackers[0].track("user", "a%d" % number)
                    trackers[1].track("user", "b%d" % number)
            """, mute.url)


def test_exit_with_a_dead_server_ends_within_ten_seconds_with_one_error_line_that_counts(exits):
    ended = exits[0].result()
    errors = [line for line in ended.err.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1 and re.search(r"\b7\b", errors[0]), ended
    assert ended.seconds < 17


def test_exit_with_a_silent_server_and_two_collecters_hands_all_to_on_error_within_ten_seconds(exits):
    ended = exits[1].result()
    reports = [line.split() for line in ended.out.splitlines()]
    assert {words[0] for words in reports} == {"AnalysysPythonSdkNetworkException"}
    names = [name for words in reports for name in words[1:]]
    assert sorted(names) == numbered("a", 5) + numbered("b", 5)
    assert [name for name in names if "a" in name] == numbered("a", 5)
    assert ended.seconds < 17


def test_exit_does_not_wait_out_a_long_back_off():
    with FaultyServer(answer(503, b"", "Retry-After: 30")) as server:
        ended = run("""
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
        """, server.url)
        assert server.names == ["a", "b"] and ended.seconds < 15


@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]])
def test_exit_while_daemon_threads_still_track_delivers_what_was_accepted(kind, tmp_path):
    with FaultyServer() as server:
        ended = run("""
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
        assert int(ended.out) <= arrived <= int(ended.out) + 3


@pytest.mark.parametrize("before, after", [
    ("", "threading.Thread.start = fail\nwork()"), ("", "threading.Thread.__init__ = fail\nwork()"),
    ("", "import atexit; atexit.register(work)"), ("import atexit; atexit.register(lambda: work())", ""),
], ids=["start raises", "the constructor raises", "first use at exit", "first use as the last thing at exit"])
def test_where_no_thread_can_be_started_the_callers_thread_sends(before, after):
    with FaultyServer(answer(500)) as server:
        ended = run("""
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
        assert ended.out == "worked\n" and server.names == numbered("e", 6), ended


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 12), (3, 13)), reason="needs the interpreters of 3.12 or 3.13")
def test_in_a_subinterpreter_each_event_is_sent_once_unless_its_call_raised():
    with FaultyServer(answer(500), accept, cut(Reset), answer(500)) as server:
        ended = run("""
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
        assert ended.out.split() == server.names + ["None"], ended


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
        out, err = running.communicate()
        assert int(out) <= len(server.names) <= int(out) + 1, err       # the signal came inside a call


@posix_only
@pytest.mark.parametrize("kind", ["waiting()", "LogCollecter(folder, is_batch=True)"])
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
                    sys.exit(0)
                reap(pid)
            tracker.flush()
            balanced(collecter, accepted=3, delivered=3)
        """ % kind, server.url, tmp_path)
        expected = [how + who for how in ("exit", "flush") for who in ("", "_child", "_grandchild")]
        assert sorted(server.names + lines_in(tmp_path)) == expected + numbered("parent", 3)


@posix_only
@pytest.mark.parametrize("kind", KINDS)
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
def test_a_call_that_waits_for_the_end_of_the_write_around_it_hangs_no_fork_and_no_other_thread(tmp_path):
    script_ends("""
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
    """, tmp_path)
    shutil.rmtree(str(tmp_path / "other"))
    names, = files_in(tmp_path).values()
    assert sorted(names) == ["child", "first", "inner", "outer"]


@posix_only
def test_a_fork_in_the_middle_of_a_request_sends_each_event_once(tmp_path):
    gate = threading.Event()

    def hold(server, request):
        (tmp_path / "asked").touch()
        return gated(gate)(server, request)
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
                sys.exit(0)
            reap(pid)
            print("forked", flush=True)
            tracker.flush()
            balanced(collecter, accepted=2, delivered=2)
            """, server.url, tmp_path) as running:
        assert running.stdout.readline() == "forked\n", running.stderr.read()
        assert server.names == ["child", "exiting"]
        gate.set()
        _, err = running.communicate()
        assert running.returncode == 0, err
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


@posix_only
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_while_another_thread_holds_one_of_our_locks_hangs_nobody(kind, tmp_path):
    with FaultyServer() as server:
        ended = run(LOCKS + textwrap.dedent("""
            collecter = %s
            tracker = tracker_to(collecter)
            tracker.track("user", "parent")
            tracker.flush()
            def work():
                tracker.track("user", "child")
                tracker.flush(5)
                balanced(collecter)
            def hold():
                got = lock.acquire(timeout=1)          # the worker's are taken as they are
                held.set()
                done.wait(3)
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
        """) % kind, server.url, tmp_path)
        count = int(ended.out)
        assert count > 0
        assert collections.Counter(server.names + lines_in(tmp_path)) == {"parent": count + 1, "child": count}


@posix_only
def test_a_fork_loop_against_a_busy_sender_hangs_nobody_and_sends_each_event_once():
    with FaultyServer() as server:
        ended = run("""
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
                tracker.flush(5)
                balanced(collecter, accepted=1, delivered=1)
            for _ in range(40):
                reap(child(work))
            done.set()
            thread.join()
            tracker.flush()
            balanced(collecter, accepted=count, delivered=count)
            print(count)
        """, server.url)
        assert collections.Counter(server.names) == {"parent": int(ended.out), "child": 40}


def test_the_sender_imports_nothing_since_a_fork_meanwhile_would_lock_that_module_for_ever():
    faults = [answer(503, b"", "Retry-After: Thu, 01 Jan 1970 00:00:00 GMT"), answer(200, HTML), cut(Reset),
              cut(HangUp), answer(200, encode(code(500))), answer(200, encode(code(400))), silent]
    with FaultyServer(*[step for fault in faults for step in (fault, accept)]) as server:
        run("", server.url, before="""
            import os, sys, threading                  # and nothing that might hide what is missing
            import analysys
            class Watch:
                late = []
                def find_spec(self, name, path=None, target=None):
                    if threading.current_thread().name == "analysys-sender":
                        self.late.append(name)
            sys.meta_path.insert(0, Watch())
            url = sys.argv[1].replace("127.0.0.1", "localhost")
            collecter = analysys.BatchCollecter(url, queue_cache_max_size=1, request_timeout=0.5)
            tracker = analysys.AnalysysPythonSdk(collecter)
            tracker.setAppId("app")
            tracker.setDebugMode(1)
            for _ in range(8):
                tracker.track("user", "e")
                tracker.flush()
            os._exit(1 if Watch.late and sys.stderr.write(str(Watch.late)) else 0)
        """)
        assert not server.script                       # all faults had their turn


@posix_only
@pytest.mark.parametrize("kind", KINDS[:2])
def test_parent_and_child_share_no_connection_and_no_descriptor(kind):
    with FaultyServer() as server:
        run("""
            tracker = tracker_to(%s)
            def send(name):
                tracker.track("user", name)
                tracker.flush()
            def sockets():
                try:
                    links = [os.readlink("/proc/self/fd/%%d" %% number) for number in range(3, 30)
                             if os.path.lexists("/proc/self/fd/%%d" %% number)]
                except OSError:
                    links = []
                return {link for link in links if link.startswith("socket:")}
            send("parent")
            parents = sockets()
            def work():
                send("child")
                send("child")
                assert not parents & sockets()
            reap(child(work))
            send("parent")
            reap(child(work))
            send("parent")
        """ % kind, server.url)
        assert server.names == ["parent", "child", "child"] * 2 + ["parent"]
        assert server.connections == 3


@pytest.mark.parametrize("method", ["spawn"] + ["fork", "forkserver"] * hasattr(os, "fork"))
def test_processes_and_closed_pools_of_multiprocessing_deliver_at_their_end(method):
    with FaultyServer() as server:
        run("""
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
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


@table("missing", ["ssl", "fcntl msvcrt", "zlib", "threads"])
def test_what_a_python_lacks_is_missed_only_by_what_needs_it(tmp_path, missing):
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
        assert (done.returncode, done.stderr) == (0, "")
        assert numbers(server.records) == [1]
        assert (server.requests[0].body[:1] == b"[") == (missing == "zlib")
    assert ("ssl" in done.stdout.lower()) == (missing == "ssl")


@table("name", ["renamed.py", "package/inside.py", "archive.zip"])
def test_the_file_works_under_another_name_in_a_package_and_from_a_zip(tmp_path, name):
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
    assert (done.returncode, done.stderr) == (0, "")
    assert digest() in done.stdout and done.stdout.count("SearchCommodity") >= 3


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
                changed({"$original_id": ""}, "$alias"), "record", None, []]


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
    bomb = gzip.compress(b"[" + b" " * (1 << 27) + json.dumps(record("u", "Event")).encode() + b"]", 1)
    with analysys.Receiver() as server:
        assert (post(server.url, base64.b64encode(bomb))[1] or {}).get("code") != 200
        assert post(server.url, None, **{"Content-Length": str(10 ** 12)})[0] >= 400      # and none of them sent
        assert server.records == []


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------

def digest():
    with open(SOURCE, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


@table("options, environment", [([], {}), (["-I", "-S", "-OO"], {"LC_ALL": "C"}), ([], {"PYTHONIOENCODING": "ascii"})])
def test_demo_shows_all_records_three_times_from_a_folder_that_holds_the_file_alone(tmp_path, options, environment):
    shutil.copy(SOURCE, str(tmp_path))
    done = python(*(options + ["analysys.py", "demo"]), cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(str(tmp_path)) == ["analysys.py"]
    for xwhat in "SearchCommodity", "register", "$alias", "$profile_set", "purchase", "payment":
        assert len(re.findall(r"(?<!\w)" + re.escape(xwhat) + r"\b", done.stdout)) >= 3
    for word in "time", "who", "what", "platform", "login", "properties", "sent", "received":
        assert word in done.stdout.lower()
    assert "ABCD123456" in done.stdout and "zhangsan" in done.stdout and "JS" in done.stdout


def test_no_arguments_print_the_help_with_or_without_docstrings():
    plain, stripped = python(SOURCE), python("-I", "-S", "-OO", SOURCE)
    assert (plain.returncode, plain.stderr) == (stripped.returncode, stripped.stderr) == (0, "")
    assert "demo" in plain.stdout and plain.stdout == stripped.stdout


def test_version_tells_the_version_the_files_sha_256_and_the_python(capsys):
    assert analysys.main(["--version"]) == 0
    printed = capsys.readouterr().out
    for word in analysys.__version__, digest(), platform.python_version():
        assert word in printed


@table("arguments", [["nonsense"], ["--nonsense"], ["demo", "nonsense"], ["demo", "--nonsense"]])
def test_wrong_usage_ends_with_64_and_one_sentence(capsys, arguments):
    assert analysys.main(arguments) == 64
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.strip() and printed.err.strip().count("\n") == 0


# ---------------------------------------------------------------------------
# The command line: upload
# ---------------------------------------------------------------------------

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
        assert ship(tmp_path, "--server", server.url) == (0, "delivered 8, rejected 0, remaining 0\n", "")
        assert ship(tmp_path / "other.log", "--server", server.url).status == 0
        with shipper("-", "--server", server.url, cwd=str(tmp_path)) as started:
            out, err = started.communicate((lines_of("g", "h") + lines_of("i").rstrip()).encode())
            assert (started.returncode, out, err) == (0, b"delivered 3, rejected 0, remaining 0\n", b"")
        assert server.names == ["a", "b", "c", "d", "e", "f", "java", "node", "other", "g", "h", "i"]
        assert server.accepted[6]["xcontext"]["name"] == "\u8dd1"
        assert len(ship(tmp_path, tmp_path / "other.log", "--server", server.url).out) and len(server.names) == 12


E = "--server"
USAGE = [
    [], ["PATH"], ["PATH", E, ""], ["PATH", E, "ftp://host"], ["PATH", E, "URL", "--batch", "0"], [E, "URL"],
    ["PATH", E, "URL", "--batch", "many"], ["PATH", E, "URL", "--request-timeout", "0"], ["PATH", E, "URL", "--frob"],
    ["PATH", E, "URL", "--header", "no colon"], ["PATH", E, "URL", "--header", "A: \u6613"],
    ["PATH/nowhere", E, "URL"], ["PATH/nowhere/", E, "URL"], ["PATH/nowhere", "--dry-run"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_is_one_sentence_and_status_64_and_writes_nothing(tmp_path, arguments):
    log_file(tmp_path / "datas_2018072510.log", "a")
    with FaultyServer() as server:
        filled = [part.replace("PATH", str(tmp_path)).replace("URL", server.url) for part in arguments]
        shipped = ship(*filled)
        assert (shipped.status, shipped.out, shipped.err.count("\n"), server.names) == (64, "", 1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["datas_2018072510.log"]


def test_the_exit_status_tells_done_rejected_and_not_delivered(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    path = log_file(folder / "datas_2018072510.log", "a", "bad", "c", ends="damaged\n" + lines_of("d"))
    with FaultyServer(then=refusing("bad")) as server:
        shipped = ship(folder, "--server", server.url)
        assert (shipped.status, server.names) == (1, ["a", "c", "d"])
        assert shipped.out.startswith("delivered 3, rejected 2, remaining 0\n")
        assert [(entry["file"], entry["line"]) for entry in rejected_in(folder)] == [(path.name, 2), (path.name, 4)]
        assert "unknown event" in rejected_in(folder)[0]["reason"] and "JSON" in rejected_in(folder)[1]["reason"]
        assert ship(folder, "--server", server.url) == (0, "delivered 0, rejected 0, remaining 0\n", "")
    for ends in "\n", "":                                              # a last line that lacks its newline counts too
        path.write_text(lines_of("x", "y") + lines_of("z").rstrip() + ends)
        with FaultyServer(then=then_fail) as server:
            shipped = ship(folder, "--server", server.url)
            assert (shipped.status, shipped.out) == (2, "delivered 0, rejected 0, remaining 3\n")
            assert "503" in shipped.err


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"\\ud83d"'])
@pytest.mark.parametrize("options", [[], ["--history"]], ids=["as it is", "history"])
def test_a_value_that_is_hardly_json_stops_neither_the_others_nor_its_own_rejection(tmp_path, value, options):
    path = log_file(tmp_path / "datas_2018072510.log", "a", "bad", "c")
    path.write_text(path.read_text().replace('"bad"', '"bad", "value": %s' % value))
    with FaultyServer(then=refusing("bad")) as server:
        assert ship(tmp_path, "--server", server.url, *options).status == 1
        assert server.names == ["a", "c"]
    entry, = rejected_in(tmp_path)
    assert entry["line"] == 2 and '"bad"' in json.dumps(entry["record"]).replace("\\", "")


def test_after_an_error_upload_goes_on_exactly_where_it_stopped(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *run_of("a", 25))
    zipped(log_file(tmp_path / "datas_2018072511.log", *run_of("b", 25)))
    left = 50
    with FaultyServer() as server:
        for accepted in 2, 0, 1, 2, 9:
            server.script.extend([accept] * accepted + [then_fail] * (accepted < 9))
            shipped = ship(tmp_path, "--server", server.url, "--batch", "10")
            left = max(0, 50 - len(server.names))
            assert shipped.out.endswith("remaining %d\n" % left) and shipped.status == (2 if left else 0)
        assert server.names == run_of("a", 25) + run_of("b", 25)


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_a_signal_upload_goes_on_exactly_where_it_stopped(tmp_path, number):
    log_file(tmp_path / "datas_2018072510.log", *run_of("e", 30))
    gate = threading.Event()

    def slow(server, request):
        return gate.wait(20) and accept(server, request)
    with FaultyServer(accept, slow) as server:
        with shipper(tmp_path, "--server", server.url, "--batch", "10") as started:
            wait_until(lambda: len(server.requests) == 2)
            started.send_signal(number)
            started.send_signal(number)
            gate.set()
            shipped = ended(started)
        assert shipped.status == 2 and shipped.out == "delivered 20, rejected 0, remaining 10\n"
        assert shipped.err == "analysys: not all is delivered: it was stopped\n"
        assert ship(tmp_path, "--server", server.url).status == 0
        assert server.names == run_of("e", 30)


@posix_only
def test_after_kill_9_upload_delivers_all_and_only_the_batch_in_flight_twice(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *run_of("e", 100))
    killed = []

    def deadly(server, request):                       # takes the batch, kills who sent it, never answers
        accept(server, request)
        killed.append([entry["xwhat"] for entry in server.batches[-1]])
        processes[-1].kill()
        processes[-1].wait()
        return b""
    processes = []
    with FaultyServer(accept, deadly, accept, accept, deadly, deadly) as server:
        for _ in range(3):
            with shipper(tmp_path, "--server", server.url, "--batch", "10") as started:
                processes.append(started)
                ended(started)
            assert started.returncode == -signal.SIGKILL
        assert ship(tmp_path, "--server", server.url).status == 0
        twice = collections.Counter(server.names) - collections.Counter(run_of("e", 100))
        assert twice == collections.Counter(sum(killed, [])) and len(killed) == 3
        assert list(dict.fromkeys(server.names)) == run_of("e", 100)


def rotated(path):
    path.rename(path.with_name(path.name + ".1"))


def replaced(path):
    rotated(path)
    log_file(path, *run_of("new", 5))


def copied_and_truncated(path):
    shutil.copy(str(path), str(path) + ".1")
    log_file(path, *run_of("new", 5))


@pytest.mark.parametrize("change", [
    rotated, zipped, lambda path: zipped(path.rename(str(path) + ".1") or path.with_name(path.name + ".1")),
    lambda path: path.rename(path.with_name("datas_1.log")), replaced, copied_and_truncated,
    lambda path: [shutil.copy(str(path), str(path) + ".copy"), path.unlink()],
    lambda path: log_file(path, *run_of("old", 25) + run_of("more", 5)),
], ids=["renamed", "gzipped", "both", "another period", "rotated", "copytruncate", "copied", "grown"])
def test_a_file_is_known_by_its_beginning_whatever_its_name(tmp_path, change):
    path = log_file(tmp_path / "datas_2018072510.log", *run_of("old", 25))
    with FaultyServer(accept, then_fail) as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "10").status == 2
        change(path)
        assert ship(tmp_path, "--server", server.url, "--batch", "10").status == 0
        for prefix, count in ("old", 25), ("new", 5), ("more", 5):
            found = [xwhat for xwhat in server.names if xwhat.startswith(prefix)]
            assert found in ([], run_of(prefix, count))
        assert len(server.names) == 25 + 5 * (change in (replaced, copied_and_truncated) or "more0" in server.names)
        assert ship(tmp_path, "--server", server.url) == (0, "delivered 0, rejected 0, remaining 0\n", "")


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
        with FaultyServer(accept, then_fail, then=refusing("bad")) as server:
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
        for checkpoint in tmp_path, tmp_path / "broken", path / "point":
            shipped = ship(path, "--server", server.url, "--checkpoint", checkpoint)
            assert (shipped.status, shipped.err.count("\n")) == (2, 1) and "--checkpoint" in shipped.err
        assert server.requests == []


@posix_only
def test_follow_ships_what_grows_and_rotates_waits_for_the_end_of_a_line_and_stops_on_sigterm(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends=lines_of("b")[:40])
    with FaultyServer() as server, shipper(tmp_path, "--server", server.url, "--follow") as started:
        wait_until(lambda: server.names == ["a"])
        with path.open("a") as file:
            file.write(lines_of("b")[40:] + lines_of("c"))
        rotated(path)
        log_file(path, "d")
        zipped(log_file(tmp_path / "datas_2018072509.log", "e"))
        log_file(tmp_path / "datas_2018072511.log", "f", ends=lines_of("g").rstrip())
        wait_until(lambda: len(server.names) >= 6)
        with (tmp_path / "datas_2018072511.log").open("a") as file:
            file.write("\n")
        wait_until(lambda: len(server.names) >= 7)
        started.send_signal(signal.SIGTERM)
        assert ended(started) == (0, "delivered 7, rejected 0, remaining 0\n", "")
        assert sorted(server.names) == list("abcdefg")


@posix_only
def test_follow_waits_for_a_file_that_is_not_there_for_a_while(tmp_path):
    path = log_file(tmp_path / "events.log", "a")
    with FaultyServer() as server, shipper(path, "--server", server.url, "--follow") as started:
        wait_until(lambda: server.names == ["a"])
        path.unlink()
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(1.2)
        log_file(path, "b")
        wait_until(lambda: server.names == ["a", "b"])
        started.send_signal(signal.SIGTERM)
        assert ended(started).status == 0


@pytest.mark.parametrize("options", [[], ["--follow"]], ids=["once", "follow"])
def test_a_last_line_that_is_ended_while_others_are_sent_is_delivered_whole(tmp_path, options):
    path = log_file(tmp_path / "datas_2018072510.log", "a", ends=lines_of("b")[:40])

    def meanwhile(server, request):
        with path.open("a") as file:
            file.write(lines_of("b")[40:] + lines_of("c"))
        return accept(server, request)
    with FaultyServer(meanwhile) as server, shipper(tmp_path, "--server", server.url, *options) as started:
        if options:
            wait_until(lambda: len(server.names) == 3)
            started.send_signal(signal.SIGTERM)
        assert ended(started) == (0, "delivered 3, rejected 0, remaining 0\n", "")
        assert server.names == ["a", "b", "c"]


@posix_only
def test_a_signal_also_stops_upload_where_it_waits_for_standard_input(tmp_path):
    with FaultyServer() as server, shipper("-", "--server", server.url, "--batch", "1", cwd=str(tmp_path)) as started:
        started.stdin.write(lines_of("a").encode())
        started.stdin.flush()
        wait_until(lambda: server.names == ["a"])
        started.send_signal(signal.SIGTERM)
        started.wait(3)


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
        if server.batches[-1][0]["xwhat"] == "h":
            log_file(grows, "h", "i")
        return accept(server, request) if server.batches[-1][0]["xwhat"] != "bad" else answer(200, b'{"code":400}')
    with FaultyServer(then=meanwhile) as server:
        assert ship(tmp_path, "--server", server.url, "--delete").status == 1
        names = {path.name for path in tmp_path.iterdir()}
        assert {"datas_2018072514.log", "datas_2999010100.log", "rejected.log"} <= names
        assert names.isdisjoint({"datas_2018072510.log", "datas_2018072511.log.1", "datas_2018072512.log.gz",
                                 "datas_2018072513.log", "datas_2018072515.log"})
        assert names.issuperset(current) or time.localtime().tm_hour != moment.tm_hour
        assert ship(tmp_path, "--server", server.url, "--delete").status == 0
        assert not grows.exists() and server.names.count("i") == server.names.count("h") == 1


def test_delete_delivers_no_event_again_where_a_copy_or_gz_of_a_removed_file_is_there(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log.1", "a", "b")
    shutil.copy(str(zipped(path)), str(tmp_path / "datas_2018072510.log.1.gz.copy.gz"))
    log_file(path, "a", "b")
    log_file(tmp_path / "datas_2018072511.log", "c")
    with FaultyServer() as server:
        for _ in range(2):
            assert ship(tmp_path, "--server", server.url, "--delete").status == 0
        assert server.names == ["a", "b", "c"]


@posix_only
def test_follow_and_delete_remove_a_file_when_a_newer_one_has_come(tmp_path):
    first = log_file(tmp_path / "datas_2018072510.log", "a")
    with FaultyServer() as server, shipper(tmp_path, "--server", server.url, "--follow", "--delete") as started:
        wait_until(lambda: server.names == ["a"])
        second = log_file(tmp_path / "datas_2018072511.log", "b")
        wait_until(lambda: server.names == ["a", "b"] and not first.exists(), 4)
        started.send_signal(signal.SIGTERM)
        assert ended(started).status == 0 and second.exists()


def test_history_flags_the_records_that_lack_the_flag(tmp_path):
    path = tmp_path / "datas_2018072510.log"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (event("a"), event("b", **{"$importFlag": 0}))))
    with FaultyServer() as server:
        assert ship(path, "--server", server.url, "--history").status == 0
        assert server.accepted == [event("a", **{"$importFlag": 1}), event("b", **{"$importFlag": 0})]


def test_dry_run_sends_and_writes_nothing_and_tells_events_and_errors_with_the_first_of_each(tmp_path):
    first, second = tmp_path / "datas_2018072510.log", tmp_path / "datas_2018072511.log"
    log_file(first, "Look", "Look", "Buy")
    good = ship(first, "--dry-run")
    assert good.status == 0 and good.out.splitlines() == [
        "       2  event  Look  (first: %s:1)" % first, "       1  event  Buy  (first: %s:3)" % first,
        "3 lines are good, 0 are not"]
    log_file(second, "Buy", "not a name", ends="\n{\n[]\n" + lines_of("Buy").replace('"xwho": "user"', '"xwho": ""'))
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--dry-run", "--server", server.url)
        assert server.connections == 0
    assert shipped.status == 1 and shipped.err == ""
    lines = shipped.out.splitlines()
    assert lines[:2] == [good.out.splitlines()[0], "       2  event  Buy  (first: %s:3)" % first]
    places = sorted((line.split()[0], line.split(":")[-1]) for line in lines[2:-1])
    assert places == [("1", "2)"), ("1", "6)"), ("2", "4)")]
    assert all(" error " in line and str(second) in line for line in lines[2:-1])
    assert lines[-1] == "4 lines are good, 4 are not"
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]


def test_batch_header_and_request_timeout_reach_the_requests(tmp_path):
    path = log_file(tmp_path / "datas_2018072510.log", *run_of("e", 7))
    with FaultyServer(lambda server, request: server.closed.wait(10) and b"") as server:
        start = time.monotonic()
        shipped = ship(path, "--server", server.url, "--batch", "3", "--header", "X-Key: a b", "--header=X-Other:c",
                       "--request-timeout", "0.3")
        assert shipped.status == 0 and time.monotonic() - start < 5
        assert [len(batch) for batch in server.batches] == [3, 3, 3, 1]
        assert {(request.headers["x-key"], request.headers["x-other"]) for request in server.requests} == {("a b", "c")}


def test_what_cannot_be_read_keeps_nothing_else_from_being_delivered(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *run_of("a", 5))
    cut = zipped(log_file(tmp_path / "datas_2018072511.log", *run_of("b", 150)))
    cut.write_bytes(cut.read_bytes()[:-20])
    (tmp_path / "datas_2018072512.log.gz").write_bytes(b"no gzip at all")
    (tmp_path / "datas_2018072513.log").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(str(tmp_path / "datas_2018072514.log"))
    log_file(tmp_path / "datas_2018072515.log", *run_of("c", 5))
    with FaultyServer() as server:
        shipped = ship(tmp_path, "--server", server.url)
        assert shipped.status == 2 and "Traceback" not in shipped.err
        readable = len(server.names) - 10
        assert server.names == run_of("a", 5) + run_of("b", readable) + run_of("c", 5)
        assert readable > 100                                          # all lines before the damage, not whole batches


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_longer_than_any_record_is_damaged_and_the_lines_after_it_are_delivered(tmp_path, place):
    lines = [lines_of("a"), lines_of("b")]
    lines.insert(place, "x" * (9 << 20) + "\n")
    (tmp_path / "datas_2018072510.log").write_text("".join(lines))
    with FaultyServer() as server:
        assert ship(tmp_path, "--server", server.url, "--batch", "2").status == 1
        assert server.names == ["a", "b"]


@posix_only
def test_a_terminal_gets_a_progress_line_and_a_file_does_not(tmp_path):
    log_file(tmp_path / "datas_2018072510.log", *run_of("e", 20))

    def slow(server, request):
        server.closed.wait(0.6)
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


@linux_only
def test_a_file_larger_than_the_memory_it_may_take_is_delivered(tmp_path):
    line = json.dumps(event("e", filler="x" * 5000)) + "\n"
    (tmp_path / "datas_2018072510.log").write_text(line * 12000)
    with FaultyServer(then=lambda server, request: server.requests.clear() or answer()) as server:
        out = script_ends("""
            status = analysys.main(["upload", folder, "--server", url, "--batch", "200"])
            print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        """, tmp_path, server.url)
    told, peak = out.splitlines()
    assert told == "delivered 12000, rejected 0, remaining 0" and int(peak) < 50000


# ---------------------------------------------------------------------------
# README.md and setup.py
# ---------------------------------------------------------------------------

def test_the_python_examples_of_the_readme_run(tmp_path):
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    script, inside = [], False                         # one script; its line numbers are the README's
    for line in text.splitlines():
        fence = line.strip().startswith("```")
        inside = line.strip() == "```python" if fence else inside
        script.append(line if inside and not fence else "")
    assert any(script)
    with analysys.Receiver() as server:
        text = "\n".join(script).replace("https://host:port", server.url)
        (tmp_path / "readme.py").write_text(text, encoding="utf-8")
        done = python("readme.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert server.records


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
