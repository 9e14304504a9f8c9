# SPDX-License-Identifier: MIT
"""analysys: server-side events for Analysys Ark (易观方舟), in one file with no dependency.

The tracker checks a call and makes one *record* of it; a *collecter* brings the record to the platform:

    from analysys import AnalysysPythonSdk, BatchCollecter

    tracker = AnalysysPythonSdk(BatchCollecter("https://host:port"), on_error=lambda error, record: None)
    tracker.setAppId("fangzhouargo")
    tracker.track("ABCD123456", "SearchCommodity", {"commodity_price": 5000}, "android")
    tracker.close()

Which collecter
    ====================================== ============================ =========================================
    collecter                              a tracking call              what survives
    ====================================== ============================ =========================================
    DefaultCollecter(url)                  one HTTP request             returns once the server has the record
    BatchCollecter(url)                    microseconds, memory queue   a normal exit
    BatchCollecter(url, spool_path=DIR)    one write to DIR             kill -9, restarts, outages of any length
    LogCollecter(DIR)                      one write to a shared log    everything; ``upload`` ships the files
    ====================================== ============================ =========================================

    Any object with ``uploadData(record)``, ``flush(timeout=10)`` and ``close(timeout=10)`` is a collecter too.

Limits
    app id 255 characters, ids 254, names 99, strings 255, lists 100 items, 100 properties a call and 100 super
    properties, integers of 64 bits. `_RULES` below is the whole table.

Exceptions
    AnalysysPythonSdkException is the base of AnalysysPythonSdkIllegalDataException (a ValueError: bad arguments, or
    records the platform refused), AnalysysPythonSdkNetworkException (not delivered) and
    AnalysysPythonSdkFileException (an OSError: not written). With ``on_error`` given to the tracker, tracking calls
    raise none of them: they go to ``on_error(exception, record)``.

Threads, forks, exit
    Everything is safe to use from any number of threads, from signal handlers and from ``__del__``. A forked child
    starts empty and sends only its own records. A normal exit delivers what waits, within 10 seconds in all.
    accepted = delivered + rejected + pending, at any moment: see ``stats()``.

Command line
    ``python3 analysys.py demo`` shows it all on one machine; ``python3 analysys.py`` alone lists the commands.
"""

import binascii
import collections
import copy
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
import weakref

try:
    import fcntl
except ImportError:  # Windows, WebAssembly
    fcntl = None  # type: ignore[assignment]

try:
    import msvcrt
except ImportError:  # all but Windows
    msvcrt = None  # type: ignore[assignment]

try:
    import zlib
except ImportError:  # a small build of Python: bodies go out as plain JSON
    zlib = None  # type: ignore[assignment]

_register_at_fork: "Any" = getattr(os, "register_at_fork", None)  # not in 3.6, not on Windows

TYPE_CHECKING = False  # what type checkers take for true: `typing` costs 5 ms to import
if TYPE_CHECKING:
    import http.client
    import ssl
    from datetime import datetime
    from types import TracebackType
    from typing import Any, Callable, Deque, Dict, FrozenSet, Iterable, List, Optional, Tuple, Type, Union

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
_NAME = re.compile(r"\$?[A-Za-z][A-Za-z0-9_]*")  # 3.2
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
_MAX_HEADERS = 64 * 1024  # bytes read before the answer's body, beyond those
_CUT_EVERY = 1.0  # seconds between two back-offs that flush() may cut short: C6
_WARN_EVERY = 60.0  # seconds between warnings in an outage: C5
_EXIT_TIMEOUT = 10.0  # seconds at exit, for all collecters together: C6
_MAX_LINE = 40 * 1024 * 1024  # bytes of a line in a file: no record within the limits has more, so it is damaged
_CHUNK = 128 * 1024  # bytes read of a spool file at once, unless a line is longer
_ROLL_SIZE = 16 * 1024 * 1024  # bytes of a spool file: C6
_LOOK_EVERY = 5.0  # seconds between two looks for files whose owner is gone: C6
_HASHED = 4096  # bytes at its beginning that a file is known by
_REMOVED_KEPT = 1000  # entries in a checkpoint of files that upload removed
_GIVE_UP = 30.0  # seconds that upload bears a failing server, unless it follows
_FOLLOW_EVERY = 1.0  # seconds between two looks at followed files
_LOG_FILE = re.compile(r"datas_\d+\.log(\..+)?")  # what LogCollecter writes, and what logrotate and gzip make of it
_SPOOL_LOCK = re.compile(r"\d{13,}-\d+-[0-9a-f]{8}\.lock")
_SPOOL_FILE = re.compile(r"\d{13,}-\d+-[0-9a-f]{8}\.\d{6,}\.log")
_LOCKED_BYTE = 1 << 62  # the byte that Windows locks, far beyond any file's end
_LOCK_NOW = 0 if fcntl is None else fcntl.LOCK_EX | fcntl.LOCK_NB
_LOCK_TIMEOUT = 10.0  # seconds to wait for another process that holds a file's lock
_LONGEST_WAIT = 3600.0  # seconds in one wait; locks refuse more than some platform's limit
_LOGGER = "analysys"
_GZIP_LEVEL = 3  # of 100 records (48 KB): 7.4 KB in 124 us; level 6: 6.7 KB in 376 us; level 1: 7.6 KB in 112 us
_ONE_PACKET = 900  # bytes of text that fit into one packet, in base64 and with a request's head: not compressed
_GZIP = 31  # zlib's number for "gzip, largest window"


########################################################################################################################
# Errors
########################################################################################################################


class AnalysysPythonSdkException(Exception):
    """Base of all errors of this module. *records* holds the records that the error is about, maybe none."""

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


def _illegal(argument: str, value: object, rule: str) -> AnalysysPythonSdkIllegalDataException:
    error = AnalysysPythonSdkIllegalDataException("%s is %s: it %s" % (argument, _shown(value), rule))
    error.rule = "%s %s" % (argument, rule)
    return error


def _closed() -> AnalysysPythonSdkException:
    return AnalysysPythonSdkException("this collecter is closed: it takes no more records")


def _unwritable(path: str, error: BaseException, lines: "Iterable[bytes]" = ()) -> AnalysysPythonSdkFileException:
    raised = AnalysysPythonSdkFileException("cannot write %s: %s" % (path, error), map(_decode, lines))
    raised.errno = getattr(error, "errno", None)
    return raised


def _shown(value: object) -> str:
    """Show *value* in a message: short and printable, however large or ill-behaved it is."""
    import reprlib

    try:
        if isinstance(value, int) and int.bit_length(value) > 128:
            return "an int of %d bits" % int.bit_length(value)
        return reprlib.repr(value)[:100]
    except Exception:
        return "a %s" % type(value).__name__[:100]


def _log(level: str, message: str, *values: object) -> None:
    """Log, but for what a logging handler brings about that itself tracks: that would never end."""
    import logging

    if getattr(_LOGGING, "now", False):
        return
    _LOGGING.now = True
    try:
        logger = logging.getLogger(_LOGGER)
        if level == "info" and not logger.hasHandlers():  # debug mode is seen without any configuration
            logging.StreamHandler().handle(logger.makeRecord(_LOGGER, logging.INFO, __file__, 0, message, values, None))
        else:
            getattr(logger, level)(message, *values)
    except Exception:  # a handler that fails must not take the sender with it
        pass
    finally:
        _LOGGING.now = False


_LOGGING = threading.local()  # .now: whether this thread is logging for us


def _tell(on_error: "OnError", error: Exception, concerned: object) -> None:
    """Hand *error* to the application's *on_error*; one that raises is logged, no more."""
    try:
        on_error(error, concerned)  # type: ignore[misc]
    except (Exception, SystemExit) as mishap:  # sys.exit() would end the sending thread without a word
        _log("error", "on_error raised %s: %s, when it was told of: %s", type(mishap).__name__, mishap, error)


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
            if not callable(getattr(collector, method, None)):
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
        """Add properties, 100 in all, that every later ``track`` carries; a name replaces itself in any case."""
        members, names = _members("super_properties", super_properties)
        added = _decode(b"{%s}" % members)
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
        # A forked child must not share a lock that some thread of its parent may have held: setdefault() is atomic.
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
            xwhen = int(self._clock() * 1000) if xwhen is None else _check("xwhen", xwhen)
            line = _call_line(settings, kind, xwho, xwhat, properties, data_platform, is_login, xwhen, original_id)
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
            if self._on_error is None:
                raise
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
    context = {name: value for name, value in supers if name.lower() not in replaced}
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
    if not _NAME.fullmatch(plain):
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
    plain = list.__getitem__(value, slice(None)) if isinstance(value, list) else [*tuple.__iter__(value)]
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
        return datetime.datetime.isoformat(value, " ", "seconds")[:19]  # without the time zone
    return datetime.date.isoformat(value)


def _platform(value: "Any") -> str:
    plain = _text("" if value is None else value, 0, float("inf"))
    return _PLATFORMS.get(plain.lower(), plain)


def _when(value: "Any") -> int:
    if type(value) is not int:
        import datetime

        if isinstance(value, datetime.datetime):
            epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
            value = (value.astimezone(datetime.timezone.utc) - epoch) // datetime.timedelta(milliseconds=1)
        elif isinstance(value, bool):
            raise ValueError
    return _integer(value, _FIRST_MS, _LAST_MS)


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


def _size(value: "Any") -> int:
    if isinstance(value, bool):
        raise ValueError
    return _integer(value, 1)


def _directory(value: "Any") -> str:
    plain = os.fsdecode(value)
    if not plain or "\0" in plain:
        raise ValueError
    return plain


class _Rule:
    """What a value must be, in the words of the error message, and the function that returns its plain form.

    Where the value breaks the rule, the function raises anything at all: a hostile value's own errors count too.
    """

    __slots__ = ("text", "plain")

    def __init__(self, text: str, plain: "Callable[[Any], Any]") -> None:
        self.text = text
        self.plain = plain

    def check(self, argument: str, value: "Any") -> "Any":
        """Return the plain form of *value*, or raise what names argument, value and rule."""
        try:
            return self.plain(value)
        except Exception:
            raise _illegal(argument, value, self.text) from None


