# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the analysys.py authors; the licence's notice stands below the manual.
"""analysys: server-side events for Analysys Ark (易观方舟), in one file with no dependency.

An independent implementation, not the vendor's. 独立实现，非官方。

An import defines names and loads light modules of the standard library, no more: no socket, thread, handler, hook or
file. A *tracker* checks a call and makes one record of it; a *collecter* brings the record to the platform:

    from analysys import AnalysysPythonSdk, BatchCollecter

    tracker = AnalysysPythonSdk(BatchCollecter("https://host:port"), on_error=lambda error, record: None)
    tracker.setAppId("fangzhouargo")
    tracker.track("ABCD123456", "SearchCommodity", {"commodity_price": 5000}, "android")
    tracker.close()

Which collecter
    ====================================== ====================== ===============================================
    collecter                              a tracking call        what survives
    ====================================== ====================== ===============================================
    DefaultCollecter(url)                  one HTTP request       the call returns once the server has the record
    BatchCollecter(url)                    microseconds, memory   a normal exit
    BatchCollecter(url, spool_path=DIR)    one write to DIR       kill -9, restarts, outages of any length
    LogCollecter(DIR)                      one write to a log     all of that; ``upload`` ships the files
    any object with uploadData(record),    yours                  yours
    flush(timeout=10), close(timeout=10)
    ====================================== ====================== ===============================================

Limits
    ====================================== ======================================================================
    app id; distinct_id, alias_id          str of 1 to 255; of 1 to 254 characters
    event name, property name              1 to 99 ASCII letters, digits, "_", a letter first; "$" may precede it
    properties                             100 in a call; 100 super properties
    value                                  str, bool, number, list or tuple of str, date, datetime; no None
    string; list                           255 characters; 100 strings
    number                                 finite; integers of 64 bits signed
    queue in memory; spool; whole request  1000 records; 1 GiB; 10 s (arguments of BatchCollecter)
    ====================================== ======================================================================

Exceptions
    ====================================== ======================================================================
    AnalysysPythonSdkException             base of the others; itself: the collecter is closed
    AnalysysPythonSdkIllegalDataException  a ValueError: a bad argument, or records that the platform refused
    AnalysysPythonSdkNetworkException      not delivered: no server, no answer, no room, no time
    AnalysysPythonSdkFileException         an OSError: not written
    ====================================== ======================================================================

    With ``on_error`` given to the tracker, tracking calls raise none of them: ``on_error(exception, record)`` gets
    them. What BatchCollecter gives up later goes to its own ``on_error(exception, records)``, or to the log.

Threads, forks, exit
    Everything may be used from any number of threads, from signal handlers and from ``__del__``; in an asyncio event
    loop a call to BatchCollecter never waits. A forked child starts empty and sends only its own records, whoever
    forked it. A normal exit delivers what waits, within 10 seconds in all; after SIGTERM by default, SIGKILL and
    ``os._exit`` a queue in memory is lost, a spool is not. Delivery is at least once. ``stats()``: accepted (+ adopted)
    = delivered + rejected + pending, at any moment.

Disk and network
    Each collecter talks to its ``server_url`` alone, by the environment's proxies; certificates are verified and
    redirects not followed. A spool, a log and ``rejected.log`` hold personal data (0600, logs 0640); so do debug modes
    1 and 2, and messages about refused values.

Command line
    ``python3 analysys.py demo`` shows it all on one machine, ``serve`` what you send, ``check`` why nothing arrives;
    ``upload`` delivers log files; ``--version`` tells which copy this is. ``Receiver`` is the server for your tests.
"""

# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
# persons to whom the Software is furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
# Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

import binascii
import collections
import errno
import functools
import io
import itertools
import json
import os
import re
import stat
import sys
import threading
import time

try:
    import fcntl
except ImportError:  # Windows, WebAssembly
    fcntl = None  # type: ignore[assignment]

if os.name == "nt":
    import msvcrt
else:  # not even looked for: that takes long
    msvcrt = None  # type: ignore[assignment]

_register_at_fork: "Any" = getattr(os, "register_at_fork", None)  # not in 3.6, not on Windows

TYPE_CHECKING = False  # what type checkers take for true: `typing` costs 5 ms to import
if TYPE_CHECKING:
    import http.client
    import ssl
    from datetime import datetime
    from types import TracebackType
    from typing import Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, Optional, Set
    from typing import Tuple, Type, Union

    Record = Dict[str, Any]
    OnError = Optional[Callable[[Exception, Any], Any]]
    Properties = Optional[Dict[str, Any]]
    When = Union[int, datetime, None]

__version__ = "1.0.0"

__all__ = [
    "AnalysysPythonSdk",
    "DefaultCollecter",
    "BatchCollecter",
    "LogCollecter",
    "AnalysysPythonSdkException",
    "AnalysysPythonSdkIllegalDataException",
    "AnalysysPythonSdkNetworkException",
    "AnalysysPythonSdkFileException",
]


########################################################################################################################
# Limits and names: every number and wire name, once. "3.2" is a section of the product document, "C4" of the contract.
########################################################################################################################

_MAX_APP_ID = 255  # characters; C4
_MAX_ID = 254  # characters, "shorter than 255": 3.2, 3.3
_MAX_NAME = 99  # characters in an event or property name: 3.2
_MAX_PROPERTIES = 100  # in one call, and super properties in all: 3.2, C4
_MAX_STRING = 255  # characters in a value: 3.2
_MAX_ITEMS = 100  # in a list: 3.4
_MAX_INTEGER = 2**63 - 1  # 64 bits signed: C4
_NAME = r"\$?[A-Za-z][A-Za-z0-9_]*"  # 3.2
_HEADER_NAME = r"[!-9;-~]+"  # of HTTP, sent or received
_FIRST_MS, _LAST_MS = 10**12, 10**13 - 1  # Unix milliseconds of 13 digits: 3.2

_MAX_FRAMES = 4 * 1024 * 1024  # bytes kept encoded of a tracker: some thousand pairs of event name and platform
_FRAME_OVERHEAD = 500  # bytes that a frame takes beside its text

_LIB = "python"
_PLATFORMS = {"ios": "iOS", "android": "Android", "js": "JS", "wechat": "WeChat", "": _LIB}  # in any case: C3
_RESERVED = frozenset(
    "xwho xwhat xwhen appid xcontext $lib $lib_version $is_login $debug $platform $original_id".split()
)
_ALIAS = "$alias"
_LOG_NAMES = {"hour": "datas_%Y%m%d%H.log", "day": "datas_%Y%m%d.log"}  # by general_rule, for strftime: C6

_REQUEST_TIMEOUT = 10.0  # seconds for a whole request where the caller gives none: C5
_FIRST_BACKOFF, _LAST_BACKOFF = 0.1, 30.0  # seconds between attempts: C5
_MAX_RETRY_AFTER = 300.0  # seconds that a server may ask us to wait: C5
_MAX_ANSWER = 64 * 1024  # bytes read of an answer, and decompressed of one: C5
_READ_AT_ONCE = 8192  # bytes of an answer: what is behind it stays in the connection, and is noticed there
_MAX_HEADERS = 64 * 1024  # bytes read before the answer's body, beyond those
_TLS_RECORD = 16 * 1024  # bytes that one send() over TLS takes at most
_MAX_IDLE = 60.0  # seconds that an idle connection is kept: C5
_MAX_TOLD = 300  # characters of what a server, a file or a caller wrote, in a message: C5
_CUT_AFTER = 4  # failures in a row, then a request on which the server chokes is cut, or stands aside alone: C5
_GIVE_UP_AFTER = 5  # failures after which a record is given up on which alone the server chokes: C5
_MOST_ASIDE = 1000  # records on which the server chokes, before no more are taken
_SLOT = 16 * 1024  # bytes of a record that count as one in a memory queue: C6
_CUT_EVERY = 1.0  # seconds between two back-offs that flush() may cut short: C6
_WARN_EVERY = 60.0  # seconds between warnings in an outage: C5
_EXIT_TIMEOUT = 10.0  # seconds at exit, for all collecters together: C6
_MAX_LINE = 40 * 1024 * 1024  # bytes of a line in a file: no record within the limits has more, so it is damaged
_MAX_STRUCTURE = 256 * 1024  # bytes of a line that are not within quotes: a record within the limits has some kilobytes
_QUOTED = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_CHUNK = 128 * 1024  # bytes read of a file at once
_MAX_TAKEN = 4 * 1024 * 1024  # bytes of lines taken at once, unless one is longer; C8 allows 8 MiB, and 64 MB in all
_MAX_HOLES = 2000  # ranges of lines that are not settled and are noted: more than _MOST_ASIDE makes
_SOURCE_COST = 8192  # bytes of lines that can be read in the time that another file takes
_MOST_ADOPTED = 50  # processes whose files are adopted at once: each takes a descriptor
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_NOTICE_EVERY = 1.0  # seconds between two looks at whether our own spool files are there: C6
_TOGETHER = 64  # lines that are decoded at once
_BARREN = 64  # chunks without any line that are read before somebody may look at signals
_SHOWN = 4096  # bytes of a damaged line in rejected.log: C6
_ROLL_SIZE = 16 * 1024 * 1024  # bytes of a spool file: C6
_LOOK_EVERY = 5.0  # seconds between two looks for files whose owner is gone: C6
_HASHED = 4096  # bytes at its beginning, and before its place, that a file is known by: C8
_HEAD_SIZES = [1 << power for power in range(12, -1, -1)]  # how many of its first bytes
_REMOVED_KEPT = 10000  # entries in a checkpoint of files that are not there any more
_ROOM = 64 * 1024  # bytes that a checkpoint is kept longer than it is
_SYNC_EVERY = 1.0  # seconds between two fsyncs of a checkpoint: C8
_FIRST_BATCH = 500  # records in its first requests: C8
_LONG = 0.03  # seconds; a request that takes longer is followed by larger ones
_MAX_UNPACKING = 32 * 1024 * 1024  # bytes of memory for xz: its -9 takes twice as much
_LOOKED_AT = 500  # finished files that are looked at each time, files opened for a batch, and so on
_MOST_SHAPES = 1000  # of records, and rules that are broken, told apart in a dry run
_STREAM_WAIT = 0.1  # seconds in one wait for standard input
_LOOK_AGAIN = 0.1  # seconds until files are looked for that were renamed, or that have to wait for others
_COUNT, _COUNT_STOPPED = 5.0, 0.3  # seconds for counting what remains, undisturbed and after a signal
_PACKED = (".gz", ".bz2", ".xz")
_CHECKPOINT_HEAD = b'{"analysys":"checkpoint","version":2}\n'
_JSON_GAP = r"[ \t\r\n,:]*"
_MAX_PAIRS = 50000  # of event and property in an inventory: C8
_SHORT = 40  # characters of an example in it
_GIVE_UP = 30.0  # seconds that upload bears a failing server, unless it follows
_PROGRESS_EVERY = 0.5  # seconds between two changes of the line that shows how far upload is
_FOLLOW_EVERY = 1.0  # seconds between two looks at followed files
_INOTIFY = 0x1000182  # Linux: tell what in a directory is written to, made or renamed
# What LogCollecter writes, and what logrotate, gzip and people make of it; our own beside it; what may hold records
_LOG_FILE = r"datas_(\d+)([._-].*)?\.log([._-].*)?"
_OWN_NAME = r"(rejected\.log|upload\.checkpoint)([._-].*)?"
_OTHER_NAME = r"\.(log|txt|json|jsonl|ndjson|gz|bz2|xz)\b"
_LOCK_SIZE = 4000  # bytes that a spool's lock file has at least, for what will be noted in it
_SPOOL_LOCK = r"\d{13,}-\d+-[0-9a-f]{8}\.lock"
_SPOOL_FILE = r"\d{13,}-\d+-[0-9a-f]{8}\.\d{6,}\.log"
_LOCKED_BYTE = 1 << 62  # the byte that Windows locks, far beyond any file's end
_LOCK_NOW = 0 if fcntl is None else fcntl.LOCK_EX | fcntl.LOCK_NB
# A lock of an open file, and one of a process, until it ends or closes any descriptor of that file
_FLOCK, _LOCKF = getattr(fcntl, "flock", None), getattr(fcntl, "lockf", None)
_LOCK_TIMEOUT = 10.0  # seconds to wait for another process that holds a file's lock,
_SHORT_LOCK_TIMEOUT = 0.05  # and once that was in vain: C6
_LONGEST_WAIT = 3600.0  # seconds in one wait; locks refuse more than some platform's limit
_LOGGER = "analysys"
_SENDER = "analysys-sender"  # the name of the thread that sends,
_WAITER = "analysys-exit"  # and of one that waits for others to end; copies of the module must know each other's
_GZIP_LEVEL = 3  # of 100 records (48 KB): 7.4 KB in 124 us; level 6: 6.7 KB in 376 us; level 1: 7.6 KB in 112 us
_ONE_PACKET = 900  # bytes of text that fit into one packet, in base64 and with a request's head: not compressed
_GZIP = 31  # zlib's number for "gzip, largest window"


class _Clock:
    """Monotonic seconds, and the one way to wait for something; tests bring one with ``advance()``.

    Bound in a class, where test suites that freeze `time` do not find it: a frozen clock would hang what waits.
    """

    now = staticmethod(time.monotonic)

    @staticmethod
    def wait(lock: "Any", seconds: float) -> bool:
        """Acquire *lock* (a threading.Lock) within *seconds*, which may be infinite; return whether that came true."""
        return bool(lock.acquire(timeout=min(seconds, _LONGEST_WAIT)))


_CLOCK = _Clock()


########################################################################################################################
# Errors
########################################################################################################################


class AnalysysPythonSdkException(Exception):
    """Base of all errors of this module. *records* holds the records that the error is about, maybe none."""

    is_echo = False  # whether it is about what an on_error tracked: then it is logged, and nobody is told

    def __init__(self, message: str, records: "Iterable[Any]" = ()) -> None:
        super().__init__(message)
        self.records = list(records)


class AnalysysPythonSdkIllegalDataException(AnalysysPythonSdkException, ValueError):
    """Data that will never be accepted: a bad argument, or records that the platform refused for good."""

    rule = ""  # what was broken, without the value


class AnalysysPythonSdkNetworkException(AnalysysPythonSdkException):
    """Records that are not delivered: the server fails, is silent, or there was no room or time left."""


class AnalysysPythonSdkFileException(AnalysysPythonSdkException, OSError):
    """Records that could not be written to disk; *errno* is the system's reason where there is one."""

    errno: "Optional[int]" = None  # kept in the instance's dict, which copies and pickles carry


def _illegal(argument: str, value: object, rule: str) -> AnalysysPythonSdkIllegalDataException:
    if rule == _RULES["list"].text:
        argument, value, rule = _bad_item(argument, value, rule)
    error = AnalysysPythonSdkIllegalDataException("%s is %s: it %s" % (argument, _shown(value), rule))
    error.rule = "%s %s" % (argument, rule)
    return error


def _closed() -> AnalysysPythonSdkException:
    return AnalysysPythonSdkException("this collecter is closed: it takes no more records")


def _unwritable(path: str, error: BaseException, lines: "Iterable[bytes]" = ()) -> AnalysysPythonSdkFileException:
    records = map(_decode, b"".join(lines).splitlines())
    raised = AnalysysPythonSdkFileException("cannot write %s: %s" % (_printable(path), _printable(error)), records)
    raised.errno = getattr(error, "errno", None)
    return raised


def _shown(value: object) -> str:
    """Show *value* in a message: short and printable, however large or ill-behaved it is."""
    import reprlib

    try:
        if isinstance(value, int) and int.bit_length(value) > 128:
            return _shown_int(value, 0)
        shortened = reprlib.Repr()
        shortened.repr_int = _shown_int  # type: ignore[method-assign]
        shortened.maxother = 100  # a datetime has more than the usual 30
        shown = shortened.repr(value)[:100]
        if type(value) in (str, list, tuple) and len(value) > 30:  # type: ignore[arg-type]
            shown += " (%d %s)" % (len(value), "characters" if type(value) is str else "items")  # type: ignore[arg-type]
    except Exception:
        shown = object.__repr__(value)  # which asks neither the value nor its class
    return _printable(shown)  # a class's own repr() says anything


def _shown_int(x: int, level: int) -> str:
    """As `reprlib` does it, but for the digits of large ones, which take quadratic time."""
    return "an int of %d bits" % int.bit_length(x) if int.bit_length(x) > 128 else repr(x)


def _printable(text: object) -> str:
    """Return what a server, a file or a caller wrote as it may stand in a log or on a terminal: short, on one line,
    and without what would steer it (control characters, escape codes, marks that turn the order of letters)."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: _MAX_TOLD + 1])
    return safe if len(safe) <= _MAX_TOLD else safe[: _MAX_TOLD - 3] + "..."


def _bad_item(argument: str, value: object, rule: str) -> "Tuple[str, object, str]":
    """Return what is to blame where a list is refused, the first item that is or the whole, and by which rule."""
    if type(value) in (list, tuple) and len(value) <= _MAX_ITEMS:  # type: ignore[arg-type]
        for position, item in enumerate(list(value)):  # type: ignore[call-overload]
            try:
                _string(item)
            except Exception:
                return "%s[%d]" % (argument, position), item, _RULES["str"].text
    return argument, value, rule


def _log(level: str, message: str, *values: object) -> bool:
    """Log, but for what a logging handler brings about that itself tracks: that would never end. Return whether that
    went well: sys.exit() in a signal handler may have cut it short."""
    import logging

    if getattr(_LOGGING, "now", None) == os.getpid():
        return True
    try:
        _LOGGING.now = os.getpid()
        logger = logging.getLogger(_LOGGER)
        if level == "info" and not logger.hasHandlers():  # debug mode is seen without any configuration
            logging.StreamHandler().handle(logger.makeRecord(_LOGGER, logging.INFO, "", 0, message, values, None))
        else:
            getattr(logger, level)(message, *values)
        return True
    except BaseException as mishap:
        if not _ends_here(mishap):
            raise
        return False
    finally:
        _LOGGING.now = None


_LOGGING = threading.local()  # .now: in which process this thread is logging for us


def _ends_here(mishap: BaseException) -> bool:
    """Tell whether what an on_error or a logging handler raised goes no further. In the sending thread nothing does:
    it would end without a word. In the caller's, Ctrl-C and its like (a gevent.Timeout, pytest.fail()) are meant for
    the caller, but sys.exit() was meant for a thread of the handler's."""
    return isinstance(mishap, (Exception, SystemExit)) or threading.current_thread().name == _SENDER


# Which threads are inside an on_error, by process and thread. Its steps are atomic.
_TELLING: "set[Tuple[int, int]]" = set()


class _Echo(bytes):
    """A line that an on_error tracked. What befalls it is logged, not told: else there might be no end to it."""


def _tell(on_error: "OnError", error: Exception, concerned: object) -> bool:
    """Hand *error* to the application's *on_error*; one that raises is logged, and so is what fails inside one.

    Return whether one of the two went well.
    """
    me = os.getpid(), threading.get_ident()
    if me in _TELLING:
        return _log("error", "inside an on_error: %s", error)
    try:
        _TELLING.add(me)
        on_error(error, concerned)  # type: ignore[misc]
        return True
    except BaseException as mishap:
        if not _ends_here(mishap):
            raise
        return _log("error", "on_error raised %s: %s, when it was told of: %s", type(mishap).__name__, mishap, error)
    finally:
        _TELLING.discard(me)


########################################################################################################################
# The tracker
########################################################################################################################


class AnalysysPythonSdk:
    """Checks tracking calls, makes records of them and gives them to a collecter.

    *collector* is one of the collecters of this module or any object with ``uploadData``, ``flush`` and ``close``.
    *on_error*, if given, is called as ``on_error(exception, record)`` with whatever a tracking call (``track``,
    ``alias``, ``profile_*``) would otherwise raise; *record* is None where the arguments were at fault. All other
    methods always raise. Without *on_error* a tracking call raises: right for tests, not for production.

    Usable as a context manager that closes the collecter. Picklable as configuration. Common parameters:

    - *distinct_id*, *alias_id*: str of 1 to 254 characters; who does it.
    - *data_platform*: str; ``ios``, ``android``, ``js``, ``wechat`` in any case get their proper spelling, None or ""
      becomes ``python``.
    - *is_login*: bool; whether the id is that of a logged-in user.
    - *xwhen*: when it happened, as int in Unix milliseconds (13 digits) or a datetime (naive: local time); None: now.

    Raises AnalysysPythonSdkIllegalDataException where an argument breaks a rule (`_RULES`), and what the collecter
    raises. A call that raises has sent nothing and changed nothing.
    """

    _clock = staticmethod(time.time)  # wall clock, seconds; replaceable for tests

    def __init__(self, collector: "Any", on_error: "OnError" = None) -> None:
        for method in ("uploadData", "flush", "close"):
            if isinstance(collector, type) or not callable(getattr(collector, method, None)):
                raise _illegal("collector", collector, "must have the methods uploadData, flush and close")
        self._collecter = collector
        self._on_error = _check("on_error", on_error)
        self._settings = _Settings(None, 0, {})
        self._locks: "Dict[int, Any]" = {}  # guard replacing _settings; one a process: see _lock

    def setAppId(self, appid: str) -> None:
        """Set the app key of the project, a str of 1 to 255 characters. Mandatory before any tracking call."""
        appid = _check("appid", appid)
        with self._lock():
            self._settings = self._settings.replace(app_id=appid)

    def setDebugMode(self, debug_mode: int = 0) -> None:
        """Set the debug mode: 0 off, 1 logs and the platform does not count the data, 2 logs and it does."""
        debug_mode = _check("debug_mode", debug_mode)
        with self._lock():
            self._settings = self._settings.replace(debug=debug_mode)

    def track(
        self,
        distinct_id: str,
        event_name: str,
        event_properties: "Properties" = None,
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Track an event. Its own properties win over super properties of the same name, whatever the case."""
        self._call(_TRACK, distinct_id, event_name, event_properties, data_platform, is_login, xwhen)

    def alias(
        self,
        alias_id: str,
        distinct_id: str,
        data_platform: "Optional[str]" = "python",
        alias_properties: "Properties" = None,
        is_login: bool = True,
        xwhen: "When" = None,
    ) -> None:
        """Tie the anonymous *distinct_id* to the login *alias_id*. The record always says ``$is_login``."""
        self._call(_ALIASED, alias_id, None, alias_properties, data_platform, is_login, xwhen, distinct_id)

    def profile_set(
        self,
        distinct_id: str,
        profile_properties: "Properties",
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Set user properties, replacing old values. None or empty properties send nothing."""
        self._call(_SET, distinct_id, None, profile_properties, data_platform, is_login, xwhen)

    def profile_set_once(
        self,
        distinct_id: str,
        profile_properties: "Properties",
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Set user properties that have no value yet. None or empty properties send nothing."""
        self._call(_SET_ONCE, distinct_id, None, profile_properties, data_platform, is_login, xwhen)

    def profile_increment(
        self,
        distinct_id: str,
        profile_properties: "Properties",
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Add to numeric user properties (which start at 0). Every value is a number, not a bool."""
        self._call(_INCREMENT, distinct_id, None, profile_properties, data_platform, is_login, xwhen)

    def profile_append(
        self,
        distinct_id: str,
        profile_properties: "Properties",
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Append to user properties that are lists. Every value is a list."""
        self._call(_APPEND, distinct_id, None, profile_properties, data_platform, is_login, xwhen)

    def profile_unset(
        self,
        distinct_id: str,
        profile_properties_keys: "Iterable[str]",
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Remove user properties: a list, tuple or set of their names. An empty one sends nothing."""
        self._call(_UNSET, distinct_id, None, profile_properties_keys, data_platform, is_login, xwhen)

    def profile_delete(
        self,
        distinct_id: str,
        data_platform: "Optional[str]" = "python",
        is_login: bool = False,
        xwhen: "When" = None,
    ) -> None:
        """Remove all properties of a user."""
        self._call(_DELETE, distinct_id, None, None, data_platform, is_login, xwhen)

    def registerSuperProperties(self, super_properties: "Properties") -> None:
        """Add properties, 100 in all, that every later ``track`` carries; a name replaces itself in any case.

        A callable without arguments is called for each event, in the thread that tracks it; what it returns is the
        value, by the same rules.
        """
        given = {} if super_properties is None else _plain_dict("super_properties", super_properties)
        values = {name: "" if _is_call(value) else value for name, value in given.items()}
        members, names = _members("super_properties", values)
        added = _decode(b"{%s}" % members)
        for name, value in zip(list(added), given.values()):
            if _is_call(value):
                added[name] = _check("super_properties[%s]" % name, value, "call")
        with self._lock():
            kept = {name: value for name, value in self._settings.supers.items() if name.lower() not in names}
            if len(kept) + len(added) > _MAX_PROPERTIES:
                raise _illegal("super_properties", super_properties, "must leave at most 100 super properties in all")
            kept.update(added)
            self._settings = self._settings.replace(supers=kept)

    def unregisterSuperProperties(self, super_properties_key: str) -> None:
        """Remove one super property by name, whatever the case; one that is not there is no error."""
        name = self._settings.spelled(super_properties_key)
        with self._lock():
            kept = {other: value for other, value in self._settings.supers.items() if other != name}
            self._settings = self._settings.replace(supers=kept)

    unregisterSuperProperty = unregisterSuperProperties

    def clearSuperProperties(self) -> None:
        """Remove all super properties."""
        with self._lock():
            self._settings = self._settings.replace(supers={})

    def getSingleSuperProperties(self, super_properties_key: str) -> "Any":
        """Return (a copy of) the value of one super property, whatever the case of its name; None if absent."""
        settings = self._settings
        value = settings.supers.get(settings.spelled(super_properties_key) or "")
        return list(value) if isinstance(value, list) else value

    def getAllSuperProperties(self) -> "Record":
        """Return a copy of all super properties."""
        return {n: list(v) if isinstance(v, list) else v for n, v in self._settings.supers.items()}

    def flush(self, timeout: "Optional[float]" = 10) -> None:
        """Return when all records accepted so far are delivered, refused for good or written; see the collecter."""
        self._collecter.flush(timeout)

    def close(self, timeout: "Optional[float]" = 10) -> None:
        """Flush and close the collecter; tracking afterwards raises. Calling it again does nothing."""
        self._collecter.close(timeout)

    def __enter__(self) -> "AnalysysPythonSdk":
        return self

    def __exit__(
        self, kind: "Optional[Type[BaseException]]", error: "Optional[BaseException]", trace: "Optional[TracebackType]"
    ) -> None:
        self.close()

    def __getstate__(self) -> "Record":
        state = self.__dict__.copy()
        del state["_locks"]
        return state

    def __setstate__(self, state: "Record") -> None:
        self.__dict__.update(state, _locks={})

    def _lock(self) -> "Any":
        # Re-entrant: a __del__ or a signal handler may set something while this thread does. One a process: a forked
        # child must not share a lock that some thread of its parent may have held. setdefault() is atomic.
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def _call(
        self,
        kind: "_Kind",
        xwho: str,
        xwhat: "Optional[str]",
        properties: "Any",
        data_platform: "Optional[str]",
        is_login: bool,
        xwhen: "When",
        original_id: "Optional[str]" = None,
    ) -> None:
        """Every tracking call: arguments, line, collecter; what goes wrong is raised or goes to on_error."""
        line = None
        try:
            settings = self._settings
            when = int(self._clock() * 1000) if xwhen is None else _check("xwhen", xwhen)
            if when < _FIRST_MS or when > _LAST_MS:  # no battery, no NTP yet
                rule = "is not set, it shows no 13 digits: set it, or give xwhen"
                raise _illegal("this machine's clock", when, rule)
            line = _call_line(settings, kind, xwho, xwhat, properties, data_platform, is_login, when, original_id)
            if line is None:
                return
            if settings.debug:
                _log("info", "record %s", line.decode("utf-8").rstrip())
            upload = self._collecter.uploadData
            if getattr(upload, "__func__", None) is _Collecter.uploadData:
                _Collecter._put(upload.__self__, line, kind is _ALIASED)
            else:  # somebody else's, or a method of their own
                upload(_decode(line))
        except Exception as error:
            if not isinstance(error, AnalysysPythonSdkException) and (sys is None or sys.is_finalizing()):
                # A __del__ while modules are torn down: what we need may be gone, and nothing can be imported.
                error = AnalysysPythonSdkException("not tracked: the interpreter is shutting down")
            if self._on_error is None:
                raise error
            _tell(self._on_error, error, line and _decode(line))


########################################################################################################################
# Records: functions of settings and arguments alone. They read no clock and change nothing that they are given.
#
# A record is made as its line at once: what differs from call to call is encoded then, between the pieces of a frame;
# what does not was encoded before. So queues hold bytes: they are the private copy, half as large, and no work for the
# garbage collector. Whoever wants a record as a dict decodes its line.
########################################################################################################################

# A kind of call: xwhat, the name of the id and of the properties argument, and the one rule its values must fall under.
_Kind = collections.namedtuple("_Kind", "xwhat xwho properties only")
_TRACK = _Kind(None, "distinct_id", "event_properties", None)
_ALIASED = _Kind(_ALIAS, "alias_id", "alias_properties", None)
_SET = _Kind("$profile_set", "distinct_id", "profile_properties", None)
_SET_ONCE = _Kind("$profile_set_once", "distinct_id", "profile_properties", None)
_INCREMENT = _Kind("$profile_increment", "distinct_id", "profile_properties", "number")
_APPEND = _Kind("$profile_append", "distinct_id", "profile_properties", "list")
_UNSET = _Kind("$profile_unset", "distinct_id", "profile_properties_keys", None)
_DELETE = _Kind("$profile_delete", "distinct_id", None, None)


class _Settings:
    """What a tracker adds to its records. Never changed, only replaced, so that a call sees one state of it.

    But *frames* are added to it as they are made.
    """

    def __init__(self, app_id: "Optional[str]", debug: int, supers: "Record") -> None:
        self.app_id = app_id
        self.debug = debug
        self.supers = supers
        self.calls = {name: value for name, value in supers.items() if _is_call(value)}
        self.folded = {name.lower(): name for name in supers}
        self.names = frozenset(self.folded)
        self.frames: "Dict[Tuple[Any, ...], Tuple[bytes, bytes, bytes]]" = {}  # by the arguments of _frame()

    def __reduce__(self) -> "Any":
        return _Settings, (self.app_id, self.debug, self.supers)

    def replace(self, **changes: "Any") -> "_Settings":
        return _Settings(**dict({"app_id": self.app_id, "debug": self.debug, "supers": self.supers}, **changes))

    def spelled(self, name: str) -> "Optional[str]":
        """Return how the super property *name* was spelled when it was registered, or None."""
        return self.folded.get(_check("super_properties_key", name).lower())


_NO_NAMES: "FrozenSet[str]" = frozenset()


def _is_call(value: object) -> bool:
    """Tell whether a super property is asked for at each event: a callable that is no value by itself."""
    return callable(value) and _value_rule(value) is _RULES["value"]


def _called_members(settings: "_Settings", names: "FrozenSet[str]") -> bytes:
    """Return what the callable super properties say now, as the members of a JSON object, but for those in *names*."""
    values = {}
    for name, call in settings.calls.items():
        if name.lower() not in names:
            try:
                values[name] = call()
            except Exception as error:
                raise _illegal("super_properties[%s]" % name, call, "must not raise: %s" % _shown(error)) from error
    return _members("super_properties", values)[0]


def _call_line(
    settings: _Settings,
    kind: "_Kind",
    xwho: str,
    xwhat: "Optional[str]",
    properties: "Any",
    data_platform: "Optional[str]",
    is_login: bool,
    xwhen: int,
    original_id: "Optional[str]",
) -> "Optional[bytes]":
    """Return the line of one call's record, or None where there is nothing to send."""
    if settings.app_id is None:
        raise AnalysysPythonSdkIllegalDataException("appid is not set: setAppId() must come before any tracking call")
    who = _id_text(kind.xwho, xwho)
    if kind is _TRACK and type(xwhat) is not str:
        xwhat = _check("event_name", xwhat)
    if type(data_platform) is not str:
        data_platform = _check("data_platform", data_platform)
    if is_login is not True and is_login is not False:
        is_login = _check("is_login", is_login)
    if kind is _UNSET:
        own, names = _unset_members(kind.properties, properties)
    else:
        own, names = _members(kind.properties, properties, kind.only)
    replaced = _NO_NAMES if names.isdisjoint(settings.names) else names & settings.names
    shape = (kind, xwhat, data_platform, is_login, replaced)  # by their exact types, so that equal ones are the same
    head, middle, tail = settings.frames.get(shape) or _frame(settings, *shape)
    if settings.calls and kind is _TRACK:
        own = b",".join(filter(None, (own, _called_members(settings, names))))
    if kind is _ALIASED:
        own += (b"," if own else b"") + b'"$original_id":' + _id_text("distinct_id", original_id)
    elif not own:
        if kind is not _TRACK and kind is not _DELETE:
            return None
        tail = tail[1:]
    return b"".join((head, who, middle, b'%d,"xcontext":{' % xwhen, own, tail))


def _frame(
    settings: _Settings,
    kind: "_Kind",
    xwhat: "Optional[str]",
    data_platform: str,
    is_login: bool,
    replaced: "FrozenSet[str]",
) -> "Tuple[bytes, bytes, bytes]":
    """Return what the records of such calls have in common, and keep it in *settings*.

    It is in three pieces, between which stand id, time and own properties; *replaced* are the super properties, in
    lower case, that the own ones replace.
    """
    supers = settings.supers.items() if kind is _TRACK else ()
    context = {name: value for name, value in supers if name.lower() not in replaced and name not in settings.calls}
    context["$lib"], context["$lib_version"] = _LIB, __version__
    context["$platform"] = _check("data_platform", data_platform)
    context["$is_login"], context["$debug"] = is_login or kind is _ALIASED, settings.debug
    head = '{"appid":%s,"xwho":' % _encode(settings.app_id)
    middle = ',"xwhat":%s,"xwhen":' % _encode(kind.xwhat or _check("event_name", xwhat))
    tail = ",%s}\n" % _encode(context)[1:]
    frame = head.encode("utf-8"), middle.encode("utf-8"), tail.encode("utf-8")
    if (len(settings.frames) + 1) * (sum(map(len, frame)) + _FRAME_OVERHEAD) > _MAX_FRAMES:
        settings.frames.clear()
    settings.frames[kind, xwhat, data_platform, is_login, replaced] = frame
    return frame


########################################################################################################################
# Validation: one table of rules (C4, row by row) and one check
########################################################################################################################


def _text(value: "Any", shortest: int, longest: float) -> str:
    plain = str.__str__(value)  # a subclass gives its characters, whatever it says of itself
    if not shortest <= len(plain) <= longest:
        raise ValueError
    plain.encode()  # lone surrogates are not characters
    return plain


def _id(value: "Any") -> str:
    return _text(value, 1, _MAX_ID)


def _name(value: "Any") -> str:
    plain = _text(value, 1, _MAX_NAME)
    if not re.fullmatch(_NAME, plain):
        raise ValueError
    return plain


def _property_name(value: "Any") -> str:
    plain = _name(value)
    if plain.lower() in _RESERVED:
        raise ValueError
    return plain


@functools.lru_cache(1024)  # the names of an application are few: seen once, a name is not matched again
def _folded_name(plain: str) -> str:
    return _property_name(plain).lower()


@functools.lru_cache(256)  # and come in few sets
def _known_names(names: "Tuple[str, ...]") -> "Tuple[str, FrozenSet[str]]":
    """Check names of one call; return the members of a JSON object with %s for each value, and them in lower case."""
    folded = frozenset(map(_folded_name, names))
    if len(folded) != len(names):
        raise ValueError
    return ",".join(['"%s":%%s' % name for name in names]), folded


def _string(value: "Any") -> str:
    return _text(value, 0, _MAX_STRING)


def _exactly(value: "Any", *allowed: "Any") -> "Any":
    for one in allowed:
        if type(value) is type(one) and value == one:
            return one
    raise ValueError


def _integer(value: int, least: int = -_MAX_INTEGER - 1, most: int = _MAX_INTEGER) -> int:
    plain = int.__int__(value)
    if not least <= plain <= most:
        raise ValueError
    return plain


def _number(value: "Any") -> "Union[int, float]":
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        plain = float.__float__(value)
        if plain - plain != 0:  # NaN and the infinities
            raise ValueError
        return plain
    if _value_rule(value) is not _RULES["number"]:
        raise ValueError
    near = _number(float(value))  # finite, so that int() is cheap
    return _integer(int(value)) if int(value) == value else near


def _items(value: "Any") -> "List[str]":
    plain = list.copy(value) if isinstance(value, list) else [*tuple.__iter__(value)]
    if len(plain) > _MAX_ITEMS:
        raise ValueError
    for item in plain:
        if type(item) is not str or len(item) > _MAX_STRING:
            return list(map(_string, plain))
    return plain


def _list(value: "Any") -> "List[str]":
    return list(map(_string, _items(value)))


def _moment(value: "Any") -> str:
    import datetime

    if value != value:  # pandas' NaT is a datetime
        raise ValueError
    if isinstance(value, datetime.datetime):
        if datetime.datetime.utcoffset(value) is not None:
            value = datetime.datetime.astimezone(value)  # to local time
        return datetime.datetime.isoformat(value, " ", "seconds")[:19]  # without the time zone
    return datetime.date.isoformat(value)


def _platform(value: "Any") -> str:
    plain = _text("" if value is None else value, 0, _MAX_STRING)
    return _PLATFORMS.get(plain.lower(), plain)


def _when(value: "Any") -> int:
    if type(value) is not int:
        import datetime
        import numbers

        if value != value:  # pandas' NaT is a datetime
            raise ValueError
        if isinstance(value, datetime.datetime):
            utc = datetime.datetime.astimezone(value, datetime.timezone.utc)
            epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
            value = datetime.datetime.__sub__(utc, epoch) // datetime.timedelta(milliseconds=1)
        elif isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        value = int(value)
    return _integer(value, _FIRST_MS, _LAST_MS)


def _call(value: "Any") -> "Any":
    import inspect

    if isinstance(value, type):
        raise ValueError
    try:
        signature = inspect.signature(value)
    except ValueError:  # written in C, and it does not say
        return value
    signature.bind()
    return value


def _no_value(value: object) -> None:
    raise ValueError


def _callable_or_none(value: "Any") -> "Any":
    if value is not None and not callable(value):
        raise ValueError
    return value


def _positive(value: "Any") -> float:
    plain = _number(value)
    if plain <= 0:
        raise ValueError
    return plain


def _patience(value: "Any") -> "Optional[float]":
    if value is None:
        return None
    plain = _number(value)
    if plain < 0:
        raise ValueError
    return plain


def _size(value: "Any") -> int:
    if isinstance(value, bool):
        raise ValueError
    return _integer(value, 1)


def _directory(value: "Any") -> str:
    plain = os.fsdecode(value)
    if not plain or b"\0" in os.fsencode(plain):  # which may have no bytes for it
        raise ValueError
    return os.path.abspath(plain)


_EXHAUSTED = (RecursionError, MemoryError)


class _Rule:
    """What a value must be, in the words of the error message, and the function that returns its plain form.

    Where the value breaks the rule, the function raises anything at all: a hostile value's own errors count too. But
    where the stack or the memory runs out (_EXHAUSTED), that says nothing about the value.
    """

    __slots__ = ("text", "plain")

    def __init__(self, text: str, plain: "Callable[[Any], Any]") -> None:
        self.text = text
        self.plain = plain

    def check(self, argument: str, value: "Any") -> "Any":
        """Return the plain form of *value*, or raise what names argument, value and rule."""
        try:
            return self.plain(value)
        except _EXHAUSTED:
            raise
        except Exception:
            raise _illegal(argument, value, self.text) from None


_NAME_TEXT = r"1 to 99 characters that match \$?[A-Za-z][A-Za-z0-9_]*"
_RULES = {
    # arguments of tracking calls
    "appid": _Rule("must be a str of 1 to 255 characters, encodable as UTF-8", lambda v: _text(v, 1, _MAX_APP_ID)),
    "distinct_id": _Rule("must be a str of 1 to 254 characters, encodable as UTF-8", _id),
    "alias_id": _Rule("must be a str of 1 to 254 characters, encodable as UTF-8", _id),
    "event_name": _Rule("must be a str of " + _NAME_TEXT, _name),
    "data_platform": _Rule("must be a str of at most 255 characters, encodable as UTF-8, or None", _platform),
    "is_login": _Rule("must be a bool", lambda v: _exactly(v, True, False)),
    "xwhen": _Rule("must be an integer of 13 digits (Unix milliseconds) or a datetime of 2001 to 2286", _when),
    "debug_mode": _Rule("must be the int 0, 1 or 2", lambda v: _exactly(v, 0, 1, 2)),
    # names and values of properties
    "name": _Rule(
        "must be a str of %s, and none of the reserved %s" % (_NAME_TEXT, " ".join(sorted(_RESERVED))),
        _property_name,
    ),
    "super_properties_key": _Rule("must be a str of " + _NAME_TEXT, _name),
    "str": _Rule("must be a str of at most 255 characters, encodable as UTF-8", _string),
    "bool": _Rule("must be a bool", lambda v: v),
    "number": _Rule("must be a finite number (a bool is none), an integer within 64 bits signed", _number),
    "list": _Rule("must be a list or tuple of at most 100 str of at most 255 characters each", _list),
    "date": _Rule("must be a date, or a datetime that has a local time in the years 1 to 9999", _moment),
    "call": _Rule("must be a value, or a callable without arguments and no class", _call),
    "value": _Rule("must be a str, bool, number, date, datetime, or list of str", _no_value),
    # settings
    "on_error": _Rule("must be callable or None", _callable_or_none),
    "size": _Rule("must be an int of at least 1", _size),
    "seconds": _Rule("must be a number over 0", _positive),
    "log_path": _Rule("must be the path of a directory", _directory),
    "general_rule": _Rule('must be "hour" or "day"', lambda v: _LOG_NAMES[v.lower()]),
    "is_batch": _Rule("must be a bool", lambda v: _exactly(v, True, False)),
    "queue_timeout": _Rule("must be a number of seconds from 0, or None", _patience),
    "timeout": _Rule("must be a number of seconds from 0, or None", lambda v: v if v is None else max(_number(v), 0)),
}
_VALUE_RULES: "Dict[type, _Rule]" = {
    str: _RULES["str"],
    bool: _RULES["bool"],
    int: _RULES["number"],
    float: _RULES["number"],
    list: _RULES["list"],
    tuple: _RULES["list"],
}
_CONTEXT_RULES = {
    "$lib": "data_platform",
    "$lib_version": "data_platform",
    "$platform": "data_platform",
    "$is_login": "is_login",
    "$debug": "debug_mode",
    "$original_id": "distinct_id",
}


def _check(argument: str, value: "Any", rule: "Optional[str]" = None) -> "Any":
    return _RULES[rule or argument].check(argument, value)


def _id_text(argument: str, value: "Any") -> bytes:
    """Check an id and return it as JSON."""
    if type(value) is not str or not 0 < len(value) <= _MAX_ID:
        value = _check(argument, value)
    try:
        return _quote(value).encode()
    except UnicodeEncodeError:
        raise _illegal(argument, value, _RULES[argument].text) from None


def _value_rule(value: object) -> _Rule:
    """Return the rule that a value falls under by its type; a hostile type may have none."""
    try:
        if type(value) in _VALUE_RULES:
            return _VALUE_RULES[type(value)]
        import datetime
        import decimal
        import numbers

        for kinds, rule in (
            (str, "str"),
            ((numbers.Real, decimal.Decimal), "number"),
            ((list, tuple), "list"),
            (datetime.date, "date"),
        ):
            if issubclass(type(value), kinds):
                return _RULES[rule]
    except _EXHAUSTED:
        raise
    except Exception:
        pass
    return _RULES["value"]


def _members(
    argument: str, given: "Any", only: "Optional[str]" = None, most: int = _MAX_PROPERTIES
) -> "Tuple[bytes, FrozenSet[str]]":
    """Check properties; return them as the members of a JSON object, and their names in lower case.

    *only* is the one rule that every value must fall under.
    """
    if given is None:
        return b"", _NO_NAMES
    # A copy in one step: another thread may change it while we look.
    own = given.copy() if type(given) is dict else _plain_dict(argument, given)
    if len(own) > most:
        raise _illegal("the number of " + argument, len(own), "must be at most %d" % most)
    texts = _texts(argument, own)
    if len(texts) < len(own):
        return _members(argument, _plain_dict(argument, own), only, most)
    if only is not None:
        for name, value in own.items():
            if _value_rule(value) is not _RULES[only]:
                raise _illegal("%s[%s]" % (argument, _shown(name)), value, _RULES[only].text)
    try:
        form, names = _known_names(tuple(own))
    except ValueError:
        raise _same_names(argument, [_check("a name in " + argument, name, "name") for name in own]) from None
    try:
        return (form % tuple(texts)).encode(), names
    except UnicodeEncodeError:
        for name, value in own.items():
            _value_rule(value).check("%s[%s]" % (argument, _shown(name)), value)
        raise _illegal(argument, own, _RULES["str"].text) from None  # a list that was mended meanwhile


def _texts(argument: str, own: "Dict[str, Any]") -> "List[str]":
    """Check the values of properties, but for lone surrogates, and return the JSON of each.

    It stops at a name that is no plain str.
    """
    texts: "List[str]" = []
    try:
        for name, value in own.items():  # the usual kinds in line: a call costs as much as all the rest of a check
            if type(name) is not str:
                break
            kind = type(value)
            if kind is str and len(value) <= _MAX_STRING:
                text = _quote(value)
            elif kind is bool:
                text = "true" if value else "false"
            elif kind is int and value.bit_length() < 64:
                text = str(value)
            elif kind is list:
                text = "[" + ",".join(map(_quote, _items(value))) + "]"
            else:
                text = _encode(_value_rule(value).plain(value))
            texts.append(text)
    except _EXHAUSTED:
        raise
    except Exception:
        raise _illegal("%s[%s]" % (argument, _shown(name)), value, _value_rule(value).text) from None
    return texts


def _plain_dict(argument: str, given: "Any") -> "Record":
    """Return properties as a dict with names of plain str: what they hold, not what they or their names say."""
    if not issubclass(type(given), dict):  # whatever it says of its class
        raise _illegal(argument, given, "must be a dict or None")
    items = _steady(lambda: [*dict.items(given)])
    plain = {_check("a name in " + argument, name, "name"): value for name, value in items}
    if len(plain) < len(items):
        raise _same_names(argument, [_check("a name in " + argument, name, "name") for name, _ in items])
    return plain


def _steady(look: "Callable[[], Any]") -> "Any":
    """Return what *look* finds in a dict or deque that another thread may change meanwhile."""
    while True:
        try:
            return look()
        except _EXHAUSTED:  # a RecursionError is a RuntimeError, and would come again for ever
            raise
        except RuntimeError:  # it was changed
            pass


def _unset_members(argument: str, given: "Any") -> "Tuple[bytes, FrozenSet[str]]":
    """Check names of properties; return what unsets them as _members() does."""
    if given is None:
        return b"", _NO_NAMES
    kinds: "Any" = [kind for kind in (list, tuple, set, frozenset) if issubclass(type(given), kind)]
    if not kinds:
        raise _illegal(argument, given, "must be a list, tuple or set of property names")
    items = _steady(lambda: [*kinds[0].__iter__(given)])
    names = {_check("a name in " + argument, name, "name") for name in items}
    return _members(argument, dict.fromkeys(names, ""))


def _same_names(argument: str, names: "List[str]") -> AnalysysPythonSdkIllegalDataException:
    counts = collections.Counter(name.lower() for name in names)
    same = sorted(name for name in names if counts[name.lower()] > 1)
    return _illegal("a name in " + argument, same, "must not differ from another by its case only")


def _check_record(record: "Any") -> None:
    """Check a finished record by the same rules; raise what names the field, the value and the rule."""
    if not isinstance(record, dict):
        raise _illegal("record", record, "must be a JSON object")
    for field in ("appid", "xwho", "xwhat", "xwhen", "xcontext"):
        if field not in record:
            raise _illegal("record", record, "must have the field %s" % field)
    context = record["xcontext"]
    if not isinstance(context, dict):
        raise _illegal("xcontext", context, "must be a JSON object")
    _check("appid", record["appid"])
    _check("xwho", record["xwho"], "distinct_id")
    _check("xwhat", record["xwhat"], "event_name")
    _check("xwhen", record["xwhen"])
    for name, rule in _CONTEXT_RULES.items():
        if name in context:
            _check("xcontext[%r]" % name, context[name], rule)
    if record["xwhat"] == _ALIAS and "$original_id" not in context:
        raise _illegal("xcontext", context, "must have $original_id in an $alias record")
    own = {name: value for name, value in context.items() if name not in _CONTEXT_RULES}
    only = {kind.xwhat: kind.only for kind in (_INCREMENT, _APPEND)}.get(record["xwhat"])
    _members("xcontext", own, only, 2 * _MAX_PROPERTIES)


########################################################################################################################
# Encoding: record -> line, lines -> body, answer -> verdict
########################################################################################################################

# No circular check: a record holds no containers of containers, and any other one meets the recursion limit.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False).encode
# What _encode() does to a str, without looking first whether it is one. Every CPython has it, under this name.
_quote: "Callable[[str], str]" = getattr(json.encoder, "encode_basestring", _encode)


def _no_number(name: str) -> None:
    raise ValueError("%s is no JSON" % name)


def _short_integer(digits: str) -> int:
    if len(digits) > 4300:
        raise ValueError("an integer of %d digits" % len(digits))
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:  # 1e999 is read as infinite, which is no JSON
        raise ValueError("a number beyond all floats")
    return number


# NaN and the infinities are Python's, not JSON's. Where Python does not limit integers, they take quadratic time.
_decoder = json.JSONDecoder(
    parse_constant=_no_number,
    parse_float=_finite,
    parse_int=None if hasattr(sys, "set_int_max_str_digits") else _short_integer,
)

_answer_decoder = json.JSONDecoder(strict=False)  # a server's message may hold a plain tab

_DELIVERED, _REFUSED, _TOO_LARGE, _CHOKED, _RETRY = "delivered", "refused", "too large", "failing", "retry"
_Verdict = collections.namedtuple("_Verdict", "kind reason wait")  # wait: seconds the server asked for, or None
# Headers: with get(NAME), in any case. Payload: bytes; of an answer that we give: a list of bytes, or what yields them.
_Answer = collections.namedtuple("_Answer", "status headers payload")
_SUCCESS = _Verdict(_DELIVERED, "code 200", None)

# Statuses that say nothing about the data, also where the answer's code carries them: C5
_NOT_THE_DATA = frozenset((401, 403, 404, 407, 408, 413, 429))


def _line(record: "Record") -> bytes:
    """Return *record* as one line of JSON, newline included."""
    return (_encode(record) + "\n").encode("utf-8")


def _decode(text: bytes) -> "Any":
    """Return the JSON value in *text*; raise ValueError or RecursionError where there is none."""
    return _decoder.decode(text.decode("utf-8"))


def _array(lines: "List[bytes]", comma: bytes = b",") -> bytes:
    """Return the records in *lines* as a JSON array."""
    return b"[" + comma.join(lines) + b"]"


def _records(lines: "List[bytes]") -> "List[Any]":
    """Return *lines* as records, or as text where they are none."""
    return [line.decode("utf-8", "replace") if _damage(line) else _decode(line) for line in lines]


def _damage(line: bytes, length: int = 0) -> "Optional[str]":
    """Say what is wrong with a line that should hold a record in JSON; None where nothing is.

    *length* is how many bytes it had, where it was cut. What takes many times its size to decode is no record: within
    the limits all but a few kilobytes are text.
    """
    if max(length, len(line)) > _MAX_LINE:
        return "no record, with more than 40 MiB"
    if length > len(line):
        return "not a JSON object"
    if len(line) > _MAX_STRUCTURE and len(re.sub(_QUOTED, b"", line)) > _MAX_STRUCTURE:
        return "no record, with more than 256 KiB that are not text"
    try:
        return None if isinstance(_decode(line), dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        return "not JSON: %s" % error


def _damages(lines: "List[Any]") -> "List[Optional[str]]":
    """Do for each of *lines*, which are `_Line`s, what `_damage` does, in less time where all are sound.

    They are decoded as one array, a mark that no file can know between each two of them: where it holds an object, the
    mark, an object and so on, no line can have ended in another one.
    """
    texts = [line.text for line in lines]
    if sum(line.length for line in lines) == sum(map(len, texts)) <= _MAX_STRUCTURE:  # else some were cut, or are long
        try:
            found = _decode(_array(texts, b',"%s",' % _mark().encode()))
            if found[1::2] == [_mark()] * (len(lines) - 1) and {dict}.issuperset(map(type, found[::2])):
                return [None] * len(lines)
        except (ValueError, RecursionError):
            pass
    return [_damage(line.text, line.length) for line in lines]


@functools.lru_cache(None)  # one a process
def _mark() -> str:
    return binascii.hexlify(os.urandom(8)).decode()


def _zlib() -> "Any":
    """Return the module `zlib`; None in a small build of Python, whose bodies go out as plain JSON."""
    try:
        import zlib

        return zlib
    except ImportError:
        return None


def _pack(text: bytes) -> bytes:
    """Return the body that carries *text*: base64(gzip(text)), or plain where Python has no zlib."""
    zlib = _zlib()
    if zlib is None:
        return text
    packer = zlib.compressobj(_GZIP_LEVEL if len(text) > _ONE_PACKET else 0, zlib.DEFLATED, _GZIP)
    return binascii.b2a_base64(packer.compress(text) + packer.flush(), newline=False)


def _unpack(body: bytes, most: int) -> bytes:
    """Undo `_pack`; raise ValueError where *body* is not of that form or has more than *most* bytes inside."""
    return _inflate(binascii.a2b_base64(body), most, _GZIP)


def _inflate(data: bytes, most: int, form: int) -> bytes:
    """Decompress *data* of the *form* with that number in zlib; raise ValueError as `_unpack` does."""
    zlib = _zlib()
    if zlib is None:
        raise ValueError("this Python has no zlib")
    unpacker = zlib.decompressobj(form)
    try:
        text = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(text) > most or not unpacker.eof:
        raise ValueError("cut short, or more than %d bytes" % most)
    return bytes(text)


# What servers mean by a Content-Encoding, as zlib's numbers: with "deflate" they mean two things.
_CONTENT_ENCODINGS = {"gzip": (_GZIP,), "x-gzip": (_GZIP,), "deflate": (15, -15)}


def _answer_text(answer: "_Answer") -> bytes:
    """Return the body of an answer without its Content-Encoding, where it has one and keeps it."""
    for form in _CONTENT_ENCODINGS.get((answer.headers.get("Content-Encoding") or "").strip().lower(), ()):
        try:
            return _inflate(answer.payload, _MAX_ANSWER, form)
        except ValueError:
            continue
    return bytes(answer.payload)


def _parse(text: bytes) -> "Any":
    """Return the JSON value in an answer, plain or packed; None where there is none."""
    for unpack in (bytes, lambda packed: _unpack(packed, _MAX_ANSWER)):
        try:
            return _answer_decoder.decode(unpack(text).decode("utf-8").lstrip("\ufeff"))
        except (ValueError, RecursionError):
            continue
    return None


def _judge(answer: "_Answer") -> "_Verdict":
    """Say what an answer means for the batch that was sent: C5."""
    text = _answer_text(answer)
    told = _parse(text)
    is_object = isinstance(told, dict)
    code = told.get("code") if is_object else None
    if type(code) is not int:  # true is none, though Python takes it for 1
        code = None
    if code == 200 and 200 <= answer.status <= 299:
        return _SUCCESS
    shown = " ".join(text.decode("utf-8", "replace").split()) if told is None else json.dumps(told, ensure_ascii=False)
    what = "HTTP %d, %s" % (answer.status, _printable(shown) or "an empty answer")
    reason = _with_hint(what, _answer_hint(answer, text, code))
    return _Verdict(_kind(answer.status, code, is_object), reason, _seconds(answer.headers.get("Retry-After")))


def _kind(status: int, code: "Optional[int]", is_object: bool) -> str:
    # The code first: a gateway may answer 200 with a code that says 413. A refusal wants the platform's own word, an
    # object: a 400 with a page is some proxy's.
    if code in _NOT_THE_DATA:
        return _TOO_LARGE if code == 413 else _RETRY
    if status == 413:
        return _TOO_LARGE
    if code is not None and 400 <= code <= 499 or status in (400, 422) and is_object:
        return _REFUSED
    return _CHOKED if 500 <= status <= 599 or code is not None and 500 <= code <= 599 else _RETRY


def _failure(error: Exception, is_tls: bool = False) -> "_Verdict":
    """Say what it means for the batch that `_Transport.post` raised *error*.

    A peer that hangs up after it had the whole body, and before it says a word, may do so because of the data.
    """
    stage = getattr(error, "stage", _CONNECTING)
    what = "%s: %s" % (type(error).__name__, _printable(error))
    if not _is_gone(error):
        return _Verdict(_RETRY, _with_hint(what, _hint(what, stage)), None)
    kind = _CHOKED if stage == _SENT else _RETRY
    return _Verdict(kind, _with_hint(what, _search_hint(what) or _gone_hint(stage, is_tls)), None)


# Hints: what to try, for the mistakes that users make


def _with_hint(what: str, hint: "Optional[str]") -> str:
    return "%s (%s)" % (what, hint) if hint else what


_TWICE = "the server may have the data, and it may come twice"
_PAGE = "that is an HTML page: is this the receiving address?"
_STATUS_HINTS = {
    401: "does it want credentials, as headers=?",
    403: "does it want credentials, as headers=?",
    404: "is the path right? /up is appended unless the path ends in it",
    405: "is the path right? it takes no POST",
    407: "the proxy wants credentials: http://user:password@host:port in its environment variable",
}


def _answer_hint(answer: "_Answer", text: bytes, code: "Optional[int]") -> "Optional[str]":
    status, is_page = answer.status, text.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"<"
    if 300 <= status <= 399:
        place = re.sub(r"//[^/?#]*@", "//", answer.headers.get("Location") or "")
        return "a redirect%s is not followed: give the address that receives" % (place and " to " + _printable(place))
    if status == 400 and re.search(rb"(?i)\bhttps\b", text):
        return "does that port speak https?"
    hints = [_STATUS_HINTS.get(status, ""), _PAGE if is_page and status != 407 else ""]
    if 200 <= status <= 299 and code is None:
        hints.insert(0, "not understood: " + _TWICE)
    return "; ".join(filter(None, hints))


# Searched for in an error's type and text, in any case; first come first served.
_HINTS = (
    ("hostname|address mismatch|doesn't match", "the certificate is for another host: is the address right?"),
    ("has expired|not yet valid", "the certificate is out of date, or this machine's clock is wrong"),
    (
        "certificate purpose|not marked critical|key usage|key identifier|too weak|too small",
        "the certificate, or its CA's, breaks a rule of TLS: have it made anew, for servers",
    ),
    ("certificate.required|handshake.failure", "does it want a client's certificate? ssl_context= can have one"),
    ("certificate.verify", "for a private CA: ssl_context=ssl.create_default_context(cafile=FILE), or --ca FILE"),
    ("wrong.version|unknown.protocol|http.request|record.layer|too.long]", "does that port speak plain http?"),
    (r"BadStatusLine: .*\\x1[56]\\x03", "does that port speak https?"),
    ("BadStatusLine: [^H]", "that is no HTTP: is the port right?"),  # else an answer that was cut: HTT
    ("gaierror|UnicodeError|'idna'", "is the host's name right, and can this machine look up names?"),
    ("ConnectionRefused", "nobody listens there: is the server up, and the port right?"),
    ("Tunnel.* 407", _STATUS_HINTS[407]),
    ("Tunnel", "the proxy refused: is the address right? no_proxy=HOST goes around the proxy"),
    ("unreachable", "is this machine connected, and the address right?"),
)


def _search_hint(what: str) -> "Optional[str]":
    return next((hint for pattern, hint in _HINTS if re.search(pattern, what, re.I)), None)


def _hint(what: str, stage: int) -> "Optional[str]":
    is_late = re.search("time", what)
    if stage >= _SENT:  # where TLS 1.3 tells of the handshake's last step, too
        found = _search_hint(what) if stage == _ANSWERED or "certificate required" in what else None
        return found or "no whole answer%s: %s" % (" within request_timeout" if is_late else "", _TWICE)
    if is_late:
        return "nobody answers there: is the address right, does a firewall drop it, is request_timeout too short?"
    return _search_hint(what)


def _gone_hint(stage: int, is_tls: bool) -> str:
    if stage == _ANSWERED:
        return "no whole answer: " + _TWICE
    if is_tls:
        return "it hung up at once: does that port speak plain http?" if stage == _CONNECTING else "the server hung up"
    return "the server hung up: does that port speak https?"


def _seconds(retry_after: "Optional[str]") -> "Optional[float]":
    """Return the seconds that a Retry-After header asks for, within its limit; None where it asks for nothing."""
    if retry_after is None:
        return None
    import email.utils

    try:
        if retry_after.strip().isdigit():
            seconds = float(retry_after)
        else:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(seconds, _MAX_RETRY_AFTER) if seconds > 0 else None


########################################################################################################################
# Transport: one POST over a kept-alive connection, bounded in time and in bytes
#
# A _Transport posts through urllib's handler of proxies to its _Connections, which own the connections. These are
# http.client's, with three steps of ours, since it bounds each step of a request and nobody the whole: _dial connects,
# _send_in_time sends, an _Answering reads, all until the connection's *deadline*. Its *stage* says how far a request
# came: the error that ends it carries that along, and with it whether the server may have the data.
#
# Any number of threads post at once. They share the idle connections, which each takes out for itself, and no lock. But
# the C libraries below have locks, which a fork copies as they are: see _ForkGuard.
########################################################################################################################


def _url(server_url: "Any") -> str:
    """Return the address to post to, or raise what is wrong with *server_url*."""
    import urllib.parse

    rule = "must be http(s)://host[:port][/path] in ASCII"
    if not isinstance(server_url, str):
        raise _illegal("server_url", server_url, rule)
    shown = re.sub(r"//.*@", "//...@", server_url)  # credentials: not for a message
    try:
        server_url.encode("ascii")
        parts = urllib.parse.urlsplit(server_url)
        host = parts.hostname
    except ValueError:
        raise _illegal("server_url", shown, rule) from None
    odd = re.search(r"[\x00-\x20\x7f?#@]", server_url)
    if parts.scheme not in ("http", "https") or not host or odd:
        raise _illegal("server_url", shown, rule)
    port = re.fullmatch(r"(?:[^\[\]:]+|\[[^\[\]]*\])(?::0*([1-9][0-9]{0,4}))?", parts.netloc)
    if not port or int(port.group(1) or 1) > 65535:
        raise _illegal("server_url", shown, rule + " with a port from 1 to 65535")
    path = parts.path.rstrip("/")
    return "%s://%s%s" % (parts.scheme, parts.netloc, path if path.endswith("/up") else path + "/up")


def _http_headers(headers: "Any") -> "Dict[str, str]":
    """Return the headers of every request, the caller's own *headers* included. No message shows a value: a secret."""
    own = {
        "Content-Type": "application/json",
        "User-Agent": "analysys-%s/%s" % (_LIB, __version__),
    }
    try:
        given = dict(headers or {})
    except (TypeError, ValueError):
        raise _illegal("headers", type(headers), "must be a dict of names and values") from None
    for name, value in given.items():
        if not isinstance(name, str) or not re.fullmatch(_HEADER_NAME, name):
            name = name.partition(":")[0] if isinstance(name, str) else type(name)
            raise _illegal("headers", name, "must have names of printable ASCII without spaces and colons")
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            what = "headers[%s] holds what no header may, such as a newline at its end" % _shown(name)
            raise AnalysysPythonSdkIllegalDataException(what + ": it must be a str of printable ASCII")
        own[name] = value
    return own


# How far a request came. It decides whether it may be sent again unnoticed, and what its failure means.
_CONNECTING, _SENDING, _SENT, _ANSWERED = range(4)


class _Transport:
    """Posts bodies to one address through an `urllib.request` opener of its own; changes nothing for the process.

    Whatever the sending thread will need is imported here, in the caller's thread: a module that one thread imports
    while another forks is locked for ever in the child.
    """

    def __init__(self, url: str, ssl_context: "Optional[ssl.SSLContext]", headers: "Dict[str, str]") -> None:
        import email.utils  # noqa: F401
        import encodings.idna  # noqa: F401
        import http.client  # noqa: F401
        import logging  # noqa: F401
        import select  # noqa: F401
        import socket  # noqa: F401
        import urllib.request

        _zlib()
        if hasattr(os, "fork") and _threads_run():
            _ready_resolver()
        self._url = url
        self._headers = headers
        self._where = urllib.request.Request(url)
        # The one for this scheme alone: a request to a proxy that speaks TLS must not go through that of https as well.
        proxies = {} if _is_loopback(self._where.host) else urllib.request.getproxies()
        self._proxies = {scheme: proxy for scheme, proxy in proxies.items() if scheme == self._where.type}
        is_tls = "https" in (self._where.type, self._proxy_scheme())  # a proxy's is shaken hands with as a server's
        self._pool = _Connections(ssl_context or (_verified() if is_tls else None))
        handler = urllib.request.BaseHandler()
        for scheme in ("http", "https"):
            setattr(handler, scheme + "_open", self._pool.open)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler(self._proxies))
        self._opener.add_handler(handler)

    def ask(self, body: bytes, timeout: float) -> "_Verdict":
        """Post *body* and say what became of it, in words that name the address; raise no error."""
        try:
            verdict = _judge(self.post(body, timeout))
        except Exception as error:
            verdict = _failure(error, self._url.startswith("https:"))
        if verdict is _SUCCESS:
            return verdict
        return verdict._replace(reason="%s: %s" % (self.where(), verdict.reason))

    def post(self, body: bytes, timeout: float, method: str = "POST") -> "_Answer":
        """Return the answer to *body*, whatever it says; raise OSError or HTTPException where there is none."""
        import http.client
        import urllib.request

        request = urllib.request.Request(self._url, body, self._headers, method=method)
        try:
            return self._opener.open(request, timeout=timeout)  # type: ignore[no-any-return]
        except (ValueError, http.client.InvalidURL) as error:
            is_certificate = type(error).__name__ == "CertificateError"  # what Python 3.6 has for another host's
            if isinstance(error, OSError) or is_certificate or not self.proxy():  # OSError: later ones' is both
                raise
        # Without the address itself, and that error's words: where it is not understood, credentials are not either.
        raise OSError("what the environment has as proxy for %s is no http://host:port" % self._where.type)

    def where(self) -> str:
        """Return the address posted to and the proxy on the way to it, for messages, without credentials."""
        proxy = self.proxy()
        scheme = self._proxy_scheme()
        is_other = re.match("socks", scheme) or scheme == self._where.type == "https"  # CONNECT goes over plain HTTP
        other = proxy and is_other and ", to which we speak HTTP and not %s" % _printable(scheme)
        return _printable(self._url) + (proxy and " through the proxy " + _printable(proxy)) + (other or "")

    def proxy(self) -> str:
        """Return host and port of the proxy, without credentials; "" where there is none."""
        import urllib.request

        proxy = self._proxies.get(self._where.type, "")
        if not proxy or urllib.request.proxy_bypass(self._where.host):
            return ""
        return re.sub(r"^.*://|/*$", "", proxy.rpartition("@")[2])

    def _proxy_scheme(self) -> str:
        return self._proxies.get(self._where.type, "").partition("://")[0].lower()

    def sweep(self) -> "Optional[float]":
        """Close idle connections that are old or dead; return after how many seconds to do so again, if ever.

        Each request does it too, at most once a second. Who has a thread that waits calls it there; who has none
        leaves it to the next call.
        """
        return self._pool.sweep()

    def close(self) -> None:
        """Close idle connections; those in use close when their answer is there."""
        self._pool.close()

    def disown(self) -> None:
        """Let go, in a forked child, of the parent's connections."""
        self._pool.disown()


class _ForkGuard:
    """Keeps forks and the C libraries' locks apart, which no fork resets: the child would wait for one for ever.

    OpenSSL has such locks in a handshake (above all in a process's first, which finds its algorithms), glibc in the
    lookup of a name. A fork waits for those that are inside, by the ends of their time at the latest: who takes longer
    waits for the network, and holds no lock. Who comes while a fork is under way waits for it. There is no lock here
    that could be left behind; each step is atomic, and each side says what it is about to do before it looks at the
    other. Of a fork that Python is not told of, or before 3.7, nothing is known.
    """

    def __init__(self) -> None:
        self._inside: "Dict[int, float]" = {}  # thread -> until when a fork waits for it
        self._forking: "Set[int]" = set()  # threads

    def hold_off(self, seconds: float, call: "Callable[..., Any]", *arguments: "Any", **named: "Any") -> "Any":
        """Return what *call* returns; a fork waits for it, for so many *seconds* at most."""
        me = threading.get_ident()
        outer = self._inside.get(me)  # a signal handler may call in the middle
        patience = _CLOCK.now() + seconds
        try:
            self._inside[me] = patience
            while self._forking - {me} and _CLOCK.now() < patience:
                self._inside[me] = 0.0  # lest each waits for the other
                time.sleep(0.001)
                self._inside[me] = _CLOCK.now() + seconds  # before it looks again: now the fork waits, or it does
            return call(*arguments, **named)
        finally:
            self._inside.pop(me, None)
            if outer is not None:
                self._inside[me] = outer

    def before(self) -> None:
        me = threading.get_ident()
        self._forking.add(me)
        while any(until > _CLOCK.now() for thread, until in self._inside.copy().items() if thread != me):
            time.sleep(0.001)

    def after_in_parent(self) -> None:
        self._forking.discard(threading.get_ident())

    def after_in_child(self) -> None:
        me = threading.get_ident()
        self._forking.clear()
        self._inside = {me: self._inside[me]} if me in self._inside else {}


_FORK_GUARD = _ForkGuard()


@functools.lru_cache(None)  # once, in this process or in one that forked it
def _ready_resolver() -> None:
    """Have the C library read the files of its resolver, once, before a thread of ours looks a name up.

    glibc reads them in the first lookup, under locks that a fork leaves as they are: a child forked meanwhile would
    wait in its first lookup for ever. "a..b" is no name: all is made ready for it, and no server is asked. This thread
    does not do it itself, since whoever forked this process may have left it such a lock.
    """
    try:
        thread = threading.Thread(target=_look_up_no_name, daemon=True)
        thread.start()
        thread.join(1)
    except (RuntimeError, MemoryError):  # no more threads, or the interpreter is ending
        pass


def _look_up_no_name() -> None:
    from _socket import getaddrinfo  # C's, whatever gevent has made of the socket module's

    try:
        _FORK_GUARD.hold_off(1.0, getaddrinfo, b"a..b", 0)
    except OSError:
        pass


def _is_loopback(place: str) -> bool:
    """Tell whether *place*, a host with or without a port, is this machine, in any spelling."""
    import socket
    import urllib.parse

    host = (urllib.parse.urlsplit("//" + place).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        if ":" in host:
            packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
            return packed == b"\0" * 15 + b"\1" or packed[:13] == b"\0" * 10 + b"\xff\xff\x7f"
        return socket.inet_aton(host)[0] == 127
    except (OSError, AttributeError):  # it is a name
        return False


def _verified() -> "ssl.SSLContext":
    try:
        import ssl
    except ImportError:
        raise AnalysysPythonSdkException("https needs the ssl module, which this Python is built without") from None
    return _FORK_GUARD.hold_off(1.0, ssl.create_default_context)  # type: ignore[no-any-return]


# C's: gevent's os.close() puts it off while greenlets wait for the descriptor, and those are in a forked child, too.
_close_now = getattr(sys.modules.get("posix"), "close", os.close)


def _inode_at(fd: int) -> "Optional[Tuple[int, int]]":
    """Return what tells an open file from any other; None where it is closed, or no file (a socket of Windows)."""
    try:
        return _inode(os.fstat(fd))
    except OSError:
        return None


def _close_kept(fd: int, made: "Optional[Tuple[int, int]]") -> None:
    """Close a descriptor that was kept, if it is still the one that was *made*.

    A process that becomes a daemon, or a child of a fork that Python was not told of, may have closed them all and
    opened others since.
    """
    if made is not None and _inode_at(fd) == made:
        _close_now(fd)


class _Connections:
    """Opens urllib requests over connections that are kept alive, each used by one thread at a time.

    There is no lock: a connection is in `_idle` or in the hands of one thread, which popped it there. What is idle is
    closed when it is old or has something to read, since then the server hung up: looked for by each call, at most once
    a second, by `sweep`, and when one is about to be used again.
    """

    check_hostname = True  # as an SSLContext has it: Python 3.6's connections ask, and would check once more

    def __init__(self, ssl_context: "Optional[ssl.SSLContext]") -> None:
        self._ssl_context = ssl_context
        # (where to, connection, since when); its steps are atomic
        self._idle: "Deque[Tuple[Any, Any, float]]" = collections.deque()
        self._all: "set[Any]" = set()  # idle or in use; its steps are atomic
        self._next_sweep = 0.0
        self._closed = False

    def open(self, request: "Any") -> "_Answer":
        """Send *request* and return the answer. A connection that died while it was idle is replaced unnoticed."""
        deadline = _CLOCK.now() + request.timeout
        tunnel = getattr(request, "_tunnel_host", None)  # set by ProxyHandler, which has no public name for it
        # What is meant for the proxy goes to the proxy only.
        credentials = request.headers.pop("Proxy-authorization", None) if tunnel else None
        where = (request.type, request.host, tunnel)
        if _CLOCK.now() >= self._next_sweep:
            self.sweep()
        connection = self._take_idle(where)
        if connection is not None:
            try:
                return self._ask(where, connection, request, deadline)
            except Exception as error:  # a peer that went away without a word of an answer: it went before we came
                if connection.stage == _ANSWERED or not _is_gone(error):
                    raise
        return self._ask(where, self._connect(request, tunnel, credentials), request, deadline)

    def wrap_socket(self, sock: "Any", server_hostname: str) -> "Any":
        """Shake hands: a connection asks for it as if this were its SSLContext."""
        context: "Any" = self._ssl_context
        return _FORK_GUARD.hold_off(1.0, context.wrap_socket, sock, server_hostname=server_hostname)

    def sweep(self) -> "Optional[float]":
        """Close idle connections that are old or dead; return how long the others last, in seconds, or None."""
        now = oldest = _CLOCK.now()
        self._next_sweep = now + 1
        for kept in _steady(lambda: list(self._idle)):  # each stays there while it is looked at: a call may want it
            if self._is_usable(kept):
                oldest = min(oldest, kept[2])
                continue
            try:
                self._idle.remove(kept)
            except ValueError:  # it is in use again; and has another time when it comes back
                continue
            self._drop(kept[1])
        if self._closed:
            self.close()
        return max(0.0, oldest + _MAX_IDLE - now) if self._all else None

    def close(self) -> None:
        """Close idle connections, and from now on each one as soon as it is idle."""
        self._closed = True
        self._take_idle(None)  # none is for nowhere: all are closed

    def disown(self) -> None:
        """Close, in a forked child, the descriptors of its parent's connections, those in use included.

        By their numbers, since a socket may be half way into its TLS wrapper; where an object holds the number, it lets
        go of it first, or it would close somebody else's descriptor later.
        """
        for connection in list(self._all):
            try:
                connection.sock.detach()
            except (OSError, AttributeError):  # it is being opened
                pass
            _close_kept(*connection.descriptor)
        self._all.clear()
        self._idle.clear()

    def _ask(self, where: "Any", connection: "Any", request: "Any", deadline: float) -> "_Answer":
        connection.deadline, connection.stage = deadline, _CONNECTING
        keep = False
        try:
            if connection.sock is None:
                connection.connect()
            connection.stage = _SENDING
            headers = dict(request.headers, **request.unredirected_hdrs)
            headers["Content-Length"] = str(len(request.data))
            cut: "Optional[OSError]" = None
            try:
                connection.body = request.data  # http.client would send it apart: two packets, and two wake-ups
                connection.request(request.get_method(), request.selector, None, headers)
                connection.stage = _SENT
            except OSError as error:  # a server may refuse a large body and hang up: look for its answer
                if not _is_gone(error):
                    raise
                cut = error
            response = connection.getresponse()
            if cut is not None and response.status < 400:  # but half a body was accepted by nobody
                raise cut
            payload = response.read(_MAX_ANSWER + 1)
            # Only what was read to its end: the rest of this answer would be taken for the next one.
            keep = cut is None and not response.will_close and response.isclosed()
            return _Answer(response.status, response.headers, payload[:_MAX_ANSWER])
        except Exception as error:
            error.stage = connection.stage  # type: ignore[attr-defined]
            raise
        finally:
            cut = None  # it holds this frame, and the response with it
            if keep and not self._closed:
                self._idle.append((where, connection, _CLOCK.now()))
            else:
                self._drop(connection)

    def _take_idle(self, where: "Any") -> "Any":
        while True:
            try:
                kept = self._idle.pop()  # the one that was used last: the others grow old and are closed
            except IndexError:
                return None
            if kept[0] == where and self._is_usable(kept):
                return kept[1]
            self._drop(kept[1])

    def _is_usable(self, kept: "Tuple[Any, Any, float]") -> bool:
        return _CLOCK.now() < kept[2] + _MAX_IDLE and _has_its_own(kept[1]) and _is_quiet(kept[1].sock)

    def _drop(self, connection: "Any") -> None:
        self._all.discard(connection)  # first: a child that is forked in between must not close this number
        if connection.sock is not None and not _has_its_own(connection):
            connection.sock.detach()
        connection.close()

    def _connect(self, request: "Any", tunnel: "Optional[str]", credentials: "Optional[str]") -> "Any":
        import http.client

        connection: "Any"
        if request.type == "https":
            connection = http.client.HTTPSConnection(request.host, context=self._ssl_context)
            connection._context = self  # which it asks for a wrapped socket
        else:
            connection = http.client.HTTPConnection(request.host)
        if tunnel:
            connection.set_tunnel(tunnel, headers={"Proxy-Authorization": credentials} if credentials else {})
        connection.descriptor, connection.body = (-1, None), b""
        connection.response_class = functools.partial(_response, connection)
        connection._create_connection = functools.partial(_dial, connection)
        connection.send = functools.partial(_send_in_time, connection)
        self._all.add(connection)
        return connection


def _left(deadline: float) -> float:
    """Return the seconds left, or raise the time-out that is due."""
    left = deadline - _CLOCK.now()
    if left <= 0:
        import socket

        raise socket.timeout("no complete answer within request_timeout")
    return min(left, _LONGEST_WAIT)  # sockets refuse more than some platform's limit


def _is_gone(error: Exception) -> bool:
    """Tell whether *error* says that the peer closed or reset the connection.

    Over TLS that has other types, which have changed from Python to Python: closed with and without a goodbye, before,
    while and after something was read. Old ones know new OpenSSLs' reasons by their text alone, or say just OSError(0).
    """
    if isinstance(error, ConnectionError):  # http.client's RemoteDisconnected is one
        return True
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(error, ssl.SSLError):
        kinds = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
        return isinstance(error, kinds) or bool(re.search(r"(?i)\beof\b|is.shutdown", str(error)))
    return isinstance(error, OSError) and error.errno in (0, errno.ENOTCONN)


def _has_its_own(connection: "Any") -> bool:
    """Tell whether a connection's descriptor is still its: somebody may have closed it, and another has that number."""
    fd, made = connection.descriptor
    return bool(_inode_at(fd) == made)


def _is_quiet(sock: "Any") -> bool:
    """Tell whether an idle connection is still there: one that has something to read was closed by the server, or holds
    what nobody asked for, which over TLS may have been read from the system already."""
    import select

    patcher: "Any" = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("select"):  # its own yields, to who may read from this socket
        select = patcher.original("select")
    try:
        if getattr(sock, "pending", int)():
            return False
        if not hasattr(select, "poll"):  # Windows; elsewhere select() refuses descriptors over 1023
            return not select.select([sock], [], [], 0)[0]
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return not poll.poll(0)
    except (OSError, ValueError, TypeError):  # it is closed
        return False


def _dial(connection: "Any", address: "Tuple[str, int]", *_: "Any") -> "Any":
    """Connect to the first of the host's addresses that answers; each has its share of the time that is left."""
    import socket

    problem: "Optional[OSError]" = None
    addresses = _FORK_GUARD.hold_off(0.1, socket.getaddrinfo, address[0], address[1], 0, socket.SOCK_STREAM)
    for position, (family, kind, protocol, _name, place) in enumerate(addresses):
        sock = None
        try:
            share = _left(connection.deadline) / (len(addresses) - position)
            sock = socket.socket(family, kind, protocol)
            connection.descriptor = sock.fileno(), _inode_at(sock.fileno())
            sock.settimeout(share)
            sock.connect(place)
            sock.settimeout(_left(connection.deadline))
            return sock
        except OSError as error:
            problem = problem or error
            connection.descriptor = (-1, None)
            if sock is not None:
                sock.close()
    try:
        raise problem or OSError("no address for %s" % address[0])
    finally:
        problem = None  # it holds this frame, and with it all that called


def _send_in_time(connection: "Any", data: bytes) -> None:
    """Send *data*, a request's head, and its body, to a peer that reads slowly too, within the connection's deadline.

    sendall() over TLS has none for the whole.
    """
    view, connection.body = memoryview(data + connection.body), b""
    for start in range(0, len(view), _TLS_RECORD):
        connection.sock.settimeout(_left(connection.deadline))
        connection.sock.sendall(view[start : start + _TLS_RECORD])


def _response(connection: "Any", sock: "Any", *arguments: "Any", **named: "Any") -> "http.client.HTTPResponse":
    """Make the response that http.client would, but let it read through an `_Answering` file, and past any 1xx."""
    response: "http.client.HTTPResponse" = _response_class()(_Answering(connection, sock), *arguments, **named)
    return response


@functools.lru_cache(maxsize=None)
def _response_class() -> "Any":
    """Return http.client's class of responses, but for 1xx: that one passes over 100 only, not over 103 Early Hints."""
    import http.client

    class Response(http.client.HTTPResponse):
        def _read_status(self) -> "Tuple[str, int, str]":
            while True:
                found: "Tuple[str, int, str]" = super()._read_status()  # type: ignore[misc]
                if found[1] // 100 != 1 or found[1] == 101:
                    return found
                while self.fp.readline(_MAX_HEADERS).strip():
                    pass
                self.fp.raw.allow_more()  # type: ignore[attr-defined]

    return Response


class _Answering(io.RawIOBase):
    """What a response reads from: one deadline over all reads, and a limit to their bytes."""

    _raw: "Any" = io.BytesIO()  # until there is one: an exception of a signal handler may come first

    def __init__(self, connection: "Any", sock: "Any") -> None:
        self._connection = connection
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self.allow_more()

    def allow_more(self) -> None:
        """Begin the limit anew: of answers before the answer there may be any number, in the time that there is."""
        self._budget = _MAX_HEADERS + _MAX_ANSWER

    def makefile(self, mode: str) -> "io.BufferedReader":
        return io.BufferedReader(self, _READ_AT_ONCE)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Any") -> int:
        self._sock.settimeout(_left(self._connection.deadline))
        size = self._raw.readinto(buffer)
        if size:
            if self._connection.stage != _CONNECTING:  # else it is a proxy's word
                self._connection.stage = _ANSWERED
            self._budget -= size
            if self._budget < 0:
                raise OSError("the answer's headers are too long")
        return size or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


########################################################################################################################
# Queues: what is accepted and not yet settled, in memory or on disk
########################################################################################################################

# What the sender and the states ask of a queue. A *line* is the JSON of one record as bytes, newline included. An
# *item* is a line in flight as the queue knows it: a tuple whose first member is the line.
#
# A queue is used by any number of threads that put(), and by one at a time, the sender, that takes and settles.
# Records are counted as accepted by put() and as settled by settle(), in the ledger that queue and sender share.

if TYPE_CHECKING:
    from typing import Protocol  # novm: type checkers only

    Item = Tuple[Any, ...]

    class _Queue(Protocol):
        """What is accepted and not yet settled, in the order in which it came."""

        @property
        def ledger(self) -> "_Ledger":
            """The counts of what went through, and the refusals that are not yet reported."""

        def put(self, line: bytes) -> int:
            """Accept *line* and return how many lines wait that are not in flight; 0 where there is no room.

            Where it raises, the line is not accepted.
            """

        def take_back(self, line: bytes) -> bool:
            """Undo put(), as if *line* had never come; False where it is too late: it will be settled."""

        def take(self, most: int) -> "List[Item]":
            """Move up to *most* more lines in flight, in order, and return them; none where none waits.

            What is in flight already stays so until it is settled. Damaged lines are set aside: rejected, reported.
            """

        def settle(self, items: "List[Item]", error: "Optional[AnalysysPythonSdkException]" = None) -> None:
            """Let go of *items*, any that are in flight: delivered, or refused with *error*. Void after close()."""

        def due_at(self) -> float:
            """Return when take() is to be called next (`_CLOCK`): a moment that is over for now, infinity for never."""

        def mark(self) -> "Tuple[int, int]":
            """Return how many lines were accepted, and how many of these, from the oldest on, are settled.

            Takes no lock: it may be called by a signal handler.
            """

        def close(self) -> "List[bytes]":
            """Take no more part; return the lines that are given up, counted as rejected: none from a disk.

            Again: goes on where it was interrupted, and returns them all once more.
            """

        def disown(self) -> None:
            """Let go, in a forked child, of the parent's descriptors."""

        is_durable: bool  # whether what is not delivered at the end stays for the next process


class _Ledger:
    """Counts that balance at any moment, accepted (+ adopted) = delivered + rejected + pending, and what is to be told.

    A __del__ or a signal handler that tracks may run anywhere, also inside these methods: a change is appended whole,
    in one step, and who reads adds up what is there. What put() took in, the queue counts itself (*held*): a record is
    accepted by the one step that puts it there.
    """

    def __init__(self, *more: str, held: "Callable[[], Dict[str, int]]" = dict) -> None:
        # Guards what a queue moves between its parts. Never held while anything waits or sends. Re-entrant, for a
        # __del__ or a signal handler that closes what it interrupts.
        self.lock = threading.RLock()
        self.refusals: "Deque[AnalysysPythonSdkException]" = collections.deque()  # settled; who sends tells and pops
        names = ("accepted", "delivered", "rejected", "pending", "requests", "retries") + more
        self._changes: "List[Dict[str, int]]" = [dict.fromkeys(names, 0)]  # the first is the sum of all before
        self._held = held
        self._shortening = threading.Lock()  # held by who shortens _changes; nobody waits for it

    def add(self, change: "Dict[str, int]") -> None:
        """Add *change*, which nobody changes afterwards."""
        self._changes.append(change)
        if len(self._changes) > 256 and self._shortening.acquire(False):
            try:  # who reads sees the list before or after this one step, with the same sum; others append behind
                seen = self._changes[:]
                self._changes[: len(seen)] = [_sum(seen)]
            finally:
                self._shortening.release()

    def settle(self, number: int, error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        """Count *number* records as delivered, or as rejected with *error*."""
        if error is not None:
            self.refusals.append(error)  # first: who sees it settled must see that it is to be told
        self.add(_outcome(number, "rejected" if error else "delivered"))

    def stats(self) -> "Dict[str, int]":
        while True:
            changes, held = self._changes[:], self._held()
            # A move ends with its change: where none has come, nothing was on its way. Nothing is made under the lock:
            # the garbage collector could come in there, with a __del__ that waits for who wants it.
            with self.lock:
                if changes[-1] is self._changes[-1]:  # where a queue holds nothing, any moment will do
                    return _sum(changes + [held])


_ACCEPTED = {"accepted": 1, "pending": 1}


def _outcome(number: int, outcome: str) -> "Dict[str, int]":
    return {"pending": -number, outcome: number}


def _held(pending: int, rejected: int = 0) -> "Dict[str, int]":
    return {"accepted": pending + rejected, "pending": pending, "rejected": rejected}


def _sum(changes: "List[Dict[str, int]]") -> "Dict[str, int]":
    counts = changes[0].copy()
    for change in changes[1:]:
        for name, number in change.items():
            counts[name] += number
    return counts


class _MemoryQueue:
    """A queue in memory, bounded by slots: a line takes one for each 16 KiB begun, so the bytes are bounded too.

    `queue.Queue` would take a lock in put(), which deadlocks when the garbage collector runs a ``__del__`` that tracks
    while the lock is held. Here put() of a usual line takes none: a list of free slots bounds the queue and a deque
    holds it, and each of their steps is atomic. All else is done under the ledger's lock.

    A close() may come inside take() and settle() too, out of a ``__del__`` in their thread. So one step moves lines in
    flight, and one lets go of them: each line is with whoever took it out, here or there, and is counted once.
    """

    is_durable = False

    def __init__(self, max_size: int, due_size: int, interval: float) -> None:
        self._max_size = max_size
        self._due_size = due_size
        self._interval = interval  # seconds
        self._slots: "List[None]" = [None] * max_size  # the free ones
        self._waiting: "Deque[Tuple[bytes, float]]" = collections.deque()  # (line, when it came)
        # By number, counted in the order in which they came: settled is what came before the first. A plain dict, which
        # is ordered, too, and can be looked into while another thread changes it, also without the GIL.
        self._inflight: "Dict[int, Tuple[bytes, float]]" = {}
        self._taken = 0  # the number of the last one that is being taken,
        self._moved = 0  # and of the last one that was
        self._final: "Optional[Tuple[int, int]]" = None  # once it is closed: what mark() says from then on
        self._left: "Deque[Tuple[bytes, float]]" = collections.deque()  # what close() has given up
        waiting, inflight, left = self._waiting, self._inflight, self._left
        # Not of self: that would be a cycle.
        self.ledger = _Ledger(held=lambda: _held(len(waiting) + len(inflight), len(left)))

    def put(self, line: bytes) -> int:
        # A handler may raise between any two of these steps. What tells how far it came is the queue itself: where the
        # entry is in it, found by identity, the record is accepted; where it is not, the slots are as they were.
        entry = line, _CLOCK.now()
        claimed: "List[None]" = []  # slots
        try:
            if len(line) <= _SLOT:
                claimed = [self._slots.pop()]  # one step as far as can be: what is in neither list is lost
            else:
                self._claim(claimed, self._size(line))
            self._waiting.append(entry)
        except IndexError:  # there is no room
            self._slots.extend(claimed)
            return 0
        except BaseException:  # out of a signal handler: undo what was done, but for what is in the queue
            if not any(other is entry for other in _steady(lambda: list(self._waiting))):
                self._slots.extend(claimed)
            raise
        number = len(self._waiting) or 1  # the sender may have been quicker
        return number if self._slots else max(number, self._due_size)

    def take_back(self, line: bytes) -> bool:
        with self.ledger.lock:  # as take() and close() move lines: it is found in one place or is theirs
            for entry in _steady(lambda: list(self._waiting)):
                if entry[0] is line:
                    self._waiting.remove(entry)
                    self._slots.extend([None] * self._size(line))
                    return True
        return False

    def take(self, most: int) -> "List[Item]":
        with self.ledger.lock:
            number = 0 if self._final else min(most, len(self._waiting))
            before = max([self._moved, *self._inflight])  # a signal handler may have ended a take()
            self._taken = before + number  # first: what was accepted may be told too high, never too low
            entries = itertools.starmap(self._waiting.popleft, itertools.repeat((), number))
            try:
                moved = list(map(self._inflight.setdefault, range(before + 1, self._taken + 1), entries))  # in one step
            except IndexError:  # a close() came in between
                moved = []
            self._moved = self._taken
            self.ledger.add({})  # the move ends here
        return [(line, number) for number, (line, _) in enumerate(moved, before + 1)]

    def settle(self, items: "List[Item]", error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        with self.ledger.lock:
            if self._final:  # what is in flight was counted and given back
                return
            if error is not None:
                self.ledger.refusals.append(error)  # first, as in the ledger's settle()
            numbers = [number for _, number in items]
            gone = list(filter(None, map(self._inflight.pop, numbers, itertools.repeat(None))))  # in one step
            self.ledger.add({"accepted": len(gone), "rejected" if error else "delivered": len(gone)})
            self._slots.extend([None] * sum(1 if len(line) <= _SLOT else self._size(line) for line, _ in gone))

    def due_at(self) -> float:
        number = len(self._waiting)
        if self._inflight or number >= self._due_size or number and not self._slots:
            return 0.0
        try:
            return self._waiting[0][1] + self._interval
        except IndexError:
            return float("inf")

    def mark(self) -> "Tuple[int, int]":
        # No lock, since a signal handler may have interrupted who holds it. Read in this order, what is settled may be
        # told too late and what was accepted too high for a moment, never the other way round: lines are counted as
        # taken before take() moves them, and as moved, all settled where none is in flight, after that.
        if self._final:
            return self._final
        moved = self._moved
        settled = _steady(lambda: next(iter(self._inflight), moved + 1)) - 1
        waiting = len(self._waiting)
        return waiting + self._taken, settled

    def close(self) -> "List[bytes]":
        with self.ledger.lock:
            self._final = self.mark()  # what is left is not settled
            inflight = map(self._inflight.pop, list(self._inflight))
            waiting = itertools.starmap(self._waiting.popleft, itertools.repeat(()))
            for entries in inflight, waiting:  # what comes after the last one, its put() takes back
                try:
                    self._left.extend(entries)  # each moved in one step
                except LookupError:  # none is left
                    pass
            self.ledger.add({})  # the move ends here
        return [line for line, _ in self._left]

    def disown(self) -> None:
        """There are no descriptors."""

    def _size(self, line: bytes) -> int:
        return min((len(line) + _SLOT - 1) // _SLOT, self._max_size)  # one larger than the queue goes in alone

    def _claim(self, claimed: "List[None]", number: int) -> None:
        """Move *number* slots; IndexError where there are less. One thread at a time: two could have half of them."""
        with self.ledger.lock:
            if len(self._slots) < number:
                raise IndexError
            claimed.extend(itertools.starmap(self._slots.pop, itertools.repeat((), number)))  # each in one step


# Files that processes share. Each append locks the file, looks whether it is still the one at the path and ends with a
# newline, writes, and unlocks it.
#
# - The lock is `flock`'s, which belongs to an open file and not to a process: two collecters of one process keep each
#   other out as well. A forked child has the same open file, so an unlock by either unlocks it for both: that is why
#   nobody leaves it to close(), and why a killed writer whose child lives blocks nobody for longer than its write.
# - The look comes under the lock: who renames the file (`_RejectedLog`) holds it. The path is looked at, not the
#   descriptor: a file that logrotate renamed is as good as before for who has it open.
# - A write that fails is undone under the lock, by cutting the file to the size that it had; so no other's line can be
#   behind it. Only a kill leaves a part of a line, and the next writer ends it.


class _SharedFile:
    """A file of lines that any number of processes append to; they take turns by a lock on it."""

    def __init__(self, path: str, opener: "Callable[[str], int]") -> None:
        self.path = path
        self._open = opener  # for reading and appending
        self._fd = -1
        self._is_open = False  # so it is, with all below; False and yet a descriptor: a signal cut close() short
        self._place = b""  # the path as the system has it: so it is looked up in less time
        self._inode = (-1, -1)
        self._end = 0  # where our last append ended: nothing came after it if the file still has that size
        self._tried_at = -1.0  # when we tried in vain to lock it, since somebody held it for too long; else -1

    def append(self, lines: bytes, note: "Callable[[], None]", patience: float = _LOCK_TIMEOUT) -> None:
        """Append *lines* (whole ones) and call *note*, or raise OSError and leave no part of them.

        *patience* is how many seconds to wait for other processes.
        """
        try:
            size = self._lock(patience)
            # Where nobody has written since we did, it ends with a newline: most times that saves a read.
            if size != self._end and size > 0 and _read_at(self._fd, size - 1, 1) != b"\n":
                lines = b"\n" + lines  # end the line that a killed writer left
            _append(self._fd, size, lines, note)
            self._end = size + len(lines)
            _unlock_file(self._fd)
        except BaseException:
            self.close()  # and so unlock it
            raise
        if _register_at_fork is None:  # a child could keep the file open, and a lock on it
            self.close()

    def take_back(self, lines: bytes) -> bool:
        """Cut off *lines*, which were appended last; return False where another process has appended since."""
        try:
            start = max(0, self._lock(_LOCK_TIMEOUT) - len(lines))
            is_last = _read_at(self._fd, start, len(lines)) == lines
            if is_last:
                os.ftruncate(self._fd, start)
            return is_last
        except OSError:
            return False
        finally:
            self.close()

    def close(self) -> None:
        # In this order: a descriptor that an exception out of a signal handler had us forget would keep the lock.
        self._is_open = False
        _close_kept(self._fd, self._inode)
        self._fd = -1

    def _lock(self, patience: float) -> int:
        """Lock the file that is at the path now, opening it anew where it was renamed or deleted; return its size."""
        for _ in range(100):
            if not self._is_open or _inode_at(self._fd) != self._inode:  # somebody closed it: now it is another file's
                self.close()
                self._fd = self._open(self.path)
                self._inode, self._place, self._end = _inode(os.fstat(self._fd)), os.fsencode(self.path), 0
                self._is_open = True
            if self._tried_at >= 0:  # those who came meanwhile need not wait as well
                patience = _SHORT_LOCK_TIMEOUT if _CLOCK.now() > self._tried_at + _SHORT_LOCK_TIMEOUT else 0.0
            try:
                _lock_file(self._fd, patience)
            except BlockingIOError:
                if self._tried_at >= 0 or patience >= _LOCK_TIMEOUT:
                    self._tried_at = _CLOCK.now()
                raise
            self._tried_at = -1.0
            try:
                now = os.stat(self._place)
                if (now.st_dev, now.st_ino) == self._inode:
                    return now.st_size
            except FileNotFoundError:
                pass
            self.close()
        raise OSError(errno.EBUSY, "renamed or deleted again and again")


def _open_regular(path: str, flags: int, mode: int = 0o600) -> int:
    """Open a regular file, with no more done to it than *flags* (without O_TRUNC) say; a FIFO is not waited for."""
    fd = os.open(path, flags | _OPEN_FLAGS, mode)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise OSError(errno.EINVAL, "it is not a regular file")


_OPEN_FLAGS: int = sum(getattr(os, name, 0) for name in "O_NONBLOCK O_NOCTTY O_BINARY O_CLOEXEC".split())


def _open_lines(path: str, opener: "Callable[[str, int, int], int]" = _open_regular, mode: int = 0o640) -> int:
    """Open a file for reading and appending by *opener*, making it and its directory where they are missing."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        return opener(path, flags, mode)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), 0o777 if opener is _open_regular else 0o700, exist_ok=True)
        return opener(path, flags, mode)


def _append(fd: int, size: int, data: bytes, note: "Callable[[], None]") -> None:
    """Append all of *data* to a file of *size* bytes and call *note*, or leave the file as it was and raise.

    A signal handler may raise at any moment, also when all is written: then what counts is how long the file is.
    """
    is_whole = False
    try:
        _write_all(fd, data)
        is_whole = True
    finally:
        if is_whole or os.fstat(fd).st_size == size + len(data):
            note()
        else:
            os.ftruncate(fd, size)


def _write_all(fd: int, data: bytes) -> None:
    """Write all of *data* at the end of a file, or raise OSError and leave no part of it."""
    written = 0
    try:
        written = os.write(fd, data)  # mostly all
        while written < len(data):
            written += os.write(fd, data[written:])
    except OSError:
        os.ftruncate(fd, os.fstat(fd).st_size - written)
        raise


def _read_at(fd: int, offset: int, size: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)  # appending does not mind
    return os.read(fd, size)


def _lock_file(fd: int, patience: float = _LOCK_TIMEOUT) -> None:
    """Lock an open file against other processes; BlockingIOError where they hold it for *patience* seconds."""
    if _try_lock(fd, _FLOCK):  # as most times
        return
    sleeper, deadline, pause = threading.Lock(), _CLOCK.now() + patience, 0.0
    sleeper.acquire()
    while not _try_lock(fd, _FLOCK):
        if _CLOCK.now() >= deadline:
            waited = max(patience, _SHORT_LOCK_TIMEOUT)  # or somebody else did it, just now
            raise BlockingIOError(errno.EAGAIN, "another process has held its lock for %g s" % waited)
        _CLOCK.wait(sleeper, pause)
        pause = min(2 * pause + 0.0005, 0.01)


def _try_lock(fd: int, lock: "Any") -> bool:
    """Lock an open file by one of the system's two ways; return whether nobody else has it."""
    try:
        if fcntl is not None:
            lock(fd, _LOCK_NOW)
        elif msvcrt is not None:
            os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise OSError(error.errno, "the file system refuses to lock it: %s" % error) from None
        return False


def _unlock_file(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_UN)
    elif msvcrt is not None:
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)


# Our own files: locks, spool files, the checkpoint, `rejected.log`. Their directory may be one that others can write to
# (/tmp), so what lies at their place may be a trap: a link to somebody's key or shell file, a FIFO that never answers.


def _open_own(path: str, flags: int, mode: int = 0o600, made: "Optional[Tuple[int, int]]" = None) -> int:
    """Open a file of ours, with no more done to it than *flags* (without O_TRUNC) say; raise OSError where it is not.

    What is checked is what was opened, so nobody can put another file there in between. *made*: which file it is, where
    we made it and know: that one will do also with a second name, which backups give it.
    """
    try:
        fd = _open_regular(path, flags | getattr(os, "O_NOFOLLOW", 0), mode)
    except OSError as error:
        if os.path.islink(path):
            raise OSError(error.errno, "it is a link, which is not followed") from None
        raise
    found = os.fstat(fd)
    if made is not None and _inode(found) != made:
        problem = "it is not the file that was made there"
    elif found.st_nlink > 1 and made is None:
        problem = "it has a second name (a hard link)"
    elif hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        problem = "it belongs to another user (uid %d)" % found.st_uid
    else:
        return fd
    os.close(fd)
    raise OSError(errno.EPERM, problem)


def _open_own_lines(path: str) -> int:
    return _open_lines(path, _open_own, 0o600)


class _RejectedLog(_SharedFile):
    """``rejected.log``: what will never be delivered, and why, for people to look at. Bounded, whatever comes.

    Any number of processes append to it. Who finds it full renames it, holding its lock: the others notice, by its
    identity, that the file at the path is another one. What does not fit or cannot be written is counted and told; it
    is never a reason to stop, since a record that cannot be delivered must not hold up those that can. Not kept open:
    it is seldom needed, and where it lies anybody may put another one.
    """

    def __init__(self, path: str, roll_size: int = _ROLL_SIZE) -> None:
        super().__init__(path, _open_own_lines)
        self.roll_size = roll_size
        self._coming = 0  # bytes that are about to be appended
        self.missing = 0  # records that are in none of the files,
        self._lost: "Dict[str, int]" = {}  # and why -> how many, as far as that was not told yet
        self._tell_at = 0.0

    def add(self, lines: "List[Tuple[Any, str]]", are_damaged: bool) -> None:
        """Append *lines*, each with a reason. Raises no OSError."""
        try:
            for line, reason in lines:
                self._write(self._entry(line, reason, are_damaged))
        finally:
            self.close()

    def warn(self, at_once: bool = False) -> None:
        """Tell of records that are in none of the files, once a minute. Not for under a lock."""
        if self._lost and (at_once or _CLOCK.now() >= self._tell_at):
            self._tell_at = _CLOCK.now() + _WARN_EVERY
            lost, self._lost = self._lost, {}
            for why, number in lost.items():
                _log("warning", "%d rejected records are not in %s: %s", number, _printable(self.path), why)

    def _entry(self, line: "_Line", reason: str, is_damaged: bool) -> bytes:
        place = json.dumps({"file": line.file, "line": line.number, "reason": reason})[:-1].encode("ascii")
        if not is_damaged and len(place) + len(line.text) + 20 < self.roll_size:
            return b'%s, "record": %s}\n' % (place, line.text.strip())
        shown = {"record": line.text[:_SHOWN].decode("utf-8", "replace"), "length": line.length}
        return place + b", " + json.dumps(shown)[1:].encode("ascii") + b"\n"

    def _write(self, entry: bytes) -> None:
        self._coming, why = len(entry), "it holds no more than %d bytes" % self.roll_size
        try:
            if len(entry) <= self.roll_size:
                self.append(entry, lambda: None)
                return
        except OSError as error:
            why = "it cannot be written: %s" % error
        self._lose(1, why)

    def _lose(self, number: int, why: str) -> None:
        self.missing += number
        self._lost[why] = self._lost.get(why, 0) + number

    def _lock(self, patience: float) -> int:
        size = super()._lock(patience)
        if not size or size + self._coming <= self.roll_size:
            return size
        # Full: it moves on, the oldest first, under its lock. Who waits for that sees another file at the path then.
        older, oldest = self.path + ".1", self.path + ".2"
        try:
            number = _count_lines(oldest)
            os.replace(older, oldest)
            if number:
                self._lose(number, "the oldest file had to go")
        except FileNotFoundError:
            pass
        os.replace(self.path, older)
        self.close()
        return super()._lock(patience)


def _count_lines(path: str) -> int:
    """Return how many lines a file of ours has; 0 where there is none."""
    try:
        with io.open(path, "rb", opener=_open_own) as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


# Lines of files. A line queue takes lines from files, in order, and settles them in any order. The spool (files that we
# write) and upload (files that others wrote) are line queues: they say which file comes next and where it is noted how
# far that one is settled.
#
#   file --_Reader--> lines --_Source--> in flight --> delivered or refused: settled, noted; damaged: `rejected.log`
#
# - A _Reader cuts bytes into lines, in bounded memory whatever they are. It knows nothing of JSON.
# - A _Source is one file: what is still to be read of it, which lines are in flight, and how far it is settled. That is
#   an offset and the *holes* before it: a record on which the server chokes stands aside while those behind it are
#   delivered, and after a stop it alone comes again.
# - A _LineQueue hands out the lines, sets damaged ones aside (`_damage` alone tells which these are) and settles them.
#
# One lock, _reading, guards the sources. take(), settle() and close() hold it, never while a request is under way; it
# is re-entrant, for a signal handler. An exception out of a signal handler may come anywhere: lines that take() has in
# hand then are put back, and a reader that was interrupted is made anew where the lines in flight end.

# Up to where a file is settled: an offset, the number of lines before it, and the holes in that, which have both too.


def _position(most: int, offset: int, number: int, holes: "Any") -> "Any":
    """Return a position in a file of at most *most* bytes as it was noted on disk; raise where it cannot be one."""
    bounds = [0] + [bound for start, _, end in holes for bound in (start, end)] + [offset, most]
    numbers = [number] + [before for _, before, _ in holes]
    if bounds != sorted(bounds) or min(numbers) < 0 or {int} != set(map(type, bounds + numbers)):
        raise ValueError("there is no such place")
    return offset, number, holes


# A line as it is sent; the name of its file, its number there from 1, where it begins and ends there; how many bytes it
# had (if more than it has, it was cut and is damaged); its source.
_Line = collections.namedtuple("_Line", "text file number start end length source")

_BLANK = b"\0\t\n\v\f\r\x1a \xef\xbb\xbf"  # what may stand before a record: NULs of a power cut, Ctrl-Z, a BOM


class _Reader:
    """Cuts what *read* returns into lines, without holding more than one of them and a chunk.

    *open_at(offset)* returns what reads on from there: read(size) returns up to *size* bytes, none at the end. A line
    ends with LF, CR or CRLF. What is blank is skipped by the million. Of a line that can be no record, by its length or
    its first character, only the beginning is kept. Where *can_reopen*, a long line is looked at before it is kept.
    """

    def __init__(
        self, open_at: "Callable[[int], Callable[[int], bytes]]", can_reopen: bool, start: "Tuple[int, int, float]"
    ) -> None:
        self.offset, self.number, end = start  # all before offset is handed out, or blank
        self._open_at = open_at
        self.is_at_end = False
        self._most_kept = _MAX_TAKEN if can_reopen else _MAX_LINE
        self._kept = bytearray()  # of a line whose end is not read yet,
        self._length = 0  # and how many bytes it has so far
        self.found: "Any" = None  # the line that was looked at and is not taken yet
        self.lines = self._cut(open_at(self.offset), end)

    def _cut(self, read: "Callable[[int], bytes]", end: float) -> "Iterator[Any]":
        """Yield (text, number, start, end, length) of each line, and None after each chunk: many may be without any.

        Only the last text may lack its newline.
        """
        place, chunk = self.offset, b"-"
        while chunk:
            chunk = read(int(min(_CHUNK, end - place)))
            # CRLF is one end of a line: cut in two it would be two.
            if chunk[-1:] == b"\r" and place + len(chunk) < end:
                chunk += read(1)
            place += len(chunk)
            for part in self._parts(chunk):
                # Nearly all lines lie within a chunk. The others are put together, as far as they may be records.
                whole = self._length == 0 and part[-1:] in b"\r\n"
                line = self._line(part, len(part)) if whole else self._lengthen(part)
                if line is not None:
                    yield line
            yield None
        if self._length:
            yield self._end_line()
        self.is_at_end = True

    def _parts(self, chunk: bytes) -> "List[bytes]":
        if not self._length and chunk == bytes(len(chunk)):  # by far the fastest way through a hole
            self.offset += len(chunk)
            return []
        if not self._length and chunk[:1] != b"{":
            blank = chunk[: len(chunk) - len(chunk.lstrip(_BLANK))]
            blank = blank[: max(blank.rfind(b"\n"), blank.rfind(b"\r")) + 1]
            self.offset += len(blank)
            self.number += blank.count(b"\n") + blank.count(b"\r") - blank.count(b"\r\n")
            chunk = chunk[len(blank) :]
        return chunk.splitlines(True)

    def _lengthen(self, part: bytes) -> "Any":
        """Add *part* to the line that is not at its end; return it where it is now."""
        if not self._length:
            bare = part.lstrip(_BLANK)  # a hole in the file may be larger than memory
            self.offset += len(part) - len(bare)
            part = bare
        elif self._kept[:1] != b"{" or len(self._kept) > self._most_kept:
            del self._kept[_SHOWN:]  # damaged, or to be read again when its length is known
        if len(self._kept) == self._length:  # nothing of it was let go
            self._kept += part
        self._length += len(part)
        return self._end_line(part[-1:]) if part[-1:] in (b"\n", b"\r") else None

    def _end_line(self, newline: bytes = b"") -> "Any":
        """Return the line that came piece by piece; a long one is read again, now that its length is known."""
        kept, length = self._kept, self._length
        self._kept, self._length = bytearray(), 0
        if len(kept) < length <= _MAX_LINE and kept[:1] == b"{":
            del kept[:]
            read = self._open_at(self.offset)
            while len(kept) < length:
                kept += read(min(_CHUNK, length - len(kept))) or b"\n" * length  # it shrank: damaged, or blank
        if len(kept) < length:
            kept += newline  # that it has one is to be seen, though it is cut
        return self._line(bytes(kept), length)

    def _line(self, text: bytes, length: int) -> "Any":
        """Step over a line; return it, or None where it is blank."""
        start = self.offset
        self.offset, self.number = start + length, self.number + 1
        if text[:1] != b"{":
            blank = len(text) - len(text.lstrip(_BLANK))
            text, start, length = text[blank:], start + blank, length - blank
        return (text, self.number, start, self.offset, length) if text else None


class _Source:
    """One file of lines: what is still to be read of it, what is in flight, and how far it is settled."""

    can_reopen = True  # whether open() may be called again, for what was read already

    def __init__(self, name: str, position: "Any" = (0, 0, ())) -> None:
        self.name = name
        self.offset, self.number, holes = position  # where the last settled line ends, and how many end there
        # What is to be read, in order: where a range begins, how many lines come before it, where it ends.
        self.ranges: "List[Tuple[int, int, float]]" = [*map(tuple, holes), (self.offset, self.number, float("inf"))]
        # By where they begin, in order. A plain dict, for `settled` looks into it while others change it.
        self.flight: "Dict[int, _Line]" = {}
        self.is_read = False  # to its end, as far as that was there
        self._reader: "Optional[_Reader]" = None  # of the first range

    def open(self, offset: int) -> "Callable[[int], bytes]":
        """Return what reads the file from *offset* on: read(size) as in `_Reader`. It may raise anything."""
        raise NotImplementedError

    def is_final(self, text: bytes) -> bool:
        """Tell whether the last line, which has no newline, is all that there will be of it."""
        return True

    def take(self, taken: "List[Any]", most: int, room: float) -> None:
        """Move lines in flight and append them to *taken*, until that has *most* or the next one is not to be had.

        It has more than *room* bytes, and is not the first of all; or it was not found in a while, or the file is at
        its end (`is_read`).
        """
        while len(taken) < most:
            reader = self._look()
            if reader is None or taken and len(reader.found[0]) > room:
                return
            text, number, start, end, length = reader.found
            line = _Line(text, self.name, number, start, end, length, self)
            taken.append(line)  # first, lest an exception comes when it is in flight and nobody has it
            self.flight[start] = line
            self.ranges[0], reader.found = (end, number, self.ranges[0][2]), None
            room -= len(text)

    def put_back(self, line: "_Line") -> None:
        """Have *line*, the last one taken, come again."""
        self.ranges[0], self._reader = (line.start, line.number - 1, self.ranges[0][2]), None
        self.flight.pop(line.start, None)  # last: what is neither in flight nor to be read seems settled

    def settle(self, line: "_Line") -> None:
        del self.flight[line.start]
        if line.end > self.offset:
            self.offset, self.number = line.end, line.number

    def position(self) -> "Tuple[int, int, List[Tuple[int, int, float]]]":
        """Return up to where all is settled, and the holes in it; with too many of these, what comes before them."""
        holes: "List[Tuple[int, int, float]]" = []
        for line in self.flight.values():
            if line.start >= self.offset:  # those behind the last settled line are no holes: it ends there
                break
            if holes and holes[-1][2] == line.start:
                holes[-1] = (holes[-1][0], holes[-1][1], line.end)
            else:
                holes.append((line.start, line.number - 1, line.end))
            if len(holes) > _MAX_HOLES:
                return holes[0][0], holes[0][1], []
        if self.is_read and not self.flight:  # then what is blank at its end is done with, too
            return self.ranges[0][0], self.ranges[0][1], []
        return self.offset, self.number, holes + self.ranges[:-1]

    def _look(self) -> "Optional[_Reader]":
        """Return the reader, which has found the next line; None where it found none."""
        reader, self._reader = self._reader, None  # what an exception interrupts is made anew
        if reader is None:
            reader = _Reader(self.open, self.can_reopen, self.ranges[0])
        if reader.found is None:
            lines = reader.lines
            reader.found = next(lines, None) or next(filter(None, itertools.islice(lines, _BARREN)), None)
        found, self.is_read = reader.found, False
        if found is None and reader.is_at_end:
            if len(self.ranges) > 1:
                del self.ranges[0]
                return self._look()
            self.is_read, self.ranges[0] = True, (reader.offset, reader.number, float("inf"))
        elif found is not None and found[0][-1] not in b"\r\n" and len(self.ranges) == 1:
            self.is_read = not self.is_final(found[0])
        if not self.is_read:
            self._reader = reader
        return None if self.is_read or found is None else reader


class _LineQueue:
    """What the queues of lines of files share: taking, setting aside and settling, as `_Queue` has it."""

    is_durable = True

    def __init__(self, ledger: "_Ledger", rejected: "_RejectedLog") -> None:
        self.ledger = ledger
        self._rejected = rejected
        self._reading = threading.RLock()
        self._closed = False

    # What a queue adds, all called under the lock

    def _source(self) -> "Optional[_Source]":
        """Return the file to read from now: the first that is not read to its end; None where there is none."""
        raise NotImplementedError

    def _count(self, lines: "List[Any]") -> None:
        """Count *lines*, which are being taken, in the ledger."""
        self.ledger.add({"accepted": len(lines), "pending": len(lines)})

    def _settle(self, lines: "List[Any]") -> None:
        """Settle *lines* and note it durably. What raises in the note stays settled."""
        for line in lines:
            line.source.settle(line)

    def _unreadable(self, source: "_Source", error: Exception) -> None:
        """*source* cannot be read: see to it that _source() returns it no more, for now at least."""
        raise NotImplementedError

    def take(self, most: int) -> "List[Item]":
        """As `_Queue` has it. Less than *most* may come also where there is more: in a while it looks no further."""
        self._rejected.warn()
        with self._reading:
            taken: "List[Any]" = []
            try:
                damaged = [] if self._closed else self._take(most, taken)
                if damaged:
                    self._set_aside(damaged)
                sound = [line for line in taken if line.start in line.source.flight] if damaged else taken
                self._count(sound)
                return sound
            except BaseException:
                for line in reversed(taken):
                    line.source.put_back(line)
                raise

    def _set_aside(self, damaged: "List[Tuple[Any, str]]") -> None:
        lines = [line for line, _ in damaged]
        self._count(lines)
        self._rejected.add(damaged, True)
        try:
            for line, reason in damaged:  # first, as in settle()
                text = line.text[:_SHOWN].decode("utf-8", "replace")
                self.ledger.settle(1, AnalysysPythonSdkIllegalDataException(reason, [text]))
        finally:
            self._settle(lines)

    def settle(self, items: "List[Item]", error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        with self._reading:
            if self._closed:
                return
            if error is not None:
                self._rejected.add([(item, str(error)) for item in items], False)
            try:
                self.ledger.settle(len(items), error)  # first: who sees them settled must see what is to be told
            finally:
                self._settle(items)
        self._rejected.warn()

    def _take(self, most: int, taken: "List[Any]") -> "List[Tuple[_Line, str]]":
        """Move lines in flight, append them to *taken* and return the damaged ones, each with the reason."""
        damaged: "List[Tuple[_Line, str]]" = []
        room, is_barren = float(_MAX_TAKEN), False
        while len(taken) < most and room > 0 and not is_barren:
            known, source = len(taken), self._source()
            if source is None:
                break
            try:
                source.take(taken, min(most, known + _TOGETHER), room)
                is_barren = len(taken) == known and not source.is_read
            except Exception as error:  # gzip has many
                self._unreadable(source, error)
            lines = taken[known:]
            room -= sum(len(line.text) for line in lines)
            for line, what in zip(lines, _damages(lines)):
                if what is not None:
                    damaged.append((line, "line %d of %s is %s" % (line.number, _printable(line.file), what)))
                    room -= 32 * min(len(line.text), _SHOWN) + _SOURCE_COST  # telling costs time and memory
            if not lines:
                room -= _SOURCE_COST
        return damaged


# The spool. The files of one process are an *owner*'s: NAME.lock, which it keeps locked while it lives and which says
# how far each of the others is settled, and NAME.000001.log and so on, which it appends to and reads.
#
# - Who owns what: a claim is the process's, not the module's, of which there may be two copies in it. `fcntl.lockf`
#   tells other processes apart, and a forked child does not inherit it; but to copies in one process it says yes, and
#   closing *any* descriptor of a file drops the process's lock. So a file that this process has open already, by any
#   copy, is not opened again: it is claimed here. A lock on the directory keeps two copies from looking at once.
#   Where somebody else in this process reads such a file (a backup), the lock is back within a second.
#   The process id in a name proves nothing: ids repeat, in containers all the time.
# - An owner whose NAME.lock somebody removed makes it anew within a second, if it lives. Until then, and if it does not
#   live, its files look abandoned, and must not stay for ever: whoever finds them makes the lock file and claims it.
#   What tells the two cases apart is a second lock, `flock`, that a writer has on the file it writes. (It cannot be
#   the first one: a child that was forked unnoticed inherits it and would keep the files of a dead owner.)
# - `_own.writing` guards what put() changes: the file that is written. `_reading` guards all else, and is taken first.
#   put() takes `writing` alone, so a record never waits for a look at leftovers or for a slow disk that is read.
# - What is durable: a record when put() returns; that it is delivered, when settle() returns. Between the server's
#   answer and that note lies the one moment in which a kill makes a batch come twice.
# - What others may do to us: remove our files (noticed within a second: what cannot be read any more is rejected and
#   told, and new files are made), leave traps among the leftovers (set aside, one warning each, nobody waits for them).


def _open_files() -> "Set[Tuple[int, int]]":
    """Return the identities of all files that this process has open."""
    try:
        descriptors: "Iterable[Any]" = os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
    except OSError:
        descriptors = range(1024)
    found = set()
    for descriptor in descriptors:
        try:
            found.add(_inode(os.fstat(int(descriptor))))
        except (OSError, ValueError):
            pass
    return found


def _inode(found: "os.stat_result") -> "Tuple[int, int]":
    return found.st_dev, found.st_ino


def _alone(directory: str, work: "Callable[[], Any]") -> "Any":
    """Return work(), which nobody else, in this process or another, calls for *directory* at the same time."""
    if fcntl is None:
        return work()
    fd = os.open(directory, os.O_RDONLY)
    try:
        _hold(fd, 0.1)  # a file system without locks, or a child of a killed process that keeps one: hardly any harm
        return work()
    finally:
        _unlock_file(fd)  # for children that inherited the descriptor, too
        os.close(fd)


def _hold(fd: int, patience: float) -> bool:
    """Lock an open file as `_lock_file` does; return whether that was possible."""
    try:
        _lock_file(fd, patience)
    except OSError:
        return False
    return True


class _SpoolFile(_Source):
    """A file of an owner."""

    def __init__(self, path: str, owner: "_Owner", end: float, position: "Any" = (0, 0, ())) -> None:
        super().__init__(os.path.basename(path), position)
        self.path = path
        self.owner = owner
        self.is_aside = False  # whether it can be read no more, or not be removed: it stays where it is
        self.end = end  # how far it is written, if we write it,
        self.fd = -1  # with which descriptor, while it is the last one,
        self.made: "Optional[Tuple[int, int]]" = None  # and which file that is
        self.before = float("inf")  # own records in the files before it, once there is one in it

    def open(self, offset: int) -> "Callable[[int], bytes]":
        def read(size: int) -> bytes:  # a descriptor that is kept would be a forked child's, too
            nonlocal offset
            fd = _open_own(self.path, os.O_RDONLY, made=self.made)
            try:
                chunk = _read_at(fd, offset, int(min(size, self.end - offset)))
            finally:
                os.close(fd)
            offset += len(chunk)
            return chunk

        return read

    def is_final(self, text: bytes) -> bool:
        return self.end == float("inf")  # else a line that is not noted yet, by a call inside which another one came

    def oldest(self) -> "Optional[_Line]":
        """Return the first line in flight."""
        line: "Optional[_Line]" = _steady(lambda: next(iter(self.flight.values()), None))
        return line

    def has_more(self) -> bool:
        is_read = self.ranges[0][0] >= self.end if self.end < float("inf") else self.is_read
        return not is_read and not self.is_aside

    def is_done(self) -> bool:
        return not self.has_more() and not self.flight and not self.is_aside and self.fd < 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        _close_kept(fd, self.made)

    def is_gone(self) -> bool:
        """Tell whether somebody removed, replaced or emptied it, which we write."""
        end = self.end  # first: it grows while we look
        try:
            found = os.lstat(self.path)
        except OSError as error:
            return isinstance(error, (FileNotFoundError, NotADirectoryError))  # else nobody knows, as yet
        return _inode(found) != self.made or found.st_size < end


def _noted_position(notes: bytes, path: str) -> "Any":
    """Return up to where a spool file is settled, as its owner's lock file *notes*; ValueError where it cannot be."""
    try:
        noted = json.loads(notes.partition(b"\n")[0].decode().strip() or "{}")
        return _position(os.lstat(path).st_size, *noted.get(os.path.basename(path), (0, 0, ())))
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError("these are no notes") from error


class _Owner:
    """The spool files of one process, and the lock on them."""

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self.files: "List[_SpoolFile]" = []  # that are not removed, the oldest first
        self.base = os.path.join(directory, name)
        self._lock: "Tuple[int, Any]" = (-1, None)  # a descriptor, and of which file it was made
        self._is_over = False

    def claim(self, flags: int) -> bool:
        """Lock the files, if nobody else has; raise OSError where that cannot be tried."""
        fd = _open_own(self.base + ".lock", os.O_RDWR | flags)
        lock = fd, _inode_at(fd)
        try:
            if _try_lock(fd, _LOCKF) and os.fstat(fd).st_nlink > 0:  # else it was removed meanwhile, by its owner
                self._lock, lock = lock, self._lock  # what was there before is closed below
                self._take_room()
        finally:
            _close_kept(*lock)
        return self._lock[0] >= 0

    def _take_room(self) -> None:
        """See to it that a note finds room when the disk is full: what is delivered must not come again for that."""
        try:
            if not os.fstat(self._lock[0]).st_size:
                os.write(self._lock[0], b" " * _LOCK_SIZE + b"\n")
        except OSError:  # it is full already
            pass

    def find(self, names: "List[str]") -> None:
        """Take over files from an owner that is gone; *names* are those that it had, the oldest first."""
        for path in [os.path.join(os.path.dirname(self.base), name) for name in names]:
            if os.path.lexists(path):
                position = 0, 0, ()
                try:
                    position = _noted_position(_read_at(self._lock[0], 0, _CHUNK), path)
                except (OSError, ValueError):
                    what = _printable(path), _printable(self.base)
                    _log("warning", "%s is delivered from its beginning: %s.lock does not fit it", *what)
                self.files.append(_SpoolFile(path, self, float("inf"), position))

    def note(self) -> None:
        """Remove the files that are done with, then note how far the others are settled. Void after end()."""
        if self._is_over:
            return
        # In this order: killed in between, we leave a note about a file that is gone, which does no harm. The other way
        # round it would be a file about which there is no note, and all of it would come again.
        stuck = None
        for file in filter(_SpoolFile.is_done, self.files[:]):
            try:
                os.unlink(file.path)
            except FileNotFoundError:
                pass
            except OSError as error:  # it stays, and that it is done with
                stuck, file.is_aside = error, True
                continue
            self.files.remove(file)
        kept = json.dumps({file.name: file.position() for file in self.files if file.offset or file.ranges[0][0]})
        fd, made = self._lock
        if _inode_at(fd) != made:
            raise OSError(errno.EBADF, "somebody closed its descriptor")
        os.lseek(fd, 0, os.SEEK_SET)
        if os.write(fd, kept.encode("ascii") + b"\n") <= len(kept):
            raise OSError(errno.ENOSPC, "there is no room")
        if stuck is not None:
            raise stuck

    def keep_lock(self) -> None:
        """Lock the lock file again; open it anew where somebody closed it, make it anew where somebody removed it."""
        try:
            if _inode(os.lstat(self.base + ".lock")) == _inode_at(self._lock[0]):
                _try_lock(self._lock[0], _LOCKF)  # again: somebody else in this process may have read and closed it
                return
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self.base), 0o700, exist_ok=True)
        self.claim(os.O_CREAT)
        self.note()  # the old note went with it

    def end(self) -> None:
        """Let go of what is left; whoever finds it may claim it. Where nothing is, leave no trace."""
        if not self._is_over and not self.files:
            _unlink(self.base + ".lock")
        self._is_over = True
        self.disown()

    def disown(self) -> None:
        # In this order: a descriptor that an exception out of a signal handler had us forget would keep the lock.
        _close_kept(*self._lock)
        self._lock = -1, None


class _Writer(_Owner):
    """The owner that this process is: its last file is written.

    A call may come inside another one of the same thread, at any line (a ``__del__``, a signal handler), or end there
    in an exception, or both. So nobody undoes more than a write of his own that failed, and where an exception came out
    of the outermost call, it counts the lines of the file anew: those of inner calls are accepted. The one count that
    there is of what was written is changed in one step.
    """

    def __init__(self, directory: str, max_bytes: int) -> None:
        suffix = binascii.hexlify(os.urandom(4)).decode()
        super().__init__(directory, "%013d-%d-%s" % (time.time() * 1000, os.getpid(), suffix))
        self.writing: "Any" = threading.RLock()  # re-entrant, for a __del__ or signal handler that tracks
        self.written = 0  # records: the one count of them
        self.lost: "Dict[str, int]" = {}  # of these, by their file: a count that may be noted again
        self.room = _Room(directory, self.name, max_bytes)
        self._is_torn = False  # a call ended in an exception: the file may hold more than was noted
        self._numbers = itertools.count(1)  # of files; a step that no other call comes into

    def append(self, lines: bytes, is_inner: bool) -> bool:
        """Hand *lines* to the operating system, all or none; return False where there is no room.

        Under `writing`; *is_inner*: this thread had it before, so it is inside another call.
        """
        try:
            if self._is_torn and not is_inner:  # since it could not be mended at once
                self._mend()
            # By what was noted: whether somebody has changed the file is looked at once a second, and at the end. But a
            # descriptor that somebody has closed may be another file's by now.
            file = self.files[-1] if self.files else None
            if file is not None and file.fd >= 0 and _inode_at(file.fd) != file.made:
                file.close()
            size = file.end if file is not None and file.fd >= 0 else -1
            # An inner call leaves the file to the outer one, whose lines its end lacks: it would be done without them.
            if size < 0 or size and size + len(lines) > self.room.roll_size and not is_inner:
                unsettled = [file for file in self.files[:] if file.has_more() or file.flight]
                if not self.room.is_left(sum(int(file.end) for file in unsettled)):
                    return False
                self._roll()
            file = self.files[-1]
            if not file.end:
                file.before = min(self.written, file.before)  # a call that came inside has noted the lower one
            _write_all(file.fd, lines)
            self.written += lines.count(b"\n")
            file.end += len(lines)  # last: from here on they are taken
            return True
        except BaseException:
            self._is_torn = True
            raise
        finally:
            if self._is_torn and not is_inner:
                self._mend()

    def path(self) -> str:
        """Return where the next record goes, for a message."""
        return self.files[-1].path if self.files else self.base + ".*.log"

    def unread(self) -> "Optional[_SpoolFile]":
        """Return the oldest file in which there are records that are not taken."""
        for file in self.files[:]:
            if file.ranges[0][0] < file.end:  # as has_more() says: each put() comes here
                return file
        return None

    def taken(self) -> int:
        """Return how many records, from the oldest on, are taken or lost."""
        written = self.written  # first: it grows
        file = self.unread()
        return written if file is None else int(file.before) + file.ranges[0][1]

    def settled(self) -> int:
        """Return how many records, from the oldest on, are settled; never too many, at any moment."""
        taken = self.taken()  # first: what is taken meanwhile is in flight
        for file in self.files[:]:
            oldest = file.oldest()
            if oldest is not None:
                return int(file.before + oldest.number) - 1
        return taken

    def held(self) -> "Dict[str, int]":
        """Return the counts that the ledger does not have."""
        lost = sum(self.lost.copy().values())  # first: what is lost was written
        return _held(self.written - lost, lost)

    def give_up(self, file: "_SpoolFile") -> "Tuple[int, List[bytes]]":
        """Write no more to a file that is gone; return how many of its records are not taken, and what can be read."""
        with self.writing:  # it may be the one that is written: the next put() makes another one
            start, left = file.ranges[0][0], b""
            try:
                left = _read_at(file.fd, start, int(min(file.end - start, _MAX_TAKEN)))
            except OSError:  # it was closed, or its disk is gone
                pass
            file.close()
            _unlink(file.path)  # what is left of it, where it was emptied
            behind = self.files[self.files.index(file) + 1 :]
            end = min([self.written] + [other.before for other in behind])
        return int(end - file.before) - file.ranges[0][1] if file.has_more() else 0, left.splitlines(True)

    def close(self) -> None:
        """Write no more. Under `writing`, but in a forked child."""
        for file in self.files:
            file.close()

    def disown(self) -> None:
        self.close()
        super().disown()

    def _mend(self) -> None:
        """Count the lines that calls left which ended in an exception, and cut off a part of one."""
        file = self.files[-1] if self.files else None
        if file is not None and file.fd >= 0:
            end = int(file.end)  # first: another call may come in between
            lines = _read_at(file.fd, 0, os.fstat(file.fd).st_size)
            whole = lines.rfind(b"\n") + 1
            if len(lines) >= end and lines:  # else somebody has cut it
                os.ftruncate(file.fd, whole)
                self.written = int(file.before) + lines.count(b"\n")
                file.end = whole
        self._is_torn = False

    def _roll(self) -> None:
        file = _SpoolFile("%s.%06d.log" % (self.base, next(self._numbers)), self, 0)
        file.fd = _open_own_lines(file.path)
        file.made = _inode(os.fstat(file.fd))
        _hold(file.fd, 0.0)  # until it is closed: see the head of this section
        self.files.append(file)
        for other in self.files[:-1]:
            other.close()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _largest_file() -> int:
    """Return how many bytes a file of this process may have (`ulimit -f`): a larger one takes nothing any more."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    except (ImportError, OSError):  # Windows, WebAssembly
        return _ROLL_SIZE
    return _ROLL_SIZE if limit == resource.RLIM_INFINITY else limit


class _Room:
    """How much a spool directory may hold, by all processes together and with `rejected.log`.

    The latter has its share whether it is there or not, so that it never takes the room of records. What others hold is
    counted anew at a roll, but in no more than a fiftieth of the time: there may be many files.
    """

    def __init__(self, directory: str, own_name: str, most: int) -> None:
        self.roll_size = max(1, min(_ROLL_SIZE, most // 4, _largest_file()))
        self.rejected_size = max(1, min(_ROLL_SIZE, most // 16, _largest_file()))
        self._directory = directory
        self._own_name = own_name
        self._most = most
        self._others = self._rejected = 0  # bytes, when they were counted last
        self._count_at = 0.0  # when to do so again

    def is_left(self, own: int) -> bool:
        """Tell whether there is room for another file, where our files hold *own* bytes."""
        began = _CLOCK.now()
        if began >= self._count_at:
            self._count()
            self._count_at = began + 50 * (_CLOCK.now() - began)
        used = own + self._others
        # An empty spool has room whatever the limit: a limit that lets nothing in would lose all.
        return not used or used + max(self._rejected, 3 * self.rejected_size) + self.roll_size <= self._most

    def _count(self) -> None:
        others = rejected = 0
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            names = []
        for name in names:
            is_rejected = name.startswith("rejected.log")
            if is_rejected or re.fullmatch(_SPOOL_FILE, name) and not name.startswith(self._own_name):
                try:
                    found = os.lstat(os.path.join(self._directory, name))
                except FileNotFoundError:
                    continue
                size = found.st_size * stat.S_ISREG(found.st_mode)
                others, rejected = others + size * (not is_rejected), rejected + size * is_rejected
        self._others, self._rejected = others, rejected


class _Leftovers:
    """The files of owners that are gone: adopts them, in the order of time, some at once.

    The directory is listed anew only when all that was found is tried, since it may hold ten thousands. What an owner
    wrote after that and before its end is found when its lock file is gone.
    """

    def __init__(self, directory: str, own_name: str) -> None:
        self.adopted: "List[_Owner]" = []  # the oldest first
        self.look_at = 0.0  # when to look again
        self._directory = directory
        self._own_name = own_name
        self._found: "Deque[Tuple[str, List[str]]]" = collections.deque()  # owners to try, and names of their files
        self._aside: "Set[str]" = set()  # names of owners whose files cannot be had

    def look(self) -> None:
        """Adopt what is there, if it is time to."""
        if _CLOCK.now() < self.look_at or len(self.adopted) >= _MOST_ADOPTED:
            return
        self.look_at = _CLOCK.now() + _LOOK_EVERY
        try:
            if not self._found:
                self._list()
            if self._found:
                _alone(self._directory, self._adopt)
        except OSError:  # no descriptor is free, say
            pass

    def set_aside(self, owner: "_Owner", path: str, error: object) -> None:
        self._aside.add(owner.name)
        _log("warning", "%s is set aside, it cannot be delivered: %s", _printable(path), error)

    def _list(self) -> None:
        owners: "Dict[str, List[str]]" = {}
        for name in os.listdir(self._directory):
            if re.fullmatch(_SPOOL_FILE + "|" + _SPOOL_LOCK, name):
                owners.setdefault(name.partition(".")[0], []).append(name)
        self._aside.intersection_update(owners)
        not_for_us = self._aside.union([self._own_name], (owner.name for owner in self.adopted))
        found = [item for item in owners.items() if item[0] not in not_for_us]
        self._found.extend(sorted(found, key=lambda item: (int(item[0].split("-")[0]), item[0])))

    def _adopt(self) -> None:
        held = _open_files()
        while self._found:
            if len(self.adopted) >= _MOST_ADOPTED:
                self.look_at = 0.0  # as soon as these are done
                break
            name, names = self._found.popleft()
            files = sorted((file for file in names if file.endswith(".log")), key=lambda file: int(file.split(".")[-2]))
            owner = _Owner(self._directory, name)
            try:
                if self._claim(owner, files, held):
                    owner.find(files)
                    self.adopted.append(owner)
            except FileNotFoundError:  # others have delivered them meanwhile
                pass
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._give_back()
                    break
                self.set_aside(owner, owner.base, error)

    def _claim(self, owner: "_Owner", files: "List[str]", held: "Set[Tuple[int, int]]") -> bool:
        """Claim what nobody has: not this process either, and where there is no lock file, nobody who writes."""
        try:
            return _inode(os.lstat(owner.base + ".lock")) not in held and owner.claim(0)
        except FileNotFoundError:
            if not files:
                raise
        fd = _open_own(os.path.join(self._directory, files[-1]), os.O_RDONLY)
        try:
            return _hold(fd, 0.0) and owner.claim(os.O_CREAT)
        finally:
            os.close(fd)

    def _give_back(self) -> None:
        """No descriptor is free: leave the program some of ours."""
        self._found.clear()
        for owner in self.adopted[len(self.adopted) // 2 :]:
            if not any(file.offset or file.flight for file in owner.files):
                self.adopted.remove(owner)
                owner.disown()
        if self.adopted:
            self.look_at = 0.0  # as soon as these are done


class _Spool(_LineQueue):
    """A queue on disk: what this process wrote, after what ended ones left."""

    def __init__(self, directory: str, max_bytes: int, due_size: int, interval: float) -> None:
        try:
            _check_directory(directory)
            self._own = own = _claimed_writer(directory, max_bytes)
        except (OSError, ValueError) as error:  # ValueError: a path that the file system's encoding cannot hold
            raise _unwritable(directory, error) from error
        ledger = _Ledger("adopted", held=own.held)  # not of self: that would be a cycle
        super().__init__(ledger, _RejectedLog(os.path.join(directory, "rejected.log"), own.room.rejected_size))
        self._leftovers = _Leftovers(directory, own.name)
        self._due_size = due_size
        self._interval = interval  # seconds
        self._since = 0.0  # when the oldest record came that waits, or before
        self._notice_at = 0.0  # when to look again at our files and for others'
        self._warn_at = 0.0  # when to warn again of a disk that fails us
        self._echoes: "Set[bytes]" = set()  # lines that on_error tracked

    def put(self, line: bytes) -> int:
        own = self._own
        is_inner = own.writing._is_owned()
        with own.writing:
            if self._closed:
                raise _closed()
            if type(line) is _Echo:
                self._echoes.add(bytes(line))
            try:
                if not own.append(line, is_inner):
                    return 0
            except OSError as error:
                raise _unwritable(own.path(), error, [line]) from error
            waiting = own.written - own.taken()
            if waiting <= 1:
                self._since = _CLOCK.now()
            return max(1, waiting)

    def take_back(self, line: bytes) -> bool:
        return False  # what is on disk will be delivered

    def take(self, most: int) -> "List[Item]":
        items: "List[Any]" = super().take(most)
        if not items:
            self._since = _CLOCK.now()  # nothing could be had: do not come back at once
        for place, item in enumerate(items) if self._echoes else ():
            if item.text in self._echoes:
                self._echoes.discard(item.text)
                items[place] = item._replace(text=_Echo(item.text))
        return items

    def due_at(self) -> float:
        """As `_Queue` has it. Once a second it also looks at our files, and every few seconds for others'."""
        now = _CLOCK.now()
        if now >= self._notice_at:
            self._notice_at = now + _NOTICE_EVERY
            self._notice()
        waiting = self._own.written - self._own.taken()
        if self._leftovers.adopted or waiting >= self._due_size or self._own.settled() < self._own.taken():
            return 0.0
        return self._since + self._interval if waiting > 0 else float("inf")

    def mark(self) -> "Tuple[int, int]":
        settled = self._own.settled()  # first, so that it is never more than what was written
        return self._own.written, settled

    def close(self) -> "List[bytes]":
        with self._reading:
            if not self._closed:
                for file in filter(_SpoolFile.is_gone, self._own.files[:]):
                    self._lose(file)
                    self._refuse_flight(file)
            with self._own.writing:
                self._closed = True
                self._own.close()
            self._note(self._own)
            for owner in self._leftovers.adopted + [self._own]:
                owner.end()
        self._rejected.warn(True)
        return []

    def disown(self) -> None:
        for owner in [self._own] + self._leftovers.adopted:
            owner.disown()

    # What the lines are taken from

    def _source(self) -> "Optional[_Source]":
        source = self._leftover()  # what ended processes left comes before our own: it is older
        if source is None:
            self._leftovers.look()
            source = self._leftover()
        if source is None:
            source = self._own.unread()
            if source is not None and source.is_gone():  # what comes after it waits until it is lost
                self._notice_at, source = 0.0, None
        return source

    def _leftover(self) -> "Optional[_SpoolFile]":
        for owner in self._leftovers.adopted[:]:
            for file in owner.files:
                if file.has_more():
                    return file
            if any(map(_SpoolFile.is_done, owner.files)):
                self._note(owner)
            if not [file for file in owner.files if file.flight]:
                self._leftovers.adopted.remove(owner)
                owner.end()
        return None

    def _count(self, lines: "List[Any]") -> None:
        adopted = sum(line.source.owner is not self._own for line in lines)  # own ones count when they are written
        self.ledger.add({"adopted": adopted, "pending": adopted})

    def _settle(self, lines: "List[Any]") -> None:
        super()._settle(lines)
        for owner in {line.source.owner for line in lines}:
            self._note(owner)

    def _note(self, owner: "_Owner") -> None:
        try:
            owner.note()
        except OSError as error:
            self._warn("cannot note in %s.lock what is delivered, it may come twice: %s", owner.name, error)

    def _warn(self, message: str, *values: object) -> None:
        """Warn of a disk that fails us, once a minute."""
        if _CLOCK.now() >= self._warn_at:
            self._warn_at = _CLOCK.now() + _WARN_EVERY
            _log("warning", message, *values)

    def _unreadable(self, source: "Any", error: Exception) -> None:
        is_own = source.owner is self._own
        if getattr(error, "errno", None) in _NO_DESCRIPTORS or is_own and not source.is_gone():
            raise error  # another time
        if not is_own:  # else it will be lost, see _source()
            source.is_aside = True
            self._leftovers.set_aside(source.owner, source.path, error)

    def _notice(self) -> None:
        """See whether somebody removed our files, and look for others', unless lines are being taken just now."""
        if not self._reading.acquire(False):
            return
        try:
            if not self._closed:
                for file in filter(_SpoolFile.is_gone, self._own.files[:]):
                    self._lose(file)
                for owner in [self._own] + self._leftovers.adopted:
                    owner.keep_lock()
                self._leftovers.look()
        except OSError as error:
            self._warn("cannot look after the spool of %s.lock: %s", self._own.name, error)
        finally:
            self._reading.release()

    def _refuse_flight(self, file: "_SpoolFile") -> None:
        """Count as rejected what is in flight of a file that is gone, since the server can have it no more."""
        lines: "List[Any]" = list(file.flight.values())
        if lines:
            reason = "%s was removed by somebody" % _printable(file.path)
            self.settle(lines, AnalysysPythonSdkIllegalDataException(reason, _records([line.text for line in lines])))

    def _lose(self, file: "_SpoolFile") -> None:
        """Count as rejected what was in an own file that is gone, but for what is in flight."""
        lost, left = self._own.give_up(file)
        if lost > 0:
            reason = "%d records were in %s, which somebody removed" % (lost, _printable(file.path))
            error = AnalysysPythonSdkIllegalDataException(reason, _records(left[:lost]))
            self.ledger.refusals.append(error)  # first, as in the ledger's settle()
            self._own.lost[file.name] = lost
        file.end = file.ranges[0][0]  # last: nothing more is to be had of it


def _claimed_writer(directory: str, max_bytes: int) -> "_Writer":
    """Return a writer that has its lock. Where somebody who looks for leftovers was quicker, they have it: another."""
    for _ in range(100):
        writer = _Writer(directory, max_bytes)
        if _alone(directory, functools.partial(writer.claim, os.O_CREAT | os.O_EXCL)):
            return writer
    raise OSError(errno.EBUSY, "other processes took each file that was just made")


def _check_directory(path: str) -> None:
    """Make a directory for files of ours; raise OSError where it is another user's."""
    os.makedirs(path, 0o700, exist_ok=True)
    for status in (os.lstat(path), os.stat(path)) if hasattr(os, "geteuid") else ():
        if status.st_uid not in (os.geteuid(), 0):
            raise OSError(errno.EPERM, "the directory belongs to another user (uid %d)" % status.st_uid)
    if hasattr(os, "geteuid") and status.st_mode & stat.S_IWOTH and path not in _WARNED:
        _WARNED.add(path)
        _log("warning", "everybody may write to the directory %s: others can remove what is in it", _printable(path))


_WARNED: "Set[str]" = set()  # directories that were warned of, once a process


########################################################################################################################
# Sender: the one place that decides what an answer means for a batch: delivered, retry, split, refused for good
#
# The sender takes items from a queue and holds them as *parts*, each the items of one request, in the order in which
# they came. One thread at a time calls attempt(), which sends one part; whose turn it is, the state decides. It needs
# no lock: nobody else changes the parts, and what is settled, the queue counts under its own.
#
# A part that the server refuses is cut in halves until the offending record stands alone. A part on which the server
# *chokes* (it has the data and fails) may be at fault, or the server may be down; who can tell? So a part of several
# is cut after some failures and the order is kept; a record that stands alone then steps aside, and one part behind it
# is tried at once: if that gets through, the server is up, and the parts behind it follow; if not, both wait. After the
# back-off the first part is tried before another one behind it: in an outage all goes on in order. What has stood
# alone, has failed often, and saw others get through meanwhile, is given up.
########################################################################################################################


class _Outage:
    """Since when and why the server fails, and when to try again. Changed by who sends; read by anybody."""

    def __init__(self) -> None:
        import random

        self.since: "Optional[float]" = None  # `_CLOCK`; None while the last attempt succeeded
        self.not_before = 0.0  # end of the back-off
        self.reason = ""  # of the last failure
        self._was_answered = False  # the server was up once
        self._failures = 0  # in a row
        self._next_warning = 0.0
        self._next_cut = 0.0
        self._random = random.Random()  # its own seed, also in a forked child

    def failed(self, reason: str, wait: "Optional[float]" = None) -> None:
        """Note a failure, and when to try again: after *wait* seconds (0: at once), or a back-off with full jitter."""
        now = _CLOCK.now()
        self._failures += 1
        self.reason = reason
        if self.since is None:
            self.since = self._next_warning = now
        if wait is None:
            longest = min(_LAST_BACKOFF, _FIRST_BACKOFF * 2 ** min(self._failures - 1, 20))
            wait = self._random.uniform(_FIRST_BACKOFF, longest)
        self.not_before = now + wait

    def ease(self) -> None:
        """Begin anew with short back-offs: what is sent next is another request."""
        self._failures = 0

    def over(self) -> None:
        self._failures, self.since, self.not_before, self._was_answered = 0, None, 0.0, True

    def cut(self) -> None:
        """End a back-off now, though not too often."""
        now = _CLOCK.now()
        if now >= self._next_cut:
            self._next_cut = now + _CUT_EVERY
            self.not_before = 0.0

    def state(self) -> str:
        """Say why records wait."""
        since = self.since  # once: it may be over meanwhile
        if since is None:
            return "the server answers, it is not their turn yet" if self._was_answered else "no answer has come yet"
        return "the server has been failing for %.1f s (%s)" % (_CLOCK.now() - since, self.reason)

    def warn(self, ledger: "_Ledger") -> None:
        """Log an outage when it begins, then once a minute; none that keeps nobody waiting: close() may have come."""
        now = _CLOCK.now()
        pending = ledger.stats()["pending"] if self.since is not None and now >= self._next_warning else 0
        if pending:
            self._next_warning = now + _WARN_EVERY
            _log("warning", "analysys: %d records wait, %s, trying again", pending, self.state())


class _Part:
    """Items that go out in one request, and how the server choked on them."""

    def __init__(self, items: "List[Item]", overtaken: "Optional[bool]" = None) -> None:
        self.items = items
        self.failures = 0  # in a row, of this very part
        self.overtaken = overtaken  # whether others got through since its first failure; None: it never failed

    def stands_aside(self) -> bool:
        """Tell whether it is a record alone, on which the server choked so often that others go first."""
        return len(self.items) == 1 and (self.failures >= _CUT_AFTER or bool(self.overtaken))


class _Sender:
    """Sends what a queue holds, in order, one request an attempt()."""

    def __init__(self, transport: "_Transport", queue: "_Queue", most: int, timeout: float) -> None:
        self.most = most  # records a request
        self.timeout = timeout  # seconds a request
        self.took = 0.0  # seconds of the last one
        self.outage = _Outage()
        self.transport = transport
        self._queue = queue
        self._parts: "List[_Part]" = []
        self._next = 0  # which part comes next
        self._probe = 1  # which part is tried next where the first one failed
        self._limit = sys.maxsize  # records a request, learned from 413

    def attempt(self, deadline: float = float("inf")) -> None:
        """Send one part, if there is any, in the time until *deadline*; settle, cut or keep it."""
        self.took, part = 0.0, self._turn_to_next()
        if part is None:
            return
        if self.outage.since is not None:
            self._queue.ledger.add({"retries": 1})
        lines = [item[0] for item in part.items]
        began = _CLOCK.now()
        verdict = _ask(self.transport, self._queue.ledger, lines, min(self.timeout, deadline - began))
        self.took = _CLOCK.now() - began
        if verdict.kind == _RETRY:
            self._next = 0
            self.outage.failed(verdict.reason, verdict.wait)
        elif verdict.kind == _CHOKED:
            self._choked(part, verdict)
        else:
            was_up = self.outage.since is None
            self.outage.over()
            self._answered(part, verdict)
            if not was_up:  # a probe may have got through: now in order
                self._next = 0

    def _turn_to_next(self) -> "Optional[_Part]":
        """Return the part to send, taking more from the queue where all that is in flight stands aside."""
        if all(part.stands_aside() for part in self._parts) and len(self._parts) < _MOST_ASIDE:
            items = self._queue.take(self.most)
            if items:
                self._parts.append(_Part(items))
        if not self._parts:
            return None
        if self._next >= len(self._parts):
            self._next = 0
        part = self._parts[self._next]
        if len(part.items) > self._limit:  # from a 413: it is cut before it is sent
            part = self._cut(part, self._limit)
        return part

    def _cut(self, part: "_Part", number: int) -> "_Part":
        """Cut *part* in two where it stands, and return the first of them, of *number* items."""
        at, items = self._parts.index(part), part.items
        self._parts[at : at + 1] = [_Part(half, part.overtaken) for half in (items[:number], items[number:])]
        return self._parts[at]

    def _answered(self, part: "_Part", verdict: "_Verdict") -> None:
        size = len(part.items)
        if verdict.kind == _DELIVERED:
            self._settle(part)
            for other in self._parts:
                if other.overtaken is False:  # the server is up: failures of an outage count no longer
                    other.overtaken, other.failures = True, min(other.failures, 1)
        elif size > 1:  # refused or too large: which of them it is, the halves will tell
            if verdict.kind == _TOO_LARGE:
                self._limit = size // 2
            part.overtaken = None  # the server has answered: what it failed on before says nothing about the halves
            self._cut(part, size // 2)
        else:
            if self._limit == 1:  # it was this record that was too large, not the number of them
                self._limit = sys.maxsize
            self._refuse(part, "refused for good: " + verdict.reason)

    def _choked(self, part: "_Part", verdict: "_Verdict") -> None:
        """The server has *part* and fails, which may be the fault of either."""
        at, wait = self._parts.index(part), verdict.wait
        is_probe = at > 0 and self.outage.since is not None  # one behind the first, which waits for the server
        part.failures += 1
        part.overtaken = bool(part.overtaken)
        self._next = 0
        if len(part.items) > 1:  # nothing overtakes several: their order is kept, and they are cut in time
            self._probe = at or 1
            if part.failures >= _CUT_AFTER:
                self._cut(part, len(part.items) // 2)
                self.outage.ease()
        elif part.failures >= _GIVE_UP_AFTER and part.overtaken:
            self._refuse(part, "given up: others get through, but on this record the server fails: " + verdict.reason)
            self.outage.over()
            return
        elif is_probe:  # in vain: the next one is tried after the first
            self._probe = at + 1
        elif not part.stands_aside():
            self._next = at  # it may be the server's fault: the order is kept, for now
        else:  # see at once whether one part behind it gets through
            self._probe = at + 1 if at or self._probe >= len(self._parts) else self._probe
            if self._probe < len(self._parts):
                self._next, wait = self._probe, wait or 0.0
        self.outage.failed(verdict.reason, wait)

    def _settle(self, part: "_Part", error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        self._queue.settle(part.items, error)
        self._next, self._probe = self._parts.index(part), 1  # next comes what stood behind it
        del self._parts[self._next]

    def _refuse(self, part: "_Part", reason: str) -> None:
        lines = [item[0] for item in part.items]
        error = AnalysysPythonSdkIllegalDataException(reason, _records(lines))
        error.is_echo = any(isinstance(line, _Echo) for line in lines)
        self._settle(part, error)


def _ask(transport: "_Transport", ledger: "_Ledger", lines: "List[bytes]", timeout: float) -> "_Verdict":
    """Send *lines* in one request and say what became of them. Raises no error. Any thread may call it."""
    text = _array(lines)
    ledger.add({"requests": 1})
    verdict = transport.ask(_pack(text), timeout)
    if b'"$debug":1' in text or b'"$debug":2' in text:
        _log("info", "answer for %d records: %s, %s", len(lines), verdict.kind, verdict.reason)
    if verdict.kind == _TOO_LARGE and len(lines) == 1:
        return verdict._replace(kind=_REFUSED)
    return verdict


########################################################################################################################
# States and collecters: what a collecter has in one process, and thin compositions of the parts above
#
# A collecter is a configuration and, by process id, a *state*, which owns all that works: a queue, a sender and their
# thread; or a transport; or a log's file. Any thread may call it, and a signal handler or a __del__ in the middle of
# any call, in the same thread. So no state has a lock but a log, whose threads take turns to write. All else that
# several threads change is changed in one step (a phase, a turn, a deque, a dict); who waits looks at a condition, and
# each change has him look again (_Signal).
#
# A signal handler may also raise at any line. What was accepted before is not lost by that: the thread delivers it, or
# close(), or exit. And who closes a state takes what is left in one moment and tells of it in another: in between it is
# neither's alone, and close() returns it to whoever asks, until one has told(). Twice beats never.
########################################################################################################################


if TYPE_CHECKING:

    class _State(Protocol):
        """What a collecter has in one process. A forked child makes its own and disowns its parent's."""

        on_error: "OnError"  # who is told, at exit, of what is not delivered; None: the log

        @property
        def closed(self) -> bool:
            """Whether it takes no more records."""

        def put(self, line: bytes, urgent: bool) -> None:
            """Accept *line*, and see to it that it is delivered, at once where it is *urgent*; or raise."""

        def flush(self, timeout: "Optional[float]") -> None:
            """Return when all that was accepted is settled; raise where it is not within *timeout* seconds."""

        def close(self, timeout: "Optional[float]") -> "Optional[Exception]":
            """Take no more, flush, end; return the error that has what is not delivered in its ``records``.

            Again: goes on where it was interrupted, and returns the same until told() says that it is known.
            """

        def told(self) -> bool:
            """Note that what close() has returned is known; return whether nobody knew it before."""

        def stats(self) -> "Dict[str, int]":
            """Return the counts; they balance."""

        def hurry(self) -> None:
            """Make all that waits due, and cut a back-off short. Waits for nothing."""

        def abandon(self) -> None:
            """The collecter is gone, closed or not: deliver what is left, in the background or at exit, then end."""

        def disown(self) -> None:
            """Close, in a forked child, the descriptors of the parent. Takes no lock."""


def _close(state: "_State", timeout: "Optional[float]") -> None:
    """Close *state*; raise with what it could not deliver, but in one of the threads that do so at once."""
    problem = state.close(timeout)
    if problem is not None:
        try:
            raise problem
        except AnalysysPythonSdkException:  # from here on a signal handler's has *problem* as its context
            if state.told():
                raise


class _Signal:
    """Wakes threads that wait for a condition. Takes no lock, so that __del__ and signal handlers may notify.

    Each wait makes a lock of its own, so it is of the kind that the thread can wait for, whatever was patched since.
    """

    def __init__(self) -> None:
        self._sleepers: "Deque[Any]" = collections.deque()  # a locked lock each; whoever takes one out releases it
        self.threshold = 1  # of how many things that wait one more is worth a notify()

    def wait_for(self, condition: "Callable[[], Any]", deadline: float) -> bool:
        """Return whether *condition* came true before *deadline* (`_CLOCK`; infinity for none)."""
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            self._sleepers.append(sleeper)  # before looking, so that no change is missed
            try:
                if condition():
                    return True
                left = deadline - _CLOCK.now()
                if left <= 0:
                    return False
                _CLOCK.wait(sleeper, left)
            finally:
                try:
                    self._sleepers.remove(sleeper)
                except ValueError:
                    pass

    def notify(self) -> None:
        """Let all waiting threads look at their conditions again."""
        try:
            while True:
                self._sleepers.popleft().release()
        except IndexError:
            pass


class _Direct:
    """The state of a DefaultCollecter: no queue, one attempt in the caller's thread.

    While connections are kept, and nobody may ever call again, a thread waits for them to grow old. It ends with the
    last of them: the calls start it, and one that comes as it ends is seen by its last look. And it ends at exit, where
    hooks that run later may still track: a subinterpreter that ends with a thread ends the whole process.
    """

    on_error: "OnError" = None

    def __init__(self, url: str, request_timeout: float, ssl_context: "Any", headers: "Dict[str, str]") -> None:
        self.closed = False
        self._timeout = request_timeout
        self._ledger = _Ledger()
        self._transport = _Transport(url, ssl_context, headers)
        self._thread: "Optional[threading.Thread]" = None  # that one; it ends where it sees another one here
        self._ended = _Signal()

    def put(self, line: bytes, urgent: bool) -> None:
        if self.closed:
            raise _closed()
        self._ledger.add(_ACCEPTED)
        verdict = None
        try:
            verdict = _ask(self._transport, self._ledger, [line], self._timeout)
        finally:
            is_delivered = verdict is not None and verdict.kind == _DELIVERED
            self._ledger.add(_outcome(1, "delivered" if is_delivered else "rejected"))
        self._watch()
        if verdict.kind == _REFUSED:
            raise AnalysysPythonSdkIllegalDataException("refused for good: " + verdict.reason, [_decode(line)])
        if not is_delivered:
            raise AnalysysPythonSdkNetworkException("not delivered: " + verdict.reason, [_decode(line)])

    def flush(self, timeout: "Optional[float]") -> None:
        """Nothing waits: each call returns after its record is delivered."""

    def close(self, timeout: "Optional[float]") -> None:  # all is told by the calls
        self.closed, thread = not _is_exit(), self._thread
        self._transport.close()
        self._ended.notify()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(timeout)

    def told(self) -> bool:
        return True

    def stats(self) -> "Dict[str, int]":
        return self._ledger.stats()

    def hurry(self) -> None:
        """Nothing waits."""

    def abandon(self) -> None:
        self.close(0)

    def disown(self) -> None:
        self._transport.disown()

    def _is_over(self) -> bool:
        return self.closed or _is_exit()

    def _watch(self) -> None:
        watching = self._thread
        if watching is not None and watching.is_alive() or self._transport.sweep() is None or not _threads_run():
            return
        if not _register(self):
            return
        try:
            thread = threading.Thread(target=self._sweep, name="analysys-sweeper", daemon=True)
            self._thread = thread  # first: what interrupts start() may come when the thread runs already
            thread.start()
        except (RuntimeError, MemoryError):  # no more threads: the next call tries again
            pass

    def _sweep(self) -> None:
        me, left = threading.current_thread(), self._transport.sweep()
        while left is not None and self._thread is me and not self._is_over():
            self._ended.wait_for(self._is_over, _CLOCK.now() + min(left, _LOOK_EVERY))  # some die sooner
            left = self._transport.sweep()
        if self._thread is not me:
            return
        _OPEN.pop(self, None)  # first: who sees no thread registers it again
        self._thread = None
        if not self.closed:
            self._watch()


class _Turn:
    """Whose turn something is: one thread's at a time. Nobody waits for it, so it cannot deadlock.

    Taken and given in one step each, so that an exception out of a signal handler cannot lose it.
    """

    def __init__(self) -> None:
        self._holder: "Dict[str, int]" = {}  # empty, or which thread

    def take(self) -> bool:
        """Return whether this thread has the turn, now if not before."""
        return self._holder.setdefault("thread", threading.get_ident()) == threading.get_ident()

    def give(self) -> None:
        if self.is_mine():
            self._holder.clear()

    def is_free(self) -> bool:
        return not self._holder

    def is_mine(self) -> bool:
        return self._holder.get("thread") == threading.get_ident()


# The phases of a _Worker. They only grow, but that one is dropped whose close() was interrupted.
_TAKES, _DROPPED, _CLOSING, _ENDED = range(4)


class _Worker:
    """The state of a BatchCollecter: a queue, a sender, and the thread that brings them together.

    Any thread puts; it wakes the sending thread only where enough wait (the signal's threshold). The sending thread
    loops over _step(), which has the turn while it sends and reports; in between it sleeps on `_changed`. So do flush()
    and those who wait for room: each change notifies all, and each looks at its own condition again. Where no thread
    can be started (at exit, under WebAssembly), whoever puts or flushes runs _step() in its place.

    No lock is held here at all. The queue guards itself; the turn is never waited for; all else is single assignments:
    `_phase` (see there), `_goal` is written by who has the turn, and who wants it higher sets `_hurried` after its put,
    which is cleared before the goal is read. A __del__, a signal handler or a fork may come in anywhere.

    The thread holds no reference to the collecter, so that a dropped collecter is noticed (see abandon()). Nor does it
    hold on_error, which may lead to the collecter, before that is dropped: until then its configuration holds both.
    """

    def __init__(
        self, queue: "_Queue", sender: "_Sender", due_size: int, patience: "Optional[float]", on_error: "OnError"
    ) -> None:
        self._on_error: "Callable[[], OnError]" = _weakly(on_error)
        self._queue = queue
        self._sender = sender
        self._due_size = due_size
        self._patience = patience  # seconds to wait for room; None: it depends
        self._phase = _TAKES
        self._goal = 0  # all up to this many accepted records are due
        self._hurried = False  # the goal is to be set anew
        self._changed = _Signal()  # its threshold is out of reach while the thread is awake or backs off
        self._turn = _Turn()  # to send and to report
        self._telling = _Turn()  # to tell what close() has left: once, so it is not given back
        self._thread: "Optional[threading.Thread]" = None

    @property
    def closed(self) -> bool:
        return self._phase >= _CLOSING

    @property
    def on_error(self) -> "OnError":
        return self._on_error()

    @on_error.setter
    def on_error(self, on_error: "OnError") -> None:
        self._on_error = lambda: on_error

    # What callers do

    def put(self, line: bytes, urgent: bool) -> None:
        if self._phase >= _CLOSING:
            raise _closed()
        if self._thread is None:
            _register(self)  # first: a signal handler may raise as soon as the queue has it
        waiting = self._queue.put(line) or self._wait_for_room(line)
        # close() sets the phase, then empties the queue. So a line that came too late to be seen there sees the phase
        # here, and exactly one of the two has it: who takes it out of the queue.
        if self._phase >= _CLOSING and self._queue.take_back(line):
            self._changed.notify()
            raise _closed()
        if urgent:
            self._hurried = True
        elif self._thread is not None and waiting < self._changed.threshold:
            return
        self._wake()
        if self._living() is None and not self.begin():
            self._finish()

    def flush(self, timeout: "Optional[float]") -> None:
        deadline = float("inf") if timeout is None else _CLOCK.now() + timeout
        goal, is_settled = self._queue.mark()[0], False  # is_settled: as it was seen last

        # Settled is not enough: it returns when what was refused is told, too. But it waits for no telling of its own
        # thread's (an on_error that flushes), and once it saw its records settled it raises no more.
        def is_over() -> bool:
            nonlocal is_settled
            accepted, settled = self._queue.mark()  # close() may have had put() take a record back, hence min()
            is_settled = settled >= min(goal, accepted)
            return is_settled and not self._queue.ledger.refusals or self._phase >= _ENDED

        while not is_over() and not self._turn.is_mine() and _CLOCK.now() < deadline:
            self.hurry()  # again each second, to cut a back-off that began meanwhile
            patience = _CUT_EVERY
            if self._living() is None:
                self.begin(deadline)
                patience = max(0.01, self._sender.outage.not_before - _CLOCK.now())
            if self._changed.wait_for(is_over, min(deadline, _CLOCK.now() + patience)):
                break
        if not is_settled:  # else an on_error takes its time, which is not the records'
            message = "%d records are not delivered: %s" % (self.stats()["pending"], self._sender.outage.state())
            raise AnalysysPythonSdkNetworkException(message)

    def close(self, timeout: "Optional[float]") -> "Optional[Exception]":
        # Ctrl-C may end this anywhere: the next close() goes on from there, and all is given back until it is told.
        self._phase = max(self._phase, _CLOSING)
        deadline, why = float("inf") if timeout is None else _CLOCK.now() + timeout, ""
        try:
            self.flush(timeout)
        except AnalysysPythonSdkNetworkException:
            why = self._sender.outage.state()
        self._phase, thread = _ENDED, self._living()
        # A queue on disk stays the thread's until its request is over, so that nobody sends the same meanwhile.
        left = [] if self._queue.is_durable and thread is not None else self._queue.close()
        self._changed.notify()
        if thread is None:
            self._end()
        elif not why and not self._turn.is_mine():
            thread.join(max(0.0, min(deadline - _CLOCK.now(), _LONGEST_WAIT)))
        if not left:
            self.told()
        if not self._telling.is_free():
            return None
        message = "%d records are not delivered: %s" % (len(left), why or "they came while the collecter was closed")
        return AnalysysPythonSdkNetworkException(message, _records(left))

    def told(self) -> bool:
        _OPEN.pop(self, None)
        return self._telling.take()

    def stats(self) -> "Dict[str, int]":
        return self._queue.ledger.stats()

    def hurry(self) -> None:
        self._hurried = True
        self._sender.outage.cut()
        self._wake()

    def abandon(self) -> None:
        if self._phase < _ENDED:  # also where a close() was interrupted
            self._phase = _DROPPED
        self._wake()
        if self._living() is None and self._is_finished():
            self._end()

    def disown(self) -> None:
        self._sender.transport.disown()
        self._queue.disown()

    def begin(self, deadline: float = float("inf")) -> bool:
        """Start the thread; where none can be, send in this one what is due. False: our exit hook has run already."""
        will_exit = _register(self)
        # Two callers may come here at once: the turn lets one of them start the thread. It is kept until `_thread` is
        # set, so that the thread and the loop below, which sends in the caller's, never send side by side.
        if self._turn.is_free():
            try:
                if not self._turn.take():
                    return will_exit
                if self._thread is not None and not self._thread.is_alive():
                    self._thread = None
                if self._thread is None and will_exit and _threads_run():
                    thread = threading.Thread(target=self._run, name=_SENDER, daemon=True)
                    self._thread, self._changed.threshold = thread, 0
                    thread.start()
            except BaseException as error:
                begun = self._thread
                if begun is None or not begun.is_alive():  # else it had begun when a signal handler raised
                    self._thread = None
                if not isinstance(error, (RuntimeError, MemoryError)):
                    raise
            finally:
                self._turn.give()
                self._changed.notify()
        while self._thread is None and _CLOCK.now() < deadline and self._step(deadline):
            pass
        return will_exit

    def _finish(self) -> None:
        """Deliver in an exit hook that runs after ours: nobody else will. Raise with what cannot be delivered."""
        try:
            self.flush(_EXIT_TIMEOUT)
        except AnalysysPythonSdkNetworkException:
            _close(self, 0)

    def _wait_for_room(self, line: bytes) -> int:
        """Put *line* when there is room, and return what put() does; raise where there is none for too long."""
        waiting = 0

        def is_over() -> bool:
            nonlocal waiting
            waiting = self._queue.put(line)
            return waiting > 0 or self.closed or self._sender.outage.since is not None

        self._hurried = True  # a queue without room is full, also where slots are free and the line takes more
        if self._living() is None:
            self.begin()
        self._wake()
        patience, advice = self._patience_here()
        self._changed.wait_for(is_over, _CLOCK.now() + patience)
        if waiting:
            return waiting
        if self.closed:
            raise _closed()
        why = self.stats()["pending"], self._sender.outage.state(), advice
        message = "the queue is full: %d records wait; %s%s" % why
        raise AnalysysPythonSdkNetworkException(message, map(_decode, line.splitlines()))

    def _patience_here(self) -> "Tuple[float, str]":
        """Return how many seconds this thread may wait for room, and advice where that is not the usual."""
        if self._turn.is_mine():  # it would wait for itself
            return 0.0, ""
        if self._patience is not None:
            return self._patience, ""
        events = sys.modules.get("asyncio.events")
        if events is not None and events._get_running_loop() is not None:
            ways = "a spool (spool_path), a larger queue_max_size, or in a notebook queue_timeout"
            return 0.0, "; a call in a running event loop does not wait for room: give %s" % ways
        return self._sender.timeout, ""

    def _wake(self) -> None:
        if self._changed.threshold:  # 0: the thread is not at work yet, so each put() looks whether it lives
            self._changed.threshold = sys.maxsize
        self._changed.notify()

    def _living(self) -> "Optional[threading.Thread]":
        """Return the thread; None where there is none, or it died as it was born: no memory, a tracer that raises."""
        thread = self._thread
        is_dead = thread is not None and self._turn.is_free() and not thread.is_alive()  # its start has the turn
        return None if is_dead else thread

    # What the sending thread does

    def _run(self) -> None:
        me = threading.current_thread()
        try:
            self._changed.threshold = sys.maxsize
            while True:
                if self._thread is None:  # what interrupted start() took us for one that had not begun
                    self._thread = me
                if self._thread is not me:  # and meanwhile there is another
                    return
                if self._is_finished():
                    break
                if not self._step():
                    self._sleep()
            self._end()
        finally:
            if self._thread is me:
                self._thread = None
        # A __del__ may have put a line after our last look, and it woke a thread that was about to end. It looked at
        # `_thread` after its put, we look at the queue after `_thread`: at least one of us sees the other.
        if self._phase == _DROPPED and not self._is_finished():
            self.begin()

    def _step(self, deadline: float = float("inf")) -> bool:
        """Send one request and tell what was refused, if that is due and nobody else is at it; return whether."""
        if not self._is_due():  # which it is not inside a step of this thread
            return False
        # take() is inside the try: an exception out of a signal handler may come right after it, and give() gives back
        # only what is this thread's.
        try:
            if not self._turn.take():
                return False
            if self._hurried:
                self._hurried = False  # first: who hurries from now on hurries the next step
                self._goal = self._queue.mark()[0]
            try:
                self._sender.attempt(deadline)
            except Exception as error:  # a disk that fails: the thread lives on
                self._sender.outage.failed("%s: %s" % (type(error).__name__, error))
            self._changed.notify()
            self._sender.outage.warn(self._queue.ledger)
            self._report()
        finally:
            self._turn.give()
            self._changed.notify()
        return True

    def _sleep(self) -> None:
        """Wait until something is due, or may be sooner than it seemed.

        A put() is worth waking for only where it changes when that is: the first record of an empty queue starts the
        interval, the one that makes a batch ends it. The threshold is out of reach of the others, which cost nothing.
        """
        at = self._due_at() if self._turn.is_free() else float("inf")  # it wakes us when it is given
        if self._sender.outage.not_before > _CLOCK.now():
            self._changed.threshold = sys.maxsize  # more records end no back-off
        else:
            self._changed.threshold = 1 if self._queue.due_at() == float("inf") else self._due_size

        def is_over() -> bool:
            return self._is_finished() or self._is_due() or self._turn.is_free() and self._due_at() < at

        self._sender.transport.sweep()
        # Not for ever: an exception out of a signal handler may have cut a put() before it woke us, and idle
        # connections grow old.
        nap = _NOTICE_EVERY if self._queue.is_durable else _LOOK_EVERY  # a disk is looked after
        self._changed.wait_for(is_over, min(at, _CLOCK.now() + nap))
        self._changed.threshold = sys.maxsize

    def _due_at(self) -> float:
        """Return when the next request is due."""
        accepted, settled = self._queue.mark()
        at = self._queue.due_at()
        in_haste = self._hurried or settled < self._goal or self._phase != _TAKES or self._thread is None
        if accepted > settled and in_haste:
            at = 0.0
        return max(at, self._sender.outage.not_before)

    def _is_due(self) -> bool:
        return self._phase < _ENDED and self._turn.is_free() and self._due_at() <= _CLOCK.now()

    def _is_finished(self) -> bool:
        """Tell whether there is nothing more to send, ever."""
        if self._phase == _DROPPED:
            accepted, settled = self._queue.mark()
            return settled >= accepted
        return self._phase >= _ENDED

    def _report(self) -> None:
        """Tell of records that were given up. Under no lock; the turn keeps it to one thread."""
        refusals = self._queue.ledger.refusals
        while refusals:
            error = refusals[0]  # flush() waits until it is gone
            try:
                on_error = self.on_error
                if on_error is not None and not error.is_echo:
                    _tell(on_error, error, error.records)
                else:
                    _log("error", "%d records are lost: %s", len(error.records), error)
            finally:
                refusals.popleft()

    def _end(self) -> None:
        if self._queue.is_durable:
            self._queue.close()
            self._report()
        self._sender.transport.close()
        if self._phase == _DROPPED:  # else told() does it
            _OPEN.pop(self, None)


def _weakly(held: "Any") -> "Callable[[], Any]":
    """Return what returns *held* as long as somebody else holds it, or for ever where that cannot be known."""
    import weakref

    try:
        return weakref.ref(held)
    except TypeError:  # None, or slots without a place for it
        return lambda: held


@functools.lru_cache(None)  # once
def _warn_of_uwsgi() -> None:
    advice = "set `enable-threads = true` in its configuration. Until then each call sends in its own thread"
    _log("warning", "analysys: uWSGI runs no threads: %s", advice)


def _threads_run() -> bool:
    """Tell whether a thread may be started and would run.

    Under uWSGI it runs only where that is told so. And its master forks at any time, by C's fork() and without the
    GIL: a child of the moment in which a thread of ours holds it waits for ever. So the master has no thread.
    """
    uwsgi: "Any" = sys.modules.get("uwsgi")
    if not hasattr(uwsgi, "worker_id"):
        return True
    if not getattr(uwsgi, "has_threads", 1):
        _warn_of_uwsgi()
        return False
    return bool(uwsgi.worker_id() or uwsgi.mule_id())


class _LogFile:
    """Appends lines to the file of the hour or day, which any number of threads and processes share.

    Threads take turns by `_lock`, held for a whole write; processes by the file's own lock (`_SharedFile`), inside it.
    The buffer needs none: put() appends, and only who writes removes, from the front and what is written. A call from
    inside a write (a signal handler, ``__del__``) must not wait for the write that it interrupts, whose thread is its
    own: it leaves its line in the buffer, and that write sees to it at its end. So nothing ever waits for itself.

    An exception out of a signal handler may leave behind what tells that a write is under way: `_WRITES.log`, or up to
    Python 3.10 the lock. So only the two together tell it, and the next write of that thread lets go of the lock.
    """

    on_error: "OnError" = None

    clock = staticmethod(time.time)  # wall clock; replaceable for tests

    def __init__(self, directory: str, pattern: str, batch: int) -> None:
        self.pid = os.getpid()  # of the process whose it is
        self.ledger = _Ledger()
        # Guards all below but _buffer. Re-entrant, so that it knows whose it is, and may be let go of by that thread.
        self._lock: "Any" = threading.RLock()
        self._directory = directory
        self._pattern = pattern  # for strftime
        self._batch = batch
        self._buffer: "List[bytes]" = []  # lines accepted and not yet written; its steps are atomic
        self._since = self._until = 0.0  # the quarter of an hour for which _file is known: time zones differ by no less
        self._file = _SharedFile("", _open_lines)
        self._written = 0  # lines that never waited
        self.closed = False

    def put(self, line: bytes, urgent: bool) -> None:
        """Accept *line* and write what makes a batch; where that fails, raise, keep what waited and not *line*."""
        if self.closed:
            raise _closed()
        # The first one that waits has it written at exit; where exit is over, nothing may wait.
        is_due = len(self._buffer) + 1 >= self._batch or not self._buffer and not _register(self)
        if is_due and not _WRITES.are_under_way():
            self._write(line)
            return
        self.ledger.add(_ACCEPTED)
        self._buffer.append(line)
        if is_due:  # inside a write: at its end, or at exit if that fails
            _register(self)
            _WRITES.postponed += (self,)
        if self.closed:  # by another thread, while we were here
            _close(self, None)

    def flush(self, timeout: "Optional[float]" = None) -> None:
        """Write what waits, or raise and keep it."""
        if self._buffer and _WRITES.are_under_way():
            _WRITES.postponed += (self,)
        elif self._buffer:
            self._write(b"", _LOCK_TIMEOUT if timeout is None else min(timeout, _LOCK_TIMEOUT))

    def write_postponed(self) -> None:
        """Write what waits, once no write is under way that it could interrupt."""
        if self._buffer and self.pid == os.getpid():  # else we were forked inside that write
            self._write(b"", is_postponed=True)

    def close(self, timeout: "Optional[float]" = None) -> "Optional[Exception]":
        """Write what waits, then take no more; where that fails, stay open."""
        try:
            self.flush(timeout)
        except AnalysysPythonSdkFileException as error:
            error.records = [_decode(line) for line in list(self._buffer)]
            return error
        self.closed = True
        if not self._buffer:  # else a write that this call interrupts sees to it, or exit
            _OPEN.pop(self, None)
        if not self.is_writing() and self._lock.acquire(False):  # or else who is writing does it
            try:
                self.disown()
            finally:
                self._lock.release()
        return None

    def told(self) -> bool:
        return True  # what is not written may be yet: it is told again

    def take_back(self, lines: bytes) -> None:
        """Take back *lines*, which were written last, by one put()."""
        with self._lock:
            self._written -= self._file.take_back(lines)

    def is_writing(self) -> bool:
        """Tell whether this thread is inside a write of this log."""
        return _WRITES.log is self and bool(self._lock._is_owned())

    def hurry(self) -> None:
        """Nothing to hurry: there is no thread."""

    def abandon(self) -> None:
        """The collecter is gone: write what is left, at exit if it cannot be now."""
        if _is_exit():  # which has tried
            return
        problem: "Any" = self.close(1.0)
        if problem is not None:
            _log("error", "%d records wait for exit: %s", len(problem.records), problem)

    def disown(self) -> None:
        self._file.close()

    def stats(self) -> "Dict[str, int]":
        counts, written = self.ledger.stats(), self._written
        counts["accepted"] += written
        counts["delivered"] += written
        return counts

    def _write(self, line: bytes, patience: float = _LOCK_TIMEOUT, is_postponed: bool = False) -> None:
        """Write what waits and then *line*, which may be empty; then, but for a postponed write, what was postponed."""
        while self._lock._is_owned():  # left behind; other threads wait for it
            self._lock.release()
        outer = _WRITES.log  # which may not have its lock yet
        try:
            _WRITES.log = self
            with self._lock:
                note, lines = self._note_line, line
                if self._buffer or not line:
                    waited = self._buffer[:]
                    note = functools.partial(self._note_lines, len(waited), line)
                    lines = b"".join(waited + [line])
                now = self.clock()
                if not self._since <= now < self._until:
                    self._turn_to(now)
                try:
                    self._file.append(lines, note, patience)
                except (OSError, ValueError) as error:  # ValueError: a path that the file system cannot hold
                    raise _unwritable(self._file.path, error, [line] if line else ()) from error
                if self.closed:
                    self.disown()
        finally:
            _WRITES.log = outer
            if _WRITES.postponed and not is_postponed:
                _write_postponed()

    def _note_line(self) -> None:
        """Note that a line is written that never waited. A plain number will do under the lock, and costs less."""
        self._written += 1

    def _note_lines(self, waited: int, line: bytes) -> None:
        """Note that *waited* lines of the buffer are written, and *line* if there is one."""
        del self._buffer[:waited]
        self.ledger.settle(waited)
        if line:
            self._note_line()

    def _turn_to(self, now: float) -> None:
        """Turn to the file of the hour or day."""
        path = os.path.join(self._directory, time.strftime(self._pattern, time.localtime(now)))
        if self._file.path != path:
            self.disown()
            self._file = _SharedFile(path, _open_lines)
        self._since = now // 900 * 900
        self._until = self._since + 900


class _Writes(threading.local):
    log: "Optional[_LogFile]" = None  # the one into which this thread writes just now
    postponed: "Tuple[_LogFile, ...]" = ()  # what it is to flush when that write is over

    def are_under_way(self) -> bool:
        """Tell whether this thread is inside a write, and not a child of a fork inside one, which never comes back."""
        return self.log is not None and self.log.pid == os.getpid() and self.log.is_writing()


_WRITES = _Writes()


def _write_postponed() -> None:
    """Write what calls from inside a write have left; where that is so in each of these writes too, the rest waits."""
    for _ in range(100):
        logs, _WRITES.postponed = _WRITES.postponed, ()
        for log in set(logs):
            try:
                log.write_postponed()
            except AnalysysPythonSdkFileException as error:
                _log("error", "records wait for the next write: %s", error)
        if not _WRITES.postponed:
            break


class _Collecter:
    """What the collecters share: a configuration that can be pickled, and a state for each process.

    A forked child must not touch what its parent had at the moment of the fork: queued records, locks that a thread of
    it held, connections, descriptors. So each process has a state of its own, made when it is first asked for. Which
    process this is, is asked at each call: some forks are made behind Python's back (uWSGI, a C library).
    """

    def _start(self, config: "Record", closed: bool = False) -> None:
        self._config = config
        self._closed = closed
        self._states: "Dict[int, _State]" = {}
        _hook_fork()  # first: what the first state makes ready is what no fork may come into
        _ALL_STATES[id(self._states)] = self._states
        self._state()

    def uploadData(self, record: "Record") -> None:
        """Take a copy of one record; what that means is the collecter's to say."""
        try:
            line, urgent = _line(record), record["xwhat"] == _ALIAS
        except Exception as error:
            raise _illegal("record", record, "must be JSON and have the key xwhat: %s" % error) from None
        self._put(line, urgent)

    def _put(self, line: bytes, urgent: bool) -> None:
        if _TELLING and (os.getpid(), threading.get_ident()) in _TELLING:
            line = _Echo(line)
        (self._states.get(os.getpid()) or self._state()).put(line, urgent)

    def flush(self, timeout: "Optional[float]" = 10) -> None:
        """Return when all records accepted so far are delivered, refused for good or written; raise where they are not.

        *timeout* bounds the call in all, in seconds; None waits without limit.
        """
        self._state().flush(_check("timeout", timeout))

    def close(self, timeout: "Optional[float]" = 10) -> None:
        """Flush and end. What could not be delivered is in the exception's ``records``. Again: does nothing."""
        seconds = _check("timeout", timeout)
        state = self._state()
        try:
            _close(state, seconds)
        finally:
            self._closed = state.closed

    def stats(self) -> "Dict[str, int]":
        """Return the counts of this process: at any moment accepted (+ adopted) = delivered + rejected + pending."""
        return self._state().stats()

    def __del__(self) -> None:
        try:
            states = self.__dict__.get("_states", {})
            _ALL_STATES.pop(id(states), None)
            state = states.get(os.getpid())
            if state is not None:
                state.on_error = self._config.get("on_error")  # which the state holds from here on
                state.abandon()
        except Exception:
            if sys is not None and not sys.is_finalizing():  # else what we need is gone, and our exit hook has run
                raise

    def __getstate__(self) -> "Record":
        if self._config.get("ssl_context") is not None:
            raise TypeError("a collecter with an ssl_context cannot be pickled: make it in the worker process")
        return {name: value for name, value in self.__dict__.items() if name != "_states"}  # a subclass's, too

    def __setstate__(self, pickled: "Record") -> None:
        self.__dict__.update(pickled)
        self._start(self._config, self._closed)

    def _new_state(self) -> "_State":
        """Make what it has in this process, by its configuration."""
        raise NotImplementedError

    def _state(self) -> "_State":
        pid = os.getpid()
        return self._states.get(pid) or self._new_process(pid)

    def _new_process(self, pid: int) -> "_State":
        # In a child of a fork no lock of ours may be taken before this: some thread of the parent may hold it for ever.
        # So two threads may each make a state, and one of the two stays.
        fresh = self._new_state()
        if self._closed:
            fresh.close(0)
        state = self._states.setdefault(pid, fresh)  # one step
        if state is not fresh:
            fresh.close(0)
        _disown(self._states)
        return state


def _http_config(
    server_url: str, request_timeout: "Optional[float]", ssl_context: "Optional[ssl.SSLContext]", headers: "Any"
) -> "Record":
    """Check the arguments that concern HTTP and return them as a part of the configuration."""
    if ssl_context is not None:
        import ssl

        if not isinstance(ssl_context, ssl.SSLContext):
            raise _illegal("ssl_context", ssl_context, "must be an ssl.SSLContext or None")
    seconds = _REQUEST_TIMEOUT if request_timeout is None else request_timeout
    return {
        "url": _url(server_url),
        "request_timeout": _check("request_timeout", seconds, "seconds"),
        "ssl_context": ssl_context,
        "headers": _http_headers(headers),
    }


class DefaultCollecter(_Collecter):
    """Sends each record at once, in the caller's thread, in one request and one attempt.

    The call returns after the server accepted the record. It raises AnalysysPythonSdkNetworkException where the record
    is not delivered and AnalysysPythonSdkIllegalDataException, with the server's message, where the server refused it
    for good; both have it in ``records``.

    - *server_url*: ``http(s)://host[:port][/path]``; ``/up`` is appended unless it is there.
    - *request_timeout*: seconds for a whole request; None: 10.
    - *ssl_context*: an `ssl.SSLContext`, for a private CA; certificates and host names are verified without one.
    - *headers*: dict of str to str, added to each request.
    """

    def __init__(
        self,
        server_url: str,
        request_timeout: "Optional[float]" = None,
        *,
        ssl_context: "Optional[ssl.SSLContext]" = None,
        headers: "Optional[Dict[str, str]]" = None
    ) -> None:
        self._start(_http_config(server_url, request_timeout, ssl_context, headers))

    def _new_state(self) -> _Direct:
        return _Direct(**self._config)


class BatchCollecter(_Collecter):
    """Takes records into a queue and sends them in batches from a background thread, in order.

    A request goes out when *queue_cache_max_size* records wait, *max_interval_time* seconds after the oldest of them
    came, when the queue is full, and at once for an alias; it carries at most *collecter_max_size* records. What is not
    delivered is sent again until it is; what the server refuses for good goes to ``on_error(exception, records)``, or
    to the log. Delivery is at least once.

    A full queue holds the caller back until there is room, at most *queue_timeout* seconds, and raises
    AnalysysPythonSdkNetworkException at once while the server is failing; the record that was not taken is in its
    ``records``.

    - *queue_max_size*: records in the queue, the batch in flight included; one of over 16 KiB counts for each 16 KiB
      begun.
    - *queue_timeout*: seconds from 0 that a call waits for room; None: *request_timeout*, but 0 where an asyncio event
      loop runs in the calling thread.
    - *spool_path*: a directory on a local disk. With it each record is in a file before the call returns, and leaves
      the disk when the server has it; what a process leaves is delivered by the next one that uses the directory.
      *queue_max_size* does not apply; *spool_max_bytes* bounds the files of all processes together.
      Close and exit leave on disk what is not delivered and raise nothing. Refused records end in ``rejected.log``.
    - *server_url*, *request_timeout*, *ssl_context*, *headers*: as for DefaultCollecter.
    """

    def __init__(
        self,
        server_url: str,
        max_interval_time: float = 15,
        queue_cache_max_size: int = 10,
        collecter_max_size: int = 100,
        queue_max_size: int = 1000,
        request_timeout: "Optional[float]" = None,
        *,
        ssl_context: "Optional[ssl.SSLContext]" = None,
        headers: "Optional[Dict[str, str]]" = None,
        queue_timeout: "Optional[float]" = None,
        spool_path: "Union[str, os.PathLike[str], None]" = None,
        spool_max_bytes: int = 1 << 30,
        on_error: "OnError" = None
    ) -> None:
        config = _http_config(server_url, request_timeout, ssl_context, headers)
        config["interval"] = _check("max_interval_time", max_interval_time, "seconds")
        config["due_size"] = _check("queue_cache_max_size", queue_cache_max_size, "size")
        config["request_size"] = _check("collecter_max_size", collecter_max_size, "size")
        config["queue_size"] = _check("queue_max_size", queue_max_size, "size")
        config["queue_timeout"] = _check("queue_timeout", queue_timeout)
        config["spool_path"] = None if spool_path is None else _check("spool_path", spool_path, "log_path")
        config["spool_max_bytes"] = _check("spool_max_bytes", spool_max_bytes, "size")
        config["on_error"] = _check("on_error", on_error)
        self._start(config)

    def _new_state(self) -> _Worker:
        queue: "_Queue"
        config = self._config
        due_size, spool_path = config["due_size"], config["spool_path"]
        transport = _Transport(config["url"], config["ssl_context"], config["headers"])
        if spool_path is None:
            due_size = min(due_size, config["queue_size"])  # a full queue is due, too
            queue = _MemoryQueue(config["queue_size"], due_size, config["interval"])
        else:
            queue = _Spool(spool_path, config["spool_max_bytes"], due_size, config["interval"])
        sender = _Sender(transport, queue, config["request_size"], config["request_timeout"])
        worker = _Worker(queue, sender, due_size, config["queue_timeout"], config["on_error"])
        if spool_path is not None:
            worker.begin(_CLOCK.now())  # for what ended processes have left there; the caller does not send it
        return worker


class LogCollecter(_Collecter):
    """Writes each record as one line of JSON to ``datas_YYYYMMDDHH.log`` in *log_path*, by local time.

    Any number of threads and processes may write to one directory, on a local file system. `python3 analysys.py upload`
    delivers the files. A write that fails raises AnalysysPythonSdkFileException and has not taken its record.

    - *is_batch*: bool; write *batch_num* records together. The rest is written by flush, close and a normal exit.
    - *general_rule*: "hour", or "day" for ``datas_YYYYMMDD.log``, in any case.
    """

    def __init__(
        self,
        log_path: "Union[str, os.PathLike[str]]",
        is_batch: bool = False,
        batch_num: int = 20,
        general_rule: str = "hour",
    ) -> None:
        batch = _check("batch_num", batch_num, "size")
        self._start(
            {
                "directory": _check("log_path", log_path),
                "pattern": _check("general_rule", general_rule),
                "batch": batch if _check("is_batch", is_batch) else 1,
            }
        )

    def _new_state(self) -> _LogFile:
        return _LogFile(**self._config)


########################################################################################################################
# Process hooks: exit and fork
########################################################################################################################

# Each hook is registered once a module, when it is first needed. At exit all that is open is closed, within ten seconds
# together; hooks run in the reverse order of their registration, so one that runs after ours may still track: it finds
# `_HOOKS` false, and its call delivers by itself. At a fork the child lets go of its parent's descriptors; all else it
# finds out by its process id, at its next call, since not every fork runs hooks.
#
# What is left must be told however often a signal handler raises, and wherever. So an attempt at exit that is ended by
# an exception is made again from its beginning. That harms nobody, since each state knows how far it came: it stays in
# `_OPEN`, and its close() returns what it has left, until told() notes that somebody knows.

# A module that is reloaded keeps what it has here: the collecters that there are stay.
#
# States with records that are not delivered, of this process and, in a forked child, of its parent -> process id. Not
# weak: they outlive their collecters until they are done. The steps of a dict are atomic.
_OPEN: "Dict[_State, int]" = globals().get("_OPEN", {})
_ALL_STATES: "Dict[int, Dict[int, _State]]" = globals().get("_ALL_STATES", {})  # of each collecter, by their id()
_HOOKS: "Dict[int, bool]" = {}  # by process: whether its exit hook is still to run


def _register(state: "Any") -> bool:
    """Have *state* closed when this process exits; return False where it is too late for that."""
    pid = os.getpid()
    if pid not in _HOOKS:
        import atexit

        if not _HOOKS:
            atexit.register(_deliver_at_exit)  # forked children inherit it
        # Once the main thread is over, exit hooks are running already and no new one is called.
        _HOOKS[pid] = threading.main_thread().is_alive()
        process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if process and util:
            _hook_processes(util)
            if type(process.current_process()).__name__ != "_MainProcess":
                util.Finalize(None, _deliver_with_threads, exitpriority=0)
    if _HOOKS[pid]:
        _OPEN[state] = pid
    return _HOOKS[pid]


def _is_exit() -> bool:
    """Tell whether the exit hook of this process has begun."""
    return not _HOOKS.get(os.getpid(), True)


@functools.lru_cache(None)  # once, in this process or in one that forked it: what is told at the end is told once
def _hook_processes(util: "Any") -> None:
    """Have each process of multiprocessing that this one forks deliver at its end.

    They end without atexit. Their own finalizers run, if registered in that very process, and not before it begins:
    then it forgets them. Hooks of a fork and modules that it imports come sooner.
    """

    def begin(hook: "Callable[[], None]") -> None:
        _HOOKS[os.getpid()] = True
        util.Finalize(None, hook, exitpriority=0)

    util.register_after_fork(_deliver_with_threads, begin)


@functools.lru_cache(None)  # once
def _hook_fork() -> None:
    """Have a forked child of this process close its parent's descriptors at once, where Python can do that (3.7)."""
    if _register_at_fork is not None:
        # By its name: where the module is reloaded, the hooks are for the new one.
        _register_at_fork(before=lambda: _FORK_GUARD.before(), after_in_parent=lambda: _FORK_GUARD.after_in_parent())
        _register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    _FORK_GUARD.after_in_child()
    for states in list(_ALL_STATES.values()):
        _disown(states)


def _disown(states: "Dict[int, _State]") -> None:
    """Let go of what belongs to the process that this one was forked from."""
    for pid in [pid for pid in list(states) if pid != os.getpid()]:
        state = states.pop(pid, None)
        if state is not None:
            state.disown()


def _deliver_at_exit() -> None:
    """Close all that is open, within `_EXIT_TIMEOUT` in all; tell what could not be delivered.

    A Ctrl-C ends the waiting, not the telling: the next attempt waits for nothing, and does what is not done yet.
    """
    deadlines = iter([_CLOCK.now() + _EXIT_TIMEOUT])  # of the first attempt
    _despite_signals(lambda: _attempt_at_exit(next(deadlines, 0.0)))


def _attempt_at_exit(deadline: float) -> None:
    _HOOKS[os.getpid()] = False  # what is put from here on is delivered by the call itself: begin() says so
    # A signal handler may have raised in the very moment in which these are cleared.
    _LOGGING.now = _WRITES.log = None
    _TELLING.discard((os.getpid(), threading.get_ident()))
    states = _open_states()
    _wait_at_exit(states, deadline)
    problems = {state: _close_at_exit(state, deadline) for state in states}
    _tell_at_exit({state: problem for state, problem in problems.items() if problem is not None})


def _open_states() -> "List[_State]":
    """Return the states of this process that are not done."""
    return [state for state, pid in _OPEN.copy().items() if pid == os.getpid()]


def _deliver_with_threads() -> None:
    """Deliver in a process of multiprocessing once its threads are over; Python 3.7 to 3.12 wait for them after this.

    Some never are, and the process is killed. So what is there now goes out now.
    """

    def is_other(thread: "threading.Thread") -> bool:
        return not thread.daemon and thread is not threading.main_thread() and thread.name != _WAITER

    def other() -> "Optional[threading.Thread]":
        return next(filter(is_other, threading.enumerate()), None)

    def wait() -> None:
        for state in _open_states():
            try:
                state.flush(1.0)
            except Exception:  # it is told at the end
                pass
        for thread in iter(other, None):
            thread.join()
        _deliver_at_exit()

    if other() is not None and sys.version_info >= (3, 7):  # before, they end with the process
        try:
            threading.Thread(target=wait, name=_WAITER, daemon=False).start()
            return
        except RuntimeError:  # no more threads
            pass
    _deliver_at_exit()


def _despite_signals(call: "Callable[[], None]", depth: int = 3) -> None:
    """Call *call* until it returns, or raised too often. What comes between two attempts, the next depth catches."""
    attempt = functools.partial(_despite_signals, call, depth - 1) if depth else call
    for _ in range(100):
        try:
            attempt()
            return
        except BaseException:  # a signal handler's
            pass


def _wait_at_exit(states: "List[_State]", deadline: float) -> None:
    """Give what is under way a second; then say what the process waits for, and for how long."""
    for state in states:
        state.hurry()
    for state in states:
        if state.closed:  # what it left is told, or stays on disk
            continue
        try:
            state.flush(max(0.0, min(1.0, deadline - _CLOCK.now())))
        except Exception as error:
            if deadline > _CLOCK.now():
                _log("warning", "analysys: waiting at exit for up to %.0f s: %s", deadline - _CLOCK.now(), error)
            break


def _close_at_exit(state: "_State", deadline: float) -> "Optional[Exception]":
    """Close *state* and return what is to be told; whatever befalls one, the others have their turn."""
    problem: "Optional[Exception]" = None
    for _ in range(3):  # a signal handler may raise an Exception, too
        try:
            return state.close(max(0.0, deadline - _CLOCK.now()))
        except Exception as error:
            problem, deadline = error, 0.0
    return problem


def _tell_at_exit(untold: "Dict[_State, Exception]") -> None:
    for state, problem in list(untold.items()):
        on_error, state.on_error = state.on_error, None  # once: where that is interrupted, the log is told instead
        if on_error is not None and _tell(on_error, problem, getattr(problem, "records", [])):
            state.told()
            del untold[state]
    # An error that is not ours (no memory, say) has no records: then what the state still holds.
    number = sum(len(getattr(error, "records", ())) or state.stats()["pending"] for state, error in untold.items())
    for _ in range(3 if number else 0):
        if _log("error", "%d records were not delivered at exit: %s", number, list(untold.values())[-1]):
            break
    for state in untold:
        state.told()


########################################################################################################################
########################################################################################################################
#
# The tools: everything below does nothing unless it is called. Who audits the SDK can stop here.
#
########################################################################################################################
########################################################################################################################


########################################################################################################################
# Inventory: which events and properties there are, and which of them the platform would not tell apart
########################################################################################################################

_TYPES = {str: "string", int: "number", float: "number", bool: "boolean", list: "list"}  # the platform's words: C8


class _Inventory:
    """Counts what records hold by event and property, to answer "will the platform understand this?".

    The platform wants one type for one property id over all events and folds ids to lower case. Event properties and
    user properties are two worlds; ``$...`` properties are the platform's own. Memory is bounded: see _MAX_PAIRS.
    """

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0  # counted by who refuses
        self._events: "Record" = {}  # as in the JSON: a copy would cost as much memory again
        self._room = _MAX_PAIRS
        self._cut = False

    def add(self, record: "Record", times: int = 1) -> None:
        """Count *record*, which keeps the rules of `_check_record`, or so many like it."""
        self.accepted += times
        event = self._events.get(record["xwhat"])
        if event is None:
            if not self._take_room():
                return
            event = self._events[record["xwhat"]] = {"count": 0, "properties": {}}
        event["count"] += times
        if record["xwhat"] == _UNSET.xwhat:
            return
        known = event["properties"]
        for name, value in record["xcontext"].items():
            if name[0] == "$":
                continue
            if name not in known:
                if known and not self._take_room():  # the first one takes the room of its event
                    continue
                known[sys.intern(name)] = {"types": {}, "example": _example(value)}
            counts, kind = known[name]["types"], _TYPES[type(value)]
            counts[kind] = counts.get(kind, 0) + times

    def as_json(self) -> "Record":
        """Return what is counted in the shape of ``GET /api/inventory``; it changes with the next add()."""
        found = {"events": self._events, "conflicts": self._conflicts()}
        return dict(found, accepted=self.accepted, refused=self.refused, cut=self._cut)

    def _conflicts(self) -> "List[Record]":
        """Return the properties that are seen with two types, or spelled in two cases, in whatever events."""
        first: "Dict[Tuple[bool, str], Any]" = {}  # world and id in lower case -> (id, types) where it was met first
        found: "Dict[Tuple[bool, str], Record]" = {}
        for key, name, types in self._pairs():
            known = first.setdefault(key, (name, types))
            if known[0] != name or len(types) > 1 or types.keys() != known[1].keys():
                found[key] = {"kind": "user" if key[0] else "event", "property": key[1], "types": {}, "spellings": []}
        for key, name, types in self._pairs() if found else ():
            if key in found:
                found[key]["spellings"] = sorted(set(found[key]["spellings"] + [name]))
                for one, count in types.items():
                    found[key]["types"][one] = found[key]["types"].get(one, 0) + count
        return [found[key] for key in sorted(found)]

    def _pairs(self) -> "Iterator[Tuple[Tuple[bool, str], str, Dict[str, int]]]":
        """Return (whether it is a user property, id in lower case), id and types of each pair."""
        for event, counted in self._events.items():
            for name, pair in counted["properties"].items():
                low = name.lower()
                yield (event.startswith("$profile_"), name if low == name else low), name, pair["types"]

    def _take_room(self) -> bool:
        """Take room for one more pair of event and property, if there is any."""
        self._cut = self._cut or not self._room
        self._room -= not self._cut
        return not self._cut


def _example(value: "Any") -> "Any":
    """Return a value short enough to show."""
    if isinstance(value, str):
        return value if len(value) <= _SHORT else value[:_SHORT] + "…"
    return [_example(item) for item in value[:3]] if isinstance(value, list) else value


########################################################################################################################
# Receiver: a server that takes records as the platform does, for tests and for looking at what arrives
#
# A thread accepts; one more for each connection reads its requests, answers them and ends with it. `_Listener` and
# `_Connection` know HTTP and no records, `Receiver` (and `_Site`, which adds the page) records and no sockets. Bodies
# are read side by side, and `_Bodies` bounds what they hold; they are decoded, judged and kept one at a time, under
# `Receiver._arrived`, for 16 MiB may be 64 MiB of text. Nobody waits for a client under a lock.
########################################################################################################################

_MAX_BODY = 16 * 1024 * 1024  # bytes of a request's body
_MAX_TEXT = 64 * 1024 * 1024  # bytes in it, decompressed
_MAX_PARTS = 1000 * 1000  # values in it: each takes some 80 bytes of memory
_MAX_HELD = 64 * 1024 * 1024  # bytes received of bodies, of all requests together: C8
_MAX_HEAD = 64 * 1024  # bytes of a request's head
_PIECE = 16 * 1024  # bytes received at once
_BACKLOG = 128  # clients that may come at once
_MAX_CONNECTIONS = 1000  # one more, and the one that was idle for longest has to go
_IDLE_TIMEOUT = 60.0  # seconds that a connection may be without a request
_CLIENT_TIMEOUT = 20.0  # seconds for a request's head, and for a client that neither sends nor takes anything
_SLOWEST = 128 * 1024  # bytes a second that a body comes with, once those seconds are over

_Request = collections.namedtuple("_Request", "method path query headers body")


class _Trouble(Exception):
    """A request that is answered with an HTTP status and a sentence, and ends its connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_NO_REQUEST = _Request("", "", "", {}, b"")  # that could be understood


def _json_reply(status: int, told: "Any") -> "_Answer":
    return _Answer(status, {"Content-Type": "application/json"}, [json.dumps(told).encode("ascii")])


class _Bodies:
    """Bounds the bytes that requests hold: beyond it they wait unread, but for the oldest, so that one always ends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards what follows; notified when a request holds less
        self._held = 0
        self._sizes: "collections.OrderedDict[Any, int]" = collections.OrderedDict()  # by request, the oldest first

    def hold(self, request: object, size: int) -> float:
        """Return once *request* may hold *size* bytes in all (0: it lets go), and how many seconds that took."""
        start = _CLOCK.now()
        with self._changed:
            more = size - self._sizes.setdefault(request, 0)
            while self._held + more > _MAX_HELD and more > 0 and next(iter(self._sizes)) is not request:
                self._changed.wait()
            self._held += more
            self._sizes[request] = size
            if not size:
                del self._sizes[request]
            if more <= 0:
                self._changed.notify_all()
        return _CLOCK.now() - start


class _Connection:
    """One client: reads its requests within their limits of time and size, and sends what the site answers."""

    def __init__(self, listener: "_Listener", sock: "Any") -> None:
        self.sock = sock
        self.idle_since = _CLOCK.now()  # infinity from when the head of a request is there until it is answered
        self._listener = listener
        self._buffer = bytearray()  # received, and not yet looked at

    def run(self) -> None:
        """Answer requests until the client is gone, or has to go."""
        try:
            self.sock.settimeout(_CLIENT_TIMEOUT)
            if self._listener.tls is not None:
                self.sock = self._listener.tls.wrap_socket(self.sock, True, do_handshake_on_connect=False)
                if self._listener.closed.is_set():  # and may have hung up on what had the socket before
                    return
                self.sock.do_handshake()  # here, where a slow one holds up nobody, and close() ends it
            while self._exchange():
                self.idle_since = _CLOCK.now()
        except (OSError, ValueError):  # gone, too slow, or no TLS
            pass
        finally:
            self._listener.forget(self)

    def send(self, pieces: "Iterable[bytes]") -> None:
        self.sock.settimeout(_CLIENT_TIMEOUT)
        for piece in pieces:
            self.sock.sendall(piece)

    def _exchange(self) -> bool:
        """Answer one request; return whether there may be another."""
        request, keep = _NO_REQUEST, False
        try:
            head = self._head()
            if not head:
                return False
            request, keep = _parse_head(head)
            self._listener.site._admit(request)
            reply = self._listener.site._answer(request._replace(body=self._body(request)))
        except OSError:
            raise
        except Exception as error:  # a defect of ours, or no memory left, is the client's to hear of, too
            trouble = error if isinstance(error, _Trouble) else _Trouble(500, "%s: %s" % (type(error).__name__, error))
            reply = _json_reply(trouble.status, {"code": trouble.status, "msg": str(trouble)})
            keep = False  # what the client sent may be unread
        finally:
            self._listener.bodies.hold(self, 0)
        keep = keep and isinstance(reply.payload, list)  # else nobody knows how long it will be
        self.send(_pieces(reply, request.method == "HEAD", keep))
        if not keep:
            self._drain()
        return keep

    def _head(self) -> bytes:
        """Return the head of the next request, without the empty line; nothing where the client leaves instead."""
        deadline = self.idle_since + _IDLE_TIMEOUT
        while True:
            while self._buffer[:2] == b"\r\n":  # some end a body so, which their Content-Length does not count
                del self._buffer[:2]
            if b"\r\n\r\n" in self._buffer[:_MAX_HEAD]:
                break
            if self._buffer and self._buffer != b"\r" and not self._buffer[:1].isalpha():
                raise _Trouble(400, "this is no HTTP")  # TLS, mostly
            if len(self._buffer) >= _MAX_HEAD:
                raise _Trouble(431, "a head has at most %d bytes" % _MAX_HEAD)
            is_first = not self._buffer
            if not self._receive(deadline):
                return b""
            if is_first:
                deadline = _CLOCK.now() + _CLIENT_TIMEOUT
        self.idle_since = float("inf")
        head = bytes(self._buffer[: self._buffer.index(b"\r\n\r\n")])
        del self._buffer[: len(head) + 4]
        return head

    def _body(self, request: "_Request") -> bytes:
        """Return the body of *request*, or raise what is wrong with its length."""
        size = _length(request)
        if request.headers.get("expect", "").lower() == "100-continue" and len(self._buffer) < size:
            self.send([b"HTTP/1.1 100 Continue\r\n\r\n"])
        deadline = _CLOCK.now() + _CLIENT_TIMEOUT + size / _SLOWEST
        while len(self._buffer) < size:
            most = min(_PIECE, size - len(self._buffer))
            deadline += self._listener.bodies.hold(self, len(self._buffer) + most)
            if not self._receive(min(deadline, _CLOCK.now() + _CLIENT_TIMEOUT), most):
                raise _Trouble(400, "the body is cut short")
        rest = self._buffer[size:]  # little: a body may be large, and is copied once
        del self._buffer[size:]
        body, self._buffer = bytes(self._buffer), rest
        return body

    def _receive(self, deadline: float, most: int = _PIECE) -> bool:
        """Receive something, or raise where nothing is there at *deadline*; False where nothing comes any more.

        What is there already is taken also later: it may be us who are slow.
        """
        self.sock.settimeout(max(0.0, deadline - _CLOCK.now()))
        data = self.sock.recv(most)
        self._buffer += data
        return bool(data)

    def _drain(self) -> None:
        """Have the client see the answer: closing with bytes unread would reset the connection under it."""
        import socket

        deadline = _CLOCK.now() + 1
        self.sock.shutdown(socket.SHUT_WR)
        while _CLOCK.now() < deadline and self._receive(deadline):
            del self._buffer[:]


def _pieces(reply: "_Answer", is_head: bool, keep: bool) -> "Iterator[bytes]":
    """Return what is sent of *reply*, one that *is_head* without its body: a packet, mostly."""
    import email.utils

    lines = ["HTTP/1.1 %d %s" % (reply.status, "OK" if reply.status < 300 else "Error")]
    lines += map(": ".join, sorted(reply.headers.items()))
    if isinstance(reply.payload, list) and reply.status != 204:
        lines.append("Content-Length: %d" % sum(map(len, reply.payload)))
    lines += ["Date: " + email.utils.formatdate(usegmt=True)]
    lines += ["Connection: " + ("keep-alive" if keep else "close"), "", ""]
    pieces = iter([] if is_head or reply.status in (204, 304) else reply.payload)
    return itertools.chain(["\r\n".join(lines).encode("latin-1") + next(pieces, b"")], pieces)


def _parse_head(head: bytes) -> "Tuple[_Request, bool]":
    """Return the request whose head this is, and whether its connection is to be kept."""
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise _Trouble(400, "a request begins with its method, its path and HTTP/1.1")
    headers: "Dict[str, str]" = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        # Who stands in front of us may take a bare CR or LF for the end of a line, and see another request.
        if not colon or not re.fullmatch(_HEADER_NAME, name) or "\r" in value or "\n" in value or "\0" in value:
            raise _Trouble(400, "a header is damaged")
        headers[name] = "%s, %s" % (headers[name], value) if name in headers else value
    path, _, query = words[1].partition("?")
    keep = words[2] == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return _Request(words[0], path, query, headers, b""), keep


def _length(request: "_Request") -> int:
    """Return how long the body of *request* is. Two answers to that are none: who stands in front may read another."""
    length = request.headers.get("content-length")
    if "transfer-encoding" in request.headers or length is None and request.method == "POST":
        raise _Trouble(411, "a Content-Length is needed; a chunked body is not taken")
    if length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", length):  # two of them were joined by a comma
        raise _Trouble(400, "Content-Length must be one number")
    if int(length) > _MAX_BODY:
        raise _Trouble(413, "a body has at most %d bytes" % _MAX_BODY)
    return int(length)


class _Listener:
    """Accepts connections for *site*, each with a thread of its own, and ends them when it is closed."""

    def __init__(self, site: "Receiver", host: str, port: int, tls: "Any" = None) -> None:
        import socket

        self.site = site
        self.tls = tls  # an ssl.SSLContext
        self.bodies = _Bodies()
        self._connections: "set[_Connection]" = set()  # its steps are atomic
        self.closed = threading.Event()
        self._pid = os.getpid()
        family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, 0, socket.SOCK_STREAM)[0]
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # On Windows SO_REUSEADDR would take a port from its owner.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if os.name == "posix" else -5, 1)
            self._sock.bind(address)
            self._sock.listen(_BACKLOG)
            self.address: "Any" = self._sock.getsockname()
            self._thread = threading.Thread(target=self._accept, daemon=True)
            self._thread.start()
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Stop listening and hang up on everybody; in a forked child, only let go."""
        if self._pid != os.getpid():
            self._sock.close()
            return
        self.closed.set()
        _hang_up(self._sock)  # wakes the thread; where it does not, that looks twice a second
        self._thread.join()
        self._sock.close()
        for connection in list(self._connections):
            _hang_up(connection.sock)

    def forget(self, connection: "_Connection") -> None:
        self._connections.discard(connection)
        connection.sock.close()

    def _accept(self) -> None:
        self._sock.settimeout(0.5)
        while not self.closed.is_set():
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._make_room()
                if error.errno is not None:  # or closed
                    self.closed.wait(0.05)
                continue
            connection = _Connection(self, sock)
            self._connections.add(connection)
            if len(self._connections) > _MAX_CONNECTIONS:
                self._make_room()
            try:
                threading.Thread(target=connection.run, daemon=True).start()
            except RuntimeError:  # no thread can be started
                self.forget(connection)

    def _make_room(self) -> None:
        """Hang up on the client that is without a request for longest, if any is."""
        idle = [one for one in list(self._connections) if one.idle_since < float("inf")]
        if idle:
            _hang_up(min(idle, key=lambda one: one.idle_since).sock)


def _hang_up(sock: "Any") -> None:
    import socket

    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class Receiver:
    """A small HTTP server that accepts records at ``/up`` as the platform does, checks them, and keeps them.

        with Receiver() as server:
            tracker = AnalysysPythonSdk(BatchCollecter(server.url))
            ...
            assert server.wait_for(2) == [...]

    *host* and *port* (0: a free one) say where it listens, from the start on. ``url`` is the address to give to a
    collecter and ``records`` the list of what was accepted, in the order of arrival. A request with one bad record is
    refused whole. Any thread may call any method.
    """

    _tls: "Any" = None  # an ssl.SSLContext
    _names = frozenset(("localhost",))  # that a Host header may have, in lower case
    _cors: "FrozenSet[str]" = frozenset()  # the origins whose pages may post, in lower case

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.records: "List[Record]" = []
        # Guards records and failures, and holds the bodies of others back; notified by what arrives.
        self._arrived = threading.Condition()
        self._failures: "Deque[List[Any]]" = collections.deque()  # [how many posts to come, what _take() returns then]
        try:
            self._listener = _Listener(self, host, port, self._tls)
        except (OSError, RuntimeError, OverflowError, UnicodeError) as error:
            message = "cannot listen on %s, port %s: %s" % (host, port, error)
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                message += "; another port, or 0 for a free one, will do (serve --port 0)"
            raise AnalysysPythonSdkException(message) from error
        self.address, port = self._listener.address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # one that can be opened
        self.url = "http%s://%s:%d" % ("s" if self._tls else "", "[%s]" % host if ":" in host else host, port)

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: "Any") -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and close all connections."""
        self._listener.close()

    def wait_for(self, number: int, timeout: "Optional[float]" = 10) -> "List[Record]":
        """Return ``records`` once there are *number*, since the start or ``clear()``.

        After *timeout* seconds (None: no limit) it raises TimeoutError.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.records) >= number, timeout):
                raise TimeoutError("%d of %d records came within %s s" % (len(self.records), number, timeout))
            return self.records

    def fail_next(self, number: int = 1, status: int = 500, code: "Optional[int]" = None) -> None:
        """Have the next *number* posts fail: with HTTP *status*, or 200 and this *code*. Nothing of them is kept."""
        _check("number", number, "size")
        if type(status) is not int or not 200 <= status <= 599:
            raise _illegal("status", status, "must be an HTTP status from 200 to 599")
        if code is not None and type(code) is not int:
            raise _illegal("code", code, "must be an int or None")
        status, code = (status, status) if code is None else (200, code)
        with self._arrived:
            self._failures.append([number, (status, {"code": code, "msg": "it was told to fail"})])

    def clear(self) -> None:
        """Forget the records, and the failures that are still to come."""
        with self._arrived:
            del self.records[:]
            self._failures.clear()

    def _admit(self, request: "_Request") -> None:
        """Raise where a page of another origin asks, or one that got here by a name of its own (DNS rebinding): C8."""
        headers, is_up = request.headers, request.path.endswith("/up")
        host, origin, site = headers.get("host", "").lower(), headers.get("origin"), headers.get("sec-fetch-site")
        is_known = _is_named(host, self._names)
        if not is_known and not is_up:
            raise _Trouble(403, "this page is not for the host %r: --allow-host NAME allows one" % host[:100])
        if origin is None and site in (None, "none") or is_up and (origin or "").lower() in self._cors:
            return  # no page asks, or one that may
        is_own = is_known and (origin is None or origin.lower() == "http%s://%s" % ("s" if self._tls else "", host))
        follows = request.path == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link to the page
        if not is_own or site not in (None, "none", "same-origin") and not follows:
            raise _Trouble(403, "pages of another origin may not ask: --cors ORIGIN lets those of one post to /up")

    def _answer(self, request: "_Request") -> "_Answer":
        """Return what to answer to *request*, which is admitted and whole."""
        if not request.path.endswith("/up"):
            raise _Trouble(404, "records go to /up")
        origin, headers = request.headers.get("origin", ""), {}
        if origin.lower() in self._cors:
            headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
            if request.method == "OPTIONS":
                asked = request.headers.get("access-control-request-headers", "content-type")
                headers.update({"Access-Control-Allow-Headers": asked, "Access-Control-Allow-Methods": "POST"})
                headers.update({"Access-Control-Allow-Private-Network": "true", "Access-Control-Max-Age": "600"})
                return _Answer(204, headers, [])
        if request.method != "POST":
            raise _Trouble(405, "records are posted")
        reply = _json_reply(*self._take(request.body))
        reply.headers.update(headers)
        return reply

    def _take(self, body: bytes) -> "Tuple[int, Record]":
        """Take the body of a request whole, or not at all; return the HTTP status and the JSON to answer."""
        with self._arrived:
            if self._failures:
                self._failures[0][0] -= 1
                left, (status, told) = self._failures[0]
                if not left:
                    self._failures.popleft()
                return status, told
            records: "List[Any]" = []
            lines: "List[bytes]" = []
            try:
                records = _received(body)
                for record in records:
                    _check_record(record)
                    lines.append(_line(record))
            except (ValueError, RecursionError) as error:
                place = len(lines) + 1
                reason = _printable("record %d of %d: %s" % (place, len(records), error) if records else error)
                self._refuse(records, place, reason)
                return 200, {"code": 400, "msg": reason}
            try:
                self._keep(records, b"".join(lines))
            except (AnalysysPythonSdkFileException, AnalysysPythonSdkNetworkException) as error:
                return 503, {"code": 500, "msg": _printable(error)}
            self._arrived.notify_all()
            return 200, {"code": 200}

    def _keep(self, records: "List[Record]", lines: bytes) -> None:
        self.records.extend(records)

    def _refuse(self, records: "List[Any]", place: int, reason: str) -> None:
        """A request is refused for the record at *place*, from 1; one that has no *records*, for what it is."""


def _is_named(host: str, names: "Iterable[str]") -> bool:
    """Tell whether a Host header has one of *names*, or a literal address, which no DNS can rebind."""
    import ipaddress

    name = re.sub(r":[0-9]*$", "", host).strip("[]") if host.count(":") < 2 or host[:1] == "[" else ""
    try:
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _received(body: bytes) -> "List[Any]":
    """Return the values in a body, plain or packed; raise ValueError where it is no array of at least one."""
    rule = "the body must be an array of records, plain or as base64 of gzip"
    try:
        text = body if re.match(rb"\s*\[", body) else _unpack(body, _MAX_TEXT)
        if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_PARTS:
            raise _Trouble(413, "a body has at most %d values" % _MAX_PARTS)
        found = _decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("%s: %s" % (rule, error)) from None
    if not isinstance(found, list) or not found:
        raise ValueError(rule + ", at least one")
    return found


########################################################################################################################
# Page: `serve`, a receiver with a page to look at what comes in
#
# What came is kept as numbered lines in a `_Feed`, which knows no HTTP; each page that is open reads on from its own
# place in it, so there is no queue for each. `_Site` adds lines to it under Receiver._arrived; the feed's own lock is
# taken after that one, never before. Events are hostile: the page makes text of them, never markup.
########################################################################################################################

_MAX_EVENTS = 1000  # kept to look at: C8
_MAX_EVENT_BYTES = 16 * 1024 * 1024  # kept of them in all, beside the oldest
_MAX_SHOWN = 4 * 1024 * 1024  # bytes of a record that is kept to look at
_MAX_LAG = 1024 * 1024  # bytes that a page may be behind: C8
_ALIVE_EVERY = 15.0  # seconds between comments in a stream: C8
_GATHER = 0.05  # seconds in which events are gathered for a page
_RATED = 300  # seconds that the page's chart goes back
_LINES_PER_SECOND = 100  # printed: C8


_HEADERS = {  # of everything that may show what came
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
_POLICY = (  # of the page: nothing from elsewhere, and only the style and script below
    "default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


class _Feed:
    """Keeps the last events as lines, numbered, and how many came in each of the last seconds."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # guards all that follows; notified by events and by clear()
        self.number = int(time.time() * 1e6)  # of the newest event; grows over restarts, too
        self.cleared = 0  # the number of the last clear()
        self.total = 0  # bytes of all lines that ever were
        self._lines: "Deque[Tuple[int, int, bytes]]" = collections.deque()  # number, total with it, line
        self._rates: "Deque[List[int]]" = collections.deque(maxlen=_RATED)  # [second, accepted, refused]

    def add(self, records: "List[Any]", reasons: "List[Optional[str]]") -> None:
        """Add the events of one request, which is taken or refused whole: *reasons* has why for each, or None."""
        now = time.time()
        with self.changed:
            self.number += max(0, len(records) - _MAX_EVENTS)
            for record, reason in zip(records[-_MAX_EVENTS:], reasons[-_MAX_EVENTS:]):
                self.number += 1
                self._append(_event_line(self.number, now, reason, record))
            if not self._rates or self._rates[-1][0] != int(now):
                self._rates.append([int(now), 0, 0])
            self._rates[-1][1 if reasons[0] is None else 2] += len(records)
            self.changed.notify_all()

    def clear(self) -> None:
        """Forget everything but the number."""
        with self.changed:
            self._lines.clear()
            self._rates.clear()
            self.number += 1
            self.cleared = self.number
            self.changed.notify_all()

    def after(self, number: int, most: float = float("inf")) -> "List[Tuple[int, int, bytes]]":
        """Return events over *number*, the oldest first, of *most* bytes and one more. Called under `changed`."""
        found = list(itertools.takewhile(lambda event: event[0] > number, reversed(self._lines)))[::-1]
        return [event for event in found if event[1] - found[0][1] <= most]

    def rates(self) -> "List[List[int]]":
        with self.changed:
            return [list(rate) for rate in self._rates if rate[0] > time.time() - _RATED]

    def _append(self, line: bytes) -> None:
        self.total += len(line)
        self._lines.append((self.number, self.total, line))
        while len(self._lines) > _MAX_EVENTS or self.total - self._lines[0][1] > _MAX_EVENT_BYTES:
            self._lines.popleft()


def _event_line(number: int, now: float, reason: "Optional[str]", record: "Any") -> bytes:
    """Return one event as a line of JSON, with the record at its end, where the page finds its exact text."""
    try:
        text = _encode(record)
    except RecursionError:
        text = "null"
    if len(text) > _MAX_SHOWN:
        text = "null"
    form = '{"n":%d,"received":%d,"reason":%s,"record":%s}\n'
    # Half a character, which UTF-8 has not, becomes what JSON has for it.
    return (form % (number, now * 1000, json.dumps(reason), text)).encode("utf-8", "backslashreplace")


class _Site(Receiver):
    """A receiver with a page, an API and a memory of what came; it may write to a log and hand on to the platform."""

    def __init__(self, options: "Any", tls: "Any", log: "Any" = None, forward: "Any" = None) -> None:
        self.feed = _Feed()
        self.printer = _Printer()
        self.inventory = _Inventory()  # under _arrived
        self.log = log  # a LogCollecter or None
        self.forward = forward  # a BatchCollecter with a spool, or None
        self._tls = tls
        self._names |= {name.lower() for name in [options.host] + options.allow_host if name}
        self._cors = frozenset(origin.lower() for origin in options.cors)
        self._routes = {
            ("GET", "/"): self._page,
            ("GET", "/api/events"): self._events,
            ("DELETE", "/api/events"): self._clear,
            ("GET", "/api/stream"): self._stream,
            ("GET", "/api/inventory"): self._as_inventory,
            ("GET", "/api/rates"): self._rates,
            ("POST", "/api/fail"): self._fail_next,
        }
        super().__init__(options.host, options.port)

    def close(self) -> None:
        """Stop listening; what is not forwarded stays in the spool."""
        super().close()
        if self.forward is not None:
            self.forward.close(0.2)

    def clear(self) -> None:
        """Forget events, inventory, counts, and failures to come."""
        with self._arrived:
            super().clear()
            self.inventory = _Inventory()
            self.feed.clear()

    def _answer(self, request: "_Request") -> "_Answer":
        method = "GET" if request.method == "HEAD" else request.method
        route = self._routes.get((method, request.path))
        if route is not None:
            reply = route(request)
            reply.headers.update(_HEADERS)
            return reply
        if any(path == request.path for _, path in self._routes):
            raise _Trouble(405, "%s is not for %s" % (request.path, request.method))
        return super()._answer(request)

    def _take(self, body: bytes) -> "Tuple[int, Record]":
        status, told = super()._take(body)
        if told["code"] >= 500:  # the disk is full, say: who looks on is to hear of it, too
            self.printer.add(None, told["msg"])
        return status, told

    def _keep(self, records: "List[Record]", lines: bytes) -> None:
        if self.log is not None:
            self.log._put(lines, False)  # one write, whole or not at all; so is the other
        try:
            if self.forward is not None:
                self.forward._put(lines, any(record["xwhat"] == _ALIAS for record in records))
        except Exception:
            if self.log is not None:
                self.log._state().take_back(lines)
            raise
        for record in records:
            self.inventory.add(record)
        self._show(records, [None] * len(records))

    def _refuse(self, records: "List[Any]", place: int, reason: str) -> None:
        objects = [record if isinstance(record, dict) else None for record in records]
        if objects.count(None) == len(objects):  # no array of at least one object: C8
            objects, place = [None], 1
        self.inventory.refused += len(objects)
        reasons: "List[Optional[str]]" = ["refused with record %d" % place] * len(objects)
        reasons[place - 1] = reason
        self._show(objects, reasons)

    def _show(self, records: "List[Any]", reasons: "List[Optional[str]]") -> None:
        self.feed.add(records, reasons)
        for record, reason in zip(records, reasons):
            self.printer.add(record, reason)

    def _page(self, _: "_Request") -> "_Answer":
        import hashlib

        digests = [hashlib.sha256(source.encode("utf-8")).digest() for source in (_STYLE, _SCRIPT)]
        policy = _POLICY % tuple(binascii.b2a_base64(digest, newline=False).decode() for digest in digests)
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy}
        return _Answer(200, headers, [(_HTML % (_STYLE, _SCRIPT)).encode("utf-8")])

    def _events(self, request: "_Request") -> "_Answer":
        found = re.fullmatch(r"(?:after=([0-9]{1,18}))?", request.query)
        if not found:
            raise _Trouble(400, "the query must be after=N or nothing")
        with self.feed.changed:
            lines = [line for _, _, line in self.feed.after(int(found.group(1) or 0))]
        return _Answer(200, {"Content-Type": "application/x-ndjson; charset=utf-8"}, lines)

    def _clear(self, _: "_Request") -> "_Answer":
        self.clear()
        return _Answer(204, {}, [])

    def _as_inventory(self, _: "_Request") -> "_Answer":
        with self._arrived:  # it is not a copy
            return _json_reply(200, self.inventory.as_json())

    def _rates(self, _: "_Request") -> "_Answer":
        return _json_reply(200, {"now": int(time.time()), "rates": self.feed.rates()})

    def _fail_next(self, request: "_Request") -> "_Answer":
        try:
            self.fail_next(**_decode(request.body or b"{}"))
        except (ValueError, TypeError, RecursionError) as error:
            raise _Trouble(400, "number, status and code are asked for in JSON: %s" % str(error)[:200]) from None
        return _Answer(204, {}, [])

    def _stream(self, request: "_Request") -> "_Answer":
        last = request.headers.get("last-event-id", "")
        start = int(last) if re.fullmatch(r"[0-9]{1,18}", last) else 0
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}  # for nginx
        return _Answer(200, headers, self._follow(start))

    def _follow(self, start: int) -> "Iterator[bytes]":
        """Yield events for one page as they come, until it leaves or lags; *start* is the last that it has, or 0.

        One that has more than there is saw a server whose clock was ahead of ours: it is told to begin anew.
        """
        feed, data = self.feed, b"retry: 1000\n\n"
        with feed.changed:
            at = -1 if start > feed.number else start or feed.cleared
            total = feed.total  # bytes that it has once it takes *data*, or need not have: what came before is no lag
        while True:
            for place in range(0, len(data), _PIECE):
                if feed.total - total > _MAX_LAG:
                    return
                yield data[place : place + _PIECE]
            time.sleep(_GATHER)
            with feed.changed:
                if feed.number <= at:  # it has everything; what comes now in one request is no lag
                    feed.changed.wait(_ALIVE_EVERY)  # for new events, or clear()
                    total = feed.total
                is_cleared = feed.cleared > at
                at = feed.cleared if is_cleared else at
                found = feed.after(at, _MAX_LAG // 4)
                newest = feed.number
            pieces = [b"id: %d\nevent: clear\ndata: {}\n\n" % at] if is_cleared else []
            for number, had, line in found:
                pieces.append(b"id: %d\ndata: %s\n" % (number, line))
                at, total = number, max(total, had)
            at = at if found else newest
            data = b"".join(pieces) or b":\n\n"


class _Printer:
    """Prints a line a record in the main thread, at most 100 a second: a terminal that stands still holds up nobody."""

    def __init__(self) -> None:
        self._is_over = False
        self._changed = _Signal()  # there are lines, or it is over
        self._lock = threading.Lock()  # guards what follows
        self._lines: "List[str]" = []  # text and no records, which would be kept as long as a terminal stands still
        self._second = 0
        self._room = 0  # lines that this second may still have
        self._more = 0  # that it had beyond those

    def add(self, record: "Any", reason: "Optional[str]") -> None:
        """Have *record* printed, unless there are too many."""
        import shutil

        with self._lock:
            self._turn()
            if self._room <= 0 or len(self._lines) > 2 * _LINES_PER_SECOND:
                self._more += 1
                return
            self._room -= 1
            self._lines.append(_event_text(record, reason, shutil.get_terminal_size((160, 24)).columns))
        self._changed.notify()

    def run(self) -> None:
        """Print until it is over."""
        while not self._is_over:
            self._changed.wait_for(lambda: self._lines or self._is_over, _CLOCK.now() + 1)
            self.show()

    def stop(self, *_: "Any") -> None:
        """Have run() return soon. A signal handler: takes no lock, and raises nothing that would cut the end short."""
        if not self._is_over:
            _alarm(1)
        self._is_over = True
        self._changed.notify()

    def show(self) -> None:
        """Print what waits."""
        with self._lock:
            self._turn()
            lines, self._lines = self._lines, []
        if lines:
            _print("\n".join(lines))

    def _turn(self) -> None:
        """Where a second is over, say how many more it had."""
        if self._second != int(_CLOCK.now()):
            self._second, self._room = int(_CLOCK.now()), _LINES_PER_SECOND
            if self._more:
                self._lines.append("… {:,} more".format(self._more))
                self._more = 0


def _alarm(seconds: int) -> None:
    """Have SIGALRM come every so many *seconds*, where there is one; 0: no more."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _let_go(*_: "Any") -> None:
    """Where nobody reads what we print, and we wait for that, have it go nowhere."""
    import select

    output = select.poll()
    output.register(1, select.POLLOUT)
    if not output.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _event_text(record: "Any", reason: "Optional[str]", columns: int) -> str:
    """Return the line that is printed of a record: time, who, what, platform, properties; or in red the reason."""
    record = record if isinstance(record, dict) else {}
    context = record.get("xcontext")
    context = context if isinstance(context, dict) else {}
    cells = map(_plain, (record.get("xwho", "-"), record.get("xwhat", "-"), context.get("$platform", "-")))
    line = [time.strftime("%H:%M:%S")] + [_fit(_printable(cell), width) for cell, width in zip(cells, (16, 20, 8))]
    text = _fit("  ".join(line + [_printable(reason or _own_properties(context))]), columns).rstrip()
    return "\x1b[31m%s\x1b[0m" % text if reason and _has_colours() else text


def _own_properties(context: "Record") -> str:
    """Return in short what a record holds beside what each one has."""
    own = (name for name in context if name not in _CONTEXT_RULES or name == "$original_id")
    return ", ".join("%s: %s" % (name, _plain(context[name])) for name in itertools.islice(own, 10))


def _plain(value: "Any") -> str:
    return value[:_MAX_STRING] if isinstance(value, str) else _shown(value)


def _fit(text: str, width: int) -> str:
    """Return *text* in exactly *width* columns of a terminal."""
    if _width(text) > width:
        text = text[: sum(end < width for end in itertools.accumulate(_columns(text[:width])))] + _showable("…", "~")
    return text + " " * (width - _width(text))


def _serve(arguments: "Any") -> int:
    """Run a site until a signal comes; print what arrives, and how much it was."""
    import select  # noqa: F401  # what is needed while it runs: no signal is to come amid an import
    import shutil  # noqa: F401

    site, kept = _open_site(arguments), {}
    is_private = _is_loopback("[%s]" % site.address if ":" in site.address else site.address)
    try:
        kept = _handle(SIGINT=site.printer.stop, SIGTERM=site.printer.stop, SIGALRM=_let_go)
        _print("serving on %s" % site.url)
        if not is_private:
            _print("analysys: whoever reaches %s can read what comes in" % site.address, "stderr")
        site.printer.run()
        site.close()
        site.printer.show()
        # Not as_json(): a request may still be at work, and counts.
        summary = "{:,} accepted, {:,} refused".format(site.inventory.accepted, site.inventory.refused)
        if site.forward is not None:
            summary += "; {:,} wait in {}".format(site.forward.stats()["pending"], arguments.spool_path)
        _print(summary)
    finally:
        _alarm(0)
        _restore(kept)
        site.close()
    return _DONE


def _open_site(arguments: "Any") -> "_Site":
    """Return the site that the options ask for, or raise what is wrong with them."""
    if bool(arguments.forward) != bool(arguments.spool_path):
        raise _illegal("--spool-path", arguments.spool_path, "must be given with --forward, and only then")
    for origin in arguments.cors:
        if not re.fullmatch(r"https?://[^/?#*@\s]+", origin, re.IGNORECASE):
            raise _illegal("--cors", origin, "must be an origin, like http://localhost:3000, without a path")
    tls, log, forward = _server_tls(arguments.tls), None, None
    if arguments.forward:
        told = functools.partial(_print_error, "not forwarded")
        forward = BatchCollecter(arguments.forward, 1, 500, 500, spool_path=arguments.spool_path, on_error=told)
    try:
        if arguments.log_path:
            log = LogCollecter(arguments.log_path)
            log._put(b"", False)  # it is made, and raises, now
        return _Site(arguments, tls, log, forward)
    except AnalysysPythonSdkException:
        if forward is not None:
            forward.close(0)
        raise


def _server_tls(files: "Optional[List[str]]") -> "Any":
    if not files:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files[0], files[1], lambda: "")  # no password: nobody is asked for one
    except (OSError, ValueError) as error:
        rule = "must be a certificate and its key in PEM, without a password: %s" % error
        raise _illegal("--tls", " ".join(files), rule) from None
    return context


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>analysys</title>
<link rel="icon" href="data:,">
<style>%s</style>
</head>
<body>
<header>
  <h1>analysys</h1>
  <span id="state" role="status"></span>
  <nav role="tablist">
    <button id="tab-events" role="tab" aria-selected="true" aria-controls="events" data-t="events"></button>
    <button id="tab-inventory" role="tab" aria-selected="false" aria-controls="inventory" data-t="inventory"></button>
  </nav>
</header>
<section id="summary">
  <p class="count"><b id="accepted">0</b> <span data-t="accepted"></span></p>
  <p class="count bad"><b id="refused">0</b> <span data-t="refused"></span></p>
  <figure>
    <svg id="chart" role="img" viewBox="0 0 300 50" preserveAspectRatio="none"><path/><path class="bad"/></svg>
    <figcaption><span data-t="ago"></span><span id="peak"></span><span data-t="now"></span></figcaption>
  </figure>
</section>
<main id="events" role="tabpanel" aria-labelledby="tab-events">
  <form id="tools" role="search">
    <input id="search" type="search" autocomplete="off" spellcheck="false" maxlength="300" data-label="search">
    <select id="what" data-label="what"></select>
    <select id="platform" data-label="platform"></select>
    <select id="outcome" data-label="outcome"></select>
    <button id="pause" type="button" data-t="pause" aria-pressed="false" aria-keyshortcuts="p"></button>
    <button id="download" type="button" data-t="download" data-title="downloadHint"></button>
    <button id="clear" type="button" data-t="clear" data-title="clearHint"></button>
  </form>
  <p id="news" class="unseen" aria-live="polite"></p>
  <div class="columns">
    <div class="list">
      <div class="row head" aria-hidden="true"><span data-t="time"></span><span data-t="what"></span>
        <span data-t="who"></span><span data-t="platform"></span><span data-t="login"></span>
        <span data-t="properties"></span></div>
      <div id="rows" role="listbox" tabindex="0" data-label="events"></div>
      <p id="hint"></p>
    </div>
    <aside><h2 data-t="byEvent"></h2><ol id="counts"></ol></aside>
  </div>
</main>
<main id="inventory" role="tabpanel" aria-labelledby="tab-inventory" hidden></main>
<section id="detail" role="dialog" data-label="record" tabindex="-1" hidden>
  <header><h2 id="title"></h2><button id="copy" data-t="copy"></button><button id="close" data-t="close"
    aria-keyshortcuts="Escape"></button></header>
  <p id="reason" class="bad"></p>
  <pre id="json" tabindex="0"></pre>
</section>
<footer data-t="keys"></footer>
<script>%s</script>
</body>
</html>
"""

_STYLE = """
:root { --paper: #f6f7f9; --card: #fff; --ink: #1b2430; --soft: #5b6675; --line: #dfe3e8; --main: #0b6bcb;
  --tint: #e5f0fb; --bad: #c01f33; --badtint: #fdecee; --text: #0a7a4b; --number: #8a4b00; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --card: #1a2029; --ink: #e5eaf0; --soft: #97a3b2;
  --line: #2d3642; --main: #62aef7; --tint: #1d3147; --bad: #ff7d8a; --badtint: #3a1d23; --text: #6fd3a2;
  --number: #f0b470; } }
* { box-sizing: border-box; margin: 0; } [hidden] { display: none !important; }
body { background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "PingFang SC", "Microsoft YaHei", sans-serif; max-width: 1800px; margin: auto;
  padding: 0 16px; overflow-wrap: anywhere; }
h1 { font-size: 18px; letter-spacing: -.02em; } h2 { font-size: 13px; } .bad { color: var(--bad); }
button, select, input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 5px 12px; min-width: 0; min-height: 34px; white-space: nowrap; }
button { cursor: pointer; flex-shrink: 0; } button:hover { border-color: var(--main); }
:focus-visible { outline: 2px solid var(--main); outline-offset: 1px; }
body > header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; padding: 12px 0; }
#state { color: var(--soft); flex: 1; }
#state::before { content: ""; display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px;
  background: var(--text); }
#state.off::before { background: var(--bad); } nav { display: flex; gap: 4px; }
nav button[aria-selected=true] { background: var(--main); color: var(--card); border-color: var(--main); }
#summary, .list, aside, #inventory > * { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
#summary { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: center; padding: 12px 16px; }
.count b { display: block; font-size: 26px; line-height: 1.1; font-variant-numeric: tabular-nums; }
figure { flex: 1 1 240px; }
#chart { display: block; width: 100%; height: 50px; border-bottom: 1px solid var(--line); fill: var(--main); }
#chart .bad { fill: var(--bad); }
figcaption { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; }
#tools { display: flex; flex-wrap: wrap; gap: 8px; padding: 12px 0; position: sticky; top: 0;
  background: var(--paper); z-index: 1; }
#search { flex: 1 1 220px; } select { max-width: 200px; }
#pause[aria-pressed=true] { background: var(--main); color: var(--card); }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.columns { display: grid; grid-template-columns: minmax(0, 1fr) 260px; gap: 12px; align-items: start; }
.list, aside { overflow: hidden; } aside { padding: 12px; position: sticky; top: 60px; }
.row { display: grid; grid-template-columns: 70px minmax(0, 2fr) minmax(0, 1.6fr) 76px 48px minmax(0, 5fr); gap: 10px;
  padding: 6px 12px; border-bottom: 1px solid var(--line); border-left: 3px solid transparent; cursor: pointer;
  content-visibility: auto; contain-intrinsic-size: auto 34px; }
.row > * { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.row .time, .row .rest { color: var(--soft); font-variant-numeric: tabular-nums; } .row .what { font-weight: 600; }
.row.head { color: var(--soft); font-size: 12px; cursor: default; } .row:not(.head):hover { background: var(--tint); }
.row.refused, .row.refused > * { color: var(--bad); background: var(--badtint); }
.row.refused { border-left-color: var(--bad); }
.row[aria-selected=true] { background: var(--tint); border-left-color: var(--main); }
#rows:focus-visible { outline-offset: -2px; }
#hint { padding: 28px 16px; color: var(--soft); text-align: center; white-space: pre-line; }
#hint:empty { display: none; } #counts { list-style: none; padding: 0; max-height: 60vh; overflow: auto; }
#counts button { display: grid; grid-template-columns: minmax(0, 1fr) auto; overflow: hidden; gap: 2px 8px;
  width: 100%; text-align: left; border: 0; padding: 5px 4px; }
#counts bdi { overflow: hidden; text-overflow: ellipsis; }
#counts i { grid-column: 1 / 3; height: 3px; border-radius: 2px; background: var(--main); min-width: 2px; }
#counts button[aria-pressed=true] { background: var(--tint); }
#detail { position: fixed; inset: 0 0 0 auto; width: min(560px, 100%); background: var(--card);
  border-left: 1px solid var(--line); box-shadow: 0 0 40px #0004; padding: 16px; overflow: auto; z-index: 2; }
#detail header { display: flex; gap: 8px; align-items: center; }
#title { flex: 1; font-size: 16px; unicode-bidi: isolate; }
pre { margin-top: 12px; font: 13px/1.5 ui-monospace, Consolas, monospace; white-space: pre-wrap;
  unicode-bidi: plaintext; }
pre .name { color: var(--main); } pre .text { color: var(--text); } pre .number { color: var(--number); }
#reason:not(:empty) { margin-top: 12px; padding: 8px 12px; border-radius: 8px; background: var(--badtint); }
#inventory { display: grid; gap: 12px; padding: 12px 0; } #inventory > * { padding: 10px 14px; }
summary { cursor: pointer; font-weight: 600; }
#inventory .conflicts { border-color: var(--bad); background: var(--badtint); } .conflicts ul { padding-left: 18px; }
table { width: 100%; border-collapse: collapse; margin-top: 8px; table-layout: fixed; }
th { text-align: left; font-size: 12px; color: var(--soft); }
td, th { padding: 4px 8px 4px 0; border-top: 1px solid var(--line); vertical-align: top; unicode-bidi: isolate; }
summary small, footer { color: var(--soft); font-weight: 400; } footer { padding: 16px 0; font-size: 12px; }
@media (max-width: 1000px) {
  .columns { grid-template-columns: minmax(0, 1fr); } aside { position: static; order: -1; }
  #counts { display: flex; max-height: none; overflow-x: auto; } #counts button { min-width: 120px; } }
@media (max-width: 640px) {
  body { padding: 0 10px; } button, select { padding: 5px 8px; } .row.head { display: none; }
  #tools { position: static; } #tools > * { flex: 1 1 40%; max-width: none; } #tools #search { flex: 1 1 100%; }
  .row { grid-template-columns: 66px minmax(0, 1fr) minmax(0, 70px); gap: 0 8px; contain-intrinsic-size: auto 54px; }
  .row .who { grid-area: 2 / 2; } .row .platform { grid-area: 1 / 3; } .row .login { grid-area: 2 / 3; }
  .row .rest { grid-area: 3 / 2 / 4 / 4; } }
@media (prefers-reduced-motion: no-preference) {
  .row.fresh { animation: fresh 1s; } @keyframes fresh { from { background: var(--tint); } } }
"""

_SCRIPT = r"""
"use strict";
const WORDS = {  // English and Chinese
  events: ["Events", "事件"], inventory: ["Inventory", "属性清单"], accepted: ["accepted", "已接收"],
  refused: ["refused", "已拒绝"], ago: ["5 minutes ago", "5 分钟前"], now: ["now", "现在"],
  search: ["Search in everything", "搜索全部内容"], what: ["Event", "事件"], who: ["Who", "用户"],
  platform: ["Platform", "平台"], outcome: ["Outcome", "结果"], time: ["Time", "时间"], login: ["Login", "登录"],
  properties: ["Properties", "属性"], byEvent: ["Counts by event", "按事件计数"], record: ["Record", "记录"],
  all: ["all", "全部"], pause: ["Pause", "暂停"], resume: ["Go on", "继续"], download: ["Download", "下载"],
  clear: ["Clear", "清空"], copy: ["Copy JSON", "复制 JSON"], copied: ["Copied", "已复制"], close: ["Close", "关闭"],
  downloadHint: ["the accepted ones of what is shown, as JSON lines for upload",
    "把当前显示的已接收记录存为 JSON 行文件，可用 upload 上传"],
  clearHint: ["for everybody: events, inventory, counts", "对所有人清空：事件、清单、计数"], live: ["live", "实时"],
  off: ["the server is gone; waiting for it", "服务器已断开，等待恢复"],
  paused: ["paused, %0 new", "已暂停，新到 %0 条"], peak: ["at most %0 a second", "最高每秒 %0 条"],
  chart: ["Events a second over the last five minutes, at most %0", "最近五分钟每秒事件数，最高 %0"],
  yes: ["yes", "是"], no: ["no", "否"], large: ["no record, or too large to show", "没有记录，或过大无法显示"],
  nothing: ["Nothing has come yet. Send something:\n\nAnalysysPythonSdk(DefaultCollecter(\"%0\"))",
    "还没有收到数据。发送一条试试：\n\nAnalysysPythonSdk(DefaultCollecter(\"%0\"))"],
  none: ["Nothing that is kept fits these filters.", "没有符合筛选条件的记录。"],
  came: ["%0 new events, %1 of them refused", "新到 %0 条事件，其中 %1 条被拒绝"],
  more: ["… %0 more", "…… 还有 %0 项"],
  conflicts: ["Conflicts: the platform wants one type and one spelling for a property",
    "冲突：平台要求同一属性只有一种类型和一种写法"], user: ["user property", "用户属性"],
  event: ["event property", "事件属性"],
  cut: ["There are more events and properties than are counted here.", "事件和属性过多，此处未全部统计。"],
  types: ["Types", "类型"], example: ["Example", "示例"], times: ["%0 times", "%0 次"],
  keys: ["Keys: / search · arrows choose · Enter opens · p pause · Esc closes, then leaves the search",
    "按键：/ 搜索 · 方向键选择 · Enter 打开 · p 暂停 · Esc 关闭，再按离开搜索"],
};
const language = /^zh\b/i.test(navigator.language) ? "zh" : "en";
const t = (key, ...values) => WORDS[key][+(language === "zh")].replace(/%(\d)/g, (_, place) => values[place]);
const $ = id => document.getElementById(id);
const number = value => value.toLocaleString(language);
const KEPT = 1000, SHOWN = 500, COLOURED = 10000;

function plain(value) {
  try {
    return typeof value === "string" ? value : JSON.stringify(value) || "";
  } catch (_) {  // nested too deep for this browser
    return "…";
  }
}

// As JSON escapes them: control characters, and marks that turn the order of letters, so that exe.png is no png.exe.
const visible = text => text.replace(/[\0-\t\v-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
  mark => "\\u" + mark.charCodeAt(0).toString(16).padStart(4, "0"));

// Everything that is shown is made here, as text: what an event holds never becomes markup.
function make(tag, name, ...parts) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...parts.map(part => typeof part === "string" ? visible(part) : part));
  return element;
}

// ---- Events: the newest first
let events = [], newest = 0, chosen = null, paused = false, stale = true;

function parse(line) {
  const event = JSON.parse(line), record = event.record || {};
  event.context = record.xcontext !== null && typeof record.xcontext === "object" ? record.xcontext : {};
  event.raw = line.slice(line.indexOf(',"record":') + 10, -1);  // numbers as they came: JavaScript rounds large ones
  event.what = plain(record.xwhat).slice(0, 300);
  event.who = plain(record.xwho).slice(0, 300);
  event.platform = plain(event.context.$platform).slice(0, 300);
  return event;
}

function fits(event) {
  const text = $("search").value.toLowerCase();
  const what = $("what").value, platform = $("platform").value, outcome = $("outcome").value;
  // As JSON has it, and as it reads: a quote or a backslash in a value is found either way.
  const read = raw => raw.includes("\\") ? raw.replace(/"(?:[^"\\]|\\.)*"/g, text => JSON.parse(text)) : "";
  event.low = event.low || [event.raw, read(event.raw), event.reason || ""].join(" ").toLowerCase();
  return (!what || event.what === what) && (!platform || event.platform === platform)
    && (!outcome || (outcome === "refused") === (event.reason !== null)) && event.low.includes(text);
}

function row(event) {
  if (event.row) return event.row;
  const hidden = /^\$(lib|lib_version|platform|is_login|debug)$/;
  const own = Object.entries(event.context).filter(([name]) => !hidden.test(name)).slice(0, 20);
  const rest = event.reason || own.map(([name, value]) => name + ": " + plain(value).slice(0, 100)).join(", ");
  const time = new Date(event.received).toLocaleTimeString("en-GB"), login = event.context.$is_login;
  const cells = { time, what: event.what || "?", who: event.who, platform: event.platform,
    login: login === true ? t("yes") : login === false ? t("no") : "", rest: rest.slice(0, 400) };
  const spans = Object.entries(cells).map(([name, text]) => make("span", name, text));
  event.row = make("div", event.reason === null ? "row" : "row refused", ...spans);
  event.row.id = "e" + event.n;
  event.row.setAttribute("role", "option");
  event.row.setAttribute("aria-selected", "false");
  event.row.onclick = () => { choose(event); open(event); };
  return event.row;
}

// What is drawn again and again keeps its elements: a click or a focus would be lost with them.
function arrange(parent, children) {
  const wanted = new Set(children);
  for (const one of [...parent.children]) if (!wanted.has(one)) one.remove();
  let next = parent.firstChild;
  for (const one of children)
    if (one === next) next = next.nextSibling;
    else parent.insertBefore(one, next);
}

function show() {
  const rows = events.filter(fits).map(row);
  arrange($("rows"), rows);
  $("hint").textContent = rows.length ? "" : events.length ? t("none") : t("nothing", location.origin);
  options($("platform"), t("platform"), events.map(event => event.platform));
}

function options(select, title, names, show = name => name.slice(0, 60)) {
  const kept = select.value, all = [...new Set([kept, ...names].filter(Boolean))].slice(0, SHOWN).sort();
  if (select.dataset.all === JSON.stringify(all)) return;
  select.dataset.all = JSON.stringify(all);
  const made = [["", title + ": " + t("all")]].concat(all.map(name => [name, show(name)]));
  select.replaceChildren(...made.map(([value, text]) => Object.assign(make("option", "", text), { value })));
  select.value = kept;
}

function choose(event) {
  if (chosen) chosen.row.setAttribute("aria-selected", "false");
  chosen = event;
  if (!event) return $("rows").removeAttribute("aria-activedescendant");
  event.row.setAttribute("aria-selected", "true");
  event.row.scrollIntoView({ block: "nearest" });
  $("rows").setAttribute("aria-activedescendant", event.row.id);
}

function step(by) {
  const shown = events.filter(event => event.row && event.row.isConnected);
  const at = shown.indexOf(chosen), next = shown[at < 0 ? 0 : Math.min(Math.max(at + by, 0), shown.length - 1)];
  if (!next) return;
  choose(next);
  $("detail").hidden ? $("rows").focus({ preventScroll: true }) : open(next);
}

// ---- One record: its exact text, in lines
function pretty(raw) {
  const pieces = [""], say = text => { pieces[pieces.length - 1] += text; };
  const opens = token => token === "{" || token === "[", closes = token => token === "}" || token === "]";
  let depth = 0, before = "";
  for (const token of visible(raw).match(/"(?:[^"\\]|\\.)*":?|[{}[\],]|[^{}[\],:"]+/g)) {
    if (closes(token)) depth--;
    if (before && (before === "," || opens(before) !== closes(token))) say("\n" + "  ".repeat(Math.min(depth, 99)));
    if (opens(token)) depth++;
    if (pieces.length > COLOURED || /^[{}[\],]$/.test(token)) say(token);
    else pieces.push(make("span", token[0] !== '"' ? "number" : token.endsWith(":") ? "name" : "text", token), "");
    if (token.endsWith(":")) say(" ");
    before = token;
  }
  return pieces;
}

function open(event) {
  $("title").textContent = visible(event.what || "?");
  $("reason").textContent = event.reason || "";
  $("json").replaceChildren(...(event.record === null ? [t("large")] : pretty(event.raw)));
  $("detail").hidden = false;
  $("detail").focus();
}

function close() {
  $("detail").hidden = true;
  $("rows").focus({ preventScroll: true });
}

async function copy() {
  const text = $("json").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch (_) {  // not over plain http from elsewhere
    getSelection().selectAllChildren($("json"));
    document.execCommand("copy");
  }
  $("copy").textContent = t("copied");
  setTimeout(() => { $("copy").textContent = t("copy"); }, 1500);
}

function download() {
  const accepted = events.filter(event => fits(event) && event.reason === null && event.record !== null).reverse();
  const href = URL.createObjectURL(new Blob(accepted.map(event => event.raw + "\n")));
  const link = Object.assign(make("a"), { download: "events.jsonl", href });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// ---- Counts, chart and inventory: the server's, of all that came
let inventory = {};

function draw(now, rates) {
  const peak = Math.max(1, ...rates.map(rate => rate[1] + rate[2])), paths = ["", ""];
  for (const [second, accepted, refused] of rates) {
    const x = 299 - (now - second), high = 48 * accepted / peak, bad = 48 * refused / peak;
    if (accepted) paths[0] += `M${x} 50h1v${-high}h-1z`;
    if (refused) paths[1] += `M${x} ${50 - high}h1v${-bad}h-1z`;
  }
  document.querySelectorAll("#chart path").forEach((path, place) => path.setAttribute("d", paths[place]));
  $("peak").textContent = rates.length ? t("peak", number(peak)) : "";
  $("chart").setAttribute("aria-label", t("chart", number(rates.length ? peak : 0)));
}

let drawn = new Map();

function kept(key, build) {
  if (drawn.size > 5 * SHOWN) drawn.clear();
  if (!drawn.has(key)) drawn.set(key, build());
  return drawn.get(key);
}

function count() {
  const sorted = Object.entries(inventory.events).sort((one, other) => other[1].count - one[1].count);
  $("accepted").textContent = number(inventory.accepted);
  $("refused").textContent = number(inventory.refused);
  options($("what"), t("what"), sorted.slice(0, SHOWN).map(([name]) => name).concat(events.map(event => event.what)));
  const items = sorted.slice(0, 50).map(([name, event]) => countOf(name, event, sorted[0][1].count));
  if (sorted.length > 50) items.push(make("li", "", t("more", number(sorted.length - 50))));
  arrange($("counts"), items);
  if (!$("inventory").hidden) list(sorted);
}

function countOf(name, event, most) {
  const build = () => make("li", "", make("button", "", make("bdi", "", name), make("span"), make("i")));
  const item = kept("count " + name, build), button = item.firstChild, [, amount, bar] = button.children;
  amount.textContent = number(event.count);
  bar.style.width = 100 * event.count / most + "%";
  button.setAttribute("aria-pressed", $("what").value === name);
  button.onclick = () => { $("what").value = $("what").value === name ? "" : name; show(); count(); };
  return item;
}

function list(sorted) {
  const parts = [], conflicts = inventory.conflicts;
  if (conflicts.length) {
    const items = conflicts.slice(0, SHOWN).map(({ kind, property, types, spellings }) =>
      make("li", "", `${property} (${t(kind)}): ${tally(types)}; ${spellings.join(", ")}`));
    parts.push(make("div", "conflicts bad", make("h2", "", t("conflicts")), make("ul", "", ...items)));
  }
  if (inventory.cut) parts.push(make("p", "bad", t("cut")));
  const bad = new Set(conflicts.map(conflict => conflict.property));
  for (const [name, event] of sorted.slice(0, SHOWN)) parts.push(eventOf(name, event, bad, sorted.length <= 12));
  if (sorted.length > SHOWN) parts.push(make("p", "", t("more", number(sorted.length - SHOWN))));
  if (!sorted.length) parts.push(make("p", "", t("nothing", location.origin)));
  arrange($("inventory"), parts);
}

function eventOf(name, event, bad, open) {
  const title = () => make("summary", "", make("bdi", "", name), " ", make("small"));
  const build = () => Object.assign(make("details", "", title(), make("table")), { open, ontoggle: count });
  const details = kept("event " + name, build);
  details.querySelector("small").textContent = t("times", number(event.count));
  details.lastChild.replaceChildren(...details.open ? properties(event, bad) : []);
  return details;
}

const tally = types => Object.entries(types).map(([type, times]) => `${type} ${number(times)}`).join(", ");

function properties(event, bad) {
  const line = (tag, name, texts) => make("tr", name, ...texts.map(text => make(tag, "", text)));
  const rows = Object.entries(event.properties).slice(0, SHOWN).map(([name, { types, example }]) =>
    line("td", bad.has(name.toLowerCase()) ? "bad" : "", [name, tally(types), plain(example)]));
  return [line("th", "", ["properties", "types", "example"].map(key => t(key))), ...rows];
}

async function look() {  // where a look takes long, the next one is far
  const start = performance.now();
  try {
    const rates = await (await fetch("/api/rates")).json();
    draw(rates.now, rates.rates);
    if (stale) {
      stale = false;
      inventory = await (await fetch("/api/inventory")).json();
      count();
    }
  } catch (_) {
    stale = true;
  }
  setTimeout(look, Math.max(1000, 5 * (performance.now() - start)));
}

// ---- The stream. What came waits for a moment, so that thousands a second are shown at once, or as long as it pauses
let waiting = [], told = [0, 0], live = true;

function connect() {
  const source = new EventSource("/api/stream");
  source.onopen = () => { live = stale = true; };
  source.onerror = () => {
    live = false;
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
  };
  source.onmessage = message => {
    const event = parse(message.data);
    if (event.n <= newest) return;  // seen before the connection was lost
    newest = event.n;
    waiting.push(event);
    if (waiting.length > KEPT) waiting.shift();
    told = [told[0] + 1, told[1] + (event.reason !== null)];
    stale = true;
  };
  source.addEventListener("clear", message => {
    newest = +message.lastEventId;
    events = []; waiting = []; stale = true;
    choose(null);
    $("detail").hidden = true;
    show();
  });
}

function settle() {
  if (!paused && waiting.length) {
    const fresh = waiting.splice(0).reverse();
    events = fresh.concat(events).slice(0, KEPT);
    fresh.slice(0, 50).forEach(event => row(event).classList.add("fresh"));
    show();
  }
  const text = !live ? t("off") : paused ? t("paused", number(waiting.length)) : t("live");
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = live ? "" : "off";
}

function pause() {
  paused = !paused;
  $("pause").textContent = t(paused ? "resume" : "pause");
  $("pause").setAttribute("aria-pressed", paused);
}

const clear = () => fetch("/api/events", { method: "DELETE" });

function turn(to) {
  for (const view of ["events", "inventory"]) {
    $(view).hidden = view !== to;
    $("tab-" + view).setAttribute("aria-selected", view === to);
  }
  if (inventory.events) count();
}

document.addEventListener("keydown", press => {
  if (press.ctrlKey || press.altKey || press.metaKey) return;
  const field = /^(INPUT|SELECT)$/.test(document.activeElement.tagName), key = press.key;
  if (key === "Escape") $("detail").hidden ? document.activeElement.blur() : close();
  else if (key === "/" && document.activeElement !== $("search")) { turn("events"); $("search").focus(); }
  else if (field) return;
  else if (key === "p") pause();
  else if (key === "ArrowDown" && !$("events").hidden) step(1);
  else if (key === "ArrowUp" && !$("events").hidden) step(-1);
  else if (key === "Enter" && document.activeElement === $("rows") && chosen && chosen.row.isConnected) open(chosen);
  else return;
  press.preventDefault();
});

document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
for (const one of document.querySelectorAll("[data-t]")) one.textContent = t(one.dataset.t);
for (const one of document.querySelectorAll("[data-title]")) one.title = t(one.dataset.title);
for (const one of document.querySelectorAll("[data-label]")) one.setAttribute("aria-label", t(one.dataset.label));
$("search").placeholder = t("search") + "  /";
options($("what"), t("what"), []);
options($("outcome"), t("outcome"), ["accepted", "refused"], t);
$("search").oninput = show;
for (const id of ["what", "platform", "outcome"]) $(id).onchange = () => { show(); stale = true; };
$("tools").onsubmit = () => false;
for (const act of [pause, download, clear, copy, close]) $(act.name).onclick = act;  // a button has the name of its act
for (const view of ["events", "inventory"]) $("tab-" + view).onclick = () => turn(view);
setInterval(() => {  // not more often: a screen reader reads it aloud
  if (told[0]) $("news").textContent = t("came", number(told[0]), number(told[1]));
  told = [0, 0];
}, 5000);
draw(0, []);
show();
connect();
look();
setInterval(settle, 150);
"""


########################################################################################################################
# Shipper: upload, which delivers files that others wrote, or checks them only
#
#   PATHs --_Listing, _Files--> the next file --_Places--> a `_Log` at its place --_Shipment, a queue--> the sender
#
# - `_Listing` says which files there are, and `_Files` which of them are to be read now.
# - A `_Text` is what one file holds, unpacked; a `_Log` makes lines of it.
# - `_Places` finds out which file it is, whatever its name, and up to where it is settled; a `_Checkpoint` for each
#   directory has that in memory, and its `_Journal` on disk.
#
# One thread does it all. A signal handler only sets a flag and wakes that thread where it waits; whatever reads looks
# at the flag every block, and a request under way is waited for: so a stop loses and doubles nothing. What is taken and
# not settled is nowhere noted, or as a *hole* before the place that is: it is read again by the next run. Whoever
# is killed between an answer and its note, which is one write, delivers that batch again.
########################################################################################################################


class _Stopped(BaseException):
    """Somebody asked to stop while something was read."""


class _Stop:
    """Asks to stop when a signal comes. Used as a context manager, in the main thread; elsewhere no signal comes."""

    def __init__(self) -> None:
        self.asked = 0  # how many signals came
        self._deadline = float("inf")  # `_CLOCK`; where reading ends in any case
        self._heeded = 0  # signals that were acted upon
        self._waking = threading.Lock()  # held; released by the handler: an Event has a lock that it might interrupt
        self._waking.acquire()
        self._kept: "Dict[int, Any]" = {}

    def __enter__(self) -> "_Stop":
        if threading.current_thread() is threading.main_thread():
            self._kept = _handle(SIGINT=self._on_signal, SIGTERM=self._on_signal, SIGHUP=self._on_signal)
        return self

    def __exit__(self, *_: "Any") -> None:
        _restore(self._kept)

    def _on_signal(self, number: int, _: "Any") -> None:
        self.asked += 1
        try:
            self._waking.release()
        except RuntimeError:  # it is open already, maybe by one more signal just now
            pass

    def check(self) -> None:
        """Raise _Stopped where reading is to end."""
        if self.asked > self._heeded or _CLOCK.now() > self._deadline:
            raise _Stopped

    def wait(self, moment: float) -> None:
        """Wait until *moment* (`_CLOCK`), or a signal."""
        if not self.asked:
            _CLOCK.wait(self._waking, max(0.0, moment - _CLOCK.now()))

    def grant(self, seconds: float) -> None:
        """Let reading go on for *seconds*, or until one more signal comes."""
        self._heeded, self._deadline = self.asked, _CLOCK.now() + seconds


# Which files
#
# `_Listing` knows what is there, and `_Files` what of that is to be read now: what is new or has changed since. A file
# that is followed may grow whatever its name says, and there may be 20,000: so all are looked at by turns, the newest
# each time, and at once those of which the system tells (`_Bell`). What cannot be read for now is tried at each look.


@functools.lru_cache(maxsize=1 << 15)
def _age(name: str) -> "Tuple[int, int, int, str]":
    """Return what log files are ordered by, old ones first: their period, then what rotation says."""
    found: "Any" = re.fullmatch(_LOG_FILE, name)
    period, turned = found.group(1), (found.group(2) or "") + (found.group(3) or "")
    turns = [int(digits) for digits in re.findall(r"\d+", turned.replace(".bz2", "").replace("7z", ""))]
    rank = (2, 0) if not turns else (0, turns[0]) if turns[0] >= 10**5 else (1, -turns[0])  # a date, or a number
    rank = (3, 0) if turned in ("",) + _PACKED else rank
    return int(period) * (100 if len(period) == 8 else 1), rank[0], rank[1], name  # a day as its first hour


def _period(path: str) -> int:
    return _age(os.path.basename(path))[0]


def _is_there(path: str) -> bool:
    return path == "-" or os.path.lexists(path)


def _stat(path: str) -> "Any":
    """Return what changes when a file is written to or replaced; None where there is no file."""
    try:
        return _identity(os.stat(path))
    except OSError:
        return None


def _identity(found: "os.stat_result") -> "Any":
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _Listing:
    """The files that the PATHs stand for, in order. A directory is listed again only when it has changed."""

    def __init__(self, paths: "List[str]", own: "Iterable[str]", follow: bool) -> None:
        self.paths = paths
        self.is_followed = follow
        self.problems: "Dict[str, str]" = {}  # path of a file or directory -> why it cannot be read
        self.folders: "Dict[str, Tuple[Any, List[str]]]" = {}  # directory -> (when it was changed, the files in it)
        self._own = {os.path.abspath(path) for path in own if path}
        # Followed file -> which one it is, what it is called where the path is a link, other names of those that it was
        self._rotated: "Dict[str, Tuple[Any, str, List[str]]]" = {}
        self._parts: "List[List[str]]" = []  # what the PATHs were last,
        self._found: "List[str]" = []  # and all() made of it
        self._told: "set[str]" = set()

    def all(self) -> "List[str]":
        """Return all files, each once."""
        parts = []
        for path in self.paths:
            if path != "-" and os.path.isdir(path):
                parts.append(self._list(os.path.dirname(os.path.join(path, ""))))  # without a slash at its end
            elif self._is_own(path):
                self.tell("%s is our own: it is not read", path)
            else:
                parts.append(self._with_rotated(path) if self.is_followed else [path])
        if parts != self._parts:  # directories that have not changed are the same objects: that is quick
            found: "Dict[object, str]" = {}
            for path in reversed(list(itertools.chain.from_iterable(parts))):
                found.setdefault(self._file(path), path)  # of several names the last one tells whether it may grow
            is_whole = not any(isinstance(file, str) for file in found)
            self._parts, self._found = parts if is_whole else [], list(found.values())[::-1]
        return self._found

    def may_grow(self, path: str) -> bool:
        """Tell whether the last line of *path* may still be written: it is followed, and there is no newer one."""
        folder, name = os.path.split(path)
        listed = self.folders.get(folder) if re.fullmatch(_LOG_FILE, name) else None
        if not self.is_followed or any(path in names for _, _, names in self._rotated.values()):
            return False
        return listed is None or path == (listed[1] or [""])[-1]

    def old(self, paths: "Iterable[str]") -> "List[str]":
        """Return those of *paths* that are neither of the current period nor of the newest one, by their names."""
        current = [_period(time.strftime(pattern)) for pattern in _LOG_NAMES.values()]
        logs = [path for path in paths if re.fullmatch(_LOG_FILE, os.path.basename(path))]
        folders = set(map(os.path.dirname, logs))
        newest = {folder: max(map(_period, self._list(folder or ".")), default=0) for folder in folders}
        return [path for path in logs if _period(path) not in current and _period(path) < newest[os.path.dirname(path)]]

    def is_foreign(self, path: str, text: "_Text") -> bool:
        """Tell whether *path*, opened as *text*, is a link in a directory to a file of another owner than its own.

        It is the open file that is asked, since a link can be turned elsewhere meanwhile.
        """
        if path in self.paths or not os.path.islink(path) or os.lstat(path).st_uid == text.owner:
            return False
        self.tell("%s is a link to another user's file: it is not read", path)
        return True

    def fail(self, path: str, error: BaseException) -> None:
        """Note that *path* cannot be read, and say so."""
        why = getattr(error, "strerror", None) or error
        self.problems[path] = "cannot read %s: %s" % (_printable(path), _printable(why))
        self.tell("%s", self.problems[path])

    def tell(self, message: str, *values: str) -> None:
        """Say something, once."""
        text = message % tuple(map(_printable, values))
        if text not in self._told:
            self._told.add(text)
            _print("analysys: " + text, "stderr")

    def _with_rotated(self, path: str) -> "List[str]":
        """Return a followed file and, before it, what was at its path and has another name now: it may have more.

        It was renamed, or a link at the path was turned to the next file beside it.
        """
        import glob

        before, target, names = self._rotated.get(path, (None, "", []))
        now = (_stat(path) or ())[:2] or None
        if before not in (now, None):
            others = [os.path.join(os.path.dirname(path), target)]
            others += sorted(glob.glob(glob.escape(os.path.splitext(path)[0]) + "*"))
            names = names + [other for other in others if (_stat(other) or ())[:2] == before and other not in names]
        self._rotated[path] = now, os.path.basename(os.path.realpath(path)), names
        return names + [path]

    def _file(self, path: str) -> object:
        """Return what names of one file have in common: links, and what lies in a directory that is given twice.

        Of one that is not there, or not yet, it is a str.
        """
        try:
            named = found = os.lstat(path)
            if stat.S_ISLNK(named.st_mode):
                found = os.stat(path)
        except OSError:
            return os.path.abspath(path)
        is_read = named.st_uid == found.st_uid or path in self.paths  # else it must not stand for the file's own name
        return _inode(found) if is_read and found.st_ino and path != "-" else (path,)

    def _list(self, folder: str) -> "List[str]":
        """Return the log files in a directory, and name what else looks like records."""
        try:
            changed = os.stat(folder).st_mtime_ns
            known = self.folders.get(folder)
            if known is not None and known[0] == changed:
                return known[1]
            names = os.listdir(folder)
        except OSError as error:
            self.fail(folder, error)
            return []
        self.problems.pop(folder, None)
        found = sorted(filter(re.compile(_LOG_FILE).fullmatch, names), key=_age)
        paths = [os.path.join(folder, name) for name in found]
        fresh = time.time() - changed / 1e9 < 2  # a change in the same tick of the clock would not show
        self.folders[folder] = (None if fresh else changed, paths)
        others = sorted(name for name in set(names) - set(found) if re.search(_OTHER_NAME, name))[:_LOOKED_AT]
        others = [name for name in others if self._looks_like_records(os.path.join(folder, name))]
        if others:
            self.tell("not read, though they look like records, in %s: %s", folder, ", ".join(others[:10]))
        if not paths and not self.is_followed:
            self.tell("there is no datas_*.log in %s", folder)
        return paths

    def _looks_like_records(self, path: str) -> bool:
        try:
            with _open_text(path) as text:
                return not self._is_own(path) and b'"xwhat"' in text.head and not _is_rejection(text.head)
        except Exception:
            return False

    def _is_own(self, path: str) -> bool:
        """Tell whether *path* is a file that we write, by its name or by being one."""
        is_ours = re.fullmatch(_OWN_NAME, os.path.basename(path)) or os.path.abspath(path) in self._own
        return path != "-" and bool(is_ours)


class _Bell:
    """Tells which files of directories were written to, where the system does, so that nobody has to look at all.

    It is Linux' inotify, for which Python has no module. It does not know what other machines write over a network,
    nor of what lies behind a link.
    """

    def __init__(self) -> None:
        self._libc: "Any" = None
        self._fd = -1
        self._folders: "Dict[int, str]" = {}  # by the number of their watch
        try:
            import ctypes

            self._libc = ctypes.CDLL(None)
            self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        except (ImportError, OSError, AttributeError, TypeError):  # then files are looked at by turns
            pass

    def rung(self, folders: "Iterable[str]") -> "Optional[set[str]]":
        """Return the paths of what was written to in *folders* since the last call; None: it may be any of them."""
        import struct

        for folder in itertools.islice(folders if self._fd >= 0 else (), _LOOKED_AT):  # it may be another one by now
            self._folders[self._libc.inotify_add_watch(self._fd, os.fsencode(folder), _INOTIFY)] = folder
        self._folders[-1] = ""  # where a watch is refused; and of an event that says that some were lost
        rung = set()
        try:
            while self._fd >= 0:
                data = os.read(self._fd, _CHUNK)
                while data:
                    watch, size = struct.unpack_from("i8xI", data)
                    rung.add(os.path.join(self._folders[watch], os.fsdecode(data[16 : 16 + size].rstrip(b"\0"))))
                    data = data[16 + size :]
        except BlockingIOError:  # there is no more
            pass
        return None if "" in rung else rung

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Files:
    """Which of the files are to be read now: those that are new, or have changed since they were read."""

    def __init__(self, listing: "_Listing", check: "Callable[[], None]") -> None:
        self.listing = listing
        self.waiting: "Deque[str]" = collections.deque()  # those that are to be read, in order
        self.due_at = 0.0  # `_CLOCK`; when to look for more
        self.check = check  # raises where reading is to end
        # path -> its _identity() when it was opened, and whether its last line is left, since it may grow
        self._seen: "Dict[str, Tuple[Any, bool]]" = {}
        self._turn = 0  # which of the files is looked at next
        self._bell = _Bell() if listing.is_followed else None

    def next(self) -> "Optional[str]":
        """Return the file to read next, if there is one now."""
        now = _CLOCK.now()
        if not self.waiting and now >= self.due_at:
            self.check()
            self.due_at = now + _FOLLOW_EVERY if self.listing.is_followed else float("inf")
            self.waiting.extend(self._changed())
        return self.waiting.popleft() if self.waiting else None

    def finish(self, text: "_Text", is_unended: bool) -> None:
        """Note that a file is read to its end, as it was when it was opened."""
        self._seen[text.path] = text.identity, is_unended
        self.listing.problems.pop(text.path, None)

    def fail(self, path: str, error: BaseException, identity: "Any") -> None:
        """Note that *path* could not be read; what is wrong with its content is so until that changes."""
        is_gone = isinstance(error, FileNotFoundError) and not os.path.lexists(path)
        if isinstance(error, _Changed):
            self.waiting.appendleft(path)
        elif is_gone and path not in self.listing.paths:
            self.listing.tell("%s is gone: it was renamed or removed before it was read", path)
            self.look_again(path)  # it is to be read under its new name
        elif not is_gone or not self.listing.is_followed:
            self.listing.fail(path, error)
            if getattr(error, "errno", None) is None or not self.listing.is_followed:
                self._seen[path] = identity, False

    def look_again(self, path: str) -> None:
        """Have next() return *path* once more in a moment, and whatever else is there by then."""
        self._seen.pop(path, None)
        self.due_at = _CLOCK.now() + _LOOK_AGAIN

    def close(self) -> None:
        if self._bell is not None:
            self._bell.close()

    def _changed(self) -> "List[str]":
        """Return the files that are new or have changed since they were read, in order."""
        found = self.listing.all()
        rung = self._bell.rung(self.listing.folders) if self._bell is not None else set()
        # Some are looked at by turns and the newest each time; all of them only where the system could not tell.
        begin = self._turn if self._turn < len(found) else 0
        self._turn = begin + _LOOKED_AT
        looked_at = set(found) if rung is None else rung.union(found[begin : self._turn], found[-_LOOKED_AT // 4 :])
        due = [path for path in found if path not in self._seen or path in looked_at and self._is_due(path)]
        return [path for path in due if not self.listing.is_followed or _is_there(path)]

    def _is_due(self, path: str) -> bool:
        """Tell whether a file that was read has changed since, or will not grow any more."""
        identity, is_unended = self._seen[path]
        return path != "-" and identity != _stat(path) or is_unended and not self.listing.may_grow(path)


# One file: its text, and the lines of that


class _Changed(OSError):
    """What was read of a file is not there any more."""


class _Text:
    """The text of one file in blocks, from any offset on; it notices when what it has read was changed."""

    is_packed = False
    is_paused = False  # whether there is no more only for now

    def __init__(self, path: str, raw: "Any", unpack: "Callable[[], Any]", check: "Callable[[], None]") -> None:
        self.path = path
        self.offset = 0  # of the next block
        self.before = b""  # up to _HASHED bytes before that
        found = os.fstat(raw.fileno())
        self.identity, self.owner = _identity(found), found.st_uid
        self._raw = raw
        self._unpack = unpack  # makes
        self._file = unpack()  # what unpacks it, or the same
        self.check = check  # raises where reading is to end
        self.head = self._read_head()  # up to _HASHED bytes at the beginning

    def __enter__(self) -> "_Text":
        return self

    def __exit__(self, *_: "Any") -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def read(self, size: int, kept: int = 0) -> bytes:
        """Return up to *size* bytes, none at the end. What is damaged raises, after what is before that.

        What cannot be read twice can go back as far as to offset *kept*.
        """
        self.check()
        data = self._read(size)
        if len(self.head) < _HASHED:  # it has grown since it was opened
            self.head = (self.head[: self.offset] + data)[:_HASHED]
        self._pass(data, kept)
        return data

    def go(self, offset: int) -> bool:
        """Have the next block begin at *offset*; return whether there is such a place."""
        self.offset, self.before = max(0, offset - _HASHED), b""  # from a little before it: that is what tells a change
        self._file.seek(self.offset)
        self._pass(self._file.read(offset - self.offset))
        return self.offset == offset

    def goes_on(self, earlier: "_Text") -> bool:
        """Tell whether all that was read of the file *earlier* is still there."""
        return self.go(earlier.offset) and self.before == earlier.before

    def fits(self, entry: "Record") -> bool:
        """Go to the place that a checkpoint's entry speaks of; return whether what is before it is what was there."""
        size, digest = entry["tail"]
        return self.go(entry["place"][0]) and _hash(self.before[max(0, len(self.before) - size) :]) == digest

    def _read(self, size: int) -> bytes:
        overlap = len(self.before)
        self._file.seek(self.offset - overlap)
        data: bytes = self._file.read(overlap + size)
        if data[:overlap] != self.before:
            raise _Changed("it was changed while it was read")
        return data[overlap:]

    def _pass(self, data: bytes, kept: int = 0) -> None:
        self.offset += len(data)
        self.before = (self.before + data if len(data) < _HASHED else data)[-_HASHED:]

    def _read_head(self) -> bytes:
        head, data, read = b"", b"-", self._file.read1 if self.is_packed else self._file.read
        try:
            while data:
                data = read(_HASHED - len(head))
                head += data
        except Exception:  # it will come again where the lines are read
            pass
        self._rewind()
        return head

    def _rewind(self) -> None:
        self._raw.seek(0)
        self._file = self._unpack()  # anew: where gzip could read nothing, its seek(0) stays behind that


class _PackedText(_Text):
    """The text of a packed file: it is unpacked from its beginning to reach a place."""

    is_packed = True

    def go(self, offset: int) -> bool:
        if offset < self.offset:
            self._rewind()
            self.offset, self.before = 0, b""
        data = b"-"
        while data and self.offset < offset:
            self.check()
            data = self._file.read1(min(_CHUNK, offset - self.offset))
            self._pass(data)
        return self.offset == offset

    def _read(self, size: int) -> bytes:
        return bytes(self._file.read1(size))


class _StreamText(_Text):
    """The text on standard input, which comes when it comes and is there once: what may be asked for again is kept."""

    def __init__(self, path: str, raw: "Any", unpack: "Callable[[], Any]", check: "Callable[[], None]") -> None:
        super().__init__(path, raw, unpack, check)
        self.is_packed = not isinstance(self._file, _Input)
        self._ahead = b""  # what is to come again

    def go(self, offset: int) -> bool:
        back = self.offset - offset
        self._ahead, self.before = self.before[len(self.before) - back :] + self._ahead, self.before[: -back or None]
        self.offset = offset
        return True

    def _read(self, size: int) -> bytes:
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if data:
            return data
        self.is_paused = not self.is_packed and not self._file.is_ready()
        return b"" if self.is_paused else bytes(self._file.read1(size))

    def _pass(self, data: bytes, kept: int = 0) -> None:
        self.offset += len(data)
        self.before = (self.before + data)[-max(_HASHED, self.offset - kept) :]

    def _read_head(self) -> bytes:
        return b""


class _Input:
    """Standard input, also for what unpacks it. It waits for more only as long as nobody asks to stop."""

    WHOLE = 12  # bytes that are asked for at once and must come at once: what a packed text is known by, and its end

    def __init__(self, raw: "Any", check: "Callable[[], None]") -> None:
        self._raw = raw
        self._check = check
        self._ahead = b""  # what was looked at

    def look(self, size: int) -> bytes:
        """Return what comes next, *size* bytes or more of it; fewer only at the end."""
        while len(self._ahead) < size:
            while not _is_ready(self._raw):
                self._check()
            data = self._raw.read(io.DEFAULT_BUFFER_SIZE)
            if data == b"":
                break
            self._ahead += data or b""  # None: it does not block, and there was nothing after all
        return self._ahead

    def is_ready(self) -> bool:
        """Wait a moment; return whether read1() would not wait."""
        return bool(self._ahead) or _is_ready(self._raw)

    def read(self, size: int) -> bytes:
        self.look(min(size, self.WHOLE))
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    def read1(self, size: int) -> bytes:
        self.look(1)
        return self.read(min(size, len(self._ahead)))

    def close(self) -> None:
        self._raw.close()


def _open_text(path: str, check: "Callable[[], None]" = lambda: None) -> "_Text":
    """Open a regular file without waiting for anything, or standard input, whatever packs it."""
    if path == "-":
        raw: "Any" = io.open(0, "rb", buffering=0, closefd=False)
        stream = _Input(raw, check)
        head = stream.look(_Input.WHOLE)
        _check_form(head)
        return _StreamText(path, raw, functools.partial(_unpacking, head, stream), check)
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    raw = io.open(fd, "rb", buffering=0) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    if raw is None:
        os.close(fd)
        raise OSError("not a regular file" + (": give it as -, on standard input" if os.path.exists(path) else ""))
    try:
        head = raw.read(_HASHED)
        raw.seek(0)
        unpack = functools.partial(_unpacking, head, raw)
        text = (_Text if unpack() is raw else _PackedText)(path, raw, unpack, check)
        _check_form(text.head)
        return text
    except BaseException:
        raw.close()
        raise


def _unpacking(head: bytes, raw: "Any") -> "Any":
    """Return what reads the text of a file that begins with *head*, whatever its name."""
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return gzip.GzipFile(fileobj=raw, mode="rb")
    if head.startswith(b"BZh"):
        import bz2

        return _Unpacked(raw, bz2.BZ2Decompressor)
    if head.startswith(b"\xfd7zXZ\0"):
        import lzma

        return _Unpacked(raw, functools.partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _MAX_UNPACKING))
    return raw


class _Unpacked:
    """What a file holds that bzip2 or xz packed: streams, each of which *stream()* makes what unpacks it.

    The library's own readers take what they do not know behind a stream, or zeros between two, for the end of all.
    """

    def __init__(self, raw: "Any", stream: "Callable[[], Any]") -> None:
        self._raw = raw
        self._next_stream = stream
        self._stream: "Any" = None

    def read1(self, size: int) -> bytes:
        """Return up to *size* bytes, none at the end."""
        data = b""
        while size and not data:
            packed = b""
            if self._stream is None or self._stream.eof:
                packed = self._next_begins()
                if not packed:
                    return b""
                self._stream = self._next_stream()
            elif self._stream.needs_input:
                packed = self._raw.read(_CHUNK)
                if not packed:
                    raise EOFError("it ends before what was packed does")
            try:
                data = self._stream.decompress(packed, size)
            except Exception as error:  # lzma has its own
                advice = " (at most %d bytes of memory; xz -d unpacks it)" % _MAX_UNPACKING
                raise OSError("%s%s" % (error, advice if "limit" in str(error) else "")) from None
        return data

    def _next_begins(self) -> bytes:
        """Return the first bytes of the next stream, behind zeros, which xz may have there; none at the end."""
        packed: bytes = self._stream.unused_data if self._stream is not None else b""
        while not packed.lstrip(b"\0"):
            packed = self._raw.read(_CHUNK)
            if not packed:
                return b""
        return packed.lstrip(b"\0")

    def close(self) -> None:
        self._raw.close()


_OTHER_FORMS = (
    ((b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"{\0\0\0", b"\0\0\0{"), "UTF-32", "convert it (iconv -f UTF-32 -t UTF-8)"),
    ((b"\xff\xfe", b"\xfe\xff", b"{\0", b'\0{\0"'), "UTF-16", "convert it (iconv -f UTF-16 -t UTF-8)"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it (zstd -d)"),
    (b"\x04\x22\x4d\x18", "packed by lz4", "unpack it (lz4 -d)"),
    (b"\x1f\x9d", "packed by compress", "unpack it (uncompress)"),
    (b"\x5d\0\0", "packed by lzma", "unpack it (xz -d)"),
    (b"LZIP", "packed by lzip", "unpack it (lzip -d)"),
    (b"PK\3\4", "a zip archive", "unpack it (unzip)"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it (7z x)"),
    (b"ustar", "a tar archive", "unpack it (tar -x)"),
)


def _check_form(head: bytes) -> None:
    """Raise where a file that begins with *head* holds no lines, but what somebody has to unpack or convert first."""
    for begins, form, advice in _OTHER_FORMS:
        if head.startswith(begins) or head[257:262] == begins:  # where tar says what it is
            raise OSError("it is %s: %s first" % (form, advice))


def _is_ready(stream: "Any") -> bool:
    """Wait a moment for standard input; return whether a read would not wait."""
    import select

    try:
        return bool(select.select([stream.fileno()], [], [], _STREAM_WAIT)[0])
    except (OSError, ValueError):  # Windows: it has to wait
        return True


class _Log(_Source):
    """One file that others write: its lines, from where *entry* says on, and what it is known by."""

    def __init__(self, text: "_Text", checkpoint: "_Checkpoint", entry: "Record") -> None:
        super().__init__(os.path.basename(text.path), (*entry["place"], entry.get("holes", ())))
        self.text = text
        self.checkpoint = checkpoint
        self.entry = entry  # the checkpoint's, which other sources may share
        self.can_reopen = not text.is_packed
        text.go(self.offset)
        self._tail = [text.before]  # what comes before the place, as far as it is known

    def resume(self, text: "_Text") -> None:
        """Go on reading, from *text*, which is what the file has become."""
        self.text, self.is_read, self._reader = text, False, None
        self.name = self.entry["name"] = os.path.basename(text.path)

    def open(self, offset: int) -> "Callable[[int], bytes]":
        def read(size: int) -> bytes:  # of several at a time, each from where it was
            nonlocal offset
            if self.text.offset != offset and not self.text.go(offset):
                raise _Changed("it was changed while it was read")
            data = self.text.read(size, self.ranges[0][0])
            if not self.number and not self.flight and _is_rejection(data):
                raise OSError('these are lines of a rejected.log; what was rejected is the member "record" of each')
            offset = self.text.offset
            return data

        return read

    def is_final(self, text: bytes) -> bool:
        return not self.text.is_paused

    def settle(self, line: "_Line") -> None:
        """As a source does, but where the last line is broken the place stays before it: it may be ended."""
        text = self.flight.pop(line.start).text  # as it is in the file
        self.entry["settled"] += 1
        if text[-1] not in b"\r\n" and _damage(text, line.length) is not None:
            self.entry["cut"] = line.length
        elif line.end > self.offset:
            is_whole = len(text) == line.length
            if line.start != self.offset or not is_whole:
                self._tail.clear()
            self._tail.append(text if is_whole else b"")
            self.offset, self.number = line.end, line.number

    def pass_over(self) -> "List[_Line]":
        """Return the next lines, which nobody is going to settle."""
        lines: "List[_Line]" = []
        self.take(lines, _TOGETHER, _MAX_TAKEN)
        while len(self.flight) > 1:  # one stays, which tells that not all is settled
            self.flight.popitem()
        return lines

    def mark(self) -> None:
        """Write into the entry how far the lines are settled, and what that is known by."""
        offset, number, holes = self.position()
        if offset > self.offset:  # what is blank there was not kept
            offset, number = self.offset, self.number
        head, self._tail = self.text.head[:offset], [b"".join(self._tail)[-_HASHED:]]
        tail = self._tail[0] if offset == self.offset else b""
        size = max([size for size in _HEAD_SIZES if size <= len(head)] + [0])
        cut = self.entry.get("cut", 0) if offset == self.entry["place"][0] else 0
        known = {"head": [size, _hash(head[:size])], "tail": [len(tail), _hash(tail)]}
        self.entry.update(known, place=[offset, number], holes=holes, cut=cut)


def _is_rejection(text: bytes) -> bool:
    """Tell whether *text* begins with a line of a ``rejected.log``."""
    return re.match(br'\s*\{"file": ?"[^"]*", ?"line": ?\d+, ?"reason": ?"', text) is not None


def _hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:32]


# What is settled
#
# A note is written when the server has answered for a batch, and before the next one goes out: so whoever is killed
# repeats that batch at most. A note is one write into room that the file already has, so a full disk cannot come
# between an answer and its note. fsync comes once a second, and before a file is removed. The lock is a file of its
# own, since the journal is replaced at each start.


class _Journal:
    """A file of lines of our own, to which a line is appended at the cost of one write, and which one process has."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock_fd = self._fd = -1
        self._end = self._room = 0  # where the next line goes, and where the blank lines end that it replaces
        self._most = 0  # how far it may grow
        self._synced_at = float("inf")  # `_CLOCK`; when the oldest line came that may not survive a power cut

    def open(self) -> bytes:
        """Keep other processes away, and return what is there."""
        self._lock_fd = _open_own_lines(self.path + ".lock")
        if not _try_lock(self._lock_fd, _LOCKF):
            raise AnalysysPythonSdkFileException("another upload is at work: it holds %s.lock" % self.path)
        if not os.path.lexists(self.path):
            return b""
        with io.open(_open_own(self.path, os.O_RDONLY), "rb") as file:
            return file.read()

    def write_anew(self, text: bytes) -> None:
        """Have the file hold *text*, or what it held where that fails."""
        # A draft is renamed over it when all of it is on disk: so there is always a whole one.
        draft = self.path + ".new"
        if os.path.lexists(draft):
            os.unlink(draft)
        fd = _open_own(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            _write_all(fd, text + b"\n" * _ROOM)
            os.fsync(fd)
            os.replace(draft, self.path)
            fd, self._fd = self._fd, fd  # not opened by its path, which may be another one by now
        except BaseException:
            _unlink(draft)  # it may be what fills the disk
            raise
        finally:
            if fd >= 0:
                os.close(fd)
        _sync_directory(os.path.dirname(self.path))
        self._end, self._room = len(text), len(text) + _ROOM
        self._most = max(_ROLL_SIZE, 4 * len(text))

    def is_long(self) -> bool:
        """Tell whether it has grown so much that it is better written anew."""
        return self._end > self._most

    def is_gone(self) -> bool:
        """Tell whether somebody removed or replaced it."""
        try:
            return _inode(os.lstat(self.path)) != _inode(os.fstat(self._fd))
        except FileNotFoundError:
            return os.path.isdir(os.path.dirname(self.path))  # else there is no place for another one
        except OSError:
            return False

    def append(self, text: bytes) -> None:
        """Write lines, and make room for the next ones."""
        try:
            self._write(self._end, text)
            self._end += len(text)
            self._room = max(self._room, self._end)
            if self._room - self._end < _ROOM // 2:
                self._write(self._room, b"\n" * _ROOM)
                self._room += _ROOM
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._synced_at = min(self._synced_at, _CLOCK.now())
        self.sync(_SYNC_EVERY)

    def sync(self, age: float) -> None:
        """Have lines survive a power cut that are older than *age* seconds."""
        if self._fd >= 0 and _CLOCK.now() - self._synced_at >= age:
            self._synced_at = float("inf")
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Let other processes in."""
        self.sync(0.0)
        for fd in (self._fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._lock_fd = -1

    def _write(self, offset: int, data: bytes) -> None:
        os.lseek(self._fd, offset, os.SEEK_SET)
        while data:
            data = data[os.write(self._fd, data) :]


class _Checkpoint:
    """What is settled of which file of a directory.

    Of the notes about one file ("n") the last one holds. A file is known by hashes: of its first bytes (a power of two
    of them, so that few have to be tried), and of those before the place up to which it is settled, but for its holes.
    Without a journal nothing is kept.
    """

    def __init__(self, journal: "Any") -> None:
        self.journal = journal
        self._entries: "Dict[int, Record]" = {}  # by "n"; the one noted last at the end
        self._heads: "Dict[Tuple[int, str], List[int]]" = {}  # (how many first bytes, their hash) -> "n"; old ones too
        self._names: "Dict[str, int]" = {}  # name -> the last "n" of that
        self._last = 0  # the highest "n"

    def open(self, names: "Iterable[str]") -> None:
        """Read the notes, beside those in memory, and write all anew, compact; *names*: of the files there are."""
        try:
            self._load(self.journal.open())
            self.make_compact(names)
        except AnalysysPythonSdkFileException:
            raise
        except (OSError, ValueError) as error:
            message = "cannot use the checkpoint %s (--checkpoint FILE names another): %s" % (self.journal.path, error)
            raise AnalysysPythonSdkFileException(message) from error

    def make_compact(self, names: "Iterable[str]") -> None:
        """Write down the last note of each file anew, but for old ones of files that are not there any more."""
        there = set(names)
        gone = [n for n, entry in self._entries.items() if entry.get("removed") or entry["name"] not in there]
        for n in gone[:-_REMOVED_KEPT]:
            del self._entries[n]
        self.journal.write_anew(_CHECKPOINT_HEAD + self._lines(self._entries.values()))

    def known(self, name: str, head: bytes) -> "List[Record]":
        """Return the entries that may be about a file that begins with *head*; those of its name first.

        That of its name is looked up by that: a thousand others may have the same beginning.
        """
        keys = [(size, _hash(head[:size])) for size in _HEAD_SIZES if size <= len(head)]
        numbers = itertools.chain([self._names.get(name, 0)], *[self._heads.get(key, ())[-_LOOKED_AT:] for key in keys])
        entries = {n: self._entries[n] for n in numbers if n in self._entries}.values()
        found = [entry for entry in entries if self._may_be(entry, name, head, keys)]
        return sorted(found, key=lambda entry: (entry["name"] != name, -entry["place"][0]))

    @staticmethod
    def _may_be(entry: "Record", name: str, head: bytes, keys: "List[Tuple[int, str]]") -> bool:
        # By what was read of the file already: most entries that do not fit are ruled out before anything is read.
        place, (size, digest) = entry["place"][0], entry["tail"]
        if not place:  # then nothing but the name is known
            return bool(entry["name"] == name)
        is_known = tuple(entry["head"]) in keys
        return is_known and (place > len(head) or _hash(head[place - size : place]) == digest)

    def has(self, name: str) -> bool:
        """Tell whether there was a file of this name, and still is by the last note about it."""
        entry = self._entries.get(self._names.get(name, 0), {})
        return entry.get("name") == name and not entry.get("removed")

    def note(self, entries: "List[Record]") -> None:
        """Write down *entries*, which are whole."""
        if self.journal is not None:
            for entry in entries:
                self._keep(entry)
            self.journal.append(self._lines(entries))

    def new(self, name: str, like: "Optional[Record]" = None) -> "Record":
        """Return the entry of one more file, which is settled as far as that of *like*, or not at all."""
        self._last += 1
        like = like or {"place": [0, 0], "head": [0, ""], "tail": [0, ""]}
        return dict(like, n=self._last, name=name, settled=0, removed=False)

    def _keep(self, entry: "Record") -> None:
        self._entries.pop(entry["n"], None)
        self._entries[entry["n"]] = entry
        self._names[entry["name"]], self._last = entry["n"], max(self._last, entry["n"])
        found = self._heads.setdefault((entry["head"][0], entry["head"][1]), [])
        if entry["n"] not in found[-_LOOKED_AT:]:
            found.append(entry["n"])

    @staticmethod
    def _lines(entries: "Iterable[Record]") -> bytes:
        """Return *entries* as lines, in ASCII: not every file's name is UTF-8."""
        return b"".join([json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n" for entry in entries])

    def _load(self, text: bytes) -> None:
        lines, last = text.split(b"\n"), self._last
        if text.strip() and lines[0] != _CHECKPOINT_HEAD.strip():
            raise ValueError("it is no checkpoint of this version")
        for line in lines[1:]:
            if line and _damage(line) is None:  # a power cut may damage the last ones
                entry = self._checked(_decode(line))
                entry["n"] += last
                self._keep(entry)

    @staticmethod
    def _checked(entry: "Record") -> "Record":
        """Return *entry*, which was read from disk; raise ValueError where it is none of ours."""
        try:
            offset, number = entry["place"]
            _position(_MAX_INTEGER, offset, number, entry.get("holes", ()))
            values = [entry["n"], entry["name"], entry["settled"]] + entry["head"] + entry["tail"]
            if list(map(type, values)) == [int, str, int, int, str, int, str]:
                return entry
        except (KeyError, TypeError, ValueError):
            pass
        raise ValueError("somebody has changed it")


def _sync_directory(path: str) -> None:
    """Have renames and removals in a directory survive a power cut, where the system can do that."""
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError:  # Windows
        pass


# The queue


class _Places:
    """Knows up to which place each file is settled, whatever its name is by now: opens files there, and notes it.

    A file that is read to its end is closed. It may come again while lines of it are in flight: where it has grown or
    was renamed, its log goes on; what may be a copy of it waits, lest the same line is taken twice.
    """

    def __init__(self, files: "_Files", checkpoints: "_Checkpoints") -> None:
        self.before = 0  # lines of these files that were settled by earlier runs
        self._files = files
        self._checkpoints = checkpoints
        self._unsettled: "Dict[Any, _Log]" = {}  # by what they are known by: those that are closed with lines in flight
        self._read: "Dict[str, Record]" = {}  # hash of the head -> entry, of files that are done with
        # path -> its identity, checkpoint and entry, of files that are read to their end and not removed
        self._finished: "Dict[str, Tuple[Any, _Checkpoint, Record]]" = {}

    def open(self, path: str) -> "Optional[_Log]":
        """Open a file at the place up to which it is settled; return None where there is nothing to take now."""
        text = _open_text(path, self._files.check)
        try:
            if self._files.listing.is_foreign(path, text):
                self._files.finish(text, False)
            else:
                log = self._resumed(text) or self._started(text)
                if log is not None:
                    return log
                self._files.look_again(path)
        except BaseException:
            text.close()
            raise
        text.close()
        return None

    def leave(self, log: "_Log") -> None:
        """Be done with a file that is read to its end."""
        text, entry = log.text, log.entry
        self._close(log)
        self._read[_hash(text.head)] = entry
        is_left = log.ranges[0][0] != text.offset
        if not is_left:
            self._finished[text.path] = text.identity, log.checkpoint, entry
        self._files.finish(text, is_left and not entry.get("cut"))

    def fail(self, log: "_Log", error: Exception) -> None:
        """Be done, for now at least, with a file that cannot be read any further."""
        self._close(log)
        self._files.fail(log.text.path, error, log.text.identity)

    def note(self, logs: "List[Any]") -> None:
        """Write down how far files are settled, those of one directory together."""
        for log in logs:
            log.mark()
            if not log.flight:
                self._forget(log)
        for checkpoint, some in itertools.groupby(logs, lambda log: log.checkpoint):
            checkpoint.note([log.entry for log in some])

    def remove_old(self) -> None:
        """Remove files that are delivered, and neither of the current period nor the newest."""
        for path in self._files.listing.old(self._finished):
            identity, checkpoint, entry = self._finished.pop(path)
            if entry.get("kept") or entry.get("cut"):
                continue
            checkpoint.journal.sync(0.0)
            if _remove(path, identity):
                entry["removed"] = True
                checkpoint.note([entry])

    def _close(self, log: "_Log") -> None:
        log.text.close()
        if log.flight:
            self._unsettled.update(dict.fromkeys(_marks(log.text) + [id(log.entry)], log))

    def _forget(self, log: "_Log") -> None:
        for mark in _marks(log.text) + [id(log.entry)]:
            self._unsettled.pop(mark, None)

    def _resumed(self, text: "_Text") -> "Optional[_Log]":
        """Return the log of a file that comes again with lines in flight, which goes on where it stopped."""
        log = self._unsettled.get(text.identity[:2])
        if log is None or log.checkpoint is not self._checkpoints.of(text.path) or not text.goes_on(log.text):
            return None
        self._forget(log)
        log.resume(text)
        return log

    def _started(self, text: "_Text") -> "Optional[_Log]":
        """Return a log of a file that begins where it is settled; None where that is not known yet."""
        checkpoint = self._checkpoints.of(text.path)
        entry = self._entry(checkpoint, text) if self._unsettled.keys().isdisjoint(_marks(text)) else None
        if entry is None or id(entry) in self._unsettled:
            return None
        self.before += entry["settled"]
        return _Log(text, checkpoint, entry)

    def _entry(self, checkpoint: "_Checkpoint", text: "_Text") -> "Record":
        """Return the entry about a file."""
        name = os.path.basename(text.path)
        known = checkpoint.known(name, text.head)
        read = filter(None, [self._read.get(_hash(text.head))])  # maybe in another directory
        for entry in filter(text.fits, itertools.chain(known, read)):
            is_own = entry in known
            if is_own and (entry["name"] == name or not self._is_there(entry, text) and not entry.get("removed")):
                entry["name"] = name  # it was renamed
                return entry
            if b"\n" not in text.read(_CHUNK).lstrip(_BLANK):  # a copy, which the other one may outgrow
                copy = checkpoint.new(name, entry)
                checkpoint.note([copy])
                return copy
        if known or checkpoint.has(name):
            message = "%s is not as it was left, or begins like another file: it starts at the beginning"
            self._files.listing.tell(message, text.path)
        return checkpoint.new(name)

    def _is_there(self, entry: "Record", text: "_Text") -> bool:
        """Tell whether the file of another name that *entry* is about is still there, beside that of *text*."""
        try:
            with _open_text(os.path.join(os.path.dirname(text.path), entry["name"]), text.check) as other:
                return other.identity[:2] != text.identity[:2] and other.fits(entry)
        except Exception:  # what unpacks has many
            return False


def _marks(text: "_Text") -> "List[Any]":
    """Return what tells that it is the same file, or a copy of it, before the checkpoint knows of it."""
    return [text.identity[:2], _hash(text.head)]


class _Shipment(_LineQueue):
    """The lines of files as a queue for the sender; what is settled is noted in the checkpoint of their directory."""

    def __init__(self, files: "_Files", checkpoints: "_Checkpoints", stop: "_Stop", history: bool) -> None:
        super().__init__(_Ledger(), checkpoints)  # type: ignore[arg-type]
        self.files = files
        self.places = _Places(files, checkpoints)
        self.checkpoints = checkpoints
        self._stop = stop
        self._history = history
        self._log: "Optional[_Log]" = None  # the one that is read
        self._inhand: "List[Any]" = []  # what is taken so far, of a batch

    def take(self, most: int) -> "List[Item]":
        items: "List[Item]" = []
        try:
            items = super().take(most)
            self._inhand = []
        except _Stopped:  # what was put back into a file that is closed comes in the next run
            self._inhand = [line for line in self._inhand if line.source is not self._log]
        if self._history:
            return [item._replace(text=_flagged(item.text)) for item in items]  # type: ignore[attr-defined]
        return items

    def due_at(self) -> float:
        """Return when take() is to be called next; infinity: there will be nothing."""
        return 0.0 if self._log or self.files.waiting else self.files.due_at

    def remaining(self) -> "Tuple[int, bool]":
        """Return how many lines are not settled, and whether that is all, as far as can be counted in a moment."""
        self._stop.grant(_COUNT_STOPPED if self._stop.asked else _COUNT)
        left, self._inhand = self.ledger.stats()["pending"] + len(self._inhand), []
        if self.files.listing.is_followed and self.files.due_at:  # else it was stopped before it looked at all
            self.files.due_at = float("inf")
        try:
            for log in iter(self._source, None):
                left += len(log.pass_over())
                if log.text.is_paused:  # standard input, which may be long in coming
                    return left, False
            return left, self.files.due_at == float("inf")
        except _Stopped:
            return left, False
        except Exception as error:  # what unpacks has many
            if self._log is not None:
                self._unreadable(self._log, error)
            return left, False

    def unread(self, sizes: "Dict[str, int]") -> int:
        """Return how many bytes are left of the file that is read, where it is not packed."""
        text = self._log and self._log.text
        return max(0, sizes.get(text.path, 0) - self._log.offset) if text and not text.is_packed else 0  # type: ignore

    def tidy(self, delete: bool) -> None:
        """See to what is not urgent: notes that may not survive a power cut, files that are delivered and may go."""
        self.checkpoints.sync()
        if delete and not self.ledger.stats()["pending"] and self.due_at() > _CLOCK.now():
            self.places.remove_old()

    def close(self) -> "List[bytes]":
        """Let go of what is read."""
        if self._log is not None:
            self._log.text.close()
        self.files.close()
        return []

    def _take(self, most: int, taken: "List[Any]") -> "List[Tuple[_Line, str]]":
        self._inhand = taken
        return super()._take(most, taken)

    def _source(self) -> "Optional[_Log]":
        while self._log is None or self._log.is_read:
            log = self._log
            if log is None:
                if not self._turn_to_next():
                    return None
            elif not log.text.is_paused:  # it is done with
                self._log = None
                self.places.leave(log)
            elif self._inhand:  # standard input pauses, or a broken last line waits: what is in hand goes out first
                return None
            else:  # and then it is looked at again
                log.text.is_paused = log.is_read = False
        return self._log

    def _turn_to_next(self) -> bool:
        """Open the next file, if there is one."""
        for path in iter(self.files.next, None):
            try:
                self._log = self.places.open(path)
            except _Stopped:
                self.files.waiting.appendleft(path)
                raise
            except AnalysysPythonSdkFileException:  # of the checkpoint
                raise
            except Exception as error:
                self.files.fail(path, error, _stat(path))
            if self._log is not None:
                self._log.is_final = functools.partial(self._is_final, self._log)  # type: ignore[method-assign]
                return True
        return False

    def _is_final(self, log: "_Log", text: bytes) -> bool:
        """Tell whether to take the last line of *log*, which has no newline; a broken one after those before it."""
        if self.files.listing.may_grow(log.text.path) or log.text.is_paused or log.entry.get("cut") == len(text):
            return False
        log.text.is_paused = bool(self._inhand) and _damage(text) is not None
        return not log.text.is_paused

    def _settle(self, lines: "List[Any]") -> None:
        super()._settle(lines)
        self.places.note(list({id(line.source): line.source for line in lines}.values()))

    def _unreadable(self, source: "_Source", error: Exception) -> None:
        self._log = None
        self.places.fail(source, error)  # type: ignore[arg-type]


def _flagged(text: bytes) -> bytes:
    """Return a record with the flag that has the platform take it whatever its time, and otherwise as it is."""
    line = text.decode("utf-8")
    where, comma = -1, ""
    gap: "Any" = re.compile(_JSON_GAP)
    at = gap.match(line, line.index("{") + 1).end()
    while line[at] == '"':
        name, at = json.decoder.scanstring(line, at + 1)  # type: ignore[attr-defined]
        begin = gap.match(line, at).end()
        value, at = _decoder.raw_decode(line, begin)
        at = gap.match(line, at).end()
        if name == "xcontext":  # the last one of this name counts
            where = begin + 1 if isinstance(value, dict) and "$importFlag" not in value else -1
            comma = "," if value else ""
    return (line if where < 0 else line[:where] + '"$importFlag":1' + comma + line[where:]).encode("utf-8")


def _remove(path: str, identity: "Any") -> bool:
    """Remove *path*, under its lock, if it is as it was."""
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
        try:
            _lock_file(fd, 1.0)
            if _stat(path) != identity:
                return False
            os.unlink(path)
        finally:
            os.close(fd)
        _sync_directory(os.path.dirname(os.path.abspath(path)))
        return True
    except OSError as error:
        _log("warning", "cannot remove %s: %s", path, error)
        return False


# The command


def _upload(arguments: "Any") -> int:
    """Deliver files of lines, or check them only."""
    if not arguments.follow or arguments.dry_run:
        for path in itertools.filterfalse(_is_there, arguments.path):
            raise _illegal("PATH", path, "must be a directory, a file, or -")
    if "-" in arguments.path and arguments.follow:
        raise _illegal("PATH", "-", "cannot be followed: it ends by itself")
    with _Stop() as stop:
        if arguments.dry_run:
            return _check_files(_Listing(arguments.path, [], False), stop, arguments.json)
        return _ship(arguments, stop)


def _ship(arguments: "Any", stop: "_Stop") -> int:
    """Deliver files; print what became of them and return the exit status that says so."""
    if not arguments.server:
        raise _illegal("--server", "", "is missing: the address to deliver to, http(s)://host[:port][/path]")
    headers = _http_headers(dict(map(_header, arguments.header)))
    transport = _Transport(_url(arguments.server), _trusting(arguments.ca), headers)
    own = [arguments.checkpoint + ending for ending in ("", ".lock", ".new") if arguments.checkpoint]
    listing = _Listing(arguments.path, own, arguments.follow)
    checkpoints = _Checkpoints(arguments.checkpoint, listing)
    try:
        for path in arguments.path:
            if os.path.isdir(path) or os.path.isdir(os.path.dirname(path) or os.curdir):
                checkpoints.of(path)
        shipment: "Any" = _Shipment(_Files(listing, stop.check), checkpoints, stop, arguments.history)
        sender = _Sender(transport, shipment, min(arguments.batch, _FIRST_BATCH), arguments.request_timeout)
        problem = _deliver(shipment, sender, arguments, stop)
        return _sum_up(shipment, sender.outage, bool(stop.asked) and arguments.follow, problem)
    finally:
        checkpoints.close()
        transport.close()


def _trusting(ca: str) -> "Optional[ssl.SSLContext]":
    """Return what trusts the certificates in a file."""
    if not ca:
        return None
    import ssl

    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise _illegal("--ca", ca, "must be a file of certificates in PEM (%s)" % error) from None


class _Checkpoints:
    """The checkpoint of each directory, or one for all, and the `rejected.log` beside it."""

    def __init__(self, only: str, listing: "_Listing") -> None:
        self._only = only and os.path.abspath(only)
        self._listing = listing
        self._nowhere = _Checkpoint(None)
        self._open: "Dict[str, _Checkpoint]" = {}  # by its path, of which a directory may have several,
        self._folders: "Dict[Tuple[int, int], _Checkpoint]" = {}  # and by the directory
        self._sync_at = 0.0
        self.rejected: "Dict[str, _RejectedLog]" = {}  # by its directory, those that were written to

    def of(self, path: str) -> "_Checkpoint":
        """Return that of a file or directory, opened."""
        if path == "-":
            return self._nowhere
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        where = self._only or os.path.join(os.path.abspath(folder), "upload.checkpoint")
        if where not in self._open:
            directory = _inode(os.stat(folder or os.curdir))
            if self._only or directory not in self._folders:
                self._folders[directory] = _Checkpoint(_Journal(where))
                self._folders[directory].open(self._names())
            self._open[where] = self._folders[directory]
        return self._open[where]

    def _names(self) -> "Iterator[str]":
        return map(os.path.basename, self._listing.all())

    def add(self, lines: "List[Tuple[Any, str]]", are_damaged: bool) -> None:
        """Do as _RejectedLog.add() does."""
        for checkpoint, group in itertools.groupby(lines, lambda entry: entry[0].source.checkpoint):
            folder = os.path.dirname(checkpoint.journal.path) if checkpoint.journal is not None else os.curdir
            rejected = self.rejected.setdefault(folder, _RejectedLog(os.path.join(folder, "rejected.log")))
            some, missing = list(group), rejected.missing
            rejected.add(some, are_damaged)
            for line, _ in some:
                entry = line.source.entry
                entry["settled"] -= 1  # it counts what was delivered
                if rejected.missing > missing:
                    entry["kept"] = True  # the file, which alone has it

    def warn(self, at_once: bool = False) -> None:
        for rejected in self.rejected.values():
            rejected.warn(at_once)

    def sync(self) -> None:
        """See to it that the notes survive a power cut, are not lost with their file, and do not fill the disk."""
        if _CLOCK.now() < self._sync_at:
            return
        self._sync_at = _CLOCK.now() + _SYNC_EVERY
        for checkpoint in self._open.values():
            journal = checkpoint.journal
            if journal.is_gone():
                journal.close()
                checkpoint.open(self._names())
            elif journal.is_long():
                try:
                    checkpoint.make_compact(self._names())
                except OSError:  # no room, say: it goes on as it is
                    pass
            journal.sync(_SYNC_EVERY)

    def close(self) -> None:
        for checkpoint in self._open.values():
            checkpoint.journal.close()


def _deliver(shipment: "_Shipment", sender: "_Sender", options: "Any", stop: "_Stop") -> str:
    """Send until all is delivered, the server fails for too long, or a signal says stop; return what went wrong."""
    progress = _Progress(shipment, sender)
    refusals, outage = shipment.ledger.refusals, sender.outage
    try:
        while not stop.asked:
            sender.attempt()
            _adapt(sender, options.batch)
            outage.warn(shipment.ledger)
            if refusals:
                _log("error", "%s%s", refusals[0], " (and %d more)" % (len(refusals) - 1) if len(refusals) > 1 else "")
                refusals.clear()
            progress.show()
            shipment.tidy(options.delete)
            if outage.since is not None:
                if not options.follow and outage.not_before - outage.since > _GIVE_UP:
                    break
                stop.wait(outage.not_before)
            elif shipment.ledger.stats()["pending"] == 0:
                if shipment.due_at() == float("inf"):
                    break
                stop.wait(shipment.due_at())
    except AnalysysPythonSdkFileException as error:
        return str(error)
    finally:
        progress.end()
    return ""


def _adapt(sender: "_Sender", most: int) -> None:
    """Have requests carry more where they take long, so that a far server costs little, and less where they fail."""
    if sender.outage.since is not None or sender.took > sender.timeout / 2:
        sender.most = max(1, sender.most // 2)
    elif _LONG < sender.took < sender.timeout / 4 or sender.most < _FIRST_BATCH:
        sender.most = min(most, sender.most * 2)


def _sum_up(shipment: "_Shipment", outage: "_Outage", is_ended: bool, problem: str) -> int:
    """Print what became of a shipment and return the exit status that says so."""
    counts = shipment.ledger.stats()
    remaining, is_all = shipment.remaining()
    shipment.close()
    left = ("" if is_all else "more than ") + str(remaining)
    _print("delivered %d, rejected %d, remaining %s" % (counts["delivered"], counts["rejected"], left))
    shipment.checkpoints.warn(True)
    for rejected in shipment.checkpoints.rejected.values():
        but = ", but for %d" % rejected.missing if rejected.missing else ""
        _print("the rejected ones are in %s%s" % (_printable(rejected.path), but))
    is_failing = outage.since is not None
    if is_ended and not problem and not is_failing:  # what cannot be read has been named, and may be read next time
        return _SOME_REJECTED if counts["rejected"] else _DONE
    problem = problem or ", ".join(list(shipment.files.listing.problems.values())[:1])
    if remaining or not is_all or problem:
        why = outage.state() if is_failing else problem or "it was stopped"
        _print("analysys: not all is delivered: %s" % why, "stderr")
        return _NOT_DELIVERED
    if not counts["delivered"] and not counts["rejected"]:
        _print("nothing new, {:,} delivered before".format(shipment.places.before))
    return _SOME_REJECTED if counts["rejected"] else _DONE


def _header(text: str) -> "Tuple[str, str]":
    name, colon, value = text.partition(":")
    if not colon:
        raise _illegal("--header", text, "must be 'Name: value'")
    return name.strip(), value.strip()


class _Progress:
    """Shows how far a shipment is, on a terminal only: a line that changes."""

    def __init__(self, shipment: "_Shipment", sender: "_Sender") -> None:
        self._shipment = shipment
        self._outage = sender.outage
        self._began = _CLOCK.now()
        self._is_terminal = bool(sys.stderr and sys.stderr.isatty())
        self._next = self._began + _PROGRESS_EVERY if self._is_terminal else float("inf")
        self._sizes: "Dict[str, int]" = {}  # bytes of each file, as it is packed

    def show(self) -> None:
        """Show a line if it is time."""
        now = _CLOCK.now()
        if now < self._next:
            return
        self._next = now + _PROGRESS_EVERY
        seconds = now - self._began
        files, done, total = self._read()
        counts = self._shipment.ledger.stats()
        events = counts["delivered"] + counts["rejected"]
        text = "%s, %.1f of %.1f MB" % (files, done / 1e6, total / 1e6)
        text += ", %d events, %.0f events/s" % (events, events / seconds)
        if self._outage.since is not None:
            text += ", the server is failing, retry in %.0f s" % max(0.0, self._outage.not_before - now)
        else:
            text += ", %d:%02d left" % divmod(seconds * max(0, total - done) / done if done else 0.0, 60)
        _write(sys.stderr, "\r%s\x1b[K" % text)

    def _read(self) -> "Tuple[str, int, int]":
        """Return how many files are read, the bytes that are, and the bytes there are, all as they are packed."""
        files, sizes = self._shipment.files, self._sizes
        for path in files.listing.all():
            if path not in sizes and path != "-":
                sizes[path] = (_stat(path) or (0, 0, 0))[2]
        undone = set(files.waiting)
        done = sum(size for path, size in sizes.items() if path not in undone) - self._shipment.unread(sizes)
        return "%d of %d files" % (len(sizes.keys() - undone), len(sizes)), done, sum(sizes.values())

    def end(self) -> None:
        """Leave the terminal's line empty."""
        if self._is_terminal:
            _write(sys.stderr, "\r\x1b[K")


def _write(stream: "Any", text: str) -> None:
    """Write to a terminal or pipe that may be gone."""
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        pass


# The dry run


class _Checker:
    """Checks every line by the rules for records, quickly: most records differ from an earlier one by values only."""

    def __init__(self) -> None:
        self.inventory = _Inventory()
        self.lines = 0
        self.errors: "Dict[str, List[Any]]" = {}  # rule -> [how many, where the first is]
        self._shapes: "Dict[Any, List[Any]]" = {}  # what such records share -> [the first of them, how many more]

    def check_all(self, log: "_Log") -> None:
        """Check the lines of a file."""
        while not log.is_read or log.text.is_paused:
            for line in log.pass_over():
                self.check(log.text.path, line)

    def check(self, path: str, line: "_Line") -> None:
        """Check a line."""
        text, number = line.text, line.number
        self.lines += 1
        try:
            if line.length != len(text) or len(text) > _MAX_STRUCTURE and _damage(text) is not None:
                raise ValueError("no record")
            record = _decode(text)
            shape = None if b"\\ud" in text.lower() else _shape(record)
            known = self._shapes.get(shape)
            if known is not None:
                known[1] += 1
                return
            _check_record(record)
            self.inventory.add(record)
            if shape is not None and len(self._shapes) < _MOST_SHAPES:
                self._shapes[shape] = [record, 0]
        except AnalysysPythonSdkIllegalDataException as error:
            self._count(error.rule or str(error), path, number)
        except (ValueError, RecursionError):
            self._count("it is not JSON", path, number)

    def end(self) -> "Record":
        """Return the inventory with what is wrong beside it."""
        for record, times in self._shapes.values():
            if times:
                self.inventory.add(record, times)
        self._shapes.clear()
        found = sorted(self.errors.items(), key=lambda entry: -int(entry[1][0]))
        errors = [{"rule": rule, "count": count, "first": first} for rule, (count, first) in found]
        return dict(self.inventory.as_json(), lines=self.lines, errors=errors)

    def _count(self, rule: str, path: str, number: int) -> None:
        self.inventory.refused += 1
        if len(self.errors) >= _MOST_SHAPES:
            rule = "other rules"
        self.errors.setdefault(_printable(rule), [0, "%s:%d" % (path, number)])[0] += 1


def _shape(record: "Any") -> "Any":
    """Return all that the rules ask of a record but for its values, if these are small; None where that is unusual."""
    try:
        context, app_id, who, when = record["xcontext"], record["appid"], record["xwho"], record["xwhen"]
        values = context.values()
        kinds = tuple(map(type, values))
        if "$original_id" in context or not _FIRST_MS <= when <= _LAST_MS or type(when) is not int:
            return None
        if not 0 < len(app_id) <= _MAX_APP_ID or not 0 < len(who) <= _MAX_ID or not type(app_id) is type(who) is str:
            return None
        for value, kind in zip(values, kinds):
            if kind is str:
                if len(value) > _MAX_STRING:
                    return None
            elif kind is int:
                if value.bit_length() > 63:
                    return None
            elif kind is list:
                if len(value) > _MAX_ITEMS or not all(type(item) is str and len(item) <= _MAX_STRING for item in value):
                    return None
            elif kind is not bool and kind is not float:
                return None
        return record["xwhat"], context.get("$debug"), tuple(context), kinds
    except (TypeError, KeyError, AttributeError):
        return None


def _check_files(listing: "_Listing", stop: "_Stop", as_json: bool) -> int:
    """Check every line of files, print what they hold and what is wrong, and return the exit status that says so."""
    checker, checkpoint, is_stopped = _Checker(), _Checkpoint(None), False
    for path in listing.all():
        try:
            with _open_text(path, stop.check) as text:
                if not listing.is_foreign(path, text):
                    checker.check_all(_Log(text, checkpoint, checkpoint.new(path)))
        except _Stopped:
            is_stopped = True
            break
        except Exception as error:  # what unpacks has many
            listing.fail(path, error)
    found = checker.end()
    if as_json:
        _print_json(found)
    else:
        _print_inventory(found)
    if listing.problems or is_stopped:
        why = (list(listing.problems.values()) + ["it was stopped"])[0]
        _print("analysys: not all is checked: %s" % why, "stderr")
        return _NOT_DELIVERED
    return _SOME_REJECTED if found["errors"] or found["conflicts"] else _DONE


def _print_json(found: "Record") -> None:
    """Print JSON piece by piece: as one text it would take as much memory again."""
    pieces = json.JSONEncoder().iterencode(found)
    for piece in iter(lambda: "".join(itertools.islice(pieces, _LOOKED_AT)), ""):
        _write(sys.stdout, piece)
    _print("")


def _print_inventory(found: "Record") -> None:
    for conflict in found["conflicts"]:
        types = ", ".join("%s %d" % entry for entry in conflict["types"].items())
        spelled = ", ".join(conflict["spellings"])
        _print("conflict  %s property %s: %s  (spelled %s)" % (conflict["kind"], conflict["property"], types, spelled))
    for error in found["errors"]:
        _print("%8d  error  %s  (first: %s)" % (error["count"], error["rule"], _printable(error["first"])))
    for name, event in sorted(found["events"].items(), key=lambda entry: -int(entry[1]["count"])):
        _print("%8d  event  %s" % (event["count"], name))
        for one, pair in event["properties"].items():
            types = ", ".join("%s %d" % entry for entry in pair["types"].items())
            _print("%10s%s: %s  (%s)" % ("", one, types, _printable(json.dumps(pair["example"], ensure_ascii=False))))
    if found["cut"]:
        _print("more than %d pairs of event and property: the others are not listed" % _MAX_PAIRS)
    counts = found["accepted"], found["refused"], len(found["conflicts"])
    _print("%d lines are good, %d are not, %d conflicts" % counts)


########################################################################################################################
# Doctor: `check`, which says why nothing arrives
#
# Each step looks at one thing in a thread of its own, which is left behind where it takes too long: a resolver has
# limits of its own. Nothing is made or changed on disk, and locks are tried for an instant only.
########################################################################################################################

_LITTLE_ROOM, _NO_ROOM = 100 * 1024 * 1024, 1024 * 1024  # bytes free
_CLOCK_OFF = 60  # seconds: C8
_CERTIFICATE_ENDS = 30 * 86400  # seconds: C8
_STATES = ("OK", "SKIP", "WARN", "FAIL")  # the worst last


class _Finding:
    """What a step saw: one of the states, in words, and what to try."""

    def __init__(self, state: str, seen: str, advice: "Optional[str]" = None) -> None:
        self.state, self.seen, self.advice = state, seen, advice


def _doctor(arguments: "Any") -> int:
    """Look at everything between this file and the platform; print what was seen."""
    doctor = _Doctor(arguments)
    for step, look in doctor.steps():
        doctor.run(step, look)
        if not arguments.json:
            _print_step(doctor.rows[-1])
    if arguments.json:
        _print(json.dumps(doctor.rows, indent=1))  # in ASCII, which every terminal and pipe can take
    return _NOT_DELIVERED if any(row["state"] == "FAIL" for row in doctor.rows) else _DONE


def _print_step(row: "Record") -> None:
    import shutil
    import textwrap

    width = max(40, min(shutil.get_terminal_size((100, 24)).columns, 120))
    took = "" if row["ms"] is None else "  (%d ms)" % row["ms"]
    colour = "\x1b[%dm%%s\x1b[0m" % {"FAIL": 31, "WARN": 33}.get(row["state"], 32) if _has_colours() else "%s"
    lines = textwrap.wrap(row["seen"] + took, width - 18)
    lines += textwrap.wrap("try: " + row["try"], width - 18) if row["try"] else []
    _print(colour % ("%-4s" % row["state"]) + "  %-10s  " % row["step"] + ("\n" + " " * 18).join(lines))


class _Doctor:
    """Looks at one thing after another, and knows what became impossible by what it saw before."""

    def __init__(self, arguments: "Any") -> None:
        import urllib.parse

        self.rows: "List[Record]" = []
        self._arguments = arguments
        self._parts = urllib.parse.urlsplit(_url(arguments.server))
        _check("appid", arguments.app_id)
        self._headers = _http_headers(dict(map(_header, arguments.header)))
        self._proxy: "Any" = None  # the parts of its address, where there is one
        self._addresses: "List[Any]" = []
        self._context: "Any" = _trusting(arguments.ca)
        self._blocked = ""  # the step that makes those behind it impossible

    def steps(self) -> "List[Tuple[str, Callable[[], _Finding]]]":
        network = [self._resolve, self._connect, self._tls, self._clock, self._event]
        steps = [("file", self._file), ("python", self._python), ("proxy", self._look_for_proxy)]
        steps += [(look.__name__.strip("_"), functools.partial(self._unless_blocked, look)) for look in network]
        seconds, given = self._arguments.request_timeout, self._arguments
        for name, path, findings in (
            ("log-path", given.log_path, _log_findings),
            ("spool-path", given.spool_path, _spool_findings),
        ):
            if path:
                steps.append((name, functools.partial(_look_at_directory, path, findings, seconds)))
        return steps

    def run(self, step: str, look: "Callable[[], _Finding]") -> None:
        """Note what *look* sees, if it ends in time."""
        seconds = self._arguments.request_timeout
        seen = [_Finding("FAIL", "it did not end in %g s" % seconds)]
        thread = threading.Thread(target=lambda: seen.append(_finding(look)), daemon=True)
        start = _CLOCK.now()
        try:
            thread.start()
            thread.join(seconds + 1)  # most end by themselves before
        except RuntimeError:
            seen.append(_finding(look))
        found = seen[-1]
        ms = None if found.state == "SKIP" else int((_CLOCK.now() - start) * 1000)
        if found.state == "FAIL" and step not in ("file", "python") and not self._blocked:
            self._blocked = step
        row = {"step": step, "state": found.state, "seen": _printable(found.seen), "try": found.advice, "ms": ms}
        self.rows.append(row)

    def _unless_blocked(self, look: "Callable[[], _Finding]") -> "_Finding":
        return _Finding("SKIP", "not possible: %s failed" % self._blocked) if self._blocked else look()

    def _file(self) -> "_Finding":
        digest = _fingerprint()
        text = "analysys %s, SHA-256 %s, %s" % (__version__, digest, globals().get("__file__", "in no file"))
        return _Finding("WARN" if digest == "unknown" else "OK", text)

    def _python(self) -> "_Finding":
        import platform

        try:
            import ssl

            version = ssl.OPENSSL_VERSION
        except ImportError:
            version = ""
        parts = (("ssl", version), ("zlib", _zlib()), ("file locks", fcntl or msvcrt))
        lacks = [name for name, there in parts if not there]
        text = " ".join((platform.python_implementation(), platform.python_version(), "on", platform.platform()))
        text += "; " + (version or "no ssl")
        if not version and self._parts.scheme == "https":
            self._blocked = "python"
            return _Finding("FAIL", text, "https needs a Python with the ssl module")
        return _Finding("WARN" if lacks else "OK", text + "; it lacks " * bool(lacks) + ", ".join(lacks))

    def _look_for_proxy(self) -> "_Finding":
        import urllib.parse
        import urllib.request

        host, scheme = str(self._parts.hostname), self._parts.scheme
        found = urllib.request.getproxies().get(scheme)
        if not found:
            return _Finding("OK", "none for %s" % scheme)
        found = found if "//" in found else "http://" + found
        shown = re.sub(r"//.*@", "//", found)
        if not self._transport().proxy():
            return _Finding("OK", "%s is set, but not for %s" % (shown, host))
        try:
            parts = urllib.parse.urlsplit(found)
            is_tls = parts.scheme == "https" and scheme == "http"  # as the transport has it
            is_fit = (parts.scheme == "http" or is_tls) and parts.hostname and parts.port != 0
        except ValueError:
            is_fit = False
        if not is_fit:
            return _Finding("FAIL", "%s is set, and is no http proxy" % shown, "unset it, or no_proxy=%s" % host)
        self._proxy = parts
        return _Finding("OK", "%s, through which everything goes" % shown)

    def _target(self) -> "Tuple[str, int]":
        parts = self._proxy or self._parts
        return str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)

    def _resolve(self) -> "_Finding":
        import socket

        host, port = self._target()
        try:
            self._addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return _Finding("FAIL", "%s: %s" % (host, error), _search_hint("gaierror"))
        found = sorted({str(address[4][0]) for address in self._addresses})
        return _Finding("OK", "%s%s is %s" % ("the proxy " * bool(self._proxy), host, ", ".join(found)))

    def _connect(self) -> "_Finding":
        import socket

        dead, alive = [], []
        for family, kind, protocol, _, address in self._addresses:
            try:
                with socket.socket(family, kind, protocol) as sock:
                    sock.settimeout(self._arguments.request_timeout / len(self._addresses))
                    sock.connect(address)
                    alive.append(str(address[0]))
            except OSError as error:  # also where this system has no IPv6
                dead.append("%s: %s" % (address[0], error))
        text = "%sport %d: " % ("the proxy's " * bool(self._proxy), self._target()[1])
        text += "; ".join([", ".join(alive) + " answers"] * bool(alive) + dead)
        advice = "is the port right? is a firewall in between? is the server up?" if dead else None
        return _Finding("OK" if not dead else "WARN" if alive else "FAIL", text, advice)

    def _transport(self) -> "_Transport":
        if self._parts.scheme == "https":  # once: to load all that is trusted takes long
            self._context = self._context or _verified()
        return _Transport(self._parts.geturl(), self._context, self._headers)

    def _tls(self) -> "_Finding":
        if self._parts.scheme == "http":
            return _Finding("SKIP", "plain http")
        import ssl

        transport = self._transport()
        transport._pool._ask = _shake_hands  # type: ignore[assignment, method-assign]
        try:
            found: "Any" = transport.post(b"", self._arguments.request_timeout, "HEAD")
        except Exception as error:  # http.client has its own
            hint = _search_hint("%s: %s" % (type(error).__name__, error))
            return _Finding("FAIL", str(error), hint or "is this an https address? does something between break TLS?")
        version, shown = found
        issuer = dict(pair for pairs in shown.get("issuer", ()) for pair in pairs)
        names = ", ".join(name for _, name in shown.get("subjectAltName", ()))
        left = ssl.cert_time_to_seconds(shown["notAfter"]) - time.time()
        by = issuer.get("organizationName") or issuer.get("commonName")
        text = "%s, by %s, for %s, until %s" % (version, by, names, shown["notAfter"])
        if left < _CERTIFICATE_ENDS:
            return _Finding("WARN", text, "have the certificate renewed: it ends in %d days" % (left // 86400))
        return _Finding("OK", text)

    def _clock(self) -> "_Finding":
        import email.utils

        transport, start = self._transport(), time.time()
        try:
            date = transport.post(b"", self._arguments.request_timeout, "HEAD").headers.get("Date")
        except Exception as error:
            return _Finding("SKIP", "no answer to HEAD: %s" % (error or type(error).__name__))
        finally:
            transport.close()
        if not date:
            return _Finding("OK", "the server does not tell its time")
        try:
            off = email.utils.parsedate_to_datetime(date).timestamp() - (start + time.time()) / 2 + 0.5
        except (ValueError, TypeError, IndexError):
            return _Finding("OK", "the server's Date is none: %s" % date)
        text = "the server's is %.0f s %s" % (abs(off), "ahead" if off > 0 else "behind")
        advice = "set this machine's clock: events outside the platform's window are dropped"
        return _Finding("WARN", text, advice) if abs(off) > _CLOCK_OFF else _Finding("OK", text)

    def _event(self) -> "_Finding":
        _LOGGING.now = os.getpid()  # in this thread: what debug mode logs is shown as this step
        url, seconds = self._parts.geturl(), self._arguments.request_timeout
        tracker = AnalysysPythonSdk(DefaultCollecter(url, seconds, ssl_context=self._context, headers=self._headers))
        tracker.setAppId(self._arguments.app_id)
        tracker.setDebugMode(1)
        try:
            tracker.track("analysys-check", "analysys_check")
            return _Finding("OK", "the server took an event: %s" % _SUCCESS.reason)
        except AnalysysPythonSdkIllegalDataException as error:
            is_refused = bool(error.records)  # else the tracker has no time to give it
            advice = "is the app id the one that the platform shows?" if is_refused else "set this machine's clock"
            return _Finding("FAIL", str(error), advice)
        except AnalysysPythonSdkException as error:
            return _Finding("FAIL", str(error), "is %s the receiving address of the platform?" % url)
        finally:
            tracker.close(0)


def _finding(look: "Callable[[], _Finding]") -> "_Finding":
    try:
        return look()
    except Exception as error:
        return _Finding("FAIL", "%s: %s" % (type(error).__name__, error))


def _shake_hands(where: "Any", connection: "Any", request: "Any", deadline: float) -> "Tuple[str, Record]":
    """Connect, which is all, and return the version of TLS and the certificate."""
    connection.deadline, connection.stage = deadline, _CONNECTING
    try:
        connection.connect()
        return connection.sock.version(), connection.sock.getpeercert()
    finally:
        connection.close()


def _look_at_directory(
    path: str, look_inside: "Callable[[str, float], Iterator[_Finding]]", seconds: float
) -> "_Finding":
    """Look at a directory of ours, and what is in it, without changing anything."""
    path = os.path.abspath(path)
    if not os.path.exists(path):
        above = path
        while not os.path.lexists(above):
            above = os.path.dirname(above)
        if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
            return _Finding("FAIL", "%s cannot be made in %s" % (path, above), "name another, or have it made")
        return _Finding("WARN", "%s is not there: it will have to be made in %s" % (path, above))
    if not os.path.isdir(path):
        return _Finding("FAIL", "%s is no directory" % path, "name another")
    findings = list(_directory_findings(path))
    if all(finding.state != "FAIL" for finding in findings):
        findings += look_inside(path, _CLOCK.now() + seconds)
    state = max((finding.state for finding in findings), key=_STATES.index)
    advice = "; ".join(finding.advice for finding in findings if finding.advice)
    return _Finding(state, "; ".join(finding.seen for finding in findings), advice or None)


def _directory_findings(path: str) -> "Iterator[_Finding]":
    import shutil

    found, free = os.stat(path), shutil.disk_usage(path).free
    yield _Finding("OK", "%s, of user %d, mode %03o" % (path, found.st_uid, found.st_mode & 0o7777))
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield _Finding("FAIL", "this user (%d) may not write there" % _user(), "chown or chmod it, or name another")
    room = "FAIL" if free < _NO_ROOM else "WARN" if free < _LITTLE_ROOM else "OK"
    yield _Finding(room, "{:,} MiB free".format(free >> 20), "make room" if room != "OK" else None)


def _log_findings(path: str, deadline: float) -> "Iterator[_Finding]":
    current, files = [time.strftime(pattern) for pattern in _LOG_NAMES.values()], _found(path, _LOG_FILE)
    yield from _own_findings(path, _OWN_NAME)
    for name, file, _ in files:
        needed = os.R_OK | os.W_OK if name in current else os.R_OK
        if not os.path.isfile(file):
            yield _Finding("FAIL", "%s is not a regular file" % name, "remove it, if nobody needs it")
        elif not os.access(file, needed):
            what = "write to" if needed & os.W_OK else "read"
            yield _Finding("FAIL", "this user (%d) may not %s %s" % (_user(), what, name), "chown or chmod it")
    checkpoint, there = _Checkpoint(None), os.path.join(path, "upload.checkpoint")
    if _is_locked(there + ".lock"):
        yield _Finding("OK", "an upload is at work")
    try:
        if os.path.exists(there):
            with io.open(there, "rb") as notes:
                checkpoint._load(notes.read())
    except (OSError, ValueError) as error:
        yield _Finding("FAIL", "upload.checkpoint cannot be used: %s" % error, "upload --checkpoint FILE names another")
        return

    def go_on(text: "_Text") -> None:
        if not any(text.fits(entry) for entry in checkpoint.known(os.path.basename(text.path), text.head)):
            text.go(0)

    waiting = _waiting(files, go_on, deadline)
    if waiting:
        yield _Finding("OK", waiting)


def _spool_findings(path: str, deadline: float) -> "Iterator[_Finding]":
    found = os.stat(path)
    if found.st_uid not in (_user(), 0):
        yield _Finding("FAIL", "it belongs to another user", "a spool is for one user: name another")
        return
    if found.st_mode & 0o002:
        yield _Finding("WARN", "everybody may write to it", "chmod o-w")
    yield from _own_findings(path, "|".join((_OWN_NAME, _SPOOL_FILE, _SPOOL_LOCK)))
    waiting = _waiting(_found(path, _SPOOL_FILE), lambda text: text.go(_spool_place(text.path)), deadline)
    if waiting:
        yield _Finding("WARN", waiting, "a program that spools there will deliver them")


def _own_findings(path: str, names: str) -> "Iterator[_Finding]":
    """Look at our own files in a directory, whose names have the pattern *names*."""
    for name, _, found in _found(path, names):
        is_own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and (os.name != "posix" or found.st_uid == _user())
        if not is_own:
            yield _Finding("FAIL", "%s is a link, no file, or another user's" % name, "remove it, if nobody needs it")
        elif name.startswith("rejected.log") and found.st_size:
            yield _Finding("WARN", "%s holds what the platform refused" % name, "read it: each line has the reason")


def _user() -> int:
    return int(getattr(os, "geteuid", int)())


def _found(path: str, names: str) -> "List[Tuple[str, str, os.stat_result]]":
    """Return name, path and status of what is in a directory under such names."""
    found = []
    for name in filter(re.compile(names).fullmatch, sorted(os.listdir(path))):
        try:
            found.append((name, os.path.join(path, name), os.lstat(os.path.join(path, name))))
        except FileNotFoundError:  # it was delivered or rotated meanwhile
            pass
    return found


def _is_locked(path: str) -> bool:
    """Tell whether another process holds a lock file; an instant later it is as it was."""
    try:
        fd = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        return not _try_lock(fd, _LOCKF)
    except OSError:
        return False
    finally:
        os.close(fd)


def _waiting(files: "List[Tuple[str, str, Any]]", go_on: "Callable[[_Text], Any]", deadline: float) -> str:
    """Say how many lines wait behind the places to which *go_on* goes; fewer where *deadline* comes first."""
    waits, number, since = 0, 0, time.time()
    for _, path, _ in files:
        try:
            with _open_text(path) as text:
                go_on(text)
                blocks = iter(lambda: text.read(_CHUNK) if _CLOCK.now() < deadline else b"", b"")
                lines = sum(block.count(b"\n") for block in blocks)
            written = os.stat(path).st_mtime
        except Exception:  # gone meanwhile, or damaged: who delivers it will say so
            continue
        if lines:
            waits, number, since = waits + lines, number + 1, min(since, written)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
    return "{:,} lines wait in {:,} files, since {} or before".format(waits, number, when) if number else ""


def _spool_place(path: str) -> int:
    """Return where a spool file is read from by who adopts it."""
    try:
        with io.open(path.rsplit(".", 2)[0] + ".lock", "rb") as lock:
            return int(_noted_position(lock.read(_CHUNK), path)[0])
    except (OSError, ValueError):
        return 0


########################################################################################################################
# Command line
########################################################################################################################

_COLUMNS = 80  # of the table of `demo`
_DONE, _SOME_REJECTED, _NOT_DELIVERED, _WRONG_USAGE = 0, 1, 2, 64  # exit statuses: C8


def main(argv: "Optional[List[str]]" = None) -> int:
    """Run the command line with *argv* (None: that of the process) and return its exit status."""
    kept: "Dict[int, Any]" = {}
    try:
        if __name__ == "__main__":
            kept = _calm_ctrl_c()
        parser = _parser()
        arguments, status = _parsed(parser, argv)
        if arguments is None:
            return status
        if arguments.version:
            _print("analysys %s, SHA-256 %s, Python %s" % (__version__, _fingerprint(), sys.version.split()[0]))
            return _DONE
        if arguments.command is None:
            _print(parser.format_help().rstrip())
            return _DONE
        for name in ("host", "log_path", "spool_path", "forward", "checkpoint", "ca"):
            if getattr(arguments, name, None) == "":
                raise _illegal("--" + name.replace("_", "-"), "", "must not be empty: is a variable not set?")
        _prepare_streams()
        return int(arguments.run(arguments))
    except AnalysysPythonSdkIllegalDataException as error:
        _print_error("analysys", error)
        return _WRONG_USAGE
    except KeyboardInterrupt:
        _print("analysys: it was stopped", "stderr")
    except BaseException as error:  # whatever it is, it is one sentence
        known = isinstance(error, (AnalysysPythonSdkException, OSError))
        _print_error("analysys" if known else "analysys: %s" % type(error).__name__, error)
    finally:
        _restore(kept)
    return _NOT_DELIVERED


def _prepare_streams() -> None:
    """See to it that each of the three standard streams is there, and that who writes to one waits where it is full."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:  # where 2>&- closed one, no file and no connection of ours is to take its place
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    if fcntl is not None:
        for output in 1, 2:  # a parent that runs an event loop may have left it so that a write fails instead
            os.set_blocking(output, True)


def _calm_ctrl_c() -> "Dict[int, Any]":
    """Have Ctrl-C raise once a second at most: one that comes as main() tells of another would be a traceback.

    Return the handler that it had.
    """
    not_before = 0.0

    def interrupt(*_: "Any") -> None:
        nonlocal not_before
        if _CLOCK.now() >= not_before:
            not_before = _CLOCK.now() + 1
            raise KeyboardInterrupt

    return _handle(SIGINT=interrupt)


def _handle(**handlers: "Any") -> "Dict[int, Any]":
    """Give signals *handlers* by their names; return those that they had.

    One that this system lacks, or that is ignored (by nohup, for a shell's background job), stays as it is.
    """
    import signal

    there = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    taken = [number for number in there if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, there[number]) for number in taken}


def _restore(handlers: "Dict[int, Any]") -> None:
    """Give signals their *handlers* back; where this process ends now, one more signal would only spoil its status."""
    import signal

    for number, handler in handlers.items():
        try:
            signal.signal(number, signal.SIG_IGN if __name__ == "__main__" else handler)
        except TypeError:  # before 3.9.3 CPython calls SIG_IGN, a number, for a signal of this very moment
            pass


def _parser() -> "Any":
    import argparse

    size = _converter(int, _RULES["size"])
    port = _converter(int, _Rule("must be a port from 0 to 65535", lambda number: _integer(number, 0, 65535)))
    parser = argparse.ArgumentParser(prog="analysys", description="Server-side events for Analysys Ark.")
    parser.add_argument("--version", action="store_true", help="show the version, the file's SHA-256 and the Python")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the product document's scenario on this machine")
    demo.set_defaults(run=_demo)
    serve = commands.add_parser("serve", help="receive records, and show them on a page")
    serve.set_defaults(run=_serve)
    add = serve.add_argument
    add("--host", default="127.0.0.1", metavar="HOST", help="address or name to listen on; 127.0.0.1")
    add("--port", type=port, default=4089, metavar="PORT", help="0 takes a free one; 4089")
    add("--log-path", metavar="DIR", help="write what is accepted to datas_*.log in DIR")
    add("--forward", metavar="URL", help="hand what is accepted on to the platform")
    add("--spool-path", metavar="DIR", help="where what is to be forwarded waits")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="pages of ORIGIN may post")
    add("--allow-host", action="append", default=[], metavar="NAME", help="the page may be asked for by NAME")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="https, with this certificate and key in PEM")
    check = commands.add_parser("check", help="say why nothing arrives")
    check.set_defaults(run=_doctor)
    add = check.add_argument
    add("--server", metavar="URL", required=True, help="http(s)://host[:port][/path]")
    add("--app-id", metavar="KEY", required=True, help="the platform's key of the project")
    add("--log-path", metavar="DIR", help="look at a directory of LogCollecter, too")
    add("--spool-path", metavar="DIR", help="look at a directory of BatchCollecter, too")
    _add_http(add, "for each step; 10")
    add("--json", action="store_true", help="print a list of what was seen, in JSON")
    upload = commands.add_parser(
        "upload",
        help="deliver files of records",
        description="Deliver files of records, each once, also over restarts. Where the server fails for %d s it gives "
        "up, and the next run goes on from there; with --follow it goes on trying." % _GIVE_UP,
    )
    upload.set_defaults(run=_upload)
    add = upload.add_argument
    add("path", nargs="+", metavar="PATH", help="a directory of datas_*.log, a file, a .gz, or -")
    add("--server", metavar="URL", default="", help="http(s)://host[:port][/path]")
    add("--dry-run", action="store_true", help="send nothing: check every line, print events, properties, conflicts")
    add("--json", action="store_true", help="print what --dry-run finds as JSON")
    add("--follow", action="store_true", help="go on as files grow and rotate, until SIGTERM")
    add("--delete", action="store_true", help="remove files that are wholly delivered and not in use")
    add("--history", action="store_true", help="add $importFlag: 1 to records that lack it")
    add("--checkpoint", metavar="FILE", help="where to note what is delivered; default: beside the files")
    add("--batch", type=size, default=20000, metavar="N", help="records a request at most; 20000")
    _add_http(add, "for a whole request; 10")
    return parser


def _parsed(parser: "Any", argv: "Optional[List[str]]") -> "Tuple[Any, int]":
    """Return the arguments, or None and the exit status where argparse has said all: the help, or what is wrong."""
    import contextlib

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            return parser.parse_args(argv), _DONE
        except SystemExit as stop:
            status = _WRONG_USAGE if stop.code else _DONE
    text = told.getvalue().rstrip()
    _print(text.rpartition("\n")[2] if status else text, "stderr" if status else "stdout")
    return None, status


def _add_http(add: "Any", what: str) -> None:
    """Add the options of whoever talks to the platform."""
    seconds = _converter(float, _RULES["seconds"])
    add("--request-timeout", type=seconds, default=_REQUEST_TIMEOUT, metavar="SECONDS", help=what)
    add("--ca", metavar="FILE", help="certificates of a private CA, in PEM")
    add("--header", action="append", default=[], metavar="'Name: value'", help="for every request")


def _converter(kind: "Callable[[str], Any]", rule: _Rule) -> "Callable[[str], Any]":
    """Return what turns an option's text into a value that keeps to *rule*."""

    def convert(text: str) -> "Any":
        import argparse

        try:
            return rule.plain(kind(text))
        except Exception:
            raise argparse.ArgumentTypeError("it %s, not %s" % (rule.text, _shown(text))) from None

    return convert


def _print(text: str, stream: str = "stdout") -> None:
    """Print *text*, also where not all of it can be shown, and where there is nobody left to read it."""
    file = getattr(sys, stream)
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        if file is not None:  # it is closed from the start
            # With its newline in one step: a signal that ends us here must not leave half a line for the last words.
            file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            file.flush()
    except (OSError, ValueError, AttributeError):  # closed or full: and exit, which flushes again, would fail
        setattr(sys, stream, io.open(os.devnull, "w"))


def _print_error(what: str, error: BaseException, *_: "Any") -> None:
    """Print *error* as one line on stderr."""
    _print("%s: %s" % (what, _printable(str(error) or type(error).__name__)), "stderr")


def _has_colours() -> bool:
    isatty = getattr(sys.stdout, "isatty", bool)
    return bool(isatty()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" and os.name == "posix"


def _fingerprint() -> str:
    """Return the SHA-256 of this file: people copy it and want to know which one they have."""
    import hashlib

    try:
        if os.path.exists(__file__) and not os.path.isfile(__file__):  # a pipe, say: what came out of it is gone
            return "unknown"
        source = globals()["__loader__"].get_data(__file__)  # from a zip, too
    except (NameError, KeyError, OSError, AttributeError):
        return "unknown"
    # What we were made of has another name where there is only bytecode, or where a program holds our text.
    is_ours = _fingerprint.__code__.co_filename == __file__
    return hashlib.sha256(source).hexdigest() if is_ours else "unknown"


def _demo(arguments: "Any") -> int:
    """Run the scenario through all collecters and show what arrived."""
    import tempfile

    rows, sums, is_all, server = [], [], True, _DemoReceiver()
    with tempfile.TemporaryDirectory() as directory, server:
        for name, make in (
            ("DefaultCollecter", DefaultCollecter),
            ("BatchCollecter", BatchCollecter),
            ("LogCollecter", lambda url: LogCollecter(directory)),
        ):
            server.clear()
            start = time.perf_counter()
            with AnalysysPythonSdk(make(server.url + server.path)) as tracker:
                _scenario(tracker)
            took = (time.perf_counter() - start) * 1000
            arrived = list(server.records)
            for file in sorted(os.listdir(directory)):
                with io.open(os.path.join(directory, file), encoding="utf-8") as lines:
                    arrived += [json.loads(line) for line in lines]
            rows += [_demo_row(name, record) for record in arrived]
            sent = tracker._collecter.stats()["accepted"]
            is_all = is_all and sent == len(arrived)
            tick = _showable("✓", "ok") if sent == len(arrived) else _showable("✗", "NO")
            sums.append("%s %-16s  %d sent, %d received, %.1f ms" % (tick, name, sent, len(arrived), took))
    _print_table([("via", "time", "who", "what", "platform", "login", "properties")] + rows)
    _print("\n".join(sums + ["next: python3 analysys.py serve, and see yours at http://127.0.0.1:4089"]))
    return _DONE if is_all else _NOT_DELIVERED


class _DemoReceiver(Receiver):
    """Takes only what is posted to a path that nobody else knows, so that strangers do not disturb the demo."""

    def __init__(self) -> None:
        self.path = "/%s" % binascii.hexlify(os.urandom(8)).decode()
        super().__init__()

    def _admit(self, request: "_Request") -> None:
        if request.path != self.path + "/up":
            raise _Trouble(404, "this receiver is the demo's")


def _scenario(tracker: AnalysysPythonSdk) -> None:
    """Section 5 of the product document: a visitor looks, registers, logs in, and buys."""
    visitor, user, platform = "ABCD123456", "zhangsan", "js"
    tracker.setAppId("fangzhouargo")
    goods = {
        "commodity_name": "跑步机",
        "commodity_brand": "zhonghua",
        "commodity_price": 5000,
        "commodity_quality": True,
        "commodity_function": ["run", "记录心率"],
    }
    tracker.track(visitor, "SearchCommodity", goods, platform, is_login=False)
    tracker.track(visitor, "register", None, platform, is_login=False)
    tracker.alias(user, visitor, platform)
    profile = {
        "sex": "男",
        "phonenumber": "13966667777",
        "email": "zhangsan@example.com",
        "hobby": ["basketball", "听音乐", "mountain-climbing"],
        "is_female": False,
    }
    tracker.profile_set(user, profile, platform, is_login=True)
    tracker.registerSuperProperties(
        {"commodity_name": "减肥药", "commodity_brand": "luomiou", "commodity_price": 1000, "commodity_quality": True}
    )
    tracker.track(user, "purchase", {"Referer": "gouwuche"}, platform, is_login=True)
    tracker.track(user, "payment", {"pay_usage": "Wechat"}, platform, is_login=True)


def _demo_row(name: str, record: "Record") -> "Tuple[str, ...]":
    """Return what the table shows of a record: by whom, when, who, what, platform, login, properties."""
    context = record["xcontext"]
    when = time.strftime("%H:%M:%S", time.localtime(record["xwhen"] / 1000))
    login = "yes" if context["$is_login"] else "no"
    platform, properties = context["$platform"], _own_properties(context)
    return name[:-9], when, record["xwho"], record["xwhat"], platform, login, properties


def _print_table(rows: "List[Tuple[str, ...]]") -> None:
    """Print *rows* in as many columns as a terminal of the usual width has."""
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    widths.append(_COLUMNS - sum(widths) - 2 * len(widths))
    for row in rows:
        _print("  ".join(_fit(cell, width) for cell, width in zip(row, widths)).rstrip())
    _print("")


def _showable(text: str, instead: str) -> str:
    """Return *text*, or *instead* where the output cannot show it."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        return text
    except UnicodeError:
        return instead


def _width(text: str) -> int:
    """Return how many columns a terminal takes to show *text*."""
    return sum(_columns(text))


def _columns(text: str) -> "List[int]":
    import unicodedata

    return [2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text]


if __name__ == "__main__":
    sys.exit(main())