_NAME_TEXT = r"1 to 99 characters that match \$?[A-Za-z][A-Za-z0-9_]*"
_RULES = {
    # arguments of tracking calls
    "appid": _Rule("must be a str of 1 to 255 characters", lambda v: _text(v, 1, _MAX_APP_ID)),
    "distinct_id": _Rule("must be a str of 1 to 254 characters", _id),
    "alias_id": _Rule("must be a str of 1 to 254 characters", _id),
    "event_name": _Rule("must be a str of " + _NAME_TEXT, _name),
    "data_platform": _Rule("must be a str or None", _platform),
    "is_login": _Rule("must be a bool", lambda v: _exactly(v, True, False)),
    "xwhen": _Rule("must be an int of 13 digits (Unix milliseconds) or a datetime of 2001 to 2286", _when),
    "debug_mode": _Rule("must be the int 0, 1 or 2", lambda v: _exactly(v, 0, 1, 2)),
    # names and values of properties
    "name": _Rule(
        "must be a str of %s, and none of the reserved %s" % (_NAME_TEXT, " ".join(sorted(_RESERVED))),
        _property_name,
    ),
    "super_properties_key": _Rule("must be a str of " + _NAME_TEXT, _name),
    "str": _Rule("must have at most 255 characters, encodable as UTF-8", _string),
    "bool": _Rule("must be a bool", lambda v: v),
    "number": _Rule("must be a finite number (a bool is none), an integer within 64 bits signed", _number),
    "list": _Rule("must be a list or tuple of at most 100 str of at most 255 characters each", _list),
    "date": _Rule("must be a date or datetime", _moment),
    "value": _Rule("must be a str, bool, number, date, datetime, or list of str", _no_value),
    # settings
    "on_error": _Rule("must be callable or None", _callable_or_none),
    "size": _Rule("must be an int of at least 1", _size),
    "seconds": _Rule("must be a number over 0", _positive),
    "log_path": _Rule("must be the path of a directory", _directory),
    "general_rule": _Rule('must be "hour" or "day"', lambda v: _LOG_NAMES[v.lower()]),
    "is_batch": _Rule("must be a bool", lambda v: _exactly(v, True, False)),
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
        return _members(argument, _with_plain_names(argument, own), only, most)
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
    except Exception:
        raise _illegal("%s[%s]" % (argument, _shown(name)), value, _value_rule(value).text) from None
    return texts


def _plain_dict(argument: str, given: "Any") -> "Record":
    """Return properties as a dict: what they hold, not what they say."""
    if not issubclass(type(given), dict):  # whatever it says of its class
        raise _illegal(argument, given, "must be a dict or None")
    return dict(dict.items(given))


def _with_plain_names(argument: str, given: "Dict[Any, Any]") -> "Record":
    """Return properties with names of subclasses of str as str."""
    plain = {_check("a name in " + argument, name, "name"): value for name, value in given.items()}
    if len(plain) != len(given):
        raise _same_names(argument, [_check("a name in " + argument, name, "name") for name in given])
    return plain


def _unset_members(argument: str, given: "Any") -> "Tuple[bytes, FrozenSet[str]]":
    """Check names of properties; return what unsets them as _members() does."""
    if given is None:
        return b"", _NO_NAMES
    kinds: "Any" = [kind for kind in (list, tuple, set, frozenset) if issubclass(type(given), kind)]
    if not kinds:
        raise _illegal(argument, given, "must be a list, tuple or set of property names")
    names = {_check("a name in " + argument, name, "name") for name in [*kinds[0].__iter__(given)]}
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


_decoder = json.JSONDecoder(parse_constant=_no_number)  # NaN and the infinities are Python's, not JSON's

_DELIVERED, _REFUSED, _TOO_LARGE, _RETRY = "delivered", "refused", "too large", "retry"
_Verdict = collections.namedtuple("_Verdict", "kind reason wait")  # wait: seconds the server asked for, or None
_Answer = collections.namedtuple("_Answer", "status retry_after payload")
_SUCCESS = _Verdict(_DELIVERED, "code 200", None)

# Statuses that say nothing about the data, also where the answer's code carries them: C5
_NOT_THE_DATA = frozenset((401, 403, 404, 407, 408, 413, 429))


def _line(record: "Record") -> bytes:
    """Return *record* as one line of JSON, newline included."""
    return (_encode(record) + "\n").encode("utf-8")


def _decode(text: bytes) -> "Any":
    """Return the JSON value in *text*; raise ValueError or RecursionError where there is none."""
    return _decoder.decode(text.decode("utf-8"))


def _array(lines: "List[bytes]") -> bytes:
    """Return the records in *lines* as a JSON array."""
    return b"[" + b",".join(lines) + b"]"


def _records(lines: "List[bytes]") -> "List[Any]":
    """Return *lines* as records, or as text where they are none."""
    return [line.decode("utf-8", "replace") if _damage(line) else _decode(line) for line in lines]


def _damage(line: bytes) -> "Optional[str]":
    """Say what is wrong with a line that should hold a record in JSON; None where nothing is."""
    try:
        return None if isinstance(_decode(line), dict) else "not a JSON object"
    except (ValueError, RecursionError) as error:
        return "not JSON: %s" % error


def _pack(text: bytes) -> bytes:
    """Return the body that carries *text*: base64(gzip(text)), or plain where Python has no zlib."""
    if zlib is None:
        return text
    packer = zlib.compressobj(_GZIP_LEVEL if len(text) > _ONE_PACKET else 0, zlib.DEFLATED, _GZIP)
    return binascii.b2a_base64(packer.compress(text) + packer.flush(), newline=False)


def _unpack(body: bytes, most: int) -> bytes:
    """Undo `_pack`; raise ValueError where *body* is not of that form or has more than *most* bytes inside."""
    if zlib is None:
        raise ValueError("this Python has no zlib")
    unpacker = zlib.decompressobj(_GZIP)
    try:
        text = unpacker.decompress(binascii.a2b_base64(body), most + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(text) > most or not unpacker.eof:
        raise ValueError("cut short, or more than %d bytes" % most)
    return bytes(text)


def _parse(payload: bytes) -> "Any":
    """Return the JSON value in an answer, plain or packed; None where there is none."""
    for unpack in (bytes, lambda packed: _unpack(packed, _MAX_ANSWER)):
        try:
            return json.loads(unpack(payload).decode("utf-8"))
        except (ValueError, RecursionError):
            continue
    return None


def _judge(answer: "_Answer") -> "_Verdict":
    """Say what an answer means for the batch that was sent: C5."""
    told = _parse(answer.payload)
    code = told.get("code") if isinstance(told, dict) else None
    if type(code) is not int:
        code = None
    if code in _NOT_THE_DATA:
        kind = _TOO_LARGE if code == 413 else _RETRY
    elif answer.status == 413:
        kind = _TOO_LARGE
    elif code is not None and 400 <= code <= 499 or answer.status in (400, 422) and isinstance(told, dict):
        kind = _REFUSED
    else:
        if 200 <= answer.status <= 299 and code == 200:
            return _SUCCESS
        kind = _RETRY
    text = repr(answer.payload[:80]) if told is None else json.dumps(told, ensure_ascii=False)[:300]
    return _Verdict(kind, "HTTP %d, %s" % (answer.status, text), _seconds(answer.retry_after))


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
########################################################################################################################


def _url(server_url: "Any") -> str:
    """Return the address to post to, or raise what is wrong with *server_url*."""
    import urllib.parse

    rule = "must be http(s)://host[:port][/path]"
    if not isinstance(server_url, str):
        raise _illegal("server_url", server_url, rule)
    try:
        server_url.encode("ascii")
        parts = urllib.parse.urlsplit(server_url)
        port = parts.port
    except ValueError:
        raise _illegal("server_url", server_url, rule) from None
    odd = re.search(r"[\x00-\x20\x7f?#@]", server_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or odd or parts.netloc.endswith(":"):
        raise _illegal("server_url", server_url, rule)
    path = parts.path.rstrip("/")
    return "%s://%s%s" % (parts.scheme, parts.netloc, path if path.endswith("/up") else path + "/up")


def _http_headers(headers: "Any") -> "Dict[str, str]":
    """Return the headers of every request, the caller's own *headers* included."""
    own = {
        "Content-Type": "application/json",
        "User-Agent": "analysys-%s/%s" % (_LIB, __version__),
    }
    for name, value in dict(headers or {}).items():
        sound = isinstance(name, str) and isinstance(value, str) and re.fullmatch(r"[!-9;-~]+", name)
        if not sound or not re.fullmatch(r"[\x20-\x7e\t]*", value):
            raise _illegal("headers[%s]" % _shown(name), value, "must be a header: a printable ASCII name and value")
        own[name] = value
    return own


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
        import urllib.request

        self._request = urllib.request.Request(url, headers=headers, method="POST")  # copied for each
        self._pool = _Connections(ssl_context if ssl_context or url.startswith("http:") else _verified())
        handler = urllib.request.BaseHandler()
        for scheme in ("http", "https"):
            setattr(handler, scheme + "_open", self._pool.open)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(handler)

    def post(self, body: bytes, timeout: float) -> "_Answer":
        """Return the answer to *body*, whatever it says; raise OSError or HTTPException where there is none."""
        request = copy.copy(self._request)  # an opener may change the one it is given
        request.headers, request.data = dict(request.headers), body
        answer: "_Answer" = self._opener.open(request, timeout=timeout)
        return answer

    def close(self) -> None:
        """Close idle connections; those in use close when their answer is there."""
        self._pool.close()

    def disown(self) -> None:
        """Let go, in a forked child, of the parent's connections."""
        self._pool.disown()


def _verified() -> "ssl.SSLContext":
    try:
        import ssl
    except ImportError:
        raise AnalysysPythonSdkException("https needs the ssl module, which this Python is built without") from None
    return ssl.create_default_context()


class _Connections:
    """Opens urllib requests over connections that are kept alive, each used by one thread at a time."""

    def __init__(self, ssl_context: "Optional[ssl.SSLContext]") -> None:
        self._ssl_context = ssl_context
        self._idle: "Deque[Tuple[Any, Any]]" = collections.deque()  # (where to, connection); its steps are atomic
        self._all: "set[Any]" = set()  # idle or in use; closed together
        self._closed = False

    def open(self, request: "Any") -> "_Answer":
        """Send *request* and return the answer. A connection that died while it was idle is replaced unnoticed."""
        import http.client

        deadline = time.monotonic() + request.timeout
        tunnel = getattr(request, "_tunnel_host", None)  # set by ProxyHandler, which has no public name for it
        # What is meant for the proxy goes to the proxy only.
        credentials = request.headers.pop("Proxy-authorization", None) if tunnel else None
        where = (request.type, request.host, tunnel)
        connection = self._take_idle(where)
        if connection is not None:
            try:
                return self._ask(where, connection, request, deadline)
            except (ConnectionError, http.client.BadStatusLine):
                if connection.answered:
                    raise
        return self._ask(where, self._connect(request, tunnel, credentials), request, deadline)

    def close(self) -> None:
        """Close idle connections, and from now on each one as soon as it is idle."""
        self._closed = True
        self._take_idle(None)  # none is for nowhere: all are closed

    def disown(self) -> None:
        """Close, in a forked child, the descriptors of its parent's connections, those in use included."""
        for connection in list(self._all):
            try:
                os.close(connection.sock.detach())
            except (OSError, AttributeError):  # it was being opened or wrapped
                pass

    def _ask(self, where: "Any", connection: "Any", request: "Any", deadline: float) -> "_Answer":
        connection.deadline, connection.answered = deadline, False
        keep = False
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(_left(deadline))
            headers = dict(request.headers, **request.unredirected_hdrs)
            cut: "Optional[ConnectionError]" = None
            try:
                connection.request(request.get_method(), request.selector, request.data, headers)
            except ConnectionError as error:  # a server may refuse a large body and hang up: look for its answer
                cut = error
            response = connection.getresponse()
            if cut is not None and response.status < 400:  # but half a body was accepted by nobody
                raise cut
            payload = response.read(_MAX_ANSWER + 1)
            keep = not response.will_close and response.isclosed() and response.status >= 200
            return _Answer(response.status, response.getheader("Retry-After"), payload[:_MAX_ANSWER])
        finally:
            if keep and not self._closed:
                self._idle.append((where, connection))
            else:
                self._all.discard(connection)
                connection.close()

    def _take_idle(self, where: "Any") -> "Any":
        while True:
            try:
                kept_for, connection = self._idle.pop()
            except IndexError:
                return None
            if kept_for == where and _is_quiet(connection.sock):
                return connection
            self._all.discard(connection)
            connection.close()

    def _connect(self, request: "Any", tunnel: "Optional[str]", credentials: "Optional[str]") -> "Any":
        import http.client

        connection: "Any"
        if request.type == "https":
            connection = http.client.HTTPSConnection(request.host, context=self._ssl_context)
        else:
            connection = http.client.HTTPConnection(request.host)
        if tunnel:
            connection.set_tunnel(tunnel, headers={"Proxy-Authorization": credentials} if credentials else {})
        connection.response_class = functools.partial(_response, connection)
        connection._create_connection = functools.partial(_dial, connection)
        self._all.add(connection)
        return connection


def _left(deadline: float) -> float:
    """Return the seconds left, or raise the time-out that is due."""
    left = deadline - time.monotonic()
    if left <= 0:
        import socket

        raise socket.timeout("no complete answer within request_timeout")
    return left


def _is_quiet(sock: "Any") -> bool:
    """Tell whether an idle connection is still there: one that has something to read was closed by the server."""
    import select

    try:
        if not hasattr(select, "poll"):  # Windows; elsewhere select() refuses descriptors over 1023
            return not select.select([sock], [], [], 0)[0]
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return not poll.poll(0)
    except (OSError, ValueError, TypeError):  # it is closed
        return False


def _dial(connection: "Any", address: "Tuple[str, int]", *_: "Any") -> "Any":
    """Connect to the first of the host's addresses that answers, all within the connection's deadline."""
    import socket

    problem: "Optional[OSError]" = None
    addresses = [found[4] for found in socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)]
    for position, found in enumerate(addresses):
        try:
            share = _left(connection.deadline) / (len(addresses) - position)
            sock = socket.create_connection((str(found[0]), int(found[1])), share)
            sock.settimeout(_left(connection.deadline))
            return sock
        except OSError as error:
            problem = problem or error
    raise problem or OSError("no address for %s" % address[0])


def _response(connection: "Any", sock: "Any", *arguments: "Any", **named: "Any") -> "http.client.HTTPResponse":
    """Make the response that http.client would, but let it read through a `_Bounded` file."""
    import http.client

    return http.client.HTTPResponse(_Answering(connection, sock), *arguments, **named)  # type: ignore[arg-type]


class _Answering(io.RawIOBase):
    """What a response reads from: one deadline over all reads, and a limit to their bytes."""

    def __init__(self, connection: "Any", sock: "Any") -> None:
        self._connection = connection
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._budget = _MAX_HEADERS + _MAX_ANSWER

    def makefile(self, mode: str) -> "io.BufferedReader":
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Any") -> int:
        self._sock.settimeout(_left(self._connection.deadline))
        size = self._raw.readinto(buffer)
        if size:
            self._connection.answered = True
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


class _Ledger:
    """Counts that balance at any moment: accepted (+ adopted) = delivered + rejected + pending.

    A __del__ or a signal handler that tracks may run anywhere, also inside these methods: a change is appended whole,
    in one step, and who reads adds up what is there.
    """

    def __init__(self, *more: str) -> None:
        # Guards what an owner moves between its parts. Never held while anything waits or sends.
        self.lock = threading.RLock()
        names = ("accepted", "delivered", "rejected", "pending", "requests", "retries") + more
        self._changes: "List[Dict[str, int]]" = [dict.fromkeys(names, 0)]  # the first is the sum of all before
        self._turn = threading.Lock()  # held by who shortens _changes; nobody waits for it

    def add(self, change: "Dict[str, int]") -> None:
        """Add *change*, which nobody changes afterwards."""
        self._changes.append(change)
        if len(self._changes) > 256 and self._turn.acquire(False):
            try:
                seen = self._changes[:]
                self._changes[: len(seen)] = [_sum(seen)]  # one step; others append behind
            finally:
                self._turn.release()

    def stats(self) -> "Dict[str, int]":
        return _sum(self._changes[:])


_ACCEPTED = {"accepted": 1, "pending": 1}


def _settled(number: int, error: object) -> "Dict[str, int]":
    return {"pending": -number, "rejected" if error else "delivered": number}


def _sum(changes: "List[Dict[str, int]]") -> "Dict[str, int]":
    counts = changes[0].copy()
    for change in changes[1:]:
        for name, number in change.items():
            counts[name] += number
    return counts


class _MemoryQueue:
    """A bounded queue of lines, with the batch in flight at its head.

    `queue.Queue` would take a lock in put(), which deadlocks when the garbage collector runs a ``__del__`` that tracks
    while the lock is held. Here put() takes none: a list of free slots bounds the queue and a deque holds it, and each
    of their steps is atomic. A record is accepted at the moment it is in the deque.
    """

    is_durable = False  # whether what is not delivered at the end stays for the next process
    rounds = float("inf")  # seconds between two calls of look_around()

    def __init__(self, max_size: int, clock: "Callable[[], float]") -> None:
        self.ledger = _Ledger()  # its lock guards what follows, but for put(), whose steps are atomic
        self._clock = clock
        self._free: "List[None]" = [None] * max_size
        self._waiting: "Deque[Tuple[float, bytes]]" = collections.deque()  # (when it came, line)
        self.waiting = self._waiting.__len__  # how many records wait that are not in flight
        self._inflight: "List[bytes]" = []
        self._settled = 0
        self._surrendered = False
        self.refusals: "Deque[AnalysysPythonSdkException]" = collections.deque()  # settled; the worker reports them

    def put(self, line: bytes) -> bool:
        """Accept *line*, or return False where the queue is full."""
        try:
            self._free.pop()
        except IndexError:
            return False
        self._waiting.append((self._clock(), line))
        return True

    def take_back(self, line: bytes) -> bool:
        """Undo put(), unless *line* is on its way already."""
        with self.ledger.lock:
            for entry in list(self._waiting):
                if entry[1] is line:
                    self._waiting.remove(entry)
                    self._free.append(None)
                    return True
        return False

    def take(self, most: int) -> int:
        """Move up to *most* waiting records in flight and return their number."""
        with self.ledger.lock:
            number = 0 if self._surrendered else min(most, len(self._waiting))
            self.ledger.add({"accepted": number, "pending": number})  # first: accepted() may be too high, never too low
            self._inflight += [self._waiting.popleft()[1] for _ in range(number)]
        return number

    def head(self, number: int) -> "List[bytes]":
        """Return the first *number* lines in flight."""
        return self._inflight[:number]

    def settle(self, number: int, error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        """Let go of the first *number* in flight: delivered, or rejected with *error*."""
        with self.ledger.lock:
            if self._surrendered:  # and reported by whoever took them
                return
            if error is not None:
                self.refusals.append(error)  # first: who sees it settled must see that it is to be reported
            del self._inflight[:number]
            self._settled += number
            self._free.extend([None] * number)
            self.ledger.add(_settled(number, error))

    def disown(self) -> None:
        """Let go of descriptors: there are none."""

    def surrender(self) -> "List[Record]":
        """Give up all that is not delivered, counting it as rejected, and return it in order."""
        with self.ledger.lock:
            self.take(len(self._waiting))
            left, self._inflight, self._surrendered = self._inflight, [], True
            self.ledger.add(_settled(len(left), True))
        return _records(left)

    def look_around(self) -> None:
        """Look for records that others left: in memory there are none."""

    def is_due(self, size: int) -> bool:
        """Tell whether there is something to send whatever its age: *size* waiting, or what was tried before."""
        return len(self._waiting) >= size or not self._free or bool(self._inflight)

    def is_empty(self) -> bool:
        return not self._waiting and not self._inflight

    def oldest(self) -> float:
        """Return when the oldest waiting record came."""
        try:
            return self._waiting[0][0]
        except IndexError:
            return self._clock()

    def accepted(self) -> int:
        """Return how many records were accepted; for a moment too many, while a batch is taken.

        No lock: flush() in a signal handler must not keep the sender waiting for the code that it interrupts.
        """
        waiting = len(self._waiting)  # first, so that none is missed
        return waiting + self.ledger.stats()["accepted"]

    def settled(self) -> int:
        """Return how many of the accepted records, from the oldest, are delivered or refused."""
        return self._settled

    def stats(self) -> "Dict[str, int]":
        with self.ledger.lock:
            waiting = len(self._waiting)
            counts = self.ledger.stats()
        counts["accepted"] += waiting
        counts["pending"] += waiting
        return counts


class _LogFile:
    """Appends lines to the file of the hour or day, which any number of threads and processes share.

    A call from inside a write (a signal handler, ``__del__``) must not wait for the write that it interrupts: it
    leaves its line in the buffer, and that write sees to it at its end.
    """

    on_error = None

    clock = staticmethod(time.time)  # wall clock; replaceable for tests

    def __init__(self, directory: str, pattern: str, batch: int) -> None:
        self.pid = os.getpid()
        self.ledger = _Ledger()
        self._lock = threading.Lock()  # guards all below but _buffer; held for a whole write
        self._directory = directory
        self._pattern = pattern  # for strftime
        self._batch = batch
        self._buffer: "List[bytes]" = []  # lines accepted and not yet written; its steps are atomic
        self._since = self._until = 0.0  # the quarter of an hour for which _file is known: time zones differ by no less
        self._file = _SharedFile("")
        self._written = 0  # lines that never waited
        self.closed = False

    def put(self, line: bytes, urgent: bool) -> None:
        """Accept *line* and write what makes a batch; where that fails, raise, keep what waited and not *line*."""
        if self.closed:
            raise _closed()
        is_due = len(self._buffer) + 1 >= self._batch or not self._buffer and not _register(self)
        if is_due and not _WRITES.now:
            self._write(line)
            return
        self.ledger.add(_ACCEPTED)
        self._buffer.append(line)
        if is_due:  # inside a write: at its end, or at exit if that fails
            _register(self)
            _WRITES.postponed += (self,)
        if self.closed:  # by another thread, while we were here
            self.close()

    def flush(self, timeout: "Optional[float]" = None) -> None:
        """Write what waits, or raise and keep it."""
        if self._buffer and _WRITES.now:
            _WRITES.postponed += (self,)
        elif self._buffer:
            self._write(b"", _LOCK_TIMEOUT if timeout is None else min(timeout, _LOCK_TIMEOUT))

    def close(self, timeout: "Optional[float]" = None) -> None:
        """Write what waits, then take no more; where that fails, raise with it in ``records`` and stay open."""
        try:
            self.flush(timeout)
        except AnalysysPythonSdkFileException as error:
            error.records = [_decode(line) for line in list(self._buffer)]
            raise
        self.closed = True
        if not self._buffer:  # else a write that this call interrupts sees to it, or exit
            _OPEN.discard(self)
        if self._lock.acquire(False):  # or else who is writing does it
            try:
                self.disown()
            finally:
                self._lock.release()

    def hurry(self) -> None:
        """Nothing to hurry: there is no thread."""

    def abandon(self) -> None:
        """The collecter is gone: write what is left, at exit if it cannot be now."""
        if not _HOOKS.get(self.pid, True):  # exit has tried
            return
        try:
            self.close(1.0)
        except AnalysysPythonSdkFileException as error:
            _log("error", "%d records wait for exit: %s", len(error.records), error)

    def disown(self) -> None:
        self._file.close()

    def stats(self) -> "Dict[str, int]":
        counts, written = self.ledger.stats(), self._written
        counts["accepted"] += written
        counts["delivered"] += written
        return counts

    def _write(self, line: bytes, patience: float = _LOCK_TIMEOUT) -> None:
        """Write what waits and then *line*, which may be empty."""
        _WRITES.now = True
        try:
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
                except OSError as error:
                    raise _unwritable(self._file.path, error, [line] if line else ()) from error
                if self.closed:
                    self.disown()
        finally:
            _WRITES.now = False
            if _WRITES.postponed:
                _write_postponed()

    def _note_line(self) -> None:
        """Note that a line is written that never waited. A plain number will do under the lock, and costs less."""
        self._written += 1

    def _note_lines(self, waited: int, line: bytes) -> None:
        """Note that *waited* lines of the buffer are written, and *line* if there is one."""
        del self._buffer[:waited]
        self.ledger.add(_settled(waited, None))
        if line:
            self._note_line()

    def _turn_to(self, now: float) -> None:
        """Turn to the file of the hour or day."""
        path = os.path.join(self._directory, time.strftime(self._pattern, time.localtime(now)))
        if self._file.path != path:
            self.disown()
            self._file = _SharedFile(path)
        self._since = now // 900 * 900
        self._until = self._since + 900


class _Writes(threading.local):
    now = False  # whether this thread is inside a write
    postponed: "Tuple[_LogFile, ...]" = ()  # what it is to flush when that write is over


_WRITES = _Writes()


def _write_postponed() -> None:
    logs, _WRITES.postponed = _WRITES.postponed, ()
    for log in logs:
        try:
            if log.pid == os.getpid():  # else we were forked inside that write
                log.flush()
        except AnalysysPythonSdkFileException as error:
            _log("error", "records wait for the next write: %s", error)


class _SharedFile:
    """A file of lines that any number of processes append to; they take turns by a lock on it."""

    def __init__(self, path: str, mode: int = 0o666) -> None:
        self.path = path
        self._mode = mode  # of a new file
        self._fd = -1
        self._identity = (-1, -1)
        self._end = 0  # where our last append ended: nothing came after it if the file still has that size

    def append(self, lines: bytes, note: "Callable[[], None]", patience: float = _LOCK_TIMEOUT) -> None:
        """Append *lines* (whole ones) and call *note*, or raise OSError and leave no part of them.

        *patience* is how many seconds to wait for other processes.
        """
        try:
            size = self._lock(patience)
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

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _lock(self, patience: float, attempts: int = 100) -> int:
        """Lock the file that is at the path now, opening it anew where it was renamed or deleted; return its size."""
        if self._fd < 0:
            self._fd = _open_lines(self.path, self._mode)
            opened = os.fstat(self._fd)
            self._identity, self._end = (opened.st_dev, opened.st_ino), 0
        _lock_file(self._fd, patience)
        try:
            now = os.stat(self.path)
            if (now.st_dev, now.st_ino) == self._identity:
                return now.st_size
        except FileNotFoundError:
            pass
        self.close()
        if not attempts:
            raise OSError(errno.EBUSY, "renamed or deleted again and again")
        return self._lock(patience, attempts - 1)


def _open_lines(path: str, mode: int) -> int:
    """Open a regular file for reading and appending, making it and its directory where they are missing."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        fd = os.open(path, flags, mode)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, flags, mode)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _append(fd: int, size: int, data: bytes, note: "Callable[[], None]") -> None:
    """Append all of *data* to a file of *size* bytes and call *note*, or leave the file as it was and raise.

    A signal handler may raise at any moment, also when all is written: then what counts is how long the file is.
    """
    written, whole = 0, len(data)
    try:
        while written < whole:
            written += os.write(fd, data[written:] if written else data)
    finally:
        if written == whole or os.fstat(fd).st_size == size + whole:
            note()
        else:
            os.ftruncate(fd, size)


def _read_at(fd: int, offset: int, size: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)  # appending does not mind
    return os.read(fd, size)


def _lock_file(fd: int, patience: float = _LOCK_TIMEOUT) -> None:
    """Lock an open file against other processes, waiting for them *patience* seconds; raise OSError if that fails."""
    deadline = pause = 0.0
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(fd, _LOCK_NOW)
            elif msvcrt is not None:
                os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise OSError(error.errno, "the file system refuses to lock it: %s" % error) from None
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() >= deadline:
                raise OSError(error.errno, "another process has held its lock for %.0f s" % patience) from None
        time.sleep(pause)
        pause = min(2 * pause + 0.0005, 0.01)


def _unlock_file(fd: int) -> None:
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_UN)
    elif msvcrt is not None:
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)


# A line of a file, and where it stands: the file's name, the line's number from 1, the offset of its end in the file.
_Line = collections.namedtuple("_Line", "text file number end")


def _read_lines(
    file: "Any", name: str, start: "Tuple[int, int]", most: int, end: float
) -> "Tuple[List[_Line], Tuple[int, int]]":
    """Read up to *most* lines of *file*, which stands at *start* (offset, line number), as far as offset *end*.

    Return them and where the file stands then. Blank lines are skipped. A read that fails after some lines ends them.
    """
    offset, number = start
    lines: "List[_Line]" = []
    while len(lines) < most and offset < end:
        try:
            text = file.readline(_MAX_LINE)
        except Exception:
            if not lines:
                raise
            break
        if not text:
            break
        offset, number = offset + len(text), number + 1
        if not text.isspace():
            lines.append(_Line(text, name, number, offset))
    return lines, (offset, number)


def _sound(lines: "List[_Line]") -> int:
    """Return how many of *lines*, from the first, are records in JSON."""
    try:
        parsed = _decode(_array([line.text for line in lines]))  # all at once is the fast way
        if len(parsed) == len(lines) and all(type(record) is dict for record in parsed):
            return len(lines)
    except (ValueError, RecursionError):
        pass
    for position, line in enumerate(lines):
        if _damage(line.text) is not None:
            return position
    return len(lines)


def _reject_lines(rejected: "_SharedFile", lines: "List[_Line]", reason: str) -> None:
    """Append refused or damaged lines to ``rejected.log``, each with its file, its line number and the reason."""
    entries = [
        {"file": line.file, "line": line.number, "reason": reason, "record": record}
        for line, record in zip(lines, _records([line.text for line in lines]))
    ]
    try:
        lacking = "".join(json.dumps(entry) + "\n" for entry in entries)  # ASCII: a record may hold half a character
        rejected.append(lacking.encode("ascii"), lambda: None)
    except OSError as error:
        _log("error", "cannot write %s: %s; it lacks %s", rejected.path, error, entries)
    finally:
        rejected.close()


class _Owner:
    """The spool files of one process: ``NAME.lock``, which it keeps locked, and ``NAME.000001.log`` and so on.

    The lock file holds the position up to which all is delivered. `fcntl.lockf` locks belong to a process: a forked
    child does not have them. But they go when the process closes any descriptor of the file, so it is opened once.
    """

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self.first = 1  # the number of the oldest file that is not wholly delivered
        self.start = (0, 0)  # offset and line number in it up to which all is delivered
        self._base = os.path.join(directory, name)
        self._lock_fd = -1
        self._taking = 1  # the number of the file that lines are taken from,
        self._taken = (0, 0)  # and up to where they are

    def claim(self) -> bool:
        """Become the owner if there is none; a process that is gone owns nothing. Raise OSError where that fails."""
        path = self._base + ".lock"
        if _CLAIMED.setdefault((os.getpid(), path), self) is not self:
            return False
        try:
            self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            if _lock_forever(self._lock_fd) and os.fstat(self._lock_fd).st_nlink > 0:  # else removed meanwhile
                kept = os.read(self._lock_fd, 100).split()
                if len(kept) == 3 and b"".join(kept).isdigit():
                    self.first, self.start = int(kept[0]), (int(kept[1]), int(kept[2]))
                self._taking, self._taken = self.first, self.start
                return True
            self.release()
            return False
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give up the files as they are; whoever finds them may claim them."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        _CLAIMED.pop((os.getpid(), self._base + ".lock"), None)

    def remove(self, last: int) -> None:
        """Remove the files up to number *last*, which are wholly delivered, and be gone."""
        for path in [self.path(number) for number in range(self.first, last + 1)] + [self._base + ".lock"]:
            try:
                os.unlink(path)
            except OSError:
                pass
        self.release()

    def path(self, number: int) -> str:
        return "%s.%06d.log" % (self._base, number)

    def read(self, most: int, last: int, end: float) -> "List[_Line]":
        """Take the next lines; *last* is the number of the newest file and *end* how far that is written."""
        while True:
            path = self.path(self._taking)
            chunk = _read_chunk(path, self._taken[0], end if self._taking == last else float("inf"))
            file = io.BytesIO(chunk)
            lines, self._taken = _read_lines(file, os.path.basename(path), self._taken, most, float("inf"))
            if lines or not chunk and self._taking >= last:
                return lines
            if not chunk:
                self._taking, self._taken = self._taking + 1, (0, 0)

    def unread(self, line: "_Line") -> None:
        """Have the next read() begin with *line*."""
        self._taken = (line.end - len(line.text), line.number - 1)

    def settle(self, line: "_Line") -> None:
        """Note that all up to *line* is delivered; files before its own go."""
        number = int(line.file.split(".")[-2])
        for done in range(self.first, number):
            try:
                os.unlink(self.path(done))
            except FileNotFoundError:
                pass
        self.first, self.start = number, (line.end, line.number)
        os.lseek(self._lock_fd, 0, os.SEEK_SET)
        os.write(self._lock_fd, b"%010d %020d %020d\n" % (self.first, self.start[0], self.start[1]))


def _read_chunk(path: str, offset: int, end: float) -> bytes:
    """Return whole lines of a file from *offset* on, as far as *end*; at its very end also a line that was cut.

    No file object is kept: a forked child would hang on its lock.
    """
    size = _CHUNK
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return b""
    try:
        while True:
            wanted = int(min(size, end - offset))
            chunk = _read_at(fd, offset, wanted)
            whole = chunk.rfind(b"\n") + 1
            if whole or len(chunk) < wanted or wanted < size or size >= _MAX_LINE:
                return chunk[:whole] or chunk
            size *= 4
    finally:
        os.close(fd)


# Who of this process owns which lock file, by process and path. Its steps are atomic.
_CLAIMED: "Dict[Tuple[int, str], _Owner]" = {}


def _lock_forever(fd: int) -> bool:
    """Lock an open file until this process ends or closes it; return whether no other process has it."""
    try:
        if fcntl is not None:
            fcntl.lockf(fd, _LOCK_NOW)
        elif msvcrt is not None:
            os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        return True
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False


class _Spool:
    """A queue on disk with the interface of `_MemoryQueue`: what a process wrote, after what ended ones left."""

    is_durable = True
    rounds = _LOOK_EVERY

    def __init__(self, directory: str, max_bytes: int, clock: "Callable[[], float]") -> None:
        self.ledger = _Ledger("adopted")
        self.refusals: "Deque[AnalysysPythonSdkException]" = collections.deque()
        self._directory = directory
        self._max_bytes = max_bytes
        self._roll_size = min(_ROLL_SIZE, max_bytes // 4)
        self._clock = clock
        self._closed = False
        # Guards the file that is written, while it is. Re-entrant, for a __del__ or signal handler that tracks.
        self._writing = threading.RLock()
        self._fd = -1
        self._number = 0
        self._turns = itertools.count(1)  # one a call
        self._end = (-1, 0)  # the turn of the last call that came to its end, and the size of the file then
        self._written = 0  # own records
        self._since = 0.0  # when the oldest waiting record came, or before
        # Guards the files that are read, while a batch is taken or settled. Taken before _writing, never after.
        self._reading = threading.RLock()
        self._own = self._new_owner()
        self._adopted: "List[_Owner]" = []  # in the order of their names, which is that of time
        self._source = self._own  # whose the lines in flight are
        self._inflight: "List[_Line]" = []
        self._taken, self._settled = 0, 0  # own records
        self._rejected = _SharedFile(os.path.join(directory, "rejected.log"), 0o600)
        self._look_at = 0.0

    def put(self, line: bytes) -> bool:
        """Hand *line* to the operating system, or return False where the spool is full; raise where that fails."""
        with self._writing:
            if self._closed:
                raise _closed()
            if self._written == self._taken:
                self._since = self._clock()
            try:
                turn = next(self._turns)
                last, size = self._end
                if last != turn - 1:  # a call was interrupted, by another one or an exception
                    size = self._size()
                if size < 0 or size and size + len(line) > self._roll_size:
                    if not self._roll():
                        return False
                    size = 0
                _append(self._fd, size, line, self._note)
            except OSError as error:
                raise _unwritable(self._own.path(self._number), error, [line]) from error
            self._end = turn, size + len(line)
        return True

    def _note(self) -> None:
        self._written += 1
        self.ledger.add(_ACCEPTED)

    def take_back(self, line: bytes) -> bool:
        """Undo nothing: what is on disk will be delivered."""
        return False

    def take(self, most: int) -> int:
        """Take up to *most* lines in flight, all of one owner, and return their number. Damaged ones are rejected."""
        with self._reading:
            while not self._closed:
                lines = self._read(most)
                if not lines:
                    break
                sound = _sound(lines)
                if sound < len(lines):
                    keep = max(1, sound)  # a damaged line is taken alone
                    if keep < len(lines):
                        self._source.unread(lines[keep])
                    lines = lines[:keep]
                if self._source is self._own:
                    self._taken += len(lines)
                else:
                    self.ledger.add({"adopted": len(lines), "pending": len(lines)})
                self._inflight = lines
                if sound:
                    return len(lines)
                reason = "line %d of %s is %s" % (lines[0].number, lines[0].file, _damage(lines[0].text))
                self.settle(1, AnalysysPythonSdkIllegalDataException(reason, _records([lines[0].text])))
        return 0

    def head(self, number: int) -> "List[bytes]":
        """Return the first *number* lines in flight."""
        return [line.text for line in self._inflight[:number]]

    def settle(self, number: int, error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        """Let go of the first *number* in flight: delivered, or rejected with *error*."""
        with self._reading:
            if self._closed:
                return
            done = self._inflight[:number]
            if error is not None:
                _reject_lines(self._rejected, done, str(error))
                self.refusals.append(error)
            self._source.settle(done[-1])
            self._inflight = self._inflight[number:]
            self.ledger.add(_settled(number, error))
            if self._source is self._own:
                self._settled += number

    def surrender(self) -> "List[Record]":
        """Close the files. What is not delivered stays on disk and pending, for the next process that looks."""
        with self._reading, self._writing:
            if not self._closed:
                self._closed = True
                if self._is_delivered():
                    self._own.remove(self._number)
                self.disown()
        return []

    def disown(self) -> None:
        """Let go of all descriptors; in a forked child, of the parent's."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for owner in [self._own] + self._adopted:
            owner.release()

    def look_around(self) -> None:
        """Adopt, every few seconds, the files whose owners are gone."""
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + _LOOK_EVERY
        with self._reading:
            for name in [] if self._closed else self._owners():
                owner = _Owner(self._directory, name)
                try:
                    if owner.claim():
                        self._adopted.append(owner)
                except OSError as error:
                    _log("warning", "cannot adopt %s in %s: %s", name, self._directory, error)

    def is_due(self, size: int) -> bool:
        return self.waiting() >= size or bool(self._inflight or self._adopted)

    def is_empty(self) -> bool:
        return self._written <= self._settled and not self._adopted

    def waiting(self) -> int:
        return self._written - self._taken

    def oldest(self) -> float:
        return self._since

    def accepted(self) -> int:
        return self._written

    def settled(self) -> int:
        return self._settled

    def stats(self) -> "Dict[str, int]":
        return self.ledger.stats()

    def _new_owner(self) -> "_Owner":
        try:
            os.makedirs(self._directory, 0o700, exist_ok=True)
            while True:
                suffix = binascii.hexlify(os.urandom(4)).decode()
                owner = _Owner(self._directory, "%013d-%d-%s" % (time.time() * 1000, os.getpid(), suffix))
                if owner.claim():
                    return owner
        except OSError as error:
            raise _unwritable(self._directory, error) from error

    def _roll(self) -> bool:
        """Begin the next file; return False where the spool would get too large."""
        used = self._used()
        if used and used + self._roll_size > self._max_bytes:
            return False
        number = self._number + 1
        fd, old = _open_lines(self._own.path(number), 0o600), self._fd
        self._fd, self._number = fd, number
        if old >= 0:
            os.close(old)
        return True

    def _size(self) -> int:
        """Return the size of the file that is written, -1 where there is none."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else -1

    def _is_delivered(self) -> bool:
        """Tell, by the file, whether all is delivered that this process wrote."""
        return self._fd < 0 or (self._own.first, self._own.start[0]) == (self._number, self._size())

    def _used(self) -> int:
        """Return the bytes of all spool files here, less the one that is written if it is wholly delivered."""
        used = -max(0, self._size()) if self._is_delivered() else 0
        for name in os.listdir(self._directory):
            if _SPOOL_FILE.fullmatch(name):
                try:
                    used += os.stat(os.path.join(self._directory, name)).st_size
                except FileNotFoundError:
                    pass
        return used

    def _owners(self) -> "List[str]":
        """Return the names of all owners here, the oldest first."""
        try:
            names = os.listdir(self._directory)
        except OSError:  # removed: it comes back with the next file
            return []
        return sorted(name[: -len(".lock")] for name in names if _SPOOL_LOCK.fullmatch(name))

    def _read(self, most: int) -> "List[_Line]":
        """Return the next lines of the first adopted owner that has any, or else of this process."""
        while self._adopted:
            self._source = self._adopted[0]
            found = [name.split(".") for name in os.listdir(self._directory) if _SPOOL_FILE.fullmatch(name)]
            newest = max([int(number) for name, number, _ in found if name == self._source.name] + [0])
            lines = self._source.read(most, newest, float("inf"))
            if lines:
                return lines
            self._adopted.pop(0).remove(newest)
        self._source = self._own
        with self._writing:
            number, size = self._number, self._size()
        return self._own.read(most, number, size)


########################################################################################################################
# Sender: the one place that decides what an answer means for a batch: delivered, retry, split, refused for good
########################################################################################################################


class _Sender:
    """Sends what is at the head of a queue, in order, and settles it. One thread at a time may call attempt()."""

    def __init__(self, transport: "_Transport", ledger: "_Ledger") -> None:
        import random

        self.failing_since: "Optional[float]" = None  # monotonic; None while the last attempt succeeded
        self.not_before = 0.0  # monotonic; end of the back-off
        self.reason = ""  # of the last failure
        self._transport = transport
        self._ledger = ledger
        self._clock = time.monotonic
        self._random = random.Random()  # its own seed, also in a forked child
        self._parts: "Deque[int]" = collections.deque()  # sizes of the requests that the batch in flight is cut into
        self._limit = sys.maxsize  # records a request, learned from 413
        self._failures = 0
        self._next_warning = 0.0

    def ask(self, lines: "List[bytes]", timeout: float) -> "_Verdict":
        """Send *lines* in one request and say what became of them. Raises nothing. Any thread may call it."""
        text = _array(lines)
        self._ledger.add({"requests": 1})
        try:
            verdict = _judge(self._transport.post(_pack(text), timeout))
        except Exception as error:
            verdict = _Verdict(_RETRY, "%s: %s" % (type(error).__name__, error), None)
        if b'"$debug":1' in text or b'"$debug":2' in text:
            _log("info", "answer for %d records: %s, %s", len(lines), verdict.kind, verdict.reason)
        if verdict.kind == _TOO_LARGE and len(lines) == 1:
            return verdict._replace(kind=_REFUSED)
        return verdict

    def attempt(self, queue: "Any", most: int, timeout: float) -> None:
        """Send one request for the head of *queue*, then settle, split or keep it."""
        if not self._parts:
            self._parts.append(queue.take(most))
        if self._parts[0] > self._limit:
            self._parts[0] -= self._limit
            self._parts.appendleft(self._limit)
        size = self._parts[0]
        lines = queue.head(size)
        if not lines:  # surrendered meanwhile
            self._parts.clear()
            return
        if self._failures:
            self._ledger.add({"retries": 1})
        verdict = self.ask(lines, timeout)
        if verdict.kind == _RETRY:
            self.failed(verdict.reason, verdict.wait)
            return
        self._recovered()
        if verdict.kind == _TOO_LARGE:
            self._limit = size // 2
        elif verdict.kind == _REFUSED and size > 1:
            self._parts[0] = size - size // 2
            self._parts.appendleft(size // 2)
        elif verdict.kind == _REFUSED:
            if self._limit == 1:  # it was this record that was too large, not the number of them
                self._limit = sys.maxsize
            reason = "refused for good: " + verdict.reason
            queue.settle(1, AnalysysPythonSdkIllegalDataException(reason, _records(lines)))
            self._parts.popleft()
        else:
            queue.settle(size)
            self._parts.popleft()

    def state(self) -> str:
        """Say why records wait."""
        since = self.failing_since  # once: the sender may recover meanwhile
        if since is None:
            return "the server has not answered yet"
        return "the server has been failing for %.1f s (%s)" % (self._clock() - since, self.reason)

    def failed(self, reason: str, wait: "Optional[float]" = None) -> None:
        """Note a failure that is not the data's, and when to try again: after *wait* seconds or a back-off."""
        now = self._clock()
        self._failures += 1
        self.reason = reason
        if self.failing_since is None:
            self.failing_since = now
            self._next_warning = now
        if wait is None:
            longest = min(_LAST_BACKOFF, _FIRST_BACKOFF * 2 ** min(self._failures, 20))
            wait = self._random.uniform(_FIRST_BACKOFF, longest)
        self.not_before = now + max(wait, _FIRST_BACKOFF)

    def warn(self) -> None:
        """Log an outage when it begins, then once a minute. Apart from failed(), so that no lock is held here."""
        now = self._clock()
        if self.failing_since is not None and now >= self._next_warning:
            self._next_warning = now + _WARN_EVERY
            _log("warning", "nothing is lost, but not delivered: %s", self.state())

    def _recovered(self) -> None:
        self._failures, self.failing_since, self.not_before = 0, None, 0.0


class _Signal:
    """Wakes threads that wait for a condition. Takes no lock, so that __del__ and signal handlers may notify."""

    def __init__(self) -> None:
        self._sleepers: "Deque[Any]" = collections.deque()  # a locked lock each; whoever takes one out releases it

    def wait_for(self, condition: "Callable[[], bool]", deadline: float) -> bool:
        """Return whether *condition* came true before *deadline* (monotonic; infinity for none)."""
        while True:
            sleeper = threading.Lock()
            sleeper.acquire()
            self._sleepers.append(sleeper)  # before looking, so that no change is missed
            try:
                if condition():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                sleeper.acquire(timeout=min(left, _LONGEST_WAIT))
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


class _Worker:
    """Sends from a queue in the background; in the caller's thread where no thread can be started.

    The thread holds no reference to the collecter, so that a dropped collecter is noticed (see abandon()).
    """

    def __init__(
        self,
        url: str,
        request_timeout: float,
        ssl_context: "Any",
        headers: "Dict[str, str]",
        interval: float,
        due_size: int,
        request_size: int,
        queue_size: int,
        spool_path: "Optional[str]",
        spool_max_bytes: int,
        on_error: "OnError",
    ) -> None:
        self.pid = os.getpid()
        self.closed = False  # takes no more records
        self.on_error = on_error
        self._clock = time.monotonic
        self._timeout = request_timeout
        self._interval = interval
        self._due_size = min(due_size, queue_size)  # a full queue is due, too
        self._request_size = request_size
        self._queue: "Union[_MemoryQueue, _Spool]" = (
            _MemoryQueue(queue_size, self._clock)
            if spool_path is None
            else _Spool(spool_path, spool_max_bytes, self._clock)
        )
        self._transport = _Transport(url, ssl_context, headers)
        self._sender = _Sender(self._transport, self._queue.ledger)
        self.stats = self._queue.stats
        self._gate = threading.Lock()  # closed while the thread has nothing to do; _wake() opens it
        self._gate.acquire()
        self._wake_at = 1  # number of waiting records that opens the gate; out of reach while the thread is awake
        self._settled = _Signal()  # for flush() and for callers that wait for room
        self._turn = threading.Lock()  # held by the thread that is sending, requests included
        self._starting = threading.Lock()  # held by the thread that starts the worker's
        self._here = threading.local()  # .sending: whether this thread is sending or reporting
        self._thread: "Optional[threading.Thread]" = None
        self._urgent = False  # an alias waits
        self._goal = 0  # all up to this many accepted records are due; grows under the ledger's lock
        self._next_cut = 0.0
        self._reporting = False  # between two requests: refusals are settled, but not yet reported
        self._abandoned = False
        self._ended = False  # sends no more

    # What callers do

    def put(self, line: bytes, urgent: bool) -> None:
        """Accept *line*, waiting for room if need be, and see to it that it will be sent."""
        if self.closed:
            raise _closed()
        if not self._queue.put(line):
            self._wait_for_room(line)
        if self.closed and self._queue.take_back(line):
            self._settled.notify()
            raise _closed()
        if urgent:
            self._urgent = True
        if self._thread is None:
            if not self._start():
                self._finish()
        elif urgent or self._queue.waiting() >= self._wake_at:
            self._wake()

    def _finish(self) -> None:
        """Deliver in an exit hook that runs after ours: nobody else will. Raise with what cannot be delivered."""
        try:
            self.flush(_EXIT_TIMEOUT)
        except AnalysysPythonSdkNetworkException:
            self.close(0)

    def begin(self) -> None:
        """Start the thread before there is a record, for those that ended processes have left behind."""
        self._start(self._clock())

    def flush(self, timeout: "Optional[float]") -> None:
        """Return when all that is accepted by now is settled; raise where that is not so within *timeout* seconds."""
        deadline = float("inf") if timeout is None else self._clock() + timeout
        goal = self._queue.accepted()

        def is_over() -> bool:
            # close() may have had put() take a record back, hence min().
            is_settled = self._queue.settled() >= min(goal, self._queue.accepted())
            return is_settled and not self._queue.refusals and not self._reporting or self._ended

        while not is_over():
            self.hurry()
            if self._thread is None:
                self._start(deadline)
            patience = _CUT_EVERY if self._thread is not None else max(0.01, self._sender.not_before - self._clock())
            pause_end = min(deadline, self._clock() + patience)
            if self._is_sending() or not self._settled.wait_for(is_over, pause_end) and self._clock() >= deadline:
                break
        if self._queue.settled() < min(goal, self._queue.accepted()) or not is_over():
            message = "%d records are not delivered: %s" % (self.stats()["pending"], self._sender.state())
            raise AnalysysPythonSdkNetworkException(message)

    def close(self, timeout: "Optional[float]") -> None:
        """Flush and end; raise with what is not delivered in ``records``."""
        if self._ended:
            return
        self.closed = True
        self._settled.notify()  # those who wait for room wait in vain
        began = self._clock()
        problem = None
        try:
            self.flush(timeout)
        except AnalysysPythonSdkNetworkException as error:
            problem = error
        self._ended = True
        thread = self._thread
        # A spool stays the thread's until its request is over, so that nobody sends the same meanwhile.
        left = [] if self._queue.is_durable and thread is not None else self._queue.surrender()
        self._settled.notify()
        self._wake()
        if thread is None:
            self._end()
        elif problem is None and not self._is_sending():
            thread.join(None if timeout is None else max(0.0, timeout - (self._clock() - began)))
        if left:
            message = str(problem) if problem else "%d records came while the collecter was closed" % len(left)
            raise AnalysysPythonSdkNetworkException(message, left)

    def hurry(self) -> None:
        """Make all that waits due, and cut a running back-off short, though not too often."""
        self._goal = max(self._goal, self._queue.accepted())  # two threads may undo each other: they come again
        now = self._clock()
        if now >= self._next_cut:
            self._next_cut = now + _CUT_EVERY
            self._sender.not_before = 0.0
        self._wake()

    def abandon(self) -> None:
        """The collecter is gone: deliver what is left, then end."""
        if self._ended:
            return
        self._abandoned = True
        self._wake()
        if self._thread is None and self._queue.is_empty():
            self._end()

    def disown(self) -> None:
        """Let go, in a forked child, of what belongs to the parent."""
        self._transport.disown()
        self._queue.disown()

    def _report(self, error: "AnalysysPythonSdkException") -> None:
        """Report records that were given up. Never called under a lock."""
        if self.on_error is not None:
            _tell(self.on_error, error, error.records)
        else:
            _log("error", "%d records are lost: %s", len(error.records), error)

    def _wait_for_room(self, line: bytes) -> None:
        is_in = False

        def is_over() -> bool:
            nonlocal is_in
            is_in = self._queue.put(line)
            return is_in or self.closed or self._sender.failing_since is not None

        if self._thread is None:
            self._start()
        self._wake()
        patience = 0.0 if self._is_sending() else self._timeout
        self._settled.wait_for(is_over, self._clock() + patience)
        if not is_in and self.closed:
            raise _closed()
        if not is_in:
            message = "the queue is full: %d records wait; %s" % (self.stats()["pending"], self._sender.state())
            raise AnalysysPythonSdkNetworkException(message, [_decode(line)])

    def _is_sending(self) -> bool:
        """Tell whether this is the sending thread: it must not wait for itself."""
        thread = self._thread
        return getattr(self._here, "sending", False) or thread is not None and thread.ident == threading.get_ident()

    def _wake(self) -> None:
        self._wake_at = sys.maxsize
        try:
            self._gate.release()
        except RuntimeError:  # it is open already
            pass

    # What the sending thread does

    def _start(self, deadline: float = float("inf")) -> bool:
        """Start the thread; where none can be started, send in this one what can be sent. False: we are at exit."""
        if not self._starting.acquire(False):
            return True  # another call is at it
        try:
            will_exit = _register(self)
            if self._thread is None and will_exit:
                try:
                    self._thread = threading.Thread(target=self._run, name="analysys-sender", daemon=True)
                    self._thread.start()
                except BaseException as error:
                    self._thread = None
                    if not isinstance(error, RuntimeError):
                        raise
        finally:
            self._starting.release()
        while (
            self._thread is None
            and not self._is_sending()
            and self._clock() < deadline
            and self._seconds_to_next() == 0
            and self._turn.acquire(False)
        ):
            self._send(deadline)
        return will_exit

    def _run(self) -> None:
        try:
            while not self._ended and not (self._abandoned and self._queue.is_empty()):
                if self._queue.is_due(self._due_size):  # then it is a back-off that is waited for
                    self._wake_at = sys.maxsize
                else:
                    self._wake_at = self._due_size if self._queue.waiting() else 1
                wait = self._seconds_to_next()
                if wait == 0:
                    self._wake_at = sys.maxsize
                    self._turn.acquire()
                    self._send(float("inf"))
                else:
                    # Never longer than the interval: an exception of a signal handler may have cut _wake() in two.
                    self._gate.acquire(timeout=min(wait, self._queue.rounds, self._interval, _LONGEST_WAIT))
            self._end()
        finally:
            self._thread = None

    def _end(self) -> None:
        if self._queue.is_durable:
            self._queue.surrender()
        self._transport.close()
        _OPEN.discard(self)

    def _seconds_to_next(self) -> float:
        """Return how long there is nothing to do: 0 where something is due."""
        self._queue.look_around()
        if self._urgent:
            self._urgent = False
            self._goal = max(self._goal, self._queue.accepted())
        if self._ended or self._queue.is_empty():
            return float("inf")
        if (
            self._queue.is_due(self._due_size)
            or self._queue.settled() < self._goal
            or self._abandoned
            or self._thread is None
        ):
            at = 0.0
        else:
            at = self._queue.oldest() + self._interval
        return max(0.0, max(at, self._sender.not_before) - self._clock())

    def _send(self, deadline: float) -> None:
        """Send one request. The caller holds the turn, which ends here."""
        self._here.sending = True
        try:
            try:
                timeout = min(self._timeout, deadline - self._clock())
                if timeout > 0 and not self._ended:
                    self._sender.attempt(self._queue, self._request_size, timeout)
            except Exception as error:  # a disk that fails: the thread lives on
                self._sender.failed("%s: %s" % (type(error).__name__, error))
            finally:
                self._turn.release()
            self._reporting = True
            self._settled.notify()
            self._sender.warn()
            while self._queue.refusals:
                self._report(self._queue.refusals.popleft())
        finally:
            self._reporting = False
            self._here.sending = False
            self._settled.notify()


########################################################################################################################
# Collecters: thin compositions of the parts above
########################################################################################################################


class _Collecter:
    """What the collecters share: a configuration that can be pickled, and a state for each process.

    A forked child must not touch what its parent had at the moment of the fork: queued records, locks that a thread of
    it held, connections, descriptors. So each process has a state of its own, made when it is first asked for.
    """

    _State: "Any" = None  # the class of the states; made of the configuration

    def _start(self, config: "Record", closed: bool = False) -> None:
        self._config = config
        self._closed = closed
        self._states: "Dict[int, Any]" = {}
        self._state()
        _notice_forks(self)

    def uploadData(self, record: "Record") -> None:
        """Take a copy of one record; what that means is the collecter's to say."""
        try:
            line, urgent = _line(record), record["xwhat"] == _ALIAS
        except Exception as error:
            raise _illegal("record", record, "must be JSON and have the key xwhat: %s" % error) from None
        self._put(line, urgent)

    def _put(self, line: bytes, urgent: bool) -> None:
        (self._states.get(os.getpid() if _FORKS else _PID) or self._state()).put(line, urgent)

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
            state.close(seconds)
        finally:
            self._closed = state.closed

    def stats(self) -> "Dict[str, int]":
        """Return the counts of this process: at any moment accepted (+ adopted) = delivered + rejected + pending."""
        counts: "Dict[str, int]" = self._state().stats()
        return counts

    def __del__(self) -> None:
        state = self.__dict__.get("_states", {}).get(os.getpid())
        if state is not None and not self._closed:
            state.abandon()

    def __getstate__(self) -> "Record":
        if self._config.get("ssl_context") is not None:
            raise TypeError("a collecter with an ssl_context cannot be pickled: make it in the worker process")
        return {"config": self._config, "closed": self._closed}

    def __setstate__(self, pickled: "Record") -> None:
        self._start(pickled["config"], pickled["closed"])

    def _state(self) -> "Any":
        pid = os.getpid()
        state = self._states.get(pid)
        return state if state is not None else self._new_process(pid)

    def _new_process(self, pid: int) -> "Any":
        fresh = self._State(**self._config)
        fresh.closed = self._closed
        state = self._states.setdefault(pid, fresh)  # one step: where several threads come here, one state stays
        self._disown()
        return state

    def _disown(self) -> None:
        """Let go of what belongs to the process that this one was forked from."""
        for pid in [pid for pid in list(self._states) if pid != os.getpid()]:
            state = self._states.pop(pid, None)
            if state is not None:
                state.disown()


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


class _Direct:
    """The state of a DefaultCollecter: no queue."""

    def __init__(self, url: str, request_timeout: float, ssl_context: "Any", headers: "Dict[str, str]") -> None:
        self.closed = False
        self._timeout = request_timeout
        self._ledger = _Ledger()
        self._transport = _Transport(url, ssl_context, headers)
        self._sender = _Sender(self._transport, self._ledger)
        self.stats = self._ledger.stats
        self.disown = self._transport.disown

    def put(self, line: bytes, urgent: bool) -> None:
        if self.closed:
            raise _closed()
        self._ledger.add(_ACCEPTED)
        verdict = None
        try:
            verdict = self._sender.ask([line], self._timeout)
        finally:
            self._ledger.add(_settled(1, verdict is None or verdict.kind != _DELIVERED))
        if verdict.kind == _REFUSED:
            raise AnalysysPythonSdkIllegalDataException("refused for good: " + verdict.reason, [_decode(line)])
        if verdict.kind != _DELIVERED:
            raise AnalysysPythonSdkNetworkException("not delivered: " + verdict.reason, [_decode(line)])

    def flush(self, timeout: "Optional[float]") -> None:
        """Nothing waits: each call returns after its record is delivered."""

    def close(self, timeout: "Optional[float]") -> None:
        self.closed = True
        self._transport.close()

    def abandon(self) -> None:
        self._transport.close()


DefaultCollecter._State = _Direct


class BatchCollecter(_Collecter):
    """Takes records into a queue and sends them in batches from a background thread, in order.

    A request goes out when *queue_cache_max_size* records wait, *max_interval_time* seconds after the oldest of them
    came, when the queue is full, and at once for an alias; it carries at most *collecter_max_size* records. What is not
    delivered is sent again until it is; what the server refuses for good goes to ``on_error(exception, records)``, or
    to the log. Delivery is at least once.

    A full queue holds the caller back until there is room, at most *request_timeout* seconds, and raises
    AnalysysPythonSdkNetworkException at once while the server is failing; the record that was not taken is in its
    ``records``.

    - *queue_max_size*: records in the queue, the batch in flight included.
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
        spool_path: "Optional[str]" = None,
        spool_max_bytes: int = 1 << 30,
        on_error: "OnError" = None
    ) -> None:
        config = _http_config(server_url, request_timeout, ssl_context, headers)
        config["interval"] = _check("max_interval_time", max_interval_time, "seconds")
        config["due_size"] = _check("queue_cache_max_size", queue_cache_max_size, "size")
        config["request_size"] = _check("collecter_max_size", collecter_max_size, "size")
        config["queue_size"] = _check("queue_max_size", queue_max_size, "size")
        config["spool_path"] = spool_path
        if spool_path is not None:
            config["spool_path"] = os.path.abspath(_check("spool_path", spool_path, "log_path"))
        config["spool_max_bytes"] = _check("spool_max_bytes", spool_max_bytes, "size")
        config["on_error"] = _check("on_error", on_error)
        self._start(config)
        if spool_path is not None:
            self._state().begin()


BatchCollecter._State = _Worker


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
                "directory": os.path.abspath(_check("log_path", log_path)),
                "pattern": _check("general_rule", general_rule),
                "batch": batch if _check("is_batch", is_batch) else 1,
            }
        )


LogCollecter._State = _LogFile


########################################################################################################################
# Process hooks: exit and fork
########################################################################################################################

# States with records that are not delivered, of this process and, in a forked child, of its parent. Not weak: they
# outlive their collecters until they are done. The steps of a set are atomic.
_OPEN: "set[Any]" = set()
_COLLECTERS: "List[Any]" = []  # weak references
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
        # Processes of multiprocessing end without atexit. Their own finalizers run, if registered in that very process.
        process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
        if process and util and type(process.current_process()).__name__ != "_MainProcess":
            util.Finalize(None, _deliver_at_exit, exitpriority=0)
    if _HOOKS[pid]:
        _OPEN.add(state)
    return _HOOKS[pid]


def _notice_forks(collecter: "_Collecter") -> None:
    """Have a forked child of this process close its parent's descriptors at once, where Python can do that (3.7)."""
    _hook_fork()
    _COLLECTERS.append(weakref.ref(collecter, _COLLECTERS.remove))


# The number of this process: asking the system costs as much as half a check of a call. It holds while _FORKS is empty.
_PID = 0
_FORKS: "List[None]" = [None]  # an item for each fork under way, in atomic steps; one for ever where none is noticed


@functools.lru_cache(None)  # once
def _hook_fork() -> None:
    if _register_at_fork is not None:
        _register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
        _know_process()


def _before_fork() -> None:
    _FORKS.append(None)


def _after_fork() -> None:
    del _FORKS[:1]


def _know_process() -> None:
    global _PID
    _PID = os.getpid()
    del _FORKS[:]


def _after_fork_in_child() -> None:
    _know_process()
    for reference in list(_COLLECTERS):
        collecter = reference()
        if collecter is not None:
            collecter._disown()


def _deliver_at_exit() -> None:
    """Close all that is open, within `_EXIT_TIMEOUT` in all; report what could not be delivered."""
    deadline = time.monotonic() + _EXIT_TIMEOUT
    _HOOKS[os.getpid()] = False
    states = [state for state in list(_OPEN) if state.pid == os.getpid()]
    for state in states:
        state.hurry()
    lost, why = 0, None
    for state in states:
        try:
            state.close(max(0.0, deadline - time.monotonic()))
        except Exception as error:  # whatever befalls one, the others have their turn
            records = getattr(error, "records", [])
            if state.on_error is not None:
                _tell(state.on_error, error, records)
            else:
                lost, why = lost + len(records), error
    if lost:
        _log("error", "%d records were not delivered at exit: %s", lost, why)


########################################################################################################################
# Receiver: a server for tests and for looking at what arrives
########################################################################################################################

_MAX_BODY = 16 * 1024 * 1024  # bytes of a request's body
_MAX_TEXT = 64 * 1024 * 1024  # bytes in it, decompressed


class Receiver:
    """A small HTTP server that accepts records at ``/up`` as the platform does, checks them, and keeps them.

        with Receiver() as server:
            tracker = AnalysysPythonSdk(DefaultCollecter(server.url))
            ...
            assert server.records == [...]

    *host* and *port* (0: a free one) say where it listens. ``url`` is the address to give to a collecter and
    ``records`` the list of what was accepted, in the order of arrival. A request with one bad record is refused whole.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        import http.server
        import socket
        import socketserver

        self.records: "List[Record]" = []
        self._connections: "set[Any]" = set()  # open ones; closed with the server
        how = {"daemon_threads": True, "address_family": socket.AF_INET6 if ":" in host else socket.AF_INET}
        server = type("_Server", (socketserver.ThreadingMixIn, http.server.HTTPServer), how)
        self._server: "Any" = server((host, port), _handler(self))
        shown = "[%s]" % host if ":" in host else host
        self.url = "http://%s:%d" % (shown, self._server.server_address[1])
        self._thread: "Optional[threading.Thread]" = None

    def __enter__(self) -> "Receiver":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: "Any") -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and close all connections."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        for connection in list(self._connections):
            _hang_up(connection)

    def accept(self, body: bytes) -> "Tuple[int, Record]":
        """Take the body of a request; return the HTTP status and the JSON object to answer."""
        try:
            text = body if body.lstrip()[:1] == b"[" else _unpack(body, _MAX_TEXT)
            records = json.loads(text.decode("utf-8"))
            if not isinstance(records, list) or not records:
                raise ValueError("the body must be an array of records")
            for number, record in enumerate(records):
                try:
                    _check_record(record)
                except AnalysysPythonSdkIllegalDataException as error:
                    raise ValueError("record %d: %s" % (number, error)) from None
        except (ValueError, RecursionError) as error:
            return 200, {"code": 400, "msg": str(error)}
        self.records.extend(records)
        return 200, {"code": 200}


def _hang_up(connection: "Any") -> None:
    import socket

    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _handler(receiver: Receiver) -> "Any":
    """Return the class that handles the requests to *receiver*."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 60  # seconds for a silent connection
        wbufsize = -1  # one packet an answer

        def setup(self) -> None:
            super().setup()
            receiver._connections.add(self.connection)

        def finish(self) -> None:
            receiver._connections.discard(self.connection)
            try:
                super().finish()
            except OSError:  # the client is gone
                pass

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self.path.split("?")[0].endswith("/up"):
                self._answer(404, {"code": 404, "msg": "records go to /up"})
            elif not length.isdigit():
                self._answer(411, {"code": 411, "msg": "Content-Length is missing"})
            elif int(length) > _MAX_BODY:
                self._answer(413, {"code": 413, "msg": "a body has at most %d bytes" % _MAX_BODY})
            else:
                self._answer(*receiver.accept(self.rfile.read(int(length))))

        def _answer(self, status: int, told: "Record") -> None:
            self.close_connection = self.close_connection or status != 200  # the body may be unread
            payload = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: "Any") -> None:
            """Keep quiet: `records` says it all."""

    return Handler


########################################################################################################################
# Command line
########################################################################################################################

_DONE, _SOME_REJECTED, _NOT_DELIVERED, _WRONG_USAGE = 0, 1, 2, 64  # exit statuses: C8


def main(argv: "Optional[List[str]]" = None) -> int:
    """Run the command line with *argv* (None: that of the process) and return its exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="analysys", description="Server-side events for Analysys Ark.")
    parser.add_argument("--version", action="store_true", help="show the version, the file's SHA-256 and the Python")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the product document's scenario on this machine")
    demo.set_defaults(run=_demo)
    upload = commands.add_parser("upload", help="deliver files of records")
    upload.set_defaults(run=_upload)
    add = upload.add_argument
    add("path", nargs="+", metavar="PATH", help="a directory of datas_*.log, a file, a .gz, or -")
    add("--server", metavar="URL", default="", help="http(s)://host[:port][/path]")
    add("--dry-run", action="store_true", help="send nothing: check every line and print a summary")
    add("--follow", action="store_true", help="go on as files grow and rotate, until SIGTERM")
    add("--delete", action="store_true", help="remove files that are wholly delivered and not in use")
    add("--history", action="store_true", help="add $importFlag: 1 to records that lack it")
    add("--checkpoint", metavar="FILE", help="where to note what is delivered; default: beside the files")
    add("--batch", type=_converter("size", int), default=500, metavar="N", help="records a request; 500")
    seconds = _converter("seconds", float)
    add("--request-timeout", type=seconds, default=_REQUEST_TIMEOUT, metavar="SECONDS", help="for a whole request; 10")
    add("--ca", metavar="FILE", help="certificates of a private CA, in PEM")
    add("--header", action="append", default=[], metavar="'Name: value'", help="for every request")
    stderr, sys.stderr = sys.stderr, io.StringIO()  # argparse's usage lines; its last line says what is wrong
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        if not stop.code:
            return _DONE
        said, sys.stderr = sys.stderr.getvalue(), stderr
        _print(said.strip().splitlines()[-1], sys.stderr)
        return _WRONG_USAGE
    finally:
        sys.stderr = stderr
    if arguments.version:
        _print("analysys %s, SHA-256 %s, Python %s" % (__version__, _fingerprint(), sys.version.split()[0]))
        return _DONE
    if arguments.command is None:
        _print(parser.format_help().rstrip())
        return _DONE
    try:
        status: int = arguments.run(arguments)
        return status
    except (AnalysysPythonSdkException, OSError) as error:
        _print("analysys: %s" % error, sys.stderr)
        return _WRONG_USAGE if isinstance(error, AnalysysPythonSdkIllegalDataException) else _NOT_DELIVERED


def _converter(rule: str, kind: "Any") -> "Any":
    """Return what turns an option's text into a value that keeps to a rule of `_RULES`."""

    def number(text: str) -> "Any":
        return _RULES[rule].plain(kind(text))

    return number


def _print(text: str, file: "Any" = None) -> None:
    """Print *text*, also on a terminal that cannot show all of it."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _fingerprint() -> str:
    """Return the SHA-256 of this file: people copy it and want to know which one they have."""
    import hashlib

    try:
        source = globals()["__loader__"].get_data(__file__)  # from a zip, too
    except (KeyError, OSError, AttributeError):
        return "unknown"
    return hashlib.sha256(source).hexdigest()


def _upload(arguments: "Any") -> int:
    """Deliver files of lines, or check them only."""
    paths = list(map(_existing, arguments.path))
    if arguments.dry_run:
        return _check_files(paths)
    headers = _http_headers(dict(map(_header, arguments.header)))
    context = None
    if arguments.ca:
        import ssl

        context = ssl.create_default_context(cafile=arguments.ca)
    transport = _Transport(_url(arguments.server), context, headers)
    checkpoint = _Checkpoint(arguments.checkpoint or _beside(paths[0]))
    checkpoint.lock()
    try:
        shipment = _Shipment(paths, checkpoint, arguments)
        sender = _Sender(transport, shipment.ledger)
        _ship(shipment, sender, arguments)
        return _sum_up(shipment, sender)
    finally:
        transport.close()
        checkpoint.unlock()


def _sum_up(shipment: "_Shipment", sender: "_Sender") -> int:
    """Print what became of a shipment and return the exit status that says so."""
    counts = shipment.stats()
    remaining = shipment.remaining()
    _print("delivered %d, rejected %d, remaining %d" % (counts["delivered"], counts["rejected"], remaining))
    if counts["rejected"]:
        _print("the rejected ones are in %s" % shipment.rejected_path)
    if remaining:
        why = shipment.problem or ("it was stopped" if sender.failing_since is None else sender.state())
        _print("analysys: not all is delivered: %s" % why, sys.stderr)
        return _NOT_DELIVERED
    return _SOME_REJECTED if counts["rejected"] else _DONE


def _header(text: str) -> "Tuple[str, str]":
    name, colon, value = text.partition(":")
    if not colon:
        raise _illegal("--header", text, "must be 'Name: value'")
    return name.strip(), value.strip()


def _beside(path: str) -> str:
    """Return the checkpoint that lies beside *path*; for standard input there is none."""
    if path == "-":
        return ""
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "upload.checkpoint")


def _ship(shipment: "_Shipment", sender: "_Sender", options: "Any") -> None:
    """Send until all is delivered, the server has failed for too long, or a signal says stop."""
    import signal

    signals: "List[int]" = []
    woken = _Signal()  # not an Event, whose lock a handler would wait for that interrupts a wait
    progress = _Progress(shipment)
    kept = {}

    def on_signal(number: int, _: "Any") -> None:
        signals.append(number)
        woken.notify()
        if shipment.is_waiting:  # for standard input; but a request under way is waited for
            raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, on_signal)
    try:
        while not signals:
            sender.attempt(shipment, options.batch, options.request_timeout)
            sender.warn()
            while shipment.refusals:
                _log("error", "%s", shipment.refusals.popleft())
            progress.show()
            if sender.failing_since is not None:
                if not options.follow and sender.not_before - sender.failing_since > _GIVE_UP:
                    break
                woken.wait_for(lambda: bool(signals), sender.not_before)
            elif shipment.is_empty():
                if not options.follow:
                    break
                if not shipment.look_again():
                    woken.wait_for(lambda: bool(signals), time.monotonic() + _FOLLOW_EVERY)
    except KeyboardInterrupt:
        pass
    finally:
        progress.end()
        for number, handler in kept.items():
            signal.signal(number, handler)


class _Progress:
    """Shows how far a shipment is: a line that changes on a terminal, otherwise a line a minute."""

    def __init__(self, shipment: "_Shipment") -> None:
        self._shipment = shipment
        self._began = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._every = 0.5 if self._is_terminal else 60.0  # seconds
        self._next = self._began + self._every

    def show(self) -> None:
        """Show a line if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        seconds = now - self._began
        files, done, total = self._shipment.progress()
        counts = self._shipment.stats()
        events = counts["delivered"] + counts["rejected"]
        left = seconds * (total - done) / done if done else 0.0
        text = "%s, %.1f of %.1f MB" % (files, done / 1e6, total / 1e6)
        text += ", %d events, %.0f events/s" % (events, events / seconds)
        text += ", %d:%02d left" % divmod(left, 60)
        sys.stderr.write("\r%s\x1b[K" % text if self._is_terminal else text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the terminal's line empty."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")


class _Checkpoint:
    """What is delivered of which file, in a file of its own that is replaced as a whole; and a lock beside it.

    A file is known by a hash of its beginning, up to 4 KiB of what was delivered of it: names change with logrotate and
    gzip, inodes with copying. An empty *path* keeps nothing.
    """

    def __init__(self, path: str) -> None:
        self.path = path and os.path.abspath(path)
        self._entries: "List[Record]" = []  # {"name", "hash", "hashed", "offset", "line"} each
        self._lock_fd = -1

    def lock(self) -> None:
        """Keep other uploads away and read the file; raise where another is at work or that cannot be done."""
        if not self.path:
            return
        try:
            self._lock_fd = _open_lines(self.path + ".lock", 0o666)
            mine = _lock_forever(self._lock_fd)
            if mine and os.path.exists(self.path):
                with io.open(self.path, encoding="utf-8") as file:
                    self._entries = json.load(file)["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = "cannot use the checkpoint %s (--checkpoint FILE names another): %s" % (self.path, error)
            raise AnalysysPythonSdkFileException(message) from error
        if not mine:
            raise AnalysysPythonSdkFileException("another upload is at work: it holds %s.lock" % self.path)

    def unlock(self) -> None:
        """Let other uploads in."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def entry(self, name: str, head: bytes) -> "Record":
        """Return the entry of the file that begins with *head*: a known one whose hash fits, or else a new one."""
        sizes = {entry["hashed"] for entry in self._entries}
        hashes = {size: _hash(head[:size]) for size in sizes if size <= len(head)}
        fitting = [entry for entry in self._entries if hashes.get(entry["hashed"]) == entry["hash"]]
        if fitting:
            return max(fitting, key=lambda entry: (entry["hashed"], entry["name"] == name, entry["offset"]))
        return {"name": name, "hash": "", "hashed": 0, "offset": 0, "line": 0}

    def note(self, entry: "Record", name: str, head: bytes, line: "_Line") -> None:
        """Note that all up to *line* is settled, and save."""
        if not entry["hashed"]:
            self._entries.append(entry)
        hashed = min(len(head), line.end)
        if hashed > entry["hashed"]:
            entry.update(hashed=hashed, hash=_hash(head[:hashed]))
        entry.update(name=name, offset=line.end, line=line.number)
        self._save()

    def forget(self, entry: "Record") -> None:
        """Note that a file was removed, and save. The last of such entries are kept, for copies of their files."""
        entry["removed"] = True
        gone = [other for other in self._entries if other.get("removed")]
        self._entries = [other for other in self._entries if other not in gone[:-_REMOVED_KEPT]]
        self._save()

    def _save(self) -> None:
        if not self.path:
            return
        draft = self.path + ".new"
        with io.open(draft, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "files": self._entries}, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.path)
        _sync_directory(os.path.dirname(self.path))


def _sync_directory(path: str) -> None:
    """Have renames and removals in a directory survive a power cut, where the system can do that."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def _hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _files(paths: "List[str]") -> "List[str]":
    """Return the files to deliver in the order of their names; a directory stands for its ``datas_*.log``."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            names = sorted(name for name in os.listdir(path) if _LOG_FILE.fullmatch(name))
            found += [os.path.join(path, name) for name in names]
        elif path == "-" or os.path.exists(path):
            found.append(path)
    return found


def _existing(path: str) -> str:
    if path != "-" and not os.path.exists(path):
        raise _illegal("PATH", path, "must be a directory, a file, or -")
    return path


def _open_to_read(path: str) -> "Any":
    if path == "-":
        return sys.stdin.buffer
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if path.endswith(".gz"):
        import gzip

        return gzip.open(path, "rb")
    return io.open(path, "rb")


class _Shipment:
    """The lines of files as a queue for the sender. What is settled is noted in the checkpoint."""

    def __init__(self, paths: "List[str]", checkpoint: "_Checkpoint", options: "Any") -> None:
        self.ledger = _Ledger()
        self.stats = self.ledger.stats
        self.refusals: "Deque[AnalysysPythonSdkException]" = collections.deque()
        self.problem = ""  # why a file could not be read
        self.is_waiting = False  # for standard input
        self.rejected_path = os.path.join(os.path.dirname(checkpoint.path or os.path.abspath("-")), "rejected.log")
        self._paths = paths
        self._checkpoint = checkpoint
        self._options = options
        self._rejected = _SharedFile(self.rejected_path)
        self._seen: "Dict[str, Any]" = {}  # path -> what stat said before it was read to its end
        self._done: "Dict[str, Any]" = {}  # path -> what stat said, size, entry: of files that may go in time
        self._waiting = _files(paths)
        self._file: "Any" = None  # the one that is read, and about it:
        self._path = ""
        self._opened: "Any" = None  # what stat said
        self._head = b""
        self._entry: "Record" = {}
        self._position = (0, 0)
        self._ahead: "List[_Line]" = []  # read, but not taken
        self._inflight: "List[_Line]" = []

    def take(self, most: int) -> int:
        """Take up to *most* lines in flight, all of one file, and return their number. Damaged ones are rejected."""
        while True:
            lines = self._ahead or self._read(most)
            if not lines:
                return 0
            sound = _sound(lines)
            keep = len(lines) if sound == len(lines) else max(1, sound)  # a damaged line is taken alone
            self._inflight, self._ahead = lines[:keep], lines[keep:]
            self.ledger.add({"accepted": keep, "pending": keep})
            if sound:
                if self._options.history:
                    self._inflight = [line._replace(text=_as_history(line.text)) for line in self._inflight]
                return keep
            reason = "line %d of %s is %s" % (lines[0].number, lines[0].file, _damage(lines[0].text))
            self.settle(1, AnalysysPythonSdkIllegalDataException(reason, _records([lines[0].text])))

    def head(self, number: int) -> "List[bytes]":
        """Return the first *number* lines in flight."""
        return [line.text for line in self._inflight[:number]]

    def settle(self, number: int, error: "Optional[AnalysysPythonSdkException]" = None) -> None:
        """Let go of the first *number* in flight: delivered, or rejected with *error*."""
        done = self._inflight[:number]
        if error is not None:
            _reject_lines(self._rejected, done, str(error))
            self.refusals.append(error)
        if self._path != "-":
            self._checkpoint.note(self._entry, os.path.basename(self._path), self._head, done[-1])
        self._inflight = self._inflight[number:]
        self.ledger.add(_settled(number, error))

    def is_empty(self) -> bool:
        return self._file is None and not self._waiting and not self._inflight

    def look_again(self) -> bool:
        """Return whether there are files that are new, have grown or were renamed since they were read."""
        self._waiting = [path for path in _files(self._paths) if path != "-" and self._seen.get(path) != _stat(path)]
        self._tidy()
        return bool(self._waiting)

    def remaining(self) -> int:
        """Return how many lines are not settled; of standard input, how many of those that were read."""
        left = len(self._inflight + self._ahead) if self._path == "-" else 0
        self._close()
        for path in [path for path in _files(self._paths) if path != "-"]:
            try:
                with _open_to_read(path) as file:
                    file.seek(self._checkpoint.entry(os.path.basename(path), file.read(_HASHED))["offset"])
                    left += sum(not line.isspace() and self._is_whole(path, line) for line in file)
            except Exception as error:  # gzip has many
                self.problem = "%s: %s" % (path, error)
                left += 1
        return left

    def progress(self) -> "Tuple[str, int, int]":
        """Return how many files are read, the bytes that are, and the bytes there are."""
        sizes = {path: os.path.getsize(path) for path in _files(self._paths) if path != "-"}
        undone = set(self._waiting + [self._path])
        done = sum(size for path, size in sizes.items() if path not in undone)
        files = "%d of %d files" % (len(sizes) - len(undone.intersection(sizes)), len(sizes))
        return files, done + min(self._position[0], sizes.get(self._path, 0)), sum(sizes.values())

    def _read(self, most: int) -> "List[_Line]":
        """Return the next lines, of the first file that has any."""
        while self._file is not None or self._waiting:
            try:
                if self._file is None:
                    self._open(self._waiting.pop(0))
                lines = self._read_file(most)
            except Exception as error:  # gzip has many
                self.problem = "%s: %s" % (self._path, error)
                _log("error", "cannot read %s", self.problem)
                self._seen[self._path] = self._opened
                self._close()
                continue
            if lines:
                return lines
            self._finish()
        return []

    def _read_file(self, most: int) -> "List[_Line]":
        name = os.path.basename(self._path)
        if self._path != "-":
            lines, self._position = _read_lines(self._file, name, self._position, most, float("inf"))
            if lines and not self._is_whole(self._path, lines[-1].text):
                cut = lines.pop()
                self._position = (cut.end - len(cut.text), cut.number - 1)
                self._file.seek(self._position[0])
            return lines
        try:
            self.is_waiting = True
            while len(self._ahead) < most:  # kept there line by line, since a signal ends the wait for more
                lines, self._position = _read_lines(self._file, name, self._position, 1, float("inf"))
                if not lines:
                    break
                self._ahead += lines
        finally:
            self.is_waiting = False
        return self._ahead

    def _open(self, path: str) -> None:
        self._path, self._opened, self._position = path, _stat(path), (0, 0)
        self._file = _open_to_read(path)
        if path != "-":
            self._head = self._file.read(_HASHED)
            self._entry = self._checkpoint.entry(os.path.basename(path), self._head)
            self._position = (self._entry["offset"], self._entry["line"])
            self._file.seek(self._position[0])

    def _is_whole(self, path: str, text: bytes) -> bool:
        """Tell whether a line of *path* has its newline, or is all that there will be of it without."""
        is_final = text.endswith(b"\n") or len(text) == _MAX_LINE or path.endswith(".gz")
        return is_final or not self._options.follow and _damage(text) is None

    def _finish(self) -> None:
        """Be done with a file that is read to its end."""
        path, self._seen[self._path] = self._path, self._opened
        self._close()
        if path != "-":
            self._done[path] = (self._opened, self._position[0], self._entry)
            self._tidy()

    def _tidy(self) -> None:
        """Remove, if that is asked for, files that are wholly delivered and no longer in use."""
        for path, (opened, size, entry) in list(self._done.items()) if self._options.delete else []:
            if self._is_old(path):
                del self._done[path]
                if _remove(path, opened, size):
                    self._checkpoint.forget(entry)

    def _is_old(self, path: str) -> bool:
        """Tell whether *path* is neither of the current period nor of the newest one, by its name."""
        periods = [os.path.basename(found).partition(".log")[0] for found in [path] + _files(self._paths)]
        current = [time.strftime(pattern).partition(".log")[0] for pattern in _LOG_NAMES.values()]
        return periods[0] not in current + [max(periods)]

    def _close(self) -> None:
        if self._file is not None and self._path != "-":
            self._file.close()
        self._file, self._path = None, ""


def _stat(path: str) -> "Any":
    """Return what changes when a file is written to or replaced; None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime


def _remove(path: str, opened: "Any", size: int) -> bool:
    """Remove *path*, under its lock, if it is as it was when *opened* and its lines end at *size*."""
    try:
        fd = os.open(path, os.O_RDWR)
        try:
            _lock_file(fd)
            if _stat(path) != opened or not path.endswith(".gz") and opened[2] != size:
                return False
            os.unlink(path)
        finally:
            os.close(fd)
        _sync_directory(os.path.dirname(os.path.abspath(path)))
        return True
    except OSError as error:
        _log("warning", "cannot remove %s: %s", path, error)
        return False


def _as_history(text: bytes) -> bytes:
    """Return a record with the flag that has the platform take it whatever its time."""
    record = _decode(text)
    if isinstance(record.get("xcontext"), dict):
        record["xcontext"].setdefault("$importFlag", 1)
    return json.dumps(record).encode("ascii")


def _check_files(paths: "List[str]") -> int:
    """Check every line by the rules for records; print a summary by event and by error."""
    events: "Dict[str, List[Any]]" = {}  # name -> [how many, where the first is]
    errors: "Dict[str, List[Any]]" = {}
    for path in _files(paths):
        number = 0
        try:
            for number, text in enumerate(_open_to_read(path), 1):
                if text.isspace():
                    continue
                try:
                    if _damage(text) is not None:
                        raise AnalysysPythonSdkIllegalDataException("damaged")
                    record = _decode(text)
                    _check_record(record)
                    counts = events.setdefault(record["xwhat"], [0, path, number])
                except AnalysysPythonSdkIllegalDataException as error:
                    counts = errors.setdefault(error.rule or "not a JSON object", [0, path, number])
                counts[0] += 1
        except Exception as error:  # gzip has many
            errors.setdefault("cannot be read: %s" % error, [0, path, number + 1])[0] += 1
    for kind, found in (("event", events), ("error", errors)):
        for name, (count, path, number) in sorted(found.items(), key=lambda entry: -int(entry[1][0])):
            _print("%8d  %s  %s  (first: %s:%d)" % (count, kind, name, path, number))
    good, bad = (sum(counts[0] for counts in found.values()) for found in (events, errors))
    _print("%d lines are good, %d are not" % (good, bad))
    return _SOME_REJECTED if errors else _DONE


def _demo(arguments: "Any") -> int:
    """Run the scenario through all three collecters and show what arrived."""
    import tempfile

    os.environ["no_proxy"] = "*"  # the receiver is on this machine
    sent = received = 0
    with tempfile.TemporaryDirectory() as directory, Receiver() as server:
        for name, collecter in (
            ("DefaultCollecter", DefaultCollecter(server.url)),
            ("BatchCollecter", BatchCollecter(server.url)),
            ("LogCollecter", LogCollecter(directory)),
        ):
            before = len(server.records)
            with AnalysysPythonSdk(collecter) as tracker:
                _scenario(tracker)
            arrived = server.records[before:]
            for file in sorted(os.listdir(directory)):
                with io.open(os.path.join(directory, file), encoding="utf-8") as lines:
                    arrived += [json.loads(line) for line in lines]
            _print("%s: %d sent, %d received" % (name, collecter.stats()["accepted"], len(arrived)))
            _print_table(arrived)
            sent, received = sent + collecter.stats()["accepted"], received + len(arrived)
    _print("%d sent, %d received" % (sent, received))
    return _DONE if received == sent > 0 else _NOT_DELIVERED


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


def _print_table(records: "List[Record]") -> None:
    """Print one line a record: when, who, what, platform, login, properties."""
    rows = [("time", "who", "what", "platform", "login", "properties")]
    for record in records:
        context = record["xcontext"]
        own = {name: value for name, value in context.items() if name not in _CONTEXT_RULES or name == "$original_id"}
        when = time.strftime("%H:%M:%S", time.localtime(record["xwhen"] / 1000))
        login = "yes" if context["$is_login"] else "no"
        rows.append((when, record["xwho"], record["xwhat"], context["$platform"], login, _encode(own)))
    widths = [max(_width(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths)]
        _print("  " + "  ".join(cells + [row[5]]))
    _print("")


def _width(text: str) -> int:
    """Return how many columns a terminal takes to show *text*."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


if __name__ == "__main__":
    sys.exit(main())
